"""Gradient accumulation and data parallelism whose gradients are those of one large batch, whatever is padding.

The loss of a step is a mean over the valid tokens of the whole step: Σ over tokens of loss / number of valid tokens. A
mean per micro-batch has another denominator in each, so that a token in a short micro-batch weighs more than one in a
long one, and a micro-batch of padding alone is 0/0. ``normalizer`` takes the denominator from outside: the valid tokens
of all micro-batches and processes, counted once per step before the first forward, on the device, without a sync.

DistributedDataParallel averages gradients over the processes where this sum needs them added, hence count / processes.
(So does FullyShardedDataParallel. Where a communication hook adds them, pass the count itself.)

    python examples/data_parallel.py                                            # one process
    python examples/data_parallel.py --processes 2                              # starts two of its own
    torchrun --standalone --nproc-per-node 2 examples/data_parallel.py

prints what each way of cutting a step up does to its gradients; exit code 1 if the exact ways change them.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import labelsmooth_kernels as lsk

EPS, PADDING = 0.1, -100
SEQUENCES, LENGTH, VOCABULARY, WIDTH = 32, 24, 211, 32
Batch = tuple[Tensor, Tensor]


# ---- the part to copy


def valid_tokens(micro_batches: list[Batch]) -> Tensor:
    """How many targets of each micro-batch count, on their device."""
    return torch.stack([(target != PADDING).sum() for _, target in micro_batches])


def shared_denominators(micro_batches: list[Batch], processes: int) -> list[Tensor]:
    """What every micro-batch's loss is divided by: the whole step's valid tokens, over the processes DDP averages."""
    count = valid_tokens(micro_batches).sum()
    if processes > 1:
        dist.all_reduce(count)
    return [count.clamp_min(1) / processes] * len(micro_batches)  # a step of padding alone has gradient 0


def accumulate(model: nn.Module, micro_batches: list[Batch], denominators: list[Tensor]) -> Tensor:
    """Add the gradient of one step's loss to the parameters' and return this process's part of that loss."""
    losses = []
    for i, (words, target) in enumerate(micro_batches):
        is_last = i + 1 == len(micro_batches)  # one exchange of gradients per step is enough
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not is_last else nullcontext():
            loss = lsk.cross_entropy(
                model(words), target, class_dim=-1, label_smoothing=EPS, normalizer=denominators[i]
            )
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


# ---- what it is compared with


def own_denominators(micro_batches: list[Batch], processes: int) -> list[Tensor]:
    """The mean of the micro-batches' means, as without ``normalizer``, but padding alone counts as 0, not as NaN."""
    return [count.clamp_min(1) * len(micro_batches) for count in valid_tokens(micro_batches)]


def one_step() -> Batch:
    """Words and the next words (SEQUENCES, LENGTH): of all lengths, and four sequences of nothing but padding."""
    rng = torch.Generator().manual_seed(0)
    words = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1), generator=rng)
    lengths = torch.randint(1, LENGTH + 1, (SEQUENCES, 1), generator=rng).sort(0).values
    lengths[4:8] = 0
    target = words[:, 1:].masked_fill(torch.arange(LENGTH) >= lengths, PADDING)
    return words[:, :-1], target


def cut(batch: Batch, pieces: int, rank: int = 0, processes: int = 1) -> list[Batch]:
    """The micro-batches of one process: its share of the sequences in ``pieces``."""
    words, target = (tensor.tensor_split(processes)[rank].tensor_split(pieces) for tensor in batch)
    return list(zip(words, target, strict=True))


def train(micro_batches: list[Batch], processes: int = 1, naive: bool = False, steps: int = 1) -> tuple[Tensor, Tensor]:
    """(the last step's gradient as one vector, its loss), after as many steps of gradient descent."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY)
    )
    parallel = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(steps):
        denominators = (own_denominators if naive else shared_denominators)(micro_batches, processes)
        optimizer.zero_grad()
        loss = accumulate(parallel, micro_batches, denominators)
        optimizer.step()
    if processes > 1:
        dist.all_reduce(loss)
    return nn.utils.parameters_to_vector([p.grad for p in model.parameters()]), loss / processes


def report(rank: int, processes: int, steps: int, bound: float) -> bool:
    """Print the table (the first process does); whether every exact way of cutting a step up agrees with the whole."""
    batch = one_step()
    ways = [("8 micro-batches", cut(batch, 8), 1)]
    if processes > 1:
        ways.append((f"{processes} processes, 4 micro-batches each", cut(batch, 4, rank, processes), processes))
    whole, whole_loss = train(cut(batch, 1), steps=steps)
    lines, agree = [f"{'the whole batch':52} {whole_loss:10.6f}"], True
    for naive in (False, True):
        for name, micro_batches, used in ways:
            gradient, loss = train(micro_batches, used, naive, steps)
            difference = ((gradient - whole).abs().max() / whole.abs().max()).item()
            agree = agree and (naive or difference <= bound)
            lines.append(f"{name + (', mean of means' if naive else ''):52} {loss:10.6f} {difference:12.1e}")
    if rank == 0:
        print(f"valid tokens of the 8 micro-batches: {valid_tokens(cut(batch, 8)).tolist()}; step {steps}:")
        print(f"{'':52} {'loss':>10} {'gradient off by':>16}   (of its largest entry)")
        print("\n".join(lines))
        print(f"the exact ways are {'within' if agree else 'NOT WITHIN'} {bound:g} of the whole batch")
    return agree


# ---- starting processes


def run(rank: int, options: argparse.Namespace, init_method: str | None) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(getattr(torch, options.dtype))
    processes = 1
    if init_method is not None:
        world = {"rank": rank, "world_size": options.processes} if init_method.startswith("file") else {}
        dist.init_process_group("gloo", init_method, timedelta(seconds=60), **world)
        rank, processes = dist.get_rank(), dist.get_world_size()
    try:
        agree = report(rank, processes, options.steps, options.bound)
    finally:
        if init_method is not None:
            dist.destroy_process_group()
    if not agree:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="to start; torchrun starts its own (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="of gradient descent (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="(%(default)s)")
    parser.add_argument("--bound", type=float, default=1e-5, help="on the exact ones' difference (%(default)s)")
    options = parser.parse_args()
    if options.processes < 1 or options.steps < 1:
        parser.error("--processes and --steps must be at least 1")
    if dist.is_available() and dist.is_torchelastic_launched():
        run(0, options, "env://")
    elif options.processes == 1:
        run(0, options, None)
    else:
        with tempfile.TemporaryDirectory() as folder:
            meeting = Path(folder, "meeting").as_uri()
            torch.multiprocessing.spawn(run, (options, meeting), options.processes)


if __name__ == "__main__":
    main()
