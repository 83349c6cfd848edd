"""The two autograd forms of the loss over a backend's row operators.

*One pass* (bf16, fp32 and fp64 with a scalar loss): the forward reads the logits once and writes the gradient of Σ
scale·loss once; the backward multiplies it by the upstream scalar on the device, in place where the graph is not kept,
not at all where that scalar is 1. Two units of traffic (a unit: one read or write of the N×K logits).

*Recompute* (``reduction="none"``, whose upstream is a vector; fp16, where a loss scale must multiply before rounding;
under torch.compile, where no in-place scaling is safe): the forward saves two numbers per row, the backward reads the
logits again. Three units, nothing of N×K saved but the logits.

Under ``create_graph=True`` both differentiate the reference instead, so the graph is never silently dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .spec import Rows

if TYPE_CHECKING:
    from .ops import Kernels
    from .spec import LossSpec


def row_arguments(rows: Rows) -> tuple[Tensor, float, Tensor | None]:
    """(target, eps, eps_rows) as the operators take them: ε of the uniform form, a float or a tensor."""
    if not rows.spec.smooths:
        return rows.target, 0.0, None
    eps = reference.uniform_epsilon(rows.eps, rows.logits.shape[-1], rows.spec.smoothing)
    return (rows.target, 0.0, eps) if isinstance(eps, Tensor) else (rows.target, float(eps), None)


def _refuse_overwritten(spec: LossSpec) -> None:
    if spec.inplace:
        raise RuntimeError("create_graph=True needs the logits, which inplace=True overwrites: use inplace=False")


def _save(ctx: Any, rows: Rows, logits: Tensor | None, *saved: Tensor) -> None:
    """Keep a call for the backward. Tensors that the caller holds too go where autograd watches their versions, and are
    freed with the graph."""
    ctx.spec, ctx.eps = rows.spec, rows.eps
    if isinstance(rows.eps, Tensor):
        ctx.eps = None
        saved += (rows.eps,)
    ctx.save_for_backward(logits, rows.target, *saved)


def _saved(ctx: Any) -> tuple[Rows, tuple[Tensor, ...]]:
    """The rows (without row weights, which both forms apply outside) and the other tensors of :func:`_save`."""
    logits, target, *saved = ctx.saved_tensors
    eps = saved.pop() if ctx.eps is None else ctx.eps
    return Rows(ctx.spec, logits, target, eps, None), tuple(saved)


def _differentiable_gradient(rows: Rows, upstream: Tensor) -> Tensor:
    """The gradient of Σ upstream·loss with a graph of its own, through the reference."""
    with torch.enable_grad():
        loss = reference.row_losses(rows)
        (grad,) = torch.autograd.grad(loss, rows.logits, upstream.expand_as(loss), create_graph=True)
    return grad


def _graph_is_kept() -> bool:
    """Whether the backward in progress may run again (retain_graph): then what it needs must stay as it is. A compiled
    backward cannot know, so it takes itself for kept."""
    return torch.compiler.is_compiling() or bool(torch._C._autograd._get_current_graph_task_keep_graph())


def _scale(row_weight: Tensor | None, denominator: Tensor | None) -> Tensor | None:
    """The factor of every row: one element, one per row, or None for 1."""
    if denominator is None:
        return row_weight
    inverse = denominator.reciprocal().reshape(1)
    return inverse if row_weight is None else row_weight * inverse


class OnePass(torch.autograd.Function):
    """(Σ row_weight·loss / denominator, zmax, logsum, nll, prediction), the gradient made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, kernels: Kernels, denominator: Tensor | None
    ) -> tuple[Tensor, ...]:
        spec, scale = rows.spec, _scale(rows.row_weight, denominator)
        row = (*row_arguments(rows), scale, spec.ignore_index)
        if spec.inplace:
            loss, *stats = kernels.forward_(logits, *row, spec.return_stats)
            torch.autograd.graph.increment_version(logits)
            ctx.grad = logits.detach()
        else:
            loss, *stats, ctx.grad = kernels.forward(logits, *row, True, spec.return_stats)
        _save(ctx, rows, None if spec.inplace else logits)
        ctx.version, ctx.scale, ctx.kernels = ctx.grad._version, scale, kernels
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats)
        total = loss.sum() if rows.row_weight is None else (loss * rows.row_weight).sum()
        return (total if denominator is None else total / denominator), *stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        if upstream is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            _refuse_overwritten(ctx.spec)
            scaled = upstream if ctx.scale is None else upstream * ctx.scale
            return _differentiable_gradient(_saved(ctx)[0], scaled), None, None, None
        if ctx.grad is None:
            raise RuntimeError("backward through this loss a second time: pass retain_graph=True to the first backward")
        if ctx.grad._version != ctx.version:
            raise RuntimeError("the logits hold the gradient (inplace=True) and were modified by an inplace operation")
        if _graph_is_kept():
            return ctx.grad * upstream, None, None, None
        grad, ctx.grad = ctx.grad, None
        ctx.kernels.scale_(grad, upstream)
        return grad, None, None, None


class Recompute(torch.autograd.Function):
    """(loss, zmax, logsum, nll, prediction) per row, the gradient made in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, rows: Rows, kernels: Kernels) -> tuple[Tensor, ...]:
        row = (*row_arguments(rows), None, rows.spec.ignore_index)
        loss, zmax, logsum, *stats, _ = kernels.forward(logits, *row, False, rows.spec.return_stats)
        _save(ctx, rows, logits, zmax, logsum)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(zmax, logsum, *stats)
        return loss, zmax, logsum, *stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, None, None]:
        if upstream is None:
            return None, None, None
        rows, (zmax, logsum) = _saved(ctx)
        logits, spec = rows.logits, rows.spec
        if torch.is_grad_enabled():
            _refuse_overwritten(spec)
            return _differentiable_gradient(rows, upstream), None, None
        row = (*row_arguments(rows), upstream.contiguous(), spec.ignore_index)
        if not spec.inplace or _graph_is_kept():
            return ctx.kernels.backward(logits, *row, zmax, logsum), None, None
        ctx.kernels.backward_(logits, *row, zmax, logsum)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), None, None
