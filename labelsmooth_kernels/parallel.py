"""The loss of logits whose classes are sharded over the ranks of a process group, and global token counts.

Rank r holds some columns of the logits, or rows of the head, in the order of the ranks; targets are class numbers among
all. Every option of :func:`labelsmooth_kernels.cross_entropy` means what it means on one device: K counts the classes
of all ranks, smoothing spreads over all of them. The maths of the merge, and what a rank sends, stand in
:mod:`labelsmooth_kernels.shards`: 3 numbers per row (4 with smoothing) in one all-gather, or, over more than 16 ranks,
in an all-to-all whose results are gathered; the same bits on every rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .autograd import graph_is_kept, row_scale
from .functional import denominator, prepare, shaped
from .linear import LinearSpec, check_operands
from .parallel_linear import Job, ShardedLinear
from .ranks import Agreement, Exchange, check_together, group_of, refuse_graph, told
from .reference import RowStats
from .shards import Shard, Whole, find, gradient_call, plain_gradient, target_weight
from .spec import ArgumentError, LossSpec, Rows, accumulate_dtype, require


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what ranks tell each other is no graph
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: Any = None,
    num_classes: int | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`labelsmooth_kernels.cross_entropy` of logits of which every rank of ``group`` holds some classes.

    Args:
        input: this rank's logits (N, K_r), or as ``class_dim`` says, of any number of classes, 0 among them; the same
            rows on every rank. Rank order is class order: K = Σ K_r.
        target: class numbers from 0 to K - 1, the same on every rank.
        weight: (K_r,) of this rank's classes, like a prior given as ``smoothing``.
        group: a process group; None: the default one.
        num_classes: K, where it is known; it saves a synchronisation with a GPU per call (see below).
        options: as in ``cross_entropy``, the same on every rank; targets are class indices, and no option may require
            a gradient but ``row_weight`` and ``normalizer``.

    Returns:
        What ``cross_entropy`` returns for the whole logits, on every rank and bit for bit the same. The backward needs
        no communication: each rank gets the gradient in its own logits.

    Raises:
        ArgumentError, TypeError, IndexError: as ``cross_entropy``; and on every rank alike where one rank refuses its
            arguments, or ranks disagree in shape, dtype or options. They tell each other before each call, which waits
            for a GPU; there, with ``num_classes``, only before a call of which none was like it. As many classes must
            then always be cut alike, and a rank that goes its own way later ends in the time-out of the group.

    Source: Shoeybi et al. 2019, "Megatron-LM"; smoothing there counts the classes of a rank only.
    """
    group = group_of(group)
    with told(group, input):
        spec = LossSpec(weight=weight, **options)
    result: Tensor | tuple[Tensor, RowStats] = apply_spec(input, target, spec, group, num_classes)
    return result


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    group: Any = None,
    num_classes: int | None = None,
    grad_reduce: str = "all",
    chunk_rows: int | None = None,
    grad_accumulation: str = "float32",
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`labelsmooth_kernels.linear_cross_entropy` with a head of which every rank of ``group`` holds some classes.

    Args:
        input: hidden states (..., D), the same on every rank; with ``grad_reduce="scatter"`` this rank's slice along
            the first dimension, of the same size on every rank (sequence parallelism).
        linear_weight: (K_r, D), this rank's rows of the head; rank order is class order, K_r may be 0.
        target: class numbers from 0 to K - 1 of every row of all slices, the same on every rank.
        linear_bias, weight: (K_r,), like a prior given as ``smoothing``.
        group, num_classes: as in :func:`cross_entropy`.
        grad_reduce: what becomes of the gradient of ``input``, of which a rank finds its classes' part: ``"all"``:
            summed over the ranks; ``"scatter"``: summed, and each rank gets its slice; ``"none"``: left to the caller.
        chunk_rows, grad_accumulation: as in ``linear_cross_entropy``.
        options: as in ``cross_entropy``, the same on every rank; targets are class indices.

    Returns:
        What ``linear_cross_entropy`` returns, for every row, on every rank and bit for bit the same.

    Raises:
        as :func:`cross_entropy`.

    While a chunk's row numbers travel the next chunk's logits are made, and its gradient is summed over the ranks
    during the next one's GEMMs. With ``reduction="none"`` and in fp16 the backward computes the logits again.
    """
    group = group_of(group)
    with told(group, input):
        known = grad_reduce in ("all", "scatter", "none")
        require(known, "grad_reduce", grad_reduce, "'all', 'scatter' or 'none'")
        LinearSpec(chunk_rows=chunk_rows, grad_accumulation=grad_accumulation)
        for name in ("class_dim", "inplace"):
            if name in options:
                raise TypeError(f"{name} is an option of cross_entropy: here no logits exist")
        check_operands(input, linear_weight, linear_bias)
        require(linear_weight.dim() == 2, "linear_weight", linear_weight, "of shape (K_r, D)")
        good = grad_reduce != "scatter" or input.dim() > 1
        require(good, "input", input, "of shape (N, D) or (..., D) with grad_reduce='scatter'")
        spec = LossSpec(weight=weight, class_dim=input.dim() - 1, **options)
        ranks = dist.get_world_size(group) if grad_reduce == "scatter" else 1
        stand_in = _stand_in(input, linear_weight, ranks)
        rows, shape = prepare(stand_in, target, spec, shard=True)
        chosen = _backend(rows)
    operands, dtype = (input, linear_weight, linear_bias), rows.logits.dtype
    flat = input.reshape(-1, input.shape[-1])
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in operands]
    others = (rows.row_weight, spec.normalizer)
    grad_of_others = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    one_pass = (
        any(wanted) and spec.reduction != "none" and dtype != torch.float16 and not grad_of_others and len(flat) > 0
    )
    facts = _facts(rows, shape, num_classes) | {
        "grad_reduce": grad_reduce, "chunk_rows": chunk_rows, "features": input.shape[-1],
        "dtype of input": str(input.dtype), "a gradient is wanted in the forward": one_pass,
    }  # fmt: skip
    if grad_reduce != "none":
        facts["requires_grad of input"] = wanted[0]
    shard = Agreement(group, facts, input.device).wait()
    check_together(rows, shard)
    job = Job(chosen, shard, group, grad_reduce, chunk_rows or 0, grad_accumulation == "float32", dtype, wanted)
    factors = _factors(rows, shard, group) if one_pass else None
    given = (flat, linear_weight, linear_bias, rows, job, factors)
    loss, whole = ShardedLinear.apply(*given)  # type: ignore[no-untyped-call]
    if one_pass:
        return shaped(loss, _stats(whole, loss.dtype), shape, spec)
    return _result(loss, whole, rows, shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def apply_spec(
    input: Tensor, target: Tensor, spec: LossSpec, group: Any, num_classes: int | None = None
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`cross_entropy` with its options already in a :class:`LossSpec`."""
    with told(group, input):
        rows, shape = prepare(input, target, spec, shard=True)
        chosen = _backend(rows)
    agreement = Agreement(group, _facts(rows, shape, num_classes), rows.logits.device)
    if torch.is_grad_enabled() and rows.logits.requires_grad:
        loss, whole = _Sharded.apply(rows.logits, rows, chosen, group, agreement)  # type: ignore[no-untyped-call]
    else:
        whole = _gathered(rows, chosen, group, agreement)[0]
        loss = whole.loss
    return _result(loss, whole, rows, shape)


