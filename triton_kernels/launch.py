"""Which form and size of a kernel runs: the only tuning table of this package, and the only place that launches.

The numbers come from ahead-of-time compilation (``tests/aot_check.py``: registers, no spills, 128-bit accesses) and
from this reasoning: a row is read once where a thread block, or a cluster of up to 16, holds it; an SM should hold two
programs where it can, so that one loads while the other reduces. On an H100 they are right but not tuned: long rows
take 1.5 to 2.1 times a copy, bound by instructions and by second reads that miss L2 (docs/gpu.md).
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton

if TYPE_CHECKING:
    from collections.abc import Iterator

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
        """Triton 3.6 and 3.7 fail while compiling a reduction over CTAs."""
        return self.capability[0] in _CLUSTER and self.triton >= (3, 8)


_ANY = 2**31 - 1


@dataclass(frozen=True)
class Plan:
    """One launch; ``form`` is "block" (read once), "sweep" (twice if a gradient is made), "split", "merge", "chunk"."""

    form: str
    block: int
    warps: int
    ctas: int = 1
    programs: int = _ANY  # the grid has at most so many, each takes several units of work
    splits: int = 1
    registers: int | None = None  # at most so many per thread


# Left to itself, the assembler saves registers and spills a word or two with one Triton or the other: hence the limits.
# Rows of one thread block, read once: largest K, warps, programs per SM, registers
_BLOCK = (
    (1024, 4, 8, None),  # two 128-bit loads per thread in float32, one in half precision
    (4096, 8, 4, None),
    (8192, 8, 1, 160),
    (16384, 16, 1, None),  # 32 values per thread, as before; twice the block spills with Triton 3.6, and on sm_100
)
_WITH_OPTIONS = 2  # so many of them serve options: the others spill, as clusters do
# Longer rows, read once by a cluster of 2 to 16 thread blocks, by compute capability: elements and warps of each block
_CLUSTER = {9: (16384, 16), 10: (16384, 32)}  # each spills a word or two with the warps of the other
_MAX_CTAS = 16
# bytes: block, warps, programs per SM, registers; larger blocks spill
_SWEEP = {2: (4096, 16, 3, None), 4: (2048, 8, 5, 48)}
_SWEEP_WITH_OPTIONS = {2: (2048, 8, 6, None), 4: (512, 4, 4, 128)}
# bytes: block, warps, programs per SM
_CHUNK = {2: (4096, 8, 8), 4: (4096, 8, 8)}  # gradient and scale: no reduction, so small blocks and a full SM
_DISTILL = {2: (2048, 8, 4), 4: (2048, 8, 4)}  # two rows at a time, six sums
_INTERPRETER = Machine((0, 0), sms=2)  # two programs: a persistent loop is really one
_forced: dict[str, Any] = {}


@contextlib.contextmanager
def override(**choice: Any) -> Iterator[None]:
    """Force fields of the row plans made inside (``form``, ``block``, ``splits``, …), or ``machine``: tests, tuning."""
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
    if plan.form == "block":
        return replace(plan, block=max(plan.block, triton.next_power_of_2(k)))
    return replace(plan, programs=_ANY) if plan.form == "split" else plan


def row_plan(logits: Tensor, *, with_grad: bool, alike: bool, options: int) -> Plan:
    """The form for logits (..., K); ``alike``: the vectors of a row of the logits are vectors of the gradient too;
    ``options``: 0 if a row is its logits and two numbers, 1 if its classes differ in being finite, 2 if more
    than z is read or summed of each, or they are no neighbours."""
    machine = machine_of(logits)
    n, k = logits.shape[:-1].numel(), logits.shape[-1]
    if machine == _INTERPRETER:  # about eight blocks per row at any K, so that small cases take every path
        block = _eighth(k)
        form = "block" if k <= block else "split" if n == 1 else "sweep"
        return _settled(Plan(form, block, 4, programs=machine.sms, splits=4), k)
    plan = _unsplit(machine, k, logits.element_size(), with_grad, alike, options)
    block, warps, *_ = (_SWEEP if options < 2 else _SWEEP_WITH_OPTIONS)[logits.element_size()]
    if 2 * n * plan.ctas <= machine.sms and k > block:  # rows alone would leave more than half of the SMs idle
        plan = Plan("split", block, warps, splits=-(-2 * machine.sms // n))
    return _settled(plan, k)


def _eighth(k: int) -> int:
    return max(16, int(triton.next_power_of_2(k)) // 8)


def _unsplit(machine: Machine, k: int, itemsize: int, with_grad: bool, alike: bool, options: int) -> Plan:
    block, warps, per_sm, registers = (_SWEEP if options < 2 else _SWEEP_WITH_OPTIONS)[itemsize]
    sweep = Plan("sweep", block, warps, programs=machine.sms * per_sm, registers=registers)
    if not with_grad and k > block:
        return sweep  # it is read once in any case, and smaller blocks overlap better
    for largest, warps, per_sm, registers in _BLOCK[:_WITH_OPTIONS] if options else _BLOCK:
        if k <= largest:
            block, programs = max(128, triton.next_power_of_2(k)), machine.sms * per_sm
            return Plan("block", block, warps, programs=programs, registers=registers)
    if options or not (machine.clusters and alike):
        return sweep  # a narrow access moves elements between threads first, in a cluster between SMs
    part, warps = _CLUSTER[machine.capability[0]]
    ctas = triton.next_power_of_2(k) // part
    return Plan("block", ctas * part, warps, ctas, machine.sms // ctas) if ctas <= _MAX_CTAS else sweep


def merge_plan(n_splits: int) -> Plan:
    return Plan("merge", triton.next_power_of_2(n_splits), 4)


def distill_plan(tensor: Tensor, k: int) -> Plan:
    """Whole rows of two tensors of k elements a row."""
    return _plan("sweep", _DISTILL, tensor, k)


def chunk_plan(tensor: Tensor, k: int) -> Plan:
    """Chunks of rows of k elements, for the kernels that only map."""
    return _plan("chunk", _CHUNK, tensor, k)


def _plan(form: str, table: dict[int, tuple[int, int, int]], tensor: Tensor, k: int) -> Plan:
    machine = machine_of(tensor)
    if machine == _INTERPRETER:
        return Plan(form, _eighth(k), 4, programs=machine.sms)
    block, warps, per_sm = table[tensor.element_size()]
    block = min(block, max(128, triton.next_power_of_2(k)))
    return Plan(form, block, warps, programs=machine.sms * per_sm)


def start(kernel: Any, plan: Plan, units: int, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Launch for so many units of work, on the device of the first argument and its current stream."""
    device = arguments[0].device
    options = {"BLOCK": plan.block, "num_warps": plan.warps, "num_ctas": plan.ctas, "enable_fp_fusion": False}
    if plan.registers is not None:
        options["maxnreg"] = plan.registers
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        run(kernel, (min(units, plan.programs),), arguments, {**constants, **options})


def run(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The launch itself; ``tests/aot_check.py`` puts a compilation in its place."""
    kernel[grid](*arguments, **options)
