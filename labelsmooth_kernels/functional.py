"""The public function: one gate, one choice of backend, one autograd.Function for each form, one reduction. Calls with
PyTorch's arguments alone go round them on a CPU (``direct``)."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import backends, direct, ops, reference
from .arguments import checks_names, known_size, same_shape, takes
from .autograd import OnePass, RowLoss, TransformableRowLoss, row_arguments
from .reference import RowStats
from .spec import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    LOSS_PARAMETERS,
    ArgumentError,
    LossSpec,
    Rows,
    accumulate_dtype,
    check_index_targets,
    check_plain,
    check_prior,
    check_same_device,
    is_dtensor,
    prior_mass,
    reduction_of,
    require,
)
from .torch_state import CHECK_TARGETS, readable, savable, transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import CallOptions


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0, *, inplace: bool = False, return_stats: Literal[False] = False,
    **options: Unpack[CallOptions],
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0, *, inplace: bool = False, return_stats: Literal[True, "entropy", "all"],
    **options: Unpack[CallOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: bool | None = None,
    ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0, *, inplace: bool = False, return_stats: bool | str,
    **options: Unpack[CallOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...  # fmt: skip
@checks_names("cross_entropy")
@takes(LOSS_PARAMETERS)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """Cross-entropy with label smoothing, loss and gradient in one pass over the logits.

    ``loss = M·lse - Σ q·z + z_loss·lse² - confidence_penalty·H`` per row, with ``z = softcap·tanh(logit_scale·x /
    softcap)``, ``lse = log Σ exp z``, target weights q of mass M, ``p = exp(z - lse)`` and its entropy ``H``; the
    gradient in z is ``(M + 2·z_loss·lse + confidence_penalty·(H + log p))·p - q``. See
    :mod:`labelsmooth_kernels.reference` for q.

    Args:
        input: logits (K,), (N, K) or (N, K, d1, ...), fp16, bf16, fp32 or fp64; with ``class_dim=-1`` (N, d1, ..., K).
        target: class indices of the shape of input without the classes, int64, int32 or uint8; or class probabilities
            of the shape of input, any floating dtype, not assumed to sum to 1.
        weight: (K,) factors of q, as in ``F.cross_entropy``.
        size_average, reduce: PyTorch's deprecated spelling of ``reduction``, which they replace, with its warning.
        ignore_index: rows with this target have zero loss and exactly zero gradient, even where their logits are NaN.
        reduction: ``"mean"`` (over valid rows, weighted by ``weight`` of the target and ``row_weight``), ``"sum"`` or
            ``"none"``.
        label_smoothing: ε <= 1, a number, a one-element tensor (a schedule) or one value per row; ε < 0 sharpens.
        smoothing: ``"uniform"``: (1-ε)[k=y] + ε/K; ``"others"``: 1-ε on y and ε/(K-1) elsewhere; or a prior (K,)
            of entries >= 0 that sum to 1, within 2⁻⁶ + K·2⁻²⁵ (what a cast to half precision costs).
        smooth_over: ``"all"`` classes, or the ``"finite"`` ones (logit > -inf), over which the distribution is
            renormalised. A mask of ``torch.finfo(dtype).min`` is finite, and its share of ε makes the loss huge or
            infinite: mask with -inf.
        class_dim: where the classes are; ignored for (K,).
        confidence_penalty: β of Pereyra et al. 2017, rewards entropy; below 0 it is entropy minimisation (Grandvalet
            and Bengio 2004), and all there is beside probabilities of zeros as ``target``.
        z_loss, logit_scale, softcap: see the formula. A logit of -inf stays -inf under the softcap. A mean with class
            weights divides every term by Σ w_y; the README shows how to divide that of z_loss by the rows instead.
        row_weight: a factor for every row's loss, of the shape of target; or one, or (N, 1) for rows (N,).
        normalizer: replaces the denominator of the mean (a global token count), a number or a one-element tensor,
            never synced; or ``"rows"``: the number of valid rows, whatever their weights are.
        inplace: let the gradient overwrite ``input`` (or the copy that its layout needs): with a mean or a sum the
            logits are gone once the loss is returned. Autograd raises where their old values, or the gradient, are
            missed.
        return_stats: also return :class:`RowStats` (nll, lse, confidence, prediction), detached, each of the shape of
            target; ``"entropy"`` adds the entropy of p, ``"all"`` also the variance of z under p and Σ p².
        backend: ``"cpu"``, ``"cuda"``, ``"triton"`` or ``"reference"``; None takes the best that can serve the call.

    Returns:
        The loss, float32 for half-precision input (float64 for fp64); with ``return_stats`` a pair (loss, RowStats).

    Raises:
        ArgumentError (a ValueError and a RuntimeError), TypeError: a bad argument, with its name, value and what is
            allowed.
        IndexError: a target outside [0, K) that is not ignore_index, on the CPU. On a GPU that row's loss and gradient
            are NaN, without a synchronisation; LABELSMOOTH_CHECK_TARGETS=1 in the environment makes it raise there too.
            Priors are looked at under the same conditions, unless vmap maps over them; a program that torch.compile or
            torch.export makes looks on a CPU alone, and raises a RuntimeError.

    Saved for the backward: the gradient and a reference to ``input``, or with ``reduction="none"`` and fp16 four
    numbers per row and that reference. Source: Szegedy et al. 2016, "Rethinking the Inception Architecture"; Müller et
    al. 2019.
    """
    reduction = reduction_of(reduction, size_average, reduce)
    if not options or (options.keys() == {"backend"} and direct.is_default(options["backend"])):
        loss = direct.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        if loss is not None:
            return loss
    options |= {
        "weight": weight, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing
    }  # fmt: skip
    if is_dtensor(input):
        from . import dtensor  # which takes long to import

        return dtensor.cross_entropy(input, target, dtensor.spec_of(input, options))  # type: ignore[arg-type]
    return apply_spec(input, target, LossSpec.of(options))


def apply_spec(input: Tensor, target: Tensor, spec: LossSpec) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`cross_entropy` with its options already in a :class:`LossSpec`."""
    if is_dtensor(input):
        from . import dtensor  # which takes long to import

        return dtensor.cross_entropy(input, target, spec)  # type: ignore[arg-type]
    rows, shape = prepare(input, target, spec)
    chosen = backends.select(rows)
    if os.environ.get(CHECK_TARGETS) == "1" or (chosen.kernels is None and input.device.type == "cpu"):
        check_targets(rows)  # the kernels look for themselves on a CPU
    return shaped(*(_by_reference(rows) if chosen.kernels is None else _by_kernels(rows, chosen.kernels)), shape, spec)


