"""``python -m bench.parity``: each backend, dtype and shape against float64, a fault or a hang costing one row each.

A worker process serves one backend and dtype, shape by shape. When it dies, or a shape takes longer than its limit, the
shape's row says so and a new worker goes on with the next one: after a fault nothing on that process's device works.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO

import torch

from . import results
from .harness import SHORT, Case, Provider, Row, Task, gate, losing, reason
from .linear import Linear
from .linear import ours as our_head
from .logits import Logits, ours

GROUP = "parity"
# Warps to a row, blocks to a row, unaligned rows, few rows, one block and a cluster to a row, and rows that no cluster
# holds: few, which are cut into parts, and many, which are read twice.
SHAPES = (
    *((6, 37), (64, 1000), (300, 50257), (3, 128256), (300, 4096), (300, 32000), (300, 128256)),
    *((3, 600_001), (140, 300_000)),
)
HEADS = ((512, 5000, 64), (512, 32000, 512))
SMALL, SMALL_HEADS = ((6, 37), (5, 1000)), ((256, 500, 16),)
HEAD = "head"
FATAL = "CUDA error"  # after which nothing works in that process
START_S = 40.0  # a worker imports torch and makes a context, and Triton compiles for the first time


VARIANTS = {"gradient": True, "loss": False}


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one worker serves."""

    backend: str
    dtype: torch.dtype
    variant: str  # one of VARIANTS, or the method of a head
    device: str

    @property
    def word(self) -> str:
        return f"{self.backend}:{SHORT[self.dtype]}:{self.variant}:{self.device}"

    @staticmethod
    def of(word: str) -> Piece:
        backend, dtype, variant, device = word.split(":")
        return Piece(backend, {short: full for full, short in SHORT.items()}[dtype], variant, device)

    def checks(self) -> list[tuple[Task, Case, Provider]]:
        on_gpu = self.device == "cuda"
        case = Case(GROUP, 0, 0, dtype=self.dtype, device=self.device, backward=VARIANTS.get(self.variant, True))
        if self.backend == HEAD:
            task: Task = Linear()
            cases = [dataclasses.replace(case, n=n, k=k, d=d) for n, k, d in (HEADS if on_gpu else SMALL_HEADS)]
            loss = our_head(method=self.variant)
        else:
            task = Logits()
            cases = [dataclasses.replace(case, n=n, k=k) for n, k in (SHAPES if on_gpu else SMALL)]
            loss = ours(backend=self.backend)
        name = f"{self.backend}, {SHORT[self.dtype]}, {self.variant}"
        return [(task, each, losing(name, loss, each, exact=True)) for each in cases]


def pieces(device: str) -> list[Piece]:
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    variants = {name: tuple(VARIANTS) for name in (("triton", "cuda") if device == "cuda" else ("cpu",))}
    variants[HEAD] = ("chunked", "tiled") if device == "cuda" else ("chunked",)
    return [Piece(name, t, variant, device) for t in dtypes for name, found in variants.items() for variant in found]


def work(piece: Piece, first: int) -> None:
    """The worker: a JSON row per check on standard output, from check number ``first`` on."""
    for task, case, provider in piece.checks()[first:]:
        row = Row(GROUP, case.name, provider.name)
        try:
            row.errors, row.refused = gate(task, case, provider, task.inputs(case, 0))
            if case.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            row.refused = reason(error)
        print(json.dumps(dataclasses.asdict(row)), flush=True)


class Worker:
    """The process that serves a piece from check number ``first`` on."""

    def __init__(self, piece: Piece, first: int) -> None:
        command = [sys.executable, "-m", "bench.parity", "--work", piece.word, str(first)]
        self.process = subprocess.Popen(
            command, cwd=results.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.rows: queue.Queue[str | None] = queue.Queue()
        self.said: collections.deque[str] = collections.deque(maxlen=20)
        threading.Thread(target=self._read_rows, daemon=True).start()
        self.listener = threading.Thread(
            target=lambda: self.said.extend(self._stream(self.process.stderr)), daemon=True
        )
        self.listener.start()

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream

    def _read_rows(self) -> None:
        for line in self._stream(self.process.stdout):
            if line.startswith("{"):
                self.rows.put(line)
        self.rows.put(None)

    def next_row(self, limit_s: float) -> Row | str:
        """The next row, or why there is none."""
        try:
            line = self.rows.get(timeout=limit_s)
        except queue.Empty:
            return f"it hung: nothing came for {limit_s:.0f} s"
        if line is not None:
            return Row(**json.loads(line))
        code = self.process.wait()
        self.listener.join(timeout=5)
        last = next((text.strip() for text in reversed(self.said) if text.strip()), "")
        return f"its process ended with code {code}: {last[:160]}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def supervise(piece: Piece, limit_s: float) -> list[Row]:
    """Every row of a piece, through as many workers as it takes."""
    rows: list[Row] = []
    checks = piece.checks()
    while len(rows) < len(checks):
        worker, left = Worker(piece, len(rows)), START_S + limit_s
        while len(rows) < len(checks):
            row = worker.next_row(left)
            left = limit_s
            if isinstance(row, str):
                _, case, provider = checks[len(rows)]
                rows.append(Row(GROUP, case.name, provider.name, refused=row))
                break
            rows.append(row)
            if FATAL in (row.refused or ""):
                break
        worker.end()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds of one check; default: %(default)s")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="default: %(default)s")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    parser.add_argument("--work", nargs=2, metavar=("PIECE", "FIRST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(Piece.of(arguments.work[0]), int(arguments.work[1]))
        return 0
    facts = results.provenance(arguments.device, arguments.commit)
    wrong = count = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(supervise, piece, arguments.limit) for piece in pieces(arguments.device)]
        for future in as_completed(futures):
            for record in results.append(arguments.out, future.result(), facts):
                count += 1
                if "refused" in record:
                    wrong += 1
                    print(f"{record['provider']}: {record['case']}: {record['refused']}", flush=True)
    print(f"{count - wrong} of {count} agree with float64")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
