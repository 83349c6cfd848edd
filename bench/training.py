"""Whole uses of the loss: distillation at the logits, a training step of a small transformer, recompilations."""

from __future__ import annotations

import contextlib
import copy
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labelsmooth_kernels as lsk

from . import inputs as data
from . import peers
from .harness import IGNORED, Case, Inputs, Provider, Results, Row, losing, reason
from .logits import COMPILED, KERNELS, copies, eager

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "ours"
RECOMPILATIONS = "recompilations"
TEMPERED, COMPOSED = "distillation at a temperature", "F.kl_div and F.cross_entropy"
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # ‖gradient - expected‖ / ‖expected‖


def distance(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """‖got - expected‖ / ‖expected‖ over all tensors together."""
    off = sum((a.double() - b).square().sum().item() for a, b in zip(got, expected, strict=True))
    return float((off / sum(b.square().sum().item() for b in expected)) ** 0.5)


@dataclass(frozen=True)
class Distillation:
    """Student logits against a teacher's probabilities, without smoothing: Σ t·(log t − log p) up to a constant."""

    baseline: str = OURS

    def inputs(self, case: Case, seed: int) -> Inputs:
        rng = torch.Generator(case.device).manual_seed(seed)
        student, teacher = (data.logits(case, data.targets(case, rng), rng) for _ in range(2))
        return Inputs((student.clone().requires_grad_(),), (student,), teacher.softmax(-1))

    def providers(self, case: Case) -> list[Provider]:
        def ours(inplace: bool) -> Callable[..., Any]:
            return lambda x, t, eps: lsk.cross_entropy(x, t, inplace=inplace, backend=KERNELS[case.device])

        def divergence(x: Tensor, t: Tensor, eps: float) -> Tensor:
            return F.kl_div(F.log_softmax(x, -1), t, reduction="batchmean")

        return [
            losing(OURS, ours(False), case),
            losing("ours, in place", ours(True), case, overwrites=True),
            losing("F.cross_entropy", eager, case),
            losing("F.kl_div of F.log_softmax", divergence, case),
            *copies(case),
        ]

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        t = inputs.target.double()
        p = inputs.originals[0].double().softmax(-1)
        return {"gradient": distance(results[1:], ((p * t.sum(-1, keepdim=True) - t) / case.n,))}

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        return {"gradient": LIMITS[case.dtype]}


@dataclass(frozen=True)
class Tempered:
    """Student logits against a teacher's logits at a temperature, and the smoothed loss of the targets."""

    with_compile: bool = True
    baseline: str = OURS
    temperature: float = 2.0
    alpha: float = 0.5

    def inputs(self, case: Case, seed: int) -> Inputs:
        rng = torch.Generator(case.device).manual_seed(seed)
        y = data.targets(case, rng)
        student, teacher = (data.logits(case, y, rng) for _ in range(2))
        return Inputs((student.clone().requires_grad_(),), (student,), (teacher, y))

    def composed(self, x: Tensor, target: tuple[Tensor, Tensor], eps: float) -> Tensor:
        teacher, y = target
        log_p, p_t = F.log_softmax(x / self.temperature, -1), F.softmax(teacher / self.temperature, -1)
        divergence = F.kl_div(log_p, p_t, reduction="batchmean")
        hard = F.cross_entropy(x, y, label_smoothing=eps)
        return self.alpha * self.temperature**2 * divergence + (1 - self.alpha) * hard

    def providers(self, case: Case) -> list[Provider]:
        def ours(x: Tensor, target: tuple[Tensor, Tensor], eps: float) -> Tensor:
            mix: dict[str, Any] = {"temperature": self.temperature, "alpha": self.alpha, "label_smoothing": eps}
            return lsk.distillation.distillation_loss(x, *target, **mix)

        found = [losing(OURS, ours, case), losing(COMPOSED, self.composed, case), *copies(case)]
        if self.with_compile:
            torch.compiler.reset()
            found.insert(2, losing(COMPILED, torch.compile(self.composed, dynamic=False), case))
        return found

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        teacher, y = inputs.target
        x = inputs.originals[0].double().requires_grad_()
        return {
            "gradient": distance(results[1:], torch.autograd.grad(self.composed(x, (teacher.double(), y), case.eps), x))
        }

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        return {"gradient": LIMITS[case.dtype]}


class Transformer(nn.Module):
    """Two causal layers and a tied head, in which a large vocabulary weighs as it does in small language models."""

    def __init__(self, k: int, d: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(k, d)
        nn.init.normal_(self.embedding.weight, std=d**-0.5)
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, words: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1], words.device, self.embedding.weight.dtype)
        hidden: Tensor = self.layers(self.embedding(words), mask=mask, is_causal=True)
        return hidden.flatten(0, 1)


