"""The kernels: loss and gradient of the rows of logits, one read and one write of them.

``row_kernel`` makes loss and gradient: a row that fits the registers of one program is read once and written once; a
longer one is read a second time, in reverse, while it is still in L2. Each thread keeps sums of its own, which are
merged once per row. ``split_kernel`` and ``merge_kernel`` spread few long rows over all SMs. ``grad_kernel`` makes a
gradient from what is saved of the rows. ``scale_kernel`` multiplies a gradient. A pointer that is None is the flag of
what is not asked for; only structure is a compile-time constant.

No class of a block is compared with the target: a gradient is written as if there were none, and then the target's
entry once more.

Pointers and floats come in named tuples. Integers do not: Triton would compile again for those that are 1 or multiples
of 16. Rows are numbered through two dimensions, n_inner of them in the second, or lie at one distance (n_inner None).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from .row_math import (
    Block,
    Piece,
    absorb,
    dt,
    dz,
    entropy,
    merge,
    merge_all,
    nothing_of,
    piece,
    row_loss,
    transform,
    variance,
    weights,
    with_target,
)
from .rows import Given, at, cut, edges, line_of, main_of, offset, read

if TYPE_CHECKING:
    from collections.abc import Callable


class Results(NamedTuple):
    """Pointers to what is made of each row."""

    loss: Any
    saved: Any
    stats: Any
    prediction: Any


class _Done(NamedTuple):
    """What the gradient of a row needs to know of all of it; ``mass`` is M + 2·z_loss·lse + penalty·H."""

    live: Any
    factor: Any
    zmax: Any
    logsum: Any
    mass: Any
    a: Any
    b: Any


def compiled_per_structure(fn: Callable[..., None]) -> Any:
    """Compile per structure only: no number that a kernel is given, such as N or ε, makes it compile again."""
    numbers = (p for p in inspect.signature(fn).parameters.values() if p.annotation is p.empty)
    return triton.jit(fn, do_not_specialize=[p.name for p in numbers if not p.name.endswith("_ptr")])


@triton.jit
def _target_class(line, given, S: tl.constexpr):
    """The target's class, read before a gradient may overwrite it."""
    z_y = 0.0
    w_y = 1.0
    u_y = 1.0
    slope = 1.0
    if not S.SOFT:
        x_y = tl.load(at(line.whole.x, line.y, given.x_step), mask=line.valid, other=0.0).to(tl.float32)
        z_y, slope = transform(x_y, given.numbers.logit_scale, given.numbers.softcap)
        if S.WEIGHT:
            w_y = tl.load(given.targets.weight + line.y, mask=line.valid, other=0.0)
        if S.PRIOR:
            u_y = tl.load(given.targets.prior + line.y, mask=line.valid, other=0.0)
    return Block(z_y, line.valid, w_y, u_y, slope)


@triton.jit
def _sweep(line, begin, end, given, BLOCK: tl.constexpr, LANES: tl.constexpr, EVICT: tl.constexpr, S: tl.constexpr):
    """The piece of the elements [begin, end) of the groups of a row: blocks without a mask, then what is left."""
    o_block = tl.arange(0, BLOCK)
    p = nothing_of(LANES)
    last = begin + (end - begin) // BLOCK * BLOCK
    for i in range(begin, last, BLOCK):
        o = i + o_block
        b = read(line.groups, o, None, given, EVICT, S)
        p = absorb(p, b, line.head + o, None, BLOCK, LANES, S.VEC, S)
    if last < end:
        o = last + o_block
        b = read(line.groups, o, o < end, given, EVICT, S)
        p = absorb(p, b, line.head + o, o < end, end - last, LANES, S.VEC, S)
    return merge_all(p, tl.arange(0, LANES) >= 0)


@triton.jit
def _with_edges(p, line, k_read, K, given, S: tl.constexpr):
    """The piece of the groups of a row with its edges merged in."""
    if S.EDGES:
        k_edge, m_edge = edges(line.head, line.n_main, K, S.VEC)
        m_edge = m_edge & (k_edge < k_read)
        b = read(line.whole, k_edge, m_edge, given, "", S)
        p = merge(piece(b, k_edge, m_edge, tl.minimum(K - line.n_main, k_read), 1, S), p)
    return p


