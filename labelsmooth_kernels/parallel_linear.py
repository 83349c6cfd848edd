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

from .autograd import graph_is_kept, row_arguments
from .chunked import Gradients, How, Problem, Soft, in_range, rows_per_chunk
from .ranks import Exchange, all_gather, refuse_graph
from .reference import RowStats
from .shards import IGNORED, Shard, Whole, find, gradient_call, plain_gradient
from .spec import LossSpec, Rows, accumulate_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .backends import Backend


class Job(NamedTuple):
    """How a call is computed and with whom."""

    backend: Backend
    shard: Shard
    group: Any
    grad_reduce: str
    chunk_rows: int
    """of this rank's hidden states"""
    wide: bool
    dtype: torch.dtype
    wanted: list[bool]

    @property
    def scattered(self) -> bool:
        return self.grad_reduce == "scatter"


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


def _ordered(rows: Rows, order: Tensor) -> Rows:
    eps = rows.eps[order] if isinstance(rows.eps, Tensor) and rows.eps.numel() > 1 else rows.eps
    return rows._replace(target=rows.target[order], eps=eps)


def _some(rows: Rows, logits: Tensor, part: slice) -> Rows:
    eps = rows.eps[part] if isinstance(rows.eps, Tensor) and rows.eps.numel() > 1 else rows.eps
    return rows._replace(logits=logits, target=rows.target[part], eps=eps)


