"""Calls of F.cross_entropy's own kind, and the way through Python's gate to compare them with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drop_in import K
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import functional, modules
from labelsmooth_kernels.backends import BACKENDS

MISSING = BACKENDS["cpu"].unavailable()
NEEDS_EXTENSION = pytest.mark.skipif(MISSING is not None, reason=f"backend cpu: {MISSING}")
REDUCTIONS = ("mean", "sum", "none")
EPS = 0.1
GATE = functional.apply_spec


def by_the_gate(input: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The same loss, served in Python."""
    return GATE(input, target, lsk.LossSpec(**options))  # type: ignore[return-value]


def close_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any other way to serve a call is an error."""

    def refuse(*_: object) -> None:
        raise AssertionError("the call went to Python's gate")

    monkeypatch.setattr(functional, "apply_spec", refuse)
    monkeypatch.setattr(modules, "apply_spec", refuse)


def drawn(n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every fifth is ignored."""
    rng = torch.Generator().manual_seed(1000 * n + k)
    x = (torch.randn(n, k, generator=rng, dtype=torch.float64) * 3).to(dtype)
    y = torch.randint(k, (n,), generator=rng)
    y[::5] = -100
    return x, y


X, Y = drawn(9, K)
WEIGHT = torch.linspace(0, 1, K)
SOFT = X.softmax(1).flip(0)
