"""Every comparison: groups of cases, the task that each is given to, its share of the time."""

from __future__ import annotations

from typing import Any

import torch

from . import first
from .harness import Case, Entry
from .linear import Linear
from .logits import Few, Logits
from .options import Layout, Options
from .training import TEMPERED, Distillation, Tempered, TrainingStep

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


# (rows, classes, rows of an image): segmentation, a mask, two and ten classes, two batches of CIFAR, 256 classes.
FEW = (
    (2**20, 19, 2**18), (2**20, 2, 2**18), (2_000_000, 2, 0), (500_000, 10, 0), (256, 10, 0), (4096, 100, 0),
    (20_000, 256, 0), (2**16, 256, 2**16),
)  # fmt: skip


def few_classes() -> list[Entry]:
    """Every kind of rows on all threads, and what PyTorch does fastest on one."""
    kinds: list[dict[str, Any]] = [{"dtype": t, "eps": e} for t in (F32, BF16) for e in (0.1, 0.0)]
    kinds += [{"dtype": t, "eps": 0.0, "threads": 1} for t in (F32, BF16)]
    return [Entry(Few(), Case("few classes", n, k, inner=i, **kind), 0.3) for kind in kinds for n, k, i in FEW]


SMOOTHED = ((1024, F32), (2048, BF16))  # a round of three takes two seconds


def cpu() -> list[Entry]:
    """Sizes that two cores go through in ten minutes."""
    bare = Logits(with_compile=False, with_peers=False)
    found = [
        Entry(Logits(with_peers=False, with_reference=k < 2**16), Case("logits", n, k, dtype=dtype), 2.5)
        for dtype in (F32, BF16)
        for n, k in ((1024, 32000), (512, 128256))
    ]
    found += [
        Entry(bare, Case("logits", 1024, 32000, dtype=F16)),
        Entry(bare, Case("logits", 1024, 32000, dtype=F32, backward=False)),
        Entry(bare, Case("logits", 1024, 32000, dtype=F32, data="zipf")),
        Entry(bare, Case("logits", 1024, 32000, dtype=F32, eps=0.0)),
    ]
    found += [Entry(bare, Case("few rows", n, 128256, dtype=F32), 0.5) for n in (8, 16, 128)]
    found += [Entry(bare, Case("growth in K", 128, k, dtype=F32), 0.7) for k in (1024, 8192, 32768, 131072, 2**20)]
    found += [Entry(bare, Case("growth in N", n, 32000, dtype=F32), 0.7) for n in (16, 64, 256, 1024, 4096)]
    calls = Logits(with_peers=False)
    found += [Entry(calls, Case("calls", n, k, dtype=F32), 0.7) for n, k in ((8, 1000), (64, 1000))]
    found += few_classes()
    found.append(Entry(Options(), Case("options", 1024, 32000, dtype=F32), 2))
    found += [
        Entry(Layout(16), Case("layouts", 1024, 32000, dtype=F32)),
        Entry(Layout(4096), Case("layouts", 4096, 8000, dtype=F32)),
    ]
    found.append(Entry(Distillation(), Case("distillation", 512, 32000, dtype=F32, eps=0.0)))
    found.append(Entry(Tempered(), Case(TEMPERED, 512, 32000, dtype=F32)))
    found.append(Entry(TrainingStep(), Case("training step", 512, 32000, 256, F32), 2))
    head, quick = Linear(with_peers=False), Linear(with_peers=False, with_chunks=False)
    found += [Entry(head, Case("linear", 2048, 32000, 512, t), 5) for t in (F32, BF16)]
    found += [Entry(quick, Case("linear", 256, 128256, 512, t), 2) for t in (F32, BF16)]
    found += [Entry(quick, Case("linear", 1024, 32000, 512, F32, backward=False))]
    found += [Entry(head, Case("linear", 512, 32000, 512, F32, data="zipf"), 1)]
    found += [Entry(Linear(own=True), Case("cost of smoothing", n, 32000, 512, t), 5) for n, t in SMOOTHED]
    found += [Entry(quick, Case("growth in D", 256, 32000, d, F32), 1) for d in (256, 1024, 2048)]
    return found


MODELS = {"Llama 3": (4096, 128256), "Gemma 2": (2304, 256000), "Qwen 2.5": (3584, 152064), "GPT-2": (768, 50257)}


