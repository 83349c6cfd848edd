"""``python -m bench.options``: what options, layouts and small calls cost on the CPU beside the plain smoothed loss.

Loss and gradient, ε = 0.1, float32. A step is timed only if its gradient is the reference's in float64.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk

from .harness import EPS, describe, provenance

Loss = Callable[[Tensor, Tensor], Tensor]
LIMIT, EAGER_LIMIT = 2e-6, 1e-4  # of a gradient's largest entry; both sides work on the same float32 logits


@dataclass
class Step:
    """One way to a loss and gradient, and what its time is divided by."""

    name: str
    loss: Loss | None  # None: a copy of the logits
    inputs: tuple[Tensor, Tensor]
    over: str
    aim: float | None = None
    samples_ms: list[float] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "over": self.over, "aim": self.aim, "samples_ms": self.samples_ms}

    def run(self) -> Tensor:
        x, target = self.inputs
        if self.loss is None:
            return torch.empty_like(x).copy_(x)
        return torch.autograd.grad(self.loss(x, target), x)[0]


def ours(**options: Any) -> Loss:
    return lambda x, y: lsk.cross_entropy(x, y, **{"label_smoothing": EPS, "backend": "cpu", **options})


def check(step: Step, options: dict[str, Any]) -> None:
    """Raise unless the step's gradient is the reference's in float64, on the first rows."""
    rows = slice(0, 16)
    x, target = (t[rows].detach() for t in step.inputs)
    assert step.loss is not None
    grads = []
    for loss, leaf in ((step.loss, x), (ours(**options | {"backend": "reference"}), x.double())):
        leaf = leaf.clone().requires_grad_()
        grads.append(torch.autograd.grad(loss(leaf, target), leaf)[0].double())
    off = (grads[0] - grads[1]).abs().max() / grads[1].abs().max()
    if not off <= (EAGER_LIMIT if "F.cross_entropy" in step.name else LIMIT):
        raise SystemExit(f"{step.name}: the gradient is off by {off:.1e}: no time is printed for a wrong result")


def options_of(k: int) -> dict[str, tuple[dict[str, Any], float]]:
    """Every option and the aim on its time over the plain loss's."""
    rng = torch.Generator().manual_seed(1)
    weight = torch.rand(k, generator=rng) + 0.5
    prior = torch.rand(k, generator=rng)
    return {
        "class weights": ({"weight": weight}, 1.10),
        "prior": ({"smoothing": prior / prior.sum()}, 1.10),
        "z_loss": ({"z_loss": 1e-4}, 1.10),
        "logit_scale": ({"logit_scale": 0.7}, 1.10),
        "softcap": ({"softcap": 30.0}, 1.60),
        "smooth_over='finite'": ({"smooth_over": "finite"}, 0),
        "statistics": ({"return_stats": True}, 0),
        "statistics and entropy": ({"return_stats": "entropy"}, 0),
        "everything": (
            {
                "weight": weight, "smooth_over": "finite", "z_loss": 1e-4, "logit_scale": 0.7, "softcap": 30.0,
                "smoothing": prior / prior.sum(),
            },
            0,
        ),
    }  # fmt: skip


def first(loss: Loss) -> Loss:
    """The loss alone, where statistics come with it."""

    def only(x: Tensor, y: Tensor) -> Tensor:
        result = loss(x, y)
        return result[0] if isinstance(result, tuple) else result

    return only


def option_steps(n: int, k: int) -> list[Step]:
    x = (torch.randn(n, k, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0))
    plain = f"plain, {n}×{k}"
    steps = [Step(plain, ours(), (x, y), plain), Step("allocate and copy", None, (x, y), plain)]
    for name, (options, aim) in options_of(k).items():
        steps.append(Step(name, first(ours(**options)), (x, y), plain, aim or None))
        shown = {o: v for o, v in options.items() if o != "return_stats"}
        check(steps[-1], shown)
    soft = torch.softmax(torch.randn(n, k, generator=torch.Generator().manual_seed(2)), -1)
    # Three units to move (logits, probabilities, gradient) where the copy moves two.
    steps.append(Step("probabilities", ours(), (x, soft), "allocate and copy", 1.6 * 1.5))
    steps.append(Step("probabilities, bf16", ours(), (x, soft.bfloat16()), "allocate and copy"))
    for step in steps[-2:]:
        check(step, {})
    return steps


