"""The maths of a row on the device, under the names of ``labelsmooth_kernels.reference``, which derives it. float32.

``Piece`` is what is known of some classes of a row; pieces merge by (max, rescaled sums, re-shifted sums), so two large
numbers are never subtracted, and (zmax, logsum) stay two numbers to the end. A piece that is all -inf contributes
exactly nothing to s. ``tl.max`` drops a NaN: it is s that carries it, into logsum and thence into the loss and every
entry of the gradient. e/n is known only after the whole row where n counts finite classes, so the smoothed part of
Σ q·(z - m) is kept apart from the target's.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Structure(NamedTuple):
    """All that the kernels are compiled for, besides dtypes, block size and what is None: eps_rows, row_scale, grad,
    logit_scale, softcap, n_inner, and class strides of 1."""

    VEC: int
    """elements of the logits in 16 bytes, 1 for narrow accesses"""
    EDGES: bool
    """rows begin or end inside a group of VEC"""
    G_ALIGNED: bool
    T_ALIGNED: bool
    """the groups of the logits are aligned groups of the gradient, of the target"""
    WEIGHT: bool
    PRIOR: bool
    SOFT: bool
    """the target is a probability per class"""
    FINITE: bool
    STATS: int
    """0, 1 (nll and prediction), 2 (entropy too) or 4 (variance and Σ p² too)"""
    SPREAD: bool = False
    """Σ exp·(z - m) is asked for: by the entropy, or by a penalty"""
    OF_TARGET: bool = False
    """the gradient is that in the target"""


class Block(NamedTuple):
    """Classes in registers: z; t, or whether it is the target's class; w and u, or 1; dz/dx without logit_scale."""

    z: Any
    t: Any
    w: Any
    u: Any
    slope: Any


class Piece(NamedTuple):
    """Sums over some classes; those that the structure does not need are 0."""

    m: Any
    """max z"""
    s: Any
    """Σ exp(z - m)"""
    h: Any
    h2: Any
    """Σ exp(z - m)·(z - m) and Σ exp(z - m)·(z - m)²"""
    e2: Any
    """Σ exp(z - m)²"""
    n: Any
    """Σ u·c; used with ``finite``"""
    rest: Any
    rest_d: Any
    """Σ w·u·c and Σ w·u·c·(z - m)"""
    soft: Any
    soft_d: Any
    """the same of w·t"""
    plain: Any
    plain_d: Any
    """the same of t"""
    k: Any
    """the lowest class with z = m"""


@triton.jit
def exp2(x):
    """2ˣ as one instruction of the GPU, to 2 ulp, what is below the normal numbers being 0. ``tl.exp`` takes five more
    for those. The interpreter, which runs no assembler, has its own."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def weights(e, n, others):
    """(a, b) of q = w·(a·t + b·u·c): a = 1 - e, b = e/n; ``others`` spreads over n - 1 classes, without the target."""
    e = tl.where(others != 0, tl.where(n > 1, e * n / (n - 1), 0.0), e)
    return 1.0 - e, tl.where(n != 0, e / n, 0.0)


@triton.jit
def term(weight, value):
    """weight·value, and 0 where the weight is 0: a class without weight contributes nothing even at z = -inf."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def _reciprocal(x):
    """1/x as one instruction of the GPU, to 1 ulp."""
    if INTERPRETED:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _tanh(y):
    """(tanh, its slope), from e = exp(-2|y|): the value to a few ulp, by a polynomial (Cephes) near 0, where 1 - e
    would cancel; the slope as 4e/(1 + e)², since 1 - tanh² loses its digits where the slope is small."""
    a = tl.abs(y)
    e = exp2(a * (-2.0 * LOG2E))
    r = _reciprocal(1.0 + e)
    v = y * y
    near = tl.fma(tl.fma(v, -5.70498872745e-3, 2.06390887954e-2), v, -5.37397155531e-2)
    near = tl.fma(tl.fma(near, v, 1.33314422036e-1), v, -3.33332819422e-1)
    value = tl.where(a < 0.625, tl.fma(a * v, near, a), (1.0 - e) * r)
    return tl.where(y < 0, -value, value), 4.0 * e * r * r


