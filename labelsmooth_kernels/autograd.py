"""The two autograd forms of the loss over a backend's row operators.

*One pass* (bf16, fp32 and fp64 with a scalar loss): the forward reads the logits once and writes the gradient of Σ
scale·loss once; the backward multiplies it by the upstream scalar on the device, in place where the graph is not kept,
not at all where that scalar is 1. Two units of traffic (a unit: one read or write of the N×K logits).

*Recompute* (``reduction="none"``, whose upstream is a vector; fp16, where a loss scale must multiply before rounding;
gradients of more than the logits; torch.compile, where no in-place scaling is safe; torch.func and forward mode): the
forward saves four numbers per row, the backward reads the logits again. Three units, nothing of N×K saved but the
logits.

``csrc/direct.cpp`` states both once more, for calls on a CPU with no options but PyTorch's.

Second derivatives, and the tangents of forward mode, differentiate the closed form of the gradient that
``reference.logit_gradient`` states. Under vmap the batch becomes more rows of one call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import reference
from .ops import RowCall
from .spec import LossSpec, Rows
from .torch_state import gradient_is_shared, graph_is_kept, savable, transformed

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ops import Kernels


def row_arguments(rows: Rows, row_scale: Tensor | None) -> RowCall:
    """A call as the operators take it."""
    spec, eps = rows.spec, rows.eps if rows.spec.smooths else 0.0
    number, vector = (0.0, eps) if isinstance(eps, Tensor) else (eps, None)
    return RowCall(
        rows.target, rows.weight, rows.prior, number, vector, row_scale, spec.ignore_index, spec.others,
        spec.smooths and spec.smooth_over == "finite", spec.z_loss, spec.confidence_penalty,
        spec.logit_scale, spec.softcap,
    )  # fmt: skip


CARRIED = frozenset(
    {
        "weight", "ignore_index", "reduction", "label_smoothing", "smoothing", "smooth_over", "class_dim", "z_loss",
        "confidence_penalty", "logit_scale", "softcap", "row_weight", "normalizer", "inplace", "return_stats",
        "backend",
    }
)  # fmt: skip
"""The options that reach a call which is rebuilt from an operator's arguments, by :func:`called_rows` or beside it."""


def called_rows(logits: Tensor, call: RowCall, n_stats: int, **options: Any) -> Rows:
    """The inverse: the rows of an operator's call, with the options of the spec that no operator sees. ``row_scale``
    becomes the row weight."""
    eps = call.eps if call.eps_rows is None else call.eps_rows
    stats: dict[int, bool | str] = {0: False, 1: True, 2: "entropy", 4: "all"}
    spec = LossSpec(
        weight=call.weight, ignore_index=call.ignore_index, label_smoothing=eps,
        smoothing=call.prior if call.prior is not None else "others" if call.others else "uniform",
        smooth_over="finite" if call.finite else "all", z_loss=call.z_loss, confidence_penalty=call.confidence_penalty,
        logit_scale=call.logit_scale, softcap=call.softcap, row_weight=call.row_scale,
        return_stats=stats[n_stats], **options,
    )  # fmt: skip
    return Rows(spec, logits, call.target, call.weight, call.prior, eps, call.row_scale)


def _refuse_overwritten(spec: LossSpec) -> None:
    if spec.inplace:
        raise RuntimeError(
            "create_graph=True and torch.func need the logits, which inplace=True overwrites: use inplace=False"
        )


def row_scale(row_weight: Tensor | None, denominator: Tensor | None) -> Tensor | None:
    """The factor of every row: one element, one per row, or None for 1."""
    if denominator is None:
        return row_weight
    inverse = denominator.reciprocal().reshape(1)
    return inverse if row_weight is None else row_weight * inverse


LOGITS, TARGET = 0, 1
"""Whose gradient :class:`Gradient` is: the positions of the two among the tensors of a row function."""


