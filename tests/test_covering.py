"""The designs that thin the products of the suite: that they keep what they promise, and that a bug meets them."""

from __future__ import annotations

import itertools

import pytest
from cases import CASES, run_case
from conftest import EMULATED, GROUPS, HAS_CUDA
from covering import Mode, cover, in_half, pairs, union
from parity import Row, claims, rows_of_the_table
from twin import BUGS, plant

from labelsmooth_kernels import backends

TABLE = rows_of_the_table()
emulates = pytest.mark.skipif(HAS_CUDA or Mode.quick, reason="nothing is emulated in this run")


def test_a_design_keeps_every_claim_with_few_rows() -> None:
    """Four factors of 2, 3, 4 and 5 values: 120 rows, of which 20 at least are needed for the pairs of the last two."""
    rows = [dict(zip("abcd", values, strict=True)) for values in itertools.product(*map(range, (2, 3, 4, 5)))]
    kept = cover(rows, pairs)
    assert union(map(pairs, kept)) == union(map(pairs, rows))
    assert 20 <= len(kept) <= 28
    assert kept == [row for row in rows if row in kept], "in their order"
    assert kept == cover(rows, pairs), "the same every time"


def test_a_design_prefers_what_costs_less() -> None:
    rows = [("slow", 9.0), ("quick", 1.0), ("other", 1.0)]
    kept = cover(rows, lambda row: frozenset({"other"} if row[0] == "other" else {"same"}), lambda row: row[1])
    assert kept == rows[1:]


@pytest.mark.parametrize("sizes", [(2, 2, 2), (14, 3, 4), (18, 4, 4)])
def test_half_of_a_product_keeps_every_pair(sizes: tuple[int, ...]) -> None:
    rows = list(itertools.product(*map(range, sizes)))
    half = [row for row in rows if sum(row) % 2 == 0]
    assert [row for row in rows if in_half(*row)] == (rows if Mode.whole else half)
    assert len(half) * 2 == len(rows)
    for a, b in itertools.combinations(range(len(sizes)), 2):
        assert len({(row[a], row[b]) for row in half}) == sizes[a] * sizes[b]


def test_one_row_alone_is_kept() -> None:
    """So that the id of a test is enough to run it."""
    assert cover([{"a": 1}], pairs) == [{"a": 1}]
    assert cover([{}], lambda _: frozenset(["its name"])) == [{}]


def test_no_test_of_this_run_loses_a_claim(request: pytest.FixtureRequest) -> None:
    """Every pair of parameters, or whatever else the rows of a test claim, is claimed by a row that runs."""
    if Mode.quick:
        pytest.skip("--quick runs no emulation")
    for group in request.config.stash[GROUPS]:
        assert not union(group.whole) - union(group.kept), group.name


@pytest.fixture(params=[place for place in EMULATED if any(row[1:3] == place for row in TABLE)], ids="-".join)
def design(request: pytest.FixtureRequest) -> tuple[list[Row], list[Row]]:
    """The rows of the parity table in one emulated place, and those of its design."""
    every = [row for row in TABLE if row[1:3] == request.param]
    return every, cover(every, lambda row: frozenset(claims(*row)))


@emulates
def test_the_design_of_the_parity_table(design: tuple[list[Row], list[Row]]) -> None:
    """A quarter of the rows: every small case, dtype × direction, either of them × every trait, every failure."""
    every, kept = design
    assert len(kept) < len(every) / 4
    assert {row.case for row in kept} >= {case for case in CASES if not case.large}
    for of in (
        lambda row: {(row.dtype, row.direction)},
        lambda row: {(trait, row.dtype) for trait in row.case.traits()},
        lambda row: {(trait, row.direction) for trait in row.case.traits()},
        lambda row: set(row.case.regressions.split()),
    ):
        assert set().union(*map(of, kept)) == set().union(*map(of, every))
    table = backends.EVERY_OPTION - {"distillation"}
    assert set().union(*(row.case.features() for row in kept)) >= table


@emulates
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_turns_the_design_red(
    monkeypatch: pytest.MonkeyPatch, design: tuple[list[Row], list[Row]], bug: str
) -> None:
    """The kept rows of every emulated place are enough to see each of the bugs, planted in the twin."""
    plant(monkeypatch, bug)
    suspects = sorted(design[1], key=lambda row: bug not in row.case.regressions.split())
    for row in suspects:
        try:
            run_case(row.case.problem(row.dtype), "twin", row.direction)
        except AssertionError:
            return
    pytest.fail(f"none of {len(suspects)} rows sees {bug}")
