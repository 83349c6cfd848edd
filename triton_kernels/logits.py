"""The row operators of ``labelsmooth_kernels.ops`` on Triton kernels, for float16, bfloat16 and float32 logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, operands
from .kernels import Results, grad_kernel, merge_kernel, row_kernel, scale_kernel, split_kernel
from .row_math import Structure
from .rows import Numbers, Targets, aligned_alike, collapsed, rows_of


class _Call(NamedTuple):
    """The arguments that every operator has besides the logits, in the order of the schema."""

    target: Tensor
    weight: Tensor | None
    prior: Tensor | None
    eps: float
    eps_rows: Tensor | None
    row_scale: Tensor | None
    ignore_index: int
    others: bool
    finite: bool
    z_loss: float
    confidence_penalty: float
    logit_scale: float
    softcap: float | None

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, of eps_rows and row_scale: 0 for one value for all rows."""
        eps, scale = (0 if v is None or v.numel() == 1 else 1 for v in (self.eps_rows, self.row_scale))
        return eps, scale


class _Problem:
    """What the launches of one call share: where its tensors lie, and the arguments made of them."""

    def __init__(self, logits: Tensor, call: _Call, n_stats: int = 0, grad: Tensor | None = None) -> None:
        self.call, self.n_stats = call, n_stats
        self.n, self.k = logits.shape[:-1].numel(), logits.shape[-1]
        x, g, t = collapsed(logits, logits if grad is None else grad, call.target if call.soft else logits)
        self.x, self.g, soft = rows_of(x), rows_of(g), rows_of(t)
        self.grad = None if grad is None else self.g.base
        self.alike, self.t_alike = aligned_alike(self.x, self.g), call.soft and aligned_alike(self.x, soft)
        target = soft.base if call.soft else call.target
        self.targets = Targets(target, call.weight, call.prior, call.eps_rows, call.row_scale)
        logit_scale = None if call.logit_scale == 1.0 else call.logit_scale
        self.numbers = Numbers(call.eps, call.z_loss, call.confidence_penalty or None, logit_scale, call.softcap)
        n_inner = None if x.dim() == 2 else x.shape[1]
        self.layout = (n_inner, self.k, *self.x.layout, *(soft.layout if call.soft else (0, 0, 0, None)))

    @property
    def options(self) -> int:
        """How much a kernel holds of a class beside its logit: see ``launch.row_plan``."""
        call = self.call
        more = sum(value is not None for value in (call.weight, call.prior, *self.numbers[2:]))
        more += call.soft + (self.n_stats > 1) + 3 * (self.x.step is not None)
        return 3 if more > 2 else 2 if more else int(call.finite or self.n_stats > 0)

    def structure(self, **more: bool) -> Structure:
        x, call = self.x, self.call
        given = (call.weight is not None, call.prior is not None, call.soft, call.finite)
        spread = self.n_stats > 1 or self.numbers.penalty is not None
        return Structure(x.vec, x.edges, self.alike, self.t_alike, *given, self.n_stats, spread, **more)


def _check_operands(logits: Tensor, call: _Call, written: bool) -> None:
    """All that a kernel relies on but ``saved``."""
    operands.check_rows("logits", logits, written)
    operands.check_call(call, logits.shape[:-1].numel(), logits.shape[-1], logits)
    _check_classes(logits.shape[-1], call)


def _check_classes(k: int, call: _Call) -> None:
    if call.soft or call.target.device.type != "cpu":
        return  # the row becomes NaN instead: looking would stall the device
    outside = ((call.target < 0) | (call.target >= k)) & (call.target != call.ignore_index)
    if outside.any():
        i = int(outside.nonzero()[0])
        allowed = f"0 to {k - 1}, or ignore_index {call.ignore_index}"
        raise IndexError(f"target: {int(call.target[i])} at position {i} is out of range, allowed is {allowed}")


def _run_forward(logits: Tensor, grad: Tensor | None, call: _Call, n_stats: int) -> tuple[Tensor, ...]:
    _check_operands(logits, call, written=grad is logits)
    operands.check_n_stats(n_stats)
    n = logits.shape[:-1].numel()
    loss, saved, stats = (
        torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((n,), (4, n), (n_stats, n))
    )
    results = Results(loss, saved, stats, torch.empty(n if n_stats else 0, dtype=torch.int64, device=logits.device))
    if n == 0:
        return results
    problem = _Problem(logits, call, n_stats, grad)
    plan = launch.row_plan(logits, with_grad=grad is not None, options=problem.options)
    if plan.form == "split":
        _run_split(plan, problem, results)
        if grad is not None:
            _launch_backward(logits, grad, call, saved)
        return results
    sizes = (n, *problem.layout, *problem.g.layout, *call.strides, call.ignore_index, int(call.others))
    pointers = (problem.x.base, problem.grad, problem.targets, results, problem.numbers)
    S = problem.structure()
    constants: dict[str, Any] = {"ONE_BLOCK": plan.form == "block", "LANES": plan.lanes(S.VEC), "S": S}
    launch.start(row_kernel, plan, n, (*pointers, *sizes), **constants)
    return results


