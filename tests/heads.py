"""Operands and gradients of the linear losses."""

from __future__ import annotations

import torch
from cases import Place, upstream_for
from torch import Tensor

EPS = 0.1


def operands(n: int, d: int, k: int, place: Place, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden, linear_weight, linear_bias and targets, every fourth one ignored."""
    rng = torch.Generator().manual_seed(n * k + d)
    hidden, weight, bias = (torch.randn(s, generator=rng) for s in ((n, d), (k, d), (k,)))
    target = torch.randint(k, (n,), generator=rng)
    target[::4] = -100
    leaves = [t.to(place[1], dtype).requires_grad_() for t in (hidden, weight * 2 * d**-0.5, bias)]
    return [*leaves, target.to(place[1])]


def grads_of(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = upstream_for(loss.numel(), loss.device, loss.dtype).reshape(loss.shape)
    return list(torch.autograd.grad(loss, leaves, upstream))
