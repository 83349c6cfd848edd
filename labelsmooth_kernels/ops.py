"""The row operators that every kernel backend implements, as torch.library ops: one schema and one fake for all.

An op sees logits (..., K) of 2 or 3 dimensions in fp16, bf16, fp32 or fp64, with any strides; its rows, N of them, are
numbered as ``logits.flatten(0, -2)`` numbers them. float32 is the arithmetic and the dtype of every per-row result,
float64 for float64 logits ("acc"). With z = cap(logit_scale·x), cap(v) = softcap·tanh(v/softcap) or the identity where
softcap is None, and cap(-inf) = -inf, the target weights of a row are

    q_k = w_k·((1 - e)·t_k + (e/n)·u_k·c_k)

    t   one-hot of ``target`` (N,), contiguous int64; or ``target`` itself: of the shape of logits, any strides and any
        floating dtype
    w   ``weight`` (K,), u ``prior`` (K,): contiguous acc tensors, None for ones
    c   with ``finite`` [z_k > -inf], else 1
    n   K; with ``prior`` 1; with ``finite`` Σ u_k·c_k, and where that is 0 so is e/n
    e   ε = ``eps``, or where given ``eps_rows``, a contiguous acc tensor of 1 or N values; with ``others``, which never
        meets a prior, ε·n/(n - 1), and 0 where n <= 1

A term whose weight is exactly 0 is 0 even at z = -inf. With M = Σ q, zmax = max z, logsum = log Σ exp(z - zmax) and
lse = zmax + logsum,

    loss = M·logsum - Σ q·(z - zmax) + z_loss·lse² - confidence_penalty·H
    grad = row_scale·logit_scale·cap'·((M + 2·z_loss·lse + confidence_penalty·(H + log p))·p - q)

with log p = (z - zmax) - logsum and H = -Σ p·log p, rounded once, in the logits' dtype, shape and, where they are
dense, strides (``empty_like``). ``row_scale`` is None (= 1) or a contiguous acc tensor of 1 or N factors. M is exactly
1 for an index target without weight and prior.

``forward`` returns (loss, saved, stats, prediction, grad): ``saved`` (4, N) is (zmax, logsum, M + confidence_penalty·H,
n); ``stats`` (n_stats, N) is (nll, entropy, variance, collision) cut to its first n_stats (0, 1, 2 or 4) rows: nll =
-Σ t·log p without weights and smoothing, entropy = H, variance = Σ p·z² - (Σ p·z)², collision = Σ p²; ``prediction``
(N,) int64 comes with n_stats > 0 and is argmax z (the lowest index among equals). What was not asked for has no
elements. ``backward`` makes grad from ``saved``; ``target_grad`` the gradient of Σ row_scale·loss in a floating-point
target, row_scale·(1 - e)·w_k·(logsum - (z_k - zmax)), in the target's dtype (z_k - zmax counting as 0 where q_k = 0 and
z_k = -inf). The ``_`` forms write the gradient over the logits. ``scale_`` multiplies a gradient by a one-element acc
tensor and does nothing where that is 1.

A row whose index target is ignore_index has loss = nll = 0 and a gradient of exact zeros whatever its logits hold; they
are read only for the other statistics, and without those saved is 0. Another target outside [0, K) raises
IndexError on the CPU before anything is written, and makes its row NaN on a GPU; nothing is ever read or written
outside the tensors. A row with a NaN has a NaN loss and gradient; its zmax and prediction are unspecified.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .spec import accumulate_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMESPACE = "labelsmooth_kernels"
ROW_SCHEMA = (
    "Tensor target, Tensor? weight, Tensor? prior, float eps, Tensor? eps_rows, Tensor? row_scale, int ignore_index, "
    "bool others, bool finite, float z_loss, float confidence_penalty, float logit_scale, float? softcap"
)
SCHEMAS = {
    "forward": f"(Tensor logits, {ROW_SCHEMA}, bool with_grad, int n_stats) -> "
    "(Tensor loss, Tensor saved, Tensor stats, Tensor prediction, Tensor grad)",
    "forward_": f"(Tensor(a!) logits, {ROW_SCHEMA}, int n_stats) -> "
    "(Tensor loss, Tensor saved, Tensor stats, Tensor prediction)",
    "backward": f"(Tensor logits, {ROW_SCHEMA}, Tensor saved) -> Tensor grad",
    "backward_": f"(Tensor(a!) logits, {ROW_SCHEMA}, Tensor saved) -> ()",
    "target_grad": f"(Tensor logits, {ROW_SCHEMA}, Tensor saved) -> Tensor grad",
    "scale_": "(Tensor(a!) grad, Tensor scale) -> ()",
}
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
# (high, low) += x in bfloat16: high is the upper half of a float32 and low the byte below it, 24 bits; ``last`` rounds
# the sum into high. The C++ extension has it, for sums of many bfloat16 products in little more than their own memory.
LIBRARY.define("cpu_add_split_(Tensor(a!) high, Tensor(b!) low, Tensor x, bool last) -> ()")

# The mean or sum of a call with no other options, and what autograd wants of it: one operator in the place of
# `cpu_forward` and eight operations of PyTorch. ``loss`` () and ``scale`` (1,) are acc. A mean divides by the number of
# rows that count, with index targets and ``weight`` by Σ w_y; ``scale`` is one over that, and 1 for a sum. ``saved`` is
# that of `cpu_forward` and ``grad`` the gradient of the loss; they have no elements unless asked for.
LIBRARY.define(
    "cpu_reduced(Tensor logits, Tensor target, Tensor? weight, float eps, int ignore_index, bool mean, "
    "bool with_saved, bool with_grad) -> (Tensor loss, Tensor scale, Tensor saved, Tensor grad)"
)
# The gradient of Σ scale·loss in the logits, with one factor or one per row: differentiable, unlike `cpu_backward`.
LIBRARY.define(
    "cpu_gradient(Tensor logits, Tensor target, Tensor? weight, Tensor scale, float eps, int ignore_index) -> Tensor"
)


class RowCall(NamedTuple):
    """What every operator takes between its logits and what is its own, in the order of the schemas."""

    target: Tensor
    weight: Tensor | None
    prior: Tensor | None
    eps: float
    eps_rows: Tensor | None
    row_scale: Tensor | None
    ignore_index: int
    others: bool
    finite: bool
    z_loss: float
    confidence_penalty: float
    logit_scale: float
    softcap: float | None

    def of_rows(self, rows: slice | Tensor) -> RowCall:
        """The same for some of the rows, with their index targets."""

        def part(values: Tensor | None) -> Tensor | None:
            return values if values is None or values.numel() == 1 else values[rows]

        return self._replace(target=self.target[rows], eps_rows=part(self.eps_rows), row_scale=part(self.row_scale))


class Kernels(NamedTuple):
    """The overloads of one backend, resolved once."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    forward_: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]
    backward_: Callable[..., None]
    target_grad: Callable[..., Tensor]
    scale_: Callable[..., None]


