"""Each option of the loss shows at every entry point: in a result, or in an error that names it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import unittest.mock
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sharded import needs_gloo, spawn
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from pathlib import Path

CHANGED: dict[str, Any] = {  # each option of LossSpec once, so that it shows beside an ε of 0.1
    "weight": torch.linspace(0.2, 2, 5).double(), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.3,
    "smoothing": "others", "smooth_over": "finite", "class_dim": 0, "z_loss": 0.1, "confidence_penalty": 0.2,
    "logit_scale": 2.0, "softcap": 2.0, "row_weight": torch.linspace(0.5, 1, 5).double(), "normalizer": 7.0,
    "inplace": True, "return_stats": True, "backend": "fpga",
}  # fmt: skip
PER_CALL = ("row_weight", "normalizer")
HEAD, Y5 = torch.eye(5).double(), torch.tensor([0, 3, 2, 1, 3])
Entry = Callable[[Tensor, Tensor, dict[str, Any]], Any]


def _module(z: Tensor, bias: Tensor, given: dict[str, Any]) -> Any:
    own = {name: value for name, value in given.items() if name not in PER_CALL}
    return lsk.CrossEntropyLoss(**own)(z, Y5, **{name: given[name] for name in PER_CALL if name in given})


def _linear_module(x: Tensor, bias: Tensor, given: dict[str, Any]) -> Any:
    own = {name: value for name, value in given.items() if name not in PER_CALL}
    module = lsk.LinearCrossEntropyLoss(5, 5, bias=True, **own).double()
    module.linear.load_state_dict({"weight": HEAD, "bias": bias})
    return module(x, Y5, **{name: given[name] for name in PER_CALL if name in given})


ENTRIES: dict[str, Entry] = {
    "cross_entropy": lambda z, _, given: lsk.cross_entropy(z, Y5, **given),
    "linear_cross_entropy": lambda x, b, given: lsk.linear_cross_entropy(x, HEAD, Y5, linear_bias=b, **given),
    "CrossEntropyLoss": _module,
    "LinearCrossEntropyLoss": _linear_module,
    "distillation_loss": lambda z, _, given: lsk.distillation.distillation_loss(z, HEAD, Y5, **given),
}


def _observed(entry: str, call: Entry, name: str, options: dict[str, Any]) -> list[Tensor]:
    """Loss, statistics, gradient, and the logits after the backward; with a masked class where options are about it."""
    leaf = torch.randn(5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    bias = torch.tensor([0, 0, 0, 0, -torch.inf if name == "smooth_over" else 0]).double()
    z = leaf * 1.0 if "inear" in entry else leaf + bias
    found = call(z, bias, {"label_smoothing": 0.1, **options})
    loss, stats = found if isinstance(found, tuple) else (found, ())
    loss.backward()
    return [loss, leaf.grad, z, *(value for value in stats if value is not None)]


def every_option_shows(entries: dict[str, Entry]) -> None:
    assert CHANGED.keys() == {f.name for f in dataclasses.fields(lsk.LossSpec)}, "a new option needs a value here"
    for entry, (name, value) in itertools.product(entries, CHANGED.items()):
        if name == "inplace" and backends.BACKENDS["cpu"].unavailable():
            continue  # the reference overwrites nothing
        plain = _observed(entry, entries[entry], name, {})
        try:
            changed = _observed(entry, entries[entry], name, {name: value})
        except (TypeError, ValueError) as error:
            assert name in str(error), f"{entry} refuses {name} without its name"  # noqa: PT017  # either may happen
            continue
        same = len(plain) == len(changed) and all(
            map(functools.partial(torch.allclose, equal_nan=True), plain, changed)
        )
        assert not same, f"{entry} ignores {name}"


def test_every_option_shows_at_every_entry() -> None:
    every_option_shows(ENTRIES)


def _on_one_rank(rank: int) -> None:
    mesh, parallel = init_device_mesh("cpu", (1,)), lsk.parallel
    placed = lambda t, dim: DTensor.from_local(t, mesh, [Shard(dim)])  # noqa: E731
    every_option_shows(
        {
            "cross_entropy": lambda z, _, given: parallel.cross_entropy(z, Y5, **given),
            "linear": lambda x, b, given: parallel.linear_cross_entropy(x, HEAD, Y5, linear_bias=b, **given),
            "DTensor": lambda z, _, given: lsk.cross_entropy(placed(z, given.get("class_dim", 1)), Y5, **given),
            "linear, DTensor": lambda x, b, given: lsk.linear_cross_entropy(
                x, placed(HEAD, 0), Y5, linear_bias=placed(b, 0), **given
            ),
        }
    )
    x, left_out = torch.randn(5, 5), (("z_loss", 0.0),)
    with unittest.mock.patch.object(parallel, "_LEFT_OUT", left_out):  # as one that no operator has an argument for
        for call in (
            lambda **given: parallel.cross_entropy(x, Y5, **given),
            lambda **given: parallel.linear_cross_entropy(x, HEAD.float(), Y5, **given),
            lambda **given: lsk.cross_entropy(placed(x, 1), Y5, **given),
            lambda **given: lsk.linear_cross_entropy(x, placed(HEAD.float(), 0), Y5, **given),
        ):
            call(z_loss=0.0)
            with pytest.raises(lsk.ArgumentError, match=r"z_loss must be 0\.0 where classes are sharded.*got 0\.1"):
                call(z_loss=0.1)


@needs_gloo
def test_every_option_shows_over_ranks(tmp_path: Path) -> None:
    spawn(_on_one_rank, 1, tmp_path)
