"""The fused linear + loss in chunks of rows: two torch.library operators on top of the row operators.

x = hidden·linear_weightᵀ + linear_bias is never whole. A chunk of its rows is made by one GEMM in a buffer that every
chunk uses again; a row operator of ``ops`` overwrites it with its gradient; two more GEMMs make of that the chunk's
rows of d_hidden and its part of d_weight. 6·N·K·D flop, as without a loss; memory beside the demanded gradients: one
chunk; and where d_weight is of half precision and there are several chunks, its sum in float32, of which the CPU keeps
24 bits for bfloat16 (8 more than d_weight itself).

``chunked_forward`` returns (loss, saved, stats, prediction) of ``ops`` and the gradients of Σ row_scale·loss in hidden,
linear_weight and linear_bias that are ``wanted`` (the others have no elements), each in the dtype of its parameter.
``chunked_backward`` makes the gradients from ``saved``. ``dtype`` is that of the GEMMs, what its tensors are cast to.

With ``positions`` P > 1, linear_weight is (C·P, D) and a row of hidden has P rows of C logits: (N, C, P) seen as
(N, P, C). A soft target is given as ``target`` and (indices, teacher_weight, teacher_bias, teacher_scale): nothing else
for dense probabilities; (N, k) probabilities with the ``indices`` (N, k) of their classes; or a teacher's hidden states
with its weight and bias, for softmax(teacher_scale·(target·teacher_weightᵀ + teacher_bias)), a chunk at a time as well.
"""

from __future__ import annotations

import math
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .backends import BACKENDS, kernels_of
from .ops import LIBRARY, NAMESPACE, ROW_SCHEMA, RowCall, fake_gradients, row_fakes
from .spec import accumulate_dtype, check_index_targets

if TYPE_CHECKING:
    from collections.abc import Iterator

DEBUG = "LABELSMOOTH_DEBUG"
"""The environment variable that makes every chunked call print how it is cut."""


class Soft(NamedTuple):
    """What a soft target is made of besides the tensor ``target``."""

    indices: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_scale: float = 1.0


class How(NamedTuple):
    """How a call is computed: nothing here changes what it means."""

    backend: str
    """of the row operators"""
    dtype: torch.dtype
    positions: int
    chunk_rows: int
    """0: by ``rows_per_chunk``"""
    wide: bool
    """d_weight of half precision is summed over chunks in float32"""
    skip_ignored: bool
    """no GEMM for ignored rows: looks at the targets, which synchronises with a GPU"""
    wanted: list[bool]


_ARGUMENTS = (
    f"(Tensor hidden, Tensor linear_weight, Tensor? linear_bias, {ROW_SCHEMA}, Tensor? indices, "
    "Tensor? teacher_weight, Tensor? teacher_bias, float teacher_scale, str backend, ScalarType dtype, int positions, "
    "int chunk_rows, bool wide, bool skip_ignored, bool[] wanted, "
)
GRADIENTS_SCHEMA = "Tensor d_hidden, Tensor d_weight, Tensor d_bias"
LIBRARY.define(
    f"chunked_forward{_ARGUMENTS}int n_stats) -> "
    f"(Tensor loss, Tensor saved, Tensor stats, Tensor prediction, {GRADIENTS_SCHEMA})"
)
LIBRARY.define(f"chunked_backward{_ARGUMENTS}Tensor saved) -> ({GRADIENTS_SCHEMA})")

_OPS = getattr(torch.ops, NAMESPACE)