def layout_steps(n: int, k: int, d: int) -> list[Step]:
    """(N, K, D), as segmentation produces it: ours, ours after a copy with classes last, PyTorch's."""
    x = (torch.randn(n, k, d, generator=torch.Generator().manual_seed(0)) * 2).requires_grad_()
    y = torch.randint(k, (n, d), generator=torch.Generator().manual_seed(0))
    name = f"({n}, {k}, {d})"
    steps = [
        Step(name, ours(), (x, y), name),
        Step(f"{name}, copied with classes last", lambda x, y: ours(class_dim=-1)(x.movedim(1, -1).contiguous(), y),
             (x, y), name),
        Step(f"{name}, F.cross_entropy", lambda x, y: F.cross_entropy(x, y, label_smoothing=EPS), (x, y), name),
    ]  # fmt: skip
    for step in steps:
        check(step, {})
    return steps


def call_steps(n: int, k: int) -> list[Step]:
    """A call so small that its time is the host's."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(0))
    eager = f"F.cross_entropy, {n}×{k}"
    eager_loss = lambda x, y: F.cross_entropy(x, y, label_smoothing=EPS)  # noqa: E731
    steps = [Step(eager, eager_loss, (x, y), eager), Step(f"ours, {n}×{k}", ours(), (x, y), eager, 1.5)]
    for step in steps:
        check(step, {})
    return steps


def measure(steps: list[Any], budget_s: float, least: int = 5) -> None:
    """Interleaved, each round in a new order; results are freed after the clock is read."""
    shuffler, begin = random.Random(0), time.perf_counter()
    for step in steps:
        step.run()
    while time.perf_counter() - begin < budget_s or len(steps[0].samples_ms) < least:
        for step in shuffler.sample(steps, len(steps)):
            start = time.perf_counter()
            result = step.run()
            step.samples_ms.append((time.perf_counter() - start) * 1e3)
            del result


def table(steps: list[Step]) -> str:
    ms = {step.name: statistics.median(step.samples_ms) for step in steps}
    lines = ["| step | ms | over | ratio | aim | |", "|---|---:|---|---:|---:|---|"]
    for step in steps:
        ratio = ms[step.name] / ms[step.over]
        aim = "" if step.aim is None else f"≤ {step.aim:g}"
        verdict = "" if step.aim is None else "met" if ratio <= step.aim else "**missed**"
        lines.append(f"| {step.name} | {ms[step.name]:.4g} | {step.over} | {ratio:.2f} | {aim} | {verdict} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every sample there")
    parser.add_argument("--quick", action="store_true", help="small cases: shows that it runs")
    arguments = parser.parse_args()
    n, budget = (32, 1.0) if arguments.quick else (1024, 20.0)
    facts = provenance("cpu")
    print(describe(facts))
    records = []
    for steps, seconds in (
        (option_steps(n, 32000), budget),
        (layout_steps(n // 16, 32000, 16), budget / 2),
        (layout_steps(1, 8000, 4 * n), budget / 2),
        (call_steps(8, 1000), budget / 10),
    ):
        measure(steps, seconds)
        print(f"\n{table(steps)}", flush=True)
        records += [step.record() for step in steps]
    if facts["load average"] > 0.5:
        print(f"\nLoad average {facts['load average']}: others were at work, so these times are not to be quoted.")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"provenance": facts, "steps": records}, indent=1) + "\n")
        print(f"\nwritten to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
