"""The autograd.Functions of the fused linear + loss, on the chunked and the tiled operators.

Second derivatives go through whole logits: the backward is then written once more in differentiable operations, with
the closed form of :class:`labelsmooth_kernels.autograd.Gradient` in the middle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import LOGITS, Gradient, row_arguments, row_scale
from .backends import kernels_of
from .chunked import How, Soft, dense_target
from .ops import NAMESPACE
from .spec import LossSpec, Rows
from .torch_state import gradient_is_shared


class Path(NamedTuple):
    """How a call is computed; see ``chunked.How``."""

    backend: str
    dtype: torch.dtype
    positions: int
    chunk_rows: int
    wide: bool
    skip_ignored: bool
    tiled: bool
    filter_eps: float
    wanted: list[bool]

    def how(self, wanted: list[bool]) -> How:
        return How(*self[:6], wanted)


class _Tensors(NamedTuple):
    """The tensors of a call, in the order in which the Functions take them."""

    hidden: Tensor
    linear_weight: Tensor
    linear_bias: Tensor | None
    target: Tensor
    weight: Tensor | None
    prior: Tensor | None
    eps: Tensor | None
    indices: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.linear_weight, self.linear_bias

    def rows(self, number: float, spec: LossSpec) -> Rows:
        """The call as rows, whose logits stand nowhere."""
        eps = number if self.eps is None else self.eps
        return Rows(spec, self.hidden, self.target, self.weight, self.prior, eps, None)

    def soft(self, teacher_scale: float) -> Soft:
        return Soft(self.indices, self.teacher_weight, self.teacher_bias, teacher_scale)


_N = len(_Tensors._fields)


def _forward(
    tensors: _Tensors, scale: Tensor | None, number: float, teacher_scale: float, spec: LossSpec, path: Path,
    wanted: list[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(loss, saved, stats, prediction, d_hidden, d_weight, d_bias)"""
    ops, call = getattr(torch.ops, NAMESPACE), row_arguments(tensors.rows(number, spec), scale)
    if path.tiled:
        operands = (t if t is None else t.to(path.dtype) for t in tensors.operands)
        return *ops.tiled_forward(*operands, *call, spec.n_stats), *(call.target.new_empty(0) for _ in range(3))
    how = path.how(wanted)
    return ops.chunked_forward(*tensors.operands, *call, *tensors.soft(teacher_scale), *how, spec.n_stats)  # type: ignore[no-any-return]


def _backward(
    tensors: _Tensors, upstream: Tensor, saved: Tensor, number: float, teacher_scale: float, spec: LossSpec, path: Path
) -> list[Tensor | None]:
    """The wanted ones of (d_hidden, d_weight, d_bias) of Σ upstream·loss."""
    ops, call = getattr(torch.ops, NAMESPACE), row_arguments(tensors.rows(number, spec), upstream.contiguous())
    if path.tiled:
        operands = (t if t is None else t.to(path.dtype) for t in tensors.operands)
        grads = ops.tiled_backward(*operands, *call, saved, path.filter_eps, *path.wanted)
        grads = [g if t is None else g.to(t.dtype) for g, t in zip(grads, tensors.operands, strict=True)]
    else:
        how = path.how(path.wanted)
        grads = ops.chunked_backward(*tensors.operands, *call, *tensors.soft(teacher_scale), *how, saved)
    return [grad if want else None for grad, want in zip(grads, path.wanted, strict=True)]


def _differentiable(
    tensors: _Tensors, upstream: Tensor, saved: Tensor, number: float, teacher_scale: float, spec: LossSpec, path: Path
) -> list[Tensor | None]:
    """What ``_backward`` returns, with a graph."""
    hidden, weight, bias = (t if t is None else t.to(path.dtype) for t in tensors.operands)
    assert hidden is not None
    assert weight is not None
    logits, target = F.linear(hidden, weight, bias), tensors.target
    if tensors.indices is not None or tensors.teacher_weight is not None:
        target = dense_target(target, tensors.soft(teacher_scale), path.dtype, len(weight))
    rows = logits if path.positions == 1 else logits.unflatten(1, (-1, path.positions)).transpose(1, 2)
    given = (rows, target, tensors.weight, tensors.prior, tensors.eps, saved, upstream)
    dx = Gradient.apply(*given, number, spec, kernels_of(path.backend), LOGITS)  # type: ignore[no-untyped-call]
    dx = dx if path.positions == 1 else dx.transpose(1, 2).flatten(1)
    grads = (dx @ weight, dx.t() @ hidden, dx.sum(0))
    return [
        grad.to(t.dtype) if t is not None and want else None
        for grad, t, want in zip(grads, tensors.operands, path.wanted, strict=True)
    ]


def row_losses(*inputs: Any) -> tuple[Tensor, ...]:
    """(loss, saved, stats, prediction) per row, without a gradient; the inputs of :class:`LinearRowLoss`."""
    number, teacher_scale, spec, path = inputs[_N:]
    return _forward(_Tensors(*inputs[:_N]), None, number, teacher_scale, spec, path, [False] * 3)[:4]


class LinearRowLoss(torch.autograd.Function):
    """(loss, saved, stats, prediction) per row, the gradients made in the backward. Inputs: the ``_Tensors``, the
    number ε where it is no tensor, the teacher's scale, the spec, the path."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        results = row_losses(*inputs)
        ctx.save_for_backward(*inputs[:_N], results[1])
        ctx.constants = inputs[_N:]
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (_N - 3 + len(ctx.constants))
        if upstream is None:
            return None, None, None, *nothing
        *tensors, saved = ctx.saved_tensors
        run = _differentiable if torch.is_grad_enabled() else _backward
        return *run(_Tensors(*tensors), upstream, saved, *ctx.constants), *nothing


class LinearOnePass(torch.autograd.Function):
    """(Σ row_weight·loss / denominator, saved, stats, prediction), the gradients made in the forward. Inputs: the
    ``_Tensors``, row_weight, denominator, and the constants of :class:`LinearRowLoss`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        tensors, (row_weight, denominator, number, teacher_scale, spec, path) = _Tensors(*inputs[:_N]), inputs[_N:]
        scale = row_scale(row_weight, denominator)
        results = _forward(tensors, scale, number, teacher_scale, spec, path, path.wanted)
        loss, saved, stats, prediction, *grads = results
        ctx.save_for_backward(*tensors, saved, scale, *grads)
        ctx.constants = (number, teacher_scale, spec, path)
        ctx.mark_non_differentiable(saved, stats, prediction)
        ctx.set_materialize_grads(False)
        total = loss.sum() if row_weight is None else (loss * row_weight).sum()
        return (total if denominator is None else total / denominator), saved, stats, prediction

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * (_N - 3 + 2 + len(ctx.constants))
        if upstream is None:
            return None, None, None, *nothing
        *tensors, saved, scale, d_hidden, d_weight, d_bias = ctx.saved_tensors
        path = ctx.constants[-1]
        if torch.is_grad_enabled():
            rows = (upstream if scale is None else upstream * scale).expand(saved.shape[1])
            return *_differentiable(_Tensors(*tensors), rows, saved, *ctx.constants), *nothing
        grads = [g if want else None for g, want in zip((d_hidden, d_weight, d_bias), path.wanted, strict=True)]
        if gradient_is_shared(upstream):
            return *(None if g is None else g * upstream for g in grads), *nothing
        for grad in grads:
            if grad is not None:
                kernels_of(path.backend).scale_(grad.reshape(1, -1) if grad.dim() == 1 else grad, upstream)
        return *grads, *nothing