@triton.jit
def transform(x, logit_scale, softcap):
    """(z, cap') of z = cap(logit_scale·x); -inf is not capped."""
    z = x if logit_scale is None else x * logit_scale
    slope = 1.0
    if softcap is not None:
        tanh, slope = _tanh(tl.where(z == float("-inf"), 0.0, z * (1.0 / softcap)))
        z = tl.where(z == float("-inf"), z, softcap * tanh)
    return z, slope


@triton.jit
def reference_point(m):
    """What a piece is shifted by: its maximum, or 0 where that is -inf, since (-inf) - (-inf) is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exp_shifted(z, m):
    return exp2((z - reference_point(m)) * LOG2E)


@triton.jit
def spread(b, S: tl.constexpr):
    """u·c, what smoothing is spread over."""
    return tl.where(b.z > float("-inf"), b.u, 0.0) if S.FINITE else b.u


@triton.jit
def target_weights(b, a, b_rest, S: tl.constexpr):
    """q, with b_rest = e/n."""
    b_rest = b_rest * spread(b, S)
    b_q = a * b.t + b_rest if S.SOFT else tl.where(b.t, a + b_rest, b_rest)
    return b.w * b_q


@triton.jit
def nothing():
    """The piece of no classes."""
    m = float("-inf")
    k = 1073741824
    zero = 0.0
    return Piece(m, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, k)


@triton.jit
def _sums(b_weight, b_down):
    return tl.sum(b_weight, 0), tl.sum(term(b_weight, b_down), 0)


@triton.jit
def nothing_of(LANES: tl.constexpr):
    """The pieces of lanes that have seen no class."""
    zero = tl.zeros([LANES], tl.float32)
    none = nothing()
    k = tl.zeros([LANES], tl.int32) + none.k
    return Piece(zero + none.m, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, zero, k)


@triton.jit
def of_lanes(b, LANES: tl.constexpr, VEC: tl.constexpr):
    """A block as [., LANES, VEC]: what a thread holds of it, every LANES-th group, stands along the first and the last
    dimension."""
    return tl.reshape(b, [b.numel // (LANES * VEC), LANES, VEC])


@triton.jit
def lane_sum(b, LANES: tl.constexpr, VEC: tl.constexpr):
    return tl.sum(tl.sum(of_lanes(b, LANES, VEC), 2), 0)


@triton.jit
def absorb(p, b, o, m_o, n, LANES: tl.constexpr, VEC: tl.constexpr, S: tl.constexpr):
    """The pieces p of the lanes with a block merged in, each lane with what it holds of it: none waits for another. o
    are the classes; m_o, unless None, leaves the first n of them and masks others, which are -inf and weigh 0."""
    b_z = of_lanes(b.z, LANES, VEC)
    m = tl.maximum(p.m, tl.max(tl.max(b_z, 2), 0))
    b_down = b_z - reference_point(m)[None, :, None]
    b_exp = exp2(b_down * LOG2E)
    held = o.numel // LANES
    if m_o is not None:
        b_mask = of_lanes(m_o, LANES, VEC)
        b_down = tl.where(b_mask, b_down, 0.0)
        held = tl.cdiv(tl.maximum(n // VEC - tl.arange(0, LANES), 0), LANES) * VEC
    r = rescaled(p, m)
    k, h, h2, e2, covered = r.k, r.h, r.h2, r.e2, r.n
    soft, soft_d, plain, plain_d = r.soft, r.soft_d, r.plain, r.plain_d
    if S.STATS > 0:
        hit = b_z == m[None, :, None]
        if m_o is not None:
            hit = hit & b_mask
        k = tl.min(tl.min(tl.where(hit, of_lanes(o, LANES, VEC), 1073741824), 2), 0)
        k = tl.where(m > p.m, k, tl.minimum(k, p.k))
    if S.SPREAD:
        b_h = term(b_exp, b_down)
        h += tl.sum(tl.sum(b_h, 2), 0)
        if S.STATS > 2:
            h2 += tl.sum(tl.sum(term(b_h, b_down), 2), 0)
            e2 += tl.sum(tl.sum(b_exp * b_exp, 2), 0)
    rest, rest_d = r.rest, r.rest_d
    if S.WEIGHT or S.PRIOR or S.FINITE:
        b_rest = of_lanes(b.w * spread(b, S), LANES, VEC)
        rest += tl.sum(tl.sum(b_rest, 2), 0)
        rest_d += tl.sum(tl.sum(term(b_rest, b_down), 2), 0)
        if S.FINITE:
            covered = covered + lane_sum(spread(b, S), LANES, VEC) if S.WEIGHT else rest
    else:
        rest += held
        rest_d += tl.sum(tl.sum(b_down, 2), 0)
    if S.SOFT:
        b_soft = of_lanes(b.w * b.t, LANES, VEC)
        soft += tl.sum(tl.sum(b_soft, 2), 0)
        soft_d += tl.sum(tl.sum(term(b_soft, b_down), 2), 0)
        if S.STATS > 0:
            b_plain = of_lanes(b.t, LANES, VEC)
            plain += tl.sum(tl.sum(b_plain, 2), 0)
            plain_d += tl.sum(tl.sum(term(b_plain, b_down), 2), 0)
    s = r.s + tl.sum(tl.sum(b_exp, 2), 0)
    return Piece(m, s, h, h2, e2, covered, rest, rest_d, soft, soft_d, plain, plain_d, k)


@triton.jit
def piece(b, o, m_o, n, VEC: tl.constexpr, S: tl.constexpr):
    """The piece of one block of n classes, whose masked lanes hold -inf and weights of 0; k is a position of o."""
    p = nothing()
    k, h, h2, e2, covered = p.k, p.h, p.h2, p.e2, p.n
    soft, soft_d, plain, plain_d = p.soft, p.soft_d, p.plain, p.plain_d
    m = tl.max(b.z, 0)
    b_exp = exp_shifted(b.z, m)
    b_down = tl.where(m_o, b.z - reference_point(m), 0.0)
    if S.STATS > 0:
        k = first_index(b.z, m, o, m_o, VEC)
    if S.SPREAD:
        b_h = term(b_exp, b_down)
        h = tl.sum(b_h, 0)
        if S.STATS > 2:
            h2, e2 = tl.sum(term(b_h, b_down), 0), tl.sum(b_exp * b_exp, 0)
    if S.WEIGHT or S.PRIOR or S.FINITE:
        rest, rest_d = _sums(b.w * spread(b, S), b_down)
        if S.FINITE:
            covered = tl.sum(spread(b, S), 0) if S.WEIGHT else rest
    else:
        rest, rest_d = n.to(tl.float32), tl.sum(b_down, 0)
    if S.SOFT:
        soft, soft_d = _sums(b.w * b.t, b_down)
        if S.STATS > 0:
            plain, plain_d = _sums(b.t, b_down)
    return Piece(m, tl.sum(b_exp, 0), h, h2, e2, covered, rest, rest_d, soft, soft_d, plain, plain_d, k)


@triton.jit
def rescaled(p, m):
    """A piece seen from a maximum m >= p.m, its own m and k as they are. A NaN in s survives the factor 0 of -inf; an
    empty piece has p.m = -inf, and 0·(-inf) is NaN: hence ``term``."""
    down = p.m - reference_point(m)
    factor = exp_shifted(p.m, m)
    s, h, e2 = p.s * factor, (p.h + term(p.s, down)) * factor, p.e2 * factor * factor
    h2 = (p.h2 + term(2.0 * p.h + term(p.s, down), down)) * factor
    rest_d, soft_d, plain_d = p.rest_d + term(p.rest, down), p.soft_d + term(p.soft, down), p.plain_d
    plain_d += term(p.plain, down)
    return Piece(p.m, s, h, h2, e2, p.n, p.rest, rest_d, p.soft, soft_d, p.plain, plain_d, p.k)


@triton.jit
def numbered(p, k):
    """A piece whose class of the maximum has this number."""
    rest, rest_d, soft, soft_d = p.rest, p.rest_d, p.soft, p.soft_d
    return Piece(p.m, p.s, p.h, p.h2, p.e2, p.n, rest, rest_d, soft, soft_d, p.plain, p.plain_d, k)


@triton.jit
def merge(p, r):
    """Two pieces together."""
    m = tl.maximum(p.m, r.m)
    k = tl.where(p.m == r.m, tl.minimum(p.k, r.k), tl.where(r.m > p.m, r.k, p.k))
    p = rescaled(p, m)
    r = rescaled(r, m)
    rest, rest_d, soft, soft_d = p.rest + r.rest, p.rest_d + r.rest_d, p.soft + r.soft, p.soft_d + r.soft_d
    h, h2, e2 = p.h + r.h, p.h2 + r.h2, p.e2 + r.e2
    return Piece(
        m, p.s + r.s, h, h2, e2, p.n + r.n, rest, rest_d, soft, soft_d, p.plain + r.plain, p.plain_d + r.plain_d, k
    )


@triton.jit
def merge_all(b, m_b):
    """A block of pieces together."""
    m = tl.max(b.m, 0)
    r = rescaled(b, m)
    s, h, h2, e2, n = tl.sum(r.s, 0), tl.sum(r.h, 0), tl.sum(r.h2, 0), tl.sum(r.e2, 0), tl.sum(r.n, 0)
    rest, rest_d = tl.sum(r.rest, 0), tl.sum(r.rest_d, 0)
    soft, soft_d, plain, plain_d = tl.sum(r.soft, 0), tl.sum(r.soft_d, 0), tl.sum(r.plain, 0), tl.sum(r.plain_d, 0)
    return Piece(m, s, h, h2, e2, n, rest, rest_d, soft, soft_d, plain, plain_d, first_index(b.m, m, b.k, m_b, 1))


@triton.jit
def first_index(b_z, m, o, m_z, VEC: tl.constexpr):
    """The lowest of the positions o whose z equals m, or 2³⁰ and more; groups, then lanes: see ``equals``."""
    hit = m_z & (b_z == m)
    group = tl.min(tl.where(hit, o // VEC, 1073741824 // VEC), 0)
    return group * VEC + tl.min(tl.where(hit & (o // VEC == group), o % VEC, VEC - 1), 0)


@triton.jit
def with_target(p, z_y, w_y):
    """A whole row with the sums over its index target, whose logit and weight these are."""
    down = z_y - p.m
    return Piece(p.m, p.s, p.h, p.h2, p.e2, p.n, p.rest, p.rest_d, w_y, term(w_y, down), 1.0, down, p.k)


@triton.jit
def row_loss(p, logsum, mass, a, b, z_loss):
    """M·logsum - Σ q·(z - zmax) + z_loss·lse²."""
    lse = p.m + logsum
    return mass * logsum - (term(a, p.soft_d) + term(b, p.rest_d)) + term(z_loss, lse * lse)


@triton.jit
def entropy(p, logsum):
    """-Σ exp·log p of a whole row."""
    return logsum - p.h / p.s


@triton.jit
def variance(p):
    """Σ p·z² - (Σ p·z)²; the class of the maximum alone makes it at least mean²/K about the maximum."""
    mean = p.h / p.s
    found = p.h2 / p.s - mean * mean
    return tl.where(found < 0.0, 0.0, found)


@triton.jit
def dz(b, row, penalty, S: tl.constexpr):
    """factor·((M + 2·z_loss·lse + penalty·(H + log p))·p - q), without penalty·log p the first one being row.mass. A
    row of all -inf has no p: its zmax is used as it is, so that every entry becomes NaN."""
    b_down = b.z - row.zmax
    b_q = row.factor * target_weights(b, row.a, row.b, S)
    if penalty is None:
        b_p = exp2(tl.fma(b_down, LOG2E, -row.logsum * LOG2E))
        b_dz = tl.fma(b_p, row.factor * row.mass, -b_q)
    else:
        b_log = b_down - row.logsum
        b_mass = row.mass + penalty * tl.where(b_log < -1e4, -1e4, b_log)  # finite where p is 0
        b_dz = row.factor * b_mass * exp2(b_log * LOG2E) - b_q
    return b_dz


@triton.jit
def dt(b, row, S: tl.constexpr):
    """The gradient in the target's probabilities, (1 - e)·w·(logsum - (z - zmax))."""
    b_q = target_weights(b, row.a, row.b, S)
    b_down = tl.where((b_q == 0.0) & (b.z == float("-inf")), 0.0, b.z - row.zmax)
    return row.a * b.w * (row.logsum - b_down)
