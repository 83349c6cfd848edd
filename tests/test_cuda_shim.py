"""The CUDA kernels on the threads of a CPU: no race, and every form of them; their results are in the other tests."""

from __future__ import annotations

import subprocess

import pytest
from cuda_shim import build


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
