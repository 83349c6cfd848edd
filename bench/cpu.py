"""``python -m bench.cpu``: loss and gradient on the CPU beside F.cross_entropy, torch.compile, a copy and the aims."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from . import suite
from .harness import Case, Row, as_json, describe, measure, provenance
from .suite import COMPILED, EAGER, FRESH_COPY, OURS, OURS_INPLACE

F32, BF16 = torch.float32, torch.bfloat16
CASES = [Case(n, k, dtype) for dtype in (F32, BF16) for n, k in ((1024, 32000), (512, 128256))]
CASES.append(Case(64, 1000, F32))
QUICK = [Case(128, 32000, F32), Case(128, 32000, BF16), Case(64, 1000, F32)]

# Per row of logits: loss, zmax, logsum and what the reduction makes of them; and a constant for scalars.
BYTES_PER_ROW, BYTES_ONCE = 64, 4096


class Verdict(NamedTuple):
    case: str
    what: str
    value: float
    aim: str
    met: bool


def verdicts(case: Case, rows: list[Row]) -> list[Verdict]:
    """Every aim that speaks of this case; a provider without a time has no ratio, and the aim is not met."""
    ms = {row.provider: row.ms for row in rows}
    found = []

    def ratio(what: str, above: str, below: str, aim: float, *, at_least: bool) -> None:
        top, bottom = ms.get(above), ms.get(below)
        value = top / bottom if top and bottom else float("nan")
        met = value >= aim if at_least else value <= aim
        found.append(Verdict(case.name, what, value, f"{'≥' if at_least else '≤'} {aim:g}", met))

    if case.k < 4096:
        ratio("time over eager's", OURS, EAGER, 1.5, at_least=False)
        return found
    single = case.dtype == F32
    ratio("times as fast as eager", EAGER, OURS, 6 if single else 5, at_least=True)
    ratio("times as fast as torch.compile", COMPILED, OURS, 2.5, at_least=True)
    if single:
        ratio("time over allocate-and-copy's", OURS, FRESH_COPY, 0.85, at_least=False)
        ratio("in place: times as fast as eager", EAGER, OURS_INPLACE, 9, at_least=True)
    for name, result_bytes in ((OURS, case.unit_bytes), (OURS_INPLACE, 0)):
        extra = next(row.extra_bytes for row in rows if row.provider == name)
        beyond = float("nan") if extra is None else (extra - result_bytes) / case.n
        allowed = BYTES_PER_ROW + BYTES_ONCE / case.n
        what = f"{name}: bytes per row beyond logits and gradient"
        found.append(Verdict(case.name, what, beyond, f"≤ {allowed:g}", beyond <= allowed))
    return found


def verdict_table(found: list[Verdict]) -> str:
    lines = ["| case | figure | measured | aim | |", "|---|---|---:|---:|---|"]
    for v in found:
        lines.append(f"| {v.case} | {v.what} | {v.value:.2f} | {v.aim} | {'met' if v.met else '**missed**'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every figure and sample there")
    parser.add_argument("--quick", action="store_true", help="small cases, 2 s each: shows that it runs")
    arguments = parser.parse_args()
    cases, budget = (QUICK, 2.0) if arguments.quick else (CASES, 12.0)
    facts = provenance("cpu")
    print(describe(facts))
    print("Medians of interleaved single calls; freeing results and refilling overwritten logits is not timed.")
    records, found, failures = [], [], []
    for case in cases:
        rows = measure(case, suite.providers(case, fresh_copy=True), FRESH_COPY, budget)
        found += verdicts(case, rows)
        records.append(as_json(case, rows))
        failures += [row.refused for row in rows if row.provider in (OURS, OURS_INPLACE)]
        print(f"\n{suite.markdown(case, rows)}", flush=True)
    print(f"\n{verdict_table(found)}")
    if facts["load average"] > 0.5:
        print(f"\nLoad average {facts['load average']}: others were at work, so these times are not to be quoted.")
    if arguments.quick:
        print("\nThe aims are stated for the full cases; --quick only shows that the comparison runs.")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"provenance": facts, "cases": records, "aims": [v._asdict() for v in found]}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nwritten to {arguments.out}")
    return 1 if any(failures) else 0


if __name__ == "__main__":
    raise SystemExit(main())
