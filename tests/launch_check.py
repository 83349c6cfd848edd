"""Launch the kernels of the main calls as on four GPUs, without one, and hold that against a table.

    python tests/launch_check.py [--write] [--gpu NAME ...] [--calls TEXT]

``tests/launches.csv`` says which kernels a call launches on an H100, H200, B200 and RTX 4090, in their order: blocks,
threads, bytes of shared memory, blocks of a cluster. The Triton kernels are compiled and go through Triton's own
launcher to a stand-in for the driver (``bench/stand_in.py``), which refuses what a GPU's would; those of CUDA C++ are
written down by ``cuda_shim``, which must be built. Exit status 1 where a call differs from its rows, or a launch is
refused.
"""

from __future__ import annotations

import argparse
import collections
import csv
import fcntl
import functools
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aot_check
import aot_tiled
import torch
import triton
from aot_table import ROOT, kernels_module
from cuda_shim import build

from bench import stand_in
from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TABLE = ROOT / "tests" / "launches.csv"
SHAPES = (
    *(("bfloat16", k) for k in (4096, 32000, 50257, 128256)),
    ("float32", 128256),
)
N = 8192
CALLS = {
    "loss and gradient": aot_check.Mode(n=N),
    "loss": aot_check.Mode(n=N, with_grad=False),
    "loss and gradient, 16 rows": aot_check.Mode(n=16),
    "gradient": aot_check.Mode("backward", n=N),
    "scale": aot_check.Mode("scale_", n=N),
    "distillation": aot_check.Mode("distill", n=N),
    "every option": aot_check.EVERYTHING._replace(n=N),
}


class Row(NamedTuple):
    """Hold a line of the table: one launch of a call, and how many like it the call makes."""

    backend: str
    """with Triton's version, on which plans depend"""
    gpu: str
    call: str
    kernel: str
    blocks: int
    threads: int
    shared: int
    cluster: int
    times: int


Call = tuple[str, "Callable[[], None]"]


def calls_of(ops: Any, names: tuple[str, ...], device: str) -> Iterator[Call]:
    """Name the calls of the row operators, and make them."""
    for (dtype, k), name in itertools.product(SHAPES, names):
        run = functools.partial(aot_check.call, ops, CALLS[name], getattr(torch, dtype), k, device)
        yield f"{name}, {dtype}, K {k}", run


def counted(backend: str, gpu: str, call: str, launches: list[stand_in.Launch]) -> Iterator[Row]:
    """Make the rows of a call, in the order of its launches."""
    for launch, times in collections.Counter(launches).items():
        yield Row(backend, gpu, call, *launch, times)


def of_triton(gpus: list[str], only: str) -> Iterator[Row]:
    """Launch the Triton kernels on the stand-in, the tiled head among them."""
    launch, backend = kernels_module("launch"), f"triton {triton.__version__}"
    heads: list[Call] = [
        (f"head, {dtype}", functools.partial(aot_tiled.call, kernels_module("linear"), False, dtype))
        for dtype in ("bfloat16", "float32")
    ]
    for name in gpus:
        driver = stand_in.driver(name)
        driver.activate()
        with launch.override(machine=launch.Machine(*stand_in.GPUS[name][:2])):
            for call, run in (*calls_of(kernels_module("logits"), tuple(CALLS), "meta"), *heads):
                if only not in call:
                    continue
                first = driver.count()
                run()
                yield from counted(backend, name, call, driver.since(first))


def of_cuda(gpus: list[str], only: str) -> Iterator[Row]:
    """Let the shim write down what the CUDA C++ kernels' plans launch; no memory of the tensors is touched."""
    shim, kernels = stand_in.Shim(), backends.BACKENDS["cuda"].kernels
    for name in gpus:
        shim.pretend(stand_in.GPUS[name])
        for call, run in calls_of(kernels, tuple(name for name in CALLS if name != "distillation"), "cpu"):
            if only not in call:
                continue
            run()
            yield from counted("cuda", name, call, shim.launches())


def load() -> list[Row]:
    """Read the table."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        _, *lines = csv.reader(file)
    return [Row(*line[:4], *map(int, line[4:])) for line in lines]


def ordered(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row.backend, list(stand_in.GPUS).index(row.gpu), row.call))


def save(rows: list[Row]) -> None:
    """Write the table: by backend, GPU and call, the launches of a call as they come."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(ordered(rows))


def main() -> int:
    """Print what differs from the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the rows of these backends and GPUs anew")
    parser.add_argument("--gpu", nargs="+", choices=list(stand_in.GPUS), default=list(stand_in.GPUS))
    parser.add_argument("--calls", default="", metavar="TEXT", help="only those with this in their name")
    arguments = parser.parse_args()
    if reason := build.missing():
        parser.error(reason)
    found = [*of_triton(arguments.gpu, arguments.calls), *of_cuda(arguments.gpu, arguments.calls)]
    made = {(backend, gpu) for backend in (f"triton {triton.__version__}", "cuda") for gpu in arguments.gpu}
    with Path(__file__).open() as lock:  # another Triton may be writing its rows
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = load()
        mine = [row for row in known if (row.backend, row.gpu) in made and arguments.calls in row.call]
        if arguments.write:
            save([row for row in known if row not in mine] + found)
    differ = [("is gone", row) for row in mine if row not in found]
    differ += [("is new", row) for row in found if row not in mine]
    if not differ:
        pairs = zip(mine, ordered(found), strict=True)
        differ = [("comes in another place", row) for row, now in pairs if row != now]
    for what, row in differ:
        print(f"{TABLE.name}: {what}: {','.join(map(str, row))}")
    who = ", ".join(sorted({row.backend for row in found}))
    print(f"{who}: {len(found)} rows of launches on {', '.join(arguments.gpu)}, {len(differ)} differ from {TABLE.name}")
    return 1 if differ and not arguments.write else 0


if __name__ == "__main__":
    sys.exit(main())
