"""The kernels: loss and gradient of the rows of logits, one read and one write of them.

``row_kernel`` makes loss and gradient: a row that fits the registers of one program (a thread block, or a cluster of
them) is read once and written once; a longer one is read a second time, in reverse, while its end is still in L2.
``split_kernel`` and ``merge_kernel`` spread few long rows over all SMs. ``grad_kernel`` makes the gradient from the
saved (zmax, logsum). ``scale_kernel`` multiplies a gradient. A pointer that is None is the flag of what is not asked
for; only structure is a compile-time constant. Row offsets are int64: N·K passes 2³² in use.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .row_math import dz, first_index, merge, merge_index, piece, rescaled, row_loss, weights
from .rows import cut, edges, equals, load, main_of_grad

if TYPE_CHECKING:
    from collections.abc import Callable


def _kernel(fn: Callable[..., None]) -> Any:
    """Compile per structure only: no number that a kernel is given, such as N or ε, makes it compile again."""
    numbers = (p for p in inspect.signature(fn).parameters.values() if p.annotation is p.empty)
    return triton.jit(fn, do_not_specialize=[p.name for p in numbers if not p.name.endswith("_ptr")])


@triton.jit
def _row(target_ptr, i_row, eps, eps_ptr, eps_stride, ignore_index, K):
    """(y, live, valid, a, b): live unless ignored; y is -1 unless valid, so no address is made from it unchecked."""
    y = tl.load(target_ptr + i_row)
    live = y != ignore_index
    valid = live & (y >= 0) & (y < K)
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + eps_stride.to(tl.int64) * i_row).to(tl.float32)
    a, b = weights(eps, K)
    return tl.where(valid, y, -1).to(tl.int32), live, valid, a, b


@triton.jit
def _factor(scale_ptr, scale_stride, i_row, valid):
    """What the gradient of the row is multiplied by; NaN for an invalid target."""
    factor = 1.0
    if scale_ptr is not None:
        factor = tl.load(scale_ptr + scale_stride.to(tl.int64) * i_row).to(tl.float32)
    return tl.where(valid, factor, float("nan"))


@triton.jit
def _store_grad(ptr, b_z, is_target, mask, row, factor, zmax, logsum):
    """The gradient of one block, rounded once; exact zeros, by selection, in an ignored row."""
    _y, live, _valid, a, b = row
    b_grad = factor * dz(b_z, zmax, logsum, is_target, a, b)
    tl.store(ptr, tl.where(live, b_grad, 0.0).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _grad_edges(x_row, g_row, head, n_main, K, row, factor, zmax, logsum, VEC: tl.constexpr):
    k_edge, m_edge = edges(head, n_main, K, VEC)
    b_edge = load(x_row + k_edge, m_edge & (k_edge < tl.where(row[1], K, 0)))
    _store_grad(g_row + k_edge, b_edge, k_edge == row[0], m_edge, row, factor, zmax, logsum)


@triton.jit
def _store_row(loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr, i_row, row, zmax, logsum, z_y, d, k_max, K):
    _y, live, valid, a, b = row
    loss = tl.where(valid, row_loss(zmax, logsum, z_y, d, a, b), float("nan"))
    tl.store(loss_ptr + i_row, tl.where(live, loss, 0.0))
    if nll_ptr is None:
        zmax = tl.where(live, zmax, 0.0)
        logsum = tl.where(live, logsum, 0.0)
    else:
        nll = tl.where(valid, logsum - (z_y - zmax), float("nan"))
        tl.store(nll_ptr + i_row, tl.where(live, nll, 0.0))
        tl.store(pred_ptr + i_row, tl.minimum(k_max, K - 1).to(tl.int64))  # a row of NaN has no maximum: stay inside
    tl.store(zmax_ptr + i_row, zmax)
    tl.store(logsum_ptr + i_row, logsum)


@triton.jit
def _absorb(b_z, o, end, head, n_block, m, s, d, n, k_max, VEC: tl.constexpr, WITH_STATS: tl.constexpr):
    """The piece (m, s, d) of n classes, whose first maximum is k_max, with one more block merged in."""
    m_block, s_block, d_block = piece(b_z, o < end)
    if WITH_STATS:
        k_max = merge_index(m, k_max, m_block, head + first_index(b_z, m_block, o, o < end, VEC))
    m, s, d = merge(m, s, d, n, m_block, s_block, d_block, n_block)
    return m, s, d, n + n_block, k_max


@triton.jit
def _edge_piece(x_row, head, n_main, K, VEC: tl.constexpr, EDGES: tl.constexpr, WITH_STATS: tl.constexpr):
    """The piece that a sweep starts from: the edges of the row, or nothing."""
    m, s, d, k_max = float("-inf"), 0.0, 0.0, 1073741824
    if EDGES:
        k_edge, m_edge = edges(head, n_main, K, VEC)
        b_edge = load(x_row + k_edge, m_edge)
        m, s, d = piece(b_edge, m_edge)
        if WITH_STATS:
            k_max = first_index(b_edge, m, k_edge, m_edge, 1)
    return m, s, d, K - n_main, k_max


@triton.jit
def _sweep(
    x_main, begin, end, head, m, s, d, n, k_max, BLOCK: tl.constexpr, VEC: tl.constexpr, WITH_STATS: tl.constexpr
):
    """Merge the elements [begin, end) of the groups of a row, block by block, into the piece (m, s, d)."""
    for o_block in range(begin, end, BLOCK):
        o = o_block + tl.arange(0, BLOCK)
        b_z = load(x_main + o, o < end)
        n_block = tl.minimum(end - o_block, BLOCK)
        m, s, d, n, k_max = _absorb(b_z, o, end, head, n_block, m, s, d, n, k_max, VEC, WITH_STATS)
    return m, s, d, n, k_max


@_kernel
def row_kernel(
    x_ptr, grad_ptr, target_ptr, eps, eps_ptr, scale_ptr, loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr,
    n_rows, K, x_lead, x_stride, g_lead, g_stride, eps_stride, scale_stride, ignore_index,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, G_ALIGNED: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and, unless grad_ptr is None, gradient of whole rows; grad may be x. Moves one read and one write of the
    logits with ONE_BLOCK, else a second read, served by L2 in part. Persistent: each program takes many rows."""
    WITH_STATS: tl.constexpr = nll_ptr is not None
    for i_row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = _row(target_ptr, i_row, eps, eps_ptr, eps_stride, ignore_index, K)
        y, live, valid, _a, _b = row
        start = x_lead + x_stride.to(tl.int64) * i_row
        z_y = tl.load(x_ptr + start + y, mask=valid, other=0.0).to(tl.float32)  # before a gradient may overwrite it
        k_read = K if WITH_STATS else tl.where(live, K, 0)
        head, first, n_read = cut(start, k_read, VEC)
        x_main = x_ptr + first
        m, s, d, n, k_max = _edge_piece(x_ptr + start, head, n_read, k_read, VEC, EDGES, WITH_STATS)
        o = tl.arange(0, BLOCK)
        if ONE_BLOCK:
            b_z = load(x_main + o, o < n_read)
            m, s, d, n, k_max = _absorb(b_z, o, n_read, head, n_read, m, s, d, n, k_max, VEC, WITH_STATS)
        else:
            m, s, d, n, k_max = _sweep(x_main, 0, n_read, head, m, s, d, n, k_max, BLOCK, VEC, WITH_STATS)
        logsum = tl.log(s)
        _store_row(loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr, i_row, row, m, logsum, z_y, d, k_max, K)
        if grad_ptr is not None:
            factor = _factor(scale_ptr, scale_stride, i_row, valid)
            head, _first, n_main = cut(start, K, VEC)
            g_start = g_lead + g_stride.to(tl.int64) * i_row
            g_main = grad_ptr + main_of_grad(g_start, head, VEC, G_ALIGNED)
            if ONE_BLOCK:
                _store_grad(g_main + o, b_z, equals(o, y - head, VEC), o < n_main, row, factor, m, logsum)
            else:
                n_blocks = tl.cdiv(n_main, BLOCK)
                for i_block in range(n_blocks):
                    o_back = (n_blocks - 1 - i_block) * BLOCK + o
                    b_z = load(x_main + o_back, o_back < n_read)
                    is_target = equals(o_back, y - head, VEC)
                    _store_grad(g_main + o_back, b_z, is_target, o_back < n_main, row, factor, m, logsum)
            if EDGES:
                _grad_edges(x_ptr + start, grad_ptr + g_start, head, n_main, K, row, factor, m, logsum, VEC)