# A chunk reads and writes the sum of d_weight, 8·K·D bytes (6 in 24 bits) beside 6·rows·K·D flop: a share of
# (4/3)·(flop/s ÷ byte/s)/rows of the GEMMs' time, whatever K and D are. With some 15 (float32) and 30 (bfloat16) flop
# per byte on a CPU and 200 on a GPU these rows keep it below 5 to 13 %. More rows gain little and cost memory; fewer
# make the GEMMs slow (measured on a CPU: 256 rows 5 to 9 % more than 512).
#
# Where d_weight needs such a sum, in float32 on a GPU, whole logits may be smaller than a chunk and the sum, and need
# none: up to N = 2048 + 2·D in half precision. On an H100 with D = 4,096 and K = 128,256 in bfloat16 (8e5be69,
# 2026-11-27) they took 19.9 ms for 22.8 at N = 4,096, in 1.0 GB less; 39.8 for 44.7 at N = 8,192, in as much.
_ROWS = {"cpu": 384, "cuda": 2048}
_MOST_BYTES = 2**30  # of a chunk, unless that leaves fewer rows than
_FEWEST_ROWS = 64
# Half precision in, float32 out: on CUDA only.
_WIDE_GEMM = all(hasattr(op, "dtype_out") for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
_PART_BYTES = 2**20  # of d_weight that a chunk's product makes at a time: stays in the second-level cache


def rows_per_chunk(n: int, row_bytes: int, device: str, chunk_rows: int = 0, sum_bytes: int = 0) -> int:
    """How many rows of hidden make a chunk: ``chunk_rows``, or what the model above gives, spread evenly; all of them
    where they are no larger than a chunk and the sum of ``sum_bytes`` that several chunks need."""
    if chunk_rows == 0:
        chunk_rows = max(_FEWEST_ROWS, min(_ROWS.get(device, _ROWS["cuda"]), _MOST_BYTES // max(row_bytes, 1)))
        if n * row_bytes <= chunk_rows * row_bytes + sum_bytes:
            return max(n, 1)
    if n <= chunk_rows:
        return max(n, 1)
    even = math.ceil(n / math.ceil(n / chunk_rows))
    return min(chunk_rows, math.ceil(even / 16) * 16)


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


def dense_target(
    target: Tensor,
    soft: Soft,
    dtype: torch.dtype,
    classes: int,
    buffer: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The probabilities (n, K) that top-k rows or a teacher's stand for, in the dtype of the arithmetic: in ``out``,
    the teacher's logits of ``dtype`` in ``buffer``."""
    acc = accumulate_dtype(dtype)
    if soft.indices is not None:
        zeros = target.new_zeros(target.shape[0], classes, dtype=acc) if out is None else out.zero_()
        return zeros.scatter_add_(1, soft.indices, target.to(acc))
    return torch.softmax(teacher_logits(target, soft, dtype, buffer), -1, acc, out=out)


def teacher_logits(hidden: Tensor, soft: Soft, dtype: torch.dtype, buffer: Tensor | None = None) -> Tensor:
    """teacher_scale·(hidden·teacher_weightᵀ + teacher_bias) in ``dtype``, in ``buffer`` where one is given."""
    assert soft.teacher_weight is not None
    bias = None if soft.teacher_bias is None else soft.teacher_bias.to(dtype)
    return _product(hidden.to(dtype), soft.teacher_weight.to(dtype), bias, buffer).mul_(soft.teacher_scale)


class Problem:
    """One call: operands in the dtype of the GEMMs, and the buffers that all chunks, of ``rows`` rows, share."""

    def __init__(
        self, operands: tuple[Tensor, Tensor, Tensor | None], call: RowCall, soft: Soft, how: How, rows: int = 0
    ) -> None:
        hidden, weight, bias = operands
        self.dtypes = [hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype]
        self.hidden, self.weight = hidden.to(how.dtype), weight.to(how.dtype)
        self.bias = None if bias is None else bias.to(how.dtype)
        self.call, self.how, self.acc = call, how, accumulate_dtype(how.dtype)
        teacher = soft.teacher_weight
        self.soft = soft if teacher is None else soft._replace(teacher_weight=teacher.to(how.dtype))
        self.n, self.index = len(hidden), not call.target.is_floating_point()
        self.gathered = soft.indices is not None or soft.teacher_weight is not None
        row_bytes = len(weight) * (self.hidden.element_size() + (self.acc.itemsize if self.gathered else 0))
        self.rows = rows or rows_per_chunk(
            self.n, row_bytes, hidden.device.type, how.chunk_rows, self._sum_bytes() if hidden.is_cuda else 0
        )
        self.buffer = hidden.new_empty(self.rows, len(weight), dtype=how.dtype)
        self.targets = hidden.new_empty(self.rows if self.gathered else 0, len(weight), dtype=self.acc)
        if os.environ.get(DEBUG) == "1":
            print(
                f"labelsmooth_kernels: {self.n} x {len(weight)} logits of {how.dtype} in chunks of {self.rows} rows, "
                f"{self.rows * row_bytes / 2**20:.1f} MiB",
                file=sys.stderr,
            )

    def _sum_bytes(self) -> int:
        """Bytes of the sum of d_weight that several chunks need beside the gradient itself."""
        beside = self.how.wanted[1] and self.how.wide and self.dtypes[1] == self.how.dtype != self.acc
        return self.weight.numel() * self.acc.itemsize if beside else 0

    def chunks(self) -> Iterator[slice]:
        for begin in range(0, max(self.n, 1), self.rows):
            yield slice(begin, min(begin + self.rows, self.n))

    def _classes_last(self, x: Tensor) -> Tensor:
        """The rows of logits that (n, C·P) holds, as a view."""
        positions = self.how.positions
        return x if positions == 1 else x.unflatten(1, (-1, positions)).transpose(1, 2)

    def _target(self, chunk: slice) -> Tensor:
        target, soft = self.call.target[chunk], self.soft
        if not self.gathered:
            return target
        if soft.indices is not None:
            soft = soft._replace(indices=soft.indices[chunk])
        n = len(target)
        return dense_target(target, soft, self.how.dtype, len(self.weight), self.buffer[:n], self.targets[:n])

    def masked_hidden(self, chunk: slice) -> Tensor:
        """Hidden states with those of ignored rows as zeros: their gradient is 0, and 0·NaN would be NaN."""
        hidden = self.hidden[chunk]
        if not self.index or self.how.skip_ignored:
            return hidden
        valid = (self.call.target != self.call.ignore_index).unflatten(0, (-1, self.how.positions)).any(1)
        return torch.where(valid[chunk, None], hidden, 0.0)

    def part(self, chunk: slice) -> tuple[Tensor, Tensor, RowCall]:
        """The logits of a chunk, (n, C·P) and the same memory as rows of classes; and the call of these rows."""
        positions = self.how.positions
        call = self.call.of_rows(slice(chunk.start * positions, chunk.stop * positions))
        if not self.index:
            call = call._replace(target=self._target(chunk))
        x = _product(self.hidden[chunk], self.weight, self.bias, self.buffer[: chunk.stop - chunk.start])
        return x, self._classes_last(x), call


def _extension() -> bool:
    return BACKENDS["cpu"].unavailable() is None


class Gradients:
    """d_hidden, d_weight and d_bias as the chunks' gradients come in."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        how, device = problem.how, problem.hidden.device.type
        want_hidden, self.want_weight, self.want_bias = how.wanted
        self.hidden = problem.hidden.new_empty(problem.hidden.shape) if want_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        # d_weight is summed in its own dtype where that is the arithmetic's, or is asked for, or there is one chunk.
        wide = how.wide and problem.rows < problem.n
        same = problem.dtypes[1] == how.dtype and (not wide or how.dtype == problem.acc)
        self.weight_dtype = how.dtype if same else problem.acc
        self.low: Tensor | None = None
        if not same and problem.dtypes[1] == how.dtype == torch.bfloat16 and device == "cpu" and _extension():
            self.weight_dtype = how.dtype
            self.low = torch.zeros(problem.weight.shape, dtype=torch.uint8) if self.want_weight else None

    def add(self, dx: Tensor, chunk: slice) -> None:
        problem = self.problem
        if self.hidden is not None:
            torch.mm(dx, problem.weight, out=self.hidden[chunk])
        if self.want_bias:
            part = dx.sum(0, dtype=problem.acc)
            self.bias = part if self.bias is None else self.bias.add_(part)
        if self.want_weight:
            self._add_weight(dx.t(), problem.masked_hidden(chunk), chunk.stop == problem.n)

    def _add_weight(self, dx: Tensor, hidden: Tensor, last: bool) -> None:
        first, dtype = self.weight is None, self.weight_dtype
        if self.weight is None:
            self.weight = dx.new_empty(self.problem.weight.shape, dtype=dtype)
        total = self.weight
        if dx.dtype == dtype and first:
            torch.mm(dx, hidden, out=total)
        elif dx.dtype == dtype and self.low is None:
            total.addmm_(dx, hidden)
        elif dx.is_cuda and _WIDE_GEMM and first:
            torch.mm(dx, hidden, out_dtype=dtype, out=total)
        elif dx.is_cuda and _WIDE_GEMM:
            torch.addmm(total, dx, hidden, out_dtype=dtype, out=total)
        else:  # the product of each chunk is rounded once, which loses no more than dx lost, being rounded as well
            classes = max(1, _PART_BYTES // (hidden.shape[1] * hidden.element_size()))
            for begin in range(0, len(dx), classes):
                part, product = total[begin : begin + classes], dx[begin : begin + classes] @ hidden
                if self.low is not None:
                    _OPS.cpu_add_split_(part, self.low[begin : begin + classes], product, last)
                else:
                    part.copy_(product) if first else part.add_(product)

    def finished(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All three divided by ``factor``, in the dtypes of their parameters; what was not wanted has no elements."""

        def finish(grad: Tensor | None, dtype: torch.dtype) -> Tensor:
            if grad is None:
                return self.problem.hidden.new_empty(0, dtype=dtype)
            return (grad if factor is None else grad.to(self.problem.acc).div_(factor)).to(dtype)

        hidden, weight, bias = self.problem.dtypes
        return finish(self.hidden, hidden), finish(self.weight, weight), finish(self.bias, bias)


def _of(arguments: tuple[Any, ...]) -> tuple[RowCall, Soft, How, Any]:
    """The arguments of an operator behind its operands, grouped."""
    row, soft = len(RowCall._fields), len(RowCall._fields) + len(Soft._fields)
    *how, last = arguments[soft:]
    return RowCall(*arguments[:row]), Soft(*arguments[row:soft]), How(*how), last


def _kept(call: RowCall, how: How, n_stats: int = 0) -> tuple[Tensor | None, How]:
    """The rows to work on where ignored ones are skipped, or None for all; not where statistics ask for every row, or
    a row of hidden has several targets."""
    if not how.skip_ignored or call.target.is_floating_point() or how.positions > 1 or n_stats > 0:
        return None, how._replace(skip_ignored=False)
    keep = (call.target != call.ignore_index).nonzero().squeeze(1)
    return None if len(keep) == len(call.target) else keep, how


def _spread(values: Tensor, keep: Tensor | None, n: int, dim: int) -> Tensor:
    """Results of some rows among zeros for the others."""
    if keep is None:
        return values
    shape = (*values.shape[:dim], n, *values.shape[dim + 1 :])
    return values.new_zeros(shape).index_copy_(dim, keep, values)


def _check_targets(call: RowCall, linear_weight: Tensor, how: How) -> None:
    if not call.target.is_floating_point() and linear_weight.device.type == "cpu":
        check_index_targets(call.target, len(linear_weight) // how.positions, call.ignore_index)


def forward(hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    call, soft, how, n_stats = _of(arguments)
    _check_targets(call, linear_weight, how)
    n, (keep, how) = len(hidden), _kept(call, how, n_stats)
    if keep is not None:
        hidden, call = hidden[keep], call.of_rows(keep)
    with torch.autocast(hidden.device.type, enabled=False):
        problem = Problem((hidden, linear_weight, linear_bias), call, soft, how)
        kernels, gradients, results = kernels_of(how.backend), Gradients(problem), []
        for chunk in problem.chunks():
            x, logits, part = problem.part(chunk)
            if any(how.wanted):
                results.append(kernels.forward_(logits, *part, n_stats))
                gradients.add(x, chunk)
            else:
                results.append(kernels.forward(logits, *part, False, n_stats)[:4])
        del problem.buffer, problem.targets, x, logits, part  # before the gradients are converted
        d_hidden, d_weight, d_bias = gradients.finished()
    loss, saved, stats, prediction = (torch.cat(column, -1) for column in zip(*results, strict=True))
    loss, saved = _spread(loss, keep, n, 0), _spread(saved, keep, n, 1)
    d_hidden = _spread(d_hidden, keep, n, 0) if how.wanted[0] else d_hidden
    return loss, saved, stats, prediction, d_hidden, d_weight, d_bias


def backward(hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    call, soft, how, saved = _of(arguments)
    _check_targets(call, linear_weight, how)
    n, (keep, how) = len(hidden), _kept(call, how)
    if keep is not None:
        hidden, call, saved = hidden[keep], call.of_rows(keep), saved[:, keep]
    with torch.autocast(hidden.device.type, enabled=False):
        factor = None
        if how.dtype == torch.float16:
            assert call.row_scale is not None
            most = 1.0 if call.weight is None else call.weight.abs().amax()
            _, factor = in_range(call.row_scale * most, call.logit_scale)
            call = call._replace(row_scale=call.row_scale * factor)
        problem = Problem((hidden, linear_weight, linear_bias), call, soft, how)
        kernels, gradients = kernels_of(how.backend), Gradients(problem)
        for chunk in problem.chunks():
            x, logits, part = problem.part(chunk)
            rows = slice(chunk.start * how.positions, chunk.stop * how.positions)
            kernels.backward_(logits, *part, saved[:, rows].contiguous())
            gradients.add(x, chunk)
        del problem.buffer, problem.targets, x, logits, part
        d_hidden, d_weight, d_bias = gradients.finished(factor)
    return _spread(d_hidden, keep, n, 0) if how.wanted[0] else d_hidden, d_weight, d_bias


def in_range(row_scale: Tensor, more: float) -> tuple[Tensor, Tensor]:
    """Factors of rows, beside which there are others of size ``more``, times one factor, and that: entries of the
    gradient are at most 2^8 then, and ε/K, some 2^-20, is still a normal number of float16. On the device, without a
    look at the numbers."""
    size = row_scale.abs().amax() if row_scale.numel() else row_scale.new_ones(())
    factor = 2.0**8 / (size * (abs(more) or 1.0)).clamp_min(2.0**-100)
    return row_scale * factor, factor


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    _, _, how, n_stats = _of(arguments)
    rows = row_fakes(hidden.new_empty(hidden.shape[0] * how.positions, 1, dtype=how.dtype), n_stats)
    return *rows, *fake_gradients((hidden, weight, bias), how.wanted)


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return fake_gradients((hidden, weight, bias), _of(arguments)[2].wanted)


for _name, _run, _fake in (("forward", forward, _fake_forward), ("backward", backward, _fake_backward)):
    torch.library.register_fake(f"{NAMESPACE}::chunked_{_name}", _fake, lib=LIBRARY)
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(f"chunked_{_name}", torch.no_grad()(_run), _key)  # an exported program calls them with a graph
