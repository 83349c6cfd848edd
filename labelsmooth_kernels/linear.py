"""The loss of a linear head without its logits: one gate, the choice of a path, the autograd.Functions.

Three paths. *Chunked* (the default): see :mod:`labelsmooth_kernels.chunked`; with a mean or a sum the gradients are
made in the forward, 3 GEMMs in all; with ``reduction="none"`` and in fp16 the backward computes the logits again, 4
GEMMs. *Tiled* (Triton): nothing larger than a row's numbers between forward and backward, 5 GEMMs. *Unfused*
(``F.linear`` and :func:`labelsmooth_kernels.cross_entropy`): whole logits, for what only the reference serves, for
torch.func transforms, and where a dense soft target wants a gradient.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .arguments import checks_names, plain_float, plain_int, same_shape, takes
from .chunked import Soft, dense_target
from .functional import (
    apply_spec,
    check_targets,
    denominator,
    kernel_stats,
    prepare,
    reduce,
    shaped,
)
from .linear_autograd import LinearOnePass, LinearRowLoss, Path, row_losses
from .spec import FLOAT_DTYPES, LOSS_PARAMETERS, ArgumentError, LossSpec, Rows, check_same_device, is_dtensor, require
from .targets import Teacher, TopK, check_top_k, flat, teacher_rows, top_k
from .torch_state import CHECK_TARGETS, savable, transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import LinearOptions
    from .reference import RowStats


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """How :func:`linear_cross_entropy` goes about it; what it computes is a :class:`LossSpec`."""

    chunk_rows: int | None = None
    grad_accumulation: str = "float32"
    skip_ignored: bool | None = None
    method: str = "chunked"
    filter_eps: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk_rows", plain_int(self.chunk_rows))
        rows = self.chunk_rows
        good = rows is None or (isinstance(rows, int) and not isinstance(rows, bool) and rows > 0)
        require(good, "chunk_rows", rows, "an int > 0 or None")
        known = self.grad_accumulation in ("float32", "input")
        require(known, "grad_accumulation", self.grad_accumulation, "'float32' or 'input'")
        require(self.skip_ignored in (None, False, True), "skip_ignored", self.skip_ignored, "a bool or None")
        require(self.method in ("chunked", "tiled"), "method", self.method, "'chunked' or 'tiled'")
        object.__setattr__(self, "filter_eps", plain_float(self.filter_eps))
        eps = self.filter_eps
        good = eps is None or (isinstance(eps, int | float) and 0 <= eps < math.inf)
        require(good, "filter_eps", eps, "a finite number >= 0 or None")
        if eps is not None and self.method != "tiled":
            raise ArgumentError(f"filter_eps is for method='tiled', got {eps!r} with method={self.method!r}")


HEAD_PARAMETERS = tuple(
    p.replace(default=-1) if p.name == "class_dim" else p for p in LOSS_PARAMETERS if p.name != "inplace"
)
"""What a head's loss takes of the options; the classes of its logits are last, but where it has more dimensions."""


