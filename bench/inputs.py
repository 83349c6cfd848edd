"""The data of the cases: normal, or as a trained model meets it.

**Zipf**: classes as frequent as 1 / (rank + 10); rows peaked on their target by 0 to 12 nats over what its frequency
gives; and the first 40 % of every 64 rows ignored, as the prompts are in instruction tuning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .harness import IGNORED, Case


def log_frequencies(case: Case) -> Tensor:
    return -torch.log(torch.arange(case.k, device=case.device) + 10.0)


def targets(case: Case, rng: torch.Generator) -> Tensor:
    if case.data == "randn":
        return torch.randint(case.k, (case.n,), generator=rng, device=case.device)
    target = torch.multinomial(log_frequencies(case).exp(), case.n, replacement=True, generator=rng)
    target[torch.arange(case.n, device=case.device) % 64 < 26] = IGNORED
    return target


def logits(case: Case, target: Tensor, rng: torch.Generator) -> Tensor:
    values = torch.randn(case.n, case.k, generator=rng, device=case.device)
    if case.data == "randn":
        return values.mul_(2).to(case.dtype)
    values += log_frequencies(case)
    peaks = 12 * torch.rand(case.n, 1, generator=rng, device=case.device)
    return values.scatter_add_(1, target.clamp_min(0)[:, None], peaks).to(case.dtype)


def head(case: Case, target: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """(hidden, weight) whose product is such logits, of standard deviation 2 or 1."""
    hidden = torch.randn(case.n, case.d, generator=rng, device=case.device)
    weight = torch.randn(case.k, case.d, generator=rng, device=case.device).mul_(case.d**-0.5)
    if case.data == "randn":
        weight *= 2
    else:
        peaks = 12 * torch.rand(case.n, 1, generator=rng, device=case.device)
        hidden += peaks * weight[target.clamp_min(0)]  # a row of weight has a norm of about 1
        hidden[:, 0], weight[:, 0] = 1, log_frequencies(case)
    return hidden.to(case.dtype), weight.to(case.dtype)
