"""Trains a small language model three times, with F.cross_entropy and two losses of labelsmooth_kernels: one curve.

The text is on every machine: the sources and documentation of the Python standard library, as words and punctuation,
with a vocabulary of 32,000. The model is small (tied embedding, one causal convolution), so that its head and its loss
are most of a step, as large vocabularies make them. All runs have the same seed and batches and take their steps in
turn, so that whatever else the machine does slows all alike. Then one head and loss under a memory limit that the
logits alone exceed, measured and not enforced: the full run allocates 3 GB there.

    python examples/train_lm.py                 # a few minutes on two CPU cores; pictures in out/demo
    python examples/train_lm.py --quick         # about a minute
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import matplotlib as mpl
    from tqdm import tqdm

    mpl.use("Agg")
    import matplotlib.pyplot as plt
except ImportError as error:
    raise SystemExit(f"{error}: this demo draws pictures and progress bars; pip install matplotlib tqdm") from error

import labelsmooth_kernels as lsk

EPS, WIDTH, LENGTH = 0.1, 128, 64
CHUNK = 384  # rows whose logits the fused loss holds at a time: its default on a CPU (a GPU's is 2048)
LARGE_VOCABULARY = 128_256
PYTORCH, OURS, INPLACE = "F.cross_entropy", "lsk.cross_entropy", "lsk.cross_entropy, inplace"
FUSED = "lsk.linear_cross_entropy"
TRAINED = (PYTORCH, OURS, FUSED)
COLOURS = {PYTORCH: "#d55e00", OURS: "#4a90d9", INPLACE: "#b3d4f2", FUSED: "#00573f"}
Batch = tuple[Tensor, Tensor]
Loss = Callable[..., Any]
LOSSES: dict[str, Loss] = {
    PYTORCH: partial(F.cross_entropy, label_smoothing=EPS),
    OURS: partial(lsk.cross_entropy, label_smoothing=EPS),
    INPLACE: partial(lsk.cross_entropy, label_smoothing=EPS, inplace=True),
    FUSED: partial(lsk.linear_cross_entropy, label_smoothing=EPS, chunk_rows=CHUNK),
}


def head_and_loss(name: str, hidden: Tensor, weight: Tensor, target: Tensor, **options: bool) -> Any:
    """The fused loss is given what the head is given; the others take the logits that the head makes."""
    given = (hidden, weight) if name == FUSED else (hidden @ weight.T,)
    return LOSSES[name](*given, target, **options)


def read_words(vocabulary: int) -> list[Tensor]:
    """[training, validation] words as indices; every 20th file is held out; words too rare for the vocabulary are 0."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    wanted = (p for p in sorted(folder.rglob("*")) if p.suffix in {".py", ".rst", ".txt"} and p.is_file())
    files = [p for p in wanted if not {"site-packages", "dist-packages"} & set(p.parts)]
    parts: tuple[list[str], list[str]] = ([], [])
    for i, path in enumerate(tqdm(files, desc="reading the standard library", unit="file")):
        parts[i % 20 == 19].extend(re.findall(r"\w+|[^\w\s]", path.read_text(encoding="utf-8", errors="replace")))
    common = Counter(parts[0]).most_common(vocabulary - 1)
    if len(common) < vocabulary - 1:
        raise SystemExit(f"--vocabulary {vocabulary} is more than the {len(common) + 1} distinct words under {folder}")
    index = {word: i for i, (word, _) in enumerate(common, start=1)}
    return [torch.tensor([index.get(word, 0) for word in part]) for part in parts]


def batches(words: Tensor, count: int, rows: int, device: str, seed: int) -> list[Batch]:
    """Random windows of the text: input (rows, LENGTH) and target (rows·LENGTH,), one word ahead."""
    starts = torch.randint(len(words) - LENGTH, (count, rows, 1), generator=torch.Generator().manual_seed(seed))
    windows = words[starts + torch.arange(LENGTH + 1)].to(device)
    return [(window[:, :-1], window[:, 1:].reshape(-1)) for window in windows]