def default_filter_eps(dtype: torch.dtype) -> float:
    """A tile whose every |mass·p| is below this changes no sum of the dtype: 2⁻¹² for bfloat16."""
    return torch.finfo(dtype).eps / 32


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK | Teacher, *,
    return_stats: Literal[False] = False, **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK | Teacher, *,
    return_stats: Literal[True, "entropy", "all"], **options: Unpack[LinearOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK | Teacher, *,
    return_stats: bool | str, **options: Unpack[LinearOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...  # fmt: skip
@checks_names("linear_cross_entropy", {"inplace"})
@takes(HEAD_PARAMETERS)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | TopK | Teacher,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int | None = None,
    chunk_rows: int | None = None,
    grad_accumulation: str = "float32",
    skip_ignored: bool | None = None,
    method: str = "chunked",
    filter_eps: float | None = None,
    options: object = None,
    **loss_options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """``cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)`` without ever holding the logits.

    A drop-in for ``F.linear_cross_entropy`` of PyTorch 2.13, with label smoothing and every option of
    :func:`labelsmooth_kernels.cross_entropy`. Arithmetic: GEMMs in the dtype of the operands with float32 accumulation,
    logits rounded to that dtype as ``F.linear`` rounds them, the loss in float32.

    Args:
        input: hidden states (D,), (N, D) or (..., D), fp16, bf16, fp32 or fp64.
        linear_weight: (K, D), of the same dtype (under autocast of any); or (K, d1, ..., D) for input (N, D) and the
            target (N, d1, ...).
        target: class indices of the shape of input without D, int64, int32 or uint8; class probabilities (..., K);
            :class:`TopK` or a :class:`Teacher`.
        linear_bias: (K,), or (K, d1, ...).
        weight: (K,) class weights.
        ignore_index: as in ``cross_entropy``; None is -100.
        chunk_rows: rows of input whose logits exist at a time; None: 384 on a CPU and 2048 on a GPU, fewer where a
            chunk would exceed 1 GiB; on a GPU all of them where whole logits are smaller than a chunk and the float32
            sum of the gradient of ``linear_weight``, up to 2048 + 2·D rows in half precision. LABELSMOOTH_DEBUG=1 in
            the environment prints what was chosen.
        grad_accumulation: how half-precision gradients of ``linear_weight`` are summed over chunks: in ``"float32"``
            or in the dtype of the ``"input"``, which saves that accumulator.
        skip_ignored: leave ignored rows out of the GEMMs, which looks at the targets (a synchronisation on a GPU).
            None: on the CPU only. Not with ``return_stats``, which asks for every row's.
        method: ``"chunked"``, or ``"tiled"`` (Triton), which needs less memory and 5 GEMMs for 3: index targets, no
            softcap, no ``smooth_over="finite"``.
        filter_eps: with ``"tiled"``, tiles whose every gradient entry lies below are replaced by their mean; the
            smoothing term and the sum of a row's gradient stay exact. None: the dtype's resolution / 32; 0: exact.
        options: accepted for the sake of ``F.linear_cross_entropy``; how that function chunks has no meaning here.
        loss_options: ``reduction``, ``label_smoothing``, ``smoothing``, ``smooth_over``, ``z_loss``,
            ``confidence_penalty``, ``logit_scale``, ``softcap``, ``row_weight``, ``normalizer``, ``return_stats``,
            ``backend`` of ``cross_entropy``; ``class_dim`` where it names the place that the classes have anyway, such
            as -1.

    Returns:
        What ``cross_entropy`` returns.

    Raises:
        ArgumentError, TypeError, IndexError, NotImplementedError: as ``cross_entropy``.

    Only gradients that are demanded are computed and allocated. A second derivative is taken through whole logits.
    Source: the chunks of Liger Kernel (Hsu et al. 2024), the tiles of Wijmans et al. 2025, "Cut Your Losses".
    """
    if isinstance(input, Tensor) and isinstance(linear_weight, Tensor):  # else the gate says so
        loss_options = head_options(loss_options, input.dim(), linear_weight.dim())
    if is_dtensor(input) or is_dtensor(linear_weight):
        given = {"ignore_index": -100 if ignore_index is None else ignore_index, "weight": weight, **loss_options}
        chunks = {"chunk_rows": chunk_rows, "grad_accumulation": grad_accumulation}
        only_here = {"skip_ignored": skip_ignored, "method": method, "filter_eps": filter_eps}
        from . import dtensor

        return dtensor.linear_cross_entropy(input, linear_weight, target, linear_bias, given, chunks, only_here)
    check_operands(input, linear_weight, linear_bias)
    ignored = -100 if ignore_index is None else ignore_index
    spec = LossSpec(weight=weight, ignore_index=ignored, class_dim=input.dim() - 1, **loss_options)
    how = LinearSpec(
        chunk_rows=chunk_rows,
        grad_accumulation=grad_accumulation,
        skip_ignored=skip_ignored,
        method=method,
        filter_eps=filter_eps,
    )
    call = _prepare_linear(input, linear_weight, target, linear_bias, spec)
    if os.environ.get(CHECK_TARGETS) == "1":
        check_targets(call.rows)
    # On a GPU the first backend that has tiled kernels; on a CPU Triton serves only where it is named.
    chosen = backends.select(call.rows, backends.TILED if method == "tiled" and input.is_cuda else frozenset())
    if method == "tiled" and (reasons := _why_not_tiled(call, chosen)):
        raise ArgumentError(f"method='tiled' cannot serve this call: {'; '.join(reasons)}")
    if transformed() or chosen.kernels is None or call.target_needs_grad:
        return apply_spec(call.logits(), call.dense_target(), spec)
    reduced, stats = _fused(call, chosen, how)
    return shaped(reduced, stats, call.shape, spec)


def head_options(options: dict[str, Any], input_dim: int | None, weight_dim: int) -> dict[str, Any]:
    """The options of ``cross_entropy`` that a head has: all but ``inplace`` and ``class_dim``, which may only say where
    the classes are: last for a ``linear_weight`` of 2 dimensions, else 1; ``input_dim`` is None if not yet known."""
    if "inplace" in options:
        raise TypeError("inplace is an option of cross_entropy: here no logits exist")
    places = [1] if weight_dim > 2 else [-1] if input_dim is None else [-1, input_dim - 1]
    if "class_dim" in options:
        allowed = f"one of {places}, where a head of these shapes has its classes"
        require(plain_int(options["class_dim"]) in places, "class_dim", options["class_dim"], allowed)
    return {name: value for name, value in options.items() if name != "class_dim"}


class _Call(NamedTuple):
    """A call whose arguments have been checked."""

    rows: Rows
    """with a stand-in for the logits: their shape, dtype and device, and no memory"""
    operands: tuple[Tensor, Tensor, Tensor | None]
    """hidden (N, D), linear_weight (C·P, D), linear_bias (C·P,)"""
    soft: Soft
    positions: int
    shape: torch.Size
    """of one value per row"""
    logits_shape: torch.Size
    target: Tensor | TopK | Teacher

    @property
    def target_needs_grad(self) -> bool:
        tensor = self.target if isinstance(self.target, Tensor) else self.target[0]
        return isinstance(self.target, Tensor) and torch.is_grad_enabled() and tensor.requires_grad

    def logits(self) -> Tensor:
        """The whole logits, for the unfused path."""
        dtype = self.rows.logits.dtype
        return F.linear(*(t if t is None else t.to(dtype) for t in self.operands)).reshape(self.logits_shape)  # type: ignore[arg-type]

    def dense_target(self) -> Tensor:
        """The target as F.cross_entropy would take it."""
        if isinstance(self.target, Tensor):
            return self.target
        x = self.rows.logits
        return dense_target(self.rows.target, self.soft, x.dtype, x.shape[-1]).reshape(self.logits_shape)


def check_operands(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    for name, value in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if not isinstance(value, Tensor) and (value is not None or name != "linear_bias"):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    check_same_device("input", input, input)
    if input.dtype not in FLOAT_DTYPES:
        raise NotImplementedError(f"input must have one of the dtypes {FLOAT_DTYPES}, got {input.dtype}")
    require(input.dim() > 0, "input", input, "of shape (D,), (N, D) or (..., D)")
    shape, d = linear_weight.shape, input.shape[-1]
    good = len(shape) == 2 or (len(shape) > 2 and input.dim() == 2)
    require(good, "linear_weight", linear_weight, "of shape (K, D), or (K, d1, ..., D) with an input (N, D)")
    if shape[-1] != d:
        raise ArgumentError(f"linear_weight must end in the {d} features of input, got {tuple(shape)}")
    for name, value in (("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if value is None:
            continue
        check_same_device(name, value, input)
        if value.dtype not in FLOAT_DTYPES or (value.dtype != input.dtype and not autocasts(input)):
            raise ArgumentError(f"{name} must have the dtype of input, {input.dtype}, or autocast; got {value.dtype}")
    if linear_bias is not None and linear_bias.shape != shape[:-1]:
        raise ArgumentError(f"linear_bias must have shape {tuple(shape[:-1])}, got {tuple(linear_bias.shape)}")


def autocasts(input: Tensor) -> bool:
    """Return whether autocast casts this input."""
    kind = input.device.type  # asked of one without autocast, such as "meta", is_autocast_enabled raises
    return input.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _prepare_linear(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK | Teacher, linear_bias: Tensor | None, spec: LossSpec
) -> _Call:
    """Check the target and the options against the operands; the call as rows."""
    shape = input.shape[:-1] + linear_weight.shape[1:-1]
    logits_shape = input.shape[:-1] + linear_weight.shape[:-1]
    dtype = torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
    stand_in = input.detach().new_empty(1, dtype=dtype).expand(logits_shape)
    positions = math.prod(linear_weight.shape[1:-1])
    if isinstance(target, Tensor):
        known = same_shape(target.shape, shape) or same_shape(target.shape, logits_shape)
        if not known and not (input.dim() == 1 and target.shape == (1,)):
            raise ArgumentError(
                f"target must have shape {tuple(shape)}, or {tuple(logits_shape)} for class probabilities, beside "
                f"input {tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)}, got {tuple(target.shape)}"
            )
        rows, shape = prepare(stand_in, target, spec)
        if not rows.index_target and positions == 1:
            rows = rows._replace(target=rows.target.flatten(0, -2))
        soft = Soft()
    else:
        rows, shape = prepare(stand_in, stand_in, spec)
        if positions > 1:
            raise ArgumentError(f"target must be a tensor beside a linear_weight {tuple(linear_weight.shape)}")
        if isinstance(target, TopK):
            given, soft = top_k(target, stand_in)
            check_top_k(target.indices, stand_in.shape[-1])
        else:
            given, soft = teacher_rows("target", target, stand_in)
        rows = rows._replace(target=given)
    bias = None if linear_bias is None else savable(linear_bias.flatten())
    operands = (savable(flat(input)), savable(linear_weight.flatten(0, -2)), bias)
    return _Call(rows, operands, soft, positions, shape, logits_shape, target)


# ---- from a call to its result


def _fused(call: _Call, chosen: backends.Backend, how: LinearSpec) -> tuple[Tensor, RowStats | None]:
    rows, spec = call.rows, call.rows.spec
    tiled = how.method == "tiled"
    grad, device, dtype = torch.is_grad_enabled(), rows.logits.device.type, rows.logits.dtype
    wanted = [grad and t is not None and t.requires_grad for t in call.operands]
    others = (rows.row_weight, spec.normalizer)
    grad_of_others = grad and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    skip = device == "cpu" if how.skip_ignored is None else how.skip_ignored
    filter_eps = default_filter_eps(dtype) if how.filter_eps is None else how.filter_eps
    wide, chunk_rows = how.grad_accumulation == "float32", how.chunk_rows or 0
    path = Path(chosen.name, dtype, call.positions, chunk_rows, wide, skip, tiled, filter_eps, wanted)
    number, eps = (0.0, rows.eps) if isinstance(rows.eps, Tensor) else (rows.eps, None)
    soft = call.soft
    tensors = (*call.operands, rows.target, rows.weight, rows.prior, eps, *soft[:3])
    constants = (number, soft.teacher_scale, spec, path)
    one_pass = spec.reduction != "none" and dtype != torch.float16 and not grad_of_others and not tiled
    if any(wanted) and one_pass:
        loss, saved, *stats = LinearOnePass.apply(*tensors, rows.row_weight, denominator(rows), *constants)  # type: ignore[no-untyped-call]
    elif any(wanted):
        loss, saved, *stats = LinearRowLoss.apply(*tensors, *constants)  # type: ignore[no-untyped-call]
        loss = reduce(loss, rows)
    else:
        loss, saved, *stats = row_losses(*tensors, *constants)
        loss = reduce(loss, rows)
    return loss, kernel_stats(saved, *stats) if spec.return_stats else None


def _why_not_tiled(call: _Call, chosen: backends.Backend) -> list[str]:
    reasons = options_not_tiled(call.rows.spec, chosen.name, call.positions)
    return reasons if call.rows.index_target else [*reasons, "it serves class indices, not soft targets"]


def options_not_tiled(spec: LossSpec, backend: str, positions: int) -> list[str]:
    """Why the tiled kernels cannot serve some options, whatever the tensors of a call are."""
    refused = {
        f"backend {backend!r} has no tiled kernels, 'triton' has": backend != "triton",
        "it does not serve softcap: smoothing is no longer rank one under it": spec.softcap is not None,
        "it does not serve smooth_over='finite'": spec.smooth_over == "finite" and spec.smooths,
        f"it does not serve return_stats={spec.return_stats!r}": spec.n_stats > 1,
        "it does not serve confidence_penalty": spec.confidence_penalty != 0.0,
        "it serves a linear_weight of two dimensions": positions > 1,
    }
    return [reason for reason, holds in refused.items() if holds]
