"""Where the tests run: every registered backend on every device it serves here, on poisoned memory.

Without a CUDA device the Triton kernels run under Triton's interpreter, which must be chosen before Triton is imported,
and the CUDA kernels as threads of the CPU (``cuda_shim``). Both take CPU tensors, and their time.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from cuda_shim import build

from labelsmooth_kernels import backends

HAS_CUDA = torch.cuda.is_available()
EMULATED = (("triton", "cpu"), ("cuda", "cpu"))


def _load_cuda_shim() -> str | None:
    if (reason := build.missing()) is None:
        torch.ops.load_library(build.OUT / "shim.so")
    return reason


if not HAS_CUDA:
    backends.BACKENDS["cuda"] = dataclasses.replace(
        backends.BACKENDS["cuda"], devices=("cuda", "cpu"), load=_load_cuda_shim
    )


def pytest_configure(config: pytest.Config) -> None:
    """Expected here: NaN arithmetic in the interpreter, and calls that fall to the reference."""
    for warning in ("ignore::RuntimeWarning:triton", "ignore:labelsmooth_kernels. served by the plain:UserWarning"):
        config.addinivalue_line("filterwarnings", warning)


def places() -> list[tuple[str, str]]:
    """(backend, device) for every device of this machine that a backend serves; "cuda" is not asked of one without."""
    here = ("cpu", "cuda") if HAS_CUDA else ("cpu",)
    return [
        (name, device) for name, backend in backends.BACKENDS.items() for device in here if device in backend.devices
    ]


def skip_unless_available(name: str) -> None:
    """Skip with the backend's own reason where it does not work on this machine."""
    reason = backends.BACKENDS[name].unavailable()
    if reason:
        pytest.skip(f"backend {name}: {reason}")


@pytest.fixture(params=places(), ids="-".join)
def place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(backend, device), skipped with the reason where the backend is not available."""
    skip_unless_available(request.param[0])
    return request.param


@pytest.fixture(params=[p for p in places() if backends.BACKENDS[p[0]].kernels is not None], ids="-".join)
def fast_place(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A place with kernels of its own: everything but the reference."""
    skip_unless_available(request.param[0])
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty, from Python and from C++ alike, comes filled with NaN (integers: their maximum).

    That is what deterministic mode does to uninitialised memory; ``warn_only``: nothing else of that mode is wanted.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all(), "memory is not poisoned"
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
