"""Learning from a teacher: its distribution at a temperature and the smoothed loss of the targets, in one pass.

One row, student logits z, teacher logits t, temperature T, p_T = softmax(z/T), t_T = softmax(t/T):

    KL   = Σ t_T·(log t_T - log p_T)                     loss = alpha·T²·KL + (1 - alpha)·CE
    dz   = alpha·T·(p_T - t_T) + (1 - alpha)·(M·p - q)

with CE, p and q those of :mod:`labelsmooth_kernels.reference`. The factor T² keeps the gradient's size when T changes
(Hinton et al. 2015). One pass: student and teacher are read once and the gradient is written once, where the same of
F.kl_div, F.softmax, F.log_softmax and F.cross_entropy holds and moves a dozen tensors of that size. See
:mod:`labelsmooth_kernels.distillation_autograd` for when the gradient is made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends
from .arguments import checks_names, plain_float, plain_int, same_shape, unscriptable
from .chunked import Soft
from .distillation_autograd import Mix, Source, by_kernel, by_reference
from .functional import check_targets, prepare, reduce
from .spec import FLOAT_DTYPES, ArgumentError, LossSpec, accumulate_dtype, check_same_device, constant, require
from .targets import Teacher, teacher_rows
from .torch_state import readable, transformed

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import DistillationOptions


class Probabilities(NamedTuple):
    """A teacher given by class probabilities of the shape of the logits; at a temperature T they are sharpened to
    p^(1/T)/Σ p^(1/T)."""

    values: Tensor


class DistillationTerms(NamedTuple):
    """What a row's loss is made of, float32 (float64 for float64 logits), detached; 0 in an ignored row."""

    divergence: Tensor
    """KL(teacher ‖ student) at the temperature, not multiplied by T²"""
    loss: Tensor
    """the smoothed cross-entropy; 0 where alpha is 1"""


@unscriptable
def sharpen(probabilities: Tensor, temperature: float, dim: int = -1) -> Tensor:
    """p^(1/T) / Σ p^(1/T): sharper for T < 1, flatter for T > 1, one-hot as T → 0. As softmax(log p / T), in which no
    power under- or overflows.

    Args:
        probabilities: floating point, >= 0; the classes along ``dim``, not assumed to sum to 1.
        temperature: > 0.

    Returns:
        Of the shape and dtype of ``probabilities``; differentiable, a probability of 0 being a constant. NaN where all
        of them are 0.

    Raises:
        ArgumentError: another temperature or dtype; on the CPU also a negative probability.

    Source: Berthelot et al. 2019, "MixMatch".
    """
    temperature, dim = plain_float(temperature), plain_int(dim)
    good = isinstance(temperature, int | float) and 0 < temperature < math.inf
    require(good, "temperature", temperature, "a finite number > 0")
    require(isinstance(probabilities, Tensor), "probabilities", probabilities, "a tensor")
    require(probabilities.dtype in FLOAT_DTYPES, "probabilities", probabilities, "a floating-point tensor")
    _check_probabilities("probabilities", probabilities)
    wide = probabilities.to(accumulate_dtype(probabilities.dtype))
    log_p = torch.where(wide == 0, -math.inf, torch.where(wide == 0, 1.0, wide).log())  # no 0·∞ in the gradient
    highest = log_p.detach().amax(dim, keepdim=True) if log_p.numel() else log_p
    colder = max(temperature, torch.finfo(wide.dtype).tiny)
    return torch.softmax((log_p - highest) / colder, dim).to(probabilities.dtype)


def _check_probabilities(name: str, values: Tensor) -> None:
    """Looks at them only where that needs no synchronisation."""
    if readable(values) and values.numel():
        least = values.detach().amin().item()
        require(not least < 0, name, least, ">= 0 everywhere")


