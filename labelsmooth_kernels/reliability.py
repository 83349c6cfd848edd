"""What is known of the confidence of some rows, as sums that add up over batches and ranks, and the errors made of it.

The formulas stand in :mod:`labelsmooth_kernels.calibration`, which has these names too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import plain_int, unscriptable
from .reference import RowStats
from .spec import INDEX_DTYPES, ArgumentError, require
from .torch_state import readable

SCHEMES = ("width", "mass")
NORMS = ("l1", "l2", "max")
UNIT = 2**32  # sums of confidences are in integer multiples of 1/UNIT: the same in any order, from one row to 2³¹
_CELLS = 2048  # of equal width in log-odds, from which bins of equal mass are cut
_REACH = 17.5  # log-odds of the outermost cells: float32 knows nothing between 1 - exp(-_REACH) and 1


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
        return self._mean(self.bins[1].sum() / UNIT)

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

    def calibration_error(self, scheme: str = "width", norm: str = "l1") -> float:
        """Return the gaps |a_b - c_b| of :meth:`reliability` in a norm: ``"l1"``: Σ n_b/N·gap_b, ``"l2"``: the root of
        Σ n_b/N·gap_b², ``"max"``: the largest."""
        found = self.reliability(scheme)
        error = error_of(found.rows, found.confidence, found.accuracy, norm)
        return math.nan if math.isnan(self.nll) else float(error)

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
        return Bins(edges[:-1], edges[1:], sums[0], sums[1] / UNIT / sums[0], sums[2] / sums[0])


def error_of(rows: Tensor, confidence: Tensor, accuracy: Tensor, norm: str) -> Tensor:
    """Return the calibration error over bins (..., bins), those without rows left out."""
    require(norm in NORMS, "norm", norm, f"one of {NORMS}")
    gap = torch.where(rows > 0, (accuracy - confidence).abs(), 0.0)
    if norm == "max":
        return gap.amax(-1)
    share = rows / rows.sum(-1, keepdim=True)
    return (share * gap).sum(-1) if norm == "l1" else (share * gap.square()).sum(-1).sqrt()


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The piecewise linear function through (x, y), x increasing, at points within."""
    if len(x) < 2:
        return torch.zeros_like(at)
    i = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    return torch.lerp(y[i - 1], y[i], (at - x[i - 1]) / (x[i] - x[i - 1]))


@unscriptable
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
    bins, ignore_index = plain_int(bins), plain_int(ignore_index)
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
    sums = torch.stack((counted.long(), (known.double() * UNIT).round().long(), right.long()))
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
