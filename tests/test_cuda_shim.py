"""The CUDA kernels on the threads of a CPU: no race, and every form of them; their results are in the other tests."""

from __future__ import annotations

import subprocess

import pytest
import torch
from cuda_shim import build

from labelsmooth_kernels import backends


def races(program: str) -> subprocess.CompletedProcess[str]:
    if reason := build.missing(program):
        pytest.skip(reason)
    return subprocess.run([build.OUT / program], capture_output=True, text=True, check=False, timeout=600)


def test_no_thread_races_another() -> None:
    done = races("races")
    assert done.returncode == 0, done.stderr[:4000]
    assert {line.partition(":")[0] for line in done.stdout.splitlines()} == {"rows", "on chip", "split"}


def test_a_missing_barrier_is_a_race() -> None:
    """Or the test above could not fail."""
    assert "WARNING: ThreadSanitizer: data race" in races("races_planted").stderr


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("8.0;9.0;10.0+PTX", [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(8, 0), (10, 0)]),
        ("7.5 8.6+PTX", [(7, 5), (8, 6), (9, 0)], [(7, 0), (8, 0)]),
    ],
)
def test_which_gpus_a_build_serves(
    architectures: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]
) -> None:
    assert all(backends._compiled_for(architectures, *capability) for capability in runs)
    assert not any(backends._compiled_for(architectures, *capability) for capability in does_not)


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
