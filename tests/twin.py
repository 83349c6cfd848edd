"""The row operators of ``labelsmooth_kernels.ops`` in a few lines of PyTorch, in blocks, with planted bugs on demand.

``bug`` is the number of the failure that it is planted for; "" is sound. Only the lines that name a bug differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from labelsmooth_kernels import backends, ops
from labelsmooth_kernels.spec import FLOAT_DTYPES, accumulate_dtype

if TYPE_CHECKING:
    import pytest

BLOCK = 512
INF = torch.inf
BUGS = ("R1", "R3", "R15", "R16", "R20", "R27", "R28", "R31", "R38")


class Call(NamedTuple):
    """The arguments of an operator between its logits and what is its own, by the names of the schema."""

    target: Tensor
    weight: Tensor | None
    prior: Tensor | None
    eps: float
    eps_rows: Tensor | None
    row_scale: Tensor | None
    ignore_index: int
    others: bool
    finite: bool
    z_loss: float
    confidence_penalty: float
    logit_scale: float
    softcap: float | None


class Row(NamedTuple):
    """Transformed logits, one-hot or given targets, weights, and which rows are ignored or out of range."""

    z: Tensor
    t: Tensor
    w: Tensor
    u: Tensor
    eps: Tensor
    ignored: Tensor
    invalid: Tensor


def column(value: Tensor | None, default: float, like: Tensor) -> Tensor:
    value = like.new_full((1,), default) if value is None else value
    return value.to(like.dtype).expand(len(like))[:, None]


class Twin:
    def __init__(self, bug: str = "") -> None:
        self.bug = bug

    def kernels(self) -> ops.Kernels:
        return ops.Kernels(*(getattr(self, name) for name in ops.Kernels._fields))

    def rows(self, logits: Tensor, call: Call) -> Row:
        x = logits.flatten(0, -2)
        z = x.to(accumulate_dtype(x.dtype)) * call.logit_scale
        if call.softcap is not None:
            z = torch.where(z == -INF, z, call.softcap * torch.tanh(z / call.softcap))
        k = z.shape[1]
        never = torch.zeros(len(z), dtype=torch.bool, device=z.device)
        if call.target.is_floating_point():
            t, ignored, invalid = call.target.flatten(0, -2).to(z.dtype), never, never
        else:
            ignored = call.target == call.ignore_index
            invalid = ~ignored & ((call.target < 0) | (call.target >= k))
            hot = torch.where(ignored | invalid, 0, call.target)
            t = torch.nn.functional.one_hot(hot, k).to(z.dtype)
        w, u = (z.new_ones(k) if v is None else v.to(z.dtype) for v in (call.weight, call.prior))
        eps = column(call.eps_rows, call.eps, z)
        return Row(z, t, w, u, eps, ignored[:, None], invalid[:, None])

    def shift(self, m: Tensor) -> Tensor:
        return m if self.bug == "R15" else torch.where(m == -INF, 0.0, m)

    def max_and_sum(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(max, Σ exp(z - max)), block by block; the last one is filled up with phantom classes."""
        n, k = z.shape
        m, s = z.new_full((n, 1), -INF), z.new_zeros(n, 1)
        for begin in range(0, k, BLOCK):
            real = z[:, begin : begin + BLOCK]
            filled = torch.nn.functional.pad(real, (0, BLOCK - real.shape[1]), value=0.0 if self.bug == "R31" else -INF)
            m_block = filled.amax(1, keepdim=True)
            m_new = torch.maximum(m, m_block)
            old, new = self.shift(m) - self.shift(m_new), self.shift(m_block) - self.shift(m_new)
            s = torch.where(m == -INF, s, s * old.exp()) if self.bug != "R15" else s * (m - m_new).exp()
            here = (filled - self.shift(m_block)).exp().sum(1, keepdim=True)
            s = s + torch.where((m_block == -INF) & (here == 0), 0.0, here * new.exp())
            m = m_new
        return m, s

    def target_weights(self, row: Row, call: Call) -> tuple[Tensor, Tensor]:
        """(q, n)."""
        covered = (row.z > -INF) if call.finite and self.bug != "R16" else torch.ones_like(row.z, dtype=torch.bool)
        n = torch.where(covered, row.u, 0.0).sum(1, keepdim=True)
        if call.prior is not None and not call.finite:
            n = torch.ones_like(n)
        e = torch.where(n > 1, row.eps * n / (n - 1), 0.0) if call.others else row.eps
        rest = torch.where(n > 0, e / n, 0.0) * torch.where(covered, row.u, 0.0)
        return row.w * ((1 - e) * row.t + rest), n

    def gradient(self, logits: Tensor, call: Call, q: Tensor, saved: Tensor, row: Row) -> Tensor:
        zmax, logsum, mass, _ = saved[:, :, None]
        log_p = (row.z - zmax) - logsum
        p = log_p.exp()
        scale = column(call.row_scale, 1.0, row.z)
        scale = (scale[:1] if self.bug == "R3" else scale) * call.logit_scale
        if call.softcap is not None:
            v = logits.reshape(row.z.shape).to(row.z.dtype) * call.logit_scale / call.softcap
            scale = scale * torch.where(row.z == -INF, 1.0, torch.cosh(v).square().reciprocal())
        more = 2 * call.z_loss * (zmax + logsum)
        mass = torch.ones_like(mass) if self.bug == "R38" else mass
        q = q * (1 + more) if self.bug == "R28" else q
        more = more + call.confidence_penalty * torch.where(p == 0, 0.0, log_p)
        if self.bug == "R1":
            grad = (scale * ((mass + more) * p)).to(logits.dtype) - (scale * q).to(logits.dtype)
        else:
            grad = scale * ((mass + more) * p - q)
        counted = q * row.t.shape[1] * p if self.bug == "R20" else 0.0
        grad = torch.where(row.invalid, torch.nan, torch.where(row.ignored, counted, grad))
        return torch.empty_like(logits).copy_(grad.view(logits.shape))

    def forward(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *given, with_grad, n_stats = arguments
        call = Call(*given)
        row = self.rows(logits, call)
        zmax, s = self.max_and_sum(row.z)
        logsum = s.log()
        q, n = self.target_weights(row, call)
        plain = call.weight is None and call.prior is None and not call.target.is_floating_point()
        mass = torch.ones_like(logsum) if plain else q.sum(1, keepdim=True)

        def dot(weights: Tensor) -> Tensor:
            absent = (weights == 0) & (row.z == -INF)
            return torch.where(absent, 0.0, weights * (row.z - zmax)).sum(1, keepdim=True)

        loss = mass * logsum - dot(q)
        if self.bug == "R27":
            loss = mass * (zmax + logsum) - (q * row.z).sum(1, keepdim=True)
        loss = loss + call.z_loss * (zmax + logsum).square()
        counted = q.mean(1, keepdim=True) if self.bug == "R20" else 0.0
        loss = torch.where(row.invalid, torch.nan, torch.where(row.ignored, counted, loss))
        nll = row.t.sum(1, keepdim=True) * logsum - dot(row.t)
        nll = torch.where(row.invalid, torch.nan, torch.where(row.ignored, 0.0, nll))
        p = ((row.z - zmax) - logsum).exp()
        entropy = logsum - dot(p)
        loss = torch.where(row.ignored, loss, loss - call.confidence_penalty * entropy)
        saved = torch.cat([zmax, logsum, mass + call.confidence_penalty * entropy, n], 1).T.contiguous()
        off = torch.where(p == 0, 0.0, (row.z - zmax) - (logsum - entropy))
        spread = [(p * off.square()).sum(1, keepdim=True), p.square().sum(1, keepdim=True)]
        stats = torch.cat([nll, entropy, *spread], 1).T[:n_stats].contiguous()
        prediction = row.z.argmax(1)[: len(row.z) if n_stats else 0]
        grad = self.gradient(logits, call, q, saved, row) if with_grad else logits.new_empty(0)
        saved = saved if n_stats else torch.where(row.ignored[:, 0], 0.0, saved)
        return loss[:, 0], saved, stats, prediction, grad

    def forward_(self, logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *call, n_stats = arguments
        *rows, grad = self.forward(logits, *call, True, n_stats)
        logits.copy_(grad)
        return tuple(rows)

    def backward(self, logits: Tensor, *arguments: Any) -> Tensor:
        *given, saved = arguments
        call = Call(*given)
        row = self.rows(logits, call)
        return self.gradient(logits, call, self.target_weights(row, call)[0], saved, row)

    def backward_(self, logits: Tensor, *arguments: Any) -> None:
        logits.copy_(self.backward(logits, *arguments))

    def target_grad(self, logits: Tensor, *arguments: Any) -> Tensor:
        *given, saved = arguments
        call = Call(*given)
        row = self.rows(logits, call)
        q, n = self.target_weights(row, call)
        zmax, logsum, _, _ = saved[:, :, None]
        e = torch.where(n > 1, row.eps * n / (n - 1), 0.0) if call.others else row.eps
        down = torch.where((q == 0) & (row.z == -INF), 0.0, row.z - zmax)
        grad = column(call.row_scale, 1.0, row.z) * (1 - e) * row.w * (logsum - down)
        return torch.empty_like(call.target).copy_(grad.view(call.target.shape))

    def scale_(self, grad: Tensor, scale: Tensor) -> None:
        grad.copy_(grad * scale)


def plant(monkeypatch: pytest.MonkeyPatch, bug: str) -> None:
    """Register the twin with a bug as the backend "twin"."""
    kernels = Twin(bug).kernels()
    made = backends.Backend("twin", "", ("cpu",), FLOAT_DTYPES, backends.EVERY_OPTION, lambda: None, kernels)
    monkeypatch.setitem(backends.BACKENDS, "twin", made)
    backends._choose.cache_clear()
