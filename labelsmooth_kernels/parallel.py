"""The loss of logits whose classes are sharded over the ranks of a process group, and global token counts.

Rank r holds some columns of the logits, or rows of the head, in the order of the ranks; targets are class numbers among
all. Every option of :func:`labelsmooth_kernels.cross_entropy` means what it means on one device: K counts the classes
of all ranks, smoothing spreads over all of them. The maths of the merge, and what a rank sends, stand in
:mod:`labelsmooth_kernels.shards`: with class indices 3 numbers per row (4 with smoothing) in one all-gather, or, over
more than 16 ranks, in an all-to-all whose results are gathered; the same bits on every rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends
from .arguments import check_names, options_of, plain_int, takes, unscriptable
from .autograd import CARRIED
from .functional import prepare, shaped
from .linear import HEAD_PARAMETERS, LinearSpec, autocasts, check_operands, head_options
from .parallel_linear import Head, ShardedLinear
from .parallel_rows import ShardedRows, Where, divisor_of, row_constants, row_tensors, stats_of
from .ranks import group_of, told
from .spec import LOSS_OPTIONS, LOSS_PARAMETERS, ArgumentError, LossSpec, Rows, is_dtensor, require
from .targets import TopK, top_k
from .torch_state import savable, transformed

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from .options import LossOptions
    from .reference import RowStats

__all__ = ["cross_entropy", "linear_cross_entropy", "token_count"]


@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, group: dist.ProcessGroup | None = None,
    num_classes: int | None = None, ignore_index: int = -100, inplace: bool = False,
    return_stats: Literal[False] = False, **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, group: dist.ProcessGroup | None = None,
    num_classes: int | None = None, ignore_index: int = -100, inplace: bool = False,
    return_stats: Literal[True, "entropy", "all"], **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@overload
def cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, group: dist.ProcessGroup | None = None,
    num_classes: int | None = None, ignore_index: int = -100, inplace: bool = False,
    return_stats: bool | str, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...  # fmt: skip
@takes(LOSS_PARAMETERS)
@unscriptable
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`labelsmooth_kernels.cross_entropy` of logits of which every rank of ``group`` holds some classes.

    Args:
        input: this rank's logits (N, K_r), or as ``class_dim`` says, of any number of classes, 0 among them; the same
            rows on every rank. Rank order is class order: K = Σ K_r.
        target: class numbers from 0 to K - 1, the same on every rank; or probabilities of the shape of ``input``, of
            this rank's classes.
        weight: (K_r,) of this rank's classes, like a prior given as ``smoothing``, which sums to 1 over all ranks.
        group: a process group; None: the default one.
        num_classes: K, where it is known; it saves a synchronisation with a GPU per call (see below).
        options: as in ``cross_entropy``, the same on every rank; none may require a gradient but ``row_weight`` and
            ``normalizer``.

    Returns:
        What ``cross_entropy`` returns for the whole logits, on every rank and bit for bit the same. The backward needs
        no communication: each rank gets the gradient in its own logits.

    Raises:
        ArgumentError, TypeError, IndexError: as ``cross_entropy``; and on every rank alike where one rank refuses its
            arguments, or ranks disagree in shape, dtype or options, on a CPU also in the values of what they share.
            They tell each other before each call, which waits for a GPU; there, with ``num_classes``, only before a
            call of which none was like it. As many classes must then always be cut alike, and a rank that goes its own
            way later ends in the time-out of the group.

    Source: Shoeybi et al. 2019, "Megatron-LM"; smoothing there counts the classes of a rank only.
    """
    group = group_of(group)
    with told(group, input):
        _check("cross_entropy", options, {"input": input, "target": target})
        spec = LossSpec(weight=weight, **options)
    return apply_spec(input, target, spec, group, num_classes)


