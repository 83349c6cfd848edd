"""The loss of a linear head: ours, PyTorch's and the peers', beside three bare GEMMs; held against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk

from . import inputs as data
from . import peers
from .harness import IGNORED, Case, Inputs, Loss, Provider, Results, losing

GEMMS, OURS, TILED = "the head's GEMMs", "ours", "ours, tiled"
HAS_HEAD_LOSS = hasattr(F, "linear_cross_entropy")  # from PyTorch 2.13 on
EAGER = "F.linear_cross_entropy" if HAS_HEAD_LOSS else "F.linear, then F.cross_entropy"
NO_SMOOTHING, PRIOR, CHUNKED = "ours, ε = 0", "ours, prior", "F.linear_cross_entropy, chunked"
UNFUSED, COMPILED = "F.linear, then ours in place", "torch.compile of F.linear and F.cross_entropy"

# ‖gradient - expected‖ / ‖expected‖, and the loss's relative error. A provider that rounds logits of standard
# deviation 2 to 8 or 11 bits and p once more is off by some 2⁻⁸ or 2⁻¹¹; a smoothing that is lost, by 1e-1. Ours makes
# the loss in float32; PyTorch's chunks add theirs up in bfloat16.
LIMITS = {torch.float32: 2e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EXACT_LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
EXACT_LOSS = {torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 1e-3}


def ours(**options: Any) -> Loss:
    return lambda h, w, y, eps: lsk.linear_cross_entropy(h, w, y, **{"label_smoothing": eps, **options})


def eager(h: Tensor, w: Tensor, y: Tensor, eps: float) -> Tensor:
    if HAS_HEAD_LOSS:
        return F.linear_cross_entropy(h, w, y, label_smoothing=eps)
    return F.cross_entropy(F.linear(h, w), y, label_smoothing=eps)


def chunked(h: Tensor, w: Tensor, y: Tensor, eps: float) -> Tensor:
    return F.linear_cross_entropy(h, w, y, options=torch.nn.LinearCrossEntropyOptions())


def unfused(h: Tensor, w: Tensor, y: Tensor, eps: float) -> Tensor:
    result = lsk.cross_entropy(F.linear(h, w), y, label_smoothing=eps, inplace=True)
    assert isinstance(result, Tensor)
    return result


def compiled() -> Loss:
    torch.compiler.reset()
    both: Loss = lambda h, w, y, eps: F.cross_entropy(F.linear(h, w), y, label_smoothing=eps)  # noqa: E731
    function: Loss = torch.compile(both, dynamic=False, fullgraph=True)
    return function


def gemms(inputs: Inputs) -> Results:
    hidden, weight = inputs.originals
    logits = hidden @ weight.t()
    if not inputs.leaves[0].requires_grad:
        return (logits,)
    return logits @ weight, logits.t() @ hidden


@dataclass(frozen=True)
class Linear:
    """``own``: only our own variants, whose small differences need many rounds and no large neighbours.

    ``with_chunks``: PyTorch's chunks take time by K alone: on two CPU cores 19 seconds at K = 128,256 for any N.
    ``chunk_rows``: the sizes of our chunks that a GPU is also given, beside the one we choose.
    """

    with_peers: bool = True
    with_compile: bool = False
    with_chunks: bool = True
    interpreted: bool = False
    own: bool = False
    chunk_rows: tuple[int, ...] = (1024, 4096, 8192)
    tiled: bool = True
    baseline: str = OURS

    def inputs(self, case: Case, seed: int) -> Inputs:
        rng = torch.Generator(case.device).manual_seed(seed)
        target = data.targets(case, rng)
        values = data.head(case, target, rng)
        return Inputs(tuple(v.clone().requires_grad_(case.backward) for v in values), values, target)

    def providers(self, case: Case) -> list[Provider]:
        prior = torch.softmax(data.log_frequencies(case), 0)
        own = [
            losing(OURS, ours(), case, exact=True),
            losing(NO_SMOOTHING, ours(), case, exact=True, eps=0.0),
            losing(PRIOR, ours(smoothing=prior), case, exact=True, options={"prior": prior}),
        ]
        if self.own:
            return own
        result = [*own[:1], losing(UNFUSED, unfused, case, exact=True), losing(EAGER, eager, case)]
        if case.device == "cuda":
            result += [losing(f"ours, chunks of {m}", ours(chunk_rows=m), case, exact=True) for m in self.chunk_rows]
            if self.tiled:
                result.append(losing(TILED, ours(method="tiled"), case, exact=True))
        if self.with_chunks and HAS_HEAD_LOSS:
            result.append(losing(CHUNKED, chunked, case, **peers.CANNOT_SMOOTH))
        if self.with_compile:
            result.append(losing(COMPILED, compiled(), case))
        if self.with_peers:
            result += peers.providers(peers.FUSED, case, interpreted=self.interpreted)
        return [*result, Provider(GEMMS, gemms, work=case.flops)]

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        return head_errors(inputs, case.eps if provider.eps is None else provider.eps, results, **provider.options)

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        limit = (EXACT_LIMITS if provider.exact else LIMITS)[case.dtype]
        loss = EXACT_LOSS[case.dtype] if provider.exact else 2 * limit
        return {"loss": loss, "gradient of hidden": limit, "gradient of weight": limit}


def expected_results(inputs: Inputs, eps: float, prior: Tensor | None) -> Results:
    """(loss, gradients) in float64, in chunks of rows."""
    hidden, weight = (t.double() for t in inputs.originals)
    k, valid = len(weight), inputs.target != IGNORED
    r = torch.full((k,), 1 / k, dtype=hidden.dtype, device=hidden.device) if prior is None else prior.double()
    loss, dh, dw = hidden.new_zeros(()), torch.zeros_like(hidden), torch.zeros_like(weight)
    for rows in valid.nonzero()[:, 0].split(max(1, 2**24 // k)):
        h, y = hidden[rows], inputs.target[rows, None]
        z = h @ weight.t()
        lse = z.logsumexp(-1, keepdim=True)
        loss += (lse - (1 - eps) * z.gather(-1, y) - eps * (z @ r)[:, None]).sum()
        dz = z.sub_(lse).exp_().sub_(r, alpha=eps).scatter_add_(-1, y, torch.full_like(lse, eps - 1))
        dh[rows] = dz @ weight
        dw.addmm_(dz.t(), h)
    return tuple(t / valid.sum() for t in (loss, dh, dw))


def head_errors(inputs: Inputs, eps: float, results: Results, prior: Tensor | None = None) -> dict[str, float]:
    key = eps if prior is None else -eps
    if key not in inputs.expected:
        inputs.expected[key] = expected_results(inputs, eps, prior)
    names = ("loss", "gradient of hidden", "gradient of weight")
    pairs = zip(names, results, inputs.expected[key], strict=False)  # the loss alone, where nothing else is asked
    return {name: ((got.double() - e).norm() / e.norm()).item() for name, got, e in pairs}
