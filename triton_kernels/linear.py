"""A linear layer and its loss in one, tile by tile: the N×K logits are never held. float16, bfloat16 and float32.

The arguments from ``target`` to ``softcap`` are those of the row operators (``labelsmooth_kernels.ops``), for
logits = hidden·linear_weightᵀ + linear_bias; only index targets, and neither ``finite`` nor ``softcap``.

Memory besides the results: 24 bytes per row and part of the classes in the forward; in the backward, per program that
runs at once, a queue of tiles and a float32 accumulator, the latter only where the gradient itself is not float32 or is
made in parts; with a filter, 4 bytes per row and tile of classes, the share of each row in what was skipped.

Not yet measured on a GPU: the numbers in ``_TILES`` come from ahead-of-time compilation (``tests/aot_tiled.py``).
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import launch, operands
from .kernels import Results
from .linear_kernels import (
    Layer,
    coefficient_kernel,
    join_kernel,
    round_kernel,
    spread_kernel,
    sums_kernel,
    sweep_kernel,
    tile_kernel,
)
from .logits import _Call, _check_classes
from .row_math import Structure
from .rows import Targets

if TYPE_CHECKING:
    from collections.abc import Iterator


class Tiles(NamedTuple):
    """Sizes of a tiled kernel."""

    rows: int
    classes: int
    depth: int
    """features that a tile takes at once"""
    warps: int
    stages: int
    columns: int = 0
    """features of an accumulator in registers"""
    slice: int = 0
    """rows or classes that it takes at once"""
    queue: int = 0
    """tiles that are put aside for it"""
    registers: int | None = None
    """at most so many per thread; left to itself, the assembler stops at fewer here and there, and spills"""
    wide: bool = False
    """operands become float32: Triton's interpreter multiplies bfloat16 as integers"""


# (forward, backward) by bytes of an element
_TILES = {
    2: (
        Tiles(128, 128, 64, 8, 3, registers=255),
        Tiles(128, 128, 64, 8, 3, columns=128, slice=64, queue=8, registers=255),
    ),
    4: (Tiles(64, 64, 32, 4, 2), Tiles(64, 64, 32, 8, 2, columns=64, slice=32, queue=16, registers=168)),
}
# Where those spill: half precision from compute capability 10 on, where products pass through tensor memory; Triton 3.6
_SMALL_TILES = {
    2: (
        Tiles(128, 64, 64, 8, 3, registers=255),
        Tiles(128, 64, 64, 8, 3, columns=64, slice=64, queue=16, registers=255),
    ),
    4: (Tiles(64, 64, 32, 4, 2), Tiles(32, 64, 32, 4, 2, columns=64, slice=32, queue=16, registers=168)),
}
_PARTS = 8  # of the sum of an owner of a gradient, at most, where there are fewer owners than SMs
_SPLITS = 12  # parts of the classes in the forward: on an SM count of 130 or so, 11 blocks of rows share them in L2
_BLOCK, _COLUMNS, _SLICE = 64, 64, 16  # what is outside the tiles: rank one, means, rounding
# Of mass·p that may be skipped in a row, in all. Each skipped p is below filter_eps, but what is lost, p's covariance
# with the weight inside a tile, adds up: at 2⁻⁶ it stays below what rounding to bfloat16 loses, for flat rows too.
_BUDGET = 2.0**-6
_ROWS = 128  # rows of a program that works on rows alone


