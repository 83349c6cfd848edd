"""The maths of the loss, once, in plain PyTorch: any option, dtype and device, differentiable any number of times.

One row: logits x (K values), transformed logits z = cap(s·x) with scale s and cap(v) = c·tanh(v/c), target weights q
of mass M = Σ q, z-loss factor ζ, confidence penalty β, row factor g (row weight × upstream gradient / normaliser).

    lse  = log Σ exp z                                      p  = exp(z - lse)
    loss = M·lse - Σ q·z + ζ·lse² - β·H                     H  = -Σ p·log p
    dz   = (M + 2ζ·lse + β·(H + log p))·p - q               dx = g · dz · s · cap'(s·x)

*Derivation.* With q fixed, ∂lse/∂z_k = exp z_k / Σ exp z = p_k, so ∂loss/∂z_k = M·p_k - q_k + 2ζ·lse·p_k, and
∂H/∂z_k = -p_k·(log p_k + H). For ζ = β = 0 and M = 1 this is the textbook p - q; it holds for every q, which is why
each option is a choice of q, z or g and never a new formula:

    plain                       q_k = [k=y]
    smoothing="uniform"         q_k = (1-ε)[k=y] + ε/K                       Szegedy et al. 2016, PyTorch
    smoothing="others"          1-ε on y, ε/(K-1) elsewhere                  = "uniform" with ε' = ε·K/(K-1)
    smoothing=u                 q_k = (1-ε)[k=y] + ε·u_k                     a prior, Σu = 1
    smooth_over="finite"        uniform or u over the classes with z_k > -inf, renormalised (K counts those)
    class probabilities t       q_k = (1-ε)·t_k + ε·r_k
    class weights w             w_k·q_k

*Optimum.* dz = 0 where p = q/M. For "others" that means exp(z_y - z_other) = (1-ε)(K-1)/ε: the gap between the
target's logit and the rest is log((K-1)(1-ε)/ε), finite for every ε > 0, and the loss there is the entropy of q. Hard
targets (ε = 0) ask for an infinite gap. :func:`optimal_gap` is that number; the tests descend to it.

*Numerics.* Σ q·z and lse are large where the logits are, and their difference is not: everything is computed on
z - max z,

    loss = M·logsum - Σ q·(z - zmax) + ζ·lse²               logsum = log Σ exp(z - zmax)      lse = zmax + logsum

which is the same number, since Σ q·zmax = M·zmax. A class with q = 0 contributes 0 even where z = -inf.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import plain_float, plain_int, unscriptable
from .spec import LossSpec, Rows, accumulate_dtype, require


class RowStats(NamedTuple):
    """By-products of the loss, one value per row, detached. In an ignored row nll is 0, the rest as in any other."""

    nll: Tensor
    """-log p_y without smoothing or class weights, what perplexity is computed from; -Σ t·log p for probabilities t"""
    lse: Tensor
    """log Σ exp z"""
    confidence: Tensor
    """max p"""
    prediction: Tensor
    """argmax z, int64"""
    entropy: Tensor | None = None
    """-Σ p·log p, with ``return_stats="entropy"`` or ``"all"``"""
    variance: Tensor | None = None
    """Var_p[z] = Σ p·z² - (Σ p·z)², with ``return_stats="all"``"""
    collision: Tensor | None = None
    """Σ p², what the Brier score needs, with ``return_stats="all"``"""


def weights(e: float | Tensor, K: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """(a, b) of the uniform form q = a·[k=y] + b: a = 1 - e, b = e/K."""
    return 1 - e, e / K


def uniform_epsilon(eps: float | Tensor, K: int | Tensor, smoothing: str | Tensor) -> float | Tensor:
    """The ε of the uniform form for a convention: ε·K/(K-1) for "others", ε itself otherwise."""
    return eps * K / (K - 1) if isinstance(smoothing, str) and smoothing == "others" else eps


@unscriptable
def optimal_gap(eps: float, K: int, smoothing: str = "uniform") -> float:
    """z_y - z_other at the minimum of the loss: log((K-1)(1-ε)/ε) for "others", log(1 + K(1-ε)/ε) for "uniform"; ∞ for
    ε = 0. Raises ArgumentError for an ε outside [0, 1], fewer than 2 classes, another convention.

    >>> round(optimal_gap(0.1, 10, "others"), 4) == round(math.log(9 * 0.9 / 0.1), 4)
    True
    """
    eps, K = plain_float(eps), plain_int(K)
    require(isinstance(eps, int | float) and 0 <= eps <= 1, "eps", eps, "from 0 to 1")
    require(isinstance(K, int) and K > 1, "K", K, "an int > 1")
    known = isinstance(smoothing, str) and smoothing in ("uniform", "others")
    require(known, "smoothing", smoothing, "'uniform' or 'others'")
    a, b = weights(float(uniform_epsilon(eps, K, smoothing)), K)
    if b == 0:
        return math.inf
    return math.log((a + b) / b) if eps < 1 else 0.0 if smoothing == "uniform" else -math.inf


def entropy(shifted: Tensor, logsum: Tensor) -> Tensor:
    """H = -Σ p·log p (N,) from z - zmax (N, K) and its logsum (N,)."""
    p = (shifted - logsum[:, None]).exp()
    return logsum - (p * torch.where(shifted == -math.inf, 0.0, shifted)).sum(-1)


def row_loss(
    z: Tensor, q: Tensor, z_loss: float = 0.0, confidence_penalty: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, zmax, logsum) of transformed logits z (N, K) and target weights q (N, K), each (N,)."""
    zmax = z.detach().amax(-1)
    shifted = z - zmax.clamp_min(torch.finfo(z.dtype).min)[:, None]
    logsum = shifted.exp().sum(-1).log()
    absent = (q == 0) & (shifted == -math.inf)
    loss = q.sum(-1) * logsum - (q * torch.where(absent, 0.0, shifted)).sum(-1)
    if z_loss:
        loss = loss + z_loss * (zmax + logsum).square()
    if confidence_penalty:
        loss = loss - confidence_penalty * entropy(shifted, logsum)
    return loss, zmax, logsum