def cuda() -> list[Entry]:
    """The most telling ones first: a run that is cut leaves what it has."""
    task, bare = Logits(), Logits(with_compile=False)
    found = [Entry(task, Case("logits", 8192, 128256, device="cuda"), 2)]
    found.append(Entry(Linear(with_compile=True), Case("linear", 8192, 128256, 4096, device="cuda"), 4))
    found += [Entry(bare, Case("few rows", n, 128256, device="cuda")) for n in (8, 16, 32, 128)]
    shapes = ((32768, 32000), (8192, 50257), (8192, 256000), (4096, 151936))
    found += [Entry(task, Case("logits", n, k, device="cuda"), 2) for n, k in shapes]
    for change in ({"dtype": F32}, {"dtype": F16}, {"backward": False}, {"eps": 0.0}, {"data": "zipf"}):
        found.append(Entry(bare, Case("logits", 8192, 128256, device="cuda", **change)))
    found += [Entry(bare, Case("growth in K", 2048, 2**e, device="cuda")) for e in range(10, 21, 2)]
    found += [Entry(bare, Case("growth in N", n, 128256, device="cuda")) for n in (64, 256, 1024, 4096, 16384)]
    found += [Entry(Linear(), Case("linear", n, 128256, 4096, device="cuda"), 2) for n in (1024, 4096, 16384)]
    found += [Entry(Linear(), Case("linear", 8192, k, d, device="cuda"), 2) for d, k in list(MODELS.values())[1:]]
    for change in ({"data": "zipf"}, {"backward": False}):
        found.append(Entry(Linear(), Case("linear", 8192, 128256, 4096, device="cuda", **change), 2))
    found.append(Entry(Linear(own=True), Case("cost of smoothing", 8192, 128256, 4096, device="cuda"), 2))
    found += [Entry(Linear(), Case("growth in D", 4096, 32000, d, device="cuda")) for d in (512, 1024, 2048, 8192)]
    found += [Entry(task, Case("calls", n, k, dtype=F32, device="cuda")) for n, k in ((8, 1000), (64, 1000))]
    found.append(Entry(Options(), Case("options", 8192, 32000, device="cuda"), 2))
    found.append(Entry(Layout(16), Case("layouts", 8192, 32000, device="cuda")))
    found.append(Entry(Distillation(), Case("distillation", 4096, 32000, device="cuda", eps=0.0)))
    found.append(Entry(Tempered(), Case(TEMPERED, 4096, 32000, device="cuda")))
    found.append(Entry(TrainingStep(), Case("training step", 8192, 128256, 1024, device="cuda")))
    return found


def smoke(device: str) -> list[Entry]:
    """Every task once, so small that it only shows that all of it runs; and one case large enough for a ratio."""
    bare = Logits(with_compile=False, with_peers=device == "cuda")
    at_logits = [Entry(bare, Case("logits", 16, 4096, dtype=t, device=device)) for t in (BF16, F16)]
    at_logits += [Entry(bare, Case("logits", 16, 4096, dtype=F32, device=device, backward=False))]
    at_logits += [Entry(bare, Case("logits", 64, 4096, dtype=F32, device=device, data="zipf"))]
    return [
        Entry(bare, Case("logits", 1024, 32000, dtype=F32, device=device), 6),
        *at_logits,
        Entry(Logits(with_peers=False), Case("calls", 8, 1000, dtype=F32, device=device)),
        *(Entry(Few(), Case("few classes", 2**14, 2, dtype=F32, device=device, inner=i)) for i in (0, 2**13)),
        Entry(Options(), Case("options", 32, 4096, dtype=F32, device=device)),
        Entry(Layout(16), Case("layouts", 64, 1000, dtype=F32, device=device)),
        Entry(Linear(with_peers=device == "cuda"), Case("linear", 96, 5000, 64, F32, device)),
        Entry(Linear(own=True), Case("cost of smoothing", 96, 5000, 64, BF16, device)),
        Entry(Distillation(), Case("distillation", 32, 4096, dtype=F32, device=device, eps=0.0)),
        Entry(Tempered(with_compile=False), Case(TEMPERED, 32, 4096, dtype=F32, device=device)),
        Entry(TrainingStep(32), Case("training step", 64, 1000, 64, F32, device)),
    ]


def peers(device: str) -> list[Entry]:
    """Every peer once: on a CPU through Triton's interpreter, to show that each is called as it is meant."""
    found = [
        Entry(Logits(False, interpreted=True), Case("peers", 8, 512, dtype=F32, device=device, eps=e)) for e in (0, 0.1)
    ]
    return [*found, Entry(Linear(interpreted=True), Case("peers", 32, 512, 64, F32, device))]


def entries(device: str, which: str) -> list[Entry]:
    if which == "full":
        return cuda() if device == "cuda" else cpu()
    return {"smoke": smoke, "peers": peers, "first": first.entries}[which](device)
