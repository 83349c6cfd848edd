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


class Mode(NamedTuple):
    """One call of an operator on N rows."""

    op: str = "forward"
    n: int = 4096
    with_grad: bool = True
    n_stats: int = 0
    per_row: bool = False
    """eps and row_scale: one per row"""
    vectors: int = 0
    """1: class weights; 2: a prior too"""
    finite: bool = False
    soft: str = ""
    """dtype of target probabilities"""
    logit_scale: float = 1.0
    softcap: float | None = None
    penalty: float = 0.0
    layout: str = "rows"
    """or "classes apart", or "two distances" """


MODES = {
    "grad": Mode(),
    "grad+stats": Mode(n_stats=1),
    "grad per row": Mode(per_row=True),
    "loss": Mode(with_grad=False),
    "loss+stats": Mode(with_grad=False, n_stats=1),
    "few rows": Mode(n=4, n_stats=1),
    "backward": Mode("backward"),
    "scale": Mode("scale_"),
    "distill": Mode("distill", per_row=True),
}
EVERYTHING = Mode(
    per_row=True, vectors=2, finite=True, soft="float32", logit_scale=0.5, softcap=30.0, n_stats=4, penalty=0.1
)
# Options, each on its own and all at once: for long rows, aligned and not; what holds all of them also for rows of one
# block.
OPTIONS = {
    "weights": Mode(vectors=1),
    "weights and prior": Mode(vectors=2),
    "finite": Mode(finite=True),
    "bf16 target": Mode(soft="bfloat16"),
    "fp32 target": Mode(soft="float32"),
    "softcap": Mode(softcap=30.0),
    "logit scale": Mode(logit_scale=0.5),
    "entropy": Mode(n_stats=2),
    "every statistic": Mode(n_stats=4),
    "penalty": Mode(penalty=0.1),
    "distill, prior": Mode("distill", vectors=2, with_grad=False),
    "classes apart": Mode(layout="classes apart"),
    "two distances": Mode(layout="two distances"),
    "everything": EVERYTHING,
    "everything, few rows": EVERYTHING._replace(n=4),
    "everything, backward": EVERYTHING._replace(op="backward"),
    "everything, target": EVERYTHING._replace(op="target_grad"),
}
OPTION_SHAPES = (("float32", 50257), ("bfloat16", 128256))
BLOCK_SHAPES = (("bfloat16", 4096),)
# Narrow loads: target, its logit, its weight, eps, row_scale, what is saved, two edges. Narrow stores: results, one
# edge; the sums of a part.
NARROW_LOADS, NARROW_STORES, PART_STORES = 8, 9, 13


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


def judge(kernel: str, mode: Mode, options: dict[str, Any], itemsize: int, counts: collections.Counter[str]) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = []
    if any(name.startswith(("LDL", "STL")) for name in counts):
        problems.append("spills")
    structure = options.get("S")
    if kernel == "merge_kernel" or 1 in (options.get("VEC"), structure and structure.VEC):
        return ", ".join(problems)
    vectors = options["BLOCK"] * itemsize // (16 * 32 * options["num_warps"] * options["num_ctas"])
    writes = kernel in ("grad_kernel", "scale_kernel") or (
        kernel in ("row_kernel", "distill_kernel") and mode.with_grad
    )
    sweeps = 2 if writes and options.get("ONE_BLOCK") is False else 1
    if kernel == "distill_kernel":
        sweeps = 4 if writes else 2
    if counts["LDG wide"] < vectors * sweeps or (writes and counts["STG wide"] < vectors):
        problems.append(f"fewer than {vectors} 128-bit accesses per thread")
    per_class = mode.vectors or mode.soft == "bfloat16"  # narrow beside unaligned rows, or float32 logits
    if counts["LDG narrow"] > NARROW_LOADS and not (per_class and structure.EDGES):
        problems.append("narrow loads")
    if counts["STG narrow"] > (PART_STORES if kernel == "split_kernel" else NARROW_STORES):
        problems.append("narrow stores")
    return ", ".join(problems)


