"""The tools beside the losses take the numbers and name the wrong keywords that the losses do, and need no values."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from tracing import compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, conventions, representation, smoothing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

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


NEAR = torch.tensor([[1, 2], [0, 3], [4, 0], [1, 1], [3, 0]])
TARGETS: dict[str, Callable[..., Any]] = {
    "unigram_prior": lambda counts, y, near, of: smoothing.unigram_prior(counts, 0.75, 0.5),
    "neighbour_targets": lambda counts, y, near, of: smoothing.neighbour_targets(y, 0.2, lsk.TopK(near, of)),
    "temporal_targets": lambda counts, y, near, of: smoothing.temporal_targets(y, (0.2, 0.1), 2),
}
GIVEN = (torch.arange(5), Y.reshape(6, 10), NEAR, torch.tensor([[1, 3], [0, 0], [2, 2], [1, 0], [5, 1]]))


@compiler
@pytest.mark.parametrize("name", TARGETS)
def test_compiled_and_exported_targets_are_the_same(name: str) -> None:
    want = pytree.tree_leaves(TARGETS[name](*GIVEN))
    compiled = torch.compile(TARGETS[name], backend="eager", fullgraph=True)
    module = torch.nn.Module()
    module.forward = TARGETS[name]
    exported = torch.export.export(module, GIVEN).module()
    for call in (compiled, exported):
        for got, one in zip(pytree.tree_leaves(call(*GIVEN)), want, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0)


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("name", TARGETS)
def test_targets_of_tensors_without_values(name: str, device: str) -> None:
    want = pytree.tree_leaves(TARGETS[name](*GIVEN))
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        given = [torch.empty(t.shape, dtype=t.dtype) for t in GIVEN]
        found = pytree.tree_leaves(TARGETS[name](*given))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in want]


@compiler
def test_targets_of_a_length_that_only_the_run_knows() -> None:
    for name, call in TARGETS.items():

        def of_some(keep: Tensor, call: Callable[..., Any] = call) -> Any:
            return call(GIVEN[1][keep], GIVEN[1][keep], *GIVEN[2:])

        keep = GIVEN[1] > 1
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            made = torch.compile(of_some, backend="eager", fullgraph=True)(keep)
        for got, one in zip(pytree.tree_leaves(made), pytree.tree_leaves(of_some(keep)), strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0, msg=name)


def unread(counts: Tensor, y: Tensor, near: Tensor, of: Tensor) -> tuple[Tensor, ...]:
    """What the rows of all targets sum to where their values are not looked at."""
    made = [torch.compile(call, backend="eager", fullgraph=True)(counts, y, near, of) for call in TARGETS.values()]
    assert all(((t.indices >= 0) & (t.indices < 5)).all() for t in made[1:])
    return made[0].sum(), made[1].probabilities.sum(-1), made[2].probabilities.sum(-1)


@compiler
def test_bad_values_that_are_not_looked_at_make_nan() -> None:
    """Where a GPU would be waited for, or a tracer runs: NaN in the rows that they are about, and no class outside."""
    counts, y, near, of = GIVEN[0].double(), torch.tensor([[0, 1, 2, 3, 4, 0, -1]]), NEAR.clone(), GIVEN[3].double()
    counts[1], near[3, 1], of[4, 0] = -1, 9, -1
    prior, neighbours, beside = unread(counts, y, near, of)
    assert prior.isnan()
    assert neighbours.isnan().tolist() == [[False, False, False, True, True, False, True]]
    assert beside.isnan().tolist() == [[False, False, False, False, True, True, True]]
    assert beside[0, 2] == 0, "an ignored row"
