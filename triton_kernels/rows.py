"""How kernels reach the rows of tensors (..., K) by 128-bit accesses at any K, stride and alignment; host, then device.

Pointers come 16-byte aligned, with a ``lead`` in elements. A row is cut into the VEC-wide groups that lie wholly inside
it and at most 2·(VEC - 1) edge elements before and after them. The groups are whole vectors, and the mask over them is
constant over each; the edges take one access of 2·VEC lanes of their own. So nothing outside a row is ever touched, and
an unaligned row (K = 50,257) costs one narrow load and store more, but no further bytes: its edges lie in sectors that
the row covers anyway. EDGES = False drops that code where every row is aligned; VEC = 1 is the same code with narrow
accesses, for memory that cannot be aligned and for classes that are not neighbours. Where only the gradient or the
target has another alignment, its accesses alone are narrow.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from .row_math import Block, transform

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Element (i, j, k) of a tensor is ``base[lead + i·outer + j·inner + k·step]``, counted from the base's first."""

    base: Tensor
    lead: int
    outer: int
    inner: int
    step: int | None
    """None for 1"""
    vec: int
    """elements in 16 bytes, or 1 where the rows have no such groups"""
    edges: bool

    @property
    def layout(self) -> tuple[int | None, ...]:
        return self[1:5]


def collapsed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors (..., K) as (N, K) where none needs a copy for that, else as they are."""
    try:
        return tuple(tensor.detach().view(-1, tensor.shape[-1]) for tensor in tensors)
    except RuntimeError:
        return tuple(tensor.detach() for tensor in tensors)


def rows_of(tensor: Tensor) -> Rows:
    """The rows of a tensor of 2 or 3 dimensions."""
    base, k = tensor, tensor.shape[-1]
    lead = base.data_ptr() % 16 // base.element_size()
    if 0 < lead <= base.storage_offset():
        base = base.as_strided(base.shape, base.stride(), base.storage_offset() - lead)
    else:
        lead = 0
    outer, inner = ([0, *base.stride()][-3 + i] if [1, *base.shape][-3 + i] > 1 else 0 for i in (0, 1))
    step = base.stride(-1) if k > 1 and base.stride(-1) != 1 else None
    vec = 16 // base.element_size() if step is None and base.data_ptr() % 16 == 0 else 1
    return Rows(base, lead, outer, inner, step, vec, any(value % vec for value in (lead, outer, inner, k)))


def aligned_alike(x: Rows, other: Rows) -> bool:
    """Whether the groups of every row of the logits are whole 16-byte groups of the other tensor too."""
    apart = (x.lead - other.lead, x.outer - other.outer, x.inner - other.inner)
    return x.vec > 1 and other.vec > 1 and not any(value % x.vec for value in apart)


class Targets(NamedTuple):
    """Pointers to what the logits are compared with; all but the target may be None."""

    target: Any
    weight: Any
    prior: Any
    eps: Any
    scale: Any


class Numbers(NamedTuple):
    eps: float
    z_loss: float
    penalty: float | None
    """the confidence penalty"""
    logit_scale: float | None
    """None for 1"""
    softcap: float | None


class Given(NamedTuple):
    """What every row is read with; a step is None for 1."""

    targets: Any
    numbers: Any
    x_step: Any
    t_step: Any


class Source(NamedTuple):
    """Where classes are read from: pointers to class k."""

    x: Any
    t: Any
    k: Any


class Line(NamedTuple):
    """A row: its target, and its classes, whole and from the first group of VEC on, which is class ``head``; y is -1
    unless valid, so that no address is made from it unchecked."""

    live: Any
    """not ignored"""
    reads: Any
    """live, or read for its statistics"""
    valid: Any
    eps: Any
    y: Any
    whole: Any
    groups: Any
    head: Any
    n_main: Any


@triton.jit
def offset(i_row, n_inner, lead, outer, inner):
    """Where a row starts; int64: N·K passes 2³² in use. The division costs registers, so that rows at one distance
    (n_inner None) do without."""
    start = lead + inner.to(tl.int64) * (i_row if n_inner is None else i_row % n_inner)
    if n_inner is not None:
        start += outer.to(tl.int64) * (i_row // n_inner)
    return start


@triton.jit
def cut(start, K, VEC: tl.constexpr, EDGES: tl.constexpr):
    """(head, first, n_main) of the row at ``start``: its groups hold classes [head, head + n_main), at ``first``."""
    first = (start + (VEC - 1)) // VEC * VEC
    head = 0
    if EDGES:
        head = tl.minimum(first - start, K).to(tl.int32)
    return head, first, (K - head) // VEC * VEC


@triton.jit
def edges(head, n_main, K, VEC: tl.constexpr):
    """Classes and mask of the lanes that take the edges: VEC lanes before the groups, VEC after them."""
    o_edge = tl.arange(0, 2 * VEC)
    k_edge = tl.where(o_edge < VEC, o_edge, head + n_main + o_edge - VEC)
    return k_edge, tl.where(o_edge < VEC, o_edge < head, k_edge < K)


@triton.jit
def main_of(start, head, step, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the groups of a row of the logits begin in another tensor; the division changes nothing, it proves the
    alignment."""
    main = start + (head if step is None else head * step.to(tl.int64))
    if ALIGNED:
        main = main // VEC * VEC
    return main