def shaped(
    reduced: Tensor, stats: RowStats | None, shape: torch.Size, spec: LossSpec
) -> Tensor | tuple[Tensor, RowStats]:
    """The result of a call whose rows have this shape."""
    if spec.reduction == "none":
        reduced = reduced.reshape(shape)
    if stats is None:
        return reduced
    nll, lse, confidence, prediction = (value.reshape(shape) for value in stats[:4])
    more = (None if value is None else value.reshape(shape) for value in stats[4:])
    return reduced, RowStats(nll, lse, confidence, prediction, *more)


# ---- the gate


def prepare(input: Tensor, target: Tensor, spec: LossSpec, *, shard: bool = False) -> tuple[Rows, torch.Size]:
    """Check the tensors against each other; returns the call as rows, and the shape of one value per row. With
    ``shard`` there are other classes elsewhere, and there may be none here."""
    class_dim = _class_dim(input, target, spec) % input.dim()
    check_plain("normalizer", spec.normalizer)
    target = savable(target)
    shape = input.shape[:class_dim] + input.shape[class_dim + 1 :]
    n, num_classes = math.prod(shape), input.shape[class_dim]  # Size.numel would make a symbolic size a constant
    if known_size(num_classes, 0) and (n or target.numel()) and not shard:
        raise IndexError(f"input must have a class for every target, got shape {tuple(input.shape)} without classes")
    _check_target(input, target, shape)
    probabilities = target.is_floating_point()
    if probabilities and spec.ignore_index >= 0:
        raise ArgumentError(f"ignore_index is for index targets: with probabilities leave it, got {spec.ignore_index}")
    flat = class_dim == input.dim() - 1 and _contiguous(input) and (not probabilities or _contiguous(target))
    logits = _classes_last(savable(input), class_dim, flat)
    if spec.inplace and not torch.compiler.is_compiling() and _overlaps(logits):  # compiled, it is not in place
        logits = logits.contiguous()
    row_target = (
        _classes_last(target, class_dim, flat) if probabilities else target.reshape(-1).to(torch.int64).contiguous()
    )
    weight, prior = _class_vector("weight", spec.weight, logits), None
    if isinstance(spec.smoothing, Tensor):
        prior = _prior(spec.smoothing, logits, shard)
    if spec.others and spec.smooths and not shard and known_size(num_classes, 1):
        raise ArgumentError(
            "smoothing='others' needs at least 2 classes, got 1: there is no other class to smooth over"
        )
    eps = spec.label_smoothing
    if isinstance(eps, Tensor):
        eps = _per_row("label_smoothing", eps, shape, logits)
    elif torch.compiler.is_compiling() and spec.smooths:  # as a tensor a changing number stays out of the graph
        eps = _scalar(eps, logits).reshape(1)
    row_weight = None
    if spec.row_weight is not None:
        row_weight = _per_row("row_weight", spec.row_weight, shape, logits).expand(n).contiguous()
        if not probabilities:  # an ignored row counts for nothing, whatever its weight is
            row_weight = torch.where(row_target == spec.ignore_index, 0.0, row_weight)
    return Rows(spec, logits, row_target, weight, prior if spec.smooths else None, eps, row_weight), shape


