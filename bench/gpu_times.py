"""The timing stages of ``bench.gpu``: the losses side by side, or (``--tune``) our kernel under many launch plans.

Figures are written after every case, so that a run that is cut leaves what it has.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labelsmooth_kernels import backends

from .harness import EPS, Case, Inputs, Provider, Row, as_json, describe, measure, provenance
from .suite import COPY, OURS, copy_existing, markdown, providers

SHAPES = ((8192, 128256), (8192, 32000), (32768, 32000), (16, 128256))  # the most telling ones first
TINY = ((64, 1000), (1, 4096))
DTYPES = (torch.bfloat16, torch.float32)
DEFAULT = "the launch table"


def cases(device: str, tiny: bool) -> list[Case]:
    return [Case(n, k, d, device, b) for b in (True, False) for d in DTYPES for n, k in (TINY if tiny else SHAPES)]


class Report:
    """Provenance and the cases so far, in DIR/name.json and DIR/name.md."""

    def __init__(self, name: str, out: Path, device: str) -> None:
        self.json_path, self.table_path = out / f"{name}.json", out / f"{name}.md"
        self.facts = provenance(device)
        label = "times of the device" if device == "cuda" else "**CPU times, which say nothing about a GPU**"
        self.tables = [describe(self.facts), f"Medians of interleaved calls; {label}; ε = {EPS}."]
        self.records: list[dict[str, Any]] = []
        self.summary = ["| case | ms | % of copy | best |", "|---|---:|---:|---|"]

    def add(self, case: Case, rows: list[Row], ours: str) -> None:
        self.records.append(as_json(case, rows))
        self.tables.append(markdown(case, rows, ours))
        row = next(row for row in rows if row.provider == ours)
        best = min(((r.ms, r.provider) for r in rows if r.ms and r.provider != COPY), default=(0, "none"))[1]
        cells = ("refused", "") if row.ms is None else (f"{row.ms:.4g}", f"{row.percent_of_copy:.0f}")
        self.summary.append(f"| {case.name} | {cells[0]} | {cells[1]} | {best} |")
        self.json_path.write_text(json.dumps({"provenance": self.facts, "cases": self.records}, indent=1) + "\n")
        self.table_path.write_text("\n\n".join([*self.tables, "\n".join(self.summary)]) + "\n")
        print(self.tables[-1], flush=True)


def candidates(case: Case) -> list[dict[str, Any]]:
    """Launch plans worth a measurement: 8 to 64 values of a row per thread; clusters where they compile here."""
    from labelsmooth_kernels.triton_kernels import launch

    machine = launch.machine_of(torch.empty(1, device=case.device))
    whole = 1 << (case.k - 1).bit_length()
    found: list[dict[str, Any]] = []
    for ctas in (1, 2, 4, 8, 16) if machine.clusters and case.backward else (1,):
        for warps in (4, 8, 16, 32):
            if 8 <= whole // (32 * warps * ctas) <= 64:
                sizes = {"block": whole, "warps": warps, "ctas": ctas}
                found += [{"form": "block", **sizes, "programs": max(1, machine.sms * p // ctas)} for p in (1, 2, 4)]
    for block in (2048, 4096, 8192, 16384):
        for warps in (4, 8, 16, 32):
            if not (8 <= block // (32 * warps) <= 32 and block <= whole):
                continue
            sizes = {"block": block, "warps": warps, "ctas": 1}
            found += [{"form": "sweep", **sizes, "programs": machine.sms * p} for p in (1, 2, 4)]
            if case.n < machine.sms:  # the grid of a split is not persistent: its number of programs stays unbounded
                found += [{"form": "split", **sizes, "splits": -(-p * machine.sms // case.n)} for p in (1, 2, 4)]
    return found


def plan_provider(case: Case, name: str, choice: dict[str, Any]) -> Provider:
    """The forward operator alone under a forced plan: the scale kernel of a whole step must not be forced along."""
    from labelsmooth_kernels.triton_kernels import launch

    kernels = backends.BACKENDS["triton"].kernels
    assert kernels is not None
    scale = torch.full((1,), 1 / case.n, device=case.device)

    def step(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        with launch.override(**choice) if choice else contextlib.nullcontext():
            row = (inputs.target, None, None, EPS, None, scale, -100, False, False, 0.0, 1.0, None)
            loss, *_, grad = kernels.forward(inputs.logits.detach(), *row, case.backward, 0)
        return loss.mean(), grad if case.backward else None

    return Provider(name, step, exact=True)


def tune(case: Case, report: Report, budget_s: float) -> None:
    plans = candidates(case)
    tried = [plan_provider(case, DEFAULT, {})]
    tried += [plan_provider(case, " ".join(f"{k}={v}" for k, v in plan.items()), plan) for plan in plans]
    rows = measure(case, [*tried, Provider(COPY, copy_existing(), is_copy=True)], COPY, budget_s)
    by_time = sorted(rows, key=lambda row: row.ms if row.ms is not None else float("inf"))
    keep = [*by_time[:6], *(row for row in by_time[6:] if row.provider in (DEFAULT, COPY) or row.refused)]
    report.add(case, keep, DEFAULT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_times", description="the timing stages of bench.gpu")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny shapes and short rounds")
    parser.add_argument("--tune", action="store_true", help="sweep launch plans instead of comparing providers")
    arguments = parser.parse_args()
    budget = 0.2 if arguments.tiny else 1.5
    if arguments.tune and (reason := backends.BACKENDS["triton"].unavailable()):
        parser.error(f"--tune times the Triton kernels, and {reason}")
    report = Report("tune" if arguments.tune else "times", arguments.out, arguments.device)
    for case in cases(arguments.device, arguments.tiny):
        if arguments.tune:
            tune(case, report, budget)
        else:
            report.add(case, measure(case, providers(case, fresh_copy=False, liger=True), COPY, budget), OURS)
        if case.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