@overload
def distillation_loss(
    input: Tensor, teacher: Tensor | Probabilities | Teacher, target: Tensor | None = None, *,
    return_terms: Literal[False] = False, **options: Unpack[DistillationOptions],
) -> Tensor: ...  # fmt: skip
@overload
def distillation_loss(
    input: Tensor, teacher: Tensor | Probabilities | Teacher, target: Tensor | None = None, *,
    return_terms: Literal[True], **options: Unpack[DistillationOptions],
) -> tuple[Tensor, DistillationTerms]: ...  # fmt: skip
@overload
def distillation_loss(
    input: Tensor, teacher: Tensor | Probabilities | Teacher, target: Tensor | None = None, *,
    return_terms: bool, **options: Unpack[DistillationOptions],
) -> Tensor | tuple[Tensor, DistillationTerms]: ...  # fmt: skip
@checks_names("distillation_loss")
def distillation_loss(
    input: Tensor,
    teacher: Tensor | Probabilities | Teacher,
    target: Tensor | None = None,
    *,
    temperature: float = 1.0,
    alpha: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float | Tensor = 0.0,
    smoothing: str | Tensor = "uniform",
    class_dim: int | None = None,
    row_weight: Tensor | None = None,
    normalizer: float | str | Tensor | None = None,
    return_terms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, DistillationTerms]:
    """``alpha·T²·KL(softmax(teacher/T) ‖ softmax(input/T)) + (1 - alpha)·cross_entropy(input, target, ...)``, reduced
    over rows, in one pass over student and teacher.

    Args:
        input: the student's logits, as in :func:`labelsmooth_kernels.cross_entropy`.
        teacher: logits of the shape of ``input``; :class:`Probabilities` of that shape; or a
            :class:`labelsmooth_kernels.Teacher` (hidden states and a head), whose logits are made a chunk of rows at a
            time. A constant: where it requires a gradient, that raises. Compute it under torch.no_grad; or, where the
            loss is not compiled, under torch.inference_mode, whose tensors a compiled program cannot save.
        target: class indices as in ``cross_entropy``; rows with ``ignore_index`` have zero loss and gradient, of both
            terms. None: no second term, every row counts, and ``alpha`` is 1.
        temperature: T > 0, of both sides of the first term; from a few hundred on T²·KL is what float32 leaves of it.
        alpha: from 0 to 1, the share of the first term; None: 0.5, or 1 without a target.
        ignore_index, reduction, label_smoothing, smoothing, class_dim, row_weight, normalizer: as in ``cross_entropy``;
            ε, ``"others"`` and priors shape the second term. Without a target ``class_dim`` must be said where input
            has more than 2 dimensions, and ``ignore_index`` has no meaning.
        return_terms: also return the :class:`DistillationTerms` of every row.
        backend: ``"cpu"``, ``"triton"`` or ``"reference"``; None takes the best that can serve the call.

    Returns:
        The loss, float32 for half-precision input (float64 for fp64); with ``return_terms`` a pair.

    Raises:
        ArgumentError, TypeError, IndexError: a bad argument, with its name, value and what is allowed.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".
    """
    if target is None and class_dim is None and isinstance(input, Tensor) and input.dim() > 2:
        raise ArgumentError(f"class_dim must be given without a target, for input {tuple(input.shape)}")
    class_dim = 1 if class_dim is None else plain_int(class_dim)
    spec = LossSpec(
        ignore_index=-100 if target is None else ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        smoothing=smoothing,
        class_dim=class_dim,
        row_weight=row_weight,
        normalizer=normalizer,
        backend=backend,
    )
    alpha = (1.0 if target is None else 0.5) if alpha is None else plain_float(alpha)
    temperature = plain_float(temperature)
    require(isinstance(alpha, int | float) and 0 <= alpha <= 1, "alpha", alpha, "from 0 to 1")
    good = isinstance(temperature, int | float) and 0 < temperature < math.inf
    require(good, "temperature", temperature, "a finite number > 0")
    if target is None:
        require(alpha == 1, "alpha", alpha, "1 without a target")
        target = _first_class(input, class_dim)
    rows, shape = prepare(input, target, spec)
    if not rows.index_target:
        raise ArgumentError(f"target must hold class indices, got probabilities of shape {tuple(target.shape)}")
    chosen = backends.select(rows, frozenset({"distillation"}))
    if input.device.type == "cpu":
        check_targets(rows)
    rows = rows._replace(logits=rows.logits.flatten(0, -2))
    source = _source(teacher, input, class_dim)
    mix = Mix(float(alpha), float(temperature))
    if chosen.kernels is None or transformed():
        loss, terms = by_reference(rows, source, mix)
        reduced = reduce(loss, rows)
    else:
        reduced, terms = by_kernel(rows, source, mix, chosen.name)
    if reduction == "none":
        reduced = reduced.reshape(shape)
    return (reduced, DistillationTerms(*terms.detach().reshape(2, *shape))) if return_terms else reduced


def _first_class(input: Tensor, class_dim: int) -> Tensor:
    """Targets that no term looks at; what is wrong with ``input`` is for the gate to say."""
    if not isinstance(input, Tensor) or input.dim() < 2 or not -input.dim() <= class_dim < input.dim():
        return torch.zeros((), dtype=torch.int64, device=getattr(input, "device", None))
    shape = [size for i, size in enumerate(input.shape) if i != class_dim % input.dim()]
    return torch.zeros((), dtype=torch.int64, device=input.device).expand(shape)


def _source(teacher: Tensor | Probabilities | Teacher, input: Tensor, class_dim: int) -> Source:
    """Check a teacher against the student's logits; the teacher as rows."""
    class_dim = 0 if input.dim() == 1 else class_dim
    if isinstance(teacher, Teacher):
        hidden, soft = teacher_rows("teacher", teacher, input.detach().movedim(class_dim, -1))
        return Source(hidden, "head", soft)
    form, values = ("probabilities", teacher[0]) if isinstance(teacher, Probabilities) else ("logits", teacher)
    if not isinstance(values, Tensor):
        kind = type(values).__name__
        raise TypeError(f"teacher must be a Tensor of logits, Probabilities or a Teacher, got {kind}")
    require(values.dtype in FLOAT_DTYPES, "teacher", values, "floating point")
    good = same_shape(values.shape, input.shape)
    require(good, "teacher", values, f"of the shape {tuple(input.shape)} of input")
    check_same_device("teacher", values, input)
    values = constant("teacher", values)
    if form == "probabilities":
        _check_probabilities("teacher", values)
    values = values.movedim(class_dim, -1)
    return Source(values.reshape(-1, values.shape[-1]), form, Soft())
