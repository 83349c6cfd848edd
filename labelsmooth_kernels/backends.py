"""Which kernels exist, what each can serve, and why not: the one place where a backend is chosen."""

from __future__ import annotations

import functools
import importlib
import json
import os
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import ops
from .spec import FLOAT_DTYPES, ArgumentError, Rows, require
from .torch_state import constant_in_graphs, recorded

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_OPTION = frozenset(
    {
        "index target", "probability target", "weight", "smoothing prior", "smooth_over='finite'", "z_loss",
        "confidence_penalty", "logit_scale", "softcap", "distillation",
    }
)  # fmt: skip
LEAST_CAPABILITY = {"triton": (8, 0), "cuda": (7, 5)}
"""The oldest GPUs that the kernels are checked on."""
_RECORDED = (
    "'reference' or None under torch.jit.trace, which records plain operations of PyTorch (torch.compile and "
    "torch.export take the kernels)"
)
TILED = frozenset({"tiled head"})
_LOADING = threading.RLock()  # ops may be registered once only, and functools.cache lets two threads in


@dataclass(frozen=True)
class Backend:
    """One implementation of the row operators.

    ``load`` makes its ops callable and returns None, or the reason why it cannot; it runs once, when the backend is
    first asked for.
    """

    name: str
    summary: str
    devices: tuple[str, ...] | None  # None: all of them
    dtypes: tuple[torch.dtype, ...]
    features: frozenset[str] | None  # None: all of them
    load: Callable[[], str | None]
    kernels: ops.Kernels | None

    def unavailable(self) -> str | None:
        """Why this backend does not work on this machine, or None."""
        with _LOADING:
            return _load_once(self.name)

    def why_not(self, device: str, dtype: torch.dtype, features: frozenset[str]) -> list[str]:
        """The reasons why this backend cannot serve a call; empty when it can."""
        reasons = []
        if self.devices is not None and device not in self.devices:
            reasons.append(f"it serves {' and '.join(self.devices)} tensors, not {device}")
        if dtype not in self.dtypes:
            reasons.append(f"it does not serve {dtype}")
        if self.features is not None and (missing := sorted(features - self.features)):
            reasons.append(f"it does not serve {', '.join(missing)} yet")
        if not reasons and (reason := self.unavailable()):
            reasons.append(reason)
        return reasons


def _load_cpu() -> str | None:
    built_for = build_info().get("torch") if build_info().get("built") else None
    if built_for is not None and built_for != torch.__version__:
        return f"the compiled extension was built for torch {built_for} and this is {torch.__version__}: reinstall it"
    try:
        importlib.import_module("labelsmooth_kernels._C")
    except ImportError as error:
        return _explain_missing_extension(error)
    return None


def build_info() -> dict[str, str | None]:
    """What setup.py recorded about the compiled extension; empty where the package was never built."""
    path = Path(__file__).with_name("_build_info.json")
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _explain_missing_extension(error: ImportError) -> str:
    info = build_info()
    if not info.get("built"):
        return f"the compiled extension was not built ({info.get('reason') or 'no record of a build'})"
    return f"the compiled extension does not import: {error}"


def _load_cuda() -> str | None:
    """The compiled extension again, whose CUDA kernels also need a GPU that they were compiled for."""
    if build_info().get("built") != "cuda":
        return "the CUDA kernels were not built (LABELSMOOTH_BUILD=cuda builds them, beside a CUDA build of torch)"
    if reason := _load_cpu():
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    compiled = importlib.import_module("labelsmooth_kernels._C")
    for i in range(torch.cuda.device_count()):
        if compiled.cuda_capability(i) == 0:
            major, minor = torch.cuda.get_device_capability(i)
            architectures = compiled.build_info()["architectures"]
            return f"GPU {i} has compute capability {major}.{minor}, and the kernels were compiled for {architectures}"
    return None


def _load_triton() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton is not installed ({error})"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 4):
        return f"Triton {triton.__version__} is older than 3.4"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        return (
            "there is no CUDA device (TRITON_INTERPRET=1, set before the start, runs the kernels on the CPU for tests)"
        )
    if torch.cuda.is_available():
        if torch.version.hip is not None:
            return "the kernels are for NVIDIA GPUs, and this torch is built for ROCm"
        oldest = oldest_capability()
        least = LEAST_CAPABILITY["triton"]
        if oldest < least:
            found, needed = (".".join(map(str, version)) for version in (oldest, least))
            return f"a GPU here has compute capability {found}: the kernels are checked from {needed} on"
    try:
        logits, linear, pairs = (
            importlib.import_module(f"labelsmooth_kernels.triton_kernels.{name}")
            for name in ("logits", "linear", "distill")
        )
    except ImportError as error:
        return f"the Triton kernels do not import: {error} (run from a source tree that is not installed?)"
    for key in ("CPU", "CUDA") if interpreted else ("CUDA",):
        ops.implement("triton", key, logits)
        ops.implement_tiled(key, linear)
        ops.LIBRARY.impl("triton_distill", pairs.distill, key)
    return None


