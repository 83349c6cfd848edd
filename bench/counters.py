"""``python -m bench.counters``: what the GPU's counters say of one launch of each kernel, read by Nsight Compute.

Of each launch: time, bytes read and written in device memory, hits in L2, warp instructions (and from them thread
instructions per logit), how busy the issue slots were, warps resident, registers, and what warps waited for. The rows
join the other figures as the group "counters", the counters in ``sizes``. Clocks are left as they are.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from labelsmooth_kernels import backends

from . import results
from .harness import EPS, IGNORED, SHORT, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GROUP = "counters"
TIME = "gpu__time_duration.sum"
INSTRUCTIONS = "smsp__inst_executed.sum"
STALLS = ("barrier", "long_scoreboard", "short_scoreboard", "wait", "math_pipe_throttle", "lg_throttle", "mio_throttle",
          "membar", "not_selected")  # fmt: skip
METRICS = (
    TIME,
    INSTRUCTIONS,
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_sector_hit_rate.pct",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__grid_size",
    "launch__block_size",
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in STALLS),
)
SHAPES = (
    (8192, 128256, torch.bfloat16),
    (8192, 32000, torch.bfloat16),
    (8192, 4096, torch.bfloat16),
    (8192, 128256, torch.float32),
)


def launches(device: str) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(name, logits, call) of calls that launch one kernel each."""
    for n, k, dtype in SHAPES if device == "cuda" else ((4, 100, torch.float32),):
        x = torch.randn(n, k, device=device).mul_(2).to(dtype)
        y = torch.randint(k, (n,), device=device)
        scale = torch.full((1,), 1 / n, device=device)
        shape = f"{n} × {k:,}, {SHORT[dtype]}"
        for name in ("triton", "cuda") if device == "cuda" else ("cpu",):
            if backends.BACKENDS[name].unavailable() is not None:
                continue
            kernels = backends.kernels_of(name)
            row = (y, None, None, EPS, None, scale, IGNORED, False, False, 0.0, 0.0, 1.0, None)
            saved = kernels.forward(x, *row, False, 0)[1]
            yield f"{name}, loss and gradient, {shape}", n * k, lambda f=kernels.forward, a=(x, *row, True, 0): f(*a)
            yield f"{name}, loss, {shape}", n * k, lambda f=kernels.forward, a=(x, *row, False, 0): f(*a)
            yield f"{name}, gradient, {shape}", n * k, lambda f=kernels.backward, a=(x, *row, saved): f(*a)


def run_once(device: str, names: Path) -> None:
    """Under the profiler: every call once to warm up, then once between the profiler's start and stop; the calls' names
    and logits go to a file."""
    called = []
    for name, logits, call in launches(device):
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        called.append((name, logits))
        names.write_text(json.dumps(called))


def read(text: str) -> list[dict[str, str]]:
    """The launches in a raw CSV page of Nsight Compute, in order; its second row holds the units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    return list(csv.DictReader(lines))[1:]


def number_of(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def rows_of(found: list[dict[str, str]], calls: list[tuple[str, int]]) -> list[Row]:
    """A row per launch; named after the call it belongs to where every call launched one kernel."""
    if len(calls) != len(found):
        calls = [(f"{i}: {launch['Kernel Name'][:60]}", 0) for i, launch in enumerate(found)]
    rows = []
    for (name, logits), launch in zip(calls, found, strict=True):
        values = {metric: number_of(launch.get(metric, "")) for metric in METRICS}
        counted: dict[str, Any] = {metric: value for metric, value in values.items() if value is not None}
        if logits and (instructions := values[INSTRUCTIONS]):
            counted["thread instructions per logit"] = 32 * instructions / logits
        rows.append(Row(GROUP, name, launch["Kernel Name"][:120], sizes=counted))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counters", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: shows that the calls run")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        run_once(arguments.device, arguments.once)
        return 0
    if arguments.device == "cpu":
        for name, _, call in launches("cpu"):
            call()
            print(name)
        return 0
    if (program := shutil.which("ncu")) is None:
        print("counters: Nsight Compute (ncu) is not on the PATH", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.json")
        options = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw")
        child = (sys.executable, "-m", "bench.counters", "--once", str(names))
        command = [program, *options, "--metrics", ",".join(METRICS), *child]
        profiled = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, errors="replace")
        calls = json.loads(names.read_text()) if names.exists() else []
    found = read(profiled.stdout)
    facts = results.provenance("cuda", arguments.commit)
    for record in results.append(arguments.out, rows_of(found, calls), facts):
        counted = record["sizes"]
        shown = {
            name.split("__")[-1].split(".")[0][:24]: value for name, value in counted.items() if "stalled" not in name
        }
        print(f"{record['case']}: {shown}")
    if profiled.returncode or not found:
        print(profiled.stdout[-1500:], profiled.stderr[-1500:], file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
