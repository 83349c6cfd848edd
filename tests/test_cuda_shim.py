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
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"rows", "on chip", "split"}


@pytest.fixture
def refusals() -> Iterator[Any]:
    """Switches that make launches fail."""
    if HAS_CUDA:
        pytest.skip("a GPU launches")
    skip_unless_available("cuda")
    switches = torch.ops.labelsmooth_cuda_shim
    yield switches
    switches.refuse_launches(False)
    switches.refuse_clusters(False)


def test_a_launch_that_fails_is_told_with_its_sizes(refusals: Any) -> None:
    refusals.refuse_launches(True)
    message = "the loss of 6 rows of 37 float32 classes: row_kernel.*: a launch of 6 blocks of 64 threads"
    with pytest.raises(RuntimeError, match=message):
        lsk.cross_entropy(torch.randn(6, 37, requires_grad=True), torch.arange(6), backend="cuda")


def test_rows_do_without_a_cluster_that_has_no_room(refusals: Any) -> None:
    """90 classes lie in the shared memory of two blocks, or are read twice by one."""
    x, y = torch.randn(6, 90), torch.arange(6)
    results = []
    for refuse in (False, True):
        refusals.refuse_clusters(refuse)
        results.append(loss_and_grad(("cuda", "cpu"), x, y, label_smoothing=0.1))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


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
