"""Arguments of PyTorch's cross_entropy in every shape."""

from __future__ import annotations

import torch
from torch import Tensor

K = 7


def arguments(shape: tuple[int, ...], kind: str, device: str) -> tuple[Tensor, Tensor]:
    """Logits of a shape whose class dimension holds K, and targets: indices with some ignored, or probabilities."""
    rng = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=rng) * 3
    if kind == "probabilities":
        target = torch.softmax(torch.randn(shape, generator=rng), 0 if len(shape) == 1 else 1)
    else:
        target = torch.randint(K, [s for i, s in enumerate(shape) if i != min(1, len(shape) - 1)], generator=rng)
        if kind == "some ignored" and target.dim():
            target.flatten()[::3] = -100
        if kind == "all ignored":
            target.fill_(-100)
    return x.to(device), target.to(device)


X, Y = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