def _run_split(plan: launch.Plan, problem: _Problem, results: Results) -> None:
    n, k, call, S = problem.n, problem.k, problem.call, problem.structure()
    blocks_per_split = -(-k // (plan.block * plan.splits))
    n_splits = -(-k // (plan.block * blocks_per_split))
    n_units = n * n_splits
    part = torch.empty((13, n, n_splits), dtype=torch.float32, device=problem.x.base.device)
    pointers: tuple[Any, ...] = (problem.x.base, part, problem.targets, problem.numbers)
    sizes = (n_units, n_splits, blocks_per_split, *problem.layout, call.strides[0], call.ignore_index)
    launch.start(split_kernel, plan, n_units, (*pointers, *sizes), LANES=plan.lanes(S.VEC), S=S)
    pointers = (problem.x.base, part, problem.targets, results, problem.numbers)
    sizes = (n_units, n_splits, n, *problem.layout, *call.strides, call.ignore_index, int(call.others))
    launch.start(merge_kernel, launch.merge_plan(n_splits), n, (*pointers, *sizes), S=S)


def _run_backward(logits: Tensor, grad: Tensor, call: _Call, saved: Tensor, of_target: bool = False) -> None:
    _check_operands(logits, call, written=grad is logits)
    operands.check_saved(saved, logits.shape[:-1].numel(), logits.device)
    if logits.numel() > 0:
        _launch_backward(logits, grad, call, saved, of_target)


def _launch_backward(logits: Tensor, grad: Tensor, call: _Call, saved: Tensor, of_target: bool = False) -> None:
    problem = _Problem(logits, call, grad=grad)
    plan = launch.chunk_plan(logits, problem.k, problem.options)
    n_chunks = -(-problem.k // plan.block)
    n_units = problem.n * n_chunks
    pointers = (problem.x.base, problem.grad, problem.targets, saved, problem.numbers)
    sizes = (n_units, n_chunks, problem.n, *problem.layout, *problem.g.layout, *call.strides)
    arguments = (*pointers, *sizes, call.ignore_index, int(call.others))
    S = problem.structure(OF_TARGET=of_target)
    launch.start(grad_kernel, plan, n_units, arguments, S=S)


def forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """(loss, saved, stats, prediction, grad); what was not asked for has no elements."""
    *call, with_grad, n_stats = arguments
    grad = torch.empty_like(logits) if with_grad else None
    results = _run_forward(logits, grad, _Call(*call), n_stats)
    return *results, logits.new_empty(0) if grad is None else grad


def forward_(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """:func:`forward` with the gradient written over the logits."""
    *call, n_stats = arguments
    return tuple(_run_forward(logits, logits, _Call(*call), n_stats))


def backward(logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient that :func:`forward` makes, from what it saved."""
    *call, saved = arguments
    grad = torch.empty_like(logits)
    _run_backward(logits, grad, _Call(*call), saved)
    return grad


def backward_(logits: Tensor, *arguments: Any) -> None:
    """:func:`backward` with the gradient written over the logits."""
    *call, saved = arguments
    _run_backward(logits, logits, _Call(*call), saved)


def target_grad(logits: Tensor, *arguments: Any) -> Tensor:
    """The gradient in a target of probabilities."""
    *given, saved = arguments
    call = _Call(*given)
    rule = "be floating-point to have a gradient"
    operands.require(call.soft, "target", rule, call.target.dtype)
    grad = torch.empty_like(call.target)
    _run_backward(logits, grad, call, saved, of_target=True)
    return grad


def scale_(grad: Tensor, scale: Tensor) -> None:
    """grad *= scale, a one-element tensor, on the device; nothing is moved where it is 1."""
    operands.check_served("grad", grad)
    operands.check_writable("grad", grad)
    operands.check_vector("scale", scale, (1,), grad.device)
    if grad.numel() == 0:
        return
    packed = grad.detach().permute(sorted(range(grad.dim()), key=grad.stride, reverse=True))
    (rows,) = collapsed(packed.view(1, -1) if packed.is_contiguous() else packed)
    g, k = rows_of(rows), rows.shape[-1]
    plan = launch.chunk_plan(grad, k)
    n_chunks = -(-k // plan.block)
    n_units = rows.shape[:-1].numel() * n_chunks
    sizes = (n_units, n_chunks, None if rows.dim() == 2 else rows.shape[1], k, *g.layout)
    launch.start(scale_kernel, plan, n_units, (g.base, scale, *sizes), VEC=g.vec, EDGES=g.edges)
