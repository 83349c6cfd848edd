"""Loss and gradient of logits (N, K), one read and one write of the row; the contract is ``labelsmooth_kernels.ops``.

Four kernels. ``_row_kernel`` makes loss and gradient: a row that fits the registers of one program (a thread block, or a
thread-block cluster) is read once and written once; a longer one is read a second time, in reverse, while its end is still in
L2. ``_split_kernel`` and ``_merge_kernel`` spread few long rows over all SMs. ``_grad_kernel`` makes the gradient from the saved
(zmax, logsum). ``_scale_kernel`` multiplies a gradient. Which form and size runs is decided in ``launch``; an argument
that is None is the flag of what is not asked for, everything else that can vary is a run-time value.

128-bit accesses at every K and alignment: pointers come 16-byte aligned with a ``lead`` in elements, a row is cut into
the VEC-wide groups that lie wholly inside it and at most 2·(VEC - 1) edge elements before and after them. The groups are whole
vectors, whose mask is constant over each; the edges take one 2·VEC-lane access of their own. So nothing outside a row is touched, and
an unaligned row (K = 50,257) costs one or two extra narrow instructions and no further bytes: the edges lie in
sectors that a row of this length covers anyway. EDGES = False drops that code where every row is aligned.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .row_math import dz, first_index, merge, merge_index, piece, rescaled, row_loss, weights


@triton.jit
def _cut(start, K, VEC: tl.constexpr):
    """(head, first, n_main) of the row at element ``start``: its classes [head, head + n_main) are whole groups, at ``first``."""
    first = (start + (VEC - 1)) // VEC * VEC
    head = tl.minimum(first - start, K).to(tl.int32)
    return head, first, (K - head) // VEC * VEC


@triton.jit
def _edges(head, n_main, K, VEC: tl.constexpr):
    """Classes and mask of the lanes that take the edges: VEC lanes before the groups, VEC after them."""
    o_edge = tl.arange(0, 2 * VEC)
    k_edge = tl.where(o_edge < VEC, o_edge, head + n_main + o_edge - VEC)
    return k_edge, tl.where(o_edge < VEC, o_edge < head, k_edge < K)


@triton.jit
def _load(ptr, mask):
    return tl.load(ptr, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def _target(target_ptr, i_row, ignore_index, K):
    """(y, ignored, valid); y is -1 unless it may be used as an index: no address is made from an unchecked target."""
    y = tl.load(target_ptr + i_row)
    ignored = y == ignore_index
    valid = (y >= 0) & (y < K) & (y != ignore_index)
    return tl.where(valid, y, -1).to(tl.int32), ignored, valid


@triton.jit
def _row_weights(eps, eps_ptr, eps_stride, i_row, K):
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + i_row * eps_stride).to(tl.float32)
    return weights(eps, K)


@triton.jit
def _factor(scale_ptr, scale_stride, i_row, ignored, valid):
    """What the gradient of the row is multiplied by; NaN for an invalid target."""
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + i_row * scale_stride).to(tl.float32)
    return tl.where(ignored | valid, factor, float("nan"))


@triton.jit
def _store_grad(ptr, b_z, b_k, mask, y, ignored, factor, zmax, logsum, a, b):
    """The gradient of one block, rounded once; exact zeros, by selection, in an ignored row."""
    b_grad = factor * dz(b_z, zmax, logsum, b_k == y, a, b)
    tl.store(ptr, tl.where(ignored, 0.0, b_grad).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_row(
    loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr, i_row, ignored, valid, reads, zmax, logsum, z_y, d, k_max, a, b, K
):
    loss = tl.where(valid, row_loss(zmax, logsum, z_y, d, a, b), float("nan"))
    tl.store(loss_ptr + i_row, tl.where(ignored, 0.0, loss))
    tl.store(zmax_ptr + i_row, tl.where(reads, zmax, 0.0))
    tl.store(logsum_ptr + i_row, tl.where(reads, logsum, 0.0))
    if nll_ptr is not None:
        tl.store(nll_ptr + i_row, tl.where(ignored, 0.0, tl.where(valid, logsum - (z_y - zmax), float("nan"))))
        tl.store(pred_ptr + i_row, tl.minimum(k_max, K - 1).to(tl.int64))  # a row of NaN has no maximum: stay inside


@triton.jit
def _first_piece(x_row, head, n_main, K, reads, VEC: tl.constexpr, EDGES: tl.constexpr):
    """The piece that a sweep starts from: the edges of the row, or nothing. ``reads`` is false where the row is not to be read."""
    m, s, d, n, k_max = float("-inf"), 0.0, 0.0, 0, 2147483647
    if EDGES:
        k_edge, m_edge = _edges(head, n_main, K, VEC)
        m_edge = m_edge & reads
        b_edge = _load(x_row + k_edge, m_edge)
        m, s, d = piece(b_edge, m_edge)
        n, k_max = K - n_main, first_index(b_edge, m, k_edge, m_edge)
    return m, s, d, n, k_max


@triton.jit
def _sweep(x_main, begin, end, head, m, s, d, n, k_max, BLOCK: tl.constexpr):
    """Merge the groups [begin, end) of a row, block by block, into the piece (m, s, d) of n classes; ends are multiples of VEC."""
    for o_block in range(begin, end, BLOCK):
        o = o_block + tl.arange(0, BLOCK)
        m_z = o < end
        b_z = _load(x_main + o, m_z)
        m_block, s_block, d_block = piece(b_z, m_z)
        k_max = merge_index(m, k_max, m_block, first_index(b_z, m_block, head + o, m_z))
        n_block = tl.minimum(end - o_block, BLOCK)
        m, s, d = merge(m, s, d, n, m_block, s_block, d_block, n_block)
        n += n_block
    return m, s, d, n, k_max
