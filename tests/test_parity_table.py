"""The table of cases × backends × dtypes × directions, judged by the rule of ``cases``."""

from __future__ import annotations

import importlib

import pytest
import torch
from cases import CASES, Case, loss_and_grad, run_case
from conftest import HAS_CUDA, skip_unless_available
from parity import Row, claims, rows_of_the_table
from rule import expect


@pytest.mark.claims.with_args(claims)
@pytest.mark.parametrize(Row._fields, [pytest.param(*row, id=str(row)) for row in rows_of_the_table()])
def test_case(case: Case, backend: str, device: str, dtype: torch.dtype, direction: str) -> None:
    skip_unless_available(backend)
    run_case(case.problem(dtype, device), backend, direction)


FORMS = [{"form": "block"}, {"form": "sweep", "block": 128}, {"form": "split", "block": 64, "splits": 3}]
FORMED = """smaller than a tile, half the rows ignored, one above a tile, masked classes, equal logits,
    NaN and infinite logits, one finite class, last, equal maxima far apart"""


@pytest.mark.emulated
@pytest.mark.parametrize("direction", ["forward", "rows", "inplace"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["form"])
@pytest.mark.parametrize("case", [c for c in CASES if c.name in FORMED], ids=lambda c: c.name)
def test_every_form_of_the_triton_kernels(case: Case, form: dict[str, object], direction: str) -> None:
    """The table runs the form that the tuning picks; here each form meets rows shorter and longer than its block."""
    skip_unless_available("triton")
    launch = importlib.import_module("labelsmooth_kernels.triton_kernels.launch")
    with launch.override(**form):
        run_case(case.problem(torch.float32, "cuda" if HAS_CUDA else "cpu"), "triton", direction)


@pytest.mark.skipif(HAS_CUDA, reason="on a GPU there is no interpreter")
def test_interpreter_truncates() -> None:
    """Once Triton's interpreter rounds to bfloat16, this fails: then ``cases.truncates`` and its allowance go."""
    skip_unless_available("triton")
    (case,) = (c for c in CASES if c.name == "uniform")
    problem = case.problem(torch.bfloat16)
    _, grad = loss_and_grad(("triton", "cpu"), problem.logits, problem.target, reduction="none", **problem.options)
    want = expect(problem, torch.ones(len(grad)).double()).grad
    assert (grad.double().abs() <= want.abs() * (1 + 1e-4)).all(), "never away from zero"
    assert (grad != want.bfloat16()).float().mean() > 0.2, "not to nearest"
