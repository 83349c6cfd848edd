"""Compile the tiled linear loss ahead of time, without a GPU, with the tile sizes that ``linear`` chooses.

    python tests/aot_tiled.py [--md FILE]

As ``aot_check`` does for the row kernels: the two functions run on meta tensors with the launch replaced by a
compilation. A kernel fails if it spills registers or wants more shared memory than a program may have; the two that
hold matrix products also if their loads do not go to shared memory asynchronously, ahead of their use, or if a product
of half precision misses the matrix unit. Exit status 1 on a failure.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from aot_check import CAPABILITIES, PACKAGE, SMS, _Driver, disassemble, kernels_package

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = ("bfloat16", "float16", "float32")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
N, K, D = 8192, 131072, 4096
MODES = {"plain": False, "everything": True}  # class weights, prior, ε and g per row, bias, statistics, filter
MATRIX = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}


class Report(NamedTuple):
    """One compiled kernel."""

    kernel: str
    mode: str
    arch: str
    dtype: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    problems: str


def call(linear: Any, everything: bool, dtype: str) -> None:
    """The forward and the backward on tensors without memory."""
    new = functools.partial(torch.empty, device="meta")
    half = {"dtype": getattr(torch, dtype)}
    hidden, weight, bias = new(N, D, **half), new(K, D, **half), new(K, **half) if everything else None
    target = new(N, dtype=torch.int64)
    given = (new(K), new(K), 0.1, new(N), new(N)) if everything else (None, None, 0.1, None, new(1))
    row = (target, *given, -100, False, False, 1e-4, 0.0, 1.0, None)
    linear.forward(hidden, weight, bias, *row, int(everything))
    filter_eps = 2.0**-12 if everything else 0.0
    linear.backward(hidden, weight, bias, *row, new(4, N), filter_eps, True, True, everything)


@functools.cache
def instructions(cubin: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def judge(kernel: str, capability: int, dtype: str, spills: int, shared: int, sass: str) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = []
    if spills:
        problems.append("spills")
    if shared > SHARED[capability]:
        problems.append("too much shared memory")
    if kernel in ("tile_kernel", "sweep_kernel"):
        if not re.search(r"\bLDGSTS\.E\.(BYPASS\.)?(LTC128B\.)?128", sass):
            problems.append("no asynchronous 128-bit loads")
        if dtype != "float32" and not re.search(MATRIX[capability], sass):
            problems.append("no matrix unit")
    return ", ".join(problems)


def compile_mode(capability: int, dtype: str, mode: str) -> Iterator[Report]:
    """The kernels of one call."""
    from triton.runtime.driver import driver

    kernels_package()
    linear, launch = (importlib.import_module(f"{PACKAGE}.{name}") for name in ("linear", "launch"))
    driver.set_active(_Driver(capability))
    launched: dict[bytes, tuple[str, Any, dict[str, Any]]] = {}

    def compile_only(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        name = kernel.fn.__name__
        side = {None: "", False: ", hidden", True: ", weight"}[options.get("OF_WEIGHT")]
        launched[compiled.asm["cubin"]] = (name + side, compiled, options)

    launch.run = compile_only
    with launch.override(machine=launch.Machine(divmod(capability, 10), SMS[capability])):
        call(linear, MODES[mode], dtype)
    for cubin, (kernel, compiled, options) in launched.items():
        registers, _, counts = disassemble(cubin)
        spills = sum(n for name, n in counts.items() if name.startswith(("LDL", "STL")))
        shared = compiled.metadata.shared
        problems = judge(kernel.partition(",")[0], capability, dtype, spills, shared, instructions(cubin))
        size = (options["num_warps"], compiled.metadata.num_stages)
        yield Report(kernel, mode, f"sm_{capability}", dtype, *size, registers, spills, shared, problems)


def compile_task(task: tuple[int, str, str]) -> list[Report]:
    """One call, in a worker process."""
    warnings.simplefilter("ignore")
    return list(compile_mode(*task))


def check_all() -> list[Report]:
    """Every kernel of every architecture and dtype, from two processes and an empty compilation cache."""
    tasks = [(capability, dtype, mode) for capability in CAPABILITIES for dtype in DTYPES for mode in MODES]
    tasks = [task for task in tasks if task[1:] != ("float16", "plain")]  # no more than bfloat16's under another name
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            return [report for reports in pool.imap(compile_task, tasks, chunksize=1) for report in reports]


def main() -> int:
    """Print the table, and the failures below it."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--md", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    reports = check_all()
    lines = [Report._fields, ["---"] * len(Report._fields), *([str(value) for value in r] for r in reports)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    text = f"Triton {triton.__version__}, {len(reports)} kernels\n\n{table}\n"
    print(text)
    if arguments.md:
        arguments.md.write_text(text)
    failures = [report for report in reports if report.problems]
    print(f"{len(failures)} of {len(reports)} kernels fail" if failures else "all kernels pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
