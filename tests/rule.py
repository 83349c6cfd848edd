"""The float64 oracle and the tolerance rule: whatever judges numbers judges them here.

*Oracle*: float64 of the same, already rounded, inputs, in a few lines that share nothing with the package: dense q by
its definition, log_softmax, autograd. *Rule*: |ours - oracle| <= max(2·|F.cross_entropy in float32 - oracle|, few ulp),
for every row's loss and every entry of the gradient on its own, and with half the ulps for the sum over a row, so that
an error common to all classes shows although each entry would pass. The ulps are of the numbers that the arithmetic
adds, because p - q may cancel: FEW·2^-23·(p·(1 + |z - zmax| + |logsum|) + q), exp and log turning absolute errors into
relative ones and back. FEW = 4: an exp and a log good to 1 ulp each, the division, the difference and the row factor,
each half an ulp, and a spare one; what went through a sum of K terms may have lost half an ulp for each doubling, as a
pairwise sum does. In float64 the oracle errs as much as we do: twice that. A gradient in half precision adds half an
ulp: it is rounded once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from labelsmooth_kernels import RowStats

HALF = (torch.float16, torch.bfloat16)
FEW = 4.0
F_OPTIONS = {"weight", "ignore_index", "label_smoothing"}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def few_ulps(dtype: torch.dtype, summands: int = 1) -> float:
    """A few ulps of the dtype that a call on ``dtype`` computes in, for the terms of a sum of that length."""
    return (
        (FEW + math.log2(max(summands, 1)) / 2)
        * torch.finfo(acc_dtype(dtype)).eps
        * (2 if dtype == torch.float64 else 1)
    )


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
    if softcap is None:
        return z
    v = z / softcap
    e = torch.exp(torch.where(v < 0, 2 * v, -2 * v))
    far = (1 - e) / (1 + e)  # autograd differentiates torch.tanh as 1 - tanh², of which saturation leaves no digit
    tanh = torch.where(v.abs() < 1, torch.tanh(v), torch.where(v < 0, -far, far))
    return torch.where(z == -torch.inf, z, softcap * tanh)


def cap_slope(x: Tensor, logit_scale: float = 1.0, softcap: float | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    """(cap', its error in ulps) in float64: v is rounded, which costs exp(-2|v|) 2|v| of them."""
    z = x.double() * logit_scale
    v = torch.zeros_like(z) if softcap is None else torch.where(z == -torch.inf, 0.0, z / softcap).abs()
    return 1 / torch.cosh(v).square(), 1 + 2 * v


def dense_q(problem: Problem, z: Tensor, sizes: bool = False) -> Tensor:
    """q (N, K) in float64, each convention by its definition; or the sizes of the terms that add up to it, which cancel
    for ε < 0, and near 1 for "others", where the target has 1 - ε·n/(n-1) and its share of the rest."""
    options, z = problem.options, z.detach().double()
    k = z.shape[1]
    if problem.target.is_floating_point():
        t = problem.target.double()
    else:
        t = F.one_hot(torch.where(problem.keep, problem.target.long(), 0), k).double()
    eps = options.get("label_smoothing", 0.0)
    eps = eps.double().reshape(-1, 1) if isinstance(eps, Tensor) else eps
    kept, eps = 1 - eps, abs(eps) if sizes else eps
    covered = (z > -torch.inf).double() if options.get("smooth_over") == "finite" else torch.ones_like(z)
    count = covered.sum(-1, keepdim=True)
    smoothing = options.get("smoothing", "uniform")
    if isinstance(smoothing, Tensor):
        u = smoothing.double() * covered
        q = kept * t + eps * (u / u.sum(-1, keepdim=True) if options.get("smooth_over") == "finite" else u)
    elif smoothing == "others":  # what is taken from a class goes to the other covered ones in equal parts
        others = (count - 1).clamp_min(1)
        moved = (
            (kept - eps / others).abs() * t + eps * covered / others
            if sizes
            else kept * t + eps * (covered - t) / others
        )
        q = torch.where(count > 1, moved, t)
    else:
        q = kept * t + eps * covered / count
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


def _log_p(z: Tensor) -> Tensor:
    """log_softmax(z) by torch.sum: the sums inside torch.log_softmax lose up to 1e-13 of a float64 gradient."""
    shifted = z - z.detach().amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def _log_loss(z: Tensor, q: Tensor) -> Tensor:
    return -torch.where(q == 0, 0.0, q * _log_p(z)).sum(-1)


def _entropy(z: Tensor) -> Tensor:
    log_p = _log_p(z)
    return -(log_p.exp() * torch.where(z == -torch.inf, 0.0, log_p)).sum(-1)


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
        loss = F.cross_entropy(z, q, reduction="none") if by_torch else _log_loss(z, q)
        loss = loss + options.get("z_loss", 0.0) * torch.logsumexp(z, -1).square()
        if beta := options.get("confidence_penalty", 0.0):
            loss = loss - beta * _entropy(z)
    loss = torch.where(keep, loss, 0.0)
    (grad,) = torch.autograd.grad(loss, x, torch.where(keep, factors, 0.0).to(dtype))
    return z.detach().double(), loss.detach().double(), torch.where(keep[:, None], grad, 0.0).double()


def expect(problem: Problem, factors: Tensor) -> Expected:
    """What Σ factor·loss and its gradient must be, and how far off they may be."""
    acc, options = acc_dtype(problem.logits.dtype), problem.options
    z, loss, grad = _evaluate(problem, factors, torch.float64, by_torch=False)
    _, torch_loss, torch_grad = _evaluate(problem, factors, acc, by_torch=True)
    q = dense_q(problem, z, sizes=True)
    zmax = z.amax(-1, keepdim=True)
    down = torch.where(z == -torch.inf, 0.0, (z - zmax).abs())
    logsum = torch.logsumexp(z - zmax, -1, keepdim=True).abs()
    p, mass, zeta = torch.softmax(z, -1), q.abs().sum(-1, keepdim=True), options.get("z_loss", 0.0)
    lse = (zmax + logsum).abs()
    if options.keys() & {"logit_scale", "softcap"}:  # z itself carries a rounding error of its own size
        down = down + torch.where(z == -torch.inf, 0.0, z.abs()) + zmax.abs()
    few, of_sum = few_ulps(acc), few_ulps(acc, z.shape[1])
    loss_ulps = of_sum * (mass * (1 + logsum) + (q.abs() * down).sum(-1, keepdim=True) + 2 * zeta * lse.square())[:, 0]
    beta = abs(options.get("confidence_penalty", 0.0))
    entropy = (p * (1 + down) * (1 + down + logsum)).sum(-1, keepdim=True)  # the sizes of its terms, with p's errors
    loss_ulps = loss_ulps + of_sum * beta * entropy[:, 0]
    mass = mass + beta * (entropy + down + logsum)
    cap, cap_ulps = cap_slope(torch.where(problem.keep[:, None], problem.logits.detach(), 0.0), **options)
    steepest = abs(options.get("logit_scale", 1.0)) * factors.abs()[:, None]
    slope = cap * cap_ulps * steepest
    grad_ulps = slope * (of_sum * (mass + 2 * zeta * lse) * p * (1 + down + logsum) + few * q.abs())
    tiny = 2 * torch.finfo(acc).smallest_normal  # below about that exp may be 0, and cap' four times that
    grad_ulps = grad_ulps + 4 * tiny * (1 + steepest * (mass + 2 * zeta * lse))
    return Expected(z, loss, grad, torch_loss, torch_grad, loss_ulps.nan_to_num(0, 0), grad_ulps.nan_to_num(0, 0))


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of ``dtype`` at ``value``."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp_min(info.smallest_normal).nan_to_num(1.0))
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def off_by(got: Tensor, want: Tensor) -> Tensor:
    """|got - want|; what is not finite there excuses nothing."""
    return (got - want).abs().nan_to_num(0, 0)


def assert_close(what: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Every value within what is allowed for it; NaN and infinities in the same places."""
    got, want = got.double(), want.double()
    special = ~want.isfinite() | ~got.isfinite()
    same = (got == want) | (got.isnan() & want.isnan())
    error = torch.where(special, torch.where(same, 0.0, torch.inf), (got - want).abs())
    excess = (error - allowed.nan_to_num(0, 0)).flatten()
    if excess.numel() and excess.max() > 0:
        i = int(excess.argmax())
        values = [t.expand(error.shape).flatten()[i].item() for t in (got, want, error, allowed)]
        raise AssertionError("{}, entry {}: got {}, oracle {}, off by {:.3g}, allowed {:.3g}".format(what, i, *values))


def judge_loss(want: Expected, loss: Tensor, factors: Tensor | None = None, denominator: float = 1.0) -> None:
    """Judge the losses of the rows, or, with factors, their weighted sum."""
    allowed = torch.maximum(2 * off_by(want.torch_loss, want.loss), want.loss_ulps)
    oracle = want.loss
    if factors is not None:
        oracle = (oracle * factors).sum() / denominator
        allowed = ((allowed + few_ulps(loss.dtype) * want.loss.abs()) * factors.abs()).sum() / abs(denominator)
    assert_close("loss", loss, oracle, allowed)


def judge_grad(problem: Problem, want: Expected, grad: Tensor, roundings: int = 1, truncated: bool = False) -> None:
    """Judge the gradient: the target's entry, the floor of the other classes, whole rows. A second rounding (an
    upstream other than 1 multiplies a finished half-precision gradient) costs at most one more ulp. ``truncated``:
    Triton's interpreter converts to bfloat16 by cutting bits off, a whole ulp where hardware rounds to half of one."""
    dtype = problem.logits.dtype
    assert grad.dtype == dtype, grad.dtype
    half_ulps = (2 * roundings - 1) * (2 if truncated else 1)
    rounding = half_ulps / 2 * ulp(want.grad, dtype) if dtype in HALF else torch.zeros_like(want.grad)
    oracle = torch.where(want.grad.to(dtype).isinf(), want.grad.to(dtype).double(), want.grad)
    torch_error = off_by(want.torch_grad, want.grad)
    allowed = torch.maximum(2 * torch_error, want.grad_ulps) + rounding
    at_target = torch.zeros_like(allowed, dtype=torch.bool)
    if not problem.target.is_floating_point():
        inside = torch.where(problem.keep, problem.target.long(), 0)[:, None]
        at_target.scatter_(1, inside, True)
        assert_close("gradient at the target", *(t.gather(1, inside) for t in (grad, oracle, allowed)))
    floor, oracle_floor = (torch.where(at_target, 0.0, t.double()) for t in (grad, oracle))
    assert_close("gradient off the target", floor, oracle_floor, allowed)
    whole = torch.maximum(2 * torch_error.sum(-1), want.grad_ulps.sum(-1) / 2) + rounding.sum(-1)
    finite = oracle.isfinite().all(-1)
    error = torch.where(finite[:, None], (grad.double() - oracle).abs(), 0.0).sum(-1)
    assert_close("gradient of a whole row, Σ|error|", error, torch.zeros_like(error), whole)


def judge_stats(problem: Problem, stats: RowStats) -> None:
    """nll, lse, confidence, prediction, and where given entropy, variance and collision; ignored rows have nll 0
    and else count like others."""
    transforms = {name: problem.options[name] for name in ("logit_scale", "softcap") if name in problem.options}
    unsmoothed = problem._replace(options=transforms | {"ignore_index": problem.options.get("ignore_index", -100)})
    want = expect(unsmoothed, torch.ones(len(problem.target), dtype=torch.float64, device=problem.target.device))
    judge_loss(want, stats.nll)
    acc = stats.lse.dtype
    z, z_torch = (transformed(problem.logits.to(dtype), **transforms) for dtype in (torch.float64, acc))
    zmax, lse = z.amax(-1), torch.logsumexp(z, -1)
    logsum = (lse - zmax).abs()
    ulps = few_ulps(acc, z.shape[1]) * (1 + logsum + (zmax.abs() if transforms else 0))
    error = off_by(torch.logsumexp(z_torch, -1), lse)
    lse = torch.where(zmax == torch.inf, torch.nan, lse)  # zmax + logsum is inf - inf there, and the whole row NaN
    assert_close("lse", stats.lse, lse, torch.maximum(2 * error, ulps + few_ulps(acc) * zmax.abs()))
    confidence = torch.where(lse.isfinite(), stats.confidence, torch.nan)  # of a row without a finite lse there is none
    top, top_torch = torch.softmax(z, -1).amax(-1), torch.softmax(z_torch, -1).amax(-1)
    assert_close("confidence", confidence, top, torch.maximum(2 * off_by(top_torch, top), ulps))
    if stats.entropy is not None:
        entropy, entropy_torch = ((-F.softmax(v, -1) * _log_p(v)).nansum(-1) for v in (z, z_torch))
        down = torch.where(z == -torch.inf, 0.0, (z - zmax[:, None]).abs() + (z.abs() if transforms else 0))
        slack = (torch.softmax(z, -1) * (1 + down) * (1 + down + logsum[:, None])).sum(-1)
        entropy = torch.where(lse.isfinite(), entropy, torch.nan)
        ulps = few_ulps(acc, z.shape[1]) * (slack + (zmax.abs() if transforms else 0))
        assert_close("entropy", stats.entropy, entropy, torch.maximum(2 * off_by(entropy_torch, entropy), ulps))
    if stats.variance is not None:
        p, off = torch.softmax(z, -1), torch.where(z == -torch.inf, 0.0, z - zmax[:, None])
        error = few_ulps(acc, z.shape[1]) * (1 + off.abs() + logsum[:, None] + (z.abs() if transforms else 0))
        mean = (p * off).sum(-1, keepdim=True)
        variance = torch.where(lse.isfinite(), (p * (off - mean).square()).sum(-1), torch.nan)
        # E z² - (E z)² about the maximum; z itself errs where it was transformed
        slack = (p * off.abs() * (off.abs() + 2 * (transforms != {})) * error.nan_to_num(0, 0)).sum(-1)
        tiny = 2 * torch.finfo(acc).smallest_normal * (1 + off.square()).sum(-1)  # below about that exp may be 0
        assert_close("variance", stats.variance, variance, 3 * slack + tiny)
        assert stats.collision is not None
        collision = torch.where(lse.isfinite(), p.square().sum(-1), torch.nan)
        assert_close("collision", stats.collision, collision, 2 * (p.square() * error.nan_to_num(0, 0)).sum(-1))
    assert stats.prediction.dtype == torch.int64
    for got, row in zip(stats.prediction.tolist(), z.cpu().numpy(), strict=True):
        if not np.isnan(row).any():
            assert got == row.argmax() or (transforms and np.isclose(row[got], row.max(), rtol=1e-6)), (
                got,
                row.argmax(),
            )
