"""Covering designs: which rows of a product run where an emulation makes each of them slow.

A *row* is one set of parameters of one test. It *claims* what it is there for: by default every pair of values of its
parameters, the place (backend and device) among them. ``cover`` keeps few rows that together claim what all rows claim.
The choice depends on the rows alone, so that every process of a run makes the same one.

``make test`` keeps these rows of every test that an emulation runs (``thin``): Triton's interpreter, and CUDA C++ on
the threads of ``cuda_shim``. The reference, the compiled kernels of the CPU and a real GPU run every row.
``pytest --whole`` (``make test-all``) runs every row everywhere. ``pytest --quick`` (``make quick``) runs neither the
emulations nor what is marked ``slow``.
"""

from __future__ import annotations

import heapq
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

Row = TypeVar("Row")
Claims = frozenset[Any]


class Mode:
    """What the run was asked for; ``conftest.pytest_configure`` sets it before any test module is imported."""

    whole = False
    quick = False


def key(value: object) -> Hashable:
    """A value as something to compare: itself, or which object it is; True is not 1 here."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value).__name__, value


def pairs(values: Mapping[Any, Hashable]) -> Claims:
    """Every pair of (name, value); a parameter that stands alone claims its value."""
    named = sorted(values.items(), key=lambda item: item[0])
    return frozenset(itertools.combinations(named, 2)) or frozenset(named)


def cover(
    rows: Sequence[Row], claims: Callable[[Row], Claims], cost: Callable[[Row], float] = lambda _: 1.0
) -> list[Row]:
    """Choose rows that together claim what all of them claim, and return them in their order.

    Greedy: the next row is the one with the most new claims per unit of cost, the first of several. A row's new claims
    only ever become fewer, so a heap of old counts needs a second look only at its top.
    """
    found = [claims(row) for row in rows]
    price = [cost(row) for row in rows]
    heap = [(-len(new) / price[i], i) for i, new in enumerate(found)]
    heapq.heapify(heap)
    covered: set[Any] = set()
    chosen = []
    while heap:
        _, i = heapq.heappop(heap)
        gain = len(found[i] - covered)
        if not gain:
            continue
        if heap and (-gain / price[i], i) > heap[0]:
            heapq.heappush(heap, (-gain / price[i], i))
            continue
        covered |= found[i]
        chosen.append(i)
    return [rows[i] for i in sorted(chosen)]


def in_half(*levels: int) -> bool:
    """Whether a row is in the half of a product in which every pair of levels of two of its factors occurs.

    ``levels`` are the row's, counted from 0, of at least three factors that have two levels or more. ``--whole``: all.
    """
    return Mode.whole or sum(levels) % 2 == 0


class Group(NamedTuple):
    """The rows of one test that an emulation runs, and those of its design."""

    name: str
    whole: list[Claims]
    kept: list[Claims]


def union(claims: Iterable[Claims]) -> Claims:
    return frozenset().union(*claims)
