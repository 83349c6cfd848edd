"""Study: label smoothing at 32,000 classes, a language model on the texts of the standard library.

Small models are trained for several epochs on few windows of the text, so that there is something to be over-confident
about, and measured on files of which they saw nothing. Then narrower students learn from the models alone. Logits never
exist as a whole: loss, temperature, calibration and the teacher of a student take hidden states and the head.

    python examples/studies/text.py             # about 12 minutes on one core; page, plots and records in docs/studies
    python examples/studies/text.py --quick     # about a minute
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where train_lm lies, which reads the same text
from common import (
    COLOURS,
    MEASURED,
    METHODS,
    Record,
    arguments,
    draw_reliability,
    figure,
    gap,
    load,
    loss_options,
    measure,
    page,
    record,
    reliability_points,
    save,
    save_figure,
    seeds_of,
    select,
    set_up,
    table,
    values,
)
from train_lm import Batch, batches, read_words

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, representation

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME, VOCABULARY, EPS = "text", 32_000, 0.1
WIDTH, NARROW = 64, 32  # of the models and of their students
ROWS = 16  # windows of 64 words per batch: 1,024 rows of logits
BLOCK = 5000  # words: about a file
COMMON = 100  # classes whose clusters are measured
TEACHERS = ("none", "hard", "uniform")
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of words, hidden, weight and target


class Size(NamedTuple):
    windows: int
    """batches of different windows to train on"""
    epochs: int
    measured: int
    """batches of the validation files, and as many of the test files"""


FULL, QUICK = Size(16, 6, 5), Size(6, 2, 2)


class Data(NamedTuple):
    counts: Tensor
    """(VOCABULARY,) of the words in the training files"""
    train: list[Batch]
    validation: list[Batch]
    test: list[Batch]


class Model(nn.Module):
    """Words (B, T) to hidden states (B·T, width) from the last 8 words; the head is the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.layer = nn.Conv1d(width, width, kernel_size=8)

    def forward(self, words: Tensor) -> Tensor:
        embedded = self.embedding(words).mT
        hidden = embedded + F.gelu(self.layer(F.pad(embedded, (7, 0))))
        return hidden.mT.flatten(0, 1)


def smoothed(method: str, counts: Tensor) -> Loss:
    options = loss_options(method, EPS, counts)
    return lambda words, hidden, weight, target: lsk.linear_cross_entropy(hidden, weight, target, **options)