def call(ops: Any, mode: Mode, dtype: torch.dtype, k: int) -> None:
    """Call an operator on tensors without memory."""
    new = functools.partial(torch.empty, device="meta")
    n = mode.n
    logits = {
        "rows": new(n, k, dtype=dtype),
        "classes apart": new(n // 4, k, 4, dtype=dtype).mT,
        "two distances": new(4, n // 4, k, dtype=dtype).transpose(0, 1),
    }[mode.layout]
    if mode.op == "scale_":
        ops.scale_(logits, new(1))
        return
    target = new(logits.shape, dtype=getattr(torch, mode.soft)) if mode.soft else new(n, dtype=torch.int64)
    weight, prior = (new(k) if mode.vectors > i else None for i in (0, 1))
    eps_rows, row_scale = (new(n), new(n)) if mode.per_row else (None, new(1) if mode.op == "backward" else None)
    row = (
        target,
        weight,
        prior,
        0.1,
        eps_rows,
        row_scale,
        -100,
        False,
        mode.finite,
        0.0,
        mode.penalty,
        mode.logit_scale,
        mode.softcap,
    )
    if mode.op == "distill":
        importlib.import_module(f"{PACKAGE}.distill").distill(
            logits,
            new(n, k, dtype=dtype),
            target,
            prior,
            0.1,
            eps_rows,
            row_scale,
            -100,
            False,
            0.5,
            2.0,
            mode.with_grad,
        )
    elif mode.op == "forward":
        ops.forward(logits, *row, mode.with_grad, mode.n_stats)
    else:
        getattr(ops, mode.op)(logits, *row, new(4, n))


def compile_mode(name: str, mode: Mode, capability: int, dtype: str, k: int) -> Iterator[Report]:
    """The kernels that one call of an operator launches."""
    from triton.runtime.driver import driver

    logits_ops, launch = kernels_package()
    driver.set_active(_Driver(capability))
    launched: list[tuple[str, Any, dict[str, Any]]] = []

    def compile_only(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        launched.append((kernel.fn.__name__, compiled, options))

    launch.run = compile_only
    with launch.override(machine=launch.Machine(divmod(capability, 10), SMS[capability])):
        call(logits_ops, mode, getattr(torch, dtype), k)
    for kernel, compiled, options in launched:
        registers, shared, counts = disassemble(compiled.asm["cubin"])
        form = kernel.removesuffix("_kernel")
        if form == "row":
            form = "one block" if options["ONE_BLOCK"] else "sweep"
        size = (options["BLOCK"], options["num_warps"], options["num_ctas"])
        spills = sum(counts[f"{access} {width}"] for access in ("LDL", "STL") for width in ("narrow", "wide"))
        accesses = (counts["LDG wide"], counts["STG wide"], counts["LDG narrow"], counts["STG narrow"])
        problems = judge(kernel, mode, options, getattr(torch, dtype).itemsize, counts)
        yield Report(
            kernel, name, f"sm_{capability}", dtype, k, form, *size, registers, spills, shared, *accesses, problems
        )


def compile_shapes(task: tuple[int, str]) -> list[Report]:
    """All modes and sizes of one architecture and dtype, in a worker process; Triton compiles equal kernels once."""
    warnings.simplefilter("ignore")
    whole = {name: mode for name, mode in OPTIONS.items() if name.startswith("everything")}
    calls = [
        (name, mode, k)
        for modes, shapes in ((MODES, SHAPES), (OPTIONS, OPTION_SHAPES), (whole, BLOCK_SHAPES))
        for dtype, k in shapes
        if dtype == task[1]
        for name, mode in modes.items()
    ]
    return [report for name, mode, k in calls for report in compile_mode(name, mode, *task, k)]


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