class LanguageModel(nn.Module):
    """Words (B, T) to hidden states (B·T, WIDTH) from the last 8 words; the head is the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.layer = nn.Conv1d(WIDTH, WIDTH, kernel_size=8)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embedding(words).mT
        hidden = embedded + F.gelu(self.layer(F.pad(embedded, (7, 0))))
        return hidden.mT.flatten(0, 1)


@dataclass
class Run:
    """Per step the loss and the seconds; in the end NLL (nats per word) and accuracy of the held-out part."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: tuple[float, float] = (0.0, 0.0)

    def step(self, name: str, words: Tensor, target: Tensor) -> None:
        begin = now(words)
        self.optimizer.zero_grad(set_to_none=True)
        loss = head_and_loss(name, self.model(words), self.model.embedding.weight, target)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(now(words) - begin)
        self.losses.append(loss.item())


def now(tensor: Tensor) -> float:
    """Seconds, once the tensor's device has done what it was given."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def evaluate(name: str, model: LanguageModel, held_out: list[Batch]) -> tuple[float, float]:
    """(NLL, accuracy): PyTorch passes over the logits for each of them, ours have both from the loss's own pass."""
    nll = hits = 0.0
    for words, target in tqdm(held_out, desc=f"held-out part, {name}", unit="batch"):
        hidden, weight = model(words), model.embedding.weight
        if name == PYTORCH:
            logits = hidden @ weight.T
            nlls, prediction = F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)
        else:
            _, stats = head_and_loss(name, hidden, weight, target, return_stats=True)
            nlls, prediction = stats.nll, stats.prediction
        nll += nlls.mean().item()
        hits += (prediction == target).float().mean().item()
    return nll / len(held_out), hits / len(held_out)


def train(options: argparse.Namespace, data: list[Batch], held_out: list[Batch]) -> dict[str, Run]:
    runs = {}
    for name in TRAINED:
        torch.manual_seed(0)
        model = LanguageModel(options.vocabulary).to(options.device)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=4e-3))
    with tqdm(data, desc="training all three", unit="step") as bar:
        for words, target in bar:
            for name, run in runs.items():
                run.step(name, words, target)
            bar.set_postfix_str(" ".join(f"{run.losses[-1]:.4f}" for run in runs.values()))
    for name, run in runs.items():
        run.held_out = evaluate(name, run.model, held_out)
    return runs


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Peak of the memory that a step allocates, results included, as the CUDA allocator or the profiler records it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(str(Path(folder, "trace.json")))
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate(change["args"]["Bytes"] for change in changes))


@dataclass
class Cost:
    """Forward and backward: seconds of the loss on given logits, seconds of head + loss, peak bytes of the latter."""

    alone: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)
    peak: int = 0


