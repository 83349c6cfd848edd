"""``python -m bench.tune``: our Triton kernels under every launch plan worth a try, beside the launch table's own.

The rows join the other figures as the group "tune"; what they teach goes into ``triton_kernels/launch.py`` by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from labelsmooth_kernels import backends

from . import report, results
from .__main__ import INCOMPLETE, minutes
from .harness import EPS, IGNORED, Case, Inputs, Provider, Results, measure
from .logits import COPY, Logits, copy_existing

TABLE = "the launch table"
KEPT = 6  # plans of a case whose rows are written, beside the table's and the copy's
SHAPES = ((8192, 128256), (16, 128256), (8192, 32000), (32768, 32000), (4096, 151936), (8192, 256000))


def candidates(case: Case) -> list[dict[str, Any]]:
    """8 to 64 values of a row per thread; clusters where they compile here; splits where rows are few."""
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


def under(case: Case, plan: dict[str, Any]) -> Provider:
    """The forward operator alone under a forced plan: the scale kernel of a whole step must not be forced along."""
    from labelsmooth_kernels.triton_kernels import launch

    kernels = backends.BACKENDS["triton"].kernels
    assert kernels is not None
    scale = torch.full((1,), 1 / case.n, device=case.device)

    def step(inputs: Inputs) -> Results:
        with launch.override(**plan) if plan else contextlib.nullcontext():
            row = (inputs.target, None, None, EPS, None, scale, IGNORED, False, False, 0.0, 0.0, 1.0, None)
            loss, *_, grad = kernels.forward(inputs.leaves[0].detach(), *row, case.backward, 0)
        return loss.mean(), *((grad,) if case.backward else ())

    return Provider(" ".join(f"{k}={v}" for k, v in plan.items()) or TABLE, step, exact=True)


@dataclass(frozen=True)
class Plans(Logits):
    plans: list[dict[str, Any]] = field(default_factory=list)
    baseline: str = TABLE

    def providers(self, case: Case) -> list[Provider]:
        copy = Provider(COPY, copy_existing(), work=2 * case.logits_bytes)
        return [*(under(case, plan) for plan in [{}, *self.plans]), copy]


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = ((64, 1000), (1, 4096)) if tiny else SHAPES
    dtypes = (torch.bfloat16, torch.float32)
    return [
        Case("tune", n, k, dtype=t, device=device, backward=b) for b in (True, False) for t in dtypes for n, k in shapes
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: under TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--minutes", type=minutes, default=5, help="for all of it, about; default: %(default)s")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    arguments = parser.parse_args()
    if reason := backends.BACKENDS["triton"].unavailable():
        parser.error(f"it times the Triton kernels, and {reason}")
    facts, deadline = results.provenance(arguments.device, arguments.commit), time.monotonic() + 60 * arguments.minutes
    done, left_out = results.measured(arguments.out, facts), 0
    every = [case for case in cases(arguments.device, arguments.tiny) if (case.group, case.name) not in done]
    for i, case in enumerate(every):
        left = deadline - time.monotonic()
        if left < 1:
            print(f"no time was left for {case.name}")
            left_out += 1
            continue
        rows = measure(case, Plans(plans=candidates(case)), left / (len(every) - i))
        rows.sort(key=lambda row: row.ms or float("inf"))
        kept = rows[:KEPT] + [row for row in rows[KEPT:] if row.provider in (TABLE, COPY) or row.refused]
        print(f"\n{report.of_case(results.append(arguments.out, kept, facts)).markdown()}", flush=True)
    return INCOMPLETE if left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
