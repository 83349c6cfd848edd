"""The fused linear + loss where every rank holds some rows of the head.

Chunks of rows as in :mod:`labelsmooth_kernels.chunked`, with its buffers and its sums of gradients: a GEMM makes a
chunk's logits of this rank's classes, one message makes rows of them, the kernel overwrites them with their gradient,
two GEMMs take that up. While a chunk's message travels the next chunk's logits are made, in a second buffer; its part
of the hidden states' gradient is summed over the ranks while the next ones are computed.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .autograd import called_rows, row_arguments, row_scale
from .backends import kernels_of
from .chunked import GRADIENTS_SCHEMA, Gradients, How, Problem, Soft, dense_target, in_range, rows_per_chunk
from .ops import NAMESPACE, ROW_SCHEMA, RowCall, fake_gradients
from .parallel_rows import (
    RESULTS_SCHEMA,
    ROW_ARGUMENTS,
    WHERE_SCHEMA,
    Where,
    checksum,
    divisor_of,
    given_rows,
    register,
    results_fakes,
    results_of,
)
from .ranks import Exchange, all_gather, check_together, group_named, refuse_graph, told
from .reference import RowStats
from .shards import IGNORED, Layout, Whole, find, gradient_call, plain_gradient, target_weight
from .spec import Rows, accumulate_dtype
from .targets import check_top_k
from .torch_state import graph_is_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

_OPS = getattr(torch.ops, NAMESPACE)


class Head(NamedTuple):
    """How a call goes about it."""

    dtype: torch.dtype
    """of the GEMMs"""
    grad_reduce: str
    chunk_rows: int
    """of this rank's hidden states; 0: by ``rows_per_chunk``"""
    wide: bool
    wanted: list[bool]
    """of the gradients of hidden states, head and bias"""


HEAD_SCHEMA = "ScalarType dtype, str grad_reduce, int chunk_rows, bool wide, bool[] wanted"


class Job(NamedTuple):
    """How a call is computed and with whom."""

    head: Head
    backend: str
    layout: Layout
    group: Any
    indices: Tensor | None
    """of top-k targets (N, k): classes of all ranks"""

    @property
    def scattered(self) -> bool:
        return self.head.grad_reduce == "scatter"


class Order(NamedTuple):
    """Where the hidden states are sharded too, a chunk holds as many rows of each rank: what it sums up is whole."""

    forward: Tensor
    """(N,) which row of all comes next"""
    back: Tensor

    @classmethod
    def of(cls, n: int, ranks: int, chunk: int, device: torch.device) -> Order:
        rows = torch.arange(n, device=device).reshape(ranks, -1)
        forward = torch.cat([part.flatten() for part in rows.split(chunk, 1)])
        return cls(forward, forward.argsort())


def _some(rows: Rows, logits: Tensor, part: slice | Tensor) -> Rows:
    eps = rows.eps[part] if isinstance(rows.eps, Tensor) and rows.eps.numel() > 1 else rows.eps
    return rows._replace(logits=logits, target=rows.target[part], eps=eps)


