"""The CUDA kernels on the threads of a CPU: no race, and every form of them; their results are in the other tests."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import loss_and_grad
from conftest import HAS_CUDA, skip_unless_available
from covering import Mode
from cuda_shim import build
from rule import Problem, expect, judge_grad, judge_loss, judge_stats

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Iterator


def races(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if reason := build.missing(program):
        pytest.skip(reason)
    return subprocess.run([build.OUT / program, *arguments], capture_output=True, text=True, check=False, timeout=600)


def test_no_thread_races_another() -> None:
    done = races("races", "all" if Mode.whole else "few")
    assert done.returncode == 0, done.stderr[:4000]
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"rows", "on chip", "cluster", "split"}


@pytest.fixture
def switches() -> Iterator[Any]:
    """What the GPU that the threads stand for refuses, and what it has room for."""
    if HAS_CUDA:
        pytest.skip("a GPU launches")
    skip_unless_available("cuda")
    shim = torch.ops.labelsmooth_cuda_shim
    yield shim
    shim.refuse_launches(False)
    shim.resize(0, 0, 0)


def test_a_launch_that_fails_is_told_with_its_sizes(switches: Any) -> None:
    switches.refuse_launches(True)
    message = "the loss of 6 rows of 37 float32 classes: cluster_kernel: a launch of 6 blocks of 64 threads"
    with pytest.raises(RuntimeError, match=message):
        lsk.cross_entropy(torch.randn(6, 37, requires_grad=True), torch.arange(6), backend="cuda")


@pytest.mark.parametrize(
    ("part", "largest", "capability", "form"),
    [
        (512, 1, 90, "1 cluster_kernel"),
        (256, 2, 90, "2 cluster_kernel"),
        (256, 1, 90, "1 row_kernel"),
        (512, 0, 90, "1 row_kernel"),
        (512, 0, 80, "row_kernel, on chip"),
    ],
)
def test_forms_of_one_row_agree(switches: Any, part: int, largest: int, capability: int, form: str) -> None:
    """90 classes are read twice, or lie in the shared memory of one block or two."""
    x, y = torch.randn(6, 90), torch.arange(6)
    wanted = loss_and_grad(("reference", "cpu"), x, y, label_smoothing=0.1)
    switches.resize(part, largest, capability)
    for got, want in zip(loss_and_grad(("cuda", "cpu"), x, y, label_smoothing=0.1), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert switches.launched().split("\n")[0].endswith(form)


# Bytes of a row in a block, which takes 4096 at a time; blocks of a cluster; whether they are copied by a thread each.
HELD = [(1 << 14, 1, 90), (1 << 13, 2, 90), (1 << 11, 8, 90), (1 << 14, 0, 80)]
HELD_TOO = pytest.param(1 << 12, 4, 90, marks=pytest.mark.repeats)


@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "z_loss": 1e-2}], ids=["plain", "options"])
@pytest.mark.parametrize(("dtype", "k"), [(torch.float32, 4096), (torch.float32, 3701), (torch.bfloat16, 7993)])
@pytest.mark.parametrize(("part", "largest", "capability"), [*HELD, HELD_TOO])
def test_rows_that_arrive_in_batches(
    switches: Any, part: int, largest: int, capability: int, dtype: torch.dtype, k: int, options: dict[str, float]
) -> None:
    """Batches that are full, cut short and empty, unaligned rows, the target first, last and at every border."""
    y = torch.tensor([0, 1, k - 1, k - 2, k // 2, 7, -100, 5])
    x = torch.randn(len(y), k).mul_(3).to(dtype)
    x[4, k - 3] = x[4, k // 3] = 40.0  # the first of two maxima is the prediction
    x[5] = -torch.inf
    x[5, 7] = 0.0
    x[6] = 1.0  # the first lies in front of the vectors where rows are not aligned
    problem = Problem(x, y, {"label_smoothing": 0.1 * (y != 7), **options})
    ones = torch.ones(len(y), dtype=torch.float64)
    want = expect(problem, ones)
    switches.resize(part, largest, capability)
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        loss, stats = lsk.cross_entropy(
            leaf, y, backend="cuda", reduction="sum", return_stats=True, inplace=inplace, **problem.options
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        judge_loss(want, loss, ones)
        judge_grad(problem, want, grad)
        judge_stats(problem, stats)
        kernel = "row_kernel, on chip" if capability == 80 else "cluster_kernel"
        blocks, _, _, cluster, name = switches.launched().splitlines()[0].split(" ", 4)
        assert (int(blocks), int(cluster), name) == (len(y) * max(largest, 1), max(largest, 1), kernel)


def test_a_missing_barrier_is_a_race() -> None:
    """Or the test above could not fail; one of them where the warps of a block put their sums together."""
    assert races("races", "one").returncode == 0
    seen = races("races_planted", "one").stderr
    assert "WARNING: ThreadSanitizer: data race" in seen
    assert "Team::merged" in seen


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({}, "the CUDA kernels were not built"),
        ({"built": "cpu", "torch": torch.__version__}, "the CUDA kernels were not built"),
        ({"built": "cuda", "torch": "1.0"}, "built for torch 1.0 and this is"),
    ],
)
def test_why_there_are_no_cuda_kernels(
    monkeypatch: pytest.MonkeyPatch, info: dict[str, str | None], reason: str
) -> None:
    monkeypatch.setattr(backends, "build_info", lambda: info)
    assert reason in (backends._load_cuda() or "")