@dataclass(frozen=True)
class TrainingStep:
    """Forward, backward and AdamW, whose learning rate of 0 leaves every provider the same parameters."""

    length: int = 128
    baseline: str = OURS

    def inputs(self, case: Case, seed: int) -> Inputs:
        torch.manual_seed(seed)
        model = Transformer(case.k, case.d).to(case.device, case.dtype)
        words = torch.randint(case.k, (case.n // self.length, self.length + 1), device=case.device)
        leaves = tuple(model.parameters())
        optimizer = torch.optim.AdamW(leaves, lr=0.0)
        return Inputs(leaves, tuple(leaf.detach().clone() for leaf in leaves), (model, optimizer, words))

    def providers(self, case: Case) -> list[Provider]:
        def at_logits(loss: Callable[..., Any]) -> Callable[..., Any]:
            return lambda h, w, y: loss(F.linear(h, w), y, label_smoothing=case.eps)

        losses = {
            OURS: lambda h, w, y: lsk.linear_cross_entropy(h, w, y, label_smoothing=case.eps),
            "ours on logits": at_logits(lsk.cross_entropy),
            "F.cross_entropy": at_logits(F.cross_entropy),
        }
        return [Provider(name, self._step(loss)) for name, loss in losses.items()]

    @staticmethod
    def _step(loss: Callable[..., Tensor]) -> Callable[[Inputs], Results]:
        def step(inputs: Inputs) -> Results:
            model, optimizer, words = inputs.target
            optimizer.zero_grad(set_to_none=True)
            value = loss(model(words[:, :-1]), model.embedding.weight, words[:, 1:].flatten())
            value.backward()
            optimizer.step()
            return value.detach(), *(leaf.grad for leaf in inputs.leaves)

        return step

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        if not inputs.expected:
            model, _, words = inputs.target
            exact = copy.deepcopy(model).double()
            value = eager(F.linear(exact(words[:, :-1]), exact.embedding.weight), words[:, 1:].flatten(), case.eps)
            inputs.expected[case.eps] = torch.autograd.grad(value, tuple(exact.parameters()))
        return {"gradient": distance(results[1:], inputs.expected[case.eps])}

    def limits(self, case: Case, provider: Provider) -> dict[str, float]:
        return {"gradient": LIMITS[case.dtype]}


Calls = list[tuple[int, Any, int]]  # (N, ε, ignored rows)


def recompilations(device: str) -> list[Row]:
    """How often a loss is compiled while a training loop changes what such loops change: the graphs of torch.compile
    and, on a GPU, the Triton kernels of a loss called without it."""
    changes: dict[str, Calls] = {
        "ε as a schedule, a tensor": [(64, torch.tensor(0.01 * i, device=device), 0) for i in range(8)],
        "ε as a schedule, a number": [(64, 0.01 * i, 0) for i in range(1, 9)],
        "N": [(64 + i, 0.1, 0) for i in range(8)],
        "ignored rows": [(64, 0.1, i) for i in range(8)],
    }
    losses = {"F.cross_entropy": F.cross_entropy, OURS: lsk.cross_entropy}
    kernels: dict[str, Callable[..., Any]] = {}
    if device == "cuda":
        kernels = {OURS: lsk.cross_entropy}
        with contextlib.suppress(ImportError):
            kernels[peers.LIGER] = importlib.import_module(peers.FUNCTIONAL).liger_cross_entropy
    rows = []
    for what, calls in changes.items():
        for kind, counter, providers in (("graphs", graphs, losses), ("kernels", triton_kernels, kernels)):
            for name, loss in providers.items():
                row = Row(RECOMPILATIONS, f"{what}, 8 calls, {kind}", name)
                try:
                    row.count = counter(loss, calls, device)
                except Exception as error:
                    row.refused = reason(error)
                rows.append(row)
    return rows


def call_all(loss: Callable[..., Any], calls: Calls, device: str) -> None:
    for n, eps, ignored in calls:
        x = torch.randn(n, 1000, device=device, requires_grad=True)
        y = torch.arange(n, device=device)
        y[:ignored] = IGNORED
        loss(x, y, label_smoothing=eps).backward()


def graphs(loss: Callable[..., Any], calls: Calls, device: str) -> int:
    """Graphs that torch.compile builds over the calls."""
    built = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal built
        built += 1
        return graph.forward

    torch.compiler.reset()
    call_all(torch.compile(loss, backend=backend, fullgraph=True), calls, device)
    torch.compiler.reset()
    return built


def triton_kernels(loss: Callable[..., Any], calls: Calls, device: str) -> int:
    """Variants of kernels that Triton compiles, or fetches from its cache on disk, over the calls after the first."""
    compilation, built = importlib.import_module("triton").knobs.compilation, 0

    def listener(**_: Any) -> None:
        nonlocal built
        built += 1

    call_all(loss, calls[:1], device)
    before, compilation.listener = compilation.listener, listener
    try:
        call_all(loss, calls[1:], device)
    finally:
        compilation.listener = before
    return built