def dz(
    z: Tensor, q: Tensor, zmax: Tensor, logsum: Tensor, z_loss: float = 0.0, confidence_penalty: float = 0.0
) -> Tensor:
    """The gradient of :func:`row_loss` in z: (M + 2ζ·lse + β·(H + log p))·p - q, which the kernels compute."""
    shifted = z - zmax.clamp_min(torch.finfo(z.dtype).min)[:, None]
    log_p = shifted - logsum[:, None]
    mass = (q.sum(-1) + 2 * z_loss * (zmax + logsum))[:, None]
    if confidence_penalty:
        surprise = entropy(shifted, logsum)[:, None] + torch.where(log_p == -math.inf, 0.0, log_p)
        mass = mass + confidence_penalty * surprise
    return mass * log_p.exp() - q


def merge(
    piece: tuple[Tensor, Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Merge two pieces (m, s, d, mass) = (max z, Σ exp(z - m), Σ q·(z - m), Σ q) of a row: rescale, never subtract."""
    (m1, s1, d1, mass1), (m2, s2, d2, mass2) = piece, other
    m = torch.maximum(m1, m2)

    def shift(mi: Tensor) -> Tensor:  # a piece that is all -inf contributes exactly nothing
        return torch.where(mi == m, 0.0, mi - m)

    def moved(di: Tensor, massi: Tensor, mi: Tensor) -> Tensor:
        return torch.where(massi == 0, di, di + massi * shift(mi))

    s = s1 * shift(m1).exp() + s2 * shift(m2).exp()
    return m, s, moved(d1, mass1, m1) + moved(d2, mass2, m2), mass1 + mass2


def transform(logits: Tensor, spec: LossSpec) -> Tensor:
    """z = cap(s·x) in the dtype of the arithmetic; -inf stays -inf: a masked class is not capped."""
    z = _scaled(logits, spec)
    if spec.softcap is None:
        return z
    v = z / spec.softcap
    e = torch.exp(-2 * _magnitude(v))
    far = (1 - e) / (1 + e)  # torch.tanh's derivative, 1 - tanh², loses its digits where it is small
    tanh = torch.where(v.abs() < 1, torch.tanh(v), torch.where(v < 0, -far, far))
    return torch.where(z == -math.inf, z, spec.softcap * tanh)


def slope(logits: Tensor, spec: LossSpec) -> Tensor | float:
    """dz/dx = s·cap'(s·x): with e = exp(-2|v|) the slope of tanh v is 4e/(1 + e)²."""
    if spec.softcap is None:
        return spec.logit_scale
    z = _scaled(logits, spec)
    e = torch.exp(-2 * _magnitude(torch.where(z == -math.inf, 0.0, z / spec.softcap)))
    return spec.logit_scale * 4 * e / (1 + e).square()


def _scaled(logits: Tensor, spec: LossSpec) -> Tensor:
    z = logits.to(accumulate_dtype(logits.dtype))
    return z if spec.logit_scale == 1.0 else z * spec.logit_scale


def _magnitude(v: Tensor) -> Tensor:
    """|v| with the derivative 1 at 0, where that of torch.abs is 0."""
    return torch.where(v < 0, -v, v)


def smoothing_distribution(z: Tensor, rows: Rows) -> tuple[Tensor, Tensor | int]:
    """(r, n): what ε is spread over, (K,) or (N, K) summing to 1, and the number of classes it covers."""
    K = z.shape[-1]
    prior = z.new_ones(K) if rows.prior is None else rows.prior
    if rows.spec.smooth_over == "finite":
        finite = z.detach() > -math.inf
        r = torch.where(finite, prior, 0.0)
        n = finite.sum(-1, keepdim=True).to(z.dtype)
        return r / r.sum(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny), n
    return (prior / K if rows.prior is None else prior), K


def unsmoothed_targets(rows: Rows, z: Tensor) -> Tensor:
    """(N, K): one-hot of an index target, 0 for an ignored row, NaN for an index outside [0, K); or probabilities."""
    if not rows.index_target:
        return rows.target.to(z.dtype)
    K = z.shape[-1]
    inside = (rows.target >= 0) & (rows.target < K)
    classes = torch.arange(K, device=z.device)
    hot = (classes == rows.target[:, None]).to(z.dtype)
    return torch.where((inside | ~rows.valid)[:, None], hot, math.nan)


def smoothing_weight(rows: Rows, n: Tensor | int) -> Tensor | float:
    """e of the uniform form, (N, 1) or a number, where ε is spread over n classes."""
    spec = rows.spec
    eps = rows.eps.reshape(-1, 1) if isinstance(rows.eps, Tensor) else rows.eps
    e = uniform_epsilon(eps, n, spec.smoothing)
    if isinstance(n, Tensor) and isinstance(e, Tensor) and spec.others:
        return torch.where(n > 1, e, 0.0)  # a row with one finite class has no others to smooth over
    return e


def target_weights(rows: Rows, z: Tensor, unsmoothed: Tensor) -> Tensor:
    """q (N, K) by the table of this module."""
    q = unsmoothed
    if rows.spec.smooths:
        r, n = smoothing_distribution(z, rows)
        e = smoothing_weight(rows, n)
        q = (1 - e) * q + e * r
    return q if rows.weight is None else q * rows.weight


def _valid_logits(rows: Rows) -> Tensor:
    """Logits with the ignored rows masked, before any function whose derivative at NaN or inf could get through."""
    return torch.where(rows.valid[:, None], rows.logits, 0.0) if rows.index_target else rows.logits


def row_losses(rows: Rows) -> Tensor:
    """The loss of every row (N,), row weights not applied; an ignored row has 0 and no gradient, even from NaN."""
    rows = rows.flat()
    z = transform(_valid_logits(rows), rows.spec)
    q = target_weights(rows, z, unsmoothed_targets(rows, z))
    loss, _, _ = row_loss(z, q, rows.spec.z_loss, rows.spec.confidence_penalty)
    return torch.where(rows.valid, loss, 0.0) if rows.index_target else loss


def logit_gradient(rows: Rows, upstream: Tensor) -> Tensor:
    """The gradient of Σ upstream·loss in the logits, in their shape, dx of this module: differentiable in turn."""
    shape, rows = rows.logits.shape, rows.flat()
    logits, spec = _valid_logits(rows), rows.spec
    z = transform(logits, spec)
    q = target_weights(rows, z, unsmoothed_targets(rows, z))
    _, zmax, logsum = row_loss(z, q)
    grad = upstream[:, None] * slope(logits, spec) * dz(z, q, zmax, logsum, spec.z_loss, spec.confidence_penalty)
    if rows.index_target:
        grad = torch.where(rows.valid[:, None], grad, 0.0)
    return grad.to(rows.logits.dtype).reshape(shape)


def target_gradient(rows: Rows, upstream: Tensor) -> Tensor:
    """The gradient of Σ upstream·loss in class probabilities, in their shape: -(1 - e)·w·log p."""
    shape, rows = rows.target.shape, rows.flat()
    z = transform(rows.logits, rows.spec)
    q = target_weights(rows, z, unsmoothed_targets(rows, z))
    _, zmax, logsum = row_loss(z, q)
    e = smoothing_weight(rows, smoothing_distribution(z, rows)[1]) if rows.spec.smooths else 0.0
    down = z - zmax[:, None]
    down = torch.where((q == 0) & (down == -math.inf), 0.0, down)
    grad = upstream[:, None] * (1 - e) * (logsum[:, None] - down)
    grad = grad if rows.weight is None else grad * rows.weight
    return grad.to(rows.target.dtype).reshape(shape)


@torch.no_grad()
def row_stats(rows: Rows) -> RowStats:
    """The statistics of every row."""
    rows = rows.flat()
    z = transform(rows.logits, rows.spec)
    nll, zmax, logsum = row_loss(z, unsmoothed_targets(rows, z))
    if rows.index_target:
        nll = torch.where(rows.valid, nll, 0.0)
    more: list[Tensor] = []
    if rows.spec.n_stats > 1:
        shifted = z - zmax[:, None]
        p, H = (shifted - logsum[:, None]).exp(), entropy(shifted, logsum)
        off = torch.where(shifted == -math.inf, 0.0, shifted) - (logsum - H)[:, None]
        more = [H, (p * off.square()).sum(-1), p.square().sum(-1)]
    return RowStats(nll, zmax + logsum, (-logsum).exp(), z.argmax(-1), *more[: rows.spec.n_stats - 1])


def distillation_terms(rows: Rows, teacher: Tensor, temperature: float) -> Tensor:
    """(2, N): KL(softmax(teacher/T) ‖ softmax(z/T)) and the loss of every row; 0 in an ignored one."""
    rows = rows.flat()
    z = transform(_valid_logits(rows), rows.spec)
    q = target_weights(rows, z, unsmoothed_targets(rows, z))
    t = torch.where(rows.valid[:, None], teacher.to(z.dtype), 0.0) / temperature
    log_t, log_p = torch.log_softmax(t, -1), torch.log_softmax(z / temperature, -1)
    p_t = log_t.exp()
    divergence = (p_t * torch.where(p_t == 0, 0.0, log_t - log_p)).sum(-1)
    divergence = divergence - divergence.detach().clamp_max(0)  # what roundings leave below 0, not its gradient
    return torch.where(rows.valid, torch.stack((divergence, row_loss(z, q)[0])), 0.0)


def normalizer(rows: Rows) -> Tensor:
    """The denominator of reduction="mean": Σ over the valid rows of row weight × class weight of the target; for class
    probabilities, Σ of row weights (the number of rows where there are none), as PyTorch has it."""
    acc, K = accumulate_dtype(rows.logits.dtype), rows.logits.shape[-1]
    if not rows.index_target:
        counted = rows.logits.new_ones(rows.n, dtype=acc)
    elif rows.weight is not None:
        inside = rows.valid & (rows.target >= 0) & (rows.target < K)
        counted = torch.where(inside, rows.weight[torch.where(inside, rows.target, 0)], 0.0)
    else:
        counted = rows.valid
        if rows.row_weight is None and counted.device.type == "cpu":  # a sum would copy the booleans to int64 first
            return counted.count_nonzero().to(acc)
    return (counted if rows.row_weight is None else counted * rows.row_weight).sum().to(acc)
