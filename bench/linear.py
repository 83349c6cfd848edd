"""``python -m bench.linear``: the fused linear + loss beside three bare GEMMs and PyTorch's own, on the CPU or a GPU.

Loss and both gradients of a head without bias, ε = 0.1 unless a step says otherwise. A step is timed only if its
gradients on a few rows are those of F.linear_cross_entropy in float64. Memory is the peak beyond the inputs and the
demanded gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk

from .harness import EPS, describe, peak_bytes, provenance
from .options import measure

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
F32, BF16 = torch.float32, torch.bfloat16
# Largest error of a gradient over its largest entry. float32: a product of D terms. bfloat16: logits are rounded.
LIMITS = {F32: 5e-6, BF16: 4e-2}
GEMMS, OURS, EAGER = "three GEMMs", "ours", "F.linear_cross_entropy"
TILED = "ours, tiled"
NO_SMOOTHING, PRIOR, CHUNKED = "ours, ε = 0", "ours, prior", "F.linear_cross_entropy, chunked, ε = 0"


@dataclass(frozen=True)
class Case:
    n: int
    d: int
    k: int
    dtype: torch.dtype
    device: str = "cpu"
    aim_ms: float | None = None

    @property
    def name(self) -> str:
        return f"N {self.n}, D {self.d}, K {self.k}, {str(self.dtype).removeprefix('torch.')}"


@dataclass
class Step:
    name: str
    loss: Loss | None  # None: three GEMMs of the same sizes
    operands: tuple[Tensor, Tensor, Tensor]
    samples_ms: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    among_ours_ms: list[float] = field(default_factory=list)  # of rounds that hold nothing but our own steps

    def run(self) -> Any:
        hidden, weight, target = self.operands
        if self.loss is None:
            with torch.no_grad():
                logits = hidden @ weight.t()
                results = (logits @ weight, logits.t() @ hidden)
        else:
            results = torch.autograd.grad(self.loss(hidden, weight, target), (hidden, weight))
        if hidden.is_cuda:
            torch.cuda.synchronize()
        return results


def ours(**options: Any) -> Loss:
    return lambda h, w, y: lsk.linear_cross_entropy(h, w, y, **{"label_smoothing": EPS, **options})


def theirs(**options: Any) -> Loss:
    return lambda h, w, y: F.linear_cross_entropy(h, w, y, **options)


def make_operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.n, case.d, generator=rng).to(case.device, case.dtype).requires_grad_()
    weight = torch.randn(case.k, case.d, generator=rng).mul_(2 * case.d**-0.5)
    weight = weight.to(case.device, case.dtype).requires_grad_()
    return hidden, weight, torch.randint(case.k, (case.n,), generator=rng).to(case.device)


def steps_of(case: Case) -> list[Step]:
    hidden, weight, target = make_operands(case)
    prior = torch.rand(case.k, generator=torch.Generator().manual_seed(1)).to(case.device)
    prior /= prior.sum()
    losses: dict[str, Loss | None] = {
        GEMMS: None,
        OURS: ours(),
        NO_SMOOTHING: ours(label_smoothing=0.0),
        PRIOR: ours(smoothing=prior),
    }
    if hasattr(F, "linear_cross_entropy"):  # PyTorch 2.13
        losses |= {EAGER: theirs(label_smoothing=EPS), CHUNKED: theirs(options=torch.nn.LinearCrossEntropyOptions())}
    else:
        losses[EAGER] = lambda h, w, y: F.cross_entropy(F.linear(h, w), y, label_smoothing=EPS)
    if case.device == "cuda":
        losses |= {f"ours, chunks of {rows}": ours(chunk_rows=rows) for rows in (1024, 4096, 8192)}
        losses[TILED] = ours(method="tiled")
    steps = [Step(name, loss, (hidden, weight, target)) for name, loss in losses.items()]
    for step in steps:
        if step.loss is not None:
            check(step, case, prior)
    return steps


def check(step: Step, case: Case, prior: Tensor) -> None:
    """Raise unless the step's gradients are right on a few rows; ours in several chunks."""
    hidden, weight, target = (t.detach()[:n] for t, n in zip(step.operands, (48, case.k, 48), strict=True))
    assert step.loss is not None
    eps = 0.0 if step.name in (NO_SMOOTHING, CHUNKED) else EPS
    r = prior if step.name == PRIOR else torch.full_like(prior, 1 / case.k)
    leaves = tuple(t.clone().requires_grad_() for t in (hidden, weight))
    got = torch.autograd.grad(step.loss(*leaves, target), leaves)
    h, w = hidden.double(), weight.double()
    dx = (h @ w.t()).softmax(-1) - eps * r.double()
    dx[torch.arange(len(h), device=h.device), target] -= 1 - eps
    for name, grad, expected in zip(("hidden", "weight"), got, (dx @ w, dx.t() @ h), strict=True):
        off = (grad.double() * len(h) - expected).abs().max() / expected.abs().max()
        limit = LIMITS[case.dtype] * (20 if step.name in (EAGER, CHUNKED) else 1)
        if not off <= limit:
            raise SystemExit(f"{step.name}: the gradient of {name} is off by {off:.1e}: no time for a wrong result")


def cases_of(device: str, quick: bool) -> list[Case]:
    if quick:
        return [Case(96, 64, 5000, dtype, device) for dtype in (F32, BF16)]
    if device == "cuda":  # the best published times of a loss without smoothing, on an H200
        return [Case(8192, 4096, 128256, BF16, device, 34.4), Case(4096, 4096, 128256, BF16, device, 16.8)]
    return [Case(2048, 512, k, dtype) for k in (32000, 128256) for dtype in (F32, BF16)]