def row_fakes(logits: Tensor, n_stats: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = math.prod(logits.shape[:-1])  # Size.numel would make a symbolic size a constant
    acc = accumulate_dtype(logits.dtype)
    loss, saved, stats = (logits.new_empty(shape, dtype=acc) for shape in ((n,), (4, n), (n_stats, n)))
    return loss, saved, stats, logits.new_empty(n if n_stats else 0, dtype=torch.int64)


def _fake_forward(logits: Tensor, *call: object) -> tuple[Tensor, ...]:
    *_, with_grad, n_stats = call
    grad = torch.empty_like(logits) if with_grad else logits.new_empty(0)
    return *row_fakes(logits, int(n_stats)), grad  # type: ignore[call-overload]


def _fake_forward_(logits: Tensor, *call: object) -> tuple[Tensor, ...]:
    return row_fakes(logits, int(call[-1]))  # type: ignore[call-overload]


def _fake_backward(logits: Tensor, *call: object) -> Tensor:
    return torch.empty_like(logits)


def _fake_target_grad(logits: Tensor, target: Tensor, *call: object) -> Tensor:
    return torch.empty_like(target)


def _fake_reduced(logits: Tensor, *call: object) -> tuple[Tensor, ...]:
    *_, with_saved, with_grad = call
    loss, saved, _, _ = row_fakes(logits, 0)
    shapes = (), (1,), saved.shape if with_saved else (4, 0)
    grad = torch.empty_like(logits) if with_grad else logits.new_empty(0)
    return *(loss.new_empty(shape) for shape in shapes), grad


torch.library.register_fake(f"{NAMESPACE}::cpu_reduced", _fake_reduced, lib=LIBRARY)


def _fake_nothing(tensor: Tensor, *call: object) -> None:
    return None


_FAKES: dict[str, Callable[..., object]] = {
    "forward": _fake_forward,
    "forward_": _fake_forward_,
    "backward": _fake_backward,
    "backward_": _fake_nothing,
    "target_grad": _fake_target_grad,
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


# ---- a linear layer and its loss, tile by tile: logits = hidden·linear_weightᵀ + linear_bias, never held

_LAYER = f"(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, {ROW_SCHEMA}, "
TILED_SCHEMAS = {
    "forward": f"{_LAYER}int n_stats) -> (Tensor loss, Tensor saved, Tensor stats, Tensor prediction)",
    "backward": f"{_LAYER}Tensor saved, float filter_eps, bool want_hidden, bool want_weight, bool want_bias) -> "
    "(Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
}


def fake_gradients(operands: tuple[Tensor, Tensor, Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    """Of the shapes of the operands; without elements where not wanted."""
    shapes = (operands[1] if t is None else t for t in operands)
    return tuple(t.new_empty(t.shape if want else 0) for t, want in zip(shapes, wanted, strict=True))


def _fake_tiled_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: object) -> tuple[Tensor, ...]:
    return row_fakes(hidden, int(call[-1]))  # type: ignore[call-overload]


def _fake_tiled_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *call: Any) -> tuple[Tensor, ...]:
    return fake_gradients((hidden, weight, bias), call[-3:])


for _name, _fake in (("forward", _fake_tiled_forward), ("backward", _fake_tiled_backward)):
    LIBRARY.define(f"tiled_{_name}{TILED_SCHEMAS[_name]}")
    torch.library.register_fake(f"{NAMESPACE}::tiled_{_name}", _fake, lib=LIBRARY)


def implement_tiled(key: str, kernels: object) -> None:
    """Register ``forward`` and ``backward`` of ``kernels`` (a module) as the tiled operators."""
    for name in TILED_SCHEMAS:
        LIBRARY.impl(f"tiled_{name}", getattr(kernels, name), key)


# ---- distillation: the logits of a student beside those of a teacher

# ``terms`` (2, N) acc: KL(softmax(teacher/T) ‖ softmax(student/T)) of every row, T the temperature, and its smoothed
# cross-entropy with q of the module's head (0 where alpha is 1); an ignored row has zeros. Student and teacher are
# (N, K) of one dtype with adjacent classes. ``grad``, contiguous, is row_scale·(alpha·T·(p_T - t_T) + (1 - alpha)·
# (M·p - q)), the gradient in the student of row_scale·(alpha·T²·KL + (1 - alpha)·loss); without elements unless asked
# for.
DISTILL_SCHEMA = (
    "(Tensor student, Tensor teacher, Tensor target, Tensor? prior, float eps, Tensor? eps_rows, Tensor? row_scale, "
    "int ignore_index, bool others, float alpha, float temperature, bool with_grad) -> (Tensor terms, Tensor grad)"
)


def _fake_distill(student: Tensor, *call: object) -> tuple[Tensor, Tensor]:
    terms = student.new_empty((2, student.shape[0]), dtype=accumulate_dtype(student.dtype))
    return terms, student.new_empty(student.shape if call[-1] else 0)


# The same for a teacher of any form, a chunk of rows at a time: see ``distillation``.
LIBRARY.define(
    "distill(Tensor student, Tensor teacher, str form, Tensor? teacher_weight, Tensor? teacher_bias, "
    f"float teacher_scale, {ROW_SCHEMA}, float alpha, float temperature, bool with_grad, str backend) -> "
    "(Tensor terms, Tensor grad)"
)
for _backend in ("cpu", "triton"):
    LIBRARY.define(f"{_backend}_distill{DISTILL_SCHEMA}")
    torch.library.register_fake(f"{NAMESPACE}::{_backend}_distill", _fake_distill, lib=LIBRARY)
