"""Compile every Triton kernel ahead of time, without a GPU, in the form that ``launch`` chooses, and read its code.

    python tests/aot_check.py [--md FILE]

The public operators run on meta tensors with the launch replaced by a compilation, so signatures and specialisation are
the JIT's own. A kernel fails the check if it spills registers, if its rows do not go through 128-bit accesses whole, or
if it has more narrow accesses than the scalars of a row and the edges of an unaligned one account for. Exit status 1
on a failure.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "labelsmooth_kernels.triton_kernels"
CAPABILITIES = (80, 90, 100)
SMS = {80: 108, 90: 132, 100: 148}
CLASSES = (32000, 50257, 128256, 262144)
SHAPES = (
    *((dtype, k) for dtype in ("bfloat16", "float32") for k in CLASSES),
    ("float16", 50257),
    ("float32", 8001),
    ("float32", 16001),
)
MODES = ("grad", "grad+stats", "grad per row", "loss", "loss+stats", "few rows", "backward", "scale")
# Narrow loads: target, its logit, eps, row_scale, zmax, logsum, two edges. Narrow stores: five results, one edge.
NARROW_LOADS, NARROW_STORES = 6, 6


class Report(NamedTuple):
    """One compiled kernel."""

    kernel: str
    mode: str
    arch: str
    dtype: str
    k: int
    form: str
    block: int
    warps: int
    ctas: int
    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    narrow_loads: int
    narrow_stores: int
    problems: str


def kernels_package() -> Any:
    """The kernels of this source tree, under their installed name, without the package around them."""
    if PACKAGE not in sys.modules:
        path = ROOT / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules.setdefault(PACKAGE.partition(".")[0], types.ModuleType("parent"))
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    return importlib.import_module(f"{PACKAGE}.logits"), importlib.import_module(f"{PACKAGE}.launch")


class _Driver:
    """What Triton's JIT asks of a driver before it compiles; the device index is the architecture."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def disassemble(cubin: bytes) -> tuple[int, int, collections.Counter[str]]:
    """(registers, shared memory, memory instructions by kind and width) from the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([tools / "cuobjdump", "-res-usage", file.name]).stdout
        sass = run([tools / "nvdisasm", "-c", file.name]).stdout
    found = re.search(r"REG:(\d+) STACK:\d+ SHARED:(\d+)", usage)
    assert found is not None, usage
    counts: collections.Counter[str] = collections.Counter()
    for name, modifiers in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", sass):
        counts[name + (" wide" if re.search(r"\.(128|256)\b", modifiers) else " narrow")] += 1
    return int(found[1]), int(found[2]), counts


def judge(kernel: str, options: dict[str, Any], itemsize: int, counts: collections.Counter[str], writes: bool) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = []
    if any(name.startswith(("LDL", "STL")) for name in counts):
        problems.append("spills")
    if kernel == "merge_kernel":
        return ", ".join(problems)
    vectors = options["BLOCK"] * itemsize // (16 * 32 * options["num_warps"] * options["num_ctas"])
    sweeps = 2 if writes and options.get("ONE_BLOCK") is False else 1
    if counts["LDG wide"] < vectors * sweeps or (writes and counts["STG wide"] < vectors):
        problems.append(f"fewer than {vectors} 128-bit accesses per thread")
    if counts["LDG narrow"] > NARROW_LOADS or counts["STG narrow"] > NARROW_STORES:
        problems.append("narrow accesses")
    return ", ".join(problems)


def compile_mode(mode: str, capability: int, dtype: str, k: int) -> Iterator[Report]:
    """The kernels that one call of an operator launches."""
    from triton.runtime.driver import driver

    logits_ops, launch = kernels_package()
    driver.set_active(_Driver(capability))
    launched: list[tuple[str, Any, dict[str, Any], bool]] = []

    def compile_only(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        name = kernel.fn.__name__
        writes = name in ("grad_kernel", "scale_kernel") or (name == "row_kernel" and arguments[1] is not None)
        launched.append((name, compiled, options, writes))

    launch.run = compile_only
    n = 4 if mode == "few rows" else 4096
    logits = torch.empty(n, k, dtype=getattr(torch, dtype), device="meta")
    target = torch.empty(n, dtype=torch.int64, device="meta")
    rows = torch.empty(n, dtype=torch.float32, device="meta")
    with launch.override(machine=launch.Machine(divmod(capability, 10), SMS[capability])):
        if mode == "backward":
            logits_ops.backward(logits, target, 0.1, None, rows[:1], -100, rows, rows)
        elif mode == "scale":
            logits_ops.scale_(logits, rows[:1])
        else:
            per_row = rows if mode == "grad per row" else None
            with_grad = not mode.startswith("loss")
            with_stats = mode.endswith("stats") or mode == "few rows"
            logits_ops.forward(logits, target, 0.1, per_row, per_row, -100, with_grad, with_stats)
    for name, compiled, options, writes in launched:
        registers, shared, counts = disassemble(compiled.asm["cubin"])
        form = name.removesuffix("_kernel")
        if form == "row":
            form = "one block" if options["ONE_BLOCK"] else "sweep"
        yield Report(
            *(
                name,
                mode,
                f"sm_{capability}",
                dtype,
                k,
                form,
                options["BLOCK"],
                options["num_warps"],
                options["num_ctas"],
            ),
            *(registers, counts["LDL narrow"] + counts["LDL wide"] + counts["STL narrow"] + counts["STL wide"], shared),
            *(counts["LDG wide"], counts["STG wide"], counts["LDG narrow"], counts["STG narrow"]),
            judge(name, options, logits.element_size(), counts, writes),
        )


def compile_shapes(task: tuple[int, str]) -> list[Report]:
    """All modes and sizes of one architecture and dtype, in a worker process; Triton compiles equal kernels once."""
    warnings.simplefilter("ignore")
    shapes = [k for dtype, k in SHAPES if dtype == task[1]]
    return [report for k in shapes for mode in MODES for report in compile_mode(mode, *task, k)]


def check_all() -> list[Report]:
    """Every kernel of every architecture and shape, from two processes and an empty compilation cache."""
    tasks = [(capability, dtype) for capability in CAPABILITIES for dtype in ("float32", "bfloat16", "float16")]
    os.environ.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            return [report for reports in pool.imap(compile_shapes, tasks, chunksize=1) for report in reports]


def table(reports: list[Report]) -> str:
    """The reports as a Markdown table."""
    names = [name.replace("_", " ") for name in Report._fields]
    lines = [names, ["---"] * len(names), *([str(value) for value in report] for report in reports)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Print the table, and the failures below it."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--md", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    reports = check_all()
    text = f"Triton {triton.__version__}, {len(reports)} kernels\n\n{table(reports)}\n"
    print(text)
    if arguments.md:
        arguments.md.write_text(text)
    failures = [report for report in reports if report.problems]
    print(f"{len(failures)} of {len(reports)} kernels fail" if failures else "all kernels pass")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
