"""Launch the tiled linear loss for ``aot_check.py``, with the tile sizes that ``linear`` chooses.

A kernel fails if it spills registers or wants more shared memory than a program may have; the two that hold matrix
products also if their loads do not go to shared memory asynchronously, ahead of their use, or if a product of half
precision misses the matrix unit.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any

import torch
from aot_table import SMS, Counts, Launch, kernels_module, launched

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = ("bfloat16", "float16", "float32")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may have
N, K, D = 8192, 131072, 4096
MODES = {"plain": False, "everything": True}  # class weights, prior, ε and g per row, bias, statistics, filter


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


def judge(kernel: str, capability: int, dtype: str, counts: Counts) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = []
    if counts.spills:
        problems.append("spills")
    if counts.shared > SHARED[capability]:
        problems.append("too much shared memory")
    if kernel in ("tile_kernel", "sweep_kernel"):
        if not counts.wide_copies:
            problems.append("no asynchronous 128-bit loads")
        if dtype != "float32" and not counts.products:
            problems.append("no matrix unit")
    return ", ".join(problems)


def launches() -> Iterator[Launch]:
    """Record what the forward and the backward launch, on every architecture."""
    for capability, dtype, mode in itertools.product(SMS, DTYPES, MODES):
        if (dtype, mode) == ("float16", "plain"):  # no more than bfloat16's under another name
            continue
        run = functools.partial(call, kernels_module("linear"), MODES[mode], dtype)
        for kernel, options in launched(capability, run):
            side = {None: "", False: ", hidden", True: ", weight"}[options.get("OF_WEIGHT")]
            said = f"{mode}, {dtype}{side}: {options['num_warps']} warps"
            yield Launch(kernel, said, functools.partial(judge, kernel.name, capability, dtype))