@triton.jit
def _finish(p, line, b_y, i_row, out, given, n_rows, K, scale_stride, others, S: tl.constexpr):
    """Store what is made of a row; returns what its gradient needs."""
    if not S.SOFT:
        p = with_target(p, b_y.z, b_y.w)
    n = p.n
    if not S.FINITE:
        n = 1.0 if S.PRIOR else K.to(tl.float32)
    a, b = weights(line.eps, n, others)
    mass = 1.0
    if S.SOFT or S.WEIGHT or S.PRIOR:
        mass = a * p.soft + b * p.rest
    logsum = tl.log(p.s)
    loss = row_loss(p, logsum, mass, a, b, given.numbers.z_loss)
    if given.numbers.penalty is not None:
        given_up = given.numbers.penalty * entropy(p, logsum)
        loss -= given_up
        mass += given_up
    loss = tl.where(line.valid, loss, float("nan"))
    tl.store(out.loss + i_row, tl.where(line.live, loss, 0.0))
    o_field = tl.arange(0, 2)  # two by two: as four scalars they take half as many registers again on sm_80
    saved_ptr = out.saved + n_rows.to(tl.int64) * o_field + i_row
    tl.store(saved_ptr, tl.where(line.reads, tl.where(o_field == 0, p.m, logsum), 0.0))
    tl.store(saved_ptr + n_rows.to(tl.int64) * 2, tl.where(line.reads, tl.where(o_field == 0, mass, n), 0.0))
    if S.STATS > 0:
        nll = tl.where(line.valid, p.plain * logsum - p.plain_d, float("nan"))
        tl.store(out.stats + i_row, tl.where(line.live, nll, 0.0))
        tl.store(out.prediction + i_row, tl.minimum(p.k, K - 1).to(tl.int64))  # NaNs have no maximum: stay inside
    if S.STATS > 1:
        tl.store(out.stats + n_rows.to(tl.int64) + i_row, entropy(p, logsum))
    if S.STATS > 2:
        tl.store(out.stats + n_rows.to(tl.int64) * 2 + i_row, variance(p))
        tl.store(out.stats + n_rows.to(tl.int64) * 3 + i_row, p.e2 / (p.s * p.s))
    return _done(line, p.m, logsum, mass, a, b, i_row, given, scale_stride, S)


@triton.jit
def _done(line, zmax, logsum, mass, a, b, i_row, given, scale_stride, S: tl.constexpr):
    targets, numbers = given.targets, given.numbers
    factor = 1.0
    if targets.scale is not None:
        factor = tl.load(targets.scale + scale_stride.to(tl.int64) * i_row)
    if numbers.logit_scale is not None and not S.OF_TARGET:
        factor = factor * numbers.logit_scale
    factor = tl.where(line.valid, factor, float("nan"))
    return _Done(line.live, factor, zmax, logsum, mass + 2.0 * numbers.z_loss * (zmax + logsum), a, b)


@triton.jit
def _store_grad(ptr, b, mask, done, given, S: tl.constexpr):
    """The gradient of one block, rounded once."""
    if S.OF_TARGET:
        b_grad = done.factor * dt(b, done, S)
    else:
        b_grad = dz(b, done, given.numbers.penalty, S)
        if given.numbers.softcap is not None:
            b_grad = b_grad * b.slope
    b_grad = b_grad.to(ptr.dtype.element_ty)
    if mask is None:
        tl.store(ptr, b_grad)
    else:
        tl.store(ptr, b_grad, mask=mask)


