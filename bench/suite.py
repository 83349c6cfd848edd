"""The providers that are compared and the table that shows them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

from .harness import EPS, Case, Inputs, Loss, Provider, Row, Step, loss_step

OURS, OURS_INPLACE, OURS_CUDA = "lsk", "lsk in place", "lsk, CUDA C++"
EAGER, COMPILED, LIGER = "F.cross_entropy", "torch.compile", "Liger"
FRESH_COPY, COPY = "allocate and copy", "copy into existing memory"


def _eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, label_smoothing=EPS)


KERNELS = {"cpu": "cpu", "cuda": "triton"}  # named, since a fall to the reference must not be timed under our name


def _ours(backend: str, inplace: bool) -> Loss:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        result = lsk.cross_entropy(logits, target, label_smoothing=EPS, inplace=inplace, backend=backend)
        assert isinstance(result, Tensor)
        return result

    return loss


def _compiled() -> Loss:
    torch.compiler.reset()  # a function compiled for one case would be generalised to dynamic shapes in the next
    compiled: Loss = torch.compile(_eager, dynamic=False, fullgraph=True)
    return compiled


def _liger() -> Loss | None:
    try:
        module: Any = importlib.import_module("liger_kernel.transformers.functional")
    except ImportError:
        return None
    return lambda logits, target: module.liger_cross_entropy(logits, target, label_smoothing=EPS)


def _copy_fresh(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    source = inputs.original
    return torch.empty_like(source).copy_(source), None


def copy_existing() -> Step:
    memory: list[Tensor] = []

    def step(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        if not memory:
            memory.append(torch.empty_like(inputs.original))
        return memory[0].copy_(inputs.original), None

    return step


def providers(case: Case, *, fresh_copy: bool, liger: bool = False, compiled: bool = True) -> list[Provider]:
    def losing(name: str, loss: Loss, **traits: bool) -> Provider:
        return Provider(name, loss_step(loss, case.backward), **traits)

    backend = KERNELS[case.device]
    result = [losing(OURS, _ours(backend, inplace=False), exact=True)]
    if case.backward:
        result.append(losing(OURS_INPLACE, _ours(backend, inplace=True), exact=True, overwrites=True))
    if case.device == "cuda" and backends.BACKENDS["cuda"].unavailable() is None:
        result.append(losing(OURS_CUDA, _ours("cuda", inplace=False), exact=True))
    result.append(losing(EAGER, _eager))
    if compiled:
        result.append(losing(COMPILED, _compiled()))
    if liger and case.device == "cuda" and (loss := _liger()) is not None:
        result.append(losing(LIGER, loss, overwrites=True))
    if fresh_copy:
        result.append(Provider(FRESH_COPY, _copy_fresh, is_copy=True))
    result.append(Provider(COPY, copy_existing(), is_copy=True))
    return result


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(case: Case, rows: list[Row], ours_name: str = OURS) -> str:
    """The table of one case; a refused provider keeps its row, without times."""
    lines = [
        f"**{case.name}** (logits: {case.unit_bytes / 1e6:.4g} MB; floor: {case.units} × that)",
        "",
        "| | ms | p20 to p80 | host ms | GB/s | % of copy | × ours | MB beyond inputs | error: loss / target / rest |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    ours = next((row.ms for row in rows if row.provider == ours_name), None)
    for row in rows:
        errors = row.errors
        shown = "" if errors is None else f"{errors.loss:.0e}"
        if errors is not None and case.backward:
            shown += f" / {errors.target:.0e} / {errors.rest:.0e}"
        cells = [row.provider, _number(row.ms, ".4g"), f"{_number(row.p20, '.4g')} to {_number(row.p80, '.4g')}"]
        cells += [_number(row.host_ms, ".4g"), _number(row.gb_per_s, ".4g"), _number(row.percent_of_copy, ".0f")]
        cells.append(_number(row.ms / ours if row.ms and ours else None, ".2f"))
        cells += [_number(None if row.extra_bytes is None else row.extra_bytes / 1e6, ".4g"), shown]
        if row.refused is not None:
            cells = [row.provider, "—", f"refused: {row.refused}", "", "", "", "", "", shown]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
