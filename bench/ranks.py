"""``python -m bench.ranks``: what the loss over ranks sends and should cost, on paper; and, with ``--measure``, takes.

On paper. A rank of R holds K/R columns of N rows, in bfloat16; it reads them in the forward and reads and writes them
in the backward, 6·N·K/R bytes at the speed of a copy (an H200's, measured: 4.3 TB/s). A message takes

    latency·steps + bytes that a rank receives / bandwidth      steps: log2 R for a gather, twice that for an all-reduce

with 450 GB/s within a node of 8 (NVLink 4, one direction, data sheet), 50 GB/s between nodes (400 Gb/s per GPU), and 3
and 8 µs a step, which are assumptions: to be replaced by measured ones. Ours: up to ``MANY`` ranks one all-gather of 4
float32 per row from each rank, beyond it an all-to-all of these and an all-gather of 6 float64 per row. Megatron-LM and
``loss_parallel``: three all-reduces of a float32 per row (both without correct smoothing; Σ z would be a fourth).

Measured. Forward and backward of logits on processes of this machine: gloo on CPU threads, or NCCL where there are two
GPUs or more. gloo's figures say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel, ranks

from . import results

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import DeviceMesh

COPY = 4.3e12  # bytes per second
OURS, OURS_ONCE, THREE = "ours", "ours, one message", "three all-reduces"


class Link(NamedTuple):
    bandwidth: float
    latency: float


NODE, NETWORK = Link(450e9, 3e-6), Link(50e9, 8e-6)


class Message(NamedTuple):
    steps: int
    received: float
    """bytes, by one rank"""

    def seconds(self, link: Link) -> float:
        return self.steps * link.latency + self.received / link.bandwidth


def messages(who: str, size: int, rows: int) -> list[Message]:
    """Of one forward; the backward at the logits needs none."""
    hops, others = math.ceil(math.log2(size)), (size - 1) / size
    if who == THREE:
        return [Message(2 * hops, 2 * 4 * rows * others)] * 3
    if who == OURS_ONCE or size <= ranks.MANY:
        return [Message(hops, 16 * rows * (size - 1))]
    return [Message(hops, 16 * rows * others), Message(hops, 48 * rows * others)]


def kernels(size: int, rows: int, classes: int) -> float:
    return 3 * 2 * rows * classes / size / COPY


def paper(rows: int, classes: int) -> str:
    lines = [
        f"N = {rows:,}, K = {classes:,}, bfloat16",
        "",
        "| ranks | kernels, µs | ours: messages | kB | µs | one message, µs | three all-reduces: kB | µs "
        "| a step: ours, µs | with three all-reduces |",
        "|---:" * 10 + "|",
    ]
    for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
        link, step = NODE if size <= 8 else NETWORK, kernels(size, rows, classes)
        sent = {who: messages(who, size, rows) for who in (OURS, OURS_ONCE, THREE)}
        kilobytes = {who: sum(m.received for m in sent[who]) / 1e3 for who in sent}
        seconds = {who: sum(m.seconds(link) for m in sent[who]) for who in sent}
        numbers = (step, seconds[OURS], seconds[OURS_ONCE], seconds[THREE], step + seconds[OURS], step + seconds[THREE])
        kernel, ours, once, three, our_step, their_step = (f"{number * 1e6:,.0f}" for number in numbers)
        lines.append(
            f"| {size} | {kernel} | {len(sent[OURS])} | {kilobytes[OURS]:,.0f} | {ours} | {once} "
            f"| {kilobytes[THREE]:,.0f} | {three} | {our_step} | {their_step} |"
        )
    return "\n".join(lines)


# ---- measured


def measure(rank: int, size: int, rows: int, classes: int, store: str) -> None:
    device = "cuda" if torch.cuda.device_count() >= size else "cpu"
    if device == "cuda":
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, torch.get_num_threads() // size))
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=size)
    seconds = timed(calls(init_device_mesh(device, (size,)), rows, classes), device)
    if rank == 0:
        print(f"\n{size} processes, {backend}: {rows:,} × {classes:,}, float32, forward and backward\n")
        print("| | ms, median of 10 |\n|---|---:|")
        for name, taken in seconds.items():
            print(f"| {name} | {taken * 1e3:.1f} |")
        print(f"\n{results.describe(results.provenance(device))}")
    dist.destroy_process_group()


def calls(mesh: DeviceMesh, rows: int, classes: int) -> dict[str, Callable[[], object]]:
    """Forward and backward, by name; the last one by the first process alone."""
    rng = torch.Generator().manual_seed(0)
    whole = torch.randn(rows, classes, generator=rng).to(mesh.device_type)
    target = torch.randint(classes, (rows,), generator=rng).to(mesh.device_type)
    placed = distribute_tensor(whole, mesh, [Shard(1)]).requires_grad_()
    mine, alone = placed.to_local().detach().clone().requires_grad_(), whole.clone().requires_grad_()

    def ours(eps: float) -> None:
        torch.autograd.grad(parallel.cross_entropy(mine, target, label_smoothing=eps, group=mesh.get_group()), mine)

    def theirs() -> None:
        with loss_parallel():
            torch.autograd.grad(F.cross_entropy(placed, target), placed)

    def one() -> None:
        if mesh.get_rank() == 0:
            torch.autograd.grad(lsk.cross_entropy(alone, target, label_smoothing=0.1), alone)

    return {
        "ours, ε = 0.1": partial(ours, 0.1),
        "ours, ε = 0": partial(ours, 0.0),
        "loss_parallel, ε = 0": theirs,
        "ours, one process with all classes": one,
    }


def timed(cases: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Medians of 10 rounds, two before them not counted, in which all take turns."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(12):
        for name, case in cases.items():
            dist.barrier()
            begin = time.perf_counter()
            case()
            if device == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(seconds[2:]) for name, seconds in taken.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="of the table on paper; default: %(default)s")
    parser.add_argument("--classes", type=int, default=262_144, help="default: %(default)s")
    parser.add_argument("--measure", type=int, metavar="PROCESSES", help="also on this machine, 1024 × 32,000")
    arguments = parser.parse_args()
    print(paper(arguments.rows, arguments.classes))
    if arguments.measure is not None:
        if arguments.measure < 2:
            parser.error(f"--measure needs 2 processes or more, got {arguments.measure}")
        with tempfile.TemporaryDirectory() as folder:
            given = (arguments.measure, 1024, 32_000, str(Path(folder, "store")))
            torch.multiprocessing.spawn(measure, given, arguments.measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
