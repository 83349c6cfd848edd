"""Trains a small language model twice, with F.cross_entropy and with labelsmooth_kernels: one curve at two costs.

The text is on every machine: the sources and documentation of the Python standard library, as words and punctuation,
with a vocabulary of 32,000. The model is small (tied embedding, one causal convolution), so that its head and its loss
are most of a step, as large vocabularies make them. Both runs have the same seed and batches and take their steps in
turn, so that whatever else the machine does slows both alike.

    python examples/train_lm.py                 # a few minutes on two CPU cores; pictures in out/demo
    python examples/train_lm.py --quick         # about 30 seconds
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
PYTORCH, OURS, OURS_INPLACE = "F.cross_entropy", "lsk.cross_entropy", "lsk.cross_entropy, inplace"
COLOURS = {PYTORCH: "#c44e52", OURS: "#4c72b0", OURS_INPLACE: "#55a868"}
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    PYTORCH: lambda logits, target: F.cross_entropy(logits, target, label_smoothing=EPS),
    OURS: lambda logits, target: lsk.cross_entropy(logits, target, label_smoothing=EPS),
    OURS_INPLACE: lambda logits, target: lsk.cross_entropy(logits, target, label_smoothing=EPS, inplace=True),
}


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
    """Words (B, T) to logits (B·T, vocabulary) from the last 8 words; the head is the embedding."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        nn.init.normal_(self.embedding.weight, std=WIDTH**-0.5)
        self.layer = nn.Conv1d(WIDTH, WIDTH, kernel_size=8)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embedding(words).mT
        hidden = embedded + F.gelu(self.layer(F.pad(embedded, (7, 0))))
        return hidden.mT.flatten(0, 1) @ self.embedding.weight.T


@dataclass
class Run:
    """Per step the loss and the seconds; in the end NLL (nats per word) and accuracy of the held-out part."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out: tuple[float, float] = (0.0, 0.0)

    def step(self, loss_of: Loss, words: Tensor, target: Tensor) -> None:
        begin = now(words)
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss_of(self.model(words), target)
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
def evaluate(name: str, model: nn.Module, held_out: list[Batch]) -> tuple[float, float]:
    """(NLL, accuracy): PyTorch passes over the logits for each of them, ours has both from the loss's own pass."""
    nll = hits = 0.0
    for words, target in tqdm(held_out, desc=f"held-out part, {name}", unit="batch"):
        logits = model(words)
        if name == PYTORCH:
            nlls, prediction = F.cross_entropy(logits, target, reduction="none"), logits.argmax(-1)
        else:
            _, stats = lsk.cross_entropy(logits, target, label_smoothing=EPS, return_stats=True)
            nlls, prediction = stats.nll, stats.prediction
        nll += nlls.mean().item()
        hits += (prediction == target).float().mean().item()
    return nll / len(held_out), hits / len(held_out)


def train(options: argparse.Namespace, data: list[Batch], held_out: list[Batch]) -> dict[str, Run]:
    runs = {}
    for name in (PYTORCH, OURS):
        torch.manual_seed(0)
        model = LanguageModel(options.vocabulary).to(options.device)
        runs[name] = Run(model, torch.optim.Adam(model.parameters(), lr=4e-3))
    with tqdm(data, desc="training both", unit="step") as bar:
        for words, target in bar:
            for name, run in runs.items():
                run.step(LOSSES[name], words, target)
            bar.set_postfix(pytorch=f"{runs[PYTORCH].losses[-1]:.4f}", lsk=f"{runs[OURS].losses[-1]:.4f}")
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


def cost_of_losses(options: argparse.Namespace, target: Tensor, repeats: int) -> dict[str, tuple[float, int]]:
    """Per loss, on given logits: (median seconds of loss and gradient, interleaved; peak bytes beyond the logits)."""
    original = torch.randn(target.numel(), options.vocabulary, device=options.device)
    logits = original.clone().requires_grad_()

    def step(loss: Loss) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(logits, target), logits)

    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    memory = {}
    for i in tqdm(range(repeats + 1), desc="the losses alone", unit="round"):
        for name, loss in LOSSES.items():
            begin = now(logits)
            gradient = step(loss)
            seconds[name].append(now(logits) - begin)
            del gradient
            if i == 0:
                memory[name] = peak_bytes(partial(step, loss), options.device)
            with torch.no_grad():
                logits.copy_(original)  # in place, the gradient stands where the logits were
    return {name: (statistics.median(seconds[name][1:]), memory[name]) for name in LOSSES}