@triton.jit
def _store_zeros(ptr, mask):
    tl.store(ptr, tl.zeros_like(mask.to(tl.float32)).to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_edges(g_row, g_step, line, K, done, given, S: tl.constexpr):
    """The gradient of the edges, exact zeros in an ignored row."""
    if S.EDGES:
        k_edge, m_edge = edges(line.head, line.n_main, K, S.VEC)
        ptr = at(g_row, k_edge, g_step)
        m_live = m_edge & (k_edge < tl.where(done.live, K, 0))
        _store_grad(ptr, read(line.whole, k_edge, m_live, given, "", S), m_live, done, given, S)
        _store_zeros(ptr, m_edge & (k_edge >= tl.where(done.live, K, 0)))


@triton.jit
def _store_target(g_row, g_step, line, b_y, mine, done, given, S: tl.constexpr):
    """The gradient of the target's class once more, over what another thread has written as if it were another."""
    if not S.SOFT:
        tl.debug_barrier()
        _store_grad(at(g_row, line.y, g_step), b_y, line.valid & mine, done, given, S)


@triton.jit
def _store_row(g_main, g_step, line, done, given, BLOCK: tl.constexpr, S: tl.constexpr):
    """The gradient of the groups of a row from its second reading, from the end, which was read last."""
    o_block = tl.arange(0, BLOCK)
    last = line.n_main // BLOCK * BLOCK
    if done.live:
        if last < line.n_main:
            o = last + o_block
            b = read(line.groups, o, o < line.n_main, given, "evict_first", S)
            _store_grad(at(g_main, o, g_step), b, o < line.n_main, done, given, S)
        for i in range(0, last, BLOCK):
            o = (last - BLOCK - i) + o_block
            b = read(line.groups, o, None, given, "evict_first", S)
            _store_grad(at(g_main, o, g_step), b, None, done, given, S)
    else:
        for i in range(0, line.n_main, BLOCK):
            o = i + o_block
            _store_zeros(at(g_main, o, g_step), o < line.n_main)


@compiled_per_structure
def row_kernel(
    x_ptr, grad_ptr, targets, out, numbers, n_rows, n_inner, K, x_lead, x_outer, x_inner, x_step,
    t_lead, t_outer, t_inner, t_step, g_lead, g_outer, g_inner, g_step, eps_stride, scale_stride, ignore_index, others,
    BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_BLOCK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Loss and, unless grad_ptr is None, gradient of whole rows; grad may be x. Moves one read and one write of the
    logits with ONE_BLOCK, else a second read, served by L2 in part. Persistent: each program takes many rows."""
    given = Given(targets, numbers, x_step, t_step)
    for i_row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        line = line_of(
            x_ptr, given, i_row, n_inner, K, x_lead, x_outer, x_inner, t_lead, t_outer, t_inner, eps_stride,
            ignore_index, S,
        )  # fmt: skip
        b_y = _target_class(line, given, S)
        n_read = tl.where(line.reads, line.n_main, 0)
        if ONE_BLOCK:
            o = tl.arange(0, BLOCK)
            b = read(line.groups, o, o < n_read, given, "", S)
            p = absorb(nothing_of(LANES), b, line.head + o, o < n_read, n_read, LANES, S.VEC, S)
            p = merge_all(p, tl.arange(0, LANES) >= 0)
        else:
            EVICT: tl.constexpr = "" if grad_ptr is None else "evict_last"
            p = _sweep(line, 0, n_read, given, BLOCK, LANES, EVICT, S)
        p = _with_edges(p, line, tl.where(line.reads, K, 0), K, given, S)
        done = _finish(p, line, b_y, i_row, out, given, n_rows, K, scale_stride, others, S)
        if grad_ptr is not None:
            g_start = offset(i_row, n_inner, g_lead, g_outer, g_inner)
            g_main = grad_ptr + main_of(g_start, line.head, g_step, S.VEC, S.G_ALIGNED)
            if ONE_BLOCK:
                n_live = tl.where(done.live, line.n_main, 0)
                _store_grad(at(g_main, o, g_step), b, o < n_live, done, given, S)
                _store_zeros(at(g_main, o, g_step), (o >= n_live) & (o < line.n_main))
            else:
                _store_row(g_main, g_step, line, done, given, BLOCK, S)
            _store_edges(grad_ptr + g_start, g_step, line, K, done, given, S)
            _store_target(grad_ptr + g_start, g_step, line, b_y, line.valid, done, given, S)


@compiled_per_structure
def split_kernel(
    x_ptr, part_ptr, targets, numbers, n_units, n_splits, blocks_per_split, n_inner, K, x_lead, x_outer, x_inner,
    x_step, t_lead, t_outer, t_inner, t_step, eps_stride, ignore_index,
    BLOCK: tl.constexpr, LANES: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The piece of one of n_splits parts of a row into part (13, N, n_splits): one read of the logits, by more programs
    than there are rows. Part 0 takes the edges."""
    i_unit = tl.program_id(0).to(tl.int64)
    i_row = i_unit // n_splits
    i_split = (i_unit % n_splits).to(tl.int32)
    given = Given(targets, numbers, x_step, t_step)
    line = line_of(
        x_ptr, given, i_row, n_inner, K, x_lead, x_outer, x_inner, t_lead, t_outer, t_inner, eps_stride,
        ignore_index, S,
    )  # fmt: skip
    begin = i_split * blocks_per_split * BLOCK
    end = tl.minimum(begin + blocks_per_split * BLOCK, tl.where(line.reads, line.n_main, 0))
    p = _sweep(line, begin, tl.maximum(begin, end), given, BLOCK, LANES, "", S)
    p = _with_edges(p, line, tl.where(i_split == 0, tl.where(line.reads, K, 0), 0), K, given, S)
    part_ptr += i_unit
    for i_field in tl.static_range(12):
        tl.store(part_ptr + n_units * i_field, p[i_field])
    tl.store(part_ptr + n_units * 12, p.k.to(tl.float32, bitcast=True))


@triton.jit
def _part(part_ptr, n_units, i_field, m_o):
    return tl.load(part_ptr + n_units * i_field, mask=m_o, other=0.0)


@compiled_per_structure
def merge_kernel(
    x_ptr, part_ptr, targets, out, numbers, n_units, n_splits, n_rows, n_inner, K, x_lead, x_outer, x_inner, x_step,
    t_lead, t_outer, t_inner, t_step, eps_stride, scale_stride, ignore_index, others,
    BLOCK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The parts of a row, merged into its loss and statistics: a few kilobytes per row, one program each."""
    i_row = tl.program_id(0).to(tl.int64)
    given = Given(targets, numbers, x_step, t_step)
    line = line_of(
        x_ptr, given, i_row, n_inner, K, x_lead, x_outer, x_inner, t_lead, t_outer, t_inner, eps_stride,
        ignore_index, S,
    )  # fmt: skip
    b_y = _target_class(line, given, S)
    o = tl.arange(0, BLOCK)
    m_o = o < n_splits
    part_ptr += i_row * n_splits + o
    m = tl.load(part_ptr, mask=m_o, other=float("-inf"))
    s, h, h2 = _part(part_ptr, n_units, 1, m_o), _part(part_ptr, n_units, 2, m_o), _part(part_ptr, n_units, 3, m_o)
    e2, n = _part(part_ptr, n_units, 4, m_o), _part(part_ptr, n_units, 5, m_o)
    rest, rest_d = _part(part_ptr, n_units, 6, m_o), _part(part_ptr, n_units, 7, m_o)
    soft, soft_d = _part(part_ptr, n_units, 8, m_o), _part(part_ptr, n_units, 9, m_o)
    plain, plain_d = _part(part_ptr, n_units, 10, m_o), _part(part_ptr, n_units, 11, m_o)
    k = _part(part_ptr, n_units, 12, m_o).to(tl.int32, bitcast=True)
    parts = Piece(m, s, h, h2, e2, n, rest, rest_d, soft, soft_d, plain, plain_d, k)
    p = merge_all(parts, m_o)
    _finish(p, line, b_y, i_row, out, given, n_rows, K, scale_stride, others, S)


@compiled_per_structure
def grad_kernel(
    x_ptr, grad_ptr, targets, saved_ptr, numbers, n_units, n_chunks, n_rows, n_inner, K, x_lead, x_outer, x_inner,
    x_step, t_lead, t_outer, t_inner, t_step, g_lead, g_outer, g_inner, g_step, eps_stride, scale_stride, ignore_index,
    others, BLOCK: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """A gradient from what is saved, one read and one write; grad may be x. No reduction, so a unit of work is a chunk
    of a row and the grid is full at every N; chunk 0 takes the edges."""
    given = Given(targets, numbers, x_step, t_step)
    for i_unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
        i_row = i_unit // n_chunks
        i_chunk = i_unit % n_chunks
        line = line_of(
            x_ptr, given, i_row, n_inner, K, x_lead, x_outer, x_inner, t_lead, t_outer, t_inner, eps_stride,
            ignore_index, S,
        )  # fmt: skip
        zmax = tl.load(saved_ptr + i_row)
        logsum = tl.load(saved_ptr + n_rows.to(tl.int64) + i_row)
        mass = tl.load(saved_ptr + n_rows.to(tl.int64) * 2 + i_row)
        a, b = weights(line.eps, tl.load(saved_ptr + n_rows.to(tl.int64) * 3 + i_row), others)
        done = _done(line, zmax, logsum, mass, a, b, i_row, given, scale_stride, S)
        b_y = _target_class(line, given, S)
        begin = (i_chunk * BLOCK).to(tl.int32)
        o = begin + tl.arange(0, BLOCK)
        n_live = tl.where(line.live, line.n_main, 0)
        block = read(line.groups, o, o < n_live, given, "", S)
        g_start = offset(i_row, n_inner, g_lead, g_outer, g_inner)
        g_main = grad_ptr + main_of(g_start, line.head, g_step, S.VEC, S.G_ALIGNED)
        if not S.SOFT:  # in row_kernel the sums of the row stand between the reading of the target and any store
            tl.debug_barrier()
        _store_grad(at(g_main, o, g_step), block, o < n_live, done, given, S)
        _store_zeros(at(g_main, o, g_step), (o >= n_live) & (o < line.n_main))
        y_main = line.y - line.head
        in_main = (y_main >= 0) & (y_main < line.n_main)
        if i_chunk == 0:
            _store_edges(grad_ptr + g_start, g_step, line, K, done, given, S)
        mine = tl.where(in_main, (y_main >= begin) & (y_main < begin + BLOCK), i_chunk == 0)
        _store_target(grad_ptr + g_start, g_step, line, b_y, mine, done, given, S)


@triton.jit
def _scale_block(ptr, mask, scale):
    b_grad = tl.load(ptr, mask=mask).to(tl.float32) * scale
    tl.store(ptr, b_grad.to(ptr.dtype.element_ty), mask=mask)


@compiled_per_structure
def scale_kernel(
    grad_ptr, scale_ptr, n_units, n_chunks, n_inner, K, g_lead, g_outer, g_inner, g_step,
    BLOCK: tl.constexpr, VEC: tl.constexpr, EDGES: tl.constexpr,
):  # fmt: skip
    """grad *= scale on the device: one read and one write, or nothing where the scale is 1, without a host sync.
    A dense gradient is one long row here, so K may exceed 2³¹ and positions inside a row are int64."""
    scale = tl.load(scale_ptr).to(tl.float32)
    if scale != 1.0:
        for i_unit in range(tl.program_id(0), n_units, tl.num_programs(0)):
            i_row = i_unit // n_chunks
            i_chunk = i_unit % n_chunks
            start = offset(i_row, n_inner, g_lead, g_outer, g_inner)
            head, first, n_main = cut(start, K, VEC, EDGES)
            o_chunk = i_chunk.to(tl.int64) * BLOCK
            o = tl.arange(0, BLOCK)
            m_o = o < tl.minimum(n_main - o_chunk, BLOCK).to(tl.int32)
            _scale_block(at(at(grad_ptr + first, o_chunk, g_step), o, g_step), m_o, scale)
            if EDGES and i_chunk == 0:
                k_edge, m_edge = edges(head, n_main, K, VEC)
                _scale_block(grad_ptr + start + k_edge, m_edge, scale)