@triton.jit
def at(ptr, o, step):
    """Element o of a row."""
    return ptr + o if step is None else ptr + o.to(tl.int64) * step


@triton.jit
def line_of(
    x_ptr, given, i_row, n_inner, K, x_lead, x_outer, x_inner, t_lead, t_outer, t_inner, eps_stride, ignore_index,
    S: tl.constexpr,
):  # fmt: skip
    targets, eps = given.targets, given.numbers.eps
    y = -1
    every = i_row >= 0
    live, reads, valid = every, every, every
    if not S.SOFT:
        label = tl.load(targets.target + i_row)
        live = label != ignore_index
        valid = live & (label >= 0) & (label < K)
        y = tl.where(valid, label, -1).to(tl.int32)
        if S.STATS == 0:
            reads = live
    if targets.eps is not None:
        eps = tl.load(targets.eps + eps_stride.to(tl.int64) * i_row)
    start = offset(i_row, n_inner, x_lead, x_outer, x_inner)
    t_start = offset(i_row, n_inner, t_lead, t_outer, t_inner)
    head, first, n_main = cut(start, K, S.VEC, S.EDGES)
    t_main = main_of(t_start, head, given.t_step, S.VEC, S.T_ALIGNED)
    zero = 0
    whole = Source(x_ptr + start, targets.target + t_start, zero)
    groups = Source(x_ptr + first, targets.target + t_main, head)
    return Line(live, reads, valid, eps, y, whole, groups, head, n_main)


@triton.jit
def _load(ptr, m_o, other, EVICT: tl.constexpr):
    if m_o is None:
        b = tl.load(ptr, eviction_policy=EVICT)
    else:
        b = tl.load(ptr, mask=m_o, other=other, eviction_policy=EVICT)
    return b


@triton.jit
def read(source, o, m_o, given, EVICT: tl.constexpr, S: tl.constexpr):
    """The classes at positions o, none of them the target's unless that is a probability of each: z is -inf and the
    rest 0 where masked. EVICT: "evict_last" for logits that are read again."""
    targets, numbers = given.targets, given.numbers
    b_x = _load(at(source.x, o, given.x_step), m_o, float("-inf"), EVICT).to(tl.float32)
    b_z, b_slope = transform(b_x, numbers.logit_scale, numbers.softcap)
    if numbers.logit_scale is not None and m_o is not None:  # it may be 0 or negative
        b_z = tl.where(m_o, b_z, float("-inf"))
    b_t = False
    if S.SOFT:
        b_t = _load(at(source.t, o, given.t_step), m_o, 0.0, EVICT).to(tl.float32)
    b_w = 1.0
    b_u = 1.0
    if S.WEIGHT:
        b_w = _load(targets.weight + source.k + o, m_o, 0.0, "")
    if S.PRIOR:
        b_u = _load(targets.prior + source.k + o, m_o, 0.0, "")
    return Block(b_z, b_t, b_w, b_u, b_slope)