@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, group: dist.ProcessGroup | None = None, num_classes: int | None = None,
    grad_reduce: str = "all", chunk_rows: int | None = None, grad_accumulation: str = "float32",
    ignore_index: int = -100, return_stats: Literal[False] = False, **options: Unpack[LossOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, group: dist.ProcessGroup | None = None, num_classes: int | None = None,
    grad_reduce: str = "all", chunk_rows: int | None = None, grad_accumulation: str = "float32",
    ignore_index: int = -100, return_stats: Literal[True, "entropy", "all"], **options: Unpack[LossOptions],
) -> tuple[Tensor, RowStats]: ...  # fmt: skip
@overload
def linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor | TopK, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, group: dist.ProcessGroup | None = None, num_classes: int | None = None,
    grad_reduce: str = "all", chunk_rows: int | None = None, grad_accumulation: str = "float32",
    ignore_index: int = -100, return_stats: bool | str, **options: Unpack[LossOptions],
) -> Tensor | tuple[Tensor, RowStats]: ...  # fmt: skip
@takes(HEAD_PARAMETERS)
@unscriptable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | TopK,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
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
        target: class numbers from 0 to K - 1 of every row of all slices, the same on every rank; probabilities
            (..., K_r) of this rank's classes; or a :class:`TopK`, the same on every rank.
        linear_bias, weight: (K_r,), like a prior given as ``smoothing``.
        group, num_classes: as in :func:`cross_entropy`.
        grad_reduce: what becomes of the gradient of ``input``, of which a rank finds its classes' part: ``"all"``:
            summed over the ranks; ``"scatter"``: summed, and each rank gets its slice; ``"none"``: left to the caller.
        chunk_rows, grad_accumulation: as in ``linear_cross_entropy``.
        options: as in ``cross_entropy``, the same on every rank.

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
        chunk_rows = LinearSpec(chunk_rows=chunk_rows, grad_accumulation=grad_accumulation).chunk_rows
        if isinstance(input, Tensor):
            options = head_options(options, input.dim(), 2)
        _check("linear_cross_entropy", options, {"input": input, "linear_weight": linear_weight, "target": target})
        check_operands(input, linear_weight, linear_bias)
        require(linear_weight.dim() == 2, "linear_weight", linear_weight, "of shape (K_r, D)")
        good = grad_reduce != "scatter" or input.dim() > 1
        require(good, "input", input, "of shape (N, D) or (..., D) with grad_reduce='scatter'")
        spec = LossSpec(weight=weight, class_dim=input.dim() - 1, **options)
        ranks = dist.get_world_size(group) if grad_reduce == "scatter" else 1
        num_classes = _checked_num_classes(num_classes)
        rows, shape, indices = _linear_rows(_stand_in(input, linear_weight, ranks), target, spec)
        chosen = _backend(rows)
        if not rows.index_target and rows.target.requires_grad and torch.is_grad_enabled():
            raise ArgumentError("target must not require a gradient where classes are sharded: detach() it")
    operands, dtype = (input, linear_weight, linear_bias), rows.logits.dtype
    flat = input.unsqueeze(0) if input.dim() == 1 else input.flatten(0, -2)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in operands]
    others = (rows.row_weight, spec.normalizer)
    grad_of_others = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in others)
    one_pass = any(wanted) and spec.reduction != "none" and dtype != torch.float16 and not grad_of_others
    head = Head(dtype, grad_reduce, chunk_rows or 0, grad_accumulation == "float32", wanted)
    where = Where.of(rows, shape, group, num_classes, chosen.name)
    given = (*row_tensors(rows, where), indices, *row_constants(rows, where), head, one_pass)
    tensors = (t if t is None else savable(t) for t in (flat, linear_weight, linear_bias))
    loss, w_y, stats, prediction = ShardedLinear.apply(*tensors, *given)  # type: ignore[no-untyped-call]
    if one_pass:
        return shaped(loss, stats_of(spec, stats, prediction), shape, spec)
    return _result(loss, w_y, stats_of(spec, stats, prediction), rows, shape)


