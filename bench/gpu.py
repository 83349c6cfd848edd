"""``python -m bench.gpu --out DIR``: everything that only a GPU can show, in one command of at most 9 minutes.

Stages: build the tree in place, with the CUDA kernels where there is nvcc; run the test suite, and some of it under
compute-sanitizer, where there is that; time every case beside its peers; sweep launch plans; time the loss over ranks,
where there are two GPUs; write a page of it all.
A stage that runs over its share is cut, which is said, and the next one starts. A second run in the same DIR goes on:
stages that were done are not repeated, and the cases that were measured are not measured again. DIR holds run.log,
state.json, results.jsonl, tests.xml and a page. It needs an NVIDIA GPU and what NEEDED names; no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME

from . import aims, results
from .__main__ import INCOMPLETE, minutes

NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "setuptools", "ninja", "pybind11", "matplotlib")
# Of the time that is left, beside the stages that follow.
SHARES = {"build": 1.5, "tests": 3.0, "sanitizers": 1.0, "bench": 4.0, "tune": 1.0, "ranks": 0.3, "report": 0.3}
# What only a GPU can fail comes before the rest of the suite.
FIRST = ("test_on_gpu.py", "test_parity_table.py", "test_regressions.py", "test_linear.py", "test_tiled.py")
SANITIZED = "tests/test_parity_table.py -k 'cuda-cuda and (odd or others or ignored or masked or weights)'"


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


def commands(arguments: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """What each stage runs; ``--minutes`` is added for those that divide their time themselves."""
    figures, python = str(out / "results.jsonl"), [sys.executable, "-m"]
    on = ["--device", arguments.device, "--out", figures, *(["--commit", arguments.commit] if arguments.commit else [])]
    rest = sorted({path.name for path in (results.ROOT / "tests").glob("test_*.py")} - set(FIRST))
    tests = [*(f"tests/{name}" for name in (*FIRST, *rest)), "-q", "-p", "no:cacheprovider"]
    small = ["--cases", "smoke"] if arguments.device == "cpu" else []
    found = {
        "build": [*python, "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."],
        "tests": [*python, "pytest", *tests, f"--junitxml={out / 'tests.xml'}"],
        "sanitizers": sanitizers(),
        "bench": [*python, "bench", "run", *on, "--resume", *small],
        "tune": [*python, "bench.tune", *on, *(["--tiny"] if small else [])],
        "ranks": [*python, "bench.ranks", "--measure", str(gpus)] if (gpus := torch.cuda.device_count()) > 1 else [],
        "report": [*python, "bench", "report", "--results", figures, "--out", str(out)],
    }
    return {name: found[name] for name in SHARES if found[name] and name in (arguments.stage or SHARES)}


def run_stage(name: str, command: list[str], log: Path, budget_s: float) -> str:
    """Run a command, its output added to the log; "ok", or what went wrong. Over the budget all its processes end."""
    if name in ("bench", "tune"):
        command = [*command, "--minutes", f"{max(budget_s - 20, budget_s / 2) / 60:.3f}"]  # the rest: start, last case
    print(f"\n{name}: at most {budget_s:.0f} s", flush=True)
    with log.open("a") as stream:
        stream.write(f"\n===== {name}: {' '.join(command)}\n")
        stream.flush()
        begin = stream.tell()
        process = subprocess.Popen(
            command,
            cwd=results.ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=budget_s)
            outcome = {0: "ok", INCOMPLETE: "incomplete: run again to go on"}.get(code, f"failed with exit code {code}")
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
            end(process)
            if isinstance(stop, KeyboardInterrupt):
                raise
            outcome = f"cut after {budget_s:.0f} s: what it wrote is all there is"
    with log.open(errors="replace") as stream:
        stream.seek(begin)
        tail = stream.read().splitlines()[-(4 if outcome == "ok" else 25) :]
    print("\n".join(f"    {line}" for line in tail))
    return outcome


def end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def known(state: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """What this tree has passed; the outcomes of another commit, or of files that may have changed, say nothing."""
    same = commit is not None and state.get("commit") == commit and not commit.endswith("+changes")
    return state if same else {"commit": commit}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--stage", nargs="+", choices=list(SHARES), help="only these, also where they were done")
    parser.add_argument("--minutes", type=minutes, default=9, help="for the whole run; default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: shows that this program runs")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    begin = time.monotonic()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch finds no CUDA device on this machine, so nothing was run.", file=sys.stderr)
        return 2
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"bench.gpu: needs {', '.join(missing)}, which this Python does not have.", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = results.provenance(arguments.device, arguments.commit)
    print(results.describe(facts))
    state_file = out / "state.json"
    state: dict[str, Any] = json.loads(state_file.read_text()) if state_file.exists() else {}
    state = known(state, facts["commit"])
    todo = commands(arguments, out)
    if not arguments.stage:
        todo = {name: command for name, command in todo.items() if state.get(name) != "ok" or name == "report"}
    for name in list(todo):
        left = 60 * arguments.minutes - (time.monotonic() - begin)
        share = SHARES[name] / sum(SHARES[n] for n in list(todo)[list(todo).index(name) :])
        state[name] = run_stage(name, todo[name], out / "run.log", max(5.0, left * share))
        state_file.write_text(json.dumps(state, indent=1) + "\n")
    figures = out / "results.jsonl"
    if figures.exists():
        found = aims.of([row for row in results.newest(results.load(figures)) if row["group"] != "tune"])
        print(f"\n{aims.table(found)}\n")
    print("\n".join(f"{name}: {outcome}" for name, outcome in state.items()))
    if state.get("tests") != "ok":
        print("The tests did not all pass here: no figure above may be quoted.")
    if facts["commit"] is None:
        print("No commit is known (--commit): no figure above may be quoted.")
    print(f"log, figures and page: {out}")
    return 0 if all(state[name] == "ok" for name in todo) else 1


if __name__ == "__main__":
    raise SystemExit(main())
