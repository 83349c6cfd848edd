"""``pytest bench --benchmark-only``: a few steps under pytest-benchmark, each behind the gate, to track over time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .harness import Case, Task, gate
from .linear import Linear
from .logits import Logits

TASKS: list[tuple[Task, Case]] = [
    (Logits(with_compile=False, with_peers=False), Case("logits", 128, 32000, dtype=torch.float32)),
    (Logits(with_compile=False, with_peers=False), Case("logits", 128, 32000, dtype=torch.bfloat16)),
    (Logits(with_compile=False, with_peers=False), Case("calls", 64, 1000, dtype=torch.float32)),
    (Linear(with_peers=False), Case("linear", 128, 32000, 64, torch.float32)),
]
STEPS = [(task, case, provider) for task, case in TASKS for provider in task.providers(case)]
IDS = [f"{case.group} {case.name} {p.name}".replace(" ", "_").replace("×", "x") for _, case, p in STEPS]


@pytest.mark.parametrize(("task", "case", "provider"), STEPS, ids=IDS)
def test_step(benchmark: Any, task: Task, case: Case, provider: Any) -> None:
    benchmark.group = f"{case.group}: {case.name}"
    inputs = task.inputs(case, 0)
    errors, refused = gate(task, case, provider, inputs)
    assert refused is None
    benchmark.extra_info.update(errors or {})

    def fresh() -> tuple[tuple[object], dict[str, object]]:
        inputs.refill()
        return (inputs,), {}

    benchmark.pedantic(provider.step, setup=fresh, rounds=10, warmup_rounds=1)
