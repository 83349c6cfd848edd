"""The tools beside the losses take the numbers and name the wrong keywords that the losses do, and need no values."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, conventions, representation, smoothing

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
Y, HEAD = torch.arange(60) % 5, torch.eye(5)
PAIRS = lsk.TopK(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
KD = lsk.distillation.distillation_loss
TOOLS: dict[str, tuple[Callable[[Any, Any], Any], float, int]] = {  # what is made of a number r and an int i
    "distillation": (lambda r, i: KD(X, -X, Y, temperature=r, alpha=r, class_dim=i), 0.5, 1),
    "distillation without a target": (lambda r, i: KD(X, -X, temperature=r, class_dim=i), 0.5, 1),
    "sharpen": (lambda r, i: lsk.distillation.sharpen(X.softmax(1), r, i), 0.5, 1),
    "teacher": (lambda r, i: lsk.linear_cross_entropy(
        X, HEAD, lsk.Teacher(X, HEAD, None, r), class_dim=i), 0.5, 1),
    "filter_eps": (lambda r, i: lsk.linear.LinearSpec(filter_eps=r, method="tiled").filter_eps, 0.25, 0),
    "neighbours": (lambda r, i: smoothing.neighbour_targets(Y, r, PAIRS), 0.5, 0),
    "beside": (lambda r, i: smoothing.temporal_targets(Y, (r, r / 2), i), 0.5, 3),
    "prior": (lambda r, i: smoothing.unigram_prior(Y, r, r), 0.5, 0),
    "gap": (lambda r, i: smoothing.optimal_gap(r, i, "others"), 0.25, 5),
    "entropy": (lambda r, i: smoothing.target_entropy(r, i, "others"), 0.25, 5),
    "compare": (lambda r, i: [vars(t.found) for t in smoothing.compare(
        {r: (X, Y)}, (r, i), fit=False, bins=i, ignore_index=i)], 0.5, 4),
    "evaluate": (lambda r, i: vars(calibration.evaluate(
        X, Y, HEAD, bins=i, ignore_index=i, logit_scale=r, chunk_rows=i)), 0.5, 4),
    "evaluate_classwise": (lambda r, i: calibration.evaluate_classwise(
        X, Y, HEAD, bins=i, ignore_index=i, softcap=r, chunk_rows=i).sums, 0.5, 4),
    "fit_temperature": (lambda r, i: calibration.fit_temperature(
        X + HEAD[Y], Y, tolerance=r, max_steps=i, bins=i, ignore_index=i).temperature, 2**-10, 50),
    "plane": (lambda r, i: representation.template_plane(HEAD, (0, i, 2)), 0.0, 1),
    "scatter": (lambda r, i: representation.class_scatter(X, Y, ignore_index=i), 0.0, 3),
    "NeMo": (lambda r, i: conventions.nemo(r, i, Y, r)["normalizer"], 0.5, 3),  # type: ignore[typeddict-item]
    "OpenNMT": (lambda r, i: conventions.opennmt_kl(r, i, 3)["smoothing"], 0.5, 5),
    "Keras": (lambda r, i: lsk.cross_entropy(X, Y, **conventions.keras(r, sample_weight=r)), 0.5, 0),
    "shifted": (lambda r, i: conventions.shift_labels(Y, i), 0.0, 3),
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLS)
def test_tools_take_the_numbers_that_losses_take(name: str) -> None:
    """NumPy's, a fraction, what has ``__index__``: with the result of plain ones."""
    tool, real, whole = TOOLS[name]
    want = pytree.tree_leaves(tool(real, whole))
    indexed = type("Indexed", (), {"__index__": lambda self: whole})()
    for number, index in ((np.float32(real), np.int64(whole)), (Fraction(real), torch.tensor(whole)), (real, indexed)):
        for got, one in zip(pytree.tree_leaves(tool(number, index)), want, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)