class OnePass(torch.autograd.Function):
    """(Σ row_weight·loss / denominator, saved, stats, prediction), the gradient made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, kernels: Kernels, denominator: Tensor | None
    ) -> tuple[Tensor, ...]:
        spec, scale = rows.spec, row_scale(rows.row_weight, denominator)
        call = row_arguments(rows, scale)
        if spec.inplace:
            loss, saved, *stats = kernels.forward_(logits, *call, spec.n_stats)
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            loss, saved, *stats, grad = kernels.forward(logits, *call, True, spec.n_stats)
        # All of it where autograd watches versions, checkpointing drops and hooks offload, and freed with the graph.
        ctx.number, eps = (None, rows.eps) if isinstance(rows.eps, Tensor) else (rows.eps, None)
        inputs = (None if spec.inplace else logits, rows.target, rows.weight, rows.prior, eps)
        ctx.save_for_backward(*inputs, saved, scale, grad)
        ctx.spec, ctx.kernels = spec, kernels
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *stats)
        total = loss.sum() if rows.row_weight is None else (loss * rows.row_weight).sum()
        return (total if denominator is None else total / denominator), saved, *stats

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, None, None, None]:
        if upstream is None:
            return None, None, None, None
        *tensors, scale, grad = ctx.saved_tensors
        if torch.is_grad_enabled() or transformed():
            _refuse_overwritten(ctx.spec)
            scaled = (upstream if scale is None else upstream * scale).expand(tensors[-1].shape[1])
            grad = Gradient.apply(*tensors, scaled, ctx.number, ctx.spec, ctx.kernels, LOGITS)  # type: ignore[no-untyped-call]
        elif gradient_is_shared(upstream):
            grad = grad * upstream
        else:
            ctx.kernels.scale_(grad, upstream)
        return grad, None, None, None


def _row_losses(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    eps: Tensor | None,
    number: float,
    spec: LossSpec,
    kernels: Kernels,
) -> tuple[Tensor, ...]:
    rows = Rows(spec, logits, target, weight, prior, number if eps is None else eps, None)
    *results, _ = kernels.forward(logits, *row_arguments(rows, None), False, spec.n_stats)
    return tuple(results)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.number, ctx.spec, ctx.kernels = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


class RowLoss(torch.autograd.Function):
    """(loss, saved, stats, prediction) per row, the gradient made in the backward. ``eps`` is a tensor, or None where
    it is the ``number``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = _row_losses(*inputs)
        _remember(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 8
        spec, tensors, kernels = ctx.spec, ctx.saved_tensors, ctx.kernels
        if torch.is_grad_enabled() or transformed():
            _refuse_overwritten(spec)
            shared = (*tensors, upstream, ctx.number, spec, kernels)
            grads = (Gradient.apply(*shared, of) if ctx.needs_input_grad[of] else None for of in (LOGITS, TARGET))  # type: ignore[no-untyped-call]
            return *grads, *(None,) * 6
        logits, *given, saved = tensors
        target, weight, prior, eps = given
        rows = Rows(spec, logits, target, weight, prior, ctx.number if eps is None else eps, None)
        call = (logits, *row_arguments(rows, upstream.contiguous()), saved)
        target_grad = kernels.target_grad(*call) if ctx.needs_input_grad[TARGET] else None
        if not ctx.needs_input_grad[LOGITS]:
            return None, target_grad, *(None,) * 6
        if not spec.inplace or graph_is_kept():
            return kernels.backward(*call), target_grad, *(None,) * 6
        kernels.backward_(*call)
        torch.autograd.graph.increment_version(logits)
        return logits.detach(), target_grad, *(None,) * 6


class TransformableRowLoss(RowLoss):
    """:class:`RowLoss` with what torch.func and forward mode ask for. Apart from it, because torch.compile refuses to
    see a jvp, and a separate ``setup_context`` makes every call 60 µs slower."""

    forward = staticmethod(_row_losses)  # type: ignore[assignment]  # new style: without the context

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _remember(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:5], output[1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_tangents_of_options(tangents[2:5])
        tensors = ctx.saved_tensors
        ones = torch.ones_like(tensors[-1][0])
        loss_tangent = None
        for of in (LOGITS, TARGET):
            tangent = tangents[of]
            if tangent is None:
                continue
            # Σ dz = 0 leaves the sum over a row to its roundings: nothing in half precision until it is taken.
            wide = (t.to(ones.dtype) if i == of else t for i, t in enumerate(tensors))
            grad = Gradient.apply(*wide, ones, ctx.number, ctx.spec, ctx.kernels, of)  # type: ignore[no-untyped-call]
            along = (grad * tangent.to(ones.dtype)).sum(-1).reshape(ones.shape)
            if not tensors[TARGET].is_floating_point():
                along = torch.where(tensors[TARGET] == ctx.spec.ignore_index, 0.0, along)
            loss_tangent = along if loss_tangent is None else loss_tangent + along
        return loss_tangent, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        if in_dims[2] is not None or in_dims[3] is not None:
            return _one_by_one(TransformableRowLoss, size, in_dims, inputs), (0, 0, 0, 0)
        results = TransformableRowLoss.apply(*_folded(size, in_dims, inputs[:5]), *inputs[5:])  # type: ignore[no-untyped-call]
        loss, saved, stats, prediction = (r.reshape(*r.shape[:-1], size, r.shape[-1] // size) for r in results)
        return (loss, saved, stats, prediction), (0, 1, 1, 0)


class Gradient(torch.autograd.Function):
    """The gradient of Σ upstream·loss in the logits or in class probabilities, by a kernel; its own derivatives are
    those of the closed form in ``reference``. The first five tensors are those of :class:`RowLoss`."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        prior: Tensor | None,
        eps: Tensor | None,
        saved: Tensor,
        upstream: Tensor,
        number: float,
        spec: LossSpec,
        kernels: Kernels,
        of: int,
    ) -> Tensor:
        rows = Rows(spec, logits, target, weight, prior, number if eps is None else eps, None)
        operator = kernels.backward if of == LOGITS else kernels.target_grad
        return operator(logits, *row_arguments(rows, upstream.contiguous()), saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.number, ctx.spec, _, ctx.of = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _closed_form(ctx: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """The same as a function of (upstream, logits) in plain PyTorch, and of probabilities where it depends on them,
        which the gradient in them does not; and where it is evaluated."""
        logits, target, weight, prior, eps, _, upstream = ctx.saved_tensors
        closed = reference.logit_gradient if ctx.of == LOGITS else reference.target_gradient

        def gradient(upstream: Tensor, logits: Tensor, target: Tensor = target) -> Tensor:
            rows = Rows(ctx.spec, logits, target, weight, prior, ctx.number if eps is None else eps, None)
            return closed(rows, upstream)

        varies = ctx.of == LOGITS and target.is_floating_point()
        return gradient, (upstream, logits, target) if varies else (upstream, logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * 11
        gradient, at = Gradient._closed_form(ctx)
        pull = torch.func.vjp(gradient, *at)[1]
        upstream_grad, logits_grad, *target_grad = pull(upstream)
        return (
            logits_grad, target_grad[0] if target_grad else None, None, None, None, None, upstream_grad, *(None,) * 4
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        _refuse_tangents_of_options(tangents[2:5])
        gradient, at = Gradient._closed_form(ctx)
        along = (tangents[6], *tangents[:2])[: len(at)]
        given = tuple(torch.zeros_like(a) if t is None else t for a, t in zip(at, along, strict=True))
        # J·t as the transpose of u -> Jᵀ·u: levels of forward mode do not nest outside torch.func, those of vjp do.
        pull = torch.func.vjp(gradient, *at)[1]
        push = torch.func.vjp(pull, torch.zeros_like(ctx.saved_tensors[ctx.of]))[1]
        (tangent,) = push(given)
        return tangent  # type: ignore[no-any-return]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        size, of = info.batch_size, inputs[-1]
        if in_dims[2] is not None or in_dims[3] is not None:
            (grads,) = _one_by_one(Gradient, size, in_dims, inputs)
            return grads, 0
        grad = Gradient.apply(*_folded(size, in_dims, inputs[:7]), *inputs[7:])  # type: ignore[no-untyped-call]
        batched = inputs[of].dim() + (in_dims[of] is None)
        return (grad.unflatten(0, (size, -1)) if batched > grad.dim() else grad), 0


# ---- a batch of calls (vmap) and tangents


def _refuse_tangents_of_options(tangents: tuple[Tensor | None, ...]) -> None:
    if any(tangent is not None for tangent in tangents):
        raise NotImplementedError(
            "forward-mode derivatives in weight, label_smoothing or smoothing need backend='reference'"
        )


def _folded(size: int, in_dims: tuple[Any, ...], tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """The tensors of one call with ``size`` times the rows: (logits, target, weight, prior, eps[, saved, upstream]),
    those that are not batched repeated, without a copy where the operators take any strides."""

    def batch_first(i: int) -> Tensor | None:
        tensor, dim = tensors[i], in_dims[i]
        if tensor is None:
            return None
        tensor = savable(tensor)
        return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    def classes_last(batched: Tensor) -> Tensor:
        return batched.flatten(0, 1) if batched.dim() > 3 else batched

    logits, target, _, _, eps, *more = [batch_first(i) for i in range(len(tensors))]
    assert logits is not None
    assert target is not None
    logits = classes_last(logits)
    n = logits.shape[:-1].numel() // size
    target = classes_last(target) if target.is_floating_point() else target.reshape(-1).contiguous()
    if eps is not None:
        eps = eps.expand(size, n).reshape(-1).contiguous()  # a view, where each of the batch has one row
    folded = [logits, target, tensors[2], tensors[3], eps]
    for tensor in more:  # saved (4, N), then upstream (N,)
        assert tensor is not None
        folded.append(tensor.movedim(0, -2).flatten(-2).contiguous())
    return folded


def _one_by_one(function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Batched class vectors make no common call: each of the batch on its own, results stacked."""
    results = []
    for i in range(size):
        chosen = (
            value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value
            for value, dim in zip(inputs, in_dims, strict=True)
        )
        result = function.apply(*chosen)
        results.append(result if isinstance(result, tuple) else (result,))
    return tuple(torch.stack(column) for column in zip(*results, strict=True))