class _Run:
    """One pass over the chunks of a call."""

    def __init__(self, operands: tuple[Tensor, Tensor, Tensor | None], rows: Rows, job: Job) -> None:
        self.job, hidden = job, operands[0]
        ranks, n = dist.get_world_size(job.group), len(operands[0])
        widest = max(b - a for a, b in itertools.pairwise(job.shard.starts))  # the same chunks on every rank
        chunk = rows_per_chunk(n, widest * job.dtype.itemsize, hidden.device.type, job.chunk_rows)
        self.order = None
        if job.scattered:
            self.order = Order.of(n * ranks, ranks, chunk, hidden.device)
            everyone, work = all_gather(hidden.contiguous(), job.group)
            work.wait()
            hidden, rows = everyone.flatten(0, 1)[self.order.forward], _ordered(rows, self.order.forward)
            chunk *= ranks
        self.rows = rows
        how = How(job.backend.name, job.dtype, 1, chunk, job.wide, False, job.wanted)
        call = row_arguments(rows, None)._replace(
            target=torch.where(rows.valid, 0, IGNORED), ignore_index=IGNORED, weight=None, prior=None
        )
        self.problem = Problem((hidden, *operands[1:]), call, Soft(), how, chunk)
        self.gradients = Gradients(self.problem)
        self.d_hidden, self.works = None, list[Any]()
        if job.scattered and job.wanted[0]:
            self.d_hidden = operands[0].new_empty(operands[0].shape, dtype=job.dtype)

    def logits(self) -> Iterator[tuple[slice, Tensor, Rows]]:
        for chunk in self.problem.chunks():
            x, logits, _ = self.problem.part(chunk)
            yield chunk, x, _some(self.rows, logits, chunk)

    def wholes(self) -> Iterator[tuple[slice, Tensor, Rows, Whole]]:
        """Every chunk with its rows of all ranks, one behind the logits that are being made."""
        job, problem, last = self.job, self.problem, None
        spare = torch.empty_like(problem.buffer) if problem.rows < problem.n else problem.buffer
        for chunk, x, rows in self.logits():
            message = Exchange(find(rows, job.backend.kernels), rows, job.shard, job.group)
            if last is not None:
                yield *last[:3], last[3].wait()
            last = (chunk, x, rows, message)
            problem.buffer, spare = spare, problem.buffer
        assert last is not None
        yield *last[:3], last[3].wait()

    def add(self, chunk: slice, x: Tensor, rows: Rows, saved: Tensor, e: Tensor, factors: Tensor) -> None:
        """The gradients of a chunk whose logits are x."""
        kernels = self.job.backend.kernels
        call, saved = gradient_call(rows, self.job.shard, saved, e, factors)
        if x.shape[1] == 0:
            pass
        elif kernels is None:
            x.copy_(plain_gradient(rows.logits, call, saved, rows.spec))
        else:
            kernels.backward_(rows.logits, *call, saved)
        self.gradients.add(x, chunk)
        part = None if self.gradients.hidden is None else self.gradients.hidden[chunk]
        if part is None or self.job.grad_reduce == "none":
            return
        if self.d_hidden is None:
            self.works.append(dist.all_reduce(part, group=self.job.group, async_op=True))
        else:
            ranks = dist.get_world_size(self.job.group)
            mine = self.d_hidden[chunk.start // ranks : chunk.stop // ranks]
            scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            self.works.append(scatter(mine, part, group=self.job.group, async_op=True))

    def finished(self, factor: Tensor | None = None) -> list[Tensor | None]:
        """What is wanted, divided by the factor."""
        for work in self.works:
            work.wait()
        if self.d_hidden is not None:
            self.gradients.hidden = self.d_hidden
        grads = self.gradients.finished(factor)
        return [grad if want else None for grad, want in zip(grads, self.job.wanted, strict=True)]

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


class ShardedLinear(torch.autograd.Function):
    """(loss (N,) or, with ``factors``, Σ factor·loss; then w_y and stats as ``parallel`` hands them on). With factors
    the gradients are made in the forward, else in the backward, from a second round of GEMMs and no further message."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, job: Job, factors: Tensor | None
    ) -> tuple[Any, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            run, parts = _Run((hidden, weight, bias), rows, job), []
            if factors is not None and run.order is not None:
                factors = factors[run.order.forward]
            for chunk, x, some, whole in run.wholes():
                parts.append(whole)
                if factors is not None and any(job.wanted):
                    run.add(chunk, x, some, whole.saved, whole.e, factors[chunk])
            whole, acc = _whole(parts, run), accumulate_dtype(job.dtype)
            grads = run.finished() if factors is not None else []
        # All of it where checkpointing drops and hooks offload, and where autograd watches versions.
        ctx.job, ctx.spec, ctx.one_pass = job, rows.spec, factors is not None
        eps = rows.eps if isinstance(rows.eps, Tensor) else None
        again = (hidden, weight, bias, rows.target, rows.weight, rows.prior, eps, whole.saved, whole.e)
        ctx.save_for_backward(*(grads if ctx.one_pass else again))
        loss = whole.loss
        if factors is not None:
            loss = (loss * run.restored(factors)).sum()
        return loss.to(acc), whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        refuse_graph()
        job, kernels, tensors = ctx.job, ctx.job.backend.kernels, ctx.saved_tensors
        if not ctx.one_pass:
            return *_again(tensors, upstream, ctx.spec, job), None, None, None
        if kernels is None or graph_is_kept():
            return *(None if grad is None else grad * upstream for grad in tensors), None, None, None
        for grad in tensors:
            if grad is not None and grad.numel():
                kernels.scale_(grad.reshape(1, -1) if grad.dim() == 1 else grad, upstream)
        return *tensors, None, None, None


def _again(tensors: tuple[Tensor | None, ...], upstream: Tensor, spec: LossSpec, job: Job) -> list[Tensor | None]:
    """The gradients of Σ upstream·loss, from the logits made anew."""
    hidden, linear_weight, bias, target, weight, prior, eps, saved, e = tensors
    assert hidden is not None
    assert linear_weight is not None
    assert target is not None
    assert saved is not None
    assert e is not None
    rows, factor = Rows(spec, hidden, target, weight, prior, 0.0 if eps is None else eps, None), None
    if job.dtype == torch.float16:
        upstream, factor = in_range(upstream, spec.logit_scale)
    with torch.autocast(target.device.type, enabled=False):
        run = _Run((hidden, linear_weight, bias), rows, job)
        if run.order is not None:
            order = run.order.forward
            saved, e, upstream = saved[:, order], e[order], upstream[order]
        for chunk, x, some in run.logits():
            run.add(chunk, x, some, saved[:, chunk], e[chunk], upstream[chunk])
        return run.finished(factor)