@_kernel
def split_kernel(
    x_ptr, target_ptr, part_ptr, k_part_ptr, n_units, n_splits, blocks_per_split, K, x_lead, x_stride, ignore_index,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """(m, s, d, n) of one of n_splits parts of a row into part (4, N, n_splits), its first maximum into k_part: one
    read of the logits, by more programs than there are rows. Part 0 takes the edges."""
    WITH_STATS: tl.constexpr = k_part_ptr is not None
    i_unit = tl.program_id(0).to(tl.int64)
    i_row = i_unit // n_splits
    i_split = (i_unit % n_splits).to(tl.int32)
    k_read = K if WITH_STATS else tl.where(tl.load(target_ptr + i_row) != ignore_index, K, 0)
    start = x_lead + x_stride.to(tl.int64) * i_row
    head, first, n_edge = cut(start, tl.where(i_split == 0, k_read, 0), VEC)
    m, s, d, n, k_max = _edge_piece(
        x_ptr + start, head, n_edge, tl.where(i_split == 0, k_read, 0), VEC, EDGES, WITH_STATS
    )
    head, first, n_read = cut(start, k_read, VEC)
    begin = i_split * blocks_per_split * BLOCK
    end = tl.minimum(begin + blocks_per_split * BLOCK, n_read)
    m, s, d, n, k_max = _sweep(x_ptr + first, begin, end, head, m, s, d, n, k_max, BLOCK, VEC, WITH_STATS)
    tl.store(part_ptr + i_unit, m)
    tl.store(part_ptr + n_units + i_unit, s)
    tl.store(part_ptr + 2 * n_units + i_unit, d)
    tl.store(part_ptr + 3 * n_units + i_unit, n.to(tl.float32))
    if WITH_STATS:
        tl.store(k_part_ptr + i_unit, k_max)


@_kernel
def merge_kernel(
    x_ptr, target_ptr, eps, eps_ptr, part_ptr, k_part_ptr, loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr,
    n_units, n_splits, K, x_lead, x_stride, eps_stride, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """The parts of a row, merged into its loss and statistics: a few hundred bytes per row, one program each."""
    i_row = tl.program_id(0).to(tl.int64)
    row = _row(target_ptr, i_row, eps, eps_ptr, eps_stride, ignore_index, K)
    y, _live, valid, _a, _b = row
    z_y = tl.load(x_ptr + x_lead + x_stride * i_row + y, mask=valid, other=0.0).to(tl.float32)
    o = tl.arange(0, BLOCK)
    m_part = o < n_splits
    part_ptr += i_row * n_splits + o
    b_m = tl.load(part_ptr, mask=m_part, other=float("-inf"))
    b_s = tl.load(part_ptr + n_units, mask=m_part, other=0.0)
    b_d = tl.load(part_ptr + 2 * n_units, mask=m_part, other=0.0)
    b_n = tl.load(part_ptr + 3 * n_units, mask=m_part, other=0.0)
    zmax = tl.max(b_m, 0)
    b_s, b_d = rescaled(b_m, b_s, b_d, b_n, zmax)
    k_max = 0
    if nll_ptr is not None:
        b_k = tl.load(k_part_ptr + i_row * n_splits + o, mask=m_part, other=1073741824)
        k_max = first_index(b_m, zmax, b_k, m_part, 1)
    logsum = tl.log(tl.sum(b_s, 0))
    _store_row(
        loss_ptr, zmax_ptr, logsum_ptr, nll_ptr, pred_ptr, i_row, row, zmax, logsum, z_y, tl.sum(b_d, 0), k_max, K
    )


@_kernel
def grad_kernel(
    x_ptr, grad_ptr, target_ptr, eps, eps_ptr, scale_ptr, zmax_ptr, logsum_ptr,
    n_units, n_chunks, K, x_lead, x_stride, g_lead, g_stride, eps_stride, scale_stride, ignore_index,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr, G_ALIGNED: tl.constexpr,
):  # fmt: skip
    """The gradient from the saved (zmax, logsum), one read and one write; grad may be x. No reduction, so a unit of
    work is a chunk of a row and the grid is full at every N; chunk 0 takes the edges."""
    for i_unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
        i_row = i_unit // n_chunks
        i_chunk = i_unit % n_chunks
        row = _row(target_ptr, i_row, eps, eps_ptr, eps_stride, ignore_index, K)
        y, live, valid, _a, _b = row
        factor = _factor(scale_ptr, scale_stride, i_row, valid)
        zmax = tl.load(zmax_ptr + i_row)
        logsum = tl.load(logsum_ptr + i_row)
        start = x_lead + x_stride.to(tl.int64) * i_row
        head, first, n_main = cut(start, K, VEC)
        g_start = g_lead + g_stride.to(tl.int64) * i_row
        o = (i_chunk * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
        b_z = load(x_ptr + first + o, o < tl.where(live, n_main, 0))
        g_main = grad_ptr + main_of_grad(g_start, head, VEC, G_ALIGNED)
        _store_grad(g_main + o, b_z, equals(o, y - head, VEC), o < n_main, row, factor, zmax, logsum)
        if EDGES and i_chunk == 0:
            _grad_edges(x_ptr + start, grad_ptr + g_start, head, n_main, K, row, factor, zmax, logsum, VEC)


@triton.jit
def _scale_block(ptr, mask, scale):
    b_grad = tl.load(ptr, mask=mask).to(tl.float32) * scale
    tl.store(ptr, b_grad.to(ptr.dtype.element_ty), mask=mask)


@_kernel
def scale_kernel(
    grad_ptr, scale_ptr, n_units, n_chunks, K, g_lead, g_stride,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """grad *= scale on the device: one read and one write, or nothing where the scale is 1, without a host sync.
    A contiguous gradient is one long row here, so K may exceed 2³¹ and positions inside a row are int64."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for i_unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
            i_row = i_unit // n_chunks
            i_chunk = i_unit % n_chunks
            start = g_lead + g_stride.to(tl.int64) * i_row
            head, first, n_main = cut(start, K, VEC)
            o_chunk = i_chunk.to(tl.int64) * BLOCK
            o = tl.arange(0, BLOCK)
            m_o = o < tl.minimum(n_main - o_chunk, BLOCK).to(tl.int32)
            _scale_block(grad_ptr + first + o_chunk + o, m_o, scale)
            if EDGES and i_chunk == 0:
                k_edge, m_edge = edges(head, n_main, K, VEC)
                _scale_block(grad_ptr + start + k_edge, m_edge, scale)