class _Run:
    """One pass over the chunks of a call."""

    def __init__(self, operands: tuple[Tensor, Tensor, Tensor | None], rows: Rows, job: Job) -> None:
        self.job, hidden, head = job, operands[0], job.head
        ranks, n = dist.get_world_size(job.group), len(operands[0])
        widest = max(b - a for a, b in itertools.pairwise(job.layout.starts))  # the same chunks on every rank
        chunk = rows_per_chunk(n, widest * head.dtype.itemsize, hidden.device.type, head.chunk_rows)
        self.order, self.indices = None, job.indices
        if job.scattered:
            self.order = Order.of(n * ranks, ranks, chunk, hidden.device)
            everyone, work = all_gather(hidden.contiguous(), job.group)
            work.wait()
            hidden = everyone.flatten(0, 1)[self.order.forward]
            rows = _some(rows, rows.logits, self.order.forward)
            self.indices = None if job.indices is None else job.indices[self.order.forward]
            chunk *= ranks
        self.rows, self.kernels = rows, None if job.backend == "reference" else kernels_of(job.backend)
        how = How(job.backend, head.dtype, 1, chunk, head.wide, False, head.wanted)
        call = row_arguments(rows, None)._replace(
            target=torch.where(rows.valid, 0, IGNORED), ignore_index=IGNORED, weight=None, prior=None
        )
        self.problem = Problem((hidden, *operands[1:]), call, Soft(), how, chunk)
        self.gradients = Gradients(self.problem)
        self.d_hidden, self.works = None, list[Any]()
        if job.scattered and head.wanted[0]:
            self.d_hidden = operands[0].new_empty(operands[0].shape, dtype=head.dtype)

    def logits(self) -> Iterator[tuple[slice, Tensor, Rows]]:
        for chunk in self.problem.chunks():
            x, logits, _ = self.problem.part(chunk)
            some = _some(self.rows, logits, chunk)
            if self.indices is not None:
                some = some._replace(target=self._of_rank(some.target, self.indices[chunk]))
            yield chunk, x, some

    def _of_rank(self, probabilities: Tensor, indices: Tensor) -> Tensor:
        """Top-k probabilities as those of this rank's classes (n, K_r)."""
        first, last, _ = self.job.layout.place
        dtype, k = self.job.head.dtype, len(self.problem.weight)
        if k == 0:
            return probabilities.new_zeros(len(indices), 0)
        here = (indices >= first) & (indices < last)
        soft = Soft(torch.where(here, indices - first, 0))
        return dense_target(torch.where(here, probabilities, 0.0), soft, dtype, k)

    def wholes(self) -> Iterator[tuple[slice, Tensor, Rows, Whole]]:
        """Every chunk with its rows of all ranks, one behind the logits that are being made."""
        job, problem, last = self.job, self.problem, None
        spare = torch.empty_like(problem.buffer) if problem.rows < problem.n else problem.buffer
        for chunk, x, rows in self.logits():
            message = Exchange(find(rows, self.kernels), rows, job.layout, job.group)
            if last is not None:
                yield *last[:3], last[3].wait()
            last = (chunk, x, rows, message)
            problem.buffer, spare = spare, problem.buffer
        assert last is not None
        yield *last[:3], last[3].wait()

    def add(self, chunk: slice, x: Tensor, rows: Rows, saved: Tensor, e: Tensor, factors: Tensor) -> None:
        """The gradients of a chunk whose logits are x."""
        kernels = self.kernels
        call, saved = gradient_call(rows, self.job.layout.place, saved, e, factors)
        if x.shape[1] == 0:
            pass
        elif kernels is None:
            x.copy_(plain_gradient(rows.logits, call, saved, rows.spec))
        else:
            kernels.backward_(rows.logits, *call, saved)
        self.gradients.add(x, chunk)
        part = None if self.gradients.hidden is None else self.gradients.hidden[chunk]
        if part is None or self.job.head.grad_reduce == "none":
            return
        if self.d_hidden is None:
            self.works.append(dist.all_reduce(part, group=self.job.group, async_op=True))
        else:
            ranks = dist.get_world_size(self.job.group)
            mine = self.d_hidden[chunk.start // ranks : chunk.stop // ranks]
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            self.works.append(scatter(mine, part, group=self.job.group, async_op=True))

    def finished(self, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """All three divided by the factor; what is not wanted has no elements."""
        for work in self.works:
            work.wait()
        if self.d_hidden is not None:
            self.gradients.hidden = self.d_hidden
        return self.gradients.finished(factor)

    def restored(self, values: Tensor) -> Tensor:
        """Numbers of every row, in the caller's order."""
        return values if self.order is None else values[..., self.order.back]


def _whole(parts: list[Whole], run: _Run) -> Whole:
    """The rows of all chunks, in the caller's order."""

    def together(values: tuple[Any, ...]) -> Any:
        return run.restored(torch.cat(values, -1)) if isinstance(values[0], Tensor) else values[0]

    *numbers, stats = zip(*parts, strict=True)
    known = None if stats[0] is None else RowStats(*map(together, zip(*stats, strict=True)))
    return Whole(*map(together, numbers), known)  # type: ignore[call-arg]  # of four


def _factors(rows: Rows, layout: Layout, group: Any) -> tuple[Tensor, Tensor | None]:
    """(N,) of the rows in a mean or a sum, known before any logits are; and what a mean divides by."""
    w_y = None
    if rows.spec.reduction == "mean" and rows.spec.normalizer is None:
        w_y = target_weight(rows, layout.place)
    if w_y is not None:
        dist.all_reduce(w_y, group=group)  # a class has one owner: a sum of one weight and zeros
    divisor = divisor_of(rows, w_y)
    scale = row_scale(rows.row_weight, divisor)
    ones = torch.ones(rows.n, dtype=accumulate_dtype(rows.logits.dtype), device=rows.target.device)
    return ones if scale is None else ones * scale, divisor


def _heaviest(weight: Tensor | None, group: Any) -> Tensor | float:
    """The largest class weight of all ranks: one number, as the sums over the ranks are divided by one factor."""
    if weight is None:
        return 1.0
    most = torch.cat((weight.abs(), weight.new_zeros(1))).amax()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return most


# ---- operators: as in parallel_rows, with the gradients that a mean or a sum makes in the forward


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    stand_in, call, where, indices, head, one_pass = _of(hidden, weight, arguments)
    with told(group_named(where.group), hidden):
        rows = where.rows(stand_in, call)
    more: dict[str, Any] = {
        "grad_reduce": head.grad_reduce, "chunk_rows": head.chunk_rows or None, "features": hidden.shape[1],
        "dtype of input": str(hidden.dtype),
        "requires_grad of input, linear_weight, linear_bias, row_weight or normalizer": one_pass,
        "classes of a target": "all" if indices is None else indices.shape[1],
    }  # fmt: skip
    if head.grad_reduce != "none":
        more["requires_grad of input"] = head.wanted[0]
    if indices is not None:
        more["checksum of target"] = [checksum(indices), checksum(rows.target)]
    agreement = where.agreement(rows, more)
    layout, group = agreement.wait(), agreement.group
    check_together(rows, layout)
    if indices is not None:
        check_top_k(indices, layout.num_classes)
    with torch.autocast(hidden.device.type, enabled=False):
        factors, divisor = _factors(rows, layout, group) if one_pass else (None, None)
        run, parts = _Run((hidden, weight, bias), rows, Job(head, where.backend, layout, group, indices)), []
        if factors is not None and run.order is not None:
            factors = factors[run.order.forward]
        for chunk, x, some, whole in run.wholes():
            parts.append(whole)
            if factors is not None:
                run.add(chunk, x, some, whole.saved, whole.e, factors[chunk])
        whole = _whole(parts, run)
        none = (False,) * 3
        grads = fake_gradients((hidden, weight, bias), none) if factors is None else run.finished()
    loss, *results = results_of(whole, head.dtype)
    if factors is not None:
        total = (whole.loss if rows.row_weight is None else whole.loss * rows.row_weight).sum()
        loss = (total if divisor is None else total / divisor).to(loss.dtype)
    return loss, *results, torch.tensor(layout.starts), *grads


def _of(hidden: Tensor, weight: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A stand-in for the logits, and what the forward takes behind its operands, grouped."""
    call, (*more, one_pass) = RowCall(*arguments[:ROW_ARGUMENTS]), arguments[ROW_ARGUMENTS:]
    given = len(Where._fields)
    where, indices, head = Where(*more[:given]), more[given], Head(*more[given + 1 :])
    ranks = dist.get_world_size(group_named(where.group)) if head.grad_reduce == "scatter" else 1
    stand_in = hidden.new_empty(1, dtype=head.dtype).expand(hidden.shape[0] * ranks, weight.shape[0])
    return stand_in, call, where, indices, head, one_pass


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    stand_in, call, where, _, head, one_pass = _of(hidden, weight, arguments)
    loss, *results = results_fakes(stand_in, call, where.n_stats)
    starts = torch.empty(dist.get_world_size(group_named(where.group)) + 1, dtype=torch.int64)
    grads = fake_gradients((hidden, weight, bias), head.wanted if one_pass else (False,) * 3)
    return loss.new_empty(()) if one_pass else loss, *results, starts, *grads


def _backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """From the logits made anew, without a further message about them; ``row_scale`` is the upstream gradient."""
    call = RowCall(*arguments[:ROW_ARGUMENTS])
    indices, saved, e, starts, name, backend, *given = arguments[ROW_ARGUMENTS:]
    head, group, upstream, factor = Head(*given), group_named(name), call.row_scale, None
    assert upstream is not None
    if head.dtype == torch.float16:
        _, factor = in_range(upstream * _heaviest(call.weight, group), call.logit_scale)
        upstream = upstream * factor
    layout = Layout(dist.get_rank(group), tuple(starts.tolist()))
    stand_in = hidden.new_empty(1, dtype=head.dtype).expand(saved.shape[1], len(weight))
    rows = called_rows(stand_in, call._replace(row_scale=None), 0)
    with torch.autocast(hidden.device.type, enabled=False):
        run = _Run((hidden, weight, bias), rows, Job(head, backend, layout, group, indices))
        if run.order is not None:
            order = run.order.forward
            saved, e, upstream = saved[:, order], e[order], upstream[order]
        for chunk, x, some in run.logits():
            run.add(chunk, x, some, saved[:, chunk], e[chunk], upstream[chunk])
        return run.finished(factor)


def _fake_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    return fake_gradients((hidden, weight, bias), arguments[-1])


_LAYER_SCHEMA = f"Tensor hidden, Tensor linear_weight, Tensor? linear_bias, {ROW_SCHEMA}"
register(
    "sharded_linear_forward",
    f"({_LAYER_SCHEMA}, {WHERE_SCHEMA}, Tensor? indices, {HEAD_SCHEMA}, bool one_pass) -> "
    f"({RESULTS_SCHEMA}, Tensor starts, {GRADIENTS_SCHEMA})",
    _forward,
    _fake_forward,
)
register(
    "sharded_linear_backward",
    f"({_LAYER_SCHEMA}, Tensor? indices, Tensor saved, Tensor e, Tensor starts, str group, str backend, {HEAD_SCHEMA})"
    f" -> ({GRADIENTS_SCHEMA})",
    _backward,
    _fake_backward,
)


class ShardedLinear(torch.autograd.Function):
    """(loss (N,) or, in ``one_pass``, what a mean or a sum makes of them; w_y, stats, prediction). In one pass the
    gradients are made in the forward, else in the backward, from a second round of GEMMs. Inputs: the operands,
    ``row_tensors``, indices, ``row_constants``, head, one_pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        *row_tensors, indices, number, spec, constants, head, one_pass = given
        stand_in = hidden.new_empty(1, dtype=head.dtype).expand(1, len(weight))
        rows, where = given_rows(stand_in, (*row_tensors, number, spec, constants))
        call = row_arguments(rows, rows.row_weight)
        results = _OPS.sharded_linear_forward(hidden, weight, bias, *call, *where, indices, *head, one_pass)
        loss, saved, e, *more, starts, d_hidden, d_weight, d_bias = results
        # All of it where checkpointing drops and hooks offload, and where autograd watches versions.
        again = (hidden, weight, bias, rows.target, rows.weight, rows.prior, indices, saved, e, starts)
        ctx.save_for_backward(*((d_hidden, d_weight, d_bias) if one_pass else again))
        ctx.spec, ctx.where, ctx.head, ctx.one_pass = spec, where[1:], head, one_pass
        ctx.mark_non_differentiable(*more)
        ctx.set_materialize_grads(False)
        return loss, *more

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_graph()
        others, where = (None,) * 12, Where(None, *ctx.where)
        if upstream is None:
            return None, None, None, *others
        if not ctx.one_pass:
            *operands, target, weight, prior, indices, saved, e, starts = ctx.saved_tensors
            rows = Rows(ctx.spec, operands[0], target, weight, prior, 1.0, None)  # ε itself is in e
            call = row_arguments(rows, upstream.contiguous())
            made = (indices, saved, e, starts, where.group, where.backend, *ctx.head)
            grads = _OPS.sharded_linear_backward(*operands, *call, *made)
        elif where.kernels is None or graph_is_kept():
            grads = [grad * upstream for grad in ctx.saved_tensors]
        else:
            grads = ctx.saved_tensors
            for grad in grads:
                if grad.numel():
                    where.kernels.scale_(grad.reshape(1, -1) if grad.dim() == 1 else grad, upstream)
        return *(grad if want else None for grad, want in zip(grads, ctx.head.wanted, strict=True)), *others
