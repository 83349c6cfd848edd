"""``python -m bench run | compare | report``: measure, hold two runs against each other, draw and write."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import aims, host, report, results, suite
from .harness import Row, measure, reason, threads_of
from .logits import EAGER, INPLACE
from .training import RECOMPILATIONS, recompilations

if TYPE_CHECKING:
    from collections.abc import Iterator

# Of F.cross_entropy's time over ours, in place, at the smoke run's large case: half of what is aimed at. Out of place
# the system's search for huge pages, when others are at work, is slower than any kernel.
REGRESSION = 4.5
INCOMPLETE = 3  # the exit code where time ran out
BUSY = 0.5  # processes at work beside a run on a CPU, and for each core beside one on a GPU, spoil its times
LATE_S = 1.0  # less than this is left to no case


def wanted(arguments: argparse.Namespace, facts: dict[str, Any]) -> list[suite.Entry]:
    """The entries of the groups asked for, without those that an earlier, interrupted run of this commit measured."""
    entries = suite.entries(arguments.device, arguments.cases)
    known = {
        *(entry.case.group for entry in entries),
        RECOMPILATIONS,
        *(host.GROUPS if arguments.device == "cpu" else ()),
    }
    if unknown := set(arguments.group or ()) - known:
        raise SystemExit(f"--group {' '.join(sorted(unknown))}: there are {', '.join(sorted(known))}")
    done = results.measured(arguments.out, facts) if arguments.resume else set()
    chosen = [entry for entry in entries if not arguments.group or entry.case.group in arguments.group]
    return [entry for entry in chosen if (entry.case.group, entry.case.name) not in done]


def run(arguments: argparse.Namespace) -> int:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no CUDA device on this machine")
    facts = results.provenance(arguments.device, arguments.commit)
    print(results.describe(facts))
    deadline, records, left_out = time.monotonic() + 60 * arguments.minutes, [], []
    entries = wanted(arguments, facts)
    cold = None if arguments.cache is None else arguments.cache == "cold"
    for i, entry in enumerate(entries):
        left = deadline - time.monotonic()
        if left < LATE_S:
            left_out.append(f"{entry.case.group}: {entry.case.name}")
            continue
        share = left * entry.share / sum(e.share for e in entries[i:])
        try:
            with threads_of(entry.case):
                rows = measure(entry.case, entry.task, share, cold=cold, rotate=arguments.cache != "warm")
        except Exception as error:  # inputs that do not fit this machine; the other cases still may
            rows = [Row(entry.case.group, entry.case.name, "every provider", refused=reason(error))]
        records += add(arguments.out, rows, facts)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    for rows, changed in beside_entries(arguments):
        records += add(arguments.out, rows, facts | changed)
    found = aims.of(records)
    if found and arguments.cases == "full":
        print(f"\n{aims.table(found)}")
    if left_out:
        print("\nNo time was left for:\n" + "\n".join(left_out))
    if facts["load average"] > BUSY * ((os.cpu_count() or 1) if arguments.device == "cuda" else 1):
        print(f"\nLoad average {facts['load average']}: others were at work, so these times are not to be quoted.")
    print(f"\nadded to {arguments.out}")
    return verdict(records, arguments.cases) or (INCOMPLETE if left_out else 0)


def beside_entries(arguments: argparse.Namespace) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """What has no entry, because it is counted, or timed in a process of its own; what of its facts differs."""
    groups = {*(arguments.group or (RECOMPILATIONS, *host.GROUPS))}
    if RECOMPILATIONS in groups:
        yield recompilations(arguments.device), {}
    if arguments.device == "cpu" and groups & {*host.GROUPS}:
        yield [row for row in host.rows() if row.group in groups], {"threads": host.THREADS}


def add(path: Path, rows: list[Row], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Write rows, show them case by case, and return them."""
    records = results.append(path, rows, facts)
    for case in dict.fromkeys(results.key(r) for r in records):
        print(f"\n{report.of_case([r for r in records if results.key(r) == case]).markdown()}", flush=True)
    return records


def verdict(records: list[dict[str, Any]], cases: str) -> int:
    """1 where one of ours was refused, or where the smoke run shows that ours has lost its speed."""
    refused = [r for r in records if r["provider"].startswith("ours") and "refused" in r]
    refused = [r for r in refused if r["group"] not in host.GROUPS]  # no Triton, no compiler: nothing is wrong
    for row in refused:
        print(f"REFUSED {row['group']}, {row['case']}, {row['provider']}: {row['refused']}", file=sys.stderr)
    slow = False
    if cases == "smoke":
        first = {r["provider"]: r for r in records if results.key(r) == results.key(records[0])}
        ratio = aims.times(first, EAGER, INPLACE)
        slow = ratio is None or ratio < REGRESSION
        shown = "not measured" if ratio is None else f"{ratio:.1f}"
        print(f"{EAGER}'s time over ours, in place: {shown}; less than {REGRESSION} is a regression.")
    return 1 if refused or slow else 0


def compare(arguments: argparse.Namespace) -> int:
    try:
        print(results.compare(results.load(arguments.before), results.load(arguments.after)))
    except ValueError as error:
        raise SystemExit(f"compare: {error}") from None
    return 0


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"{text}: more than 0 and less than 10000 is allowed")
    return value


def existing(text: str) -> Path:
    if not Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text}: there is no such file or folder")
    return Path(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="measure, and add the figures to a file")
    one.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    one.add_argument(
        "--cases",
        default="full",
        choices=["full", "smoke", "peers", "first"],
        help="smoke: small, shows it runs; first: see first.py",
    )
    one.add_argument("--group", nargs="+", metavar="G", help="only these, such as logits or 'growth in K'")
    one.add_argument("--minutes", type=minutes, default=9.5, help="for all of it, about; default: %(default)s")
    one.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    one.add_argument("--resume", action="store_true", help="leave out what the file has of this commit and machine")
    one.add_argument(
        "--cache", choices=["cold", "warm"], help="before each call; default: cold on a GPU, else as it is"
    )
    one.add_argument("--commit", help="of the tree, where it is a copy without git")
    one.set_defaults(command=run)
    two = commands.add_parser("compare", help="times of AFTER over those of BEFORE, on one machine")
    two.add_argument("before", type=existing)
    two.add_argument("after", type=existing)
    two.set_defaults(command=compare)
    three = commands.add_parser("report", help="pictures, an HTML page and the README's tables from committed figures")
    three.add_argument(
        "--results", type=existing, default=results.FOLDER, help="a file or a folder; default: %(default)s"
    )
    three.add_argument("--out", type=Path, default=Path("out/bench"), help="of report.html; default: %(default)s")
    three.add_argument("--readme", action="store_true", help="also rewrite the README's tables and pictures")
    three.set_defaults(command=report.main)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    code: int = arguments.command(arguments)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