def imitating(teacher: Model) -> Loss:
    """Cross-entropy with the teacher's probabilities, whose logits are made a chunk of rows at a time too."""

    def loss(words: Tensor, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            soft = lsk.Teacher(teacher(words), teacher.embedding.weight.detach())
        return lsk.linear_cross_entropy(hidden, weight, soft)

    return loss


def train(model: Model, loss: Loss, data: Data, size: Size) -> list[float]:
    """One-cycle Adam over the windows, ``size.epochs`` times; returns the validation NLL after each."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    steps = size.epochs * len(data.train)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.12)
    curve = []
    for _ in range(size.epochs):
        for i in torch.randperm(len(data.train)).tolist():
            words, target = data.train[i]
            optimizer.zero_grad(set_to_none=True)
            loss(words, model(words), model.embedding.weight, target).backward()
            optimizer.step()
            schedule.step()
        hidden, target = features(model, data.validation[:2])
        curve.append(calibration.evaluate(hidden, target, model.embedding.weight).nll)
    return curve


@torch.no_grad()
def features(model: Model, part: list[Batch]) -> tuple[Tensor, Tensor]:
    """(hidden, target) of all batches: 64 numbers a word, where the logits would be 32,000."""
    return torch.cat([model(words) for words, _ in part]), torch.cat([target for _, target in part])


def examine(model: Model, data: Data) -> dict[str, Any]:
    """What the tables and plots say of a model."""
    weight = model.embedding.weight.detach()
    hidden, target = features(model, data.test)
    seen = calibration.evaluate(*features(model, data.train[: len(data.test)]), weight)
    frequent = data.counts.topk(COMMON).indices
    common = torch.where(torch.isin(target, frequent), target, -100)
    return {
        **measure(features(model, data.validation), (hidden, target), weight),
        "train_nll": seen.nll,
        "train_accuracy": seen.accuracy,
        "tightness": representation.class_scatter(hidden, common).tightness,
        "bins": reliability_points(calibration.evaluate(hidden, target, weight)),
    }


def read(size: Size) -> tuple[Callable[[int], Data], dict[str, int]]:
    """The data of a seed, and what there is. Every 20th file is held out. Of their words, stretches of BLOCK validate
    and test in turn: halves would differ in kind, as files that lie together do, and a temperature with them."""
    words, held_out = read_words(VOCABULARY)
    counts = torch.bincount(words, minlength=VOCABULARY)
    blocks = held_out[: len(held_out) // (2 * BLOCK) * 2 * BLOCK].view(-1, 2, BLOCK)
    validation = batches(blocks[:, 0].flatten(), size.measured, ROWS, "cpu", seed=1)
    test = batches(blocks[:, 1].flatten(), size.measured, ROWS, "cpu", seed=2)
    about = {"words": len(words), "held_out": len(held_out), "tested": sum(len(target) for _, target in test)}
    return lambda seed: Data(counts, batches(words, size.windows, ROWS, "cpu", seed=10 + seed), validation, test), about


def run(options: argparse.Namespace) -> tuple[list[Record], dict[str, Any]]:
    size = QUICK if options.quick else FULL
    data_of, about = read(size)
    records = []
    for seed in seeds_of(options):
        data, models = data_of(seed), {}
        for method in METHODS:
            set_up(seed)
            models[method] = Model(WIDTH)
            curve = train(models[method], smoothed(method, data.counts), data, size)
            records.append(record(NAME, method, EPS, seed, role="model", curve=curve, **examine(models[method], data)))
            say(records[-1], method)
        for teacher in TEACHERS:
            set_up(seed)
            student = Model(NARROW)
            loss = smoothed("hard", data.counts) if teacher == "none" else imitating(models[teacher])
            curve = train(student, loss, data, size)
            numbers = examine(student, data)
            records.append(record(NAME, "hard", EPS, seed, role="student", teacher=teacher, curve=curve, **numbers))
            say(records[-1], f"student of {teacher}")
    return records, {**about, **size._asdict()}


def say(made: Record, name: str) -> None:
    print(
        f"seed {made['seed']}  {name:20} accuracy {made['accuracy']:.2%}  NLL {made['nll']:.3f}  ECE {made['ece']:.2%}"
    )


def what_was_done(about: dict[str, Any]) -> str:
    tokens = about["windows"] * ROWS * 64
    return f"""
Next-word prediction on the sources and documentation of the Python standard library: words and punctuation, a
vocabulary of {VOCABULARY:,}. There are {about["words"]:,} words in the training files and {about["held_out"]:,} in
every 20th file, which is held out. Stretches of {BLOCK:,} of the held-out words serve in turn for fitting temperatures
and for measuring, on {about["tested"]:,} words each. A model sees {tokens:,} words of the training files,
{about["epochs"]} times: windows of 64, drawn anew for each seed. It is a tied embedding of width {WIDTH} with one
causal convolution over 8 words.

*hard* is plain cross-entropy; the others smooth with ε = {EPS}: *uniform* over all classes, *others* over all but the
target, *unigram* in proportion to the words' counts in the training files. Logits of the {about["tested"]:,} test words
would take {about["tested"] * VOCABULARY * 4 / 1e9:.1f} GB; `lsk.linear_cross_entropy`, `calibration.evaluate` and
`calibration.fit_temperature` take the hidden states and the head instead, and hold a few hundred rows at a time.

Students are half as wide ({NARROW}). *none* learns from the words alone; the others from nothing but the probabilities
of their teacher, which `lsk.Teacher` stands for: the teacher's logits are never held either.
"""


def findings(records: list[Record]) -> str:
    """Each finding of the paper beside what the differences over seeds allow to say here."""
    hard, uniform, unigram = ({"role": "model", "method": method} for method in ("hard", "uniform", "unigram"))
    alone, of_hard, of_uniform = ({"role": "student", "teacher": teacher} for teacher in TEACHERS)
    rows = [  # what is said, the sign it asks for, and the difference: key, of these, less that of those
        ("smoothing raises accuracy", 1, "accuracy", uniform, hard),
        ("smoothing lowers the ECE of models taken as they are", -1, "ece", uniform, hard),
        ("one temperature lowers the ECE of hard targets", -1, "ece_scaled", hard, "ece"),
        ("hard targets make the more confident model (T is lower with smoothing)", -1, "temperature", uniform, hard),
        ("smoothing costs NLL", 1, "nll", uniform, hard),
        ("it does when each model has its temperature", 1, "nll_scaled", uniform, hard),
        ("smoothing tightens the clusters of features", -1, "tightness", uniform, hard),
        ("a student learns more from a teacher than from the words alone", 1, "accuracy", of_hard, alone),
        ("a smoothed teacher makes a worse student, by accuracy", -1, "accuracy", of_uniform, of_hard),
        ("a smoothed teacher makes a worse student, by NLL", 1, "nll", of_uniform, of_hard),
        ("the unigram prior suits words better than the uniform one, by NLL", -1, "nll", unigram, uniform),
    ]
    lines = ["| what might be expected | here | the difference |", "|---|---|---|"]
    for said, sign, *compared in rows:
        found = gap(records, *compared)
        verdict = {sign: "appears", -sign: "**the opposite**"}.get(found.sign, "cannot be told")
        lines.append(f"| {said} | {verdict} | {found} |")
    return "\n".join(lines)


def caveats(records: list[Record]) -> str:
    models = select(records, role="model")
    train, test = (statistics.fmean(values(select(models, method="hard"), key)) for key in ("train_nll", "nll"))
    return f"""
The hard models' NLL is {train:.2f} on words they were trained on and {test:.2f} on the test files: a gap of
{test - train:.2f} nats. Models that see each word once, as large ones do, have next to none, and then plain targets are
well calibrated by themselves. *others* is *uniform* with ε larger by a factor of 1 + 1/{VOCABULARY - 1:,}: the two
differ by no more than rounding, grown by training, and one hides the other in the plots. A large part of the rows are
punctuation, and words outside of the vocabulary count as one class. Tightness is that of test words of the {COMMON}
commonest classes. Students have as many steps as their teachers, which are few: one that imitates probabilities may
need more of them than one that is told.
"""


def draw(records: list[Record]) -> Figure:
    fig = figure(2, 3)
    models = select(records, role="model")
    before_and_after(fig.axes[0], models, "ece", "ECE, %", 100)
    before_and_after(fig.axes[1], models, "nll", "NLL, nats per word", 1)
    for method in METHODS:
        found = select(models, method=method)
        curves = torch.tensor([r["curve"] for r in found])
        fig.axes[2].plot(range(1, curves.shape[1] + 1), curves.mean(0), color=COLOURS[method], label=method, marker=".")
        draw_reliability(fig.axes[3], [r["bins"] for r in found], color=COLOURS[method], label=method)
        dots(fig.axes[4], values(found, "tightness"), list(METHODS).index(method), COLOURS[method])
    fig.axes[2].set(title="on unseen files while training", xlabel="times through the windows", ylabel="NLL")
    fig.axes[3].set(title="reliability on the test files, all seeds")
    fig.axes[4].set(title=f"tightness of {COMMON} classes' features", ylabel="within / (within + between)")
    fig.axes[4].set_xticks(range(len(METHODS)), METHODS)
    for i, teacher in enumerate(TEACHERS):
        students = values(select(records, role="student", teacher=teacher), "accuracy")
        dots(fig.axes[5], [100 * a for a in students], i, COLOURS.get(teacher, "0.4"))
    fig.axes[5].set(title="students, by their teacher", ylabel="accuracy, %")
    fig.axes[5].set_xticks(range(len(TEACHERS)), TEACHERS)
    for i in (2, 3):
        fig.axes[i].legend()
    return fig


def dots(axes: Axes, numbers: list[float], x: int, colour: str) -> None:
    """Every seed, and a line at their mean."""
    axes.plot([x] * len(numbers), numbers, "o", color=colour, markersize=4, alpha=0.7)
    axes.hlines(statistics.fmean(numbers), x - 0.25, x + 0.25, color=colour)
    axes.margins(x=0.2)


def before_and_after(axes: Axes, models: list[Record], key: str, label: str, scale: float) -> None:
    """A pair of dotted columns for each method: as it is, and (lighter) with its temperature."""
    for i, method in enumerate(METHODS):
        for j, name in enumerate((key, f"{key}_scaled")):
            numbers = [scale * number for number in values(select(models, method=method), name)]
            if numbers:
                mean = statistics.fmean(numbers)
                axes.bar(i + 0.4 * j - 0.2, mean, 0.36, color=COLOURS[method], alpha=0.9 - 0.5 * j)
                axes.plot([i + 0.4 * j - 0.2] * len(numbers), numbers, ".", color="0.2", markersize=3)
    shown = [scale * n for name in (key, f"{key}_scaled") for n in values(models, name)]
    axes.set(title=f"{label}: as it is, and with T", ylim=(0 if key == "ece" else 0.97 * min(shown), 1.02 * max(shown)))
    axes.set_xticks(range(len(METHODS)), METHODS)


def main() -> None:
    options = arguments(__doc__, seeds=3).parse_args()
    options.seeds = options.seeds or (1 if options.quick else None)
    if not options.render:
        records, about = run(options)
        save(options.out, NAME, records, {"quick": options.quick, "eps": EPS, **about})
    records, about = load(options.out, NAME)
    save_figure(options.out, NAME, draw(records))
    title = f"Label smoothing at {VOCABULARY:,} classes: a language model"
    models, students = select(records, role="model"), select(records, role="student")
    columns = (*MEASURED, "tightness")
    sections = [what_was_done(about), "## Models", table(models, columns), "## Students"]
    sections += [table(students, MEASURED, by=("teacher",)), "## Which findings appear", findings(records)]
    page(options.out, NAME, title, [*sections, caveats(records)])


if __name__ == "__main__":
    main()
