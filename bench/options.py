"""What options, probability targets and other layouts cost beside the plain smoothed loss; held against the reference.

Losses are sums, so that the gradient of a row depends on that row alone, and a few rows show the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk

from . import inputs as data
from .harness import Case, Inputs, Loss, Provider, Results, losing
from .logits import EAGER, KERNELS, copies

PLAIN = "plain"
CHECKED = 16  # rows
# Of a gradient over its largest entry; both sides work on the same values.
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
EAGER_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def ours(**options: Any) -> Loss:
    def loss(x: Tensor, y: Tensor, eps: float) -> Tensor:
        result = lsk.cross_entropy(x, y, reduction="sum", **{"label_smoothing": eps, **options})
        return result[0] if isinstance(result, tuple) else result

    return loss


def options_of(k: int, device: str) -> dict[str, dict[str, Any]]:
    rng = torch.Generator().manual_seed(1)
    weight = (torch.rand(k, generator=rng) + 0.5).to(device)
    prior = torch.rand(k, generator=rng).to(device)
    prior /= prior.sum()
    every = {"weight": weight, "smooth_over": "finite", "z_loss": 1e-4, "logit_scale": 0.7, "softcap": 30.0}
    return {
        PLAIN: {},
        "class weights": {"weight": weight},
        "prior": {"smoothing": prior},
        "z_loss": {"z_loss": 1e-4},
        "logit_scale": {"logit_scale": 0.7},
        "softcap": {"softcap": 30.0},
        "smooth_over='finite'": {"smooth_over": "finite"},
        "statistics": {"return_stats": True},
        "statistics and entropy": {"return_stats": "entropy"},
        "everything": {**every, "smoothing": prior},
    }


def largest_error(got: Tensor, expected: Tensor) -> dict[str, float]:
    return {"gradient": ((got.double() - expected).abs().max() / expected.abs().max()).item()}


@dataclass(frozen=True)
class Options:
    baseline: str = PLAIN

    def inputs(self, case: Case, seed: int) -> Inputs:
        rng = torch.Generator(case.device).manual_seed(seed)
        target = data.targets(case, rng)
        values = data.logits(case, target, rng)
        return Inputs((values.clone().requires_grad_(),), (values,), target)

    def providers(self, case: Case) -> list[Provider]:
        backend = KERNELS[case.device]
        named = options_of(case.k, case.device)
        result = [
            losing(name, ours(backend=backend, **options), case, exact=True, options=options)
            for name, options in named.items()
        ]
        rng = torch.Generator(case.device).manual_seed(2)
        soft = torch.randn(case.n, case.k, generator=rng, device=case.device).softmax(-1)
        for name, t in (("probabilities", soft), ("probabilities, bf16", soft.bfloat16())):
            loss = self._of_probabilities(t, ours(backend=backend))
            result.append(losing(name, loss, case, exact=True, options={"target": t}))
        return result + copies(case)

    @staticmethod
    def _of_probabilities(t: Tensor, loss: Loss) -> Loss:
        return lambda x, y, eps: loss(x, t, eps)

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        options = {k: v for k, v in provider.options.items() if k != "return_stats"}
        target = options.pop("target", inputs.target)[:CHECKED]
        x = inputs.originals[0][:CHECKED].double().requires_grad_()
        expected = torch.autograd.grad(ours(backend="reference", **options)(x, target, case.eps), x)[0]
        return largest_error(results[1][:CHECKED], expected)

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        return {"gradient": LIMITS[case.dtype]}


@dataclass(frozen=True)
class Layout:
    """(N / inner, K, inner) logits, as segmentation makes them: as they lie, after a copy, and PyTorch's."""

    inner: int
    baseline: str = "ours"

    def inputs(self, case: Case, seed: int) -> Inputs:
        flat = Options().inputs(case, seed)
        values = flat.originals[0].view(-1, self.inner, case.k).movedim(-1, 1).contiguous()
        return Inputs((values.clone().requires_grad_(),), (values,), flat.target.view(-1, self.inner))

    def providers(self, case: Case) -> list[Provider]:
        backend = KERNELS[case.device]
        last = ours(backend=backend, class_dim=-1)
        return [
            losing("ours", ours(backend=backend), case),
            losing("ours, copied to classes last", lambda x, y, e: last(x.movedim(1, -1).contiguous(), y, e), case),
            losing(EAGER, lambda x, y, e: F.cross_entropy(x, y, label_smoothing=e, reduction="sum"), case),
        ]

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        x = inputs.originals[0][:1].double().requires_grad_()
        expected = torch.autograd.grad(ours(backend="reference")(x, inputs.target[:1], case.eps), x)[0]
        return largest_error(results[1][:1], expected)

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        return {"gradient": (EAGER_LIMITS if provider.name == EAGER else LIMITS)[case.dtype]}