def token_count(target: Tensor, group: Any = None, ignore_index: int = -100) -> Tensor:
    """How many targets of all ranks of ``group`` are not ``ignore_index``: the ``normalizer`` of a mean over ranks of
    data, sequence or context parallelism. A 0-dimensional int64 tensor on the device of ``target``; the sum runs in the
    background until it is used.

    With ``normalizer=token_count(target, group)`` gradients must be *summed* over the ranks; where they are averaged,
    as DistributedDataParallel and FSDP do, divide it by the number of ranks.
    """
    from torch.distributed import _functional_collectives as collectives

    count: Tensor = collectives.all_reduce((target != ignore_index).sum(), "sum", group_of(group))
    return count


# ---- before a call


def _backend(rows: Rows) -> backends.Backend:
    if not rows.index_target:
        raise ArgumentError(f"target must hold class indices, got probabilities of shape {tuple(rows.target.shape)}")
    spec = rows.spec
    for name, value in (
        ("weight", spec.weight),
        ("label_smoothing", spec.label_smoothing),
        ("smoothing", spec.smoothing),
    ):
        if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(f"{name} must not require a gradient where classes are sharded: detach() it")
    return backends.select(rows)


def _stand_in(input: Tensor, linear_weight: Tensor, ranks: int) -> Tensor:
    """Logits of the right shape and dtype that take no memory."""
    kind = input.device.type
    cast = input.dtype != torch.float64 and torch.is_autocast_enabled(kind)
    rows = (input.shape[0] * ranks, *input.shape[1:-1]) if input.dim() > 1 else ()
    dtype = torch.get_autocast_dtype(kind) if cast else input.dtype
    return input.detach().new_empty(1, dtype=dtype).expand(*rows, len(linear_weight))


