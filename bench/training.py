"""Whole uses of the loss: distillation at the logits, a training step of a small transformer, recompilations."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labelsmooth_kernels as lsk

from . import inputs as data
from .harness import SHORT, Case, Inputs, Provider, Results, Row, losing
from .logits import KERNELS, copies, eager

if TYPE_CHECKING:
    from collections.abc import Callable

OURS = "ours"
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


def recompilations(device: str) -> list[Row]:
    """How often torch.compile compiles a loss anew while a training loop changes what such loops change."""
    losses = {"F.cross_entropy": F.cross_entropy, OURS: lsk.cross_entropy}
    changes: dict[str, list[tuple[int, Any, int]]] = {  # (N, ε, ignored rows) of the calls
        "ε as a schedule, a tensor": [(64, torch.tensor(0.01 * i, device=device), 0) for i in range(8)],
        "ε as a schedule, a number": [(64, 0.01 * i, 0) for i in range(1, 9)],
        "N": [(64 + i, 0.1, 0) for i in range(8)],
        "ignored rows": [(64, 0.1, i) for i in range(8)],
    }
    rows = []
    for what, calls in changes.items():
        for name, loss in losses.items():
            row = Row("recompilations", f"{what}, 8 calls", name, sizes={"dtype": SHORT[torch.float32]})
            try:
                row.count = compilations(loss, calls, device)
            except Exception as error:
                row.refused = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
            rows.append(row)
    return rows


def compilations(loss: Callable[..., Any], calls: list[tuple[int, Any, int]], device: str) -> int:
    """Graphs that torch.compile builds over the calls."""
    built = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal built
        built += 1
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x, y, eps: loss(x, y, label_smoothing=eps), backend=backend, fullgraph=True)
    for n, eps, ignored in calls:
        x = torch.randn(n, 1000, device=device, requires_grad=True)
        y = torch.arange(n, device=device)
        y[:ignored] = -100
        compiled(x, y, eps).backward()
    torch.compiler.reset()
    return built
