"""Operands and gradients of the linear losses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from cases import Place, upstream_for
from torch import Tensor

EPS = 0.1


def head_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """F.linear_cross_entropy, or the two functions that it stands for: it came with PyTorch 2.13."""
    if hasattr(F, "linear_cross_entropy"):
        loss: Tensor = F.linear_cross_entropy(hidden, weight, target, linear_bias=linear_bias, **options)
        return loss
    bias = None if linear_bias is None else linear_bias.flatten()
    logits = F.linear(hidden, weight.flatten(0, -2), bias).unflatten(-1, weight.shape[:-1])
    return F.cross_entropy(logits, target, **options)


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
