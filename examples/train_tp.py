"""Trains a language model whose head is split over processes: the curve is that of one process.

The text is the demo's: the standard library, with a vocabulary of 32,000. The head's rows, one per word, are sharded
over the processes of the mesh dimension "classes"; the loss takes one small message per chunk of rows, and no process
ever holds a logit of another's words. With ``--data`` a second dimension shares out the text, and FSDP2 shards the rest
of the model, and each part of the head, over it. The mean is over all valid words, wherever they are.

    torchrun --standalone --nproc-per-node 2 examples/train_tp.py              # head over 2 processes
    torchrun --standalone --nproc-per-node 4 examples/train_tp.py --data 2     # 2 × 2
    torchrun ... examples/train_tp.py --vocabulary 4000 --steps 5              # seconds

gloo on CPUs, NCCL on GPUs. The first process also trains the whole model alone; exit code 1 if the curves differ.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from train_lm import WIDTH, Batch, LanguageModel, batches, read_words

import labelsmooth_kernels as lsk

EPS = 0.1


class Model(nn.Module):
    """The demo's model with a head of its own, and the loss."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.body = LanguageModel(vocabulary)
        self.loss = lsk.LinearCrossEntropyLoss(WIDTH, vocabulary, label_smoothing=EPS)

    def forward(self, words: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(self.body(words), target, normalizer=normalizer)
        return loss


# ---- the part to copy


def split(model: Model, mesh: DeviceMesh) -> None:
    """The head over "classes", everything over "data"."""
    head = model.loss.linear
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh["classes"], [Shard(0)]))
    if mesh["data"].size() > 1:
        fully_shard(model.loss, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])


def step(model: Model, optimizer: torch.optim.Optimizer, batch: Batch, mesh: DeviceMesh) -> Tensor:
    """One step on this process's share of a batch; its share of the loss, a mean over all of the batch."""
    words, target = batch
    count = lsk.parallel.token_count(target, mesh["data"].get_group()) / mesh["data"].size()  # FSDP averages gradients
    optimizer.zero_grad(set_to_none=True)
    loss = model(words, target, count)
    loss.backward()
    optimizer.step()
    return loss.detach()


def share(batch: Batch, mesh: DeviceMesh) -> Batch:
    rank, size = mesh["data"].get_local_rank(), mesh["data"].size()
    return batch[0].tensor_split(size)[rank], batch[1].tensor_split(size)[rank]


# ---- what it is compared with


def build(options: argparse.Namespace) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(options.vocabulary).to(options.device)
    return model, torch.optim.Adam(model.parameters(), lr=4e-3)


def alone(options: argparse.Namespace, data: list[Batch]) -> tuple[list[float], float]:
    """(losses, seconds per step) of one process with all of it."""
    model, optimizer = build(options)
    losses, begin = [], time.perf_counter()
    for words, target in data:
        optimizer.zero_grad(set_to_none=True)
        loss = model(words, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, (time.perf_counter() - begin) / len(data)


def together(options: argparse.Namespace, data: list[Batch], mesh: DeviceMesh) -> tuple[list[float], float, int]:
    """(losses, seconds per step, rows of the head that this process holds)"""
    model, _ = build(options)
    split(model, mesh)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    losses, begin = [], time.perf_counter()
    for batch in data:
        loss = step(model, optimizer, share(batch, mesh), mesh)
        dist.all_reduce(loss, group=mesh["data"].get_group())
        losses.append(loss.item() / mesh["data"].size())
    weight = model.loss.linear.weight
    return losses, (time.perf_counter() - begin) / len(data), len(weight.to_local())  # type: ignore[operator]


def run(options: argparse.Namespace) -> bool:
    mesh = init_device_mesh(
        options.device, (options.data, dist.get_world_size() // options.data), mesh_dim_names=("data", "classes")
    )
    data = batches(read_words(options.vocabulary)[0], options.steps, options.rows, options.device, seed=0)
    losses, seconds, rows = together(options, data, mesh)
    agree = torch.ones((), device=options.device)
    if dist.get_rank() == 0:
        want, slower = alone(options, data)
        off = max(abs(a - b) / b for a, b in zip(losses, want, strict=True))
        agree.fill_(float(off <= options.bound))
        shape = f"{options.data} × {mesh['classes'].size()}"
        print(f"{'step':>6} {'one process':>14} {shape + ' processes':>18}")
        for i in sorted({*range(0, len(want), max(1, len(want) // 8)), len(want) - 1}):
            print(f"{i + 1:6} {want[i]:14.6f} {losses[i]:18.6f}")
        print(f"a step: {slower:.3f} s alone, {seconds:.3f} s together; rows of the head here: {rows}")
        print(f"losses differ by {off:.1e} at most: {'one curve' if agree else f'NOT WITHIN {options.bound:g}'}")
    dist.broadcast(agree, 0)
    return bool(agree)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=int, default=1, help="processes that share out the text (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=16, help="windows of 64 words in a batch (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="(%(default)s)")
    parser.add_argument("--bound", type=float, default=1e-4, help="on the losses' relative difference (%(default)s)")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start it by torchrun, as its first lines show")
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])  # a GPU for each process, or none
    options.device = "cuda" if enough else "cpu"
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group(timeout=timedelta(minutes=10))
    size = dist.get_world_size()
    if options.data < 1 or size % options.data:
        parser.error(f"--data must divide the {size} processes, got {options.data}")
    try:
        agree = run(options)
    finally:
        dist.destroy_process_group()
    raise SystemExit(0 if agree else 1)


if __name__ == "__main__":
    main()