def operands(rows: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, head and target; the logits have a variance of 1."""
    hidden = torch.randn(rows, WIDTH, device=device, requires_grad=True)
    weight = (torch.randn(classes, WIDTH, device=device) * WIDTH**-0.5).requires_grad_()
    return hidden, weight, torch.randint(classes, (rows,), device=device)


def gradients(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(head_and_loss(name, hidden, weight, target), (hidden, weight))


def head_peak(name: str, hidden: Tensor, weight: Tensor, target: Tensor) -> int:
    """Peak bytes of head + loss less those of the two gradients, which every loss has to return."""
    step = partial(gradients, name, hidden, weight, target)
    return peak_bytes(step, hidden.device.type) - hidden.nbytes - weight.nbytes


def cost_of_losses(options: argparse.Namespace, repeats: int) -> dict[str, Cost]:
    hidden, weight, target = operands(options.rows * LENGTH, options.vocabulary, options.device)
    original = (hidden @ weight.T).detach()
    logits = original.clone().requires_grad_()
    costs = {name: Cost() for name in COLOURS}
    for i in tqdm(range(repeats + 1), desc="the losses alone, and with the head", unit="round"):
        for name, cost in costs.items():
            begin = now(logits)
            held = [gradients(name, hidden, weight, target)]
            cost.together.append(now(logits) - begin)
            if name != FUSED:
                begin = now(logits)
                held.append(torch.autograd.grad(LOSSES[name](logits, target), logits))
                cost.alone.append(now(logits) - begin)
            del held  # freeing is not part of the times
            if i == 0:
                cost.peak = head_peak(name, hidden, weight, target)
            with torch.no_grad():
                logits.copy_(original)  # in place, the gradient stands where the logits were
    return costs


@dataclass
class Limited:
    """Peak bytes of head + loss at so many rows of a large vocabulary that their float32 logits are over the limit."""

    limit: float
    size: str
    peaks: dict[str, int]

    def verdict(self, name: str) -> str:
        return "fits" if self.peaks[name] <= self.limit else "does not fit"


def under_limit(limit: float, device: str) -> Limited:
    rows = 1024 * (1 + int(limit / (1024 * LARGE_VOCABULARY * 4)))
    inputs = operands(rows, LARGE_VOCABULARY, device)
    peaks = {name: head_peak(name, *inputs) for name in tqdm(COLOURS, desc="a memory limit", unit="loss")}
    return Limited(limit, logits_size(rows, LARGE_VOCABULARY), peaks)


def logits_size(n: int, k: int) -> str:
    return f"logits {n:,} × {k:,} float32 = {n * k * 4 / 1e6:,.0f} MB"


def describe(options: argparse.Namespace) -> str:
    """The machine and the sizes, for the pictures' titles."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    where = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    size = logits_size(options.rows * LENGTH, options.vocabulary)
    return f"{where}, torch {torch.__version__}\n{size}, ε = {EPS}"


def ms(seconds: list[float]) -> float:
    """The median without the first, a warm-up."""
    return statistics.median(seconds[1:]) * 1e3


def apart(runs: dict[str, Run], name: str) -> list[float]:
    """By how much the curve of ``name`` is above PyTorch's, step by step."""
    return [a - b for a, b in zip(runs[name].losses, runs[PYTORCH].losses, strict=True)]


def print_tables(runs: dict[str, Run], costs: dict[str, Cost], limited: Limited, rows: int) -> None:
    print("\ntraining loss, nats per word (less PyTorch's)")
    print(f"{'step':>6}" + "".join(f"{name:>26}" for name in TRAINED))
    for i in sorted({round(j * (len(runs[PYTORCH].losses) - 1) / 10) for j in range(11)}):
        ours = "".join(f"{runs[name].losses[i]:15.6f} ({apart(runs, name)[i]:+8.1e})" for name in (OURS, FUSED))
        print(f"{i + 1:6}{runs[PYTORCH].losses[i]:26.6f}{ours}")
    print(f"\n{'':26} {'held-out NLL':>12} {'accuracy':>9} {'step':>8} {'loss alone':>11} {'head + loss':>22}")
    for name, cost in costs.items():
        trained = " " * 31
        if run := runs.get(name):
            trained = f"{run.held_out[0]:12.4f} {run.held_out[1]:9.2%} {ms(run.seconds):5.0f} ms"
        alone = "no logits" if name == FUSED else f"{ms(cost.alone):.1f} ms"
        print(f"{name:26} {trained} {alone:>11} {ms(cost.together):8.1f} ms {cost.peak / 1e6:7.1f} MB")
    chunk = "all of them" if rows <= CHUNK else f"at most {CHUNK} of them"
    print("Medians. Step: whole model and Adam. Loss alone: forward and backward on given logits, without the head.")
    print("Head + loss: forward and backward of both, three matrix products among them, which the fused loss contains;")
    print("its MB: the peak of what torch's allocator hands out then, less the gradients of the head and of its input.")
    print(f"The batch has {rows:,} rows of logits; lsk.linear_cross_entropy holds {chunk} at a time (chunk_rows).")
    print(f"\nThe same peak under a limit of {limited.limit / 1e6:,.0f} MB, at a size chosen so that the logits alone")
    print(f"exceed it: {limited.size}")
    for name, peak in limited.peaks.items():
        print(f"{name:26} {peak / 1e6:9,.1f} MB   {limited.verdict(name)}")


def draw_curves(runs: dict[str, Run], title: str, path: Path) -> None:
    figure = plt.figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    steps = range(1, len(runs[PYTORCH].losses) + 1)
    for name, width, style in zip(TRAINED, (8, 4, 1.4), ("-", "-", "--"), strict=True):  # so that all can be seen
        look = {"color": COLOURS[name], "linewidth": width, "linestyle": style, "label": name}
        top.plot(steps, runs[name].losses, **look)
        if name != PYTORCH:
            bottom.plot(steps, [1e6 * d for d in apart(runs, name)], **look)
    top.set(ylabel="smoothed training loss (nats per word)")
    top.legend(loc="upper right")
    bottom.set(ylabel="less PyTorch's (10⁻⁶ nats)", xlabel="training step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    figure.suptitle(f"Same seed, same batches, same curve\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_costs(runs: dict[str, Run], costs: dict[str, Cost], limited: Limited, title: str, path: Path) -> None:
    """Times above, memory below; one row of bars per loss in every panel."""
    absent = {INPLACE: "not trained", FUSED: "has no logits"}
    at_limit = {name: peak / 1e6 for name, peak in limited.peaks.items()}
    alone = {name: ms(cost.alone) for name, cost in costs.items() if cost.alone}
    unit = "MB beyond inputs, parameters and their gradients"
    panels = {
        "A": ("whole training step", "ms (median)", {name: ms(run.seconds) for name, run in runs.items()}),
        "B": ("loss alone, on given logits", "ms (median)", alone),
        "C": ("head + loss", "ms (median)", {name: ms(cost.together) for name, cost in costs.items()}),
        "D": ("peak memory of head + loss", unit, {name: cost.peak / 1e6 for name, cost in costs.items()}),
        "E": (f"the same, {limited.size}", f"MB; dashed: a limit of {limited.limit / 1e6:,.0f}", at_limit),
    }
    figure = plt.figure(figsize=(11, 5.6), layout="constrained")
    for key, axes in figure.subplot_mosaic("AABBCC;DDDEEE").items():
        what, unit, values = panels[key]
        widths = [values.get(name, 0.0) for name in COLOURS]
        bars = axes.barh(range(len(COLOURS)), widths, color=list(COLOURS.values()), height=0.7)
        texts = [f"{values[n]:,.0f}" if n in values else absent[n] for n in COLOURS]
        if key == "E":
            texts = [f"{values[name]:,.0f}, {limited.verdict(name)}" for name in COLOURS]
            axes.axvline(limited.limit / 1e6, color="#333333", linestyle="--", linewidth=1, zorder=0)
        axes.bar_label(bars, texts, padding=3, fontsize=8)
        axes.set(title=what, xlabel=unit, xlim=(0, 1.3 * max(widths)))
        axes.set_yticks(range(len(COLOURS)), COLOURS if key in "AD" else [""] * len(COLOURS), fontsize=9)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="for pictures (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not how fast it is")
    parser.add_argument("--steps", type=int, help="training steps of each run (default: 60, quick: 10)")
    parser.add_argument("--rows", type=int, help="sequences of 64 words per batch (default: 16, quick: 12)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="(%(default)s)")
    parser.add_argument("--bound", type=float, default=0.01, help="on the curves' difference, nats (%(default)s)")
    parser.add_argument("--limit", type=float, help="memory limit of the second part, MB (default: 1000, quick: 500)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for name, usual, quick in (("steps", 60, 10), ("rows", 16, 12), ("limit", 1000, 500)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    for name, least in (("steps", 2), ("rows", 1), ("vocabulary", 2), ("bound", 0), ("limit", 1)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return options


def main() -> int:
    options = parse()
    train_words, held_out_words = read_words(options.vocabulary)
    title = describe(options)
    print(f"{len(train_words):,} words to train on, {len(held_out_words):,} held out\n{title}")
    data = batches(train_words, options.steps, options.rows, options.device, seed=0)
    held_out = batches(held_out_words, 4 if options.quick else 8, options.rows, options.device, seed=1)
    runs = train(options, data, held_out)
    costs = cost_of_losses(options, 5 if options.quick else 8)
    limited = under_limit(options.limit * 1e6, options.device)
    print_tables(runs, costs, limited, options.rows * LENGTH)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [options.out.resolve() / name for name in ("curves.png", "costs.png")]
    draw_curves(runs, title, pictures[0])
    draw_costs(runs, costs, limited, title, pictures[1])
    print("\nlargest difference from the curve of F.cross_entropy:")
    agree = True
    for name in (OURS, FUSED):
        differences = [abs(d) for d in apart(runs, name)]
        within = all(d <= options.bound for d in differences)  # a NaN is not
        agree = agree and within
        print(f"{name:26} {max(differences):.1e} nats, {'' if within else 'NOT '}within the bound of {options.bound:g}")
    print("\n".join(f"picture: {path}" for path in pictures))
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
