"""The loss of given logits: ours, PyTorch's, the peers' and a copy; held against the closed form in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

from . import inputs as data
from . import peers
from .harness import IGNORED, Case, Inputs, Loss, Provider, Results, losing

if TYPE_CHECKING:
    from collections.abc import Callable

OURS, INPLACE, CUDA, NO_SMOOTHING = "ours", "ours, in place", "ours, CUDA C++", "ours, ε = 0"
REFERENCE = "ours, plain PyTorch"
EAGER, COMPILED = "F.cross_entropy", "torch.compile of it"
FRESH_COPY, COPY = "allocate and copy", "copy into existing memory"
KERNELS = {"cpu": "cpu", "cuda": "triton"}  # named, since a fall to the reference must not be timed under our name

# Largest (loss, target, rest). A provider whose log-probabilities of -8 to -24 are rounded to 8, 11 or 24 bits has that
# error times their size in p; one that works in float32 rounds the gradient once.
LIMITS = {
    torch.float32: (1e-5, 1e-4, 1e-3),
    torch.float16: (2**-10, 2**-9, 2**-6),
    torch.bfloat16: (2**-7, 2**-6, 2**-3),
}
EXACT_LIMITS = {
    torch.float32: (2e-6, 2e-6, 1e-5),
    torch.float16: (2e-6, 1.01 * 2**-11, 1.01 * 2**-11),
    torch.bfloat16: (2e-6, 1.01 * 2**-8, 1.01 * 2**-8),
}
SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 0.0, torch.float32: 0.0}  # half of it is lost in rounding


def eager(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return F.cross_entropy(x, y, label_smoothing=eps)


def compiled() -> Loss:
    torch.compiler.reset()  # a function compiled for one case would be generalised to dynamic shapes in the next
    function: Loss = torch.compile(eager, dynamic=False, fullgraph=True)
    return function


def ours(**options: Any) -> Loss:
    def loss(x: Tensor, y: Tensor, eps: float) -> Tensor:
        result = lsk.cross_entropy(x, y, **{"label_smoothing": eps, **options})
        return result[0] if isinstance(result, tuple) else result

    return loss


def copy_fresh(inputs: Inputs) -> Results:
    return (torch.empty_like(inputs.originals[0]).copy_(inputs.originals[0]),)


def copy_existing() -> Callable[[Inputs], Results]:
    memory: list[Tensor] = []

    def step(inputs: Inputs) -> Results:
        if not memory:
            memory.append(torch.empty_like(inputs.originals[0]))
        return (memory[0].copy_(inputs.originals[0]),)

    return step


def copies(case: Case) -> list[Provider]:
    """The ceilings; on a GPU the caching allocator makes the first one no different from the second."""
    names = {COPY: copy_existing()} | ({FRESH_COPY: copy_fresh} if case.device == "cpu" else {})
    return [Provider(name, step, work=2 * case.logits_bytes) for name, step in names.items()]


@dataclass(frozen=True)
class Logits:
    """``with_compile``: torch.compile takes up to 20 seconds of a CPU for every case. ``with_peers``: on a GPU.
    ``with_reference``: what serves where there is no compiler and no Triton."""

    with_compile: bool = True
    with_peers: bool = True
    with_reference: bool = False
    interpreted: bool = False
    baseline: str = OURS

    def inputs(self, case: Case, seed: int) -> Inputs:
        rng = torch.Generator(case.device).manual_seed(seed)
        target = data.targets(case, rng)
        values = data.logits(case, target, rng)
        return Inputs((values.clone().requires_grad_(case.backward),), (values,), target)

    def providers(self, case: Case) -> list[Provider]:
        backend = KERNELS[case.device]
        result = [losing(OURS, ours(backend=backend), case, exact=True)]
        if case.backward:
            result.append(losing(INPLACE, ours(backend=backend, inplace=True), case, exact=True, overwrites=True))
        if case.eps:
            result.append(losing(NO_SMOOTHING, ours(backend=backend), case, exact=True, eps=0.0))
        if case.device == "cuda" and backends.BACKENDS["cuda"].unavailable() is None:
            result.append(losing(CUDA, ours(backend="cuda"), case, exact=True))
        if self.with_reference:
            result.append(losing(REFERENCE, ours(backend="reference"), case, exact=True))
        result.append(losing(EAGER, eager, case))
        if self.with_compile:
            result.append(losing(COMPILED, compiled(), case))
        if self.with_peers:
            result += peers.providers(peers.AT_LOGITS, case, interpreted=self.interpreted)
        return result + copies(case)

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        return smoothed_errors(inputs, case.eps if provider.eps is None else provider.eps, *results)

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        limits = (EXACT_LIMITS if provider.exact else LIMITS)[case.dtype]
        return dict(zip(("loss", "target", "rest"), limits, strict=True))


@dataclass(frozen=True)
class Few(Logits):
    """Rows of few classes, one behind the other or side by side, beside PyTorch's loss alone."""

    baseline: str = EAGER

    def inputs(self, case: Case, seed: int) -> Inputs:
        flat = super().inputs(case, seed)
        if not case.inner:
            return flat
        values = flat.originals[0].view(-1, case.inner, case.k).transpose(1, 2).contiguous()
        return Inputs((values.clone().requires_grad_(case.backward),), (values,), flat.target.view(-1, case.inner))

    def providers(self, case: Case) -> list[Provider]:
        return [
            losing(OURS, ours(backend=KERNELS[case.device]), case, exact=True),
            losing(EAGER, eager, case),
        ]

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        rows, grad = (t.movedim(1, -1).reshape(-1, case.k) for t in (inputs.originals[0], results[1]))
        return smoothed_errors(
            Inputs((), (rows,), inputs.target.flatten(), inputs.expected), case.eps, results[0], grad
        )


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows, so few that their float64 copies stay in a CPU's caches, or small beside a GPU's memory."""
    n, k = x.shape
    return torch.arange(n, device=x.device).split(max(1, (2**25 if x.is_cuda else 2**18) // k))


def row_sums(inputs: Inputs, eps: float) -> tuple[float, Tensor]:
    """(the loss, lse of every row) in float64."""
    (x,) = inputs.originals
    lses, total = [], 0.0
    for rows in chunks(x):
        z, y = x[rows].double(), inputs.target[rows]
        lse = z.logsumexp(-1)
        losses = lse - (1 - eps) * z.gather(-1, y.clamp_min(0)[:, None])[:, 0] - eps * z.mean(-1)
        total += losses[y != IGNORED].sum().item()
        lses.append(lse)
    return total / int((inputs.target != IGNORED).sum()), torch.cat(lses)


def smoothed_errors(inputs: Inputs, eps: float, loss: Tensor, grad: Tensor | None = None) -> dict[str, float]:
    """Largest deviations from float64: of the loss, relative; of the gradient's entries p - q, relative to p + q.

    ``rest`` is the other classes': where p is small, a smoothing that was lost shows there as 1. The gradient of an
    ignored row is 0, and anything else infinitely wrong.
    """
    if eps not in inputs.expected:
        inputs.expected[eps] = row_sums(inputs, eps)
    expected, lses = inputs.expected[eps]
    errors = {"loss": abs(loss.double().item() / expected - 1)}
    if grad is None:
        return errors
    (x,) = inputs.originals
    k = x.shape[1]
    valid, worst = int((inputs.target != IGNORED).sum()), torch.zeros(2, dtype=torch.float64, device=x.device)
    for rows in chunks(x):
        y, got = inputs.target[rows], grad[rows].double()
        if got[y == IGNORED].any():
            worst += torch.inf
        rows, y, got = rows[y != IGNORED], y[y != IGNORED, None], got[y != IGNORED]
        if not len(rows):
            continue
        p = (x[rows].double() - lses[rows, None]).exp_()
        q = torch.full_like(p, eps / k).scatter_add_(-1, y, torch.full_like(y, 1 - eps, dtype=p.dtype))
        off = got.mul_(valid).sub_(p).add_(q).abs_()
        off = off.sub_(0.5 * SMALLEST[grad.dtype] * valid).clamp_min_(0).div_(p.add_(q))
        worst = torch.maximum(worst, torch.stack((off.gather(-1, y).max(), off.scatter_(-1, y, 0).max())))
    return errors | {"target": worst[0].item(), "rest": worst[1].item()}