def _classes_last(tensor: Tensor, class_dim: int, flat: bool) -> Tensor:
    """(N, K) if ``flat`` or there is one row dimension, else (A, B, K): the row dimensions before the classes merged,
    and those behind them; where no class is in between, the last row dimension stays apart. A view unless strides
    forbid to merge, and then one copy."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if flat:
        return tensor.flatten(0, -2)
    if class_dim == tensor.dim() - 1:
        return tensor.flatten(0, -3) if tensor.dim() > 3 else tensor
    behind = tensor.flatten(class_dim + 1)
    if class_dim == 0:
        return behind.transpose(0, 1)
    return behind.flatten(0, class_dim - 1).transpose(1, 2)


def _contiguous(tensor: Tensor) -> bool:
    """Return whether a tensor is contiguous. The stride comes first: PyTorch cannot answer for a stand-in that is
    expanded to a number of rows which it does not know while it traces."""
    return tensor.stride(-1) == 1 and tensor.is_contiguous()


def _overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory, such as those of an expanded row."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _class_dim(input: Tensor, target: Tensor, spec: LossSpec) -> int:
    """Where the classes of input are, once it is known to hold logits beside a target."""
    for name, value in (("input", input), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        check_same_device(name, value, value)
    if input.dtype not in FLOAT_DTYPES:
        raise NotImplementedError(f"input must have one of the dtypes {FLOAT_DTYPES}, got {input.dtype}")
    if input.dim() == 0:
        raise ArgumentError("input must have shape (K,), (N, K) or (N, K, d1, ...), got a 0-dimensional tensor")
    class_dim = 0 if input.dim() == 1 else spec.class_dim
    if not -input.dim() <= class_dim < input.dim():
        raise ArgumentError(f"class_dim must be a dimension of input {tuple(input.shape)}, got {spec.class_dim}")
    check_same_device("target", target, input)
    return class_dim


def _check_target(input: Tensor, target: Tensor, shape: torch.Size) -> None:
    """Class indices of ``shape``, or class probabilities of the shape of input."""
    if same_shape(target.shape, input.shape):
        if target.dtype not in FLOAT_DTYPES:
            raise ArgumentError(
                "target of the shape of input holds class probabilities and must be floating point, of the dtypes "
                f"{FLOAT_DTYPES}, got {target.dtype}"
            )
        return
    if target.dtype not in INDEX_DTYPES:
        raise ArgumentError(f"target of class indices must have one of the dtypes {INDEX_DTYPES}, got {target.dtype}")
    if not same_shape(target.shape, shape) and not (input.dim() == 1 and target.shape == (1,)):
        hint = "" if input.dim() < 3 else "; with the classes last, as in (B, T, K), pass class_dim=-1"
        raise ArgumentError(
            f"target must have shape {tuple(shape)} for input {tuple(input.shape)}, got {tuple(target.shape)}{hint}"
        )


def _class_vector(name: str, vector: Tensor | None, logits: Tensor) -> Tensor | None:
    """A tensor option of one value per class, in the dtype of the arithmetic."""
    if vector is None:
        return None
    num_classes = logits.shape[-1]
    if not same_shape(vector.shape, (num_classes,)):
        raise ArgumentError(f"{name} must have shape ({num_classes},), one value per class, got {tuple(vector.shape)}")
    check_same_device(name, vector, logits)
    require(vector.dtype in FLOAT_DTYPES, name, vector, "a floating-point tensor")
    return savable(vector.to(accumulate_dtype(logits.dtype)).contiguous())


def _prior(smoothing: Tensor, logits: Tensor, shard: bool) -> Tensor | None:
    """The prior as a class vector, once it is known to be one. A shard's sum is checked where the ranks meet."""
    prior = _class_vector("smoothing", smoothing, logits)
    if not shard:
        check_prior(smoothing)
    else:
        prior_mass(smoothing)
    return prior


