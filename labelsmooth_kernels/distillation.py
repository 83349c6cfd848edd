"""Learning from a teacher: its distribution at a temperature and the smoothed loss of the targets, in one pass.

One row, student logits z, teacher logits t, temperature T, p_T = softmax(z/T), t_T = softmax(t/T):

    KL   = Σ t_T·(log t_T - log p_T)                     loss = alpha·T²·KL + (1 - alpha)·CE
    dz   = alpha·T·(p_T - t_T) + (1 - alpha)·(M·p - q)

with CE, p and q those of :mod:`labelsmooth_kernels.reference`. The factor T² keeps the gradient's size when T changes
(Hinton et al. 2015). One pass: student and teacher are read once and the gradient is written once, where the same of
F.kl_div, F.softmax, F.log_softmax and F.cross_entropy holds and moves a dozen tensors of that size. The forward makes
the gradient; with ``reduction="none"`` and in fp16, where the upstream must multiply before a rounding, the backward
makes it, from another pass.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import backends, ops, reference
from .arguments import checks_names, same_shape
from .autograd import graph_is_kept, row_arguments, row_scale
from .chunked import Soft, rows_per_chunk, teacher_logits
from .functional import check_same_device, check_targets, denominator, prepare, reduce
from .spec import (
    FLOAT_DTYPES,
    ArgumentError,
    LossSpec,
    Rows,
    accumulate_dtype,
    constant,
    readable,
    require,
    transformed,
)
from .targets import Teacher, teacher_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

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
            time. A constant: compute it under torch.no_grad or detach() it; where it requires a gradient, that raises.
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
    class_dim = 1 if class_dim is None else class_dim
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
    alpha = (1.0 if target is None else 0.5) if alpha is None else alpha
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
    source = _Source.of(teacher, input, class_dim)
    mix = Mix(float(alpha), float(temperature))
    if chosen.kernels is None or transformed():
        loss, terms = _by_reference(rows, source, mix)
        reduced = reduce(loss, rows)
    else:
        reduced, terms = _by_kernel(rows, source, mix, chosen.name)
    if reduction == "none":
        reduced = reduced.reshape(shape)
    return (reduced, DistillationTerms(*terms.detach().reshape(2, *shape))) if return_terms else reduced


class Mix(NamedTuple):
    """How the two terms are mixed."""

    alpha: float
    temperature: float

    def loss(self, terms: Tensor) -> Tensor:
        """A term without a share may be infinite, and counts for nothing."""
        soft, hard = self.alpha * self.temperature**2 * terms[0], (1 - self.alpha) * terms[1]
        return hard if self.alpha == 0 else soft if self.alpha == 1 else soft + hard


def _first_class(input: Tensor, class_dim: int) -> Tensor:
    """Targets that no term looks at; what is wrong with ``input`` is for the gate to say."""
    if not isinstance(input, Tensor) or input.dim() < 2 or not -input.dim() <= class_dim < input.dim():
        return torch.zeros((), dtype=torch.int64, device=getattr(input, "device", None))
    shape = [size for i, size in enumerate(input.shape) if i != class_dim % input.dim()]
    return torch.zeros((), dtype=torch.int64, device=input.device).expand(shape)


class _Source(NamedTuple):
    """A teacher as rows: dense logits or probabilities (N, K), or hidden states (N, D) and the rest of a head."""

    rows: Tensor
    form: str
    soft: Soft

    @classmethod
    def of(cls, teacher: Tensor | Probabilities | Teacher, input: Tensor, class_dim: int) -> _Source:
        class_dim = 0 if input.dim() == 1 else class_dim
        if isinstance(teacher, Teacher):
            hidden, soft = teacher_rows("teacher", teacher, input.detach().movedim(class_dim, -1))
            return cls(hidden, "head", soft)
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
        return cls(values.reshape(-1, values.shape[-1]), form, Soft())

    def _lies_ready(self, dtype: torch.dtype) -> bool:
        return self.form == "logits" and self.rows.dtype == dtype and self.rows.stride(-1) == 1

    def logits(self, dtype: torch.dtype, part: slice = slice(None)) -> Tensor:
        """Return logits with adjacent classes beside a student's of ``dtype``: as they lie where they have that dtype,
        else in the dtype of the arithmetic, the GEMM of a head in ``dtype``."""
        rows, acc = self.rows[part], accumulate_dtype(dtype)
        if self._lies_ready(dtype):
            return rows
        if self.form == "head":
            return teacher_logits(rows, self.soft, dtype).to(acc)
        return rows.to(acc).log() if self.form == "probabilities" else rows.to(acc).contiguous()

    def chunks(self, dtype: torch.dtype, num_classes: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the same some rows at a time, or all at once where they are as they lie."""
        n, row_bytes = len(self.rows), num_classes * accumulate_dtype(dtype).itemsize
        step = max(n, 1) if self._lies_ready(dtype) else rows_per_chunk(n, row_bytes, self.rows.device.type)
        for begin in range(0, max(n, 1), step):
            part = slice(begin, min(begin + step, n))
            yield part, self.logits(dtype, part)


