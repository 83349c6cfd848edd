"""The divergence from a teacher and the loss of the targets as autograd.Functions, on operators that work in chunks.

The formulas stand in :mod:`labelsmooth_kernels.distillation`. One pass makes the gradient in the forward; with
``reduction="none"``, in fp16, where the upstream must multiply before a rounding, and under torch.compile another pass
makes it in the backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import backends, ops, reference
from .autograd import row_arguments, row_scale
from .chunked import Soft, rows_per_chunk, teacher_logits
from .functional import denominator, reduce
from .spec import Rows, accumulate_dtype
from .torch_state import gradient_is_shared

if TYPE_CHECKING:
    from collections.abc import Iterator


class Mix(NamedTuple):
    """How the two terms are mixed."""

    alpha: float
    temperature: float

    def loss(self, terms: Tensor) -> Tensor:
        """A term without a share may be infinite, and counts for nothing."""
        soft, hard = self.alpha * self.temperature**2 * terms[0], (1 - self.alpha) * terms[1]
        return hard if self.alpha == 0 else soft if self.alpha == 1 else soft + hard


class Source(NamedTuple):
    """A teacher as rows: dense logits or probabilities (N, K), or hidden states (N, D) and the rest of a head."""

    rows: Tensor
    form: str
    soft: Soft

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
        """Yield slices of the rows with their :meth:`logits`; one slice where these take no memory of their own."""
        n, row_bytes = len(self.rows), num_classes * accumulate_dtype(dtype).itemsize
        step = max(n, 1) if self._lies_ready(dtype) else rows_per_chunk(n, row_bytes, self.rows.device.type)
        for begin in range(0, max(n, 1), step):
            part = slice(begin, min(begin + step, n))
            yield part, self.logits(dtype, part)


def by_reference(rows: Rows, source: Source, mix: Mix) -> tuple[Tensor, Tensor]:
    """(loss (N,), terms (2, N)), differentiable any number of times."""
    terms = reference.distillation_terms(rows, source.logits(rows.logits.dtype), mix.temperature)
    if mix.alpha == 0:  # a teacher that counts for nothing may be infinite: no 0·∞ in the gradient either
        terms = torch.stack((terms[0].detach(), reference.row_losses(rows)))
    return mix.loss(terms), terms


def _run(
    rows: Rows, source: Source, mix: Mix, backend: str, scale: Tensor | None = None, with_grad: bool = False
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
    """Run a backend's kernel on one chunk of rows after the other. It is an operator, so that no compiler unrolls the
    loop."""
    *row, alpha, temperature, with_grad, backend = arguments
    call, source = ops.RowCall(*row), Source(values, form, Soft(None, weight, bias, teacher_scale))
    operator = getattr(getattr(torch.ops, ops.NAMESPACE), f"{backend}_distill").default
    found: list[Tensor] = []
    grad: Tensor | None = None
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
            grad = x.new_empty(x.shape) if grad is None else grad
            grad[part] = made  # rounded here where the chunk is wider
    return (found[0] if len(found) == 1 else torch.cat(found, 1)), x.new_empty(0) if grad is None else grad


def _fake_chunked(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    terms = x.new_empty((2, x.shape[0]), dtype=accumulate_dtype(x.dtype))
    return terms, x.new_empty(x.shape if arguments[-2] else 0)


torch.library.register_fake(f"{ops.NAMESPACE}::distill", _fake_chunked, lib=ops.LIBRARY)
for _key in ("CPU", "CUDA"):
    ops.LIBRARY.impl("distill", torch.no_grad()(_chunked), _key)


def by_kernel(rows: Rows, source: Source, mix: Mix, backend: str) -> tuple[Tensor, Tensor]:
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
    def forward(ctx: Any, x: Tensor, rows: Rows, source: Source, mix: Mix, backend: str) -> tuple[Tensor, Tensor]:
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
        ctx: Any, x: Tensor, rows: Rows, source: Source, mix: Mix, backend: str, divisor: Tensor | None
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
        elif gradient_is_shared(upstream):
            grad = grad * upstream
        else:
            backends.kernels_of(ctx.call[-1]).scale_(grad, upstream)
        return grad, *(None,) * 5


def _remember(ctx: Any, x: Tensor, rows: Rows, source: Source, mix: Mix, backend: str, *more: Tensor | None) -> None:
    """Every tensor where autograd watches its version, for an ε that is annealed or a teacher that is updated."""
    ctx.number, eps = (None, rows.eps) if isinstance(rows.eps, Tensor) else (rows.eps, None)
    soft = source.soft
    ctx.save_for_backward(x, rows.target, rows.prior, eps, source.rows, soft.teacher_weight, soft.teacher_bias, *more)
    ctx.call = rows.spec, source.form, soft.teacher_scale, mix, backend


_N_SAVED = 7


def _recall(ctx: Any) -> tuple[Rows, Source, Mix, str]:
    """What :func:`_remember` was given, with the row weights left out: the upstream has them."""
    x, target, prior, eps, values, weight, bias = ctx.saved_tensors[:_N_SAVED]
    spec, form, scale, mix, backend = ctx.call
    rows = Rows(spec, x, target, None, prior, ctx.number if eps is None else eps, None)
    return rows, Source(values, form, Soft(None, weight, bias, scale)), mix, backend


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """Of Σ upstream·loss in the logits: by a kernel, or differentiable in turn."""
    rows, source, mix, backend = _recall(ctx)
    if torch.is_grad_enabled():
        loss, _ = by_reference(rows, source, mix)
        grad: Tensor = torch.autograd.grad(loss, rows.logits, upstream, create_graph=True)[0]
        return grad
    made = _run(rows, source, mix, backend, upstream.contiguous(), True)[1]
    assert made is not None
    return made
