"""How kernels reach the rows of a (N, K) tensor by 128-bit accesses at any K, stride and alignment; host, then device.

Pointers come 16-byte aligned, with a ``lead`` in elements. A row is cut into the VEC-wide groups that lie wholly inside
it and at most 2·(VEC - 1) edge elements before and after them. The groups are whole vectors, and the mask over them is
constant over each; the edges take one access of 2·VEC lanes of their own. So nothing outside a row is ever touched, and
an unaligned row (K = 50,257) costs one narrow load and store more, but no further bytes: its edges lie in sectors that
the row covers anyway. EDGES = False drops that code where every row is aligned; VEC = 1 is the same code with narrow
accesses, for memory that cannot be aligned. Where only the gradient has another alignment, its stores alone are narrow.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


class Rows(NamedTuple):
    """Element (i, k) of ``tensor`` is ``base[lead + i·stride + k]``, counted from the first element of ``base``."""

    base: Tensor
    lead: int
    stride: int
    vec: int
    """elements in 16 bytes, or 1 where the base is not 16-byte aligned"""
    edges: bool


def rows_of(tensor: Tensor) -> Rows:
    """The rows of a (N, K) tensor with unit class stride."""
    n, k = tensor.shape
    base = tensor.detach()
    lead = base.data_ptr() % 16 // base.element_size()
    if 0 < lead <= base.storage_offset():
        base = base.as_strided(base.shape, base.stride(), base.storage_offset() - lead)
    else:
        lead = 0
    stride = base.stride(0) if n > 1 else k
    vec = 16 // base.element_size() if base.data_ptr() % 16 == 0 else 1
    return Rows(base, lead, stride, vec, vec > 1 and any(value % vec for value in (lead, stride, k)))


def aligned_alike(x: Rows, grad: Rows) -> bool:
    """Whether the groups of every row of the logits are whole 16-byte groups of the gradient too."""
    return x.vec == grad.vec > 1 and (x.lead - grad.lead) % x.vec == 0 and (x.stride - grad.stride) % x.vec == 0


@triton.jit
def cut(start, K, VEC: tl.constexpr):
    """(head, first, n_main) of the row at ``start``: its groups hold classes [head, head + n_main), at ``first``."""
    first = (start + (VEC - 1)) // VEC * VEC
    head = tl.minimum(first - start, K).to(tl.int32)
    return head, first, (K - head) // VEC * VEC


@triton.jit
def edges(head, n_main, K, VEC: tl.constexpr):
    """Classes and mask of the lanes that take the edges: VEC lanes before the groups, VEC after them."""
    o_edge = tl.arange(0, 2 * VEC)
    k_edge = tl.where(o_edge < VEC, o_edge, head + n_main + o_edge - VEC)
    return k_edge, tl.where(o_edge < VEC, o_edge < head, k_edge < K)


@triton.jit
def load(ptr, mask):
    return tl.load(ptr, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def main_of_grad(g_start, head, VEC: tl.constexpr, G_ALIGNED: tl.constexpr):
    """Where the groups of a row begin in the gradient; the division changes nothing, it proves the alignment."""
    g_main = g_start + head
    if G_ALIGNED:
        g_main = g_main // VEC * VEC
    return g_main


@triton.jit
def equals(o, position, VEC: tl.constexpr):
    """o == position, group by group and lane by lane: the lanes are constants, so a persistent loop over rows keeps VEC
    times fewer loop-invariant registers than for the comparison itself, which makes long blocks spill."""
    return (o // VEC == position // VEC) & (o % VEC == position % VEC)
