"""The loss of rows whose classes lie on several ranks, as one operator: what ranks tell each other is no graph.

``sharded_forward`` takes this rank's logits, a :class:`RowCall` and a :class:`Where`. It returns rows of all ranks, the
same on each: loss, w_y and statistics in the dtype of the arithmetic; ``saved`` and ``e`` of :class:`shards.Whole`, in
float64, from which :func:`shards.gradient_call` makes the backward without a message; and the place of this rank.
"""

from __future__ import annotations

import ctypes
import math
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .autograd import called_rows, row_arguments
from .backends import BACKENDS
from .functional import denominator
from .ops import LIBRARY, NAMESPACE, ROW_SCHEMA, RowCall
from .ranks import Agreement, Exchange, check_together, group_named, refuse_graph, told
from .reference import RowStats
from .shards import Place, Whole, find, gradient_call, plain_gradient, plain_target_gradient
from .spec import LossSpec, Rows, accumulate_dtype, prior_mass
from .torch_state import graph_is_kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from .ops import Kernels

_OPS, ROW_ARGUMENTS = getattr(torch.ops, NAMESPACE), len(RowCall._fields)


class Where(NamedTuple):
    """What an operator of all ranks takes beside a :class:`RowCall`, whose ``row_scale`` is the row weight."""

    normalizer: Tensor | None
    normalizer_number: float | None
    reduction: str
    group: str
    num_classes: int | None
    shape: list[int]
    """of one value per row"""
    backend: str
    n_stats: int

    @classmethod
    def of(cls, rows: Rows, shape: torch.Size, group: Any, num_classes: int | None, backend: str) -> Where:
        given = rows.spec.normalizer
        if isinstance(given, str) or (torch.compiler.is_compiling() and given is not None):
            given = denominator(rows)  # "rows", and a number that changes, which as a tensor stays out of the graph
        tensor, number = (given.detach(), None) if isinstance(given, Tensor) else (None, given)
        return cls(
            tensor, number, rows.spec.reduction, group.group_name, num_classes, list(shape), backend, rows.spec.n_stats
        )

    def rows(self, logits: Tensor, call: RowCall) -> Rows:
        """The call as rows; raises for an ε that no graph could look at."""
        normalizer = self.normalizer_number if self.normalizer is None else self.normalizer
        return called_rows(logits, call, self.n_stats, reduction=self.reduction, normalizer=normalizer)

    @property
    def kernels(self) -> Kernels | None:
        return BACKENDS[self.backend].kernels

    def agreement(self, rows: Rows, more: dict[str, Any]) -> Agreement:
        return Agreement(group_named(self.group), self._facts(rows) | more, rows.logits.device)

    def _facts(self, rows: Rows) -> dict[str, Any]:
        """What must be the same on every rank, beside :data:`ranks.OWN`, which need not."""
        spec, x = rows.spec, rows.logits
        facts: dict[str, Any] = {
            "classes": x.shape[-1], "shape of target": self.shape, "dtype": str(x.dtype), "device": x.device.type,
            "smoothing": spec.smoothing if isinstance(spec.smoothing, str) else "a prior",
            "label_smoothing": _shown(rows.eps, x.dtype), "num_classes": self.num_classes,
            "weight": spec.weight is not None, "row_weight": _shown(rows.row_weight, x.dtype),
            "normalizer": _shown(spec.normalizer, x.dtype),
            "target": "class indices" if rows.index_target else "probabilities",
        }  # fmt: skip
        named = ("ignore_index", "reduction", "smooth_over", "z_loss", "confidence_penalty", "logit_scale", "softcap")
        facts |= {name: getattr(spec, name) for name in (*named, "return_stats")}
        if rows.prior is not None:
            facts["mass of smoothing"] = prior_mass(rows.prior)
        if rows.index_target:
            facts["checksum of target"] = checksum(rows.target)
        return facts


WHERE_SCHEMA = (
    "Tensor? normalizer, float? normalizer_number, str reduction, str group, SymInt? num_classes, SymInt[] shape, "
    "str backend, int n_stats"
)
RESULTS_SCHEMA = "Tensor loss, Tensor saved, Tensor e, Tensor w_y, Tensor stats, Tensor prediction"


def _shown(value: float | str | Tensor | None, dtype: torch.dtype) -> object:
    """A number or tensor as it is compared. A tensor of one element is its number, as torch.compile makes tensors of
    numbers; but not if 0, which as a number means that nothing is smoothed."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return list(value.shape)
        if value.numel() != 1 or value == 0:
            return f"{tuple(value.shape)} of checksum {checksum(value)}"
    if isinstance(value, str):
        return value
    if value is None or dtype == torch.float64:
        return None if value is None else float(value)
    return float(f"{torch.tensor(value, dtype=torch.float32).item():.7g}")


def checksum(tensor: Tensor) -> int | None:
    """Of the bytes, where looking costs nothing: on a CPU."""
    if tensor.device.type != "cpu":
        return None
    tensor = tensor.contiguous()
    return zlib.crc32(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))


def results_of(whole: Whole, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What an operator returns of the rows: RESULTS_SCHEMA. ``stats`` are the floating-point ones of RowStats in their
    order, without elements where there are none, like ``prediction`` and ``w_y``."""
    acc, new = accumulate_dtype(dtype), whole.loss.new_empty
    stats, prediction = new(0, 0), new(0, dtype=torch.int64)
    if whole.stats is not None:
        nll, lse, confidence, prediction, *more = whole.stats
        stats = torch.stack([nll, lse, confidence, *(value for value in more if value is not None)])
    w_y = new(0) if whole.w_y is None else whole.w_y
    e = whole.e.clone(memory_format=torch.contiguous_format)  # it may be the caller's ε, expanded
    return whole.loss.to(acc), whole.saved, e, w_y.to(acc), stats.to(acc), prediction


