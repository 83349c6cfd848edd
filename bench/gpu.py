"""``python -m bench.gpu --out DIR``: the first minutes on a GPU, in one command of at most 7½ minutes.

What decides comes first: does the package run there, is it right, how fast is it beside a copy, what do the counters
say; then the linear loss, the test suite, the losses of others. Each stage is a process with a limit of its own; a
stage that fails, hangs or is cut never stops the next. Rows are written as they come. ``--again STAGE ...`` repeats
stages after an edit. What ``bench.kit`` prepared is used where it fits.

DIR holds run.log, results.jsonl, tests.xml, state.json and summary.md. A figure may be quoted where its own row passed
its gate against float64, whatever became of the other stages.
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

import torch
from torch.utils.cpp_extension import CUDA_HOME

from . import first, kit, results
from .__main__ import INCOMPLETE, minutes

NEEDED = ("torch", "triton", "numpy", "pytest", "hypothesis", "setuptools", "ninja", "pybind11", "matplotlib")
# Seconds at most of each stage, in the order in which they run.
STAGES = {
    "install": 30,
    "parity": 60,
    "logits": 70,
    "counters": 50,
    "linear": 40,
    "prototype": 45,
    "tests": 140,
    "peers": 75,
    "sanitizers": 60,
    "tune": 120,
    "ranks": 30,
}
FIRST = ["install", "parity", "logits", "counters", "linear", "prototype", "tests", "peers"]  # without --again
OWN_DEADLINE = ("logits", "linear", "peers", "tune")  # these divide --minutes among their cases
# Beside as many workers as cores, threads of their own for each made 14 workers take over two minutes to begin.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
# What only a GPU can fail comes before the rest of the suite.
TESTS = ("test_on_gpu.py", "test_regressions.py", "test_parity_table.py", "test_linear.py", "test_tiled.py")
SANITIZED = "tests/test_parity_table.py -k 'cuda-cuda and (odd or others or ignored or masked or weights)'"


def sanitizers() -> list[str]:
    """Every tool over the tests of memory of the CUDA kernels, or nothing where there are no tools."""
    program = shutil.which("compute-sanitizer", path=f"{CUDA_HOME}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return []
    test = f"{sys.executable} -m pytest -q -p no:cacheprovider -x {SANITIZED}"
    tools = ("memcheck", "racecheck", "initcheck")
    return ["bash", "-c", " && ".join(f"{program} --error-exitcode 1 --tool {tool} {test}" for tool in tools)]


def suite(out: Path, device: str) -> list[str]:
    """The test suite, the tests that only a GPU can fail first, on as many processes as there are cores for; without a
    GPU, where it would go to emulations, what ``--quick`` leaves of it."""
    rest = sorted({path.name for path in (results.ROOT / "tests").glob("test_*.py")} - set(TESTS))
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in (*TESTS, *rest)), "-v", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, (os.cpu_count() or 2) - 2)), "--dist", "worksteal"]
    command += ["--quick"] if device == "cpu" else []
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    return [*command, "-p", "no:cacheprovider", "--maxfail=150", f"--junitxml={out / 'tests.xml'}"]


def commands(arguments: argparse.Namespace, out: Path) -> dict[str, list[str]]:
    """What each stage but the installation runs; ``--minutes`` is added for those that divide their time themselves."""
    python = [sys.executable, "-m"]
    on = ["--device", arguments.device, "--out", str(out / "results.jsonl")]
    on += ["--commit", arguments.commit] if arguments.commit else []
    figures = [*python, "bench", "run", *on, "--cases", "first", "--group"]
    gpus = torch.cuda.device_count()
    found = {
        "parity": [*python, "bench.parity", *on],
        "logits": [*figures, "logits"],
        "counters": [*python, "bench.counters", *on],
        "linear": [*figures, "linear"],
        "prototype": [*python, "bench.prototype", *on] if arguments.device == "cuda" else [],
        "tests": suite(out, arguments.device),
        "peers": [*figures, "peers"],
        "sanitizers": sanitizers(),
        "tune": [*python, "bench.tune", *on, *(["--tiny"] if arguments.device == "cpu" else [])],
        "ranks": [*python, "bench.ranks", "--measure", str(gpus)] if gpus > 1 else [],
    }
    return {name: found[name] for name in STAGES if found.get(name) and name in (arguments.again or FIRST)}


class Runner:
    """Runs stages one after the other, each within its limit and what is left of the whole."""

    def __init__(self, out: Path, total_s: float) -> None:
        self.out, self.deadline = out, time.monotonic() + total_s
        self.variables: dict[str, str] = {}
        self.outcomes: dict[str, str] = {}

    def run(self, name: str, command: list[str], limit_s: float, **more: str) -> str:
        """Run a command, its output added to the log; "ok", or what went wrong. Over its limit it is ended."""
        limit_s = min(limit_s, self.deadline - time.monotonic())
        if limit_s < 3:
            return self.note(name, "no time was left")
        if name in OWN_DEADLINE:
            command = [
                *command,
                "--minutes",
                f"{max(limit_s - 12, limit_s / 2) / 60:.3f}",
            ]  # the rest: start, last case
        print(f"\n{name}: at most {limit_s:.0f} s", flush=True)
        begin = time.monotonic()
        log = self.out / "run.log"
        with log.open("a") as stream:
            stream.write(f"\n===== {name}: {' '.join(command)}\n")
            stream.flush()
            start = stream.tell()
            process = subprocess.Popen(
                command,
                cwd=results.ROOT,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.variables, **more},
                start_new_session=True,
            )
            outcome = wait(process, limit_s)
        with log.open(errors="replace") as stream:
            stream.seek(start)
            tail = stream.read().splitlines()[-(3 if outcome == "ok" else 25) :]
        print("\n".join(f"    {line[:240]}" for line in tail))
        return self.note(name, f"{outcome}, {time.monotonic() - begin:.0f} s")

    def note(self, name: str, outcome: str) -> str:
        self.outcomes[name] = outcome
        (self.out / "state.json").write_text(json.dumps(self.outcomes, indent=1) + "\n")
        return outcome

    def install(self, limit_s: float) -> None:
        """The package in place: the extension from the kit where that fits, else built here, else without one."""
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
        outcome = self.run("install", pip, limit_s, LABELSMOOTH_BUILD="off")
        self.variables, said, ready = kit.use(kit.FOLDER, kit.UNPACKED)
        print("\n".join(f"    {line}" for line in said), flush=True)
        if not ready and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability()
            target = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "LABELSMOOTH_BUILD": "cuda"}
            built = self.run("build", pip, 4 * limit_s, **target)
            if not built.startswith("ok"):
                outcome = self.run("install", pip, limit_s, LABELSMOOTH_BUILD="off") + "; the extension was not built"
        self.note("install", outcome)


def wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    try:
        code = process.wait(timeout=limit_s)
    except (subprocess.TimeoutExpired, KeyboardInterrupt) as stop:
        end(process)
        if isinstance(stop, KeyboardInterrupt):
            raise
        return "cut: what it wrote is all there is"
    return {0: "ok", INCOMPLETE: "ok, but no time was left for every case"}.get(code, f"failed with exit code {code}")


def end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)  # pytest then writes what it has
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--again", nargs="+", choices=list(STAGES), metavar="STAGE", help=f"of {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=minutes, default=7.5, help="for the whole run; default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: shows that this program runs")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    return parser.parse_args()


def refusal(arguments: argparse.Namespace) -> str | None:
    """Why nothing can be run here, or None."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device on this machine, so nothing was run"
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        return f"it needs {', '.join(missing)}, which this Python does not have"
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "state.json").touch()
    except OSError as error:
        return f"--out {arguments.out}: {error.strerror}; a folder that can be written is needed"
    return None


