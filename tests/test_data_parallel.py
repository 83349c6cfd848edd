"""One large batch, its micro-batches and its processes: one gradient with ``normalizer``, another by means of means."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from sharded import needs_gloo
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels.backends import BACKENDS

if TYPE_CHECKING:
    from types import ModuleType

PROGRAM = Path(__file__).parent.parent / "examples" / "data_parallel.py"
EPS, PADDING = 0.1, -100


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("data_parallel", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unequal_batch(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Features (16, 3, 9), targets (16, 3), 0 to 6 valid ones per two sequences, the weight (9, 41) of a classifier."""
    rng = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(*shape, generator=rng) for shape in ((16, 3, 9), (9, 41)))
    target = torch.randint(41, (16, 3), generator=rng)
    valid = torch.arange(6) < torch.tensor([6, 1, 0, 4, 2, 6, 3, 5])[:, None]
    target = torch.where(valid.reshape(16, 3), target, PADDING)
    return features.to(device, dtype), target.to(device), weight.to(device, dtype)


def gradient(
    batch: tuple[Tensor, Tensor, Tensor], backend: str, pieces: int, normalizer: Tensor | None, over: int = 1
) -> Tensor:
    """The gradient that ``pieces`` micro-batches accumulate in a linear classifier's weight."""
    features, target, weight = batch
    leaf = weight.clone().requires_grad_()
    for x, y in zip(features.chunk(pieces), target.chunk(pieces), strict=True):
        loss = lsk.cross_entropy(x @ leaf, y, class_dim=-1, label_smoothing=EPS, normalizer=normalizer, backend=backend)
        (loss.nan_to_num() / over).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulated_gradient_is_the_whole_batchs(place: tuple[str, str], dtype: torch.dtype) -> None:
    if dtype not in BACKENDS[place[0]].dtypes:
        pytest.skip(f"{place[0]} does not serve {dtype}")
    batch = unequal_batch(dtype, place[1])
    features, target, weight = batch
    leaf = weight.double().clone().requires_grad_()
    loss = F.cross_entropy((features.double() @ leaf).flatten(0, 1), target.flatten(), label_smoothing=EPS)
    (want,) = torch.autograd.grad(loss, leaf)
    count, largest = (target != PADDING).sum(), want.abs().max()
    bound = 2e-6 if dtype == torch.float32 else 1e-13
    for pieces in (1, 8):
        got = gradient(batch, place[0], pieces, count)
        assert (got.double() - want).abs().max() <= bound * largest
    naive = gradient(batch, "reference", 8, None, over=8)
    assert (naive.double() - want).abs().max() > 0.1 * largest, "counts as unequal as these must show"


def test_a_micro_batch_of_padding_adds_exactly_nothing(place: tuple[str, str]) -> None:
    x = torch.randn(4, 9, device=place[1], requires_grad=True)
    y = torch.full((4,), PADDING, device=place[1])
    loss = lsk.cross_entropy(x, y, label_smoothing=EPS, normalizer=torch.tensor(106), backend=place[0])
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_the_example_alone(example: ModuleType) -> None:
    batch = example.one_step()
    counts = example.valid_tokens(example.cut(batch, 8)).tolist()
    assert 0 in counts
    assert len(set(counts)) == 8
    whole, whole_loss = example.train(example.cut(batch, 1))
    pieces, loss = example.train(example.cut(batch, 8))
    torch.testing.assert_close(loss, whole_loss)
    assert (pieces - whole).abs().max() <= 1e-6 * whole.abs().max()
    naive, _ = example.train(example.cut(batch, 8), naive=True)
    assert (naive - whole).abs().max() > 0.1 * whole.abs().max()


def table(*command: str) -> dict[str, tuple[float, float]]:
    """What the program prints: way of cutting a step up → (loss, relative difference of the gradient)."""
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = re.findall(r"^(.+?) {2,}([\d.]+) +([\d.]+e[+-]\d+)$", ended.stdout, re.MULTILINE)
    return {name: (float(loss), float(difference)) for name, loss, difference in rows}


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "bound", "command"),
    [
        ("float64", 1e-12, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM)]),
        pytest.param("float32", 1e-6, [str(PROGRAM), "--processes", "2"], marks=pytest.mark.repeats),
    ],
    ids=["torchrun", "spawned"],
)
def test_two_processes(dtype: str, bound: float, command: list[str]) -> None:
    """DistributedDataParallel over gloo, four micro-batches in each process."""
    differences = table(*command, "--dtype", dtype, "--steps", "1")
    ways = ["8 micro-batches", "2 processes, 4 micro-batches each"]
    assert list(differences) == [*ways, *(f"{way}, mean of means" for way in ways)]
    for way in ways:
        assert differences[way][1] <= bound
        assert differences[f"{way}, mean of means"][1] > 0.1