def _by_reference(rows: Rows, source: _Source, mix: Mix) -> tuple[Tensor, Tensor]:
    """(loss (N,), terms (2, N)), differentiable any number of times."""
    terms = reference.distillation_terms(rows, source.logits(rows.logits.dtype), mix.temperature)
    if mix.alpha == 0:  # a teacher that counts for nothing may be infinite: no 0·∞ in the gradient either
        terms = torch.stack((terms[0].detach(), reference.row_losses(rows)))
    return mix.loss(terms), terms


def _run(
    rows: Rows, source: _Source, mix: Mix, backend: str, scale: Tensor | None = None, with_grad: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(terms (2, N), the gradient of Σ scale·loss) by a kernel."""
    call, x, soft = row_arguments(rows, scale), rows.logits.detach(), source.soft
    head = (soft.teacher_weight, soft.teacher_bias, soft.teacher_scale)
    distill = getattr(torch.ops, ops.NAMESPACE).distill
    terms, grad = distill(x, source.rows, source.form, *head, *call, *mix, with_grad, backend)
    return terms, grad if with_grad else None


def _chunked(
    x: Tensor,
    values: Tensor,
    form: str,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher_scale: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """Run a backend's kernel on some rows after the others; an operator of its own, whose loop no compiler unrolls."""
    *row, alpha, temperature, with_grad, backend = arguments
    call, source = ops.RowCall(*row), _Source(values, form, Soft(None, weight, bias, teacher_scale))
    operator = getattr(getattr(torch.ops, ops.NAMESPACE), f"{backend}_distill").default
    found: list[Tensor] = []
    grad = x.new_empty(x.shape if with_grad else 0)
    for part, teacher in source.chunks(x.dtype, x.shape[-1]):
        some = call.of_rows(part)
        terms, made = operator(
            x[part].to(teacher.dtype), teacher, some.target, some.prior, some.eps, some.eps_rows, some.row_scale,
            some.ignore_index, some.others, alpha, temperature, with_grad,
        )  # fmt: skip
        found.append(terms)
        if with_grad and len(teacher) == len(x):
            grad = made.to(x.dtype)
        elif with_grad:
            grad[part] = made  # rounded here where the chunk is wider
    return (found[0] if len(found) == 1 else torch.cat(found, 1)), grad


def _fake_chunked(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    terms = x.new_empty((2, x.shape[0]), dtype=accumulate_dtype(x.dtype))
    return terms, x.new_empty(x.shape if arguments[-2] else 0)


torch.library.register_fake(f"{ops.NAMESPACE}::distill", _fake_chunked, lib=ops.LIBRARY)
for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("distill", torch.no_grad()(_chunked), _key)


def _by_kernel(rows: Rows, source: _Source, mix: Mix, backend: str) -> tuple[Tensor, Tensor]:
    """(the reduced loss, terms)"""
    spec, x = rows.spec, rows.logits if rows.logits.stride(-1) == 1 else rows.logits.contiguous()
    others = (rows.row_weight, spec.normalizer)
    grad_of_others = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    one_pass = spec.reduction != "none" and x.dtype != torch.float16 and not grad_of_others
    if one_pass and not torch.compiler.is_compiling():
        loss, terms = _Distill.apply(x, rows, source, mix, backend, denominator(rows))  # type: ignore[no-untyped-call]
        return loss, terms
    loss, terms = _DistillRows.apply(x, rows, source, mix, backend)  # type: ignore[no-untyped-call]
    return reduce(loss, rows), terms


class _DistillRows(torch.autograd.Function):
    """(loss (N,), terms); the gradient is made in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Rows, source: _Source, mix: Mix, backend: str) -> tuple[Tensor, Tensor]:
        terms, _ = _run(rows._replace(logits=x), source, mix, backend)
        _remember(ctx, x, rows, source, mix, backend)
        ctx.mark_non_differentiable(terms)
        return mix.loss(terms), terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, upstream), *(None,) * 4


class _Distill(torch.autograd.Function):
    """(the reduced loss, terms), the gradient made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: Rows, source: _Source, mix: Mix, backend: str, divisor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scale = row_scale(rows.row_weight, divisor)
        terms, grad = _run(rows._replace(logits=x), source, mix, backend, scale, ctx.needs_input_grad[0])
        _remember(ctx, x, rows, source, mix, backend, grad, scale)
        ctx.mark_non_differentiable(terms)
        loss = mix.loss(terms)
        loss = (loss if rows.row_weight is None else loss * rows.row_weight).sum()
        return (loss if divisor is None else loss / divisor), terms

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, *_, grad, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            scaled = (upstream if scale is None else upstream * scale).expand(x.shape[0])
            grad = _gradient(ctx, scaled)
        elif graph_is_kept() or torch._C._functorch.is_legacy_batchedtensor(upstream):
            grad = grad * upstream
        else:
            backends.kernels_of(ctx.call[-1]).scale_(grad, upstream)
        return grad, *(None,) * 5


def _remember(ctx: Any, x: Tensor, rows: Rows, source: _Source, mix: Mix, backend: str, *more: Tensor | None) -> None:
    """Every tensor where autograd watches its version, for an ε that is annealed or a teacher that is updated."""
    ctx.number, eps = (None, rows.eps) if isinstance(rows.eps, Tensor) else (rows.eps, None)
    soft = source.soft
    ctx.save_for_backward(x, rows.target, rows.prior, eps, source.rows, soft.teacher_weight, soft.teacher_bias, *more)
    ctx.call = rows.spec, source.form, soft.teacher_scale, mix, backend


_N_SAVED = 7


def _recall(ctx: Any) -> tuple[Rows, _Source, Mix, str]:
    """What :func:`_remember` was given, with the row weights left out: the upstream has them."""
    x, target, prior, eps, values, weight, bias = ctx.saved_tensors[:_N_SAVED]
    spec, form, scale, mix, backend = ctx.call
    rows = Rows(spec, x, target, None, prior, ctx.number if eps is None else eps, None)
    return rows, _Source(values, form, Soft(None, weight, bias, scale)), mix, backend


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """Of Σ upstream·loss in the logits: by a kernel, or differentiable in turn."""
    rows, source, mix, backend = _recall(ctx)
    if torch.is_grad_enabled():
        loss, _ = _by_reference(rows, source, mix)
        grad: Tensor = torch.autograd.grad(loss, rows.logits, upstream, create_graph=True)[0]
        return grad
    made = _run(rows, source, mix, backend, upstream.contiguous(), True)[1]
    assert made is not None
    return made
