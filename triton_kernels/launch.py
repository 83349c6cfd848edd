"""Which form and size of a kernel runs: the only tuning table of this package, and the only place that launches.

The numbers come from ahead-of-time compilation (``tests/aot_check.py``: registers, no spills, 128-bit accesses) and
from this reasoning: a row is read once where a thread block holds it, and an SM should hold two programs where it can,
so that one loads while the other reduces. The sweeps are as long and as many as those of a prototype were that ran at
75 to 96 % of a copy on an H100 (docs/gpu.md); these kernels themselves have not run on a GPU yet.
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


_ANY = 2**31 - 1


@dataclass(frozen=True)
class Plan:
    """One launch; ``form`` is "block" (read once), "sweep" (twice if a gradient is made), "split", "merge", "chunk"."""

    form: str
    block: int
    warps: int
    programs: int = _ANY  # the grid has at most so many, each takes several units of work
    splits: int = 1
    registers: int | None = None  # at most so many per thread

    def lanes(self, vec: int) -> int:
        """How many threads have sums of their own, each of groups of ``vec``."""
        return min(32 * self.warps, self.block // vec)


# Rows of one block, read once, by the largest number of classes; programs are those of one SM, here and below.
_BLOCK = (
    (1024, Plan("block", 1024, 4, 8)),  # two 128-bit loads per thread in float32, one in half precision
    (4096, Plan("block", 4096, 8, 4)),
    (8192, Plan("block", 8192, 8, 2)),
    (16384, Plan("block", 16384, 16, 1)),  # 32 values per thread, as before
)
_WITH_OPTIONS = 2  # so many of them serve options: the others spill
# Left to itself, the assembler saves registers and spills a word or two with one Triton or the other: hence the limits.
# Read twice, by the bytes of a class and the largest row in bytes. What the programs of all SMs read is to stay in L2
# until then; few programs need many threads each.
_SWEEP = {
    2: (
        (2**16, Plan("sweep", 8192, 8, 3, registers=80)),
        (2**17, Plan("sweep", 8192, 8, 2, registers=128)),
        (_ANY, Plan("sweep", 16384, 16, 1, registers=128)),
    ),
    4: ((_ANY, Plan("sweep", 16384, 16, 1, registers=128)),),
}
_SWEEP_WITH_OPTIONS = {  # by how many there are: see row_plan
    1: {2: Plan("sweep", 8192, 16, 1, registers=128), 4: Plan("sweep", 8192, 16, 1, registers=128)},
    2: {2: Plan("sweep", 8192, 16, 1, registers=128), 4: Plan("sweep", 8192, 16, 1, registers=128)},
    3: {2: Plan("sweep", 2048, 8, 1, registers=168), 4: Plan("sweep", 2048, 16, 1, registers=128)},
}
_LOSS = Plan("sweep", 4096, 8, 3, registers=80)  # read once in any case: small blocks overlap better
# bytes: block, warps, programs per SM
_CHUNK = {2: (8192, 8, 4), 4: (8192, 8, 4)}  # gradient and scale: no reduction; longer ones share what a row takes
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


def row_plan(logits: Tensor, *, with_grad: bool, options: int) -> Plan:
    """The form for logits (..., K); ``options``: 0 if a row is its logits and two numbers, 1 with a mask of classes or
    a prediction, 2 where a thing or two are read or summed of each class beside that; 3 with more than two, or where
    classes are no neighbours."""
    machine = machine_of(logits)
    n, k, itemsize = logits.shape[:-1].numel(), logits.shape[-1], logits.element_size()
    if machine == _INTERPRETER:  # about eight blocks per row at any K, so that small cases take every path
        block = _eighth(k)
        form = "block" if k <= block else "split" if n == 1 else "sweep"
        return _settled(Plan(form, block, 4, programs=machine.sms, splits=4), k)
    once = _LOSS if options < 2 else _SWEEP_WITH_OPTIONS[options][itemsize]
    if 2 * n <= machine.sms and k > once.block:  # rows alone would leave more than half of the SMs idle
        return _settled(replace(once, form="split", splits=-(-2 * machine.sms // n)), k)
    if with_grad or k <= once.block:
        for largest, plan in _BLOCK[:_WITH_OPTIONS] if options else _BLOCK:
            if k <= largest:
                return _settled(_on_all(machine, replace(plan, block=max(128, triton.next_power_of_2(k)))), k)
        if options:
            once = _SWEEP_WITH_OPTIONS[options][itemsize]
        else:
            once = next(plan for largest, plan in _SWEEP[itemsize] if k * itemsize <= largest)
    return _settled(_on_all(machine, once), k)


def _on_all(machine: Machine, plan: Plan) -> Plan:
    """A plan whose programs are those of one multiprocessor, for all of them."""
    return replace(plan, programs=plan.programs * machine.sms)


def _eighth(k: int) -> int:
    return max(16, int(triton.next_power_of_2(k)) // 8)


def merge_plan(n_splits: int) -> Plan:
    return Plan("merge", triton.next_power_of_2(n_splits), 4)


def distill_plan(tensor: Tensor, k: int) -> Plan:
    """Whole rows of two tensors of k elements a row."""
    return _plan("sweep", _DISTILL, tensor, k)


def chunk_plan(tensor: Tensor, k: int, options: int = 0) -> Plan:
    """Chunks of rows of k elements, for the kernels that only map; ``options`` as in :func:`row_plan`."""
    plan = _plan("chunk", _CHUNK, tensor, k)
    return replace(plan, block=min(plan.block, 4096), registers=128) if options == 3 else plan  # else they spill


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
    options = {"BLOCK": plan.block, "num_warps": plan.warps, "enable_fp_fusion": False}
    if plan.registers is not None:
        options["maxnreg"] = plan.registers
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        run(kernel, (min(units, plan.programs),), arguments, {**constants, **options})


def run(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """The launch itself; ``tests/aot_check.py`` puts a compilation in its place."""
    kernel[grid](*arguments, **options)
