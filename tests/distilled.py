"""Students, teachers and the float64 oracle of distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from rule import few_ulps, ulp
from torch import Tensor

N, K = 6, 37


def draw(dtype: torch.dtype = torch.float32, n: int = N, k: int = K, ignored: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n * k)
    x, t = ((torch.randn(n, k, generator=rng, dtype=torch.float64) * 3).to(dtype) for _ in range(2))
    y = torch.randint(k, (n,), generator=rng)
    if ignored:
        y[ignored - 1 :: ignored] = -100
    return x, t, y


def oracle(x: Tensor, t: Tensor, y: Tensor, alpha: float = 0.5, temperature: float = 1.0, **options: Any) -> Tensor:
    """The loss of every row by its definition, in float64."""
    x, t = x.double(), t.double()
    p_t = (t / temperature).softmax(-1)
    log_ratio = (t / temperature).log_softmax(-1) - (x / temperature).log_softmax(-1)
    divergence = torch.where(p_t == 0, 0.0, p_t * log_ratio).sum(-1)
    smoothing, eps = options.get("smoothing", "uniform"), options.get("label_smoothing", 0.0)
    eps = eps.double()[:, None] if isinstance(eps, Tensor) else eps
    hot, k = F.one_hot(y.clamp_min(0), x.shape[1]).double(), x.shape[1]
    rest = (1 - hot) / (k - 1) if isinstance(smoothing, str) and smoothing == "others" else torch.ones_like(hot) / k
    q = (1 - eps) * hot + eps * (smoothing.double() if isinstance(smoothing, Tensor) else rest)
    hard = -torch.where(q == 0, 0.0, q * x.log_softmax(-1)).sum(-1)
    return torch.where(y != -100, alpha * temperature**2 * divergence + (1 - alpha) * hard, 0.0)


def judge(x: Tensor, t: Tensor, y: Tensor, got: Tensor, grad: Tensor, factors: Tensor, cut: bool, **mix: Any) -> None:
    """Rows of the loss and entries of Σ factor·loss's gradient, within few ulps of the terms that are added."""
    leaf = x.detach().double().requires_grad_()
    want = oracle(leaf, t, y, **mix)
    (want_grad,) = torch.autograd.grad(want, leaf, factors.double())
    alpha, T, few = mix.get("alpha", 0.5), mix.get("temperature", 1.0), few_ulps(got.dtype, x.shape[1])
    size = torch.maximum(x.double().abs().amax(-1), t.double().abs().amax(-1))
    assert ((got.double() - want).abs() <= 3 * few * (alpha * T**2 * (1 + size / T) + (1 - alpha) * (1 + size))).all()
    p, p_t, p_1 = (v.double().softmax(-1) for v in (x / T, t / T, x))
    terms = alpha * T * (p + p_t) * (1 + size / T)[:, None] + (1 - alpha) * (p_1 * (1 + size[:, None]) + 1)
    allowed = 3 * few * factors.double().abs()[:, None] * terms
    if x.dtype in (torch.float16, torch.bfloat16):
        allowed = allowed + ulp(want_grad, x.dtype) * (2 if cut else 1)
    assert ((grad.double() - want_grad).abs() <= allowed).all()
    assert not grad[y == -100].any()
