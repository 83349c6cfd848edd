"""The table of cases × backends × dtypes × directions: its rows, and what each of them is there for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from cases import CASES, DIRECTIONS, Case
from conftest import EMULATED, places

from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Iterator


class Row(NamedTuple):
    case: Case
    backend: str
    device: str
    dtype: torch.dtype
    direction: str

    def __str__(self) -> str:
        return f"{self.case.name}-{self.backend}-{self.device}-{str(self.dtype)[6:]}-{self.direction}"


def directions_of(case: Case, backend: str, device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Everything, but for those that cost their time. Where a GPU is emulated, a dtype has the directions whose form of
    backward is its own; a real vocabulary is for the threads of the CPU, and for the reference once each way."""
    if (backend, device) in EMULATED:
        if case.large:
            return ("mean",) if backend == "cuda" and dtype != torch.float64 else ()
        few = {torch.float16: ("rows", "inplace rows"), torch.bfloat16: ("mean", "inplace"), torch.float64: ("rows",)}
        return few.get(dtype, DIRECTIONS)
    return ("forward", "rows") if case.large and backend == "reference" else DIRECTIONS


def rows_of_the_table() -> list[Row]:
    """Every case under every backend that says it serves it."""
    rows = []
    for backend, device in places():
        serves = backends.BACKENDS[backend]
        for case in CASES:
            if serves.features is not None and not case.features() <= serves.features:
                continue
            for dtype in (d for d in case.dtypes if d in serves.dtypes):
                rows += [Row(case, backend, device, dtype, d) for d in directions_of(case, backend, device, dtype)]
    return rows


def claims(case: Case, backend: str, device: str, dtype: torch.dtype, direction: str) -> Iterator[tuple[object, ...]]:
    """Under each emulated backend every small case, every number of a failure, dtype × direction, and every trait ×
    dtype, × direction and × large or not. The kernels of the CPU run the whole table."""
    yield backend, dtype, direction
    yield backend, case.large or case.name
    yield from ((backend, number) for number in case.regressions.split())
    for trait in case.traits():
        yield backend, trait, case.large
        yield backend, trait, dtype
        yield backend, trait, direction
