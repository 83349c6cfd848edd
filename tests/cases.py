"""The table of cases, the float64 oracle and the tolerance rule: whatever judges numbers judges them here.

*Oracle*: float64 of the same, already rounded, inputs, in a few lines that share nothing with the package: dense q by its
definition, ``log_softmax``, autograd. *Rule*: |ours - oracle| <= max(2·|F.cross_entropy in float32 - oracle|, a few ulp), for
every row's loss and every entry of the gradient on its own, and with half the ulps for the sum over a row, so that an error
common to all classes shows although each entry would pass. The ulps are of the numbers that the arithmetic adds, because
p - q may cancel: FEW·2⁻²³·(p·(1 + |z - zmax| + |logsum|) + q), exp and log turning an absolute error into a relative one.
FEW = 4: an exp and a log good to 1 ulp each, the division, the difference and the row factor, each half an ulp, and a spare
one. A gradient in half precision adds half an ulp of itself: it is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk

HALF = (torch.float16, torch.bfloat16)
SINGLE = (torch.float32,)
ALL = (*HALF, torch.float32, torch.float64)
FEW = 4.0
F_OPTIONS = {"weight", "ignore_index", "label_smoothing"}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Problem(NamedTuple):
    """One call on rows: logits (N, K) in the dtype under test, targets (N,) or (N, K), the options of the loss."""

    logits: Tensor
    target: Tensor
    options: dict[str, Any]

    @property
    def keep(self) -> Tensor:
        if self.target.is_floating_point():
            return torch.ones(len(self.target), dtype=torch.bool, device=self.target.device)
        return self.target != self.options.get("ignore_index", -100)


def transformed(x: Tensor, logit_scale: float = 1.0, softcap: float | None = None, **_: Any) -> Tensor:
    z = x * logit_scale
    return z if softcap is None else torch.where(z == -torch.inf, z, softcap * torch.tanh(z / softcap))


def dense_q(problem: Problem, z: Tensor) -> Tensor:
    """q (N, K) in float64, each convention by its definition."""
    options, z = problem.options, z.detach().double()
    n, k = z.shape
    if problem.target.is_floating_point():
        t = problem.target.double()
    else:
        t = F.one_hot(torch.where(problem.keep, problem.target.long(), 0), k).double()
    eps = options.get("label_smoothing", 0.0)
    eps = eps.double().reshape(-1, 1) if isinstance(eps, Tensor) else eps
    covered = z > -torch.inf if options.get("smooth_over") == "finite" else torch.ones_like(z, dtype=torch.bool)
    count = covered.sum(-1, keepdim=True)
    smoothing = options.get("smoothing", "uniform")
    if isinstance(smoothing, Tensor):
        u = smoothing.double() * covered
        q = (1 - eps) * t + eps * (u / u.sum(-1, keepdim=True) if options.get("smooth_over") == "finite" else u)
    elif smoothing == "others":  # what is taken from a class goes to the other covered ones in equal parts
        q = torch.where(count > 1, (1 - eps) * t + eps * (covered * 1.0 - t) / (count - 1).clamp_min(1), t)
    else:
        q = (1 - eps) * t + eps * covered / count
    weight = options.get("weight")
    return q if weight is None else q * weight.double()


class Expected(NamedTuple):
    """Oracle, PyTorch's float32 and the few ulps of every row's loss and of every entry of Σ factor·loss's gradient."""

    z: Tensor
    loss: Tensor
    grad: Tensor
    torch_loss: Tensor
    torch_grad: Tensor
    loss_ulps: Tensor
    grad_ulps: Tensor


