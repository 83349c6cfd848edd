"""One row over several ranks: what a rank finds in its columns, and what the columns of all ranks make of it.

Rank r holds the classes [v_r, v_{r+1}) and runs the same kernels over them as a single device does over a row, with
ε = 1 and no target, which finds, of its classes alone,

    zmax_r, logsum_r                        lse_r = zmax_r + logsum_r
    U_r = -Σ w·u·c·log p_r                  log p_r = z - lse_r
    m_r = Σ w·u·c        n_r = Σ u·c

with w, u and c of :mod:`labelsmooth_kernels.ops`. The owner of the target adds z_y and w_y. Once a rank has
all ranks' numbers it has the row, with lse = log Σ exp lse_r and Δ_r = lse - lse_r >= 0:

    loss = (1-e)·w_y·(lse - z_y) + (e/n)·Σ (U_r + m_r·Δ_r) + ζ·lse² - β·H       n = Σ n_r, or K
    H    = Σ P_r·(H_r + Δ_r)                                                    P_r = exp(-Δ_r)

Sums of terms of one sign (where 0 <= e <= 1): nothing cancels, and all ranks add them in the same order, in float64, so
that they find the same bits. The gradient of a rank's columns needs of the row (zmax, logsum, M + β·H, n), what
``backward`` takes as ``saved``; and q, which without the target's class is w·u·c·e/n: e = 1 over n/e classes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import row_arguments
from .reference import RowStats
from .spec import LossSpec, Rows, accumulate_dtype

if TYPE_CHECKING:
    from .ops import Kernels, RowCall

IGNORED = -100
"""The ignored target of a rank's own call: no class of its columns, whatever the caller's is."""


class Shard(NamedTuple):
    """Where a rank's columns lie among all."""

    rank: int
    starts: tuple[int, ...]
    """of every rank, and the number of classes"""

    @property
    def num_classes(self) -> int:
        return self.starts[-1]

    def owner(self, target: Tensor) -> Tensor:
        """The rank that holds a class; of what is no class, one of them."""
        ends = torch.tensor(self.starts[1:], device=target.device)
        return torch.bucketize(target, ends, right=True).clamp_max(len(ends) - 1)

    def own(self, target: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """(the target as a class of this rank, 0 where it is elsewhere and ``IGNORED`` where not live; whether here)"""
        here = live & (target >= self.starts[self.rank]) & (target < self.starts[self.rank + 1])
        return torch.where(live, torch.where(here, target - self.starts[self.rank], 0), IGNORED), here


class Found(NamedTuple):
    """What a rank sends of every row, each (N,); None is not sent."""

    zmax: Tensor
    logsum: Tensor
    z_y: Tensor | None
    w_y: Tensor | None
    """of the target's class, 0 where that is elsewhere; what class weights there are"""
    rest: Tensor | None
    """U_r"""
    rest_mass: Tensor | None
    """m_r"""
    covered: Tensor | None
    """n_r"""
    prediction: Tensor | None
    entropy: Tensor | None
    variance: Tensor | None
    collision: Tensor | None

    def with_target(self, rows: Rows, shard: Shard) -> Found:
        z_y, (target, here) = torch.zeros_like(self.zmax), shard.own(rows.target, rows.valid)
        if rows.logits.shape[-1]:
            x = rows.logits.gather(-1, target.clamp_min(0).reshape(*rows.logits.shape[:-1], 1)).flatten()
            z_y = torch.where(here, reference.transform(x, rows.spec), z_y)
        return self._replace(z_y=z_y, w_y=target_weight(rows, shard))


def target_weight(rows: Rows, shard: Shard) -> Tensor | None:
    """w_y (N,), 0 where the target is elsewhere; None without class weights."""
    if rows.weight is None or not len(rows.weight):
        return None if rows.weight is None else rows.weight.new_zeros(len(rows.target))
    target, here = shard.own(rows.target, rows.valid)
    return torch.where(here, rows.weight[target.clamp_min(0)], 0.0)


class Whole(NamedTuple):
    """A row of all ranks, each (N,) float64."""

    loss: Tensor
    saved: Tensor
    """(4, N): zmax, logsum, M + β·H, n"""
    e: Tensor
    """of the uniform form"""
    w_y: Tensor | None
    stats: RowStats | None

    def packed(self) -> Tensor:
        """(numbers, N) float64"""
        more = [] if self.w_y is None else [self.w_y]
        known = [] if self.stats is None else [value.double() for value in self.stats if value is not None]
        return torch.stack([self.loss, *self.saved, self.e, *more, *known])

    def unpacked(self, numbers: Tensor) -> Whole:
        """The same of other rows."""
        loss, *rest = numbers
        saved, (e, *more) = torch.stack(rest[:4]), rest[4:]
        w_y = None if self.w_y is None else more.pop(0)
        stats = None
        if self.stats is not None:
            known = [None if value is None else more.pop(0).to(value.dtype) for value in self.stats]
            stats = RowStats(*known)  # type: ignore[arg-type]  # the first four are there
        return Whole(loss, saved, e, w_y, stats)


def _alone(rows: Rows, target: Tensor) -> Rows:
    """The call of a rank's columns as if there were no others, nothing but what is smoothed over."""
    smoothing = rows.spec.smoothing if isinstance(rows.spec.smoothing, Tensor) else "uniform"
    stats = rows.spec.return_stats
    if rows.spec.confidence_penalty and rows.spec.n_stats < 2:
        stats = "entropy"
    spec = dataclasses.replace(
        rows.spec, label_smoothing=1.0, smoothing=smoothing, z_loss=0.0, confidence_penalty=0.0, ignore_index=IGNORED,
        row_weight=None, normalizer=None, inplace=False, return_stats=stats,
        smooth_over=rows.spec.smooth_over if rows.spec.smooths else "all",
    )  # fmt: skip
    return rows._replace(spec=spec, target=target, eps=1.0, row_weight=None)


def find(rows: Rows, kernels: Kernels | None) -> Found:
    """What this rank's columns say of every row, but for its target."""
    spec, n = rows.spec, len(rows.target)
    alone = _alone(rows, torch.where(rows.valid, 0, IGNORED))
    n_stats = alone.spec.n_stats
    stats: tuple[Tensor, ...]
    if rows.logits.shape[-1] == 0:
        zeros = torch.zeros(n, dtype=accumulate_dtype(rows.logits.dtype), device=rows.logits.device)
        zmax = logsum = zeros - math.inf
        rest = rest_mass = count = prediction = zeros
        stats = (zeros,) * n_stats
    elif kernels is None:
        zmax, logsum, rest, rest_mass, count = _plain_sums(alone)
        known = reference.row_stats(alone)
        prediction, stats = known.prediction, (known.nll, *(s for s in known[4:] if s is not None))
    else:
        loss, saved, given, prediction, _ = kernels.forward(rows.logits, *row_arguments(alone, None), False, n_stats)
        zmax, logsum, mass, count = saved
        rest, rest_mass, stats = loss * count, mass * count, tuple(given)
    uneven = spec.smooths and (rows.weight is not None or rows.prior is not None or spec.smooth_over == "finite")
    return Found(
        zmax, logsum, None, None, rest if spec.smooths else None, rest_mass if uneven else None,
        count if uneven else None, prediction.to(zmax.dtype) if spec.return_stats else None,
        *(stats[i] if i < n_stats else None for i in (1, 2, 3)),
    )  # fmt: skip


def _spread(rows: Rows, z: Tensor) -> Tensor:
    """u·c (N, K)"""
    prior = torch.ones_like(z) if rows.prior is None else rows.prior.expand_as(z)
    return torch.where(z > -math.inf, prior, 0.0) if rows.spec.smooth_over == "finite" else prior


def _plain_sums(alone: Rows) -> tuple[Tensor, ...]:
    rows = alone.flat()
    z = reference.transform(rows.logits, rows.spec)
    spread = _spread(rows, z)
    q = spread if rows.weight is None else spread * rows.weight
    rest, zmax, logsum = reference.row_loss(z, q)
    return zmax, logsum, rest, q.sum(-1), spread.sum(-1)


def merge(found: Found, rows: Rows, shard: Shard) -> Whole:
    """All ranks' numbers, each (ranks, N), as rows; ``rows`` is any rank's call."""
    spec, target, k = rows.spec, rows.target, shard.num_classes
    f = Found(*(None if value is None else value.double() for value in found))  # type: ignore[arg-type]
    assert f.z_y is not None
    zmax = f.zmax.amax(0)
    logsum = (torch.where(f.zmax == zmax, 0.0, f.zmax - zmax) + f.logsum).exp().sum(0).log()
    lse = zmax + logsum
    behind = (zmax - f.zmax) + (logsum - f.logsum)  # Δ
    behind = torch.where(f.logsum == -math.inf, math.inf, behind)
    owner = shard.owner(target)[None]
    nll = (zmax - f.z_y.gather(0, owner)[0]) + logsum
    w_y = None if f.w_y is None else f.w_y.gather(0, owner)[0]

    n: Tensor | float = float(k) if rows.prior is None else 1.0
    if f.covered is not None and spec.smooth_over == "finite":
        n = f.covered.sum(0)
    e = _eps(rows, n, nll)
    b = torch.where(torch.as_tensor(n != 0), e / n, 0.0)
    mass = 1 - e if w_y is None else (1 - e) * w_y
    loss = _term(mass, nll)
    if f.rest is not None:
        sizes = torch.tensor(shard.starts, dtype=nll.dtype, device=nll.device).diff()[:, None]
        each = sizes if f.rest_mass is None else f.rest_mass
        rest = torch.where(f.zmax == -math.inf, 0.0, f.rest) + _term(each, behind)
        loss = loss + _term(b, rest.sum(0))
        mass = mass + b * each.sum(0)
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
    more: list[Tensor] = []
    if f.entropy is not None:
        share = (-behind).exp()
        outside = (share == 0) & (zmax > -math.inf)  # a rank without a share may know nothing
        entropy = torch.where(outside, 0.0, share * (f.entropy + behind)).sum(0)
        more = [entropy]
        if f.variance is not None and f.collision is not None:
            off = (entropy - f.entropy) - behind  # the rank's mean of z less the row's
            variance = torch.where(outside, 0.0, share * (f.variance + off.square())).sum(0)
            more += [variance, torch.where(outside, 0.0, share.square() * f.collision).sum(0)]
        if spec.confidence_penalty:
            loss, mass = loss - spec.confidence_penalty * entropy, mass + spec.confidence_penalty * entropy
    live, known = rows.valid, (target >= 0) & (target < k) & (zmax > -math.inf)
    loss, nll = (torch.where(live, torch.where(known, v, math.nan), 0.0) for v in (loss, nll))
    saved = torch.stack((zmax, logsum, mass.expand_as(lse), torch.as_tensor(n, device=lse.device).expand_as(lse)))
    stats = None
    if spec.return_stats and f.prediction is not None:
        first = torch.tensor(shard.starts[:-1], device=target.device)[:, None]
        best = (f.zmax == zmax).to(torch.int8).argmax(0)[None]
        prediction = (f.prediction.long() + first).gather(0, best)[0]
        stats = RowStats(nll, lse, (-logsum).exp().clamp_max(1), prediction, *more[: spec.n_stats - 1])
    return Whole(loss, saved, e, w_y, stats)


def _term(weight: Tensor, value: Tensor) -> Tensor:
    """0 where the weight is 0, even beside an infinite value."""
    return torch.where(weight == 0, 0.0, weight * value)


def _eps(rows: Rows, n: Tensor | float, like: Tensor) -> Tensor:
    """e of the uniform form (N,)."""
    eps = rows.eps if rows.spec.smooths else 0.0
    e = torch.as_tensor(eps, dtype=like.dtype, device=like.device).expand_as(like)
    if not isinstance(rows.spec.smoothing, str) or rows.spec.smoothing != "others":
        return e
    n = torch.as_tensor(n, dtype=like.dtype, device=like.device)
    return torch.where(n > 1, e * n / (n - 1), 0.0)


def gradient_call(rows: Rows, shard: Shard, saved: Tensor, e: Tensor, factors: Tensor) -> tuple[RowCall, Tensor]:
    """(the call, saved) with which ``backward`` makes the gradient of Σ factor·loss in this rank's columns, from
    ``saved`` and ``e`` of the :class:`Whole`; ``rows.eps`` is not looked at."""
    acc = accumulate_dtype(rows.logits.dtype)
    target, here = shard.own(rows.target, rows.valid)
    zmax, logsum, mass, n = saved
    n = torch.where(here, n, torch.where(e == 0, math.inf, n / e))
    e = torch.where(here, e, 1.0)
    known = (rows.target >= 0) & (rows.target < shard.num_classes)
    factors = torch.where(known | ~rows.valid, factors, math.nan)
    alone = _alone(rows, target)._replace(eps=e.to(acc))
    call = row_arguments(alone, factors.to(acc).contiguous())
    call = call._replace(z_loss=rows.spec.z_loss, confidence_penalty=rows.spec.confidence_penalty)
    return call, torch.stack((zmax, logsum, mass, n)).to(acc)


def plain_gradient(logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> Tensor:
    """``backward`` of the operators in plain PyTorch."""
    zmax, logsum, mass, n = (value[:, None] for value in saved)
    assert call.eps_rows is not None
    assert call.row_scale is not None
    live = (call.target != IGNORED)[:, None]
    rows = Rows(spec, logits, call.target, call.weight, call.prior, 0.0, None).flat()
    z = reference.transform(torch.where(live, rows.logits, 0.0), spec)
    e, classes = call.eps_rows[:, None], torch.arange(z.shape[-1], device=z.device)
    q = (1 - e) * (classes == call.target[:, None]) + torch.where(n == 0, 0.0, e / n) * _spread(rows, z)
    q = q if call.weight is None else q * call.weight
    log_p = (z - zmax) - logsum
    mass = mass + 2 * call.z_loss * (zmax + logsum)
    if call.confidence_penalty:
        mass = mass + call.confidence_penalty * torch.where(log_p == -math.inf, 0.0, log_p)
    grad = call.row_scale[:, None] * reference.slope(z, spec) * (mass * log_p.exp() - q)
    return torch.where(live, grad, 0.0).to(logits.dtype).reshape(logits.shape)