def _per_row(name: str, values: Tensor, shape: torch.Size, logits: Tensor) -> Tensor:
    """A tensor option of one value or one per row, flat, in the dtype of the arithmetic; (N, 1) stands for (N,)."""
    alone = known_size(values.numel(), 1)
    if not (alone or same_shape(values.shape, shape) or same_shape(values.shape, (*shape, 1))):
        raise ArgumentError(
            f"{name} must have one value or the shape {tuple(shape)} of target, got {tuple(values.shape)}"
        )
    if alone:
        values = values.to(logits.device)
    check_same_device(name, values, logits)
    require(not values.dtype.is_complex, name, values, "real")
    return savable(values.reshape(-1).to(accumulate_dtype(logits.dtype)).contiguous())


def _scalar(value: float, logits: Tensor) -> Tensor:
    """A number as a tensor in the dtype of the arithmetic."""
    acc = accumulate_dtype(logits.dtype)
    if torch.compiler.is_compiling():  # of all ways only a product keeps a number out of the graph
        return (torch.ones((), dtype=torch.float64, device=logits.device) * value).to(acc)
    return torch.full((), value, dtype=acc, device=logits.device)


def check_targets(rows: Rows) -> None:
    """Raise IndexError for the first target that is neither a class nor ignore_index (synchronises with a GPU)."""
    if rows.index_target and readable(rows.target):
        check_index_targets(rows.target, rows.logits.shape[-1], rows.spec.ignore_index)


# ---- from rows to the result


def denominator(rows: Rows) -> Tensor | None:
    """What a mean divides by, on the device; None for other reductions."""
    spec = rows.spec
    if spec.reduction != "mean":
        return None
    if spec.normalizer is None:
        return reference.normalizer(rows)
    if isinstance(spec.normalizer, str):  # "rows"
        return reference.normalizer(rows._replace(weight=None, row_weight=None))
    if isinstance(spec.normalizer, Tensor):
        return savable(spec.normalizer.reshape(()).to(rows.logits.device, accumulate_dtype(rows.logits.dtype)))
    return _scalar(spec.normalizer, rows.logits)


def reduce(loss: Tensor, rows: Rows) -> Tensor:
    if rows.row_weight is not None:
        loss = loss * rows.row_weight
    if rows.spec.reduction == "none":
        return loss
    divisor = denominator(rows)
    return loss.sum() if divisor is None else loss.sum() / divisor


def _by_reference(rows: Rows) -> tuple[Tensor, RowStats | None]:
    stats = reference.row_stats(rows) if rows.spec.return_stats else None
    return reduce(reference.row_losses(rows), rows), stats


def _by_kernels(rows: Rows, kernels: ops.Kernels) -> tuple[Tensor, RowStats | None]:
    spec, logits = rows.spec, rows.logits
    plain = not (torch.compiler.is_compiling() or transformed())
    grad_of_logits = torch.is_grad_enabled() and logits.requires_grad
    others = (rows.target, rows.row_weight, spec.normalizer)
    grad_of_others = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    one_pass = spec.reduction != "none" and logits.dtype != torch.float16 and not grad_of_others
    if plain and not grad_of_logits and not grad_of_others:
        loss, saved, *stats, _ = kernels.forward(logits, *row_arguments(rows, None), False, spec.n_stats)
        reduced = reduce(loss, rows)
    elif plain and one_pass:
        reduced, saved, *stats = OnePass.apply(logits, rows, kernels, denominator(rows))  # type: ignore[no-untyped-call]
    else:
        number, eps = (0.0, rows.eps) if isinstance(rows.eps, Tensor) else (rows.eps, None)
        tensors = (logits, rows.target, rows.weight, rows.prior, eps)
        form = TransformableRowLoss if transformed() else RowLoss
        loss, saved, *stats = form.apply(*tensors, number, spec, kernels)  # type: ignore[no-untyped-call]
        reduced = reduce(loss, rows)
    return reduced, kernel_stats(saved, *stats) if spec.return_stats else None


def kernel_stats(saved: Tensor, stats: Tensor, prediction: Tensor) -> RowStats:
    zmax, logsum = saved[:2]
    # Where z was scaled, zmax is rounded and the sum may fall short of 1 by as much.
    return RowStats(stats[0], zmax + logsum, (-logsum).exp().clamp_max(1), prediction, *stats[1:])
