"""``python -m bench.tune``: our Triton kernels under every launch plan worth a try, beside the launch table's own.

Plans are compiled in processes of their own, as many as there are cores, and timed a few at a time, as they become
ready; each row is written then. What the deadline cuts off is left out and counted. Times of the host are taken beside
the compilers. The rows join the other figures as the group "tune"; what they teach goes into
``triton_kernels/launch.py`` by hand.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from labelsmooth_kernels import backends

from . import report, results, stand_in
from .__main__ import INCOMPLETE, minutes
from .harness import EPS, IGNORED, Case, Inputs, Provider, Results, Row, measure, reason
from .logits import COPY, Logits, copy_existing

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.pool import Pool

TABLE = "the launch table"
TOGETHER = 6  # plans in the same rounds, beside the table's and the copy
SHOWN = 6  # the fastest of a case
SHAPES = ((8192, 128256), (16, 128256), (8192, 32000), (32768, 32000), (4096, 151936), (8192, 256000))
Plan = dict[str, Any]


def candidates(case: Case) -> list[Plan]:
    """8 to 64 values of a row per thread; splits where rows are few."""
    machine = _machine(case.device)
    whole = 1 << (case.k - 1).bit_length()
    found: list[Plan] = []
    for warps in (4, 8, 16, 32):
        if 8 <= whole // (32 * warps) <= 64:
            sizes = {"block": whole, "warps": warps}
            found += [{"form": "block", **sizes, "programs": machine.sms * p} for p in (1, 2, 4)]
    for block in (2048, 4096, 8192, 16384):
        for warps in (4, 8, 16, 32):
            if not (8 <= block // (32 * warps) <= 32 and block <= whole):
                continue
            sizes = {"block": block, "warps": warps}
            found += [{"form": "sweep", **sizes, "programs": machine.sms * p} for p in (1, 2, 4)]
            if case.n < machine.sms:  # the grid of a split is not persistent: its number of programs stays unbounded
                found += [{"form": "split", **sizes, "splits": -(-p * machine.sms // case.n)} for p in (1, 2, 4)]
    return found


def _machine(device: str) -> Any:
    from labelsmooth_kernels.triton_kernels import launch

    return launch.machine_of(torch.empty(1, device=device))


def _name(plan: Plan) -> str:
    return " ".join(f"{k}={v}" for k, v in plan.items()) or TABLE


def forward(logits: torch.Tensor, target: torch.Tensor, scale: torch.Tensor, case: Case, plan: Plan) -> Any:
    """The forward operator alone under a forced plan: the scale kernel of a whole step must not be forced along."""
    from labelsmooth_kernels.triton_kernels import launch
    from labelsmooth_kernels.triton_kernels.logits import forward as operator

    row = (target, None, None, EPS, None, scale, IGNORED, False, False, 0.0, 0.0, 1.0, None)
    with launch.override(**plan) if plan else contextlib.nullcontext():
        return operator(logits, *row, case.backward, 0)


def under(case: Case, plan: Plan) -> Provider:
    scale = torch.full((1,), 1 / case.n, device=case.device)

    def step(inputs: Inputs) -> Results:
        loss, *_, grad = forward(inputs.leaves[0].detach(), inputs.target, scale, case, plan)
        return loss.mean(), *((grad,) if case.backward else ())

    return Provider(_name(plan), step, exact=True)


@dataclass(frozen=True)
class Plans(Logits):
    plans: list[Plan] = field(default_factory=list)
    baseline: str = TABLE

    def providers(self, case: Case) -> list[Provider]:
        copy = Provider(COPY, copy_existing(), work=2 * case.logits_bytes)
        return [*(under(case, plan) for plan in [{}, *self.plans]), copy]


def cases(device: str, tiny: bool) -> list[Case]:
    shapes = ((4, 256), (1, 1024)) if tiny else SHAPES
    dtypes = (torch.bfloat16, torch.float32)
    return [
        Case("tune", n, k, dtype=t, device=device, backward=b) for b in (True, False) for t in dtypes for n, k in shapes
    ]


# ---- compiled beforehand, elsewhere


def compile_plan(case: Case, plan: Plan, machine: tuple[Any, ...]) -> str | None:
    """Fill Triton's cache with what a plan launches on a machine, whichever this one is; or say why it does not."""
    from labelsmooth_kernels.triton_kernels import launch

    new = torch.empty((case.n, case.k), dtype=case.dtype, device="meta")
    target, scale = (torch.empty(size, dtype=t, device="meta") for size, t in ((case.n, torch.int64), (1, None)))
    try:
        with stand_in.compiling(launch, machine):
            forward(new, target, scale, case, plan)
    except Exception as error:  # whatever a compiler raises
        return reason(error)
    return None


