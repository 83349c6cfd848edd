"""The calibration of every class: how often a class that is given the probability p is the target.

All probabilities of a row count, not the largest one alone, so that the logits are read by plain PyTorch, a chunk of
rows at a time: beside the chunk there are three numbers for each class and bin.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .arguments import plain_int
from .chunked import rows_per_chunk
from .functional import check_targets, prepare
from .linear import LinearSpec, check_operands
from .reliability import UNIT, error_of
from .spec import ArgumentError, LossSpec, accumulate_dtype, require
from .torch_state import readable

if TYPE_CHECKING:
    from collections.abc import Iterator

_BYTES = 40  # for a logit of a chunk, of 8 bytes: itself, its probability, that masked, scaled, and as an int64


@dataclass(frozen=True, eq=False)
class Classwise:
    """What is known of the probabilities of every class, as sums: ``a + b`` is what is known of the rows of both. Made
    by :func:`labelsmooth_kernels.calibration.evaluate_classwise`."""

    sums: Tensor
    """(3, K, bins) int64: rows, probability in units of 2⁻³² and rows of that class in bins of equal width"""
    broken: Tensor
    """() int64: rows with a NaN, or on a GPU with a target that is no class, which make every number NaN"""

    def __add__(self, other: Classwise) -> Classwise:
        if self.sums.shape != other.sums.shape:
            shapes = tuple(self.sums.shape[1:]), tuple(other.sums.shape[1:])
            raise ArgumentError(
                f"classes and bins must be as many on both sides of a sum, got {shapes[0]}, {shapes[1]}"
            )
        return Classwise(self.sums + other.sums, self.broken + other.broken)

    def __radd__(self, other: object) -> Classwise:
        """0 + a, which ``sum`` begins with."""
        return self if other == 0 else NotImplemented

    def all_reduce(self, group: Any = None) -> Classwise:
        """Return the sum over the ranks of a torch.distributed process group (None: the default one)."""
        sums, broken = self.sums.clone(), self.broken.clone()
        for tensor in (sums, broken):
            torch.distributed.all_reduce(tensor, group=group)
        return Classwise(sums, broken)

    @property
    def rows(self) -> int:
        """How many rows were counted."""
        return int(self.sums[0, 0].sum())

    @property
    def ece(self) -> float:
        """The class-wise expected calibration error: the mean of :meth:`per_class`."""
        return self.calibration_error()

    def per_class(self, norm: str = "l1") -> Tensor:
        """Return the calibration error of each class, (K,) float64 on the CPU, norms as in ``Calibration``."""
        rows, confidence, right = self.sums.double().cpu()
        error = error_of(rows, confidence / UNIT / rows, right / rows, norm)
        return torch.full_like(error, math.nan) if int(self.broken) or not self.rows else error

    def calibration_error(self, norm: str = "l1") -> float:
        """Return the gaps |a_kb - c_kb| of all classes in a norm: ``"l1"``: Σ_k Σ_b n_kb/(K·N)·gap_kb, ``"l2"``: the
        root of Σ_k Σ_b n_kb/(K·N)·gap_kb², ``"max"``: the largest."""
        error = self.per_class(norm)
        return float(error.max() if norm == "max" else error.mean() if norm == "l1" else error.square().mean().sqrt())


def count(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor | None,
    spec: LossSpec,
    bins: int,
    linear_bias: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Classwise:
    """Return the sums over the rows of logits, or of the logits of a head, on their device."""
    bins, chunk_rows = plain_int(bins), LinearSpec(chunk_rows=chunk_rows).chunk_rows
    require(isinstance(bins, int) and not isinstance(bins, bool) and bins > 0, "bins", bins, "an int > 0")
    chunks = _chunks(input, target, linear_weight, spec, linear_bias, chunk_rows)
    return functools.reduce(operator.add, (_count(z, y, spec.ignore_index, bins) for z, y in chunks))


def _count(z: Tensor, y: Tensor, ignore_index: int, bins: int) -> Classwise:
    """Only probabilities above the first bin, of which a row has fewer than there are bins, are looked at one by one:
    the first bin holds the rest of each class's total."""
    n_classes, p = z.shape[1], z.softmax(-1)
    counted = y != ignore_index
    good = (y >= 0) & (y < n_classes) & ~p.isnan().any(1)
    p = torch.where((counted & good)[:, None], p, 0.0)
    units = (p * UNIT).round_().long()  # scaled by a power of two: exact
    rows, right = counted & good, units.new_zeros(n_classes)
    right.index_add_(0, torch.where(rows, y, 0), rows.long())
    totals = torch.stack((rows.sum().expand(n_classes), units.sum(0), right))
    sums = totals.new_zeros(3, n_classes, bins)
    edges = torch.linspace(0, 1, bins + 1, dtype=p.dtype, device=p.device)[1:-1].contiguous()
    if bins > 1:
        row, k = (p >= edges[0]).nonzero().unbind(1)
        cell = bins * k + torch.bucketize(p[row, k], edges, right=True)
        found = torch.stack((torch.ones_like(k), units[row, k], (k == y[row]).long()))
        sums.flatten(1).index_add_(1, cell, found)
    sums[:, :, 0] = totals - sums.sum(2)
    return Classwise(sums, (counted & ~good).sum())


def _chunks(
    input: Tensor,
    target: Tensor,
    linear_weight: Tensor | None,
    spec: LossSpec,
    linear_bias: Tensor | None,
    chunk_rows: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits after scale and cap in the dtype of the arithmetic, some rows at a time, and their targets."""
    logits = input
    if linear_weight is not None:
        check_operands(input, linear_weight, linear_bias)
        require(linear_weight.dim() == 2, "linear_weight", linear_weight, "of shape (K, D)")
        logits = input.detach().new_empty(1).expand(*input.shape[:-1], len(linear_weight))
    rows, shape = prepare(logits, target, spec)
    good = rows.index_target
    require(good, "target", target, f"class indices of the shape {tuple(shape)}, one for each row")
    if readable(target):
        check_targets(rows)
    k, dtype = logits.shape[-1] if linear_weight is not None else rows.logits.shape[-1], logits.dtype
    source = rows.flat().logits if linear_weight is None else input.reshape(-1, input.shape[-1])
    step = rows_per_chunk(rows.n, k * _BYTES, input.device.type, chunk_rows or 0)
    for begin in range(0, max(rows.n, 1), step):
        part = slice(begin, begin + step)
        x = source[part] if linear_weight is None else F.linear(source[part], linear_weight, linear_bias)
        yield reference.transform(x.to(accumulate_dtype(dtype)), spec), rows.target[part]
