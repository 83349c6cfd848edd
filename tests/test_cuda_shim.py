"""The CUDA kernels on the threads of a CPU: no race, and every form of them; their results are in the other tests."""

from __future__ import annotations

import subprocess

import pytest
import torch
from conftest import HAS_CUDA, skip_unless_available
from cuda_shim import build

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends


def races(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if reason := build.missing(program):
        pytest.skip(reason)
    return subprocess.run([build.OUT / program, *arguments], capture_output=True, text=True, check=False, timeout=600)


def test_no_thread_races_another() -> None:
    done = races("races")
    assert done.returncode == 0, done.stderr[:4000]
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"rows", "on chip", "split"}


def test_a_launch_that_fails_is_told_with_its_sizes() -> None:
    if HAS_CUDA:
        pytest.skip("a GPU launches")
    skip_unless_available("cuda")
    x = torch.randn(6, 37, requires_grad=True)
    torch.ops.labelsmooth_cuda_shim.refuse_launches(True)
    try:
        message = "the loss of 6 rows of 37 float32 classes: row_kernel.*: a launch of 6 blocks of 64 threads"
        with pytest.raises(RuntimeError, match=message):
            lsk.cross_entropy(x, torch.arange(6), backend="cuda")
    finally:
        torch.ops.labelsmooth_cuda_shim.refuse_launches(False)
    assert lsk.cross_entropy(x, torch.arange(6), backend="cuda").isfinite()


def test_a_missing_barrier_is_a_race() -> None:
    """Or the test above could not fail."""
    assert races("races", "one case").returncode == 0
    assert "WARNING: ThreadSanitizer: data race" in races("races_planted", "one case").stderr


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