def describe(options: argparse.Namespace) -> str:
    """The machine and the sizes, for the pictures' titles."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    where = f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"
    if options.device == "cuda":
        where = torch.cuda.get_device_name()
    n, k = options.rows * LENGTH, options.vocabulary
    return f"{where}, torch {torch.__version__}\nlogits {n:,} × {k:,} float32 = {n * k * 4 / 1e6:,.0f} MB, ε = {EPS}"


def print_tables(runs: dict[str, Run], costs: dict[str, tuple[float, int]]) -> None:
    theirs, ours = runs[PYTORCH].losses, runs[OURS].losses
    print(f"\n{'step':>6} {'F.cross_entropy':>16} {'lsk':>12} {'difference':>12}   training loss, nats per word")
    for i in sorted({round(j * (len(ours) - 1) / 10) for j in range(11)}):
        print(f"{i + 1:6} {theirs[i]:16.6f} {ours[i]:12.6f} {ours[i] - theirs[i]:12.1e}")
    print(f"\n{'':28} {'held-out NLL':>12} {'accuracy':>9} {'step':>9} {'loss alone':>11} {'memory of the loss':>19}")
    for name, (seconds, peak) in costs.items():
        trained = " " * 32
        if run := runs.get(name):
            step = statistics.median(run.seconds) * 1e3
            trained = f"{run.held_out[0]:12.4f} {run.held_out[1]:9.2%} {step:6.0f} ms"
        print(f"{name:28} {trained} {seconds * 1e3:8.1f} ms {peak / 1e6:16.1f} MB")
    print("Medians. Loss alone: forward and backward on given logits. Memory: the most that torch's allocator holds in")
    print("that time beyond the logits, the gradient included (in place, it stands where the logits were).")


def draw_curves(runs: dict[str, Run], title: str, path: Path) -> None:
    figure = plt.figure(figsize=(8, 6.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
    theirs, ours = runs[PYTORCH].losses, runs[OURS].losses
    steps = range(1, len(ours) + 1)
    top.plot(steps, theirs, color=COLOURS[PYTORCH], linewidth=4, alpha=0.45, label=PYTORCH)
    top.plot(steps, ours, color=COLOURS[OURS], linewidth=1.2, label=OURS)
    top.set(ylabel="smoothed training loss (nats per word)")
    top.legend(loc="upper right")
    bottom.plot(steps, [(a - b) * 1e6 for a, b in zip(ours, theirs, strict=True)], color="#333333", linewidth=1)
    bottom.set(ylabel="lsk − PyTorch (10⁻⁶ nats)", xlabel="training step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.margins(x=0.01)
    figure.suptitle(f"Same seed, same batches, same curve\n{title}", fontsize=10)
    figure.savefig(path, dpi=130)


def draw_costs(runs: dict[str, Run], costs: dict[str, tuple[float, int]], title: str, path: Path) -> None:
    panels = (
        ("whole training step", "ms (median)", [statistics.median(run.seconds) * 1e3 for run in runs.values()]),
        ("loss alone, forward + backward", "ms (median)", [seconds * 1e3 for seconds, _ in costs.values()]),
        ("peak memory of the loss", "MB beyond the logits", [peak / 1e6 for _, peak in costs.values()]),
    )
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 4.2), layout="constrained")
    for axes, (what, unit, values) in zip(all_axes, panels, strict=True):
        names = list(costs)[: len(values)]
        labels = [name.replace(".", ".\n", 1).replace(", ", "\n") for name in names]
        bars = axes.bar(labels, values, color=[COLOURS[name] for name in names], width=0.65)
        axes.bar_label(bars, [f"{v:,.0f}" if v >= 100 else f"{v:.1f}" if v >= 1 else f"{v:.1g}" for v in values])
        axes.set(title=what, ylabel=unit)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="for pictures (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, not how fast it is")
    parser.add_argument("--steps", type=int, help="training steps of each run (default: 100, quick: 15)")
    parser.add_argument("--rows", type=int, help="sequences of 64 words per batch (default: 16, quick: 8)")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="(%(default)s)")
    parser.add_argument("--bound", type=float, default=0.01, help="on the curves' difference, nats (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for name, usual, quick in (("steps", 100, 15), ("rows", 16, 8)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else usual)
    for name, least in (("steps", 2), ("rows", 1), ("vocabulary", 2), ("bound", 0)):
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
    held_out = batches(held_out_words, 4 if options.quick else 16, options.rows, options.device, seed=1)
    runs = train(options, data, held_out)
    costs = cost_of_losses(options, data[0][1], 5 if options.quick else 15)
    print_tables(runs, costs)
    options.out.mkdir(parents=True, exist_ok=True)
    pictures = [options.out.resolve() / name for name in ("curves.png", "costs.png")]
    draw_curves(runs, title, pictures[0])
    draw_costs(runs, costs, title, pictures[1])
    difference = max(abs(a - b) for a, b in zip(runs[OURS].losses, runs[PYTORCH].losses, strict=True))
    agree = difference <= options.bound  # a NaN does not agree
    verdict = "within" if agree else "MORE THAN"
    print(f"\nlargest difference of the two curves: {difference:.1e} nats, {verdict} the bound of {options.bound:g}")
    print("\n".join(f"picture: {path}" for path in pictures))
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
