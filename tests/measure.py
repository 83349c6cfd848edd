"""What the suite costs and covers, as tables for CONTRIBUTING.

``python tests/measure.py minutes out/test.xml`` adds up the seconds of every file (its set-up among them).
``python tests/measure.py pairs`` collects the suite, thinned and whole, and counts the distinct combinations of
backend, option, direction, dtype and layout that its parameters name, and the distinct pairs of those.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import os
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import covering
import pytest
import torch

HERE = Path(__file__).resolve().parent
# What a parameter says by its name. A place is (backend, device); a case of the table has traits; the rest is a value.
KINDS = {
    "backend": "backend place fast_place served",
    "option": "case options option mix name kind probabilities weighted method smoothing eps softcap target",
    "direction": "direction reduction inplace form use_reentrant trained",
    "dtype": "dtype",
    "layout": "layout view class_dim expanded shape strides offset",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}


def minutes(path: Path) -> None:
    """Print tests and seconds per file, the slowest first."""
    seconds: collections.Counter[str] = collections.Counter()
    tests: collections.Counter[str] = collections.Counter()
    for case in ElementTree.parse(path).iter("testcase"):
        file = case.get("classname", "").rpartition(".")[2]
        seconds[file] += float(case.get("time", 0))
        tests[file] += 1
    print("| file | tests | s |\n|---|--:|--:|")
    for file, taken in seconds.most_common():
        print(f"| {file} | {tests[file]:,} | {taken:.0f} |")
    print(f"| all, in one process | {tests.total():,} | {seconds.total():.0f} |")


def said_by(item: pytest.Item) -> dict[str, frozenset[Any]]:
    """The values of each kind that a test's parameters name; those of a case are its traits."""
    said: dict[str, set[Any]] = collections.defaultdict(set)
    callspec = getattr(item, "callspec", None)
    for name, value in callspec.params.items() if callspec else ():
        if kind := KIND_OF.get(name):
            if kind == "backend":
                said[kind].add(value[0] if isinstance(value, tuple) else value)
            elif hasattr(value, "traits"):
                said[kind] |= value.traits()
            else:
                plain = isinstance(value, (str, bool, int, float, torch.dtype))
                said[kind].add(f"{name} {value}" if plain else (item.name.partition("[")[0], name, covering.key(value)))
    return {kind: frozenset(values) for kind, values in said.items()}


class Counts:
    """A plugin that counts what the collected tests say."""

    def __init__(self) -> None:
        self.tests, self.whole, self.pairs = 0, set[Any](), set[Any]()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tests = len(session.items)
        for item in session.items:
            function, said = item.nodeid.partition("[")[0], said_by(item)
            values = [said.get(kind, frozenset([None])) for kind in KINDS]
            self.whole |= {(function, *combination) for combination in itertools.product(*values)}
            named = [(kind, value) for kind, of in said.items() for value in of]
            self.pairs |= {frozenset(pair) for pair in itertools.combinations(named, 2) if pair[0][0] != pair[1][0]}


def pairs() -> None:
    """Print the counts of the thinned suite beside those of the whole one."""
    found = []
    for arguments in ([], ["--whole"]):
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:  # a second collection in one process would find the modules of the first
            counts = Counts()
            sys.path.insert(0, str(HERE.parent))  # for the tests of bench
            with contextlib.redirect_stdout(io.StringIO()) as said:
                status = pytest.main(["--collect-only", "-q", str(HERE), *arguments], plugins=[counts])
            os.write(writer, f"{counts.tests} {len(counts.whole)} {len(counts.pairs)}".encode())
            if status:
                print(said.getvalue(), file=sys.stderr)
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the suite cannot be collected")
        found.append([int(number) for number in os.read(reader, 100).split()])
    print("| | `make test` | `make test-all` |\n|---|--:|--:|")
    names = ("tests", "distinct (test, backend, option, direction, dtype, layout)", "distinct pairs of two of these")
    for name, *numbers in zip(names, *found, strict=True):
        print(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["minutes", "pairs"])
    parser.add_argument("xml", nargs="?", type=Path)
    given = parser.parse_args()
    minutes(given.xml) if given.what == "minutes" else pairs()
