"""Bugs that other losses had, planted: each must turn checks of this suite red; its sound twin leaves them green.

The twin is a backend of a few lines: the row operators in blocks, in PyTorch. ``bug`` is the number it is planted for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from cases import CASES, run_case
from test_options import check_r33
from test_regressions import check_r20, check_r27, check_r28
from torch import Tensor

from labelsmooth_kernels import backends, ops, reference
from labelsmooth_kernels.spec import FLOAT_DTYPES, accumulate_dtype

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 512
INF = torch.inf


class Twin:
    """The row operators; only the lines that name a bug differ from sound ones."""

    def __init__(self, bug: str) -> None:
        self.bug = bug

    def shift(self, m: Tensor) -> Tensor:
        return m if self.bug == "R15" else torch.where(m == -INF, 0.0, m)

    def statistics(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(max, Σ exp(z - max), Σ (z - max)), block by block; the last one is filled up with phantom classes."""
        n, k = z.shape
        m, s, d = z.new_full((n,), -INF), z.new_zeros(n), z.new_zeros(n)
        for begin in range(0, k, BLOCK):
            real = z[:, begin : begin + BLOCK]
            filled = torch.nn.functional.pad(real, (0, BLOCK - real.shape[1]), value=0.0 if self.bug == "R31" else -INF)
            m_block = filled.amax(1)
            m_new = torch.maximum(m, m_block)
            old, new = self.shift(m) - self.shift(m_new), self.shift(m_block) - self.shift(m_new)
            s = torch.where(m == -INF, s, s * old.exp()) if self.bug != "R15" else s * (m - m_new).exp()
            s = s + (filled - self.shift(m_block)[:, None]).exp().sum(1) * new.exp()
            d = d + begin * old + (real - self.shift(m_block)[:, None]).sum(1) + real.shape[1] * new
            m = m_new
        return m, s, d

    def gradient(self, logits: Tensor, row: tuple[Any, ...], zmax: Tensor, logsum: Tensor) -> Tensor:
        target, a, b, scale, ignored = row
        scale = torch.ones(1) if scale is None else scale[:1] if self.bug == "R3" else scale
        p = ((logits.to(zmax.dtype) - zmax[:, None]) - logsum[:, None]).exp()
        hot = torch.nn.functional.one_hot(target, logits.shape[1]) * a
        scale = scale.to(zmax.dtype)[:, None]
        if self.bug == "R1":
            return torch.where(ignored, 0.0, (scale * (p - b)).to(logits.dtype) - (scale * hot).to(logits.dtype))
        grad = scale * (p - (hot + b))
        counted = scale * b * (logits.shape[1] * p - 1) if self.bug == "R20" else 0.0
        return torch.where(ignored, counted, grad).to(logits.dtype)

    def row(self, logits: Tensor, *call: Any) -> tuple[Any, ...]:
        target, eps, eps_rows, scale, ignore = call
        e = (logits.new_tensor([eps], dtype=accumulate_dtype(logits.dtype)) if eps_rows is None else eps_rows)[:, None]
        ignored = target == ignore
        return torch.where(ignored, 0, target), *reference.weights(e, logits.shape[1]), scale, ignored[:, None]

    def forward(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *call, with_grad, with_stats = arguments
        row = self.row(logits, *call)
        target, a, b, _, ignored = row
        z = logits.to(accumulate_dtype(logits.dtype))
        zmax, s, d = self.statistics(z)
        logsum = s.log()
        a, b, ignored = (t.squeeze(1) for t in (a, b, ignored))
        z_y = z.gather(1, target[:, None])[:, 0]
        on, off = (torch.where(w == 0, 0.0, w * v) for w, v in ((a, z_y - zmax), (b, d)))
        loss = logsum - (on + off)
        if self.bug == "R27":
            loss = (zmax + logsum) - a * z_y - b * z.sum(1)
        loss = torch.where(ignored, b * logits.shape[1] * logsum - off if self.bug == "R20" else 0.0, loss)
        nll = torch.where(ignored, 0.0, logsum - (z_y - zmax))
        grad = self.gradient(logits, row, zmax, logsum) if with_grad else logits.new_empty(0)
        stats = (nll, z.argmax(1)) if with_stats else (nll[:0], target[:0])
        return loss, zmax, logsum, *stats, grad

    def forward_(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *call, with_stats = arguments
        *rows, grad = self.forward(logits, *call, True, with_stats)
        logits.copy_(grad)
        return tuple(rows)

    def backward(self, logits: Tensor, *arguments: Any) -> Tensor:
        *call, zmax, logsum = arguments
        return self.gradient(logits, self.row(logits, *call), zmax, logsum)

    def backward_(self, logits: Tensor, *arguments: Any) -> None:
        logits.copy_(self.backward(logits, *arguments))

    def scale_(self, grad: Tensor, scale: Tensor) -> None:
        grad.copy_(grad * scale)


def case(name: str, direction: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    (found,) = (c for c in CASES if c.name == name)
    return lambda: run_case(found.problem(dtype), "twin", direction)


PLACE = ("twin", "cpu")
CHECKS: dict[str, list[Callable[[], None]]] = {
    "R1": [case("sure of the target", d, torch.bfloat16) for d in ("rows", "mean", "inplace")]
    + [case("as sure as smoothing asks", "rows", torch.float16)],
    "R3": [case("uniform", "rows"), case("half the rows ignored", "mean"), case("epsilon per row", "inplace rows")],
    "R15": [case(f"one finite class, {n}", d) for n in ("middle", "last") for d in ("forward", "rows", "mean")],
    "R20": [lambda: check_r20(PLACE), case("half the rows ignored", "forward"), case("half the rows ignored", "rows")],
    "R27": [lambda: check_r27(PLACE, 1e4), *(case(f"shift {v}", "forward") for v in ("1e3", "1e4", "1e5", "-1e4"))],
    "R31": [case(n, d) for n in ("one above a tile", "smaller than a tile") for d in ("forward", "rows", "mean")],
}


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Register the twin with a bug as the backend "twin"."""

    def register(bug: str) -> None:
        twin = Twin(bug)
        kernels = ops.Kernels(*(getattr(twin, name) for name in ops.Kernels._fields))
        made = backends.Backend("twin", "", ("cpu",), FLOAT_DTYPES, backends.CORE, lambda: None, kernels)
        monkeypatch.setitem(backends.BACKENDS, "twin", made)
        backends._choose.cache_clear()

    return register


@pytest.mark.parametrize("bug", CHECKS)
def test_planted_bug_turns_the_suite_red(plant: Callable[[str], None], bug: str) -> None:
    for check in CHECKS[bug]:
        plant("")
        check()
        plant(bug)
        with pytest.raises(AssertionError):
            check()


def test_planted_r28_turns_the_suite_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor 1 + 2ζ·lse, right for p, on q too: the value is right and only the gradient is not."""
    sound = reference.row_loss

    def row_loss(z: Tensor, q: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        value, zmax, logsum = sound(z, q, z_loss)
        scaled = sound(z, q)[0] * (1 + 2 * z_loss * (zmax + logsum)).detach()
        return value.detach() + scaled - scaled.detach(), zmax, logsum

    (z_loss_case,) = (c for c in CASES if c.name == "z-loss")
    checks = [check_r28, lambda: run_case(z_loss_case.problem(torch.float32), "reference", "rows")]
    for check in checks:
        check()
    monkeypatch.setattr(reference, "row_loss", row_loss)
    for check in checks:
        with pytest.raises(AssertionError):
            check()


def test_planted_r33_turns_the_suite_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Σ q not reduced over the shards: each takes its own for the whole."""
    sound = reference.merge
    check_r33()
    monkeypatch.setattr(reference, "merge", lambda piece, other: (*sound(piece, other)[:3], piece[3]))
    with pytest.raises(AssertionError):
        check_r33()
