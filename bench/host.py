"""``python -m bench.host``: what a call asks of the host before a GPU has anything to do, on a machine without one.

Forward and backward of small losses, in a process of their own: launches are counted, our own where they arrive at the
stand-in for the driver (``stand_in.py``) or are written down by the tests' shim for the CUDA kernels, PyTorch's as the
operations that are neither views nor allocations; and a call is timed, with tensors so small that what PyTorch computes
of them on the CPU takes about as long as a launch. The switch of devices, which a call on a GPU pays for, is missing.
No result is looked at: nothing is computed by our kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, ops

from . import stand_in
from .harness import EPS, Row, reason
from .results import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GPU = "H100"
SMALL, LONG = (8, 1000), (4, 128256)  # rows and classes; long rows are counted alone, as a CPU computes for a while
ROUNDS, WARM = 400, 20
THREADS = 1  # two wait for each other longer than they compute
GROUPS = LAUNCHES, TIME = "launches", "host time"
EAGER, TRITON, CUDA = "F.cross_entropy", "ours, Triton", "ours, CUDA C++"
CASES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "no reduction": {"reduction": "none"},
    "mean, fp16": {},
    "mean, long rows": {},
}
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach")


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that launch a kernel on a GPU, one each; ours are not its."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in ALLOCATIONS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def serve_triton(stack: contextlib.ExitStack) -> Callable[[], int]:
    """Let the Triton kernels take CPU tensors, and launch them on the stand-in; return how many were launched."""
    from labelsmooth_kernels.triton_kernels import launch, logits

    driver = stand_in.driver(GPU)
    driver.activate()
    stack.enter_context(launch.override(machine=launch.Machine(*stand_in.GPUS[GPU][:2])))
    logits._check_classes = lambda *_: None  # of targets on a CPU alone
    ops.implement("triton", "CPU", logits)
    backends.BACKENDS["triton"] = replace(backends.BACKENDS["triton"], devices=("cpu",), load=lambda: None)
    return driver.count


def serve_cuda(stack: contextlib.ExitStack) -> Callable[[], int]:
    """The same with the CUDA kernels and the shim, which launches nothing."""
    shim, seen = stand_in.Shim(), [0]
    shim.pretend(stand_in.GPUS[GPU])
    backends.BACKENDS["cuda"] = replace(backends.BACKENDS["cuda"], devices=("cpu",), load=lambda: None)

    def count() -> int:
        seen[0] += len(shim.launches())
        return seen[0]

    return count


def shape_of(case: str) -> tuple[int, int]:
    return LONG if "long" in case else SMALL


def step(case: str, loss: Callable[..., Any]) -> Callable[[], None]:
    """Forward and backward of a case, as a training loop makes them."""
    dtype = torch.float16 if case.endswith("fp16") else torch.bfloat16
    n, k = shape_of(case)
    x = torch.randn(n, k, dtype=dtype).requires_grad_()
    y = torch.randint(k, (n,))
    options = {"label_smoothing": EPS, **CASES[case]}
    value = loss(x, y, **options)
    ones = torch.ones_like(value) if value.dim() else None

    def run() -> None:
        x.grad = None
        loss(x, y, **options).backward(ones)

    return run


def launches(run: Callable[[], None], own: Callable[[], int]) -> int:
    run()  # what is made once is no matter of a call
    before = own()
    with Operations() as counted:
        run()
    return len(counted.names) + own() - before


def measure(rounds: int, stack: contextlib.ExitStack) -> list[Row]:
    """Rows of every case: launches, then times, taken in turn."""
    served: dict[str, tuple[Callable[..., Any], Callable[[], int]]] = {EAGER: (F.cross_entropy, lambda: 0)}
    rows, failed = [], {}
    for name, backend, serve in ((TRITON, "triton", serve_triton), (CUDA, "cuda", serve_cuda)):
        try:
            own = serve(stack)
        except Exception as error:  # no Triton, no compiler, no shim
            failed[name] = reason(error)
            continue
        served[name] = (lambda *given, backend=backend, **more: lsk.cross_entropy(*given, backend=backend, **more)), own
    torch.set_num_threads(THREADS)
    for case in CASES:
        said = "{} × {:,}, {}".format(*shape_of(case), case)
        steps = {name: step(case, loss) for name, (loss, _) in served.items()}
        rows += [Row(LAUNCHES, said, name, count=launches(run, served[name][1])) for name, run in steps.items()]
        rows += timed(said, steps, rounds) if shape_of(case) == SMALL else []
        rows += [Row(group, said, name, refused=why) for name, why in failed.items() for group in GROUPS]
    return rows


def timed(case: str, steps: dict[str, Callable[[], None]], rounds: int) -> Iterator[Row]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(-WARM, rounds):
        for name, run in steps.items():
            begin = time.perf_counter()
            run()
            if i >= 0:
                times[name].append((time.perf_counter() - begin) * 1e3)
    for name, found in times.items():
        if rounds > 1:
            deciles = statistics.quantiles(found, n=10, method="inclusive")
            ratio = statistics.median(a / b for a, b in zip(found, times[EAGER], strict=True))
            yield Row(TIME, case, name, deciles[4], deciles[1], deciles[7], ratio=ratio, repeats=rounds)


def rows(rounds: int = ROUNDS) -> list[Row]:
    """What this program measures, in a process of its own: Triton is told of another driver, and not to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.host", "--json", "--rounds", str(rounds)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return [Row(group, "every case", "every provider", refused=last) for group in GROUPS]
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="0: launches alone; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="rows as the figures' files hold them")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        rows = measure(arguments.rounds, stack)
    for row in rows:
        if arguments.json:
            print(json.dumps(asdict(row)))
        else:
            figure = row.refused or (f"{row.count}" if row.count is not None else f"{1e3 * (row.ms or 0):.0f} µs")
            print(f"{row.group:10} {row.case:30} {row.provider:16} {figure}")


if __name__ == "__main__":
    main()
