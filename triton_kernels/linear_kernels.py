"""The kernels of a linear layer and its loss, in one: x = hidden·Wᵀ + bias is made and used tile by tile, never held.

A tile is seen as classes × rows, in that order, so that the row maths of ``row_math``, which reduces over axis 0,
serves tiles as it serves rows; it is the transpose of a product rows × classes, because then a thread holds many
classes of few rows, and what is known of a row costs few registers. Products accumulate in float32; those of
float32 are float32 throughout ("ieee").

Work, in matrix products of 2·N·K·D flops: loss 1, gradient of hidden 2, of the weight 2. That is 5 where keeping chunks
of logits costs 3: the price of a memory of O(N + K) and of being deterministic without atomics, because a tile's dz
serves the owner of its rows and the owner of its classes, and those never meet. A tile that is skipped costs 1 product
where it is decided and none where the decision is known.

The smoothing part of dz, b·r_k with r = w·u, is of rank one: it is added outside the tiles, exactly, before the one
rounding. Inside remain mass·p and the target's a·w_y, and a tile without targets is as small as its p.
In loops that hold other loops, nothing is hoisted: what is invariant there is cheap to make again, and spills if kept.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from .kernels import _Done
from .row_math import Block, Piece, dz, merge, merge_all, nothing, numbered, piece, row_loss, weights, with_target

if TYPE_CHECKING:
    from collections.abc import Callable


class Layer(NamedTuple):
    """Pointers to the operands of x = hidden·weightᵀ + bias; bias may be None."""

    hidden: Any
    weight: Any
    bias: Any


def _kernel(fn: Callable[..., None]) -> Any:
    """Compile per structure, and for multiples of 16 features: only then are loads 128 bits wide."""
    names = (p.name for p in inspect.signature(fn).parameters.values() if p.annotation is p.empty)
    special = ("D", "h_step", "w_step")
    return triton.jit(fn, do_not_specialize=[n for n in names if n[-4:] != "_ptr" and n not in special])


@triton.jit
def _product(b_left, b_right, b_sum, WIDE: tl.constexpr):
    """sum + left·right."""
    if WIDE:
        b_left = b_left.to(tl.float32)
        b_right = b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit
def _logits(layer, o_row, o_k, N, K, D, h_step, w_step, logit_scale, T: tl.constexpr):
    """z of a tile, -inf past the last class. Positions past an end are read from the last one instead: a clamped
    address costs less than a mask in the inner loop."""
    k = tl.minimum(o_k, K - 1).to(tl.int64)
    h_rows = (layer.hidden + tl.minimum(o_row, N - 1).to(tl.int64) * h_step)[:, None]
    w_rows = (layer.weight + k * w_step)[:, None]
    ROWS: tl.constexpr = T.rows
    CLASSES: tl.constexpr = T.classes
    b_x = tl.zeros([ROWS, CLASSES], tl.float32)  # Triton 3.6 takes no T.rows in a list
    for i_d in range(0, D, T.depth):
        o_d = (i_d + tl.arange(0, T.depth))[None, :]
        b_h = tl.load(h_rows + o_d, mask=o_d < D, other=0.0)
        b_w = tl.load(w_rows + o_d, mask=o_d < D, other=0.0)
        b_x = _product(b_h, tl.trans(b_w), b_x, T.wide)
    if layer.bias is not None:
        b_x += tl.load(layer.bias + k).to(tl.float32)[None, :]
    return tl.where((o_k < K)[:, None], tl.trans(b_x) * logit_scale, float("-inf"))


@triton.jit
def _labels(target_ptr, o_row, N, K, ignore_index):
    """The target's class; -1 outside [0, K), so that no address is made from it; -2 in an ignored row, or none."""
    label = tl.load(target_ptr + o_row, mask=o_row < N, other=-1)
    live = (o_row < N) & (label != ignore_index)
    return tl.where(live, tl.where((label >= 0) & (label < K), label, -1), -2).to(tl.int32)


@triton.jit
def _field(ptr, i_field, apart, o_row, mask):
    return tl.load(ptr + apart.to(tl.int64) * i_field + o_row, mask=mask, other=0.0)


