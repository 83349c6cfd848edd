"""Which form and size of a kernel runs: the only tuning table of this package, and the only place that launches.

Not yet measured on a GPU. The rows come from ahead-of-time compilation (``tests/aot_check.py``: registers, no spills, 128-bit
accesses) and from this reasoning: one program should keep at most 32 values of a row per thread, an SM should hold two
programs or more where it can (one loads while the other reduces), and a row that no thread block holds goes over a cluster.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Machine:
    """What the choice depends on besides the tensor."""

    capability: tuple[int, int]  # (0, 0) is the interpreter
    sms: int
    triton: tuple[int, ...] = TRITON

    @property
    def clusters(self) -> bool:
        """Triton 3.6 and 3.7 fail while compiling a reduction over CTAs; GeForce parts (12.x) have no clusters to speak of."""
        return self.capability[0] in (9, 10) and self.triton >= (3, 8)


@dataclass(frozen=True)
class Plan:
    """One launch: ``form`` is "block" (row read once), "sweep" (read twice where a gradient is made), "split", "merge" or "chunk"."""

    form: str
    block: int
    warps: int
    ctas: int = 1
    programs: int = 2**31 - 1  # the grid has at most so many, each takes several units of work
    splits: int = 1


#        bytes, largest K: warps, CTAs, programs per SM
_BLOCK = (
    (2, 1024, 4, 1, 8),  # one 128-bit load per thread
    (2, 4096, 8, 1, 4),
    (2, 8192, 8, 1, 3),
    (2, 16384, 16, 1, 2),
    (2, 32768, 32, 1, 1),  # the largest row that one thread block holds without spills
    (2, 65536, 16, 4, 1),  # from here on over a thread-block cluster
    (2, 131072, 16, 8, 1),
    (2, 262144, 32, 8, 1),
    (4, 1024, 4, 1, 8),
    (4, 4096, 8, 1, 4),
    (4, 8192, 16, 1, 2),
    (4, 16384, 32, 1, 1),
    (4, 65536, 16, 8, 1),
    (4, 131072, 32, 8, 1),
    (4, 262144, 32, 8, 1),
)
#          bytes: block, warps, programs per SM
_SWEEP = {2: (8192, 16, 2), 4: (8192, 16, 2)}  # also the longest row of a loss without gradient that is worth one block
_CHUNK = {2: (4096, 8, 8), 4: (4096, 8, 8)}  # gradient and scale: no reduction, so small blocks and a full SM
_INTERPRETER = Machine((0, 0), sms=2)  # two programs: a persistent loop is really one
_forced: dict[str, Any] = {}


@contextlib.contextmanager
def override(**choice: Any) -> Iterator[None]:
    """Force fields of every row or chunk plan made inside (``form``, ``block``, ``splits``, ``warps``, …), or ``machine``: for tests."""
    before = dict(_forced)
    _forced.update(choice)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    return Machine((properties.major, properties.minor), properties.multi_processor_count)


def machine_of(tensor: Tensor) -> Machine:
    if "machine" in _forced:
        machine: Machine = _forced["machine"]
        return machine
    return _machine(tensor.device.index) if tensor.is_cuda else _INTERPRETER


def _settled(plan: Plan, k: int) -> Plan:
    plan = replace(plan, **{name: value for name, value in _forced.items() if name != "machine"})
    return replace(plan, block=max(plan.block, triton.next_power_of_2(k))) if plan.form == "block" else plan


def row_plan(logits: Tensor, *, with_grad: bool, alike: bool) -> Plan:
    """The form of the loss of logits (N, K); ``alike``: the vectors of a row of the logits are vectors of the gradient too."""
    machine = machine_of(logits)
    n, k = logits.shape
    if machine == _INTERPRETER:  # about eight blocks per row at any K, so that small cases take every path
        block = _eighth(k)
        form = "block" if k <= block else "split" if n == 1 else "sweep"
        return _settled(Plan(form, block, 4, programs=machine.sms, splits=4), k)
    plan = _unsplit(machine, k, logits.element_size(), with_grad, alike)
    block, warps, _ = _SWEEP[logits.element_size()]
    if 2 * n * plan.ctas <= machine.sms and k > block:  # rows alone would leave more than half of the SMs idle
        plan = Plan("split", block, warps, splits=-(-2 * machine.sms // n))
    return _settled(plan, k)


def _eighth(k: int) -> int:
    return max(16, int(triton.next_power_of_2(k)) // 8)


def _unsplit(machine: Machine, k: int, itemsize: int, with_grad: bool, alike: bool) -> Plan:
    block, warps, per_sm = _SWEEP[itemsize]
    sweep = Plan("sweep", block, warps, programs=machine.sms * per_sm)
    if not with_grad and k > block:
        return sweep  # it is read once in any case, and smaller blocks overlap better
    for row_itemsize, largest, warps, ctas, per_sm in _BLOCK:
        if row_itemsize == itemsize and k <= largest:
            if ctas > 1 and not (machine.clusters and alike):
                return sweep  # a narrow store moves elements between threads first, in a cluster between SMs
            block = max(128, triton.next_power_of_2(k))
            return Plan("block", block, warps, ctas, programs=max(1, machine.sms * per_sm // ctas))
    return sweep


def merge_plan(n_splits: int) -> Plan:
    return Plan("merge", triton.next_power_of_2(n_splits), 4)


def chunk_plan(tensor: Tensor, k: int) -> Plan:
    """Chunks of rows of k elements, for the kernels that only map."""
    machine = machine_of(tensor)
    if machine == _INTERPRETER:
        return _settled(Plan("chunk", _eighth(k), 4, programs=machine.sms), 0)
    block, warps, per_sm = _CHUNK[tensor.element_size()]
    block = min(block, max(128, triton.next_power_of_2(k)))
    return _settled(Plan("chunk", block, warps, programs=machine.sms * per_sm), 0)


def start(kernel: Any, plan: Plan, units: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Launch for so many units of work, on the device of the first argument and its current stream."""
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(min(units, plan.programs),)](
            *arguments, **constants, BLOCK=plan.block, num_warps=plan.warps, num_ctas=plan.ctas
        )
