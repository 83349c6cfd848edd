"""``pytest bench --benchmark-only``: small cases of ``bench.cpu`` under pytest-benchmark, each behind the same gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .harness import Case, gate, make_inputs, refill
from .suite import providers

CASES = [Case(128, 32000, torch.float32), Case(128, 32000, torch.bfloat16), Case(64, 1000, torch.float32)]
PROVIDERS = {case: providers(case, fresh_copy=True, compiled=False) for case in CASES}
PAIRS = [(case, provider) for case in CASES for provider in PROVIDERS[case]]


@pytest.mark.parametrize(
    ("case", "provider"), PAIRS, ids=[f"{case.name}-{p.name}".replace(" ", "_").replace("×", "x") for case, p in PAIRS]
)
def test_step(benchmark: Any, case: Case, provider: Any) -> None:
    benchmark.group = case.name
    inputs = make_inputs(case)
    errors, refused = gate(case, provider, inputs)
    assert refused is None
    if errors is not None:
        benchmark.extra_info.update(vars(errors))

    def fresh() -> tuple[tuple[object], dict[str, object]]:
        refill(inputs)
        return (inputs,), {}

    benchmark.pedantic(provider.step, setup=fresh, rounds=20, warmup_rounds=2)
