"""The table of cases × backends × dtypes × directions, judged by the rule of ``cases``."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, DIRECTIONS, Case, run_case
from conftest import places, skip_unless_available

from labelsmooth_kernels import backends


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def directions_of(case: Case, backend: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Everything, but for two that cost their time. Under the interpreter, a half precision has the directions whose
    form of backward is its own, and no real vocabulary; the reference sees a real vocabulary once each way."""
    if backend == "triton" and device == "cpu":
        if case.large:
            return ()
        return {torch.float16: ("rows", "inplace rows"), torch.bfloat16: ("mean", "inplace")}.get(dtype, DIRECTIONS)
    return ("forward", "rows") if case.large and backend == "reference" else DIRECTIONS


def rows_of_the_table() -> list[object]:
    """Every case under every backend that says it serves it."""
    rows = []
    for backend, device in places():
        serves = backends.BACKENDS[backend]
        for case in CASES:
            if serves.features is not None and not case.features() <= serves.features:
                continue
            for dtype in (d for d in case.dtypes if d in serves.dtypes):
                for direction in directions_of(case, backend, device, dtype):
                    name = f"{case.name}-{backend}-{device}-{name_of(dtype)}-{direction}"
                    rows.append(pytest.param(case, backend, device, dtype, direction, id=name))
    return rows


@pytest.mark.parametrize(("case", "backend", "device", "dtype", "direction"), rows_of_the_table())
def test_case(case: Case, backend: str, device: str, dtype: torch.dtype, direction: str) -> None:
    skip_unless_available(backend)
    run_case(case.problem(dtype, device), backend, direction)
