"""Rows of figures as JSON lines: each carries where it comes from, files are only appended to, machines never mixed."""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .harness import Row

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results"
MACHINE = ("device", "cpu", "cpu capability", "threads")  # what two rows must share to be compared
SHOWN = (*MACHINE, "driver", "torch", "triton", "python", "commit", "date", "load average")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The commit of the tree that is measured, marked where files differ from it; None outside a git checkout.

    Results do not count: they are what a run leaves.
    """
    head = _output("git", "rev-parse", "--short", "HEAD")
    changed = _output("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return f"{head}+changes" if head and changed else head


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, software, commit (which a copy without git is told) and UTC time of a run: what every row carries."""
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "driver": driver if device == "cuda" else None,
        "cpu": _cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "load average": round(os.getloadavg()[0], 1),  # before the run: others on the machine spoil a time
    }


def describe(facts: dict[str, Any]) -> str:
    return " · ".join(f"{name}: {facts[name]}" for name in SHOWN if facts.get(name) is not None)


def rounded(value: Any) -> Any:
    """Five digits of a float: what a file of figures is read for."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def append(path: Path, rows: Iterable[Row], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Add rows to a file, one line each, and return them as they were written."""
    records = [{k: rounded(v) for k, v in asdict(row).items() if v is not None} | facts for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return records


def load(*paths: Path) -> list[dict[str, Any]]:
    """The rows of files and folders, oldest first."""
    files = [f for path in paths for f in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
    rows = [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").splitlines()]
    return sorted(rows, key=lambda row: row["date"])


def key(row: dict[str, Any]) -> tuple[str, str]:
    return row["group"], row["case"]


def measured(path: Path, facts: dict[str, Any]) -> set[tuple[str, str]]:
    """The cases that a file holds of the same machine, software and commit: what an interrupted run need not repeat."""
    same = (*MACHINE, "commit", "torch", "triton")
    rows = load(path) if path.exists() else []
    return {key(row) for row in rows if all(row.get(name) == facts[name] for name in same)}


def newest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every case the rows of its last run, so that no table mixes runs inside a case."""
    last = {key(row): row["date"] for row in rows}
    return [row for row in rows if row["date"] == last[key(row)]]


def machine(rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """The one machine of the rows; ValueError if there are two, or none."""
    machines = {tuple(row.get(name) for name in MACHINE) for row in rows}
    if len(machines) != 1:
        found = "; ".join(str(dict(zip(MACHINE, m, strict=True))) for m in sorted(machines, key=str)) or "no rows"
        raise ValueError(f"figures of one machine are needed, to be compared: {found}")
    return machines.pop()


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """A table of times after over times before, of the rows that both have; ValueError for two machines."""
    machine([*before, *after])
    old, new = ({(*key(row), row["provider"]): row for row in newest(rows)} for rows in (before, after))
    lines = ["| group | case | provider | before, ms | after, ms | after / before |", "|---|---|---|---:|---:|---:|"]
    for name in (name for name in new if name in old):
        a, b = old[name].get("ms"), new[name].get("ms")
        if a and b:
            lines.append(f"| {' | '.join(name)} | {a:.4g} | {b:.4g} | {b / a:.2f} |")
    commits = (", ".join(sorted({str(row["commit"]) for row in rows.values()})) for rows in (old, new))
    return "before: {}; after: {}\n\n".format(*commits) + "\n".join(lines)
