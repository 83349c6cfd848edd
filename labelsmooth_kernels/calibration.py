"""Are the probabilities what they say? Measured from the by-products of the loss, and mended by one temperature.

A row's confidence is c = max p; it is right where argmax z is its target y. Over N rows, and bins b of confidence that
hold n_b of them with mean confidence c_b and the share a_b of right ones,

    ECE = Σ_b n_b/N · |a_b - c_b|        MCE = max_b |a_b - c_b|        Brier = mean Σ_k (p_k - [k=y])²

:func:`collect` turns the statistics of a call into sums, a :class:`Calibration`; sums of batches and of ranks add up,
and what is asked is computed from them at the end. Nothing of the size of the logits is read again or kept.

*Temperature.* With β = 1/T and z = β·x the mean of -log p_y has the derivatives

    β·∂/∂β = mean(-log p_y - H(p))        β²·∂²/∂β² = mean Var_p[z]

so that it is convex in β, and least where the mean loss is the mean entropy: Newton's step is
β ← β·(1 - mean(-log p_y - H)/mean Var_p[z]), three numbers of a row that the kernels make (``return_stats="all"``).

Sources: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Nixon et al. 2019 for bins of equal mass; Brier
1950.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .arguments import takes
from .functional import cross_entropy
from .linear import linear_cross_entropy
from .reference import RowStats
from .spec import INDEX_DTYPES, ArgumentError, readable, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from typing_extensions import Unpack

    from .options import EvaluationOptions, ScaledEvaluationOptions

SCHEMES = ("width", "mass")
_UNIT = 2**32  # sums of confidences are in integer multiples of 1/_UNIT: the same in any order, from one row to 2³¹
_CELLS = 2048  # of equal width in log-odds, from which bins of equal mass are cut
_FLAT = 1e-4  # logits of this spread: what float32 says of how they might be scaled is rounding
_REACH = 17.5  # log-odds of the outermost cells: float32 knows nothing between 1 - exp(-_REACH) and 1
_OPTIONS = inspect.signature(linear_cross_entropy).parameters | inspect.signature(cross_entropy).parameters
PASSED_ON = [_OPTIONS[name] for name in ("class_dim", "linear_bias", "chunk_rows", "backend")]  # to the loss


class Bins(NamedTuple):
    """A reliability diagram, (bins,) float64 on the CPU; NaN in bins without rows."""

    lower: Tensor
    upper: Tensor
    """the range of confidence: [lower, upper), the last [lower, upper]; of equal mass, up to the width of a cell"""
    rows: Tensor
    confidence: Tensor
    """mean confidence"""
    accuracy: Tensor
    """share of right rows"""


@dataclass(frozen=True, eq=False)
class Calibration:
    """What is known of some rows, as sums: ``a + b`` is what is known of both. Made by :func:`collect`.

    A number that a NaN went into is NaN; without any row every number is.
    """

    scores: Tensor
    """(2,) float64: Σ -log p_y and Σ of the Brier score (NaN where that was not collected)"""
    bins: Tensor
    """(3, bins) int64: rows, confidence in units of 2⁻³² and right rows in bins of equal width"""
    cells: Tensor
    """(3, 2048): the same in cells of equal width in log-odds"""

    def __add__(self, other: Calibration) -> Calibration:
        if self.bins.shape != other.bins.shape:
            sizes = self.bins.shape[1], other.bins.shape[1]
            raise ArgumentError(f"bins must be as many on both sides of a sum, got {sizes[0]} and {sizes[1]}")
        return Calibration(self.scores + other.scores, self.bins + other.bins, self.cells + other.cells)

    def __radd__(self, other: object) -> Calibration:
        """0 + a, which ``sum`` begins with."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: Any = None) -> Calibration:
        """The sum over the ranks of a torch.distributed process group (None: the default one)."""
        counts, scores = torch.cat((self.bins, self.cells), 1), self.scores.clone()
        for tensor in (counts, scores):
            torch.distributed.all_reduce(tensor, group=group)
        sizes = [self.bins.shape[1], _CELLS]
        return Calibration(scores, *(part.contiguous() for part in counts.split(sizes, 1)))

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return int(self.bins[0].sum())

    def _mean(self, total: Tensor) -> float:
        poisoned = bool(self.scores[0].isnan())
        return math.nan if poisoned or not self.rows else float(total) / self.rows

    @property
    def nll(self) -> float:
        """mean -log p_y"""
        return self._mean(self.scores[0])

    @property
    def accuracy(self) -> float:
        return self._mean(self.bins[2].sum())

    @property
    def confidence(self) -> float:
        """mean max p"""
        return self._mean(self.bins[1].sum() / _UNIT)

    @property
    def brier(self) -> float:
        """mean Σ_k (p_k - [k=y])², from 0 to 2; NaN unless the statistics had ``return_stats="all"``."""
        return self._mean(self.scores[1])

    @property
    def ece(self) -> float:
        """Expected calibration error over bins of equal width."""
        return self.calibration_error()

    @property
    def mce(self) -> float:
        """The largest calibration error of a bin of equal width."""
        return self.calibration_error(norm="max")

    @property
    def adaptive_ece(self) -> float:
        """Expected calibration error over bins of equal mass, as many as there are of equal width."""
        return self.calibration_error("mass")

    def calibration_error(self, scheme: str = "width", norm: str = "mean") -> float:
        """Σ n_b/N·|a_b - c_b| (``norm="mean"``) or max_b |a_b - c_b| (``"max"``) over :meth:`reliability`."""
        require(norm in ("mean", "max"), "norm", norm, "'mean' or 'max'")
        found = self.reliability(scheme)
        gap, rows = (found.accuracy - found.confidence).abs(), found.rows
        if math.isnan(self.nll):
            return math.nan
        gap = torch.where(rows > 0, gap, 0.0)
        return float(gap.max() if norm == "max" else (gap * rows).sum() / rows.sum())

    def reliability(self, scheme: str = "width") -> Bins:
        """Confidence against accuracy in bins of equal ``"width"``, or of equal ``"mass"``: as many rows in each, where
        rows of one cell, which log-odds within 0.02 make alike, are divided evenly between the bins they fall into."""
        require(scheme in SCHEMES, "scheme", scheme, f"one of {SCHEMES}")
        n = self.bins.shape[1]
        edges = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        if scheme == "width":
            sums = self.bins.double().cpu()
        else:
            held = self.cells[:, self.cells[0] > 0].double().cpu()
            below = torch.nn.functional.pad(held.cumsum(1), (1, 0))
            at = edges * below[0, -1]
            upto = torch.stack([_interpolated(at, below[0], line) for line in below])
            sums = upto.diff(dim=1)
            odds = torch.nn.functional.pad(self.cells[0].cpu().double().cumsum(0), (1, 0))
            cell_edges = ((torch.arange(_CELLS + 1, dtype=torch.float64) / _CELLS * 2 - 1) * _REACH).sigmoid()
            cell_edges[0], cell_edges[-1] = 0, 1
            edges = cell_edges[torch.searchsorted(odds, at.clamp_max(float(odds[-1]))).clamp_max(_CELLS)]
        return Bins(edges[:-1], edges[1:], sums[0], sums[1] / _UNIT / sums[0], sums[2] / sums[0])


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The piecewise linear function through (x, y), x increasing, at points within."""
    if len(x) < 2:
        return torch.zeros_like(at)
    i = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    return torch.lerp(y[i - 1], y[i], (at - x[i - 1]) / (x[i] - x[i - 1]))


def collect(stats: RowStats, target: Tensor, *, bins: int = 15, ignore_index: int = -100) -> Calibration:
    """The sums over the rows of a call, from its statistics: on their device, without a synchronisation with a GPU.

    Args:
        stats: of :func:`labelsmooth_kernels.cross_entropy` or ``linear_cross_entropy`` with ``return_stats=True``;
            with ``"all"`` the Brier score is counted too.
        target: the class indices of that call, of the shape of the statistics.
        bins: of equal width between 0 and 1. Bins are closed below and the last one above as well, so that a confidence
            of exactly 1 counts like one of 0.9999.
        ignore_index: rows with this target do not count.

    Raises:
        ArgumentError: a target that is not of class indices or of another shape; no bin; on the CPU also a confidence
            outside [0, 1], which no softmax has, and a negative target that is not ``ignore_index``.
    """
    require(isinstance(stats, RowStats), "stats", stats, "RowStats, of return_stats=True")
    require(isinstance(bins, int) and not isinstance(bins, bool) and bins > 0, "bins", bins, "an int > 0")
    require(isinstance(ignore_index, int), "ignore_index", ignore_index, "an int")
    good = isinstance(target, Tensor) and target.dtype in INDEX_DTYPES and target.shape == stats.nll.shape
    require(good, "target", target, f"class indices of the shape {tuple(stats.nll.shape)} of the statistics")
    counted = (target != ignore_index).reshape(-1)
    confidence, nll = stats.confidence.reshape(-1), stats.nll.reshape(-1)
    if readable(confidence):
        outside = counted & ~((confidence >= 0) & (confidence <= 1) | confidence.isnan())
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ArgumentError(f"stats.confidence must be from 0 to 1, got {float(confidence[row])} in row {row}")
        least = int(target.amin()) if target.numel() else 0
        if least < 0 and (counted & (target.reshape(-1) < 0)).any():
            raise ArgumentError(f"target must be >= 0 or ignore_index={ignore_index}, got {least}")
    right = counted & (stats.prediction == target).reshape(-1)
    known = torch.where(counted, confidence, 0.0).nan_to_num(0.0)  # a NaN is told by its nll
    sums = torch.stack((counted.long(), (known.double() * _UNIT).round().long(), right.long()))
    edges = torch.linspace(0, 1, bins + 1, dtype=known.dtype, device=known.device)
    width = torch.bucketize(known, edges[1:-1].contiguous(), right=True)
    odds = known.double().logit()
    cell = ((odds / _REACH + 1) / 2 * _CELLS).clamp(0, _CELLS - 1).long()
    brier = torch.full_like(nll, math.nan)
    if stats.collision is not None:
        brier = stats.collision.reshape(-1) - 2 * (-nll).exp() + 1
    scores = torch.stack([torch.where(counted, score, 0.0).double().sum() for score in (nll, brier)])
    scores = torch.where(confidence.isnan().logical_and(counted).any(), math.nan, scores)
    return Calibration(
        scores, *(sums.new_zeros(3, n).index_add_(1, i, sums) for n, i in ((bins, width), (_CELLS, cell)))
    )


@takes([*PASSED_ON, _OPTIONS["logit_scale"], _OPTIONS["softcap"]])
def evaluate(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    linear_weight: Tensor | None = None,
    *,
    bins: int = 15,
    ignore_index: int = -100,
    **options: Unpack[ScaledEvaluationOptions],
) -> Calibration:
    """:class:`Calibration` of logits, or of a linear head on hidden states whose logits are never held.

    Args:
        input: logits as in ``cross_entropy``; or hidden states (..., D), with ``linear_weight`` (K, D); one tensor, or
            a sequence of batches.
        target: class indices, one tensor or a sequence of as many.
        options: of ``cross_entropy`` (``class_dim``, ``logit_scale``, ``softcap``, ``backend``) or of
            ``linear_cross_entropy`` (``linear_bias`` and ``chunk_rows`` too).
    """
    total = None
    for x, y in _batches(input, target):
        stats = _statistics(x, y, linear_weight, ignore_index, options)
        found = collect(stats, y, bins=bins, ignore_index=ignore_index)
        total = found if total is None else total + found
    require(total is not None, "input", input, "at least one batch")
    assert total is not None
    return total


def _batches(input: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    inputs = (input,) if isinstance(input, Tensor) else input
    targets = (target,) if isinstance(target, Tensor) else target
    for name, value in (("input", inputs), ("target", targets)):
        require(isinstance(value, list | tuple), name, value, "a tensor, or a list or tuple of batches")
    if len(inputs) != len(targets):
        raise ArgumentError(f"target must have as many batches as input, got {len(targets)} and {len(inputs)}")
    return zip(inputs, targets, strict=True)


@torch.no_grad()
def _statistics(
    input: Tensor, target: Tensor, linear_weight: Tensor | None, ignore_index: int, options: Mapping[str, Any]
) -> RowStats:
    placed = {"class_dim"} if linear_weight is None else {"linear_bias", "chunk_rows"}
    known = {"logit_scale", "softcap", "backend"} | placed
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"{unknown[0]} is no option here: {', '.join(sorted(known))} are")
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


@takes(PASSED_ON)
def fit_temperature(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
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
    logits, or over the chunks of a head's, of which three numbers per row are kept. Ends when a step changes T by less
    than ``tolerance`` (relative).

    Raises:
        ArgumentError: where no T is best: every row has its largest logit at the target (T → 0), or the logits do not
            favour the targets at all (T → ∞); where there is no row; where a target has probability 0 or a logit is
            NaN; where ``max_steps`` do not suffice.

    Source: Guo et al. 2017; the derivatives are those of this module's head.
    """
    for name in ("logit_scale", "softcap"):
        require(options.get(name) is None, name, options.get(name), "left out: what is scaled are the logits as given")
    require(isinstance(tolerance, float) and 0 < tolerance < 1, "tolerance", tolerance, "a float between 0 and 1")
    require(isinstance(max_steps, int) and max_steps > 0, "max_steps", max_steps, "an int > 0")
    beta, low, high, spread = 1.0, 0.0, math.inf, 0.0
    before: Calibration | None = None
    for step in range(1, max_steps + 1):
        (nll, entropy, variance), found = _at_scale(beta, input, target, linear_weight, bins, ignore_index, options)
        if before is None:
            before = found
            require(found.rows > 0, "target", target, "of one row at least that is not ignored")
            require(math.isfinite(nll), "input", nll, "logits with a finite mean loss")
            if found.accuracy == 1:
                raise ArgumentError("input must be wrong in some row: every row is right, and surer still as T -> 0")
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
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
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