def main() -> int:
    arguments = parse()
    if reason := refusal(arguments):
        print(f"bench.gpu: {reason}.", file=sys.stderr)
        return 2
    out = arguments.out.resolve()
    facts = results.provenance(arguments.device, arguments.commit)
    print(results.describe(facts), flush=True)
    runner = Runner(out, 60 * arguments.minutes)
    if arguments.again is None or "install" in arguments.again:
        runner.install(STAGES["install"])
    else:
        runner.variables, *_ = kit.use(kit.FOLDER, kit.UNPACKED)
    for name, command in commands(arguments, out).items():
        more = ONE_THREAD if name == "tests" else {}
        more = more | ({"TRITON_INTERPRET": "1"} if name == "tune" and arguments.device == "cpu" else {})
        runner.run(name, command, STAGES[name], **more)
    figures = out / "results.jsonl"
    if figures.exists():
        text = first.summary(results.load(figures))
        (out / "summary.md").write_text(f"{results.describe(facts)}\n\n{text}\n", encoding="utf-8")
        print(f"\n{text}")
    print("\n".join(["", *(f"{name}: {outcome}" for name, outcome in runner.outcomes.items())]))
    if facts["commit"] is None:
        print("No commit is known (--commit): no figure above may be quoted.")
    print(f"log and figures: {out}")
    return 0 if all(outcome.startswith("ok") for outcome in runner.outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
