"""The row operators of ``labelsmooth_kernels.ops`` on Triton kernels, for float16, bfloat16 and float32 logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .kernels import grad_kernel, merge_kernel, row_kernel, scale_kernel, split_kernel
from .rows import Rows, aligned_alike, rows_of

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class _Weights(NamedTuple):
    """The arguments that every operator has besides the logits."""

    target: Tensor
    eps: float
    eps_rows: Tensor | None
    row_scale: Tensor | None
    ignore_index: int

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, of eps_rows and row_scale: 0 for one value for all rows."""
        eps, scale = (0 if v is None or v.numel() == 1 else v.stride(0) for v in (self.eps_rows, self.row_scale))
        return eps, scale


def _check(logits: Tensor, row: _Weights) -> None:
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"logits: {logits.dtype} is not served by the Triton kernels: float16, bfloat16, float32 are")
    if row.target.device.type != "cpu":
        return  # the row becomes NaN instead: looking would stall the device
    k = logits.shape[1]
    outside = ((row.target < 0) | (row.target >= k)) & (row.target != row.ignore_index)
    if outside.any():
        i = int(outside.nonzero()[0])
        allowed = f"0 to {k - 1}, or ignore_index {row.ignore_index}"
        raise IndexError(f"target: {int(row.target[i])} at position {i} is out of range, allowed is {allowed}")


def _run_forward(logits: Tensor, grad: Tensor | None, row: _Weights, with_stats: bool) -> Results:
    _check(logits, row)
    n, k = logits.shape
    n_stats = n if with_stats else 0
    loss, zmax, logsum = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    nll = torch.empty(n_stats, dtype=torch.float32, device=logits.device)
    prediction = torch.empty(n_stats, dtype=torch.int64, device=logits.device)
    results = (loss, zmax, logsum, nll, prediction)
    if n == 0:
        return results
    outputs = results if with_stats else (loss, zmax, logsum, None, None)
    x, g = rows_of(logits), rows_of(logits if grad is None else grad)
    alike = aligned_alike(x, g)
    plan = launch.row_plan(logits, with_grad=grad is not None, alike=alike)
    if plan.form == "split":
        _run_split(plan, x, row, outputs)
        if grad is not None:
            _run_backward(logits, grad, row, zmax, logsum)
        return results
    launch.start(
        row_kernel,
        plan,
        n,
        (
            *(x.base, None if grad is None else g.base, row.target, row.eps, row.eps_rows, row.row_scale, *outputs),
            *(n, k, x.lead, x.stride, g.lead, g.stride, *row.strides, row.ignore_index),
        ),
        VEC=x.vec,
        EDGES=x.edges,
        G_ALIGNED=alike,
        ONE_BLOCK=plan.form == "block",
    )
    return results


def _run_split(plan: launch.Plan, x: Rows, row: _Weights, outputs: tuple[Tensor | None, ...]) -> None:
    n, k = x.base.shape
    blocks_per_split = -(-k // (plan.block * plan.splits))
    n_splits = -(-k // (plan.block * blocks_per_split))
    part = torch.empty((4, n, n_splits), dtype=torch.float32, device=x.base.device)
    k_part = None if outputs[-1] is None else torch.empty((n, n_splits), dtype=torch.int32, device=x.base.device)
    sizes = (n * n_splits, n_splits, blocks_per_split, k, x.lead, x.stride, row.ignore_index)
    launch.start(split_kernel, plan, n * n_splits, (x.base, row.target, part, k_part, *sizes), VEC=x.vec, EDGES=x.edges)
    pointers = (x.base, row.target, row.eps, row.eps_rows, part, k_part, *outputs)
    sizes = (n * n_splits, n_splits, k, x.lead, x.stride, row.strides[0], row.ignore_index)
    launch.start(merge_kernel, launch.merge_plan(n_splits), n, (*pointers, *sizes))


def _run_backward(logits: Tensor, grad: Tensor, row: _Weights, zmax: Tensor, logsum: Tensor) -> None:
    _check(logits, row)
    if logits.numel() == 0:
        return
    n, k = logits.shape
    x, g = rows_of(logits), rows_of(grad)
    plan = launch.chunk_plan(logits, k)
    n_chunks = -(-k // plan.block)
    launch.start(
        grad_kernel,
        plan,
        n * n_chunks,
        (
            *(x.base, g.base, row.target, row.eps, row.eps_rows, row.row_scale, zmax, logsum, n * n_chunks, n_chunks),
            *(k, x.lead, x.stride, g.lead, g.stride, *row.strides, row.ignore_index),
        ),
        VEC=x.vec,
        EDGES=x.edges,
        G_ALIGNED=aligned_alike(x, g),
    )


def forward(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, zmax, logsum, nll, prediction, grad); what was not asked for has no elements."""
    row = _Weights(target, eps, eps_rows, row_scale, ignore_index)
    grad = torch.empty(logits.shape if with_grad else (0,), dtype=logits.dtype, device=logits.device)
    return *_run_forward(logits, grad if with_grad else None, row, with_stats), grad


def forward_(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    with_stats: bool,
) -> Results:
    """:func:`forward` with the gradient written over the logits."""
    return _run_forward(logits, logits, _Weights(target, eps, eps_rows, row_scale, ignore_index), with_stats)


def backward(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    zmax: Tensor,
    logsum: Tensor,
) -> Tensor:
    """The gradient that :func:`forward` makes, from its saved (zmax, logsum)."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _run_backward(logits, grad, _Weights(target, eps, eps_rows, row_scale, ignore_index), zmax, logsum)
    return grad


def backward_(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    zmax: Tensor,
    logsum: Tensor,
) -> None:
    """:func:`backward` with the gradient written over the logits."""
    _run_backward(logits, logits, _Weights(target, eps, eps_rows, row_scale, ignore_index), zmax, logsum)


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, a one-element tensor, on the device; nothing is moved where it is 1."""
    if grad.numel() == 0:
        return
    g = rows_of(grad.detach().view(1, -1) if grad.is_contiguous() else grad)
    n, k = g.base.shape
    plan = launch.chunk_plan(grad, k)
    n_chunks = -(-k // plan.block)
    sizes = (n * n_chunks, n_chunks, k, g.lead, g.stride)
    launch.start(scale_kernel, plan, n * n_chunks, (g.base, scale, *sizes), VEC=g.vec, EDGES=g.edges)
