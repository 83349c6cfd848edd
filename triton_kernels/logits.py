"""The row operators of ``labelsmooth_kernels.ops`` on Triton kernels, for float16, bfloat16 and float32 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .kernels import grad_kernel, merge_kernel, row_kernel, scale_kernel, split_kernel
from .rows import Rows, aligned_alike, rows_of


def _row_values(values: Tensor | None) -> tuple[Tensor | None, int]:
    """(values, stride) of one value or one value per row."""
    return values, 0 if values is None or values.numel() == 1 else values.stride(0)


def _check(logits: Tensor, target: Tensor, ignore_index: int) -> None:
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"logits: {logits.dtype} is not served by the Triton kernels: float16, bfloat16, float32 are")
    if target.device.type != "cpu":
        return  # the row becomes NaN instead: looking would stall the device
    classes = logits.shape[1]
    outside = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if outside.any():
        i = int(outside.nonzero()[0])
        allowed = f"0 to {classes - 1}, or ignore_index {ignore_index}"
        raise IndexError(f"target: {int(target[i])} at position {i} is out of range, allowed is {allowed}")


def _empty_rows(logits: Tensor, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    loss, zmax, logsum = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(3))
    n_stats = n if with_stats else 0
    nll = torch.empty(n_stats, dtype=torch.float32, device=logits.device)
    return loss, zmax, logsum, nll, torch.empty(n_stats, dtype=torch.int64, device=logits.device)


def _run_forward(
    logits: Tensor,
    grad: Tensor | None,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(logits, target, ignore_index)
    n, k = logits.shape
    results = _empty_rows(logits, with_stats)
    if n == 0:
        return results
    loss, zmax, logsum, nll, prediction = results
    outputs = (loss, zmax, logsum, nll if with_stats else None, prediction if with_stats else None)
    x, g = rows_of(logits), rows_of(logits if grad is None else grad)
    alike = aligned_alike(x, g)
    plan = launch.row_plan(logits, with_grad=grad is not None, alike=alike)
    if plan.form == "split":
        _run_split(plan, x, target, eps, eps_rows, ignore_index, outputs)
        if grad is not None:
            _run_backward(logits, grad, target, eps, eps_rows, row_scale, ignore_index, zmax, logsum)
        return results
    eps_values, eps_stride = _row_values(eps_rows)
    scales, scale_stride = _row_values(row_scale)
    launch.start(
        row_kernel,
        plan,
        n,
        (
            *(x.base, None if grad is None else g.base, target, eps, eps_values, scales, *outputs, n, k),
            *(x.lead, x.stride, g.lead, g.stride, eps_stride, scale_stride, ignore_index),
        ),
        VEC=x.vec,
        EDGES=x.edges,
        G_ALIGNED=alike,
        ONE_BLOCK=plan.form == "block",
    )
    return results


def _run_split(
    plan: launch.Plan,
    x: Rows,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    ignore_index: int,
    outputs: tuple[Tensor | None, ...],
) -> None:
    n, k = x.base.shape
    blocks_per_split = -(-k // (plan.block * plan.splits))
    n_splits = -(-k // (plan.block * blocks_per_split))
    part = torch.empty((4, n, n_splits), dtype=torch.float32, device=target.device)
    with_stats = outputs[-1] is not None
    k_part = torch.empty((n, n_splits), dtype=torch.int32, device=target.device) if with_stats else None
    launch.start(
        split_kernel,
        plan,
        n * n_splits,
        (x.base, target, part, k_part, n * n_splits, n_splits, blocks_per_split, k, x.lead, x.stride, ignore_index),
        VEC=x.vec,
        EDGES=x.edges,
    )
    eps_values, eps_stride = _row_values(eps_rows)
    launch.start(
        merge_kernel,
        launch.merge_plan(n_splits),
        n,
        (
            *(x.base, target, eps, eps_values, part, k_part, *outputs),
            *(n * n_splits, n_splits, k, x.lead, x.stride, eps_stride, ignore_index),
        ),
    )


def _run_backward(
    logits: Tensor,
    grad: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    zmax: Tensor,
    logsum: Tensor,
) -> None:
    if logits.numel() == 0:
        return
    n, k = logits.shape
    x, g = rows_of(logits), rows_of(grad)
    eps_values, eps_stride = _row_values(eps_rows)
    scales, scale_stride = _row_values(row_scale)
    plan = launch.chunk_plan(logits, k)
    n_chunks = -(-k // plan.block)
    launch.start(
        grad_kernel,
        plan,
        n * n_chunks,
        (
            *(x.base, g.base, target, eps, eps_values, scales, zmax, logsum, n * n_chunks, n_chunks, k),
            *(x.lead, x.stride, g.lead, g.stride, eps_stride, scale_stride, ignore_index),
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
    grad = torch.empty(logits.shape if with_grad else (0,), dtype=logits.dtype, device=logits.device)
    destination = grad if with_grad else None
    return *_run_forward(logits, destination, target, eps, eps_rows, row_scale, ignore_index, with_stats), grad


def forward_(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward` with the gradient written over the logits."""
    return _run_forward(logits, logits, target, eps, eps_rows, row_scale, ignore_index, with_stats)


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
    _check(logits, target, ignore_index)
    _run_backward(logits, grad, target, eps, eps_rows, row_scale, ignore_index, zmax, logsum)
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
    _check(logits, target, ignore_index)
    _run_backward(logits, logits, target, eps, eps_rows, row_scale, ignore_index, zmax, logsum)


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, a one-element tensor, on the device; nothing is moved where it is 1."""
    if grad.numel() == 0:
        return
    g = rows_of(grad.detach().view(1, -1) if grad.is_contiguous() else grad)
    n, k = g.base.shape
    plan = launch.chunk_plan(grad, k)
    n_chunks = -(-k // plan.block)
    launch.start(
        scale_kernel,
        plan,
        n * n_chunks,
        (g.base, scale, n * n_chunks, n_chunks, k, g.lead, g.stride),
        VEC=g.vec,
        EDGES=g.edges,
    )
