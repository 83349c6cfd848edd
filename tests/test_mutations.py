"""Bugs that other losses had, planted: each must turn checks of this suite red; its sound twin leaves them green."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from cases import CASES, Case, run_case
from failures import check_r20, check_r27, check_r28, check_r33
from twin import BUGS, plant

from labelsmooth_kernels import reference

if TYPE_CHECKING:
    from collections.abc import Callable


def case(name: str, direction: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    (found,) = (c for c in CASES if c.name == name)
    return lambda: run_case(found.problem(dtype), "twin", direction)


PLACE = ("twin", "cpu")
CHECKS: dict[str, list[Callable[[], None]]] = {
    "R1": [case("sure of the target", d, torch.bfloat16) for d in ("rows", "mean", "inplace")]
    + [case("as sure as smoothing asks", "rows", torch.float16)],
    "R3": [case("uniform", "rows"), case("half the rows ignored", "mean"), case("epsilon per row", "inplace rows")],
    "R15": [case(f"one finite class, {n}", d) for n in ("middle", "last") for d in ("forward", "rows", "mean")],
    "R16": [case(n, d) for n in ("finite classes", "other finite classes") for d in ("forward", "rows")],
    "R20": [lambda: check_r20(PLACE), case("half the rows ignored", "forward"), case("half the rows ignored", "rows")],
    "R27": [lambda: check_r27(PLACE, 1e4), *(case(f"shift {v}", "forward") for v in ("1e3", "1e4", "1e5", "-1e4"))],
    "R28": [lambda: check_r28(PLACE, torch.float64), case("z-loss", "rows"), case("z-loss", "inplace")],
    "R31": [case(n, d) for n in ("one above a tile", "smaller than a tile") for d in ("forward", "rows", "mean")],
    "R38": [case("probabilities that do not sum to 1", d) for d in ("rows", "mean", "inplace rows")],
}


@pytest.mark.parametrize("case", [c for c in CASES if not c.large], ids=lambda c: c.name)
def test_the_sound_twin_passes_the_table(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """So that what a planted bug changes is the bug; and the contract of the operators is written down twice."""
    plant(monkeypatch, "")
    for direction in ("forward", "rows", "mean"):
        run_case(case.problem(torch.float32), "twin", direction)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_turns_the_suite_red(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    for check in CHECKS[bug]:
        plant(monkeypatch, "")
        check()
        plant(monkeypatch, bug)
        with pytest.raises(AssertionError):
            check()


def test_planted_r33_turns_the_suite_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ q not reduced over the shards: each takes its own for the whole."""
    sound = reference.merge
    check_r33()
    monkeypatch.setattr(reference, "merge", lambda piece, other: (*sound(piece, other)[:3], piece[3]))
    with pytest.raises(AssertionError):
        check_r33()
