"""One row over several ranks: what a rank finds in its columns, and what the columns of all ranks make of it.

Rank r holds the classes [v_r, v_{r+1}) and runs the same kernels over them as a single device does over a row, with
ε = 1 and no target, which finds, of its classes alone,

    zmax_r, logsum_r                        lse_r = zmax_r + logsum_r
    U_r = -Σ w·u·c·log p_r                  log p_r = z - lse_r
    m_r = Σ w·u·c        n_r = Σ u·c

with w, u and c of :mod:`labelsmooth_kernels.ops`. The owner of the target adds z_y and w_y. Of
class probabilities t a rank sends, from a second call with ε = 0,

    T_r = -Σ w·t·log p_r                    μ_r = Σ w·t

Once a rank has all ranks' numbers it has the row, with lse = log Σ exp lse_r and Δ_r = lse - lse_r >= 0:

    loss = (1-e)·T + (e/n)·Σ (U_r + m_r·Δ_r) + ζ·lse² - β·H                     n = Σ n_r, or K
    T    = w_y·(lse - z_y), or Σ (T_r + μ_r·Δ_r)
    H    = Σ P_r·(H_r + Δ_r)                                                    P_r = exp(-Δ_r)

Sums of terms of one sign (where 0 <= e <= 1): nothing cancels, and all ranks add them in the same order, in float64, so
that they find the same bits. The gradient of a rank's columns needs of the row (zmax, logsum, M + β·H, n), what
``backward`` takes as ``saved``; and q, which without the target's class is w·u·c·e/n: e = 1 over n/e classes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import row_arguments
from .fusing import fused
from .reference import RowStats
from .spec import LossSpec, Rows, accumulate_dtype

if TYPE_CHECKING:
    from .ops import Kernels, RowCall

IGNORED = -100
"""The ignored target of a rank's own call: no class of its columns, whatever the caller's is."""


class Place(NamedTuple):
    """Where a rank's columns lie among all; the numbers may be tensors without dimensions."""

    first: int | Tensor
    last: int | Tensor
    num_classes: int | Tensor

    def own(self, target: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """(the target as a class of this rank, 0 where it is elsewhere and ``IGNORED`` where not live; whether here)"""
        here = live & (target >= self.first) & (target < self.last)
        return torch.where(live, torch.where(here, target - self.first, 0), IGNORED), here


class Layout(NamedTuple):
    """Where all ranks' columns lie."""

    rank: int
    starts: tuple[int, ...]
    """of every rank, and the number of classes"""

    @property
    def num_classes(self) -> int:
        return self.starts[-1]

    @property
    def place(self) -> Place:
        first, last = self.starts[self.rank : self.rank + 2]
        return Place(first, last, self.num_classes)

    def starts_on(self, device: torch.device) -> Tensor:
        """``starts`` there, where they are copied to once: a copy waits for a GPU."""
        return _tensor_on(self.starts, device)


@functools.lru_cache(maxsize=256)
def _tensor_on(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


class Found(NamedTuple):
    """What a rank sends of every row, each (N,); None is not sent."""

    zmax: Tensor
    logsum: Tensor
    z_y: Tensor | None
    w_y: Tensor | None
    """of the target's class, 0 where that is elsewhere; what class weights there are"""
    fit: Tensor | None
    """T_r"""
    fit_mass: Tensor | None
    """μ_r"""
    nll: Tensor | None
    """T_r without class weights, where there are some and statistics are asked for"""
    nll_mass: Tensor | None
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

    def with_target(self, rows: Rows, place: Place) -> Found:
        if not rows.index_target:
            return self
        z_y, (target, here) = torch.zeros_like(self.zmax), place.own(rows.target, rows.valid)
        if rows.logits.shape[-1]:
            x = rows.logits.gather(-1, target.clamp_min(0).reshape(*rows.logits.shape[:-1], 1)).flatten()
            z_y = torch.where(here, reference.transform(x, rows.spec), z_y)
        return self._replace(z_y=z_y, w_y=target_weight(rows, place))


def target_weight(rows: Rows, place: Place) -> Tensor | None:
    """w_y (N,), 0 where the target is elsewhere; None without class weights."""
    if rows.weight is None or not rows.index_target:
        return None
    if not len(rows.weight):
        return rows.weight.new_zeros(len(rows.target))
    target, here = place.own(rows.target, rows.valid)
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
    """The call of a rank's columns as if there were no others: with an index target nothing but what is smoothed over,
    ε = 1, and with probabilities nothing but these, ε = 0."""
    smoothing = rows.spec.smoothing if isinstance(rows.spec.smoothing, Tensor) else "uniform"
    eps = 0.0 if target.is_floating_point() else 1.0
    spec = dataclasses.replace(
        rows.spec, label_smoothing=eps, smoothing=smoothing, z_loss=0.0, confidence_penalty=0.0, ignore_index=IGNORED,
        row_weight=None, normalizer=None, inplace=False,
        smooth_over=rows.spec.smooth_over if rows.spec.smooths else "all",
    )  # fmt: skip
    return rows._replace(spec=spec, target=target, eps=eps, row_weight=None)


def find(rows: Rows, kernels: Kernels | None) -> Found:
    """What this rank's columns say of every row, but for an index target."""
    spec, soft = rows.spec, not rows.index_target
    alone = _alone(rows, torch.where(rows.valid, 0, IGNORED))
    n_stats = 2 if spec.confidence_penalty and spec.n_stats < 2 else spec.n_stats
    main = _sums(_alone(rows, rows.target) if soft else alone, kernels, n_stats)
    rest = (_sums(alone, kernels, 0) if soft else main) if spec.smooths else None
    uneven = spec.smooths and (rows.weight is not None or rows.prior is not None or spec.smooth_over == "finite")
    twice = soft and rows.weight is not None and bool(spec.return_stats)
    return Found(
        main.zmax, main.logsum, None, None, main.loss if soft else None, main.mass if soft else None,
        main.stats[0] if twice else None, rows.target.sum(-1, dtype=main.zmax.dtype).flatten() if twice else None,
        None if rest is None else rest.loss, rest.mass if rest is not None and uneven else None,
        rest.covered if rest is not None and uneven else None,
        main.prediction.to(main.zmax.dtype) if spec.return_stats else None,
        *(main.stats[i] if i < n_stats else None for i in (1, 2, 3)),
    )  # fmt: skip


class _Sums(NamedTuple):
    """A call of :func:`_alone`, each (N,)."""

    loss: Tensor
    """U_r or T_r"""
    mass: Tensor
    """m_r or μ_r"""
    covered: Tensor
    """n_r"""
    zmax: Tensor
    logsum: Tensor
    stats: tuple[Tensor, ...]
    prediction: Tensor


def _sums(alone: Rows, kernels: Kernels | None, n_stats: int) -> _Sums:
    logits = alone.logits
    if logits.shape[-1] == 0:
        zeros = torch.zeros(alone.n, dtype=accumulate_dtype(logits.dtype), device=logits.device)
        return _Sums(zeros, zeros, zeros, zeros - math.inf, zeros - math.inf, (zeros,) * n_stats, zeros)
    if kernels is None:
        return _plain_sums(alone)
    loss, (zmax, logsum, mass, count), stats, prediction, _ = kernels.forward(
        logits, *row_arguments(alone, None), False, n_stats
    )
    if alone.index_target:  # the operator spreads ε over n_r
        loss, mass = loss * count, mass * count
    return _Sums(loss, mass, count, zmax, logsum, tuple(stats), prediction)


def _spread(rows: Rows, z: Tensor) -> Tensor:
    """u·c (N, K)"""
    prior = torch.ones_like(z) if rows.prior is None else rows.prior.expand_as(z)
    return torch.where(z > -math.inf, prior, 0.0) if rows.spec.smooth_over == "finite" else prior


def _plain_sums(alone: Rows) -> _Sums:
    rows = alone.flat()
    z = reference.transform(rows.logits, rows.spec)
    spread = _spread(rows, z)
    q = spread if rows.index_target else rows.target.to(z.dtype)
    q = q if rows.weight is None else q * rows.weight
    loss, zmax, logsum = reference.row_loss(z, q)
    spec = dataclasses.replace(rows.spec, return_stats="all")
    known = reference.row_stats(rows._replace(spec=spec))
    stats = (known.nll, *(value for value in known[4:] if value is not None))
    return _Sums(loss, q.sum(-1), spread.sum(-1), zmax, logsum, stats, known.prediction)


def packed(found: Found, rows: Rows, place: Place) -> Tensor:
    """What a rank sends (numbers, N)."""
    return torch.stack([value for value in found.with_target(rows, place) if value is not None])


def merge(got: Tensor, sent: tuple[bool, ...], rows: Rows, starts: Tensor) -> Whole:
    """What all ranks sent, (ranks, numbers, N), as rows; ``sent`` says which of :class:`Found`, ``rows`` is any rank's
    call and ``starts`` where the ranks' classes begin, and end."""
    spec, target, columns = rows.spec, rows.target, iter(got.double().unbind(1))
    f = Found(*(next(columns) if there else None for there in sent))  # type: ignore[arg-type]  # two are always there
    zmax = f.zmax.amax(0)
    logsum = (torch.where(f.zmax == zmax, 0.0, f.zmax - zmax) + f.logsum).exp().sum(0).log()
    lse = zmax + logsum
    behind = (zmax - f.zmax) + (logsum - f.logsum)  # Δ
    behind = torch.where(f.logsum == -math.inf, math.inf, behind)

    def whole(term: Tensor, mass: Tensor) -> Tensor:
        """Σ (T_r + μ_r·Δ_r), in which a rank without a finite logit has no T_r."""
        return (torch.where(f.zmax == -math.inf, 0.0, term) + _term(mass, behind)).sum(0)

    w_y = None
    if f.z_y is not None:
        owner = torch.bucketize(target, starts[1:], right=True).clamp_max(len(starts) - 2)[None]  # of no class, any
        nll = (zmax - f.z_y.gather(0, owner)[0]) + logsum
        w_y = None if f.w_y is None else f.w_y.gather(0, owner)[0]
        fit_mass = torch.ones_like(lse) if w_y is None else w_y
        fit = _term(fit_mass, nll)
    else:
        assert f.fit is not None
        assert f.fit_mass is not None
        fit, fit_mass = whole(f.fit, f.fit_mass), f.fit_mass.sum(0)
        nll = fit if f.nll is None or f.nll_mass is None else whole(f.nll, f.nll_mass)

    n = torch.ones_like(lse) if rows.prior is not None else starts[-1].to(lse.dtype).expand_as(lse)
    if f.covered is not None and spec.smooth_over == "finite":
        n = f.covered.sum(0)
    e = _eps(rows, n)
    b = torch.where(n != 0, e / n, 0.0)
    mass = (1 - e) * fit_mass
    loss = _term(1 - e, fit)
    if f.rest is not None:
        each = starts.to(lse.dtype).diff()[:, None] if f.rest_mass is None else f.rest_mass
        loss = loss + _term(b, whole(f.rest, each))
        mass = mass + b * each.sum(0)
    if spec.z_loss:
        loss = loss + spec.z_loss * lse.square()
    more = _moments(f, zmax, behind)
    if spec.confidence_penalty:
        loss, mass = loss - spec.confidence_penalty * more[0], mass + spec.confidence_penalty * more[0]
    loss, nll = (torch.where(zmax > -math.inf, v, math.nan) for v in (loss, nll))
    if rows.index_target:
        known = (target >= 0) & (target < starts[-1])
        loss, nll = (torch.where(rows.valid, torch.where(known, v, math.nan), 0.0) for v in (loss, nll))
    saved = torch.stack((zmax, logsum, mass, n))
    stats = None
    if spec.return_stats and f.prediction is not None:
        best = (f.zmax == zmax).to(torch.int8).argmax(0)[None]
        prediction = (f.prediction.long() + starts[:-1, None]).gather(0, best)[0]
        stats = RowStats(nll, lse, (-logsum).exp().clamp_max(1), prediction, *more[: spec.n_stats - 1])
    return Whole(loss, saved, e, w_y, stats)


def _moments(f: Found, zmax: Tensor, behind: Tensor) -> list[Tensor]:
    """H, the variance of z and Σ p² of the rows: what of them the ranks sent."""
    if f.entropy is None:
        return []
    share = (-behind).exp()
    outside = (share == 0) & (zmax > -math.inf)  # a rank without a share may know nothing
    entropy = torch.where(outside, 0.0, share * (f.entropy + behind)).sum(0)
    if f.variance is None or f.collision is None:
        return [entropy]
    off = (entropy - f.entropy) - behind  # the rank's mean of z less the row's
    variance = torch.where(outside, 0.0, share * (f.variance + off.square())).sum(0)
    return [entropy, variance, torch.where(outside, 0.0, share.square() * f.collision).sum(0)]


def _term(weight: Tensor, value: Tensor) -> Tensor:
    """0 where the weight is 0, even beside an infinite value."""
    return torch.where((weight == 0) & value.isinf(), 0.0, weight * value)


def _eps(rows: Rows, n: Tensor) -> Tensor:
    """e of the uniform form (N,)."""
    eps = rows.eps if rows.spec.smooths else 0.0
    e = eps.to(n.dtype).expand_as(n) if isinstance(eps, Tensor) else torch.full_like(n, eps)
    if not rows.spec.others:
        return e
    return torch.where(n > 1, e * n / (n - 1), 0.0)


def gradient_call(rows: Rows, place: Place, saved: Tensor, e: Tensor, factors: Tensor) -> tuple[RowCall, Tensor]:
    """(the call, saved) with which ``backward`` makes the gradient of Σ factor·loss in this rank's columns, from
    ``saved`` and ``e`` of the :class:`Whole`; ``rows.eps`` is not looked at."""
    found = fused(_gradient_numbers, e.device)(rows, place, saved, e, factors)
    target, e, factors, saved = found
    alone = _alone(rows, target if rows.index_target else target.new_empty(0, dtype=torch.int64))
    call = row_arguments(alone._replace(target=target, eps=e), factors)
    call = call._replace(z_loss=rows.spec.z_loss, confidence_penalty=rows.spec.confidence_penalty)
    return call, saved


def _gradient_numbers(
    rows: Rows, place: Place, saved: Tensor, e: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target, ε, factors, saved) of the call, in the dtype of the arithmetic."""
    acc, target = accumulate_dtype(rows.logits.dtype), rows.target
    zmax, logsum, mass, n = saved
    if rows.index_target:
        target, here = place.own(rows.target, rows.valid)
        n = torch.where(here, n, torch.where(e == 0, math.inf, n / e))
        e = torch.where(here, e, 1.0)
        known = (rows.target >= 0) & (rows.target < place.num_classes)
        factors = torch.where(known | ~rows.valid, factors, math.nan)
    numbers = torch.stack((zmax, logsum, mass, n)).to(acc)
    return target, e.to(acc).contiguous(), factors.to(acc).contiguous(), numbers


def plain_gradient(logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> Tensor:
    """``backward`` of the operators in plain PyTorch."""
    assert call.row_scale is not None
    rows, z, q = _plain_weights(logits, call, saved, spec)
    zmax, logsum, mass, _ = (value[:, None] for value in saved)
    log_p = (z - zmax) - logsum
    mass = mass + 2 * call.z_loss * (zmax + logsum)
    if call.confidence_penalty:
        mass = mass + call.confidence_penalty * torch.where(log_p == -math.inf, 0.0, log_p)
    grad = call.row_scale[:, None] * reference.slope(rows.logits, spec) * (mass * log_p.exp() - q)
    return torch.where(rows.valid[:, None], grad, 0.0).to(logits.dtype).reshape(logits.shape)


def plain_target_gradient(logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> Tensor:
    """``target_grad`` of the operators in plain PyTorch."""
    assert call.eps_rows is not None
    assert call.row_scale is not None
    _, z, q = _plain_weights(logits, call, saved, spec)
    down = z - saved[0, :, None]
    down = torch.where((q == 0) & (down == -math.inf), 0.0, down)
    grad = (call.row_scale * (1 - call.eps_rows))[:, None] * (saved[1, :, None] - down)
    grad = grad if call.weight is None else grad * call.weight
    return grad.to(call.target.dtype).reshape(call.target.shape)


def _plain_weights(logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> tuple[Rows, Tensor, Tensor]:
    """(the rows, z, q) of a :func:`gradient_call`, both (N, K_r)"""
    assert call.eps_rows is not None
    spec = dataclasses.replace(spec, ignore_index=IGNORED)
    rows = Rows(spec, logits, call.target, call.weight, call.prior, 0.0, None).flat()
    z = reference.transform(torch.where(rows.valid[:, None], rows.logits, 0.0), spec)
    e, n = call.eps_rows[:, None], saved[3, :, None]
    hot = torch.arange(z.shape[-1], device=z.device) == rows.target[:, None] if rows.index_target else rows.target
    q = (1 - e) * hot.to(z.dtype) + torch.where(n == 0, 0.0, e / n) * _spread(rows, z)
    return rows, z, q if call.weight is None else q * call.weight