def _facts(rows: Rows, shape: torch.Size, num_classes: int | None) -> dict[str, Any]:
    """What must be the same on every rank, beside the number of classes, which need not."""
    spec, x = rows.spec, rows.logits
    facts: dict[str, Any] = {
        "classes": x.shape[-1], "shape of target": list(shape), "dtype": str(x.dtype), "device": x.device.type,
        "smoothing": spec.smoothing if isinstance(spec.smoothing, str) else "a prior",
        "label_smoothing": list(rows.eps.shape) if isinstance(rows.eps, Tensor) else rows.eps,
        "num_classes": num_classes, "weight": spec.weight is not None, "row_weight": spec.row_weight is not None,
    }  # fmt: skip
    named = ("ignore_index", "reduction", "smooth_over", "z_loss", "confidence_penalty", "logit_scale", "softcap")
    facts |= {name: getattr(spec, name) for name in (*named, "return_stats")}
    facts["normalizer"] = "a tensor" if isinstance(spec.normalizer, Tensor) else spec.normalizer
    if x.device.type == "cpu":
        places = torch.arange(1, len(rows.target) + 1)
        facts["checksum of target"] = int((rows.target * places).sum())
    return facts


# ---- from rows to the result


def _gathered(rows: Rows, chosen: backends.Backend, group: Any, agreement: Agreement) -> tuple[Whole, Shard]:
    """The rows of all ranks; the facts travel while the kernel runs."""
    found = find(rows, chosen.kernels)
    shard = agreement.wait()
    check_together(rows, shard)
    return Exchange(found, rows, shard, group).wait(), shard


def _stats(whole: Whole, dtype: torch.dtype) -> RowStats | None:
    if whole.stats is None:
        return None
    cast = (v if v is None or v.dtype == torch.int64 else v.to(dtype) for v in whole.stats)
    return RowStats(*cast)  # type: ignore[arg-type]  # the first four are there


def _divisor(rows: Rows, w_y: Tensor | None) -> Tensor | None:
    """What a mean divides by, with the class weights of targets that may be another rank's."""
    weights = rows.row_weight
    if w_y is not None:
        weights = w_y.to(accumulate_dtype(rows.logits.dtype)) * (1.0 if weights is None else weights)
    return denominator(rows._replace(weight=None, row_weight=weights))


def _result(loss: Tensor, whole: Whole, rows: Rows, shape: torch.Size) -> Tensor | tuple[Tensor, RowStats]:
    """From the loss of every row."""
    acc = accumulate_dtype(rows.logits.dtype)
    loss = loss.to(acc) if rows.row_weight is None else loss.to(acc) * rows.row_weight
    if rows.spec.reduction != "none":
        divisor = _divisor(rows, whole.w_y)
        loss = loss.sum() if divisor is None else loss.sum() / divisor
    return shaped(loss, _stats(whole, acc), shape, rows.spec)


def _factors(rows: Rows, shard: Shard, group: Any) -> Tensor:
    """(N,) of the rows in a mean or a sum, known before any logits are."""
    w_y = None
    if rows.spec.reduction == "mean" and rows.spec.normalizer is None:
        w_y = target_weight(rows, shard)
    if w_y is not None:
        dist.all_reduce(w_y, group=group)  # a class has one owner: a sum of one weight and zeros
    scale = row_scale(rows.row_weight, _divisor(rows, w_y))
    ones = torch.ones(len(rows.target), dtype=accumulate_dtype(rows.logits.dtype), device=rows.target.device)
    return ones if scale is None else ones * scale


class _Sharded(torch.autograd.Function):
    """(loss (N,), the rows); the gradient is made in the backward, of this rank's logits, without a message."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: Rows, chosen: backends.Backend, group: Any, agreement: Agreement
    ) -> tuple[Tensor, Whole]:
        whole, shard = _gathered(rows._replace(logits=logits), chosen, group, agreement)
        ctx.save_for_backward(logits, rows.target, rows.weight, rows.prior, whole.saved, whole.e)
        ctx.call = rows.spec, chosen, shard
        return whole.loss.clone(), whole

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: None) -> tuple[Tensor | None, ...]:
        refuse_graph()
        logits, target, weight, prior, known, e = ctx.saved_tensors
        spec, chosen, shard = ctx.call
        rows = Rows(spec, logits, target, weight, prior, 0.0, None)
        call, saved = gradient_call(rows, shard, known, e, upstream)
        if logits.shape[-1] == 0:
            grad = torch.zeros_like(logits)
        elif chosen.kernels is None:
            grad = plain_gradient(logits, call, saved, rows.spec)
        elif rows.spec.inplace and not graph_is_kept():
            chosen.kernels.backward_(logits, *call, saved)
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = chosen.kernels.backward(logits, *call, saved)
        return grad, *(None,) * 4