class Ahead:
    """Which plans can be timed without waiting for a compiler; without a pool all can."""

    def __init__(self, pool: Pool | None) -> None:
        self.pool = pool
        self.jobs: dict[tuple[str, str], Any] = {}

    @staticmethod
    def _key(case: Case, plan: Plan) -> tuple[str, str]:
        return case.name, _name({name: value for name, value in plan.items() if name != "programs"})

    def compile(self, case: Case, plans: list[Plan]) -> None:
        """Ask for the plans of a case, after those of the cases before it."""
        machine = _machine(case.device)
        for plan in plans:
            if self.pool is not None and self._key(case, plan) not in self.jobs:
                facts = (machine.capability, machine.sms)
                self.jobs[self._key(case, plan)] = self.pool.apply_async(compile_plan, (case, plan, facts))

    def ready(self, case: Case, plans: list[Plan]) -> list[Plan]:
        return [plan for plan in plans if self.pool is None or self.jobs[self._key(case, plan)].ready()]

    def failure(self, case: Case, plan: Plan) -> str | None:
        """Why a plan that is ready cannot be timed."""
        return None if self.pool is None else self.jobs[self._key(case, plan)].get()


@contextlib.contextmanager
def compilers(device: str) -> Iterator[Pool | None]:
    """New processes, for each core but one, since one with a GPU cannot be forked; none for Triton's interpreter."""
    if device != "cuda":
        yield None
        return
    with (
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
        multiprocessing.get_context("spawn").Pool(max(1, min(16, len(os.sched_getaffinity(0))) - 1)) as pool,
    ):
        yield pool


def timed(wanted: dict[Case, list[Plan]], ahead: Ahead, deadline: float) -> Iterator[list[Row]]:
    """Rows of a few plans of a case at a time, while there is time: of the first case that has some ready. The table's
    own plan and the copy are in the rounds of all of them; their rows come once, without waiting for a plan."""
    todo, seen = {case: list(plans) for case, plans in wanted.items()}, set()
    while (left := deadline - time.monotonic()) > 0:
        case = next((case for case in todo if case not in seen or ahead.ready(case, todo[case])), None)
        if case is None:
            if not any(todo.values()):
                return
            time.sleep(min(0.05, left))
            continue
        batch = ahead.ready(case, todo[case])[:TOGETHER]
        broken = {_name(plan): why for plan in batch if (why := ahead.failure(case, plan))}
        sound = [plan for plan in batch if _name(plan) not in broken]
        rows = [Row(case.group, case.name, name, refused=why) for name, why in broken.items()]
        if sound or case not in seen:
            share = (1 + len(sound)) / sum(1 + len(plans) for plans in todo.values())
            rows += measure(case, Plans(plans=sound), left * share)
        yield [row for row in rows if case not in seen or row.provider not in (TABLE, COPY)]
        todo[case] = [plan for plan in todo[case] if plan not in batch]
        seen.add(case)


def unmeasured(out: Path, facts: dict[str, Any], device: str, tiny: bool) -> dict[Case, list[Plan]]:
    """Plans by case, without those that an earlier, interrupted run of this commit on this machine has timed."""
    known = results.load(out) if out.exists() else []
    same = (*results.MACHINE, "commit", "torch", "triton")
    mine = [row for row in known if row["group"] == "tune" and all(row.get(name) == facts[name] for name in same)]
    done = {(row["case"], row["provider"]) for row in mine}
    found = {case: [p for p in candidates(case) if (case.name, _name(p)) not in done] for case in cases(device, tiny)}
    return {case: plans for case, plans in found.items() if plans}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: under TRITON_INTERPRET=1")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: shows that it runs")
    parser.add_argument("--minutes", type=minutes, default=5, help="for all of it; default: %(default)s")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    arguments = parser.parse_args()
    if reason := backends.BACKENDS["triton"].unavailable():
        parser.error(f"it times the Triton kernels, and {reason}")
    facts, deadline = results.provenance(arguments.device, arguments.commit), time.monotonic() + 60 * arguments.minutes
    wanted = unmeasured(arguments.out, facts, arguments.device, arguments.tiny)
    records: list[dict[str, Any]] = []
    with compilers(arguments.device) as pool:
        ahead = Ahead(pool)
        for case, plans in wanted.items():
            ahead.compile(case, plans)
        for rows in timed(wanted, ahead, deadline):
            records += results.append(arguments.out, rows, facts)
            print(f"{rows[0].case}: {len(rows)} rows", flush=True)
    for case in wanted:
        found = sorted((r for r in records if r["case"] == case.name), key=lambda r: r.get("ms", float("inf")))
        if shown := found[:SHOWN] + [r for r in found[SHOWN:] if r["provider"] in (TABLE, COPY) or "refused" in r]:
            print(f"\n{report.of_case(shown).markdown()}", flush=True)
    left_out = sum(len(plans) + 2 for plans in wanted.values()) - len(records)
    if left_out:
        print(f"\nno time was left for {left_out} rows")
    return INCOMPLETE if left_out else 0


if __name__ == "__main__":
    raise SystemExit(main())
