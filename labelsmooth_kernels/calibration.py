"""Are the probabilities what they say? Measured from the by-products of the loss, and mended by one temperature.

A row's confidence is c = max p; it is right where argmax z is its target y. Over N rows, and bins b of confidence that
hold n_b of them with mean confidence c_b and the share a_b of right ones,

    ECE = Σ_b n_b/N · |a_b - c_b|        MCE = max_b |a_b - c_b|        Brier = mean Σ_k (p_k - [k=y])²

These judge the class on top. The class-wise error judges every probability: with bins b of p_k for each of the K
classes, in which p_k has the mean c_kb and a share a_kb of the rows has the target k,

    classwise-ECE = 1/K · Σ_k Σ_b n_kb/N · |a_kb - c_kb|

:func:`collect` turns the statistics of a call into sums, a :class:`Calibration`; sums of batches and of ranks add up,
and what is asked is computed from them at the end. Nothing of the size of the logits is read again or kept.

*Temperature.* With β = 1/T and z = β·x the mean of -log p_y has the derivatives

    β·∂/∂β = mean(-log p_y - H(p))        β²·∂²/∂β² = mean Var_p[z]

so that it is convex in β, and least where the mean loss is the mean entropy: Newton's step is
β ← β·(1 - mean(-log p_y - H)/mean Var_p[z]), three numbers of a row that the kernels make (``return_stats="all"``).

Sources: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Nixon et al. 2019 for bins of equal mass and, as
static calibration error, the class-wise one, which Kull et al. 2019 call classwise-ECE; Brier 1950.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .arguments import check_names, options_of, plain_float, plain_int, takes, unscriptable
from .classwise import Classwise, count
from .functional import cross_entropy
from .linear import linear_cross_entropy
from .reliability import SCHEMES, Bins, Calibration, collect
from .spec import ArgumentError, LossSpec, require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Unpack

    from .options import ClasswiseOptions, EvaluationOptions, ScaledEvaluationOptions
    from .reference import RowStats

__all__ = [
    "SCHEMES",
    "Bins",
    "Calibration",
    "Classwise",
    "Temperature",
    "collect",
    "evaluate",
    "evaluate_classwise",
    "fit_temperature",
    "plot_reliability",
]
Batches: TypeAlias = "Tensor | Sequence[Tensor] | Iterable[tuple[Tensor, Tensor]]"
"""Logits, or hidden states: one tensor, a list or tuple of batches, or without a ``target`` an iterable of pairs of a
batch and its targets, such as a DataLoader"""
_FLAT = 1e-4  # logits of this spread: what float32 says of how they might be scaled is rounding
_OPTIONS = inspect.signature(linear_cross_entropy).parameters | inspect.signature(cross_entropy).parameters
PASSED_ON = [_OPTIONS[name] for name in ("class_dim", "linear_bias", "chunk_rows", "backend")]  # to the loss
_SCALES = [_OPTIONS[name] for name in ("logit_scale", "softcap")]
_OF_LOGITS, _OF_HEAD = ("class_dim",), ("linear_bias", "chunk_rows")


@unscriptable
@takes([*PASSED_ON, *_SCALES])
def evaluate(
    input: Batches,
    target: Tensor | Sequence[Tensor] | None = None,
    linear_weight: Tensor | None = None,
    *,
    bins: int = 15,
    ignore_index: int = -100,
    **options: Unpack[ScaledEvaluationOptions],
) -> Calibration:
    """:class:`Calibration` of logits, or of a linear head on hidden states whose logits are never held.

    Args:
        input: logits as in ``cross_entropy``; or hidden states (..., D), with ``linear_weight`` (K, D); one tensor, or
            a list or tuple of batches; or an iterable of pairs (logits or hidden states, class indices), such as a
            DataLoader, which is iterated once and of which one batch is held at a time.
        target: class indices, one tensor or a list or tuple of as many; left out where ``input`` gives pairs.
        options: of ``cross_entropy`` (``class_dim``, ``logit_scale``, ``softcap``, ``backend``) or of
            ``linear_cross_entropy`` (``linear_bias`` and ``chunk_rows`` too).
    """
    check_options(evaluate, options, head=linear_weight is not None)
    total = None
    for x, y in _batches(input, target):
        stats = _statistics(x, y, linear_weight, ignore_index, options)
        found = collect(stats, y, bins=bins, ignore_index=ignore_index)
        total = found if total is None else total + found
    require(total is not None, "input", input, "at least one batch")
    assert total is not None
    return total


@unscriptable
@takes([*PASSED_ON[:-1], *_SCALES])
@torch.no_grad()
def evaluate_classwise(
    input: Batches,
    target: Tensor | Sequence[Tensor] | None = None,
    linear_weight: Tensor | None = None,
    *,
    bins: int = 15,
    ignore_index: int = -100,
    **options: Unpack[ClasswiseOptions],
) -> Classwise:
    """Return the class-wise calibration, a :class:`Classwise`, of logits or of a linear head; formula: see the module.

    Arguments are those of :func:`evaluate`, but ``backend``: probabilities are made by PyTorch's softmax, in float32 or
    for float64 logits in float64, a chunk of rows at a time. Beside a chunk, 24·K·bins bytes of sums are kept, whatever
    the number of rows is.

    Raises:
        ArgumentError: as ``cross_entropy``, and for a target of probabilities; no bin; no batch.
        IndexError: a target outside [0, K) on the CPU; on a GPU it makes every number NaN.
    """
    check_options(evaluate_classwise, options, head=linear_weight is not None)
    head: dict[str, Any] = {name: options.get(name) for name in _OF_HEAD}
    scales: dict[str, Any] = {name: value for name, value in options.items() if name not in _OF_HEAD}
    found = []
    for x, y in _batches(input, target):
        place = scales if linear_weight is None else scales | {"class_dim": x.dim() - 1}
        found.append(count(x, y, linear_weight, LossSpec(ignore_index=ignore_index, **place), bins, **head))
        found = [sum(found[1:], found[0])]  # the sums of one batch may be large: K·bins
    require(len(found) > 0, "input", input, "at least one batch")
    return found[0]


def _batches(input: Batches, target: Tensor | Sequence[Tensor] | None) -> Iterator[tuple[Tensor, Tensor]]:
    if target is None:
        good = isinstance(input, Iterable) and not isinstance(input, Tensor)
        require(good, "target", target, "given, unless input is an iterable of pairs (logits or hidden states, target)")
        for batch in input:
            if not isinstance(batch, list | tuple) or [isinstance(t, Tensor) for t in batch] != [True, True]:
                kind = type(batch).__name__
                raise ArgumentError(f"input must give pairs of tensors, a batch and its target, got a {kind} in it")
            yield batch[0], batch[1]
        return
    inputs = (input,) if isinstance(input, Tensor) else input
    targets = (target,) if isinstance(target, Tensor) else target
    for name, value in (("input", inputs), ("target", targets)):
        require(isinstance(value, list | tuple), name, value, "a tensor, or a list or tuple of batches")
    if len(inputs) != len(targets):  # type: ignore[arg-type]
        raise ArgumentError(f"target must have as many batches as input, got {len(targets)} and {len(inputs)}")  # type: ignore[arg-type]
    yield from zip(inputs, targets, strict=True)


def check_options(function: Callable[..., object], options: Mapping[str, object], *, head: bool) -> None:
    """Raise a TypeError for a wrong keyword of ``function``, and for one that belongs to logits where there is a head,
    or to a head where there is none; such a one is not offered either."""
    refused, where = (_OF_LOGITS, "without") if head else (_OF_HEAD, "with")
    for name in options:
        if name in refused:
            raise TypeError(f"{name} is no option here: {function.__name__}() takes it {where} linear_weight")
    check_names(function.__name__, options, options_of(function) - {*refused})


@torch.no_grad()
def _statistics(
    input: Tensor, target: Tensor, linear_weight: Tensor | None, ignore_index: int, options: Mapping[str, Any]
) -> RowStats:
    shared: dict[str, Any] = {"ignore_index": ignore_index, "reduction": "sum", "return_stats": "all", **options}
    stats: RowStats
    if linear_weight is None:
        _, stats = cross_entropy(input, target, **shared)
    else:
        _, stats = linear_cross_entropy(input, linear_weight, target, **shared)
    return stats


class Temperature(NamedTuple):
    """What :func:`fit_temperature` found."""

    temperature: float
    """T: divide the logits by it, or pass ``logit_scale=1/T``"""
    before: Calibration
    """at T = 1"""
    after: Calibration
    """at T"""
    steps: int
    """passes over the logits"""


@unscriptable
@takes(PASSED_ON)
def fit_temperature(
    input: Batches,
    target: Tensor | Sequence[Tensor] | None = None,
    linear_weight: Tensor | None = None,
    *,
    bins: int = 15,
    ignore_index: int = -100,
    tolerance: float = 1e-5,
    max_steps: int = 50,
    **options: Unpack[EvaluationOptions],
) -> Temperature:
    """The temperature T that minimises the mean -log softmax(z/T)_y over a validation set, by Newton's method.

    Arguments are those of :func:`evaluate`, without ``logit_scale`` and ``softcap``; each step is one pass over the
    logits, or over the chunks of a head's, of which sums are kept. An iterable of batches is iterated once for each
    step (some 5 to 12), one batch at a time: a DataLoader serves, which must give the same rows each time, in any order
    and without augmentation; a generator, which is gone after one pass, is refused. Ends when a step changes T by less
    than ``tolerance`` (relative).

    Raises:
        ArgumentError: where no T is best: every row has its largest logit at the target (T → 0), or the logits do not
            favour the targets at all (T → ∞); where there is no row; where a target has probability 0 or a logit is
            NaN; where ``max_steps`` do not suffice; an iterator, or an iterable that gives fewer or more rows in a
            later pass.

    Source: Guo et al. 2017; the derivatives are those of this module's head.
    """
    for name in ("logit_scale", "softcap"):
        require(options.get(name) is None, name, options.get(name), "left out: what is scaled are the logits as given")
    own = {name: value for name, value in options.items() if name not in ("logit_scale", "softcap")}
    check_options(fit_temperature, own, head=linear_weight is not None)
    tolerance, max_steps, ignore_index = plain_float(tolerance), plain_int(max_steps), plain_int(ignore_index)
    require(isinstance(tolerance, float) and 0 < tolerance < 1, "tolerance", tolerance, "a float between 0 and 1")
    require(isinstance(max_steps, int) and max_steps > 0, "max_steps", max_steps, "an int > 0")
    if isinstance(input, Iterator):
        kind = type(input).__name__
        raise ArgumentError(f"input must be iterable once for each step, as a list or a DataLoader, got a {kind}")
    beta, low, high, spread = 1.0, 0.0, math.inf, 0.0
    before: Calibration | None = None
    for step in range(1, max_steps + 1):
        (nll, entropy, variance), found = _at_scale(beta, input, target, linear_weight, bins, ignore_index, own)
        if before is None:
            before = found
            require(found.rows > 0, "target", found.rows, "of one row at least that is not ignored")
            require(math.isfinite(nll), "input", nll, "logits with a finite mean loss")
            if found.accuracy == 1:
                raise ArgumentError("input must be wrong in some row: every row is right, and surer still as T -> 0")
        same = found.rows == before.rows
        require(same, "input", found.rows, f"the same {before.rows} rows in each pass")
        slope = nll - entropy
        if abs(slope) <= tolerance * variance or high < low * (1 + tolerance):
            return Temperature(1 / beta, before, found, step)
        low, high = (low, beta) if slope > 0 else (beta, high)
        last, spread = spread, math.sqrt(variance / found.rows) / beta  # of the logits; where p is flat, fixed
        if slope > 0 and beta * spread < _FLAT and abs(spread - last) < spread / 100:
            raise ArgumentError("input must have logits that favour the targets: these make them no likelier at any T")
        within = high / 4 if low == 0 else 4 * low if high == math.inf else math.sqrt(low * high)
        wanted = beta * min(max(1 - slope / variance, 1 / 4), 4) if variance > 0 else within
        beta = wanted if low < wanted < high else within
    raise ArgumentError(f"max_steps must suffice to find T within {tolerance}, got {max_steps}, at T = {1 / beta}")


def _at_scale(
    beta: float,
    input: Batches,
    target: Tensor | Sequence[Tensor] | None,
    linear_weight: Tensor | None,
    bins: int,
    ignore_index: int,
    options: Mapping[str, Any],
) -> tuple[tuple[float, ...], Calibration]:
    """(Σ -log p_y, Σ H(p), Σ Var_p[z]) over the counted rows, and their calibration, for z = beta·logits."""
    sums: list[Tensor] = []
    found: list[Calibration] = []
    for x, y in _batches(input, target):
        stats = _statistics(x, y, linear_weight, ignore_index, {**options, "logit_scale": beta})
        assert stats.entropy is not None
        assert stats.variance is not None
        rows = torch.stack((stats.nll, stats.entropy, stats.variance)).double()
        sums.append(torch.where(y == ignore_index, 0.0, rows).flatten(1).sum(1))
        found.append(collect(stats, y, bins=bins, ignore_index=ignore_index))
    require(len(found) > 0, "input", input, "at least one batch")
    return tuple(torch.stack(sums).sum(0).tolist()), sum(found[1:], found[0])


@unscriptable
def plot_reliability(calibrations: Mapping[str, Calibration], path: str | None = None, *, scheme: str = "width") -> Any:
    """Reliability diagrams side by side, accuracy over confidence with the diagonal and how many rows each bin holds;
    written to ``path`` where one is given. Returns the figure. Needs matplotlib (``pip install
    labelsmooth_kernels[plot]``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_reliability needs matplotlib: pip install 'labelsmooth_kernels[plot]'") from error
    require(len(calibrations) > 0, "calibrations", calibrations, "at least one, by name")
    figure = Figure(figsize=(3.2 * len(calibrations) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(2, len(calibrations), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for (name, calibration), (above, below) in zip(calibrations.items(), axes.T, strict=True):
        found = calibration.reliability(scheme)
        lower, width = found.lower, (found.upper - found.lower).clamp_min(0.004)  # of equal mass they may have none
        above.plot((0, 1), (0, 1), color="0.6", linewidth=1, zorder=1)
        above.bar(lower, found.accuracy.nan_to_num(), width, align="edge", color="#3b6fb6", edgecolor="white", zorder=2)
        above.plot(found.confidence, found.confidence, ".", color="#c4501b", markersize=4, zorder=3, label="confidence")
        above.set_title(
            f"{name}\nECE {calibration.calibration_error(scheme):.2%}, NLL {calibration.nll:.3f}", fontsize=10
        )
        below.bar(lower, found.rows / found.rows.sum(), width, align="edge", color="0.7", edgecolor="white")
        below.set_xlabel("confidence")
        above.set(xlim=(0, 1), ylim=(0, 1))
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of rows")
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
