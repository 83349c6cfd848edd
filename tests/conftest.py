"""Where the tests run: every registered backend on every device it serves here, on poisoned memory.

Without a CUDA device the Triton kernels run under Triton's interpreter, which must be chosen before Triton is imported,
and the CUDA kernels as threads of the CPU (``cuda_shim``). Both take CPU tensors, and their time.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import covering
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import interpreting
from cuda_shim import build

from labelsmooth_kernels import backends

HAS_CUDA = torch.cuda.is_available()
EMULATED = (("triton", "cpu"), ("cuda", "cpu"))
SLOW = {
    "test_bench", "test_cuda_shim", "test_dtensor", "test_every_instruction_set_passes_the_table", "test_gpu_run",
    "test_parallel", "test_parallel_compile", "test_parallel_soft", "test_parallel_traffic", "test_prototype",
    "test_studies",
}  # fmt: skip
"""Modules, and a test, of processes, compilers and programs, which ``--quick`` leaves out."""
GROUPS: pytest.StashKey[list[covering.Group]] = pytest.StashKey()


def _load_cuda_shim() -> str | None:
    if (reason := build.missing()) is None:
        torch.ops.load_library(build.OUT / "shim.so")
    return reason


if not HAS_CUDA:
    interpreting.quicken()
    if reason := interpreting.unusable():
        backends.BACKENDS["triton"] = dataclasses.replace(backends.BACKENDS["triton"], load=lambda why=reason: why)
    backends.BACKENDS["cuda"] = dataclasses.replace(
        backends.BACKENDS["cuda"], devices=("cuda", "cpu"), load=_load_cuda_shim
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("labelsmooth_kernels", "how much of the suite runs; see tests/covering.py")
    group.addoption("--whole", action="store_true", help="run every row of every product, in the emulations too")
    group.addoption("--quick", action="store_true", help="run neither the emulations nor what is marked slow")
    group.addoption("--design", action="store_true", help="thin every product, as where its rows are emulated")


def pytest_report_header() -> str:
    """Say which kernels of the CPU the run is about."""
    if backends.BACKENDS["cpu"].unavailable() is not None:
        return "instruction set: none, for the kernels of the CPU are not built"
    from labelsmooth_kernels import _C

    return "instruction set: {cpu_capability} ({cpu_reason})".format(**_C.build_info())


def pytest_configure(config: pytest.Config) -> None:
    """Set the mode, and expect NaN arithmetic in the interpreter and calls that fall to the reference."""
    covering.Mode.whole, covering.Mode.quick = config.getoption("--whole"), config.getoption("--quick")
    for marker in (
        "claims(function): what a row of this test's product is there for, made of its parameters",
        "thin: rows of this test are thinned on every backend, because what they cost is not the kernels",
        "emulated: every row of this test runs in an emulation, although no parameter says so",
        "slow: left out by --quick",
        "repeats: runs under --whole alone, because other rows of its test do the same",
    ):
        config.addinivalue_line("markers", marker)
    for warning in ("ignore::RuntimeWarning:triton", "ignore:labelsmooth_kernels. served by the plain:UserWarning"):
        config.addinivalue_line("filterwarnings", warning)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # one process per core; tests of threads ask for more themselves


def is_emulated(item: pytest.Item) -> bool:
    """Whether a place or a backend among the parameters is emulated on this machine."""
    if HAS_CUDA:
        return False
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    slow = (*EMULATED, *(name for name, _ in EMULATED))
    return item.get_closest_marker("emulated") is not None or any(
        isinstance(v, (str, tuple)) and v in slow for v in values
    )


def is_slow(item: pytest.Item) -> bool:
    named = {item.path.stem, item.name.partition("[")[0]} & SLOW
    return bool(named) or item.get_closest_marker("slow") is not None


def claims_of(item: pytest.Item) -> covering.Claims:
    if marker := item.get_closest_marker("claims"):
        return frozenset(marker.args[0](**item.callspec.params))
    if not hasattr(item, "callspec"):
        return frozenset([item.name])
    return covering.pairs({name: covering.key(value) for name, value in item.callspec.params.items()})


def cost_of(item: pytest.Item) -> float:
    """Triton's interpreter is the slower one: what may run in either place runs in the other."""
    return 3.0 if "triton" in item.nodeid.partition("[")[2] else 1.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the rows that the mode leaves out."""
    config.stash[GROUPS] = []
    products: dict[str, list[pytest.Item]] = {}
    for item in items:
        everywhere = item.get_closest_marker("thin") or (config.getoption("--design") and hasattr(item, "callspec"))
        if is_emulated(item) or (everywhere and not covering.Mode.quick):
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = {item for item in items if is_slow(item)} if covering.Mode.quick else set()
    if not covering.Mode.whole:
        dropped |= {item for item in items if item.get_closest_marker("repeats")}
    for name, rows in products.items():
        kept = rows if covering.Mode.whole else [] if covering.Mode.quick else covering.cover(rows, claims_of, cost_of)
        config.stash[GROUPS].append(covering.Group(name, [claims_of(r) for r in rows], [claims_of(r) for r in kept]))
        dropped |= set(rows) - set(kept)
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the one command that reruns each test that failed."""
    failed = [report for outcome in ("failed", "error") for report in terminalreporter.stats.get(outcome, ())]
    python = Path(sys.executable)
    python = python.relative_to(config.rootpath) if python.is_relative_to(config.rootpath) else python
    for nodeid in dict.fromkeys(report.nodeid for report in failed):
        whole = " --whole" if covering.Mode.whole else ""
        terminalreporter.write_line(f"rerun: {python} -m pytest {shlex.quote(nodeid)}{whole}")


def places() -> list[tuple[str, str]]:
    """(backend, device) for every device of this machine that a backend serves; "cuda" is not asked of one without."""
    here = ("cpu", "cuda") if HAS_CUDA else ("cpu",)
    every = ((name, device, backend.devices) for name, backend in backends.BACKENDS.items() for device in here)
    return [(name, device) for name, device, served in every if served is None or device in served]


def skip_unless_available(name: str) -> None:
    """Skip with the backend's own reason where it does not work on this machine."""
    if covering.Mode.quick and not HAS_CUDA and (name, "cpu") in EMULATED:
        pytest.skip(f"backend {name}: --quick leaves out what is emulated")
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


@pytest.fixture
def served(place: tuple[str, str]) -> tuple[str, str]:
    """A place that serves distillation."""
    if reason := backends.BACKENDS[place[0]].unavailable():
        pytest.skip(f"backend {place[0]}: {reason}")
    features = backends.BACKENDS[place[0]].features
    if features is not None and "distillation" not in features:
        pytest.skip(f"{place[0]} does not serve distillation")
    return place


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