def apply_spec(
    input: Tensor, target: Tensor, spec: LossSpec, group: Any, num_classes: int | None = None
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`cross_entropy` with its options already in a :class:`LossSpec`."""
    with told(group, input):
        num_classes = _checked_num_classes(num_classes)
        rows, shape = prepare(input, target, spec, shard=True)
        chosen = _backend(rows)
    where = Where.of(rows, shape, group, num_classes, chosen.name)
    given = (rows.logits, *row_tensors(rows, where), *row_constants(rows, where))
    loss, w_y, stats, prediction = ShardedRows.apply(*given)  # type: ignore[no-untyped-call]
    return _result(loss, w_y, stats_of(spec, stats, prediction), rows, shape)


def _result(
    loss: Tensor, w_y: Tensor, stats: RowStats | None, rows: Rows, shape: torch.Size
) -> Tensor | tuple[Tensor, RowStats]:
    """From the loss of every row."""
    loss = loss if rows.row_weight is None else loss * rows.row_weight
    if rows.spec.reduction != "none":
        divisor = divisor_of(rows, w_y if len(w_y) else None)
        loss = loss.sum() if divisor is None else loss.sum() / divisor
    return shaped(loss, stats, shape, rows.spec)


@unscriptable
def token_count(target: Tensor, group: dist.ProcessGroup | None = None, ignore_index: int = -100) -> Tensor:
    """How many targets of all ranks of ``group`` are not ``ignore_index``: the ``normalizer`` of a mean over ranks of
    data, sequence or context parallelism. A 0-dimensional int64 tensor on the device of ``target``; the sum runs in the
    background until it is used.

    With ``normalizer=token_count(target, group)`` gradients must be *summed* over the ranks; where they are averaged,
    as DistributedDataParallel and FSDP do, divide it by the number of ranks.
    """
    from torch.distributed import _functional_collectives as collectives

    count: Tensor = collectives.all_reduce((target != plain_int(ignore_index)).sum(), "sum", group_of(group))
    return count


# ---- before a call


def _check(function: str, options: dict[str, Any], tensors: dict[str, object]) -> None:
    """Raise for an option that the loss does not have, and for what is no rank's part but a DTensor."""
    if unknown := [name for name in options if name not in LOSS_OPTIONS]:
        own: Callable[..., object] = cross_entropy if function == "cross_entropy" else linear_cross_entropy
        check_names(f"parallel.{function}", unknown, options_of(own))
    for name, value in (*tensors.items(), *options.items()):
        if is_dtensor(value):
            raise TypeError(
                f"{name} must be a plain tensor of this rank, got a DTensor: labelsmooth_kernels.{function} takes those"
            )


def _checked_num_classes(num_classes: int | None) -> int | None:
    num_classes = plain_int(num_classes)
    good = num_classes is None or (isinstance(num_classes, int) and not isinstance(num_classes, bool))
    require(good, "num_classes", num_classes, "the number of classes of all ranks, an int, or None")
    return num_classes


_LEFT_OUT = tuple((f.name, f.default) for f in dataclasses.fields(LossSpec) if f.name not in CARRIED)


def _backend(rows: Rows) -> backends.Backend:
    spec = rows.spec
    for name, default in _LEFT_OUT:
        value = getattr(spec, name)
        given = isinstance(value, Tensor) or value != default
        require(not given, name, value, f"{default!r} where classes are sharded, which does not serve it yet")
    if transformed():
        raise NotImplementedError("torch.func and forward mode are not served where classes are sharded")
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
    rows = (input.shape[0] * ranks, *input.shape[1:-1]) if input.dim() > 1 else ()
    dtype = torch.get_autocast_dtype(input.device.type) if autocasts(input) else input.dtype
    return input.detach().new_empty(1, dtype=dtype).expand(*rows, len(linear_weight))


def _linear_rows(stand_in: Tensor, target: Tensor | TopK, spec: LossSpec) -> tuple[Rows, torch.Size, Tensor | None]:
    """(the call as rows, the shape of one value per row, of top-k probabilities their classes)"""
    if isinstance(target, Tensor):
        rows, shape = prepare(stand_in, target, spec, shard=True)
        given = rows.target if rows.index_target else rows.target.flatten(0, -2)
        return rows._replace(target=given), shape, None
    if not isinstance(target, TopK):
        raise TypeError(f"target must be a Tensor or a TopK where classes are sharded, got {type(target).__name__}")
    rows, shape = prepare(stand_in, stand_in, spec, shard=True)
    given, soft = top_k(target, stand_in)
    return rows._replace(target=given), shape, soft.indices
