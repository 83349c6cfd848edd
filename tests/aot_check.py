"""Compile every Triton kernel ahead of time, without a GPU, in the form that ``launch`` chooses, and read its code.

    python tests/aot_check.py [--write] [--tenth N] [--md FILE]

The public operators run on meta tensors with the launch replaced by a compilation, so signatures and specialisation are
the JIT's own. A kernel fails the check if it spills registers, if its rows do not go through 128-bit accesses whole, or
if it has more narrow accesses than the scalars of a row and the edges of an unaligned one account for; those of the
tiled linear loss are judged in ``aot_tiled.py``. What is compiled, and what is taken from a table, is the matter of
``aot_table.py``. Exit status 1 on a failure, and where machine code contradicts the table.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import aot_table
import aot_tiled
import torch
from aot_table import SMS, Launch, kernels_module

if TYPE_CHECKING:
    from collections.abc import Iterator

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
# Narrow loads: target, its logit, its weight, eps, row_scale, what is saved, two edges. Narrow stores: results, two
# edges, the target's entry; the sums of a part.
NARROW_LOADS, NARROW_STORES, PART_STORES = 8, 11, 13
# Instructions of the main loops for a class. In the time of a copy an H100 issues 42 for a logit in bfloat16, and about
# twice as many in float32.
MOST = {"row_kernel": 20, "split_kernel": 15, "grad_kernel": 15}
MOST_OF_LOSS, MOST_WITH_OPTION = 10, 36


def judge(kernel: str, mode: Mode, options: dict[str, Any], itemsize: int, counts: aot_table.Counts) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = []
    if counts.spills:
        problems.append("spills")
    structure = options.get("S")
    if kernel == "merge_kernel" or 1 in (options.get("VEC"), structure and structure.VEC):
        return ", ".join(problems)
    vectors = options["BLOCK"] * itemsize // (16 * 32 * options["num_warps"])
    writes = kernel in ("grad_kernel", "scale_kernel") or (
        kernel in ("row_kernel", "distill_kernel") and mode.with_grad
    )
    sweeps = 2 if writes and options.get("ONE_BLOCK") is False else 1
    if kernel == "distill_kernel":
        sweeps = 4 if writes else 2
    if counts.wide_loads < vectors * sweeps or (writes and counts.wide_stores < vectors):
        problems.append(f"fewer than {vectors} 128-bit accesses per thread")
    per_class = mode.vectors or mode.soft == "bfloat16"  # narrow beside unaligned rows, or float32 logits
    if counts.narrow_loads > NARROW_LOADS and not (per_class and structure.EDGES):
        problems.append("narrow loads")
    if counts.narrow_stores > (PART_STORES if kernel == "split_kernel" else NARROW_STORES):
        problems.append("narrow stores")
    if (spent := instructions_per_class(kernel, options, counts)) > (most := budget(kernel, mode)):
        problems.append(f"{spent:.1f} instructions per class, allowed are {most}")
    return ", ".join(problems)


def instructions_per_class(kernel: str, options: dict[str, Any], counts: aot_table.Counts) -> float:
    """The instructions of the main loops for each class: a thread takes an equal share of a block in each turn."""
    if kernel not in MOST or options.get("ONE_BLOCK"):
        return 0.0
    return counts.looped / (options["BLOCK"] / (32 * options["num_warps"]))


def budget(kernel: str, mode: Mode) -> float:
    """How many of them a class may take. A softcap, and options together, are not bounded."""
    plain = Mode(mode.op, mode.n, mode.with_grad, per_row=mode.per_row, layout=mode.layout)
    if mode == plain:
        return MOST.get(kernel, 0) if mode.with_grad or kernel != "row_kernel" else MOST_OF_LOSS
    together = mode.softcap is not None or mode == EVERYTHING._replace(op=mode.op, n=mode.n)
    return math.inf if together else MOST_WITH_OPTION


def call(ops: Any, mode: Mode, dtype: torch.dtype, k: int, device: str = "meta") -> None:
    """Call an operator, as a rule on tensors without memory."""
    new = functools.partial(torch.empty, device=device)
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
        kernels_module("distill").distill(
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


def launches() -> Iterator[Launch]:
    """Record what every call of an operator launches, on every architecture."""
    whole = {name: mode for name, mode in OPTIONS.items() if name.startswith("everything")}
    for capability in SMS:
        for modes, shapes in ((MODES, SHAPES), (OPTIONS, OPTION_SHAPES), (whole, BLOCK_SHAPES)):
            for (dtype, k), (name, mode) in itertools.product(shapes, modes.items()):
                yield from launches_of(capability, name, mode, getattr(torch, dtype), k)


def launches_of(capability: int, name: str, mode: Mode, dtype: torch.dtype, k: int) -> Iterator[Launch]:
    """Record what one call launches."""
    run = functools.partial(call, kernels_module("logits"), mode, dtype, k)
    for kernel, options in aot_table.launched(capability, run):
        form = {True: "one block, ", False: "sweep, ", None: ""}[options.get("ONE_BLOCK")]
        size = f"block {options['BLOCK']}, {options['num_warps']} warps"
        said = f"{name}, {str(dtype).removeprefix('torch.')}, K {k}: {form}{size}"
        yield Launch(kernel, said, functools.partial(judge, kernel.name, mode, options, dtype.itemsize))


def main() -> int:
    """Print what was compiled, and what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table anew for this version of Triton")
    parser.add_argument("--tenth", type=int, choices=range(10), default=aot_table.today(), help="default: the date's")
    parser.add_argument("--md", type=Path, help="also write a table of every launch here")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    every = [*aot_tiled.launches(), *launches()]
    counts, differ = aot_table.check(every, arguments.tenth, arguments.write)
    if arguments.md:
        arguments.md.write_text(aot_table.markdown(every, counts))
    failures = [launch for launch in every if launch.judge(counts[launch.kernel.hash])]
    if failures:
        print(aot_table.markdown(failures, counts))
    for line in differ:
        print(f"{aot_table.TABLE.name} is contradicted: {line}")
    wrong = failures or (differ and not arguments.write)
    print(f"{len(failures)} launches fail, {len(differ)} rows are contradicted" if wrong else "all kernels pass")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