def measure_all(steps: list[Step], budget_s: float) -> None:
    """What smoothing and a prior cost is far less than what separates the others: it takes rounds of its own."""
    measure([step for step in steps if step.name != CHUNKED], budget_s)
    measure([step for step in steps if step.name == CHUNKED], 0.0, least=2)  # so slow that it would leave them no time
    own = [step for step in steps if step.name in (OURS, NO_SMOOTHING, PRIOR)]
    copies = [replace(step, samples_ms=step.among_ours_ms) for step in own]
    measure(copies, budget_s)


def ratio(above: Step, below: Step) -> float:
    """Of times: the median over the rounds where a small difference is asked for, else that of the medians."""
    if above.among_ours_ms and below.among_ours_ms:
        return statistics.median(a / b for a, b in zip(above.among_ours_ms, below.among_ours_ms, strict=True))
    return statistics.median(above.samples_ms) / statistics.median(below.samples_ms)


def aims(case: Case) -> list[tuple[str, str, str, float, bool]]:
    """What, above, below, aim, whether the ratio of times must be at least that."""
    return [
        ("over the GEMMs", OURS, GEMMS, 1.15 if case.dtype == F32 else 1.30, False),
        ("times as fast as F.linear_cross_entropy", EAGER, OURS, 1.05, True),
        ("times as fast as its chunks, which do not smooth", CHUNKED, OURS, 3.0, True),
        ("smoothing over none", OURS, NO_SMOOTHING, 1.01, False),
        ("a prior over uniform", PRIOR, OURS, 1.02, False),
    ]


def report(case: Case, steps: list[Step]) -> str:
    ms = {step.name: statistics.median(step.samples_ms) for step in steps}
    extra = {step.name: step.extra_bytes or 0 for step in steps}
    lines = [f"\n{case.name}\n", "| step | ms | memory, MB | rounds |", "|---|---:|---:|---:|"]
    lines += [f"| {s.name} | {ms[s.name]:.4g} | {extra[s.name] / 1e6:.1f} | {len(s.samples_ms)} |" for s in steps]
    lines += ["\n| | ratio | aim | |", "|---|---:|---:|---|"]
    named = {step.name: step for step in steps}
    known = (row for row in aims(case) if row[1] in named and row[2] in named)
    verdicts = [(what, ratio(named[a], named[b]), aim, at_least) for what, a, b, aim, at_least in known]
    if case.aim_ms is not None:
        verdicts.append(("ms", ms[OURS], case.aim_ms, False))
    verdicts.append(("memory over F.linear_cross_entropy's", extra[OURS] / extra[EAGER], 1 / 8, False))
    for what, value, aim, at_least in verdicts:
        met = value >= aim if at_least else value <= aim
        lines.append(
            f"| {what} | {value:.3f} | {'≥' if at_least else '≤'} {aim:g} | {'met' if met else '**missed**'} |"
        )
    return "\n".join(lines)


def memory_rows() -> Iterator[str]:
    """Peak MB beyond inputs and gradients: PyTorch's, of our loss on whole logits, and without logits."""
    unfused: Loss = lambda h, w, y: lsk.cross_entropy(F.linear(h, w), y, label_smoothing=EPS, inplace=True)  # noqa: E731
    losses = {EAGER: theirs(label_smoothing=EPS), "F.linear and our loss, in place": unfused, OURS: ours()}
    yield f"| N | D | K | dtype | {' | '.join(losses)} |\n|---:|---:|---:|---|---:|---:|---:|"
    shapes = ((1024, 512, 32000), (4096, 512, 32000), (1024, 2048, 32000), (1024, 512, 128256), (4096, 512, 128256))
    for dtype in (F32, BF16):
        for n, d, k in shapes:
            operands = make_operands(Case(n, d, k, dtype))
            demanded = sum(t.nbytes for t in operands[:2])
            steps = (Step(name, loss, operands) for name, loss in losses.items())
            cells = (f"{(peak_bytes(step.run, 'cpu') - demanded) / 1e6:,.0f}" for step in steps)
            name = str(dtype).removeprefix("torch.")
            yield (f"| {n:,} | {d:,} | {k:,} | {name} | {' | '.join(cells)} |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.linear", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every sample there")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="small cases: shows that it runs")
    parser.add_argument("--budget", type=float, default=45, metavar="S", help="seconds for the times of a case")
    parser.add_argument("--memory", action="store_true", help="only the README's table of memory")
    arguments = parser.parse_args()
    if arguments.memory:
        for row in memory_rows():
            print(row, flush=True)
        return 0
    facts = provenance(arguments.device)
    print(describe(facts))
    records = []
    for case in cases_of(arguments.device, arguments.quick):
        steps = steps_of(case)
        for step in steps:
            gradients = sum(t.numel() * t.element_size() for t in step.operands[:2])
            step.extra_bytes = peak_bytes(step.run, case.device) - gradients
        measure_all(steps, 0.2 if arguments.quick else arguments.budget)
        print(report(case, steps), flush=True)
        records.append(
            {
                "case": case.name,
                "steps": [
                    {
                        "name": s.name,
                        "samples_ms": s.samples_ms,
                        "among_ours_ms": s.among_ours_ms,
                        "extra_bytes": s.extra_bytes,
                    }
                    for s in steps
                ],
            }
        )
    if facts["load average"] > 0.5:
        print(f"\nLoad average {facts['load average']}: others were at work, so these times are not to be quoted.")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"provenance": facts, "cases": records}, indent=1) + "\n")
        print(f"\nwritten to {arguments.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
