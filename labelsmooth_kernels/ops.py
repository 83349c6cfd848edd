"""The row operators that every kernel backend implements, as torch.library ops: one schema and one fake for all.

An op sees logits (N, K) with unit class stride, any row stride and alignment, in fp16, bf16, fp32 or fp64; ``target``
(N,), contiguous int64; and a row's target weights as q = (1 - eps)·[k = y] + eps/K, eps being the float or, where
given, the tensor ``eps_rows`` of 1 or N values (conventions are resolved before). float32 is the arithmetic and the
dtype of every per-row result, float64 for float64 logits ("acc"). Ops return rows; reductions and normalisers are
Python.

``forward`` returns, per row, with z = logits:

    loss = logsum - Σ q·(z - zmax)      zmax = max z      logsum = log Σ exp(z - zmax)      (lse = zmax + logsum)

and, with ``with_grad``, grad = row_scale·(p - q) in the logits' dtype, p = exp((z - zmax) - logsum), rounded once; with
``with_stats`` also nll = logsum - (z_y - zmax) and prediction = argmax z (the lowest index among equals). What was not
asked for comes back with no elements. ``row_scale`` is None (= 1) or an acc tensor of 1 or N factors. ``backward``
makes the same gradient from the saved (zmax, logsum). The ``_`` forms write the gradient over the logits; ``scale_``
multiplies a gradient by a one-element acc tensor and does nothing where that is 1.

A row with target == ignore_index has loss = nll = 0 and a gradient of exact zeros whatever its logits hold; they are
read only for the other statistics of ``with_stats``, and zmax = logsum = 0 without it. Another target
outside [0, K) raises IndexError on the CPU before anything is written, and makes its row NaN on a GPU; nothing is ever
read or written outside the tensors. A row with a NaN has a NaN loss and gradient; its zmax and prediction are
unspecified.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

NAMESPACE = "labelsmooth_kernels"
_ROW = "Tensor target, float eps, Tensor? eps_rows, Tensor? row_scale, int ignore_index"
_SAVED = "Tensor zmax, Tensor logsum"
SCHEMAS = {
    "forward": f"(Tensor logits, {_ROW}, bool with_grad, bool with_stats) -> "
    "(Tensor loss, Tensor zmax, Tensor logsum, Tensor nll, Tensor prediction, Tensor grad)",
    "forward_": f"(Tensor(a!) logits, {_ROW}, bool with_stats) -> "
    "(Tensor loss, Tensor zmax, Tensor logsum, Tensor nll, Tensor prediction)",
    "backward": f"(Tensor logits, {_ROW}, {_SAVED}) -> Tensor grad",
    "backward_": f"(Tensor(a!) logits, {_ROW}, {_SAVED}) -> ()",
    "scale_": "(Tensor(a!) grad, Tensor scale) -> ()",
}
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


class Kernels(NamedTuple):
    """The overloads of one backend, resolved once."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]
    forward_: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]
    scale_: Callable[..., None]


def _row_fakes(logits: Tensor, with_stats: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, zmax, logsum = (logits.new_empty(n, dtype=acc) for _ in range(3))
    stats = n if with_stats else 0
    return loss, zmax, logsum, logits.new_empty(stats, dtype=acc), logits.new_empty(stats, dtype=torch.int64)


def _fake_forward(
    logits: Tensor,
    target: Tensor,
    eps: float,
    eps_rows: Tensor | None,
    row_scale: Tensor | None,
    ignore_index: int,
    with_grad: bool,
    with_stats: bool,
) -> tuple[Tensor, ...]:
    grad = torch.empty(logits.shape if with_grad else (0,), dtype=logits.dtype, device=logits.device)
    return *_row_fakes(logits, with_stats), grad


def _fake_forward_(logits: Tensor, *row: object, with_stats: bool | None = None) -> tuple[Tensor, ...]:
    return _row_fakes(logits, bool(row[-1] if with_stats is None else with_stats))


def _fake_backward(logits: Tensor, *saved: object) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_nothing(tensor: Tensor, *rest: object) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "forward": _fake_forward,
    "forward_": _fake_forward_,
    "backward": _fake_backward,
    "backward_": _fake_nothing,
    "scale_": _fake_nothing,
}


def define(backend: str) -> Kernels:
    """Define the ops ``{backend}_{name}`` for every name in SCHEMAS and return their overloads."""
    for name, schema in SCHEMAS.items():
        LIBRARY.define(f"{backend}_{name}{schema}")
        torch.library.register_fake(f"{NAMESPACE}::{backend}_{name}", _FAKES[name], lib=LIBRARY)
    namespace = getattr(torch.ops, NAMESPACE)
    return Kernels(*(getattr(namespace, f"{backend}_{name}").default for name in SCHEMAS))


def implement(backend: str, key: str, kernels: object) -> None:
    """Register the functions of ``kernels`` (a module) as the ops of ``backend`` under a dispatch key."""
    for name in SCHEMAS:
        LIBRARY.impl(f"{backend}_{name}", getattr(kernels, name), key)
