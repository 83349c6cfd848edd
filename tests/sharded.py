"""What the tests of ranks share: processes, slices of classes, options, and one device's numbers to compare with."""

from __future__ import annotations

import datetime
import functools
import multiprocessing
import uuid
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from covering import Mode
from torch import Tensor

from labelsmooth_kernels import ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no torch.distributed with gloo"
)

N, D, EPS = 12, 5, 0.1


CUTS = {"2": (0, 8, 16), "unequal": (0, 1, 5), "empty between": (0, 3, 3, 11), "few classes": (0, 0, 2, 2, 5)}


PRECISE = {
    torch.float64: (1e-11, 1e-12),
    torch.float32: (2e-5, 2e-6),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (4e-3, 4e-3),
}


COLUMNS = ("weight", "smoothing")


def options(k: int) -> dict[str, dict[str, Any]]:
    rng = torch.Generator().manual_seed(k)
    weight, prior, rows = (torch.rand(n, generator=rng, dtype=torch.float64) + 0.1 for n in (k, k, N))
    smoothed: dict[str, Any] = {"label_smoothing": EPS}
    return {
        "plain": {},
        "uniform": smoothed,
        "sharpened": {"label_smoothing": -0.2},
        "others": smoothed | {"smoothing": "others"},
        "prior": smoothed | {"smoothing": prior / prior.sum()},
        "class weights": {"weight": weight},
        "class weights and prior": smoothed | {"weight": weight, "smoothing": prior / prior.sum()},
        "z-loss and penalty": smoothed | {"z_loss": 1e-2, "confidence_penalty": 0.1},
        "scale and cap": smoothed | {"logit_scale": -0.5, "softcap": 3.0},
        "row and class weights": smoothed | {"row_weight": rows, "weight": weight},
        "normalizer": smoothed | {"normalizer": torch.tensor(11)},
        "over the rows": {"row_weight": rows, "weight": weight, "normalizer": "rows"},
        "sum": {"reduction": "sum", "weight": weight},
        "none": {"reduction": "none", "label_smoothing": torch.linspace(-0.3, 1, N, dtype=torch.float64)},
        "class 0 ignored": smoothed | {"ignore_index": 0},
    }


def of_rank(given: dict[str, Any], part: slice) -> dict[str, Any]:
    return {k: v[part] if k in COLUMNS and isinstance(v, Tensor) else v for k, v in given.items()}


def draw(k: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, target, hidden, head)"""
    rng = torch.Generator().manual_seed(k)
    x, hidden, head = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((N, k), (N, D), (k, D)))
    y = torch.randint(k, (N,), generator=rng)
    y[2] = -100
    return (4 * x).to(dtype), y, hidden.to(dtype), head.to(dtype)


def spawn(run: Callable[..., None], size: int, folder: Path, *arguments: object, seconds: float = 60) -> None:
    """``run(rank, *arguments)`` in ``size`` processes, forked off one that has imported what takes long to import."""
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.tensor", "torch._dynamo", "labelsmooth_kernels.parallel"]
    )
    given = (run, size, f"{folder}/{uuid.uuid4()}", seconds, Mode.whole, arguments)
    torch.multiprocessing.start_processes(_begin, given, nprocs=size, start_method="forkserver")


def _begin(
    rank: int, run: Callable[..., None], size: int, store: str, seconds: float, whole: bool, arguments: Any
) -> None:
    Mode.whole = whole
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", datetime.timedelta(seconds=seconds), rank=rank, world_size=size)
    run(rank, *arguments)
    dist.destroy_process_group()


def of_case(name: str, y: Tensor) -> Tensor:
    """Its targets: where class 0 is the ignored one, no other is."""
    return y.where(y != -100, 0) if "ignored" in name else y


def agree_to_the_bit(values: Tensor) -> None:
    got, work = ranks.all_gather(values.detach().flatten(), dist.group.WORLD)
    work.wait()
    assert all(torch.equal(got[0], other) for other in got)


def same_as_one(name: str, got: Any, want: Any, grads: Any, want_grads: Any, dtype: torch.dtype) -> None:
    rtol, atol = PRECISE[dtype]
    close = functools.partial(
        torch.testing.assert_close, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}, {dtype}: {m}"
    )
    (loss, stats), (want_loss, want_stats) = got, want
    for value, wanted in zip((loss, *grads), (want_loss, *want_grads), strict=True):
        assert value.dtype == wanted.dtype
        close(value, wanted)
    for value, wanted in zip(stats, want_stats, strict=True):
        if value.is_floating_point():
            close(value, wanted)
        elif dtype not in (
            torch.bfloat16,
            torch.float16,
        ):  # where roundings make logits equal any may be first, and of NaNs any may
            close(value.where(~want_stats.lse.isnan(), 0), wanted.where(~want_stats.lse.isnan(), 0))
    agree_to_the_bit(loss)
