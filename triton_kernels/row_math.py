"""The maths of a row on the device, under the names of ``labelsmooth_kernels.reference``, which derives it. float32.

A piece of a row is (m, s, d) = (max z, Σ exp(z - m), Σ (z - m)) over n classes; pieces merge by (max, rescaled sum,
re-shifted sum), so two large numbers are never subtracted, and (zmax, logsum) stay two numbers to the end. A piece that
is all -inf contributes exactly nothing to s. ``tl.max`` drops a NaN: it is s that carries it, into logsum and thence
into the loss and every entry of the gradient.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

import triton
import triton.language as tl


@triton.jit
def weights(e, K):
    """(a, b) of q = a·[k = y] + b: a = 1 - e, b = e/K."""
    return 1.0 - e, e / K


@triton.jit
def reference_point(m):
    """What a piece is shifted by: its maximum, or 0 where that is -inf, since (-inf) - (-inf) is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def exp_shifted(z, m):
    return tl.exp(z - reference_point(m))


@triton.jit
def piece(b_z, m_z):
    """(m, s, d) of one block, whose masked lanes hold -inf."""
    m = tl.max(b_z, 0)
    shifted_sum = tl.sum(tl.where(m_z, b_z - reference_point(m), 0.0), 0)
    return m, tl.sum(exp_shifted(b_z, m), 0), shifted_sum


@triton.jit
def rescaled(m1, s1, d1, n1, m):
    """(s, d) of a piece of n1 classes, seen from a maximum m >= m1. A NaN in s1 survives the factor 0 of m1 = -inf."""
    moved = tl.where(n1 == 0, 0.0, n1 * (m1 - reference_point(m)))  # an empty piece has m1 = -inf, and 0·(-inf) is NaN
    return s1 * exp_shifted(m1, m), d1 + moved


@triton.jit
def merge(m1, s1, d1, n1, m2, s2, d2, n2):
    """(m, s, d) of two pieces together."""
    m = tl.maximum(m1, m2)
    s1, d1 = rescaled(m1, s1, d1, n1, m)
    s2, d2 = rescaled(m2, s2, d2, n2, m)
    return m, s1 + s2, d1 + d2


@triton.jit
def first_index(b_z, m, o, m_z, VEC: tl.constexpr):
    """The lowest of the positions o whose z equals m, or 2³⁰ and more; groups, then lanes: see ``equals``."""
    hit = m_z & (b_z == m)
    group = tl.min(tl.where(hit, o // VEC, 1073741824 // VEC), 0)
    return group * VEC + tl.min(tl.where(hit & (o // VEC == group), o % VEC, VEC - 1), 0)


@triton.jit
def merge_index(m1, k1, m2, k2):
    return tl.where(m1 == m2, tl.minimum(k1, k2), tl.where(m2 > m1, k2, k1))


@triton.jit
def term(weight, value):
    """weight·value, and 0 where the weight is 0: a class without weight contributes nothing even at z = -inf."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def row_loss(zmax, logsum, z_y, d, a, b):
    """logsum - Σ q·(z - zmax), with d = Σ (z - zmax)."""
    return logsum - (term(a, z_y - zmax) + term(b, d))


@triton.jit
def dz(b_z, zmax, logsum, is_target, a, b):
    """p - q. A row of all -inf has no p: its zmax is used as it is, so that every entry becomes NaN."""
    return tl.exp((b_z - zmax) - logsum) - tl.where(is_target, a + b, b)