def _evaluate(problem: Problem, factors: Tensor, dtype: torch.dtype, by_torch: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(z, loss, gradient of Σ factor·loss) in ``dtype``: by the oracle, or by F.cross_entropy."""
    options, keep = problem.options, problem.keep
    x = torch.where(keep[:, None], problem.logits.detach().to(dtype), 0.0).requires_grad_()
    z = transformed(x, **options)
    if by_torch and options.keys() <= F_OPTIONS and not isinstance(options.get("label_smoothing"), Tensor):
        weight = options.get("weight")
        target = problem.target if problem.target.is_floating_point() else problem.target.long()
        known = options | {"weight": None if weight is None else weight.to(dtype)}
        loss = F.cross_entropy(z, target.to(dtype) if target.is_floating_point() else target, reduction="none", **known)
    else:
        q = dense_q(problem, z).to(dtype)
        log_p = torch.log_softmax(z, -1)
        loss = F.cross_entropy(z, q, reduction="none") if by_torch else -torch.where(q == 0, 0.0, q * log_p).sum(-1)
        loss = loss + options.get("z_loss", 0.0) * torch.logsumexp(z, -1).square()
    loss = torch.where(keep, loss, 0.0)
    (grad,) = torch.autograd.grad(loss, x, torch.where(keep, factors, 0.0).to(dtype))
    return z.detach().double(), loss.detach().double(), torch.where(keep[:, None], grad, 0.0).double()


def expect(problem: Problem, factors: Tensor) -> Expected:
    """What Σ factor·loss and its gradient must be, and how far off they may be."""
    acc, options = acc_dtype(problem.logits.dtype), problem.options
    z, loss, grad = _evaluate(problem, factors, torch.float64, by_torch=False)
    _, torch_loss, torch_grad = _evaluate(problem, factors, acc, by_torch=True)
    q = dense_q(problem, z)
    zmax = z.amax(-1, keepdim=True)
    down = torch.where(z == -torch.inf, 0.0, (z - zmax).abs())
    logsum = torch.logsumexp(z - zmax, -1, keepdim=True).abs()
    p, mass, zeta = torch.softmax(z, -1), q.abs().sum(-1, keepdim=True), options.get("z_loss", 0.0)
    lse = (zmax + logsum).abs()
    if options.keys() & {"logit_scale", "softcap"}:  # z itself carries a rounding error of its own size
        down = down + torch.where(z == -torch.inf, 0.0, z.abs()) + zmax.abs()
    few = FEW * torch.finfo(acc).eps
    loss_ulps = few * (mass * logsum + (q.abs() * down).sum(-1, keepdim=True) + 2 * zeta * lse.square())[:, 0]
    slope = options.get("logit_scale", 1.0) * factors.abs()[:, None]
    grad_ulps = few * slope * ((mass + 2 * zeta * lse) * p * (1 + down + logsum) + q.abs())
    return Expected(z, loss, grad, torch_loss, torch_grad, loss_ulps.nan_to_num(0), grad_ulps.nan_to_num(0))


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp_min(info.smallest_normal).nan_to_num(1.0))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def assert_close(what: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Every value within what is allowed for it; NaN and infinities in the same places."""
    got, want = got.double(), want.double()
    special = ~want.isfinite() | ~got.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(special, torch.where(same, 0.0, torch.inf), (got - want).abs())
    excess = (error - allowed.nan_to_num(0)).flatten()
    if excess.numel() and excess.max() > 0:
        i = int(excess.argmax())
        values = [t.expand(error.shape).flatten()[i].item() for t in (got, want, error, allowed)]
        raise AssertionError("{}, entry {}: got {!r}, oracle {!r}, off by {:.3g}, allowed {:.3g}".format(what, i, *values))


def judge_loss(want: Expected, loss: Tensor, factors: Tensor | None = None, denominator: float = 1.0) -> None:
    """Judge the losses of the rows, or, with factors, their weighted sum."""
    allowed = torch.maximum(2 * (want.torch_loss - want.loss).abs().nan_to_num(0), want.loss_ulps)
    if factors is None:
        return assert_close("loss", loss, want.loss, allowed)
    terms = want.loss * factors
    few = FEW * torch.finfo(acc_dtype(loss.dtype)).eps
    assert_close("loss", loss, terms.sum() / denominator, ((allowed + few * want.loss.abs()) * factors.abs()).sum() / abs(denominator))


def judge_grad(problem: Problem, want: Expected, grad: Tensor, roundings: int = 1) -> None:
    """Judge the gradient: the target's entry, the floor of the other classes, whole rows. A second rounding (an upstream
    other than 1 multiplies a finished half-precision gradient) costs at most one more ulp."""
    dtype = problem.logits.dtype
    assert grad.dtype == dtype, grad.dtype
    rounding = (roundings - 0.5) * ulp(want.grad, dtype) if dtype in HALF else torch.zeros_like(want.grad)
    oracle = torch.where(want.grad.to(dtype).isinf(), want.grad.to(dtype).double(), want.grad)
    torch_error = (want.torch_grad - want.grad).abs().nan_to_num(0)
    allowed = torch.maximum(2 * torch_error, want.grad_ulps) + rounding
    at_target = torch.zeros_like(allowed, dtype=torch.bool)
    if not problem.target.is_floating_point():
        inside = torch.where(problem.keep, problem.target.long(), 0)[:, None]
        at_target.scatter_(1, inside, True)
        assert_close("gradient at the target", grad.gather(1, inside), oracle.gather(1, inside), allowed.gather(1, inside))
    off = ~at_target
    assert_close("gradient off the target", grad * off if grad.isfinite().all() else grad, oracle * off if oracle.isfinite().all() else oracle, allowed)
    whole = torch.maximum(2 * torch_error.sum(-1), want.grad_ulps.sum(-1) / 2) + rounding.sum(-1)
    finite = oracle.isfinite().all(-1)
    error = torch.where(finite[:, None], (grad.double() - oracle).abs(), 0.0).sum(-1)
    assert_close("gradient of a whole row, Σ|error|", error, torch.zeros_like(error), whole)


def judge_stats(problem: Problem, stats: lsk.RowStats) -> None:
    """nll, lse, confidence and prediction; an ignored row has nll 0 and otherwise counts like any other."""
    plain = {name: problem.options[name] for name in ("logit_scale", "softcap", "ignore_index") if name in problem.options}
    unsmoothed = problem._replace(options=plain)
    want = expect(unsmoothed, torch.ones(len(problem.target), dtype=torch.float64, device=problem.target.device))
    judge_loss(want, stats.nll)
    z = transformed(problem.logits.double(), **plain)
    zmax = z.amax(-1)
    logsum = torch.logsumexp(z - zmax[:, None], -1)
    few = FEW * torch.finfo(stats.lse.dtype).eps
    own = 1.0 if plain.keys() <= {"ignore_index"} else 2.0  # a transformed logit brings its own rounding
    assert_close("lse", stats.lse, torch.logsumexp(z, -1), own * few * (zmax.abs() + logsum))
    assert_close("confidence", stats.confidence, torch.softmax(z, -1).amax(-1), own * few * (1 + logsum + (own - 1) * zmax.abs()))
    assert stats.prediction.dtype == torch.int64
    for got, row in zip(stats.prediction.tolist(), z.cpu().numpy(), strict=True):
        if not np.isnan(row).any():
            assert got == row.argmax() or (own > 1 and np.isclose(row[got], row.max(), rtol=1e-6)), (got, row.argmax())


# How a case is run


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy of ``tensor`` (N, K) inside a larger buffer of NaN, its rows apart and misaligned, and a check that every other bit of
    the buffer is what it was. NaN: a read outside shows in the result, a write outside in the check."""
    n, k = tensor.shape
    buffer = torch.full((n + 2, k + 7), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:-1, 3 : 3 + k]
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 3 : 3 + k] = False
    view.copy_(tensor)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    before = buffer.view(bits)[outside].clone()

    def check() -> None:
        assert torch.equal(buffer.view(bits)[outside], before), "memory outside the tensor was written"

    return view, check


def upstream_for(n: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random, non-uniform upstream of both signs, the same for every backend."""
    rng = torch.Generator().manual_seed(n)
    sign = torch.randint(0, 2, (n,), generator=rng) * 2 - 1
    return ((torch.rand(n, generator=rng) + 0.25) * sign).to(device, dtype)


def denominator_of(problem: Problem, row_weight: Tensor) -> float:
    """The mean's denominator by its definition: Σ over valid rows of row weight × class weight of the target."""
    total, weight = 0.0, problem.options.get("weight")
    for row, y in enumerate(problem.target if problem.target.is_floating_point() else problem.target.tolist()):
        if problem.keep[row]:
            class_weight = 1.0 if weight is None or isinstance(y, Tensor) else float(weight[y])
            total += float(row_weight[row]) * class_weight
    return total


DIRECTIONS = ("forward", "rows", "mean", "inplace", "inplace rows")


def run_forward(problem: Problem, backend: str) -> None:
    """No gradient: losses and statistics; and the loss alone, which must be the same numbers."""
    call = {"reduction": "none", "backend": backend, **problem.options}
    loss, stats = lsk.cross_entropy(problem.logits, problem.target, return_stats=True, **call)
    assert loss.dtype == acc_dtype(problem.logits.dtype)
    want = expect(problem, torch.ones(len(loss), dtype=torch.float64, device=loss.device))
    judge_loss(want, loss)
    judge_stats(problem, stats)
    assert_close("loss without statistics", lsk.cross_entropy(problem.logits, problem.target, **call), loss, torch.zeros_like(loss))


def run_backward(problem: Problem, backend: str, direction: str) -> None:
    """Loss and gradient, judged; nothing of the caller's is written, except with ``inplace`` the logits, and nothing around them."""
    inplace = direction.startswith("inplace")
    source = problem.logits.clone()
    logits, check_guard = guarded(source)
    given = [v for v in (problem.target, *problem.options.values()) if isinstance(v, Tensor)]
    copies = [v.clone() for v in given]
    x = logits.detach().requires_grad_()
    upstream = upstream_for(len(x), x.device, acc_dtype(x.dtype))
    call = {"backend": backend, "inplace": inplace, **problem.options}
    if direction.endswith("rows"):
        loss = lsk.cross_entropy(x, problem.target, reduction="none", **call)
        (grad,) = torch.autograd.grad(loss, x, upstream)
        want = expect(problem, upstream.double())
        judge_loss(want, loss.detach())
        roundings = 1
    else:
        row_weight, scalar = upstream.abs() + 0.5, 1.0 if inplace else 0.37
        denominator = denominator_of(problem, row_weight)
        loss = lsk.cross_entropy(x, problem.target, row_weight=row_weight, **call)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, scalar))
        want = expect(problem, row_weight.double() * (scalar / denominator if denominator else 0.0))
        if denominator:
            judge_loss(want, loss.detach(), row_weight.double(), denominator)
        else:
            assert loss.isnan(), "a mean over nothing is NaN"
        roundings = 1 if scalar == 1 or x.dtype == torch.float16 else 2  # fp16 recomputes: its upstream multiplies before rounding
    judge_grad(problem, want, grad, roundings)
    check_guard()
    assert inplace or torch.equal(logits.nan_to_num(7), source.nan_to_num(7)), "the logits were written"
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True)), "an argument was written"


def run_case(problem: Problem, backend: str, direction: str) -> None:
    if direction == "forward":
        run_forward(problem, backend)
    else:
        run_backward(problem, backend, direction)