def _triton_devices() -> tuple[str, ...]:
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


_HALF_AND_SINGLE = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cpu", "C++ kernels, SIMD and threads", ("cpu",), FLOAT_DTYPES, EVERY_OPTION, _load_cpu, ops.define("cpu")
        ),
        Backend(
            "cuda",
            "CUDA C++ kernels",
            ("cuda",),
            FLOAT_DTYPES,
            EVERY_OPTION - {"distillation"},
            _load_cuda,
            ops.define("cuda"),
        ),
        Backend(
            "triton",
            "Triton kernels",
            _triton_devices(),
            _HALF_AND_SINGLE,
            EVERY_OPTION | TILED,
            _load_triton,
            ops.define("triton"),
        ),
        Backend("reference", "plain PyTorch", None, FLOAT_DTYPES, None, lambda: None, None),
    )
}


CUDA_BEFORE_TRITON = (9, 0)
"""The oldest GPUs on which CUDA C++ comes before Triton where both can serve a call. From there on it reads a row once,
which Triton cannot without clusters: predicted from the machine code and from a prototype on an H100 (docs/gpu.md), not
measured. Before, both read it twice, and Triton's launch plans follow the GPU."""


def oldest_capability() -> tuple[int, int]:
    """Of the machine's GPUs."""
    return min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


def _in_order(device: str) -> list[Backend]:
    """The backends as they are asked for a call that names none."""
    order = list(BACKENDS.values())
    if device == "cuda" and not BACKENDS["cuda"].unavailable() and oldest_capability() < CUDA_BEFORE_TRITON:
        order.sort(key=lambda backend: backend.name == "cuda")  # behind Triton, and behind the reference:
        order.sort(key=lambda backend: backend.devices is None)  # which stays the last
    return order


@functools.cache
def _load_once(name: str) -> str | None:
    return BACKENDS[name].load()


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=8)


def check_name(named: str | None) -> None:
    """Raise an ArgumentError for a name that no backend has."""
    if named is not None and named not in BACKENDS:
        raise ArgumentError(f"backend must be one of {sorted(BACKENDS)} or None, got {named!r}")


@functools.cache
def _choose(device: str, dtype: torch.dtype, features: frozenset[str], named: str | None) -> str:
    if named is not None:
        check_name(named)
        if reasons := BACKENDS[named].why_not(device, dtype, features):
            raise ArgumentError(f"backend={named!r} cannot serve this call: {'; '.join(reasons)}")
        return named
    refused = []
    for backend in _in_order(device):
        if backend.devices is not None and backend.devices[0] != device:
            continue  # the interpreter serves CPU tensors only where it is named
        reasons = backend.why_not(device, dtype, features)
        if not reasons:
            break
        refused.append(f"{backend.name}: {'; '.join(reasons)}")
    if backend.devices is None and refused:
        _warn_once(f"labelsmooth_kernels: served by the plain PyTorch {backend.name} ({' | '.join(refused)})")
    return backend.name  # the last of them, the reference, has no reasons against any call


@constant_in_graphs  # torch.compile asks once, while tracing
def _choose_name(device: str, dtype: torch.dtype, features: frozenset[str], named: str | None) -> str:
    return _choose(device, dtype, features, named)


def select(rows: Rows, more: frozenset[str] = frozenset()) -> Backend:
    """The best backend that can serve a call, which may ask for ``more`` than the features of its spec, or the one it
    names; where that cannot, an error that says why.

    A fall from a fast backend to the reference warns once, with the reason. Under torch.jit.trace it is the reference:
    the tracer cannot record the autograd.Functions of the kernels.
    """
    if recorded():
        named = rows.spec.backend
        check_name(named)
        require(named in (None, "reference"), "backend", named, _RECORDED)
        return BACKENDS["reference"]
    features = rows.spec.features(index_target=rows.index_target) | more
    name: str = _choose_name(rows.logits.device.type, rows.logits.dtype, features, rows.spec.backend)
    return BACKENDS[name]


def kernels_of(name: str) -> ops.Kernels:
    """The row operators of a backend that has some."""
    kernels = BACKENDS[name].kernels
    assert kernels is not None
    return kernels