@_kernel
def tile_kernel(
    layer, target_ptr, r_ptr, part_ptr, n_splits, per_split, N, K, D, h_step, w_step, ignore_index, logit_scale,
    T: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The piece of one of n_splits parts of the classes, for a block of rows, into part (6, n_splits, N). Fused: the
    product, the bias, the row maths. Moves hidden once per tile of classes and the weight once per block of rows, most
    of it from L2: at once run a dozen parts of a dozen blocks, so that an operand serves a dozen. 2·N·K·D flops."""
    i_split = tl.program_id(0) % n_splits
    o_row = tl.program_id(0) // n_splits * T.rows + tl.arange(0, T.rows)
    y = _labels(target_ptr, o_row, N, K, ignore_index)
    begin = i_split * per_split
    end = tl.minimum(begin + per_split, tl.cdiv(K, T.classes))
    if S.STATS == 0:
        end = tl.where(tl.max(y, 0) > -2, end, begin)  # all rows are ignored
    zero = tl.zeros_like(y).to(tl.float32)
    none = nothing()
    z, k = zero, zero.to(tl.int32) + none.k
    p = Piece(zero + none.m, z, z, z, z, z, z, z, z, z, z, z, k)
    z_y = zero
    o = tl.arange(0, T.classes)
    for i_tile in tl.range(begin, end, disable_licm=True):
        o_k = i_tile * T.classes + o
        n = tl.minimum(K - i_tile * T.classes, T.classes)
        b_z = _logits(layer, o_row, o_k, N, K, D, h_step, w_step, logit_scale, T)
        b_hit = o_k[:, None] == y[None, :]
        z_y += tl.sum(tl.where(b_hit, b_z, 0.0), 0)
        b_r = 1.0
        if S.WEIGHT:
            b_r = tl.load(r_ptr + o_k, mask=o < n, other=0.0)[:, None]
        r = piece(Block(b_z, b_hit, b_r, 1.0, 1.0), o[:, None], (o < n)[:, None], n, 1, S)
        p = merge(p, numbered(r, r.k + i_tile * T.classes))
    fields = (p.m, p.s, p.rest, p.rest_d, z_y, p.k.to(tl.float32, bitcast=True))
    for i in tl.static_range(6):
        tl.store(part_ptr + (n_splits.to(tl.int64) * i + i_split) * N + o_row, fields[i], mask=o_row < N)


@triton.jit
def _share(targets, o_row, y, n, eps, eps_step, others, mask):
    if targets.eps is not None:
        eps = tl.load(targets.eps + eps_step * o_row, mask=mask, other=0.0)
    w_y = 1.0
    if targets.weight is not None:
        w_y = tl.load(targets.weight + y, mask=y >= 0, other=0.0)
    a, b = weights(eps, n, others)
    return a, b, w_y


@_kernel
def join_kernel(
    part_ptr, targets, out, n_splits, N, K, eps, eps_step, ignore_index, others, z_loss,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The parts of a block of rows, merged into loss, saved and statistics: 24 bytes per row and part."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < N
    y = _labels(targets.target, o_row, N, K, ignore_index)
    i_split = tl.arange(0, SPLITS)[:, None]
    o = i_split.to(tl.int64) * N + o_row[None, :]
    m_o = (i_split < n_splits) & m_row[None, :]
    apart = n_splits.to(tl.int64) * N
    m = tl.load(part_ptr + o, mask=m_o, other=float("-inf"))
    s, rest = _field(part_ptr, 1, apart, o, m_o), _field(part_ptr, 2, apart, o, m_o)
    rest_d, z_y = _field(part_ptr, 3, apart, o, m_o), tl.sum(_field(part_ptr, 4, apart, o, m_o), 0)
    k = _field(part_ptr, 5, apart, o, m_o).to(tl.int32, bitcast=True)
    zero = tl.zeros([SPLITS, ROWS], tl.float32)
    p = merge_all(Piece(m, s, zero, zero, zero, zero, rest, rest_d, zero, zero, zero, zero, k), m_o)
    n = tl.zeros([ROWS], tl.float32) + (1.0 if S.PRIOR else K.to(tl.float32))
    a, b, w_y = _share(targets, o_row, y, n, eps, eps_step, others, m_row)
    p = with_target(p, z_y, w_y)
    mass = tl.full([ROWS], 1.0, tl.float32)
    if S.WEIGHT or S.PRIOR:
        mass = a * p.soft + b * p.rest
    logsum = tl.log(p.s)
    loss = tl.where(y >= 0, row_loss(p, logsum, mass, a, b, z_loss), float("nan"))
    tl.store(out.loss + o_row, tl.where(y > -2, loss, 0.0), mask=m_row)
    reads = (y > -2) | (S.STATS > 0)
    for i in tl.static_range(4):
        tl.store(out.saved + N.to(tl.int64) * i + o_row, tl.where(reads, (p.m, logsum, mass, n)[i], 0.0), mask=m_row)
    if S.STATS > 0:
        nll = tl.where(y >= 0, logsum - p.plain_d, float("nan"))
        tl.store(out.stats + o_row, tl.where(y > -2, nll, 0.0), mask=m_row)
        tl.store(out.prediction + o_row, tl.minimum(p.k, K - 1).to(tl.int64), mask=m_row)  # NaNs have no maximum


@_kernel
def coefficient_kernel(
    targets, saved_ptr, label_ptr, row_ptr, N, K, eps, eps_step, scale_step, ignore_index, others, z_loss, logit_scale,
    ROWS: tl.constexpr,
):  # fmt: skip
    """label (N,), and row (5, N): mass, a·w_y, b, the factor g·logit_scale, and a bound of |dz|; zeros if ignored."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = o_row < N
    y = _labels(targets.target, o_row, N, K, ignore_index)
    lse = _field(saved_ptr, 0, N, o_row, mask) + _field(saved_ptr, 1, N, o_row, mask)
    a, b, w_y = _share(targets, o_row, y, _field(saved_ptr, 3, N, o_row, mask), eps, eps_step, others, mask)
    a = a * w_y
    mass = _field(saved_ptr, 2, N, o_row, mask) + 2.0 * z_loss * lse
    factor = tl.where(y >= 0, logit_scale, float("nan"))
    if targets.scale is not None:
        factor = factor * tl.load(targets.scale + scale_step * o_row, mask=mask, other=0.0)
    tl.store(label_ptr + o_row, y, mask=mask)
    fields = (mass, a, b, factor, tl.abs(mass) + tl.abs(a))
    for i in tl.static_range(5):
        tl.store(row_ptr + N.to(tl.int64) * i + o_row, tl.where(y > -2, fields[i], 0.0), mask=mask)


@triton.jit
def _tile_dz(layer, saved_ptr, row_ptr, label, o_row, o_k, N, K, D, h_step, w_step, logit_scale, T: tl.constexpr,
             S: tl.constexpr):  # fmt: skip
    """dz of a tile without its smoothing, 0 in ignored rows and where there is no row or class."""
    b_z = _logits(layer, o_row, o_k, N, K, D, h_step, w_step, logit_scale, T)
    mask = o_row < N
    zmax, logsum = _field(saved_ptr, 0, N, o_row, mask), _field(saved_ptr, 1, N, o_row, mask)
    mass, a = _field(row_ptr, 0, N, o_row, mask), _field(row_ptr, 1, N, o_row, mask)
    row = _Done(label > -2, 1.0, zmax, logsum, mass, a, 0.0)
    b_dz = dz(Block(b_z, o_k[:, None] == label[None, :], 1.0, 1.0, 1.0), row, None, S)
    return tl.where((o_k < K)[:, None] & row.live[None, :], b_dz, 0.0)


@triton.jit
def _decide(b_dz, label, lift, o_row, i_tile, used, skipped_ptr, mass_ptr, filter_eps, budget, N, T: tl.constexpr):
    """(whether a tile is kept, mass skipped in each row so far); a skipped tile is noted. A NaN is never small."""
    b_mass = tl.sum(b_dz, 0)
    k = label - i_tile * T.classes
    b_keep = ~(used + tl.abs(b_mass) <= budget) | ((k >= 0) & (k < T.classes))
    keep = tl.max((~(tl.abs(b_dz) < filter_eps) | b_keep[None, :]).to(tl.int32)) > 0  # over both axes
    if not keep:
        tl.store(skipped_ptr, 1)
        tl.store(mass_ptr + i_tile * N.to(tl.int64) + o_row, b_mass * lift, mask=o_row < N)
    return keep, tl.where(keep, used, used + tl.abs(b_mass))


@triton.jit
def _flush(layer, label_ptr, dz_ptr, queue_ptr, acc_ptr, n, i_own, held, N, K, D, h_step, w_step, T: tl.constexpr,
           OF_WEIGHT: tl.constexpr):  # fmt: skip
    """acc (an owner's, D) += the n queued tiles of dz times what they face. An ignored row of hidden is not read: its
    dz is 0, but 0·NaN is not."""
    OWN: tl.constexpr = T.classes if OF_WEIGHT else T.rows
    OTHER: tl.constexpr = T.rows if OF_WEIGHT else T.classes
    COLUMNS: tl.constexpr = T.columns
    PER: tl.constexpr = OTHER // T.slice
    x_ptr = layer.hidden if OF_WEIGHT else layer.weight
    x_step = h_step if OF_WEIGHT else w_step
    o_own = tl.arange(0, OWN)
    o_s = tl.arange(0, T.slice)
    n_own = (K if OF_WEIGHT else N) - i_own * OWN
    for i_d in tl.range(0, D, T.columns, disable_licm=True):
        o_d = i_d + tl.arange(0, T.columns)
        b_sum = tl.zeros([OWN, COLUMNS], tl.float32)
        for i in range(n * PER):
            o_other = tl.load(queue_ptr + i // PER) * OTHER + i % PER * T.slice + o_s
            m_other = o_other < (N if OF_WEIGHT else K)
            if OF_WEIGHT:
                m_other = tl.load(label_ptr + o_other, mask=m_other, other=-2) > -2
            b_dz = tl.load(dz_ptr + o_own[:, None] * (T.queue * OTHER) + (i * T.slice + o_s)[None, :])
            x = x_ptr + (o_other.to(tl.int64) * x_step)[:, None] + o_d[None, :]
            b_x = tl.load(x, mask=m_other[:, None] & (o_d < D)[None, :], other=0.0)
            b_sum = _product(b_dz, b_x, b_sum, T.wide)
        acc = acc_ptr + o_own[:, None] * D + o_d[None, :]
        m_d = (o_d < D)[None, :]
        b_sum += tl.load(acc, mask=(o_own < tl.where(held > 0, n_own, 0))[:, None] & m_d, other=0.0)
        tl.store(acc, b_sum, mask=(o_own < n_own)[:, None] & m_d)


@_kernel
def sweep_kernel(
    layer, label_ptr, saved_ptr, row_ptr, lift_ptr, acc_ptr, bias_ptr, dz_ptr, queue_ptr, skipped_ptr, mass_ptr,
    filter_eps, budget, logit_scale, i_first, n_splits, N, K, D, h_step, w_step,
    T: tl.constexpr, OF_WEIGHT: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The gradient Σ dz·x of one owner, a block of rows (x: weight) or, OF_WEIGHT, a tile of classes (x: hidden), over
    all that it faces, or every n_splits-th of it. Fused: the logits again, p, dz, the choice of what is skipped
    and its mass, the sums for the bias, the second product. 4·N·K·D flops.

    An accumulator (owner, D) fits no registers, and making dz again for every piece of D would cost D/columns products
    instead of one. So dz of up to ``queue`` tiles is put aside, in the dtype of the operands, in memory of this program
    (it stays in L2), and then meets all of D, with one read and write of the accumulator. Skipped tiles take no place.

    lift is what dz is multiplied by before it is rounded: a power of two of the row, that keeps small p out of the
    subnormals of fp16. OF_WEIGHT, where rows are summed, it also holds the row's factor over a power of two of all
    rows, so that it cannot overflow. Owners of rows decide what is skipped and note it for owners of classes, with its
    lifted mass (tiles, N); without a filter skipped (blocks, tiles) is None."""
    OWN: tl.constexpr = T.classes if OF_WEIGHT else T.rows
    i_own = i_first + tl.program_id(0) // n_splits
    i_split = tl.program_id(0) % n_splits
    last = (tl.cdiv(N, T.rows) if OF_WEIGHT else tl.cdiv(K, T.classes)) - 1
    n_mine = (last - i_split) // n_splits + 1
    i_unit = tl.program_id(0).to(tl.int64)
    if acc_ptr is not None:
        dz_ptr += i_unit * (T.rows * T.classes * T.queue)
        queue_ptr += i_unit * T.queue
    n = 0  # tiles in the queue
    held = 0  # whether acc holds anything
    used = tl.zeros_like(tl.arange(0, T.rows)).to(tl.float32)
    for i_back in tl.range(1, n_mine + 1, disable_licm=True):
        i = i_split + (n_mine - i_back) * n_splits  # vocabularies end with what is rare: it uses the budget first
        i_block = i if OF_WEIGHT else i_own
        i_tile = i_own if OF_WEIGHT else i
        o_row = i_block * T.rows + tl.arange(0, T.rows)
        o_k = i_tile * T.classes + tl.arange(0, T.classes)
        label = tl.load(label_ptr + o_row, mask=o_row < N, other=-2)
        keep = tl.max(label, 0) > -2
        o_skipped = i_block.to(tl.int64) * tl.cdiv(K, T.classes) + i_tile
        if OF_WEIGHT and skipped_ptr is not None:
            keep = keep & (tl.load(skipped_ptr + o_skipped) == 0)
        if keep:
            b_dz = _tile_dz(layer, saved_ptr, row_ptr, label, o_row, o_k, N, K, D, h_step, w_step, logit_scale, T, S)
            lift = tl.load(lift_ptr + o_row, mask=o_row < N, other=0.0)
            if skipped_ptr is not None and not OF_WEIGHT:
                keep, used = _decide(
                    b_dz, label, lift, o_row, i_tile, used, skipped_ptr + o_skipped, mass_ptr, filter_eps, budget, N, T
                )  # fmt: skip
            b_dz = b_dz * lift[None, :]
            if bias_ptr is not None:
                bias = bias_ptr + i_split * K.to(tl.int64) + o_k
                tl.store(bias, tl.load(bias, mask=o_k < K, other=0.0) + tl.sum(b_dz, 1), mask=o_k < K)
            if acc_ptr is not None and keep:
                k_dz = tl.arange(0, T.classes)[:, None] * (T.queue * T.rows if OF_WEIGHT else 1)
                row_dz = tl.arange(0, T.rows)[None, :] * (1 if OF_WEIGHT else T.queue * T.classes)
                o_dz = n * (T.rows if OF_WEIGHT else T.classes) + k_dz + row_dz
                tl.store(dz_ptr + o_dz, b_dz.to(dz_ptr.dtype.element_ty))
                tl.store(queue_ptr + n, i)
            tl.debug_barrier()  # bias, dz and the accumulator change hands between threads
        n += keep.to(tl.int32)
        if acc_ptr is not None and (n == T.queue or i_back == n_mine):
            _flush(
                layer, label_ptr, dz_ptr, queue_ptr, acc_ptr + i_unit * OWN * D, n, i_own, held, N, K, D,
                h_step, w_step, T, OF_WEIGHT,
            )  # fmt: skip
            tl.debug_barrier()
            n = 0
            held = 1


@_kernel
def round_kernel(
    acc_ptr, out_ptr, alpha_ptr, beta_ptr, v_ptr, mean_ptr, label_ptr, alpha_step, i_first, n_splits, n_own, D,
    OWN: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = alpha_i·Σ acc + mean_tile - beta_i·v, rounded once: the parts of an owner together, what skipped tiles mean
    to a tile of classes, and the smoothing. Rows whose label is -2 become 0. One read of acc, one write of out."""
    n_columns = tl.cdiv(D, COLUMNS)
    i_block = tl.program_id(0) // n_columns
    o_d = (tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    i_own = i_block // (OWN // BLOCK)
    o_in = i_block % (OWN // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    o = (i_first + i_own) * OWN + o_in
    m_d, m_o = o_d < D, o < n_own
    b_sum = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i_split in range(n_splits):
        o_acc = ((i_own.to(tl.int64) * n_splits + i_split) * OWN + o_in)[:, None] * D
        b_sum += tl.load(acc_ptr + o_acc + o_d, mask=m_o[:, None] & m_d, other=0.0)
    b_sum = b_sum * tl.load(alpha_ptr + o * alpha_step, mask=m_o, other=0.0)[:, None]
    if mean_ptr is not None:
        b_sum += tl.load(mean_ptr + (i_first + i_own).to(tl.int64) * D + o_d, mask=m_d, other=0.0)
    if v_ptr is not None:
        b_beta = tl.load(beta_ptr + o, mask=m_o, other=0.0)[:, None]
        b_sum -= b_beta * tl.load(v_ptr + o_d, mask=m_d, other=0.0)
    if label_ptr is not None:
        b_sum = tl.where((tl.load(label_ptr + o, mask=m_o, other=-2) > -2)[:, None], b_sum, 0.0)
    o_out = o.to(tl.int64)[:, None] * D + o_d
    tl.store(out_ptr + o_out, b_sum.to(out_ptr.dtype.element_ty), mask=m_o[:, None] & m_d)


@_kernel
def sums_kernel(
    x_ptr, c_ptr, out_ptr, n, D, w_step, BLOCK: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out (blocks, D) = Σ c_i·x_i over each block of rows of x. One read of x, and none of rows with c = 0."""
    n_columns = tl.cdiv(D, COLUMNS)
    i_block = tl.program_id(0) // n_columns
    o_d = (tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    b_sum = tl.zeros([1, COLUMNS], tl.float32)
    for i in range(0, BLOCK, SLICE):
        o = i_block * BLOCK + i + tl.arange(0, SLICE)
        b_c = tl.load(c_ptr + o, mask=o < n, other=0.0)
        mask = (b_c != 0.0)[:, None] & (o_d < D)
        b_x = tl.load(x_ptr + (o.to(tl.int64) * w_step)[:, None] + o_d, mask=mask, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_c[:, None] * b_x, 0)[None, :]
    tl.store(out_ptr + i_block.to(tl.int64) * D + o_d, b_sum, mask=o_d < D)


@_kernel
def spread_kernel(
    a_ptr, c_ptr, x_ptr, out_ptr, m, n, a_row, a_step, D, w_step, group, gap,
    BLOCK: tl.constexpr, SLICE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out_i += Σ_j a_ij·c_j·x_j for m rows of out, which has ``gap`` others after each ``group`` of them: the gradient
    of skipped tiles, whose mass is spread evenly. 1/classes of a product. A row with c = 0 is not read."""
    n_columns = tl.cdiv(D, COLUMNS)
    o_i = tl.program_id(0) // n_columns * BLOCK + tl.arange(0, BLOCK)
    o_d = (tl.program_id(0) % n_columns * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    m_i, m_d = (o_i < m)[:, None], o_d < D
    b_sum = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for i in range(0, n, SLICE):
        o = i + tl.arange(0, SLICE)
        a = a_ptr + (o_i.to(tl.int64) * a_row)[:, None] + (o.to(tl.int64) * a_step)[None, :]
        b_a = tl.load(a, mask=m_i & (o < n)[None, :], other=0.0)
        m_x = o < n
        if c_ptr is not None:
            b_c = tl.load(c_ptr + o, mask=m_x, other=0.0)
            b_a = b_a * b_c[None, :]
            m_x = b_c != 0.0
        b_x = tl.load(x_ptr + (o.to(tl.int64) * w_step)[:, None] + o_d, mask=m_x[:, None] & m_d, other=0.0)
        b_sum = tl.dot(b_a, b_x.to(tl.float32), b_sum, input_precision=PRECISION)
    out = out_ptr + (o_i // group * gap + o_i).to(tl.int64)[:, None] * D + o_d
    tl.store(out, tl.load(out, mask=m_i & m_d, other=0.0) + b_sum, mask=m_i & m_d)
