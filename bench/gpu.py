"""``python -m bench.gpu --out DIR``: everything that only a GPU can show, in one command of at most 8 minutes.

Stages: install the tree in place, with the CUDA kernels where there is nvcc; run the whole test suite, and some of it
under compute-sanitizer, where there is that; time the fused linear loss; time the losses. Each has a budget; one that
runs over is cut, which is said, and the next one starts. Logs, junit.xml and the figures (JSON, and a table, printed
last) stay in DIR. It needs an NVIDIA GPU, torch, Triton, a C++ compiler, and what NEEDED names; no
network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME

from .harness import ROOT, describe, provenance

TOTAL_S = 470.0
LINEAR_S = 60.0
NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "setuptools", "ninja", "pybind11")
# times: what the others left
BUDGETS_S = {"install": 110.0, "tests": 170.0, "sanitizers": 60.0, "linear": LINEAR_S, "times": TOTAL_S}
SANITIZED = "tests/test_parity_table.py -k 'cuda-cuda and (odd or others or ignored or masked or weights)'"
TUNE_S = 600.0


def environment() -> dict[str, str]:
    """Of every stage: the CUDA kernels are built for the GPU that is here."""
    if CUDA_HOME is None or not torch.cuda.is_available():
        return dict(os.environ)
    major, minor = torch.cuda.get_device_capability()
    chosen = {"LABELSMOOTH_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "CUDA_HOME": CUDA_HOME}
    return {**os.environ, **chosen}


def sanitizers() -> list[str]:
    """Every tool over the tests of memory of the CUDA kernels, or nothing where there are no tools."""
    program = shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return []
    test = f"{sys.executable} -m pytest -q -p no:cacheprovider -x {SANITIZED}"
    tools = ("memcheck", "racecheck", "initcheck")
    return ["bash", "-c", " && ".join(f"{program} --error-exitcode 1 --tool {tool} {test}" for tool in tools)]


def run_stage(name: str, command: list[str], out: Path, budget_s: float) -> str:
    """Run a command, its output in DIR/name.log; "ok", or what went wrong. Over the budget all its processes end."""
    log = out / f"{name}.log"
    print(f"\n{name}: at most {budget_s:.0f} s, log in {log}", flush=True)
    begin = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            code = process.wait(timeout=budget_s)
            outcome = "ok" if code == 0 else f"failed with exit code {code}"
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stop, KeyboardInterrupt):
                raise
            outcome = f"cut after {budget_s:.0f} s: what its log holds is all there is"
    tail = log.read_text(errors="replace").splitlines()[-(3 if outcome == "ok" and name != "linear" else 25) :]
    print("\n".join(f"    {line}" for line in tail))
    print(f"{name}: {outcome} ({time.monotonic() - begin:.0f} s)", flush=True)
    return outcome


def commands(arguments: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    python = [sys.executable, "-m"]
    install = ["pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    tests = ["pytest", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'junit.xml'}"]
    times = [
        "bench.gpu_times",
        "--out",
        str(out),
        "--device",
        arguments.device,
        *(["--tiny"] if arguments.tiny else []),
    ]
    linear = ["bench.linear", "--device", arguments.device, "--budget", "8", "--out", str(out / "linear.json")]
    linear += ["--quick"] if arguments.tiny else []
    result = {"install": install, "tests": tests, "linear": linear, "times": times}
    result = {name: [*python, *command] for name, command in result.items()}
    if tools := sanitizers():
        result = {"install": result.pop("install"), "tests": result.pop("tests"), "sanitizers": tools, **result}
    if arguments.tune:
        result["tune"] = [*python, *times, "--tune"]
    return {name: command for name, command in result.items() if name not in arguments.skip}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--tune", action="store_true", help="then sweep the launch table, for 10 minutes more at most")
    parser.add_argument("--skip", nargs="+", default=[], choices=list(BUDGETS_S), help="leave stages out")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: exercises this program only")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: exercises this program only")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch finds no CUDA device on this machine, so nothing was run.", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"bench.gpu: needs {', '.join(missing)}, which this Python does not have.", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("times.md", "tune.md", "times.json", "tune.json", "junit.xml"):
        (out / stale).unlink(missing_ok=True)
    print(describe(provenance(arguments.device)))
    deadline = time.monotonic() + TOTAL_S
    outcomes = {}
    for name, command in commands(arguments, out).items():
        left = TUNE_S if name == "tune" else max(1.0, min(BUDGETS_S[name], deadline - time.monotonic()))
        outcomes[name] = run_stage(name, command, out, left)
    for name in ("tune", "times"):
        table = out / f"{name}.md"
        if table.exists():
            print(f"\n{table.read_text()}")
    print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
    if outcomes.get("tests", "ok") != "ok":
        print("The tests did not all pass: no figure above may be quoted.")
    print(f"logs and figures: {out}")
    return 0 if set(outcomes.values()) <= {"ok"} else 1


if __name__ == "__main__":
    raise SystemExit(main())