def _tiles(machine: launch.Machine, hidden: Tensor, k: int) -> tuple[Tiles, Tiles]:
    """(forward, backward); in the interpreter, some blocks, tiles and steps at any size, so that small cases take every
    path."""
    if machine.capability != (0, 0):
        itemsize = hidden.element_size()
        small = machine.triton < (3, 8) or (itemsize == 2 and machine.capability[0] >= 10)
        return (_SMALL_TILES if small else _TILES)[itemsize]
    rows, classes, depth = (triton.next_power_of_2(size) // 4 for size in (len(hidden), k, 2 * hidden.shape[1]))
    rows, classes, depth = max(16, rows), max(16, classes), max(16, depth)
    wide = hidden.dtype == torch.bfloat16
    tiles = Tiles(rows, classes, depth, 4, 1, columns=depth, slice=16, queue=2, wide=wide)
    return tiles, tiles


class _Problem:
    """What the launches of one call share."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, n_stats: int = 0) -> None:
        if call.soft or call.finite or call.softcap is not None or n_stats > 1:
            raise TypeError("the tiled linear loss takes index targets, and no finite, softcap or entropy")
        self._check(hidden, weight, bias, call)
        self.hidden, self.weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
        self.call, (self.n, self.d), self.k = call, hidden.shape, weight.shape[0]
        self.layer = Layer(self.hidden, self.weight, None if bias is None else bias.contiguous())
        self.targets = Targets(call.target, call.weight, call.prior, call.eps_rows, call.row_scale)
        self.machine = launch.machine_of(hidden)
        self.forward, self.backward = _tiles(self.machine, hidden, self.k)
        self.r = call.prior if call.weight is None else call.weight
        if call.weight is not None and call.prior is not None:
            self.r = call.weight * call.prior
        given = (call.weight is not None, call.prior is not None)
        self.structure = Structure(1, False, False, False, *given, SOFT=False, FINITE=False, STATS=n_stats)
        self.sizes = (self.n, self.k, self.d, self.hidden.stride(0), self.weight.stride(0))

    @staticmethod
    def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call) -> None:
        operands.check_served("hidden", hidden)
        require, d = operands.require, hidden.shape[-1]
        require(hidden.dim() == 2, "hidden", "have 2 dimensions", f"shape {tuple(hidden.shape)}")
        fits = weight.dim() == 2 and weight.shape[1] == d and len(weight) > 0
        require(fits, "linear_weight", f"have shape (K, {d})", tuple(weight.shape))
        for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
            if tensor is not None:
                require(tensor.dtype == hidden.dtype, name, f"be {hidden.dtype}, as hidden is", tensor.dtype)
                operands.check_device(name, tensor, hidden.device)
        if bias is not None:
            require(bias.shape == weight.shape[:1], "linear_bias", f"have shape ({len(weight)},)", tuple(bias.shape))
        operands.check_call(call, len(hidden), len(weight), hidden)
        _check_classes(len(weight), call)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.hidden.device)

    def start(
        self, kernel: Any, grid: int, arguments: tuple[Any, ...], tiles: Tiles | None = None, **more: Any
    ) -> None:
        """Launch on the device of the call and its current stream."""
        # A product that fuses with a sum is not rounded: z would differ from the z whose maximum is saved.
        options: dict[str, Any] = {"enable_fp_fusion": False, "num_warps": 4, **more}
        if tiles is not None:
            options |= {"T": tiles, "num_warps": tiles.warps, "num_stages": tiles.stages}
            options |= {} if tiles.registers is None else {"maxnreg": tiles.registers}
        device = self.hidden.device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            launch.run(kernel, (grid,), arguments, options)

    def over_columns(self, kernel: Any, blocks: int, arguments: tuple[Any, ...], **more: Any) -> None:
        self.start(kernel, blocks * -(-self.d // _COLUMNS), arguments, COLUMNS=_COLUMNS, **more)


def forward(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, saved, stats, prediction) as of the row operators."""
    *row, n_stats = arguments
    call = _Call(*row)
    problem = _Problem(hidden, linear_weight, linear_bias, call, n_stats)
    n, k, tiles, S = problem.n, problem.k, problem.forward, problem.structure
    out = Results(
        problem.new(n), problem.new(4, n), problem.new(n_stats, n), problem.new(n if n_stats else 0, dtype=torch.int64)
    )
    if n == 0:
        return tuple(out)
    n_blocks, n_tiles = -(-n // tiles.rows), -(-k // tiles.classes)
    tiles_per_split = -(-n_tiles // max(_SPLITS, -(-2 * problem.machine.sms // n_blocks)))
    n_splits = -(-n_tiles // tiles_per_split)
    part = problem.new(6, n_splits, n)
    sizes = (n_splits, tiles_per_split, *problem.sizes, call.ignore_index, call.logit_scale)
    of_tiles = S._replace(WEIGHT=problem.r is not None, PRIOR=False)
    pointers = (problem.layer, call.target, problem.r, part)
    problem.start(tile_kernel, n_blocks * n_splits, (*pointers, *sizes), tiles, S=of_tiles)
    sizes = (n_splits, n, k, call.eps, call.strides[0], call.ignore_index, int(call.others), call.z_loss)
    rows = max(16, min(_ROWS, 2048 // triton.next_power_of_2(n_splits)))
    constants = {"ROWS": rows, "SPLITS": triton.next_power_of_2(n_splits), "S": S}
    problem.start(join_kernel, -(-n // rows), (part, problem.targets, out, *sizes), **constants)
    return tuple(out)


class _Rows(NamedTuple):
    """Per row: the label (-1: out of range, -2: ignored); what dz is made of; the factor g·logit_scale; sizes of dz."""

    label: Tensor
    dz: Tensor
    b: Tensor
    factor: Tensor
    bound: Tensor


class _Skipped(NamedTuple):
    """Which tiles (blocks of rows, tiles of classes) are skipped, and the lifted mass of each row in them."""

    tiles: Tensor
    mass: Tensor


def _lifts(bound: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of two (lift, 1/lift), exact, such that what is at most ``bound`` becomes at most 2¹³ when lifted: in fp16
    that is far from infinity, and p is subnormal only below 2⁻²⁶ of the bound."""
    exponent = (bound.contiguous().view(torch.int32) & 0x7F800000).clamp(27 << 23, 227 << 23)
    return ((254 << 23) - exponent).view(torch.float32) * 2.0**12, exponent.view(torch.float32) * 2.0**-12


class _Owners(NamedTuple):
    """Who owns the gradient of one operand: blocks of rows or tiles of classes, each in n_splits programs."""

    of_weight: bool
    size: int
    """rows or classes of an owner"""
    n: int
    """of them in all"""
    n_splits: int
    wave: int
    """owners that run at once"""


class _Gradients(_Problem):
    """The gradients of one call."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _Call, saved: Tensor, filter_eps: float
    ) -> None:
        super().__init__(hidden, weight, bias, call)
        operands.check_saved(saved, self.n, hidden.device)
        self.saved, self.filter_eps = saved, filter_eps
        self.n_blocks, self.n_tiles = -(-self.n // self.backward.rows), -(-self.k // self.backward.classes)
        label, row = self.new(self.n, dtype=torch.int32), self.new(5, self.n)
        sizes = (self.n, self.k, call.eps, *call.strides, call.ignore_index, int(call.others))
        arguments = (self.targets, saved, label, row, *sizes, call.z_loss, call.logit_scale)
        self.start(coefficient_kernel, -(-self.n // _ROWS), arguments, ROWS=_ROWS)
        self.rows = _Rows(label, row[:2], row[2], row[3], row[4])
        self.lift, self.unlift = _lifts(self.rows.bound)
        self.smoothed = call.eps != 0.0 or call.eps_rows is not None
        self.spreading = self.new(self.k).fill_(1.0) if self.r is None else self.r
        self.skipped: _Skipped | None = None
        if filter_eps > 0.0:
            share = self.new(self.n_tiles).fill_(1.0 / self.backward.classes)
            share[-1:] = 1.0 / (self.k - (self.n_tiles - 1) * self.backward.classes)
            self.share = share.repeat_interleave(self.backward.classes)[: self.k]
            tiles = self.new(self.n_blocks, self.n_tiles, dtype=torch.int8)
            self.skipped = _Skipped(tiles.zero_(), self.new(self.n_tiles, self.n).zero_())

    def owners(self, of_weight: bool) -> _Owners:
        size, n, n_other = self.backward.rows, self.n, self.n_tiles
        if of_weight:
            size, n, n_other = self.backward.classes, self.k, self.n_blocks
        n_splits = max(1, min(_PARTS, n_other, self.machine.sms // -(-n // size)))
        return _Owners(of_weight, size, n, n_splits, max(1, self.machine.sms // n_splits))

    def sums(self, x: Tensor, coefficient: Tensor) -> Tensor:
        """(blocks, D): Σ coefficient·x over each tile of classes or as many rows."""
        block = self.backward.classes
        out = self.new(-(-len(x) // block), self.d)
        arguments = (x, coefficient, out, len(x), self.d, x.stride(0))
        self.over_columns(sums_kernel, len(out), arguments, BLOCK=block, SLICE=_SLICE)
        return out

    def spread(self, a: Tensor, c: Tensor | None, x: Tensor, out: Tensor, group: int, gap: int) -> None:
        """out += a·(c·x), a (m, n)."""
        arguments = (a, c, x, out, *a.shape, *a.stride(), self.d, x.stride(0), group, gap)
        precision = "ieee" if self.hidden.dtype == torch.float32 else "tf32x3"
        blocks = -(-len(a) // _BLOCK)
        self.over_columns(spread_kernel, blocks, arguments, BLOCK=_BLOCK, SLICE=_SLICE, PRECISION=precision)

    def sweep(
        self, owners: _Owners, lift: Tensor, out: Tensor | None, bias: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor | None]]:
        """The owners, a wave after another: the first of it, how many, and their Σ dz·x, which is not yet rounded."""
        tiles = self.backward
        count = -(-owners.n // owners.size)
        units = min(owners.wave, count) * owners.n_splits
        acc = dz = queue = None
        if out is not None:
            in_place = owners.n_splits == 1 and out.dtype == torch.float32
            acc = None if in_place else self.new(units, owners.size, self.d)
            dz = self.new(units, tiles.rows * tiles.classes * tiles.queue, dtype=out.dtype)
            queue = self.new(units, tiles.queue, dtype=torch.int32)
        constants = {"OF_WEIGHT": owners.of_weight, "S": self.structure}
        row = (self.rows.label, self.saved, self.rows.dz, lift)
        skipped = self.skipped or (None, None)
        for first in range(0, count, owners.wave):
            n_now = min(owners.wave, count - first)
            now = acc if out is None or acc is not None else out[first * owners.size :]
            pointers = (self.layer, *row, now, bias, dz, queue, *skipped)
            limits = (self.filter_eps, _BUDGET / owners.n_splits)
            sizes = (*limits, self.call.logit_scale, first, owners.n_splits, *self.sizes)
            grid = n_now * owners.n_splits
            self.start(sweep_kernel, grid, (*pointers, *sizes), tiles, **constants)
            yield first, n_now, now

    def finish(self, owners: _Owners, wave: tuple[int, int, Tensor | None], out: Tensor, *terms: Tensor | None) -> None:
        """Round a wave: terms are alpha, beta, v, mean and label of ``round_kernel``."""
        first, n_now, acc = wave
        alpha = terms[0]
        sizes = (int(alpha is not None and len(alpha) > 1), first, owners.n_splits, owners.n, self.d)
        block = min(_BLOCK, owners.size)
        blocks = n_now * (owners.size // block)
        self.over_columns(round_kernel, blocks, (acc, out, *terms, *sizes), OWN=owners.size, BLOCK=block)

    def of_hidden(self, wanted: bool) -> Tensor:
        """(N, D), or nothing but the decision which tiles are skipped."""
        owners = self.owners(of_weight=False)
        out = self.new(self.n, self.d, dtype=self.hidden.dtype) if wanted else None
        beta = v = mean = None
        if wanted and self.smoothed:
            beta, v = self.rows.b * self.rows.factor, self.sums(self.weight, self.spreading).sum(0)
        if wanted and self.skipped is not None:
            mean = self.sums(self.weight, self.share)
        alpha = self.rows.factor * self.unlift
        for wave in self.sweep(owners, self.lift, out, None):
            first, n_now, acc = wave
            if out is None or acc is None:
                continue
            if self.skipped is not None and mean is not None:
                rows = slice(first * owners.size, (first + n_now) * owners.size)
                gap = (owners.n_splits - 1) * owners.size
                self.spread(self.skipped.mass[:, rows].mT, None, mean, acc, owners.size, gap)
            self.finish(owners, wave, out, alpha, beta, v, None, self.rows.label)
        return self.hidden.new_empty(0) if out is None else out

    def of_weight(self, wanted: bool, bias_wanted: bool) -> tuple[Tensor, Tensor]:
        """(K, D) and (K,)."""
        owners = self.owners(of_weight=True)
        out = self.new(self.k, self.d, dtype=self.weight.dtype) if wanted else None
        bias = self.new(owners.n_splits, self.k).zero_() if bias_wanted else None
        lift, unlift = _lifts((self.rows.bound * self.rows.factor.abs()).amax(0, keepdim=True))
        v = mean = c = None
        if wanted and self.smoothed:
            v = self.sums(self.hidden, self.rows.b * self.rows.factor).sum(0)
        if self.skipped is not None:
            c = self.rows.factor * self.unlift
        if wanted and self.skipped is not None:
            mean = self.new(self.n_tiles, self.d).zero_()
            self.spread(self.skipped.mass, c, self.hidden, mean, self.n_tiles, 0)
            mean *= self.share[:: owners.size, None]
        for wave in self.sweep(owners, self.rows.factor * lift, out, bias):
            if out is not None:
                self.finish(owners, wave, out, unlift, self.spreading, v, mean, None)
        d_weight = self.weight.new_empty(0) if out is None else out
        if bias is None:
            return d_weight, self.weight.new_empty(0)
        d_bias = bias.sum(0) * unlift
        if self.skipped is not None:
            d_bias += (self.skipped.mass * c).sum(1).repeat_interleave(owners.size)[: self.k] * self.share
        if self.smoothed:
            d_bias -= (self.rows.b * self.rows.factor).sum() * self.spreading
        return d_weight, d_bias.to(self.weight.dtype)


def backward(
    hidden: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_hidden, d_weight, d_bias), of Σ row_scale·loss, from what the forward saved; what is not wanted is empty."""
    *row, saved, filter_eps, want_hidden, want_weight, want_bias = arguments
    if len(hidden) == 0:
        shapes = (hidden.shape, linear_weight.shape, linear_weight.shape[:1])
        wanted = (want_hidden, want_weight, want_bias)
        return tuple(hidden.new_zeros(s if w else 0) for s, w in zip(shapes, wanted, strict=True))
    gradients = _Gradients(hidden, linear_weight, linear_bias, _Call(*row), saved, filter_eps)
    of_weight = want_weight or want_bias
    d_hidden, d_weight, d_bias = (hidden.new_empty(0) for _ in range(3))
    if want_hidden or (of_weight and filter_eps > 0.0):
        d_hidden = gradients.of_hidden(want_hidden)
    if of_weight:
        d_weight, d_bias = gradients.of_weight(want_weight, want_bias)
    return d_hidden, d_weight, d_bias
