"""Checks of failures that other losses had, for the tests of them and for those that plant the bugs again."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from cases import Place, draw, loss_and_grad, truncates
from rule import Problem, expect, judge_grad, judge_loss
from torch import Tensor

from labelsmooth_kernels import reference

EPS = 0.1


def judge(
    place: Place, x: Tensor, y: Tensor, loss: Tensor | None, grad: Tensor, factors: Tensor | float, roundings: int = 1
) -> None:
    """Judge the losses of rows smoothed by EPS, and the gradient of Σ factor·loss, for logits x (N, K)."""
    problem = Problem(x.detach(), y, {"label_smoothing": EPS})
    want = expect(problem, torch.as_tensor(factors, device=x.device, dtype=torch.float64).expand(len(y)))
    if loss is not None:
        judge_loss(want, loss)
    judge_grad(problem, want, grad, roundings, truncates(place[0], x))


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "column slice": lambda x: F.pad(x, (3, 5), value=9.0)[:, 3 : 3 + x.shape[1]],
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
    "rows that overlap": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
}


def check_r20(place: Place) -> None:
    """A batch with ignored rows has the sum, the mean and the gradients of the batch without them."""
    x, y = draw(place, 8, 48, ignored=2)  # rows on 16-byte boundaries, wherever they stand: their sums have one order
    keep = y != -100
    for reduction in ("sum", "mean"):
        loss, grad = loss_and_grad(place, x, y, reduction=reduction, label_smoothing=0.2)
        want, want_grad = loss_and_grad(place, x[keep], y[keep], reduction=reduction, label_smoothing=0.2)
        assert (loss - want).abs() <= 2**-22 * want, "the same numbers, summed in another order"
        assert torch.equal(grad[keep], want_grad)
        assert (grad[~keep] == 0).all()


def check_r27(place: Place, shift: float) -> None:
    """Logits on a grid that float32 holds at every shift: loss and gradient keep every bit."""
    x, y = draw(place, 4, 300)
    x = (x * 64).round() / 64
    want, got = (loss_and_grad(place, z, y, reduction="none", label_smoothing=EPS) for z in (x, x + shift))
    assert torch.equal(want[0], got[0])
    assert torch.equal(want[1], got[1])


def check_r28(place: Place, dtype: torch.dtype) -> None:
    """With a z-loss Σ_k dz_k = 2ζ·lse: the factor belongs to p, never to q, and whole norms would hide that."""
    x, y = draw(place, 5, 40, dtype)
    _, grad = loss_and_grad(place, x, y, reduction="sum", label_smoothing=EPS, z_loss=0.02)
    want = torch.where(y == -100, 0.0, 2 * 0.02 * torch.logsumexp(x.double(), 1))
    assert (grad.double().sum(1) - want).abs().max() < 64 * torch.finfo(dtype).eps


def merged(z: Tensor, q: Tensor, cuts: list[int], order: list[int]) -> tuple[Tensor, ...]:
    """(max, Σ exp, Σ q·(z - max), Σ q) of a row, from its pieces merged in that order."""
    pieces = []
    for zi, qi in zip(z.tensor_split(cuts), q.tensor_split(cuts), strict=True):
        shifted = torch.where(zi == -math.inf, zi, zi - zi.max())
        pieces.append((zi.max(), shifted.exp().sum(), torch.where(qi == 0, 0.0, qi * shifted).sum(), qi.sum()))
    whole = pieces[order[0]]
    for i in order[1:]:
        whole = reference.merge(whole, pieces[i])
    return whole


def check_r33() -> None:
    """K = 8 over 2 and over 4 unequal shards, each with its own maximum and its own Σ q, is the loss of the row."""
    rng = torch.Generator().manual_seed(8)
    z, q = torch.randn(8, generator=rng).double() * 5, torch.rand(8, generator=rng).double()
    for cuts in ([3], [1, 3, 7], []):
        _, s, d, mass = merged(z, q, cuts, list(range(len(cuts) + 1)))
        assert abs(mass * s.log() - d + (q * torch.log_softmax(z, 0)).sum()) < 1e-13