def results_fakes(x: Tensor, call: RowCall, k: int) -> tuple[Tensor, ...]:
    """Of what :func:`results_of` returns, of k statistics."""
    n, acc = math.prod(x.shape[:-1]), accumulate_dtype(x.dtype)
    weighed = call.weight is not None and not call.target.is_floating_point()
    loss, w_y, stats = (
        x.new_empty(shape, dtype=acc) for shape in ((n,), (n if weighed else 0,), (k + 2, n) if k else (0, 0))
    )
    saved, e = (x.new_empty(shape, dtype=torch.float64) for shape in ((4, n), (n,)))
    return loss, saved, e, w_y, stats, x.new_empty(n if k else 0, dtype=torch.int64)


def register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator that ranks run together, and that torch.compile must not leave out on one that needs none of
    its results."""
    LIBRARY.define(f"{name}{schema}")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.fx.node.has_side_effect(getattr(_OPS, name).default)


def _forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call, where = RowCall(*arguments[:ROW_ARGUMENTS]), Where(*arguments[ROW_ARGUMENTS:])
    with told(group_named(where.group), logits):
        rows = where.rows(logits, call)
    agreement = where.agreement(rows, {})
    found = find(rows, where.kernels)  # while the facts travel
    layout = agreement.wait()
    check_together(rows, layout)
    whole = Exchange(found, rows, layout, agreement.group).wait()
    return *results_of(whole, logits.dtype), torch.tensor(layout.place)


def _fake_forward(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call, where = RowCall(*arguments[:ROW_ARGUMENTS]), Where(*arguments[ROW_ARGUMENTS:])
    return *results_fakes(logits, call, where.n_stats), torch.empty(3, dtype=torch.int64)


_SCHEMA = f"(Tensor logits, {ROW_SCHEMA}, {WHERE_SCHEMA}) -> ({RESULTS_SCHEMA}, Tensor place)"
register("sharded_forward", _SCHEMA, _forward, _fake_forward)


def row_tensors(rows: Rows, where: Where) -> tuple[Tensor | None, ...]:
    """The tensors of a call but its logits, as an autograd.Function must be given them."""
    eps = rows.eps if isinstance(rows.eps, Tensor) else None
    row_weight = None if rows.row_weight is None else rows.row_weight.detach()
    return rows.target, rows.weight, rows.prior, eps, row_weight, where.normalizer


def row_constants(rows: Rows, where: Where) -> tuple[Any, ...]:
    return 0.0 if isinstance(rows.eps, Tensor) else rows.eps, rows.spec, where[1:]


def given_rows(logits: Tensor, given: tuple[Any, ...]) -> tuple[Rows, Where]:
    """Both from ``row_tensors`` and ``row_constants``."""
    target, weight, prior, eps, row_weight, normalizer, number, spec, where = given
    rows = Rows(spec, logits, target, weight, prior, number if eps is None else eps, row_weight)
    return rows, Where(normalizer, *where)


class ShardedRows(torch.autograd.Function):
    """(loss, w_y, stats, prediction) of all rows; the gradient is made in the backward, of this rank's logits, without
    a message. Inputs: the logits, ``row_tensors``, ``row_constants``."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *given: Any) -> tuple[Tensor, ...]:
        rows, where = given_rows(logits, given)
        call = row_arguments(rows, rows.row_weight)
        loss, saved, e, *more, place = _OPS.sharded_forward(logits, *call, *where)
        ctx.save_for_backward(logits, rows.target, rows.weight, rows.prior, saved, e, place)
        ctx.spec, ctx.kernels = rows.spec, where.kernels
        ctx.mark_non_differentiable(*more)
        ctx.set_materialize_grads(False)
        return loss, *more

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        refuse_graph()
        if upstream is None:
            return (None,) * 10
        logits, target, weight, prior, known, e, place = ctx.saved_tensors
        spec, kernels = ctx.spec, ctx.kernels
        rows = Rows(spec, logits, target, weight, prior, 0.0, None)
        call, saved = gradient_call(rows, Place(*place.unbind()), known, e, upstream)
        grad = target_grad = None
        if ctx.needs_input_grad[1]:
            target_grad = _target_gradient(kernels, logits, call, saved, spec)
        if ctx.needs_input_grad[0]:
            grad = _gradient(kernels, logits, call, saved, spec)
        return grad, target_grad, *(None,) * 8


def _target_gradient(kernels: Kernels | None, logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> Tensor:
    if logits.shape[-1] == 0:
        return torch.zeros_like(call.target)
    if kernels is None:
        return plain_target_gradient(logits, call, saved, spec)
    return kernels.target_grad(logits, *call, saved)


def _gradient(kernels: Kernels | None, logits: Tensor, call: RowCall, saved: Tensor, spec: LossSpec) -> Tensor:
    if logits.shape[-1] == 0:
        return torch.zeros_like(logits)
    if kernels is None:
        return plain_gradient(logits, call, saved, spec)
    if not spec.inplace or graph_is_kept():
        return kernels.backward(logits, *call, saved)
    kernels.backward_(logits, *call, saved)
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


# ---- from rows to the result


def stats_of(spec: LossSpec, stats: Tensor, prediction: Tensor) -> RowStats | None:
    if not spec.return_stats:
        return None
    nll, lse, confidence, *more = stats
    return RowStats(nll, lse, confidence, prediction, *more)


def divisor_of(rows: Rows, w_y: Tensor | None) -> Tensor | None:
    """What a mean divides by, with the class weights of targets that may be another rank's."""
    weights = rows.row_weight
    if w_y is not None:
        weights = w_y if weights is None else w_y * weights
    return denominator(rows._replace(weight=None, row_weight=weights))
