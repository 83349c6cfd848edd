"""Tensors without values: under FakeTensorMode and on the meta device, calls have the shapes that they would have."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from cases import Place

CALLS: dict[str, Any] = {
    "ε": lambda g: lsk.cross_entropy(g.x, g.y, label_smoothing=g.eps, backend=g.backend),
    "ε of each row": lambda g: lsk.cross_entropy(g.x, g.y, label_smoothing=g.rows, reduction="none", backend=g.backend),
    "everything": lambda g: lsk.cross_entropy(
        g.x, g.y, label_smoothing=0.1, weight=g.classes, smoothing=g.classes, row_weight=g.rows, backend=g.backend
    ),
    "probabilities": lambda g: lsk.cross_entropy(g.x, g.x.softmax(-1), label_smoothing=0.1, backend=g.backend),
    "head": lambda g: lsk.linear_cross_entropy(g.h, g.w, g.y, label_smoothing=g.eps, backend=g.backend),
    "top k": lambda g: lsk.linear_cross_entropy(g.h, g.w, lsk.TopK(g.y[:, None], g.rows[:, None]), backend=g.backend),
    "distillation": lambda g: lsk.distillation.distillation_loss(
        g.x, g.x.detach(), g.y, label_smoothing=g.eps, backend=g.backend
    ),
}


@pytest.mark.parametrize("device", ["fake", "meta"])
@pytest.mark.parametrize("name", CALLS)
def test_values_that_do_not_exist_are_not_looked_at(name: str, device: str, place: Place) -> None:
    """Under FakeTensorMode, and on the meta device: forward and backward, nothing asks for a value."""
    features = backends.BACKENDS[place[0]].features
    if name == "distillation" and features is not None and name not in features:
        pytest.skip(f"{place[0]} does not serve distillation")
    backend = None if device == "meta" else place[0]
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        given = types.SimpleNamespace(
            x=torch.empty(4, 9, requires_grad=True), h=torch.empty(4, 3, requires_grad=True),
            w=torch.empty(9, 3, requires_grad=True), y=torch.empty(4, dtype=torch.int64), eps=torch.empty(()),
            rows=torch.empty(4), classes=torch.empty(9), backend=backend,
        )  # fmt: skip
        CALLS[name](given).sum().backward()
    leaves = (given.h, given.w) if name in ("head", "top k") else (given.x,)
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
