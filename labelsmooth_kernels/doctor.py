"""What works on this machine, and why the rest does not: ``python -m labelsmooth_kernels``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import backends
from .functional import cross_entropy
from .torch_state import CHECK_TARGETS

if TYPE_CHECKING:
    from collections.abc import Sequence

_COST = (
    "{} tensors are served by the plain PyTorch reference: slower, with temporaries of the size of the logits (N×K); "
    "linear_cross_entropy then holds whole logits too"
)
_BUILD = (
    "LABELSMOOTH_BUILD={} pip install --no-build-isolation .   (in the source tree, beside this torch; "
    "the README says what it needs)"
)


def _triton_version() -> str:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return "not installed"


def _machine() -> list[str]:
    lines = [
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"package    {importlib.import_module(__package__).__version__}",
        f"torch      {torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})",
        f"triton     {_triton_version()}",
        f"cpu        {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            lines.append(f"gpu {index}      {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    else:
        lines.append("gpu        none that torch can use")
    info = backends.build_info()
    built = str(info.get("built") or "not built")
    if backends.BACKENDS["cpu"].unavailable() is None:
        compiled = importlib.import_module("labelsmooth_kernels._C").build_info()
        built += f", {compiled['cpu_capability']}: {compiled['cpu_reason']}"
        if compiled["cuda"]:
            built += f"; CUDA {compiled['cuda']}, for {compiled['architectures']}"
    asked = f"LABELSMOOTH_BUILD={info.get('requested')}" if info else "no record of a build"
    lines.append(f"extension  {built} ({asked})")
    return lines


def _parity(backend: backends.Backend, device: str) -> tuple[bool, str]:
    """One smoothed float32 case, loss and gradient against float64 F.cross_entropy."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 301, generator=generator)
    target = torch.randint(0, 301, (6,), generator=generator)
    target[1] = -100
    exact_logits = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_logits, target, label_smoothing=0.1)
    exact.backward()
    ours_logits = logits.to(device).requires_grad_()
    ours = cross_entropy(ours_logits, target.to(device), label_smoothing=0.1, backend=backend.name)
    ours.backward()
    assert ours_logits.grad is not None
    assert exact_logits.grad is not None
    loss_error = abs(ours.item() - exact.item()) / exact.item()
    grad_error = (ours_logits.grad.cpu().double() - exact_logits.grad).abs().max().item()
    scale = exact_logits.grad.abs().max().item()
    agrees = loss_error < 1e-6 and grad_error < 1e-6 * scale
    return agrees, f"relative error {loss_error:.0e} in the loss, {grad_error / scale:.0e} in the gradient"


class Missing(NamedTuple):
    """Kernels that this machine could use and does not have."""

    kernels: str
    reason: str
    cost: str
    mend: str


def _missing() -> list[Missing]:
    """Return what is missing for the CPU, and for its GPUs where kernels for them exist and none of these works."""
    found = []
    if reason := backends.BACKENDS["cpu"].unavailable():
        found.append(Missing("the C++ kernels for the CPU", reason, _COST.format("CPU"), _BUILD.format("cpu")))
    if torch.cuda.is_available() and torch.version.hip is None:
        oldest = backends.oldest_capability()
        able = [name for name, least in backends.LEAST_CAPABILITY.items() if oldest >= least]
        reasons = [f"{name}: {reason}" for name in able if (reason := backends.BACKENDS[name].unavailable())]
        if able and len(reasons) == len(able):
            mend = " or ".join({"triton": "pip install 'triton>=3.4'", "cuda": _BUILD.format("cuda")}[n] for n in able)
            found.append(Missing("kernels for the GPU", "; ".join(reasons), _COST.format("GPU"), mend))
    return found


def report(strict: bool = False) -> bool:
    """Print the machine, the versions, every backend and what is missing; return whether every available backend agrees
    with float64 and, with ``strict``, nothing that this machine could use is missing."""
    print("\n".join(_machine()), flush=True)  # a crash below loses nothing of it
    healthy = True
    for backend in backends.BACKENDS.values():
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in backend.dtypes)
        serves = "every option" if backend.features is None else ", ".join(sorted(backend.features))
        print(f"\n{backend.name}: {backend.summary}\n  serves     {serves}; {dtypes}")
        if reason := backend.unavailable():
            print(f"  missing    {reason}")
            continue
        for device in [d for d in ("cpu", "cuda") if backend.devices is None or d in backend.devices]:
            if device == "cuda" and not torch.cuda.is_available():
                continue
            try:
                agrees, detail = _parity(backend, device)
            except Exception as error:  # a doctor reports every failure and goes on to the next patient
                agrees, detail = False, f"{type(error).__name__}: {error}"
            healthy &= agrees
            print(f"  {device:10} {'agrees' if agrees else 'DISAGREES'}: {detail}")
    missing = _missing()
    for kernels, reason, cost, mend in missing:
        print(f"\nMISSING: {kernels}\n  why        {reason}\n  cost       {cost}\n  mend       {mend}")
    agreement = "every available backend agrees with float64" if healthy else "NOT ALL BACKENDS AGREE"
    print(
        f"\n{agreement}; {'KERNELS ARE MISSING' if missing else 'no kernels that this machine could use are missing'}"
    )
    return healthy and not (strict and missing)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m labelsmooth_kernels", description=__doc__)
    parser.add_argument(
        "--check-targets",
        nargs=argparse.REMAINDER,
        metavar="SCRIPT [ARG ...]",
        help=f"run a program with {CHECK_TARGETS}=1, so that a target outside the classes raises on a GPU too",
    )
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 also where kernels that this machine could use are missing"
    )
    options = parser.parse_args(arguments)
    if options.check_targets is None:
        return 0 if report(options.strict) else 1
    if not options.check_targets:
        parser.error("--check-targets needs the program to run")
    os.environ[CHECK_TARGETS] = "1"
    sys.argv = options.check_targets
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as `python SCRIPT` has it
    runpy.run_path(sys.argv[0], run_name="__main__")
    return 0
