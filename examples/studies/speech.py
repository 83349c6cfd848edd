"""Does smoothing help where a network hears voices it does not know? Spoken words, new speakers, noise, and students.

A small convolutional network learns to tell words apart from their log-mel spectrograms, with hard targets and three
kinds of smoothed ones, and is tested on speakers that it has not heard: under the noise of training, and under more.
Then each network teaches a smaller one, which learns from its probabilities.

    python examples/studies/speech.py                          # speaks the words itself where espeak-ng is installed
    python examples/studies/speech.py --wav speech_commands    # any folder of WORD/SPEAKER_TAKE.wav
    python examples/studies/speech.py --quick --source tones   # without speech: seconds, a check that the study runs
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import sound
import torch
from torch import Tensor, nn

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, distillation, representation

try:
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"{error}: this study shows its progress; pip install tqdm") from error

if TYPE_CHECKING:
    import argparse

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME, EPS = "speech", 0.1
TEMPERATURE, ALPHA = 3.0, 0.9  # of distillation: softened probabilities, with a tenth of the loss from the labels
NOISE = (10, 5, 2)  # decibels that the speech is above the noise; in training 10 to 30
USUAL = "room"  # the test part with the noise of training
THREE = ("#0b6e6e", "#c4501b", "#7a5ba8")  # colours of three words
BATCH, SHIFT = 64, 4  # recordings of a step; frames by which each is moved at random in training
MAIN = {key: common.COLUMNS[key] for key in (*common.MEASURED, "tightness")} | {
    "training_tightness": ("tightness, training", ".3f"),
    "training_accuracy": ("training accuracy", ".2%"),
    "student_accuracy": ("its student's accuracy", ".2%"),
}
NOISY = {key: common.COLUMNS[key] for key in ("accuracy", "nll", "ece", "nll_scaled", "ece_scaled")}
# What Müller et al. 2019 report of smoothing: (what, key, sign of the smoothed network's less the other's).
CLAIMS = (
    ("Better accuracy", "accuracy", 1),
    ("Better calibration: lower ECE without a temperature", "ece", -1),
    ("Tighter clusters of training data", "training_tightness", -1),
    ("Tighter clusters of test data", "tightness", -1),
    ("A worse teacher: lower accuracy of its student", "student_accuracy", -1),
)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """What makes a run long or short."""

    takes: int
    epochs: int
    width: int
    student_width: int


FULL, QUICK = Size(5, 30, 16, 6), Size(4, 24, 12, 6)


class Words(NamedTuple):
    """The data: spectrograms, each band with mean 0 and variance 1 over the training part, and what is said in them."""

    source: str
    words: list[str]
    inputs: dict[str, Tensor]
    """(N, 1, bands, frames) of "training", "validation", and the test part by condition: "room", "10 dB", ..."""
    targets: dict[str, Tensor]

    @property
    def counts(self) -> Tensor:
        return torch.bincount(self.targets["training"], minlength=len(self.words))


class Listener(nn.Module):
    """Three convolutions that halve bands and frames, averages over 5 bands × 4 stretches of time, one hidden layer
    whose output is what tightness is measured on, and the head."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d((5, 4)), nn.Flatten(), nn.Linear(80 * width, 64), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))


def choose(options: argparse.Namespace, size: Size) -> sound.Corpus:
    """The folder that was given; else what espeak-ng says; else tones."""
    if options.wav is not None:
        return sound.folder_of_words(options.wav, options.most)
    source = options.source or ("espeak" if shutil.which("espeak-ng") else "tones")
    return sound.spoken(options.cache, size.takes) if source == "espeak" else sound.toned(options.cache, size.takes)


def prepare(corpus: sound.Corpus) -> Words:
    inputs = {split: corpus.spectrograms(split) for split in ("training", "validation")}
    inputs[USUAL] = corpus.spectrograms("test")
    inputs |= {f"{snr} dB": corpus.spectrograms("test", snr) for snr in NOISE}
    mean = inputs["training"].mean((0, 2), keepdim=True)
    deviation = inputs["training"].std((0, 2), keepdim=True)
    scaled = {name: ((x - mean) / deviation)[:, None] for name, x in inputs.items()}
    splits = {name: name if name in sound.SPLITS else "test" for name in inputs}
    return Words(corpus.source, corpus.words, scaled, {name: corpus.target(split) for name, split in splits.items()})


def train(model: nn.Module, data: Words, epochs: int, loss: Loss) -> nn.Module:
    """Adam with a cosine schedule; batches and shifts come from the global generator, so from the seed."""
    inputs, target = data.inputs["training"], data.targets["training"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(target) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(target)).split(BATCH)[: len(target) // BATCH]:
            shifted = inputs[rows].roll(int(torch.randint(-SHIFT, SHIFT + 1, ())), -1)
            optimizer.zero_grad(set_to_none=True)
            loss(model, shifted, target[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, logits) of all rows."""
    hidden = torch.cat([model.hidden(part) for part in inputs.split(256)])
    return hidden, model.head(hidden)


def accuracy(model: nn.Module, data: Words, name: str) -> float:
    return calibration.evaluate(outputs(model, data.inputs[name])[1], data.targets[name]).accuracy


def distilled(teacher: nn.Module, student: nn.Module, data: Words, epochs: int) -> nn.Module:
    """A student that learns what the teacher makes of each training example, shifted alike for both."""

    def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            taught = teacher(x)
        return distillation.distillation_loss(model(x), taught, target, temperature=TEMPERATURE, alpha=ALPHA)

    return train(student, data, epochs, loss)


def measured(method: str, seed: int, model: nn.Module, data: Words) -> list[common.Record]:
    """A record per condition; the temperature is always fitted on the validation speakers, without noise."""
    validation = outputs(model, data.inputs["validation"])[1], data.targets["validation"]
    records = []
    for condition in (USUAL, *(f"{snr} dB" for snr in NOISE)):
        hidden, logits = outputs(model, data.inputs[condition])
        target = data.targets[condition]
        numbers: dict[str, Any] = common.measure(validation, (logits, target))
        if condition == USUAL:
            numbers["tightness"] = representation.class_scatter(hidden, target).tightness
            known, known_target = outputs(model, data.inputs["training"]), data.targets["training"]
            numbers["training_tightness"] = representation.class_scatter(known[0], known_target).tightness
            numbers["training_accuracy"] = calibration.evaluate(known[1], known_target).accuracy
            found = calibration.evaluate(logits, target, bins=10)
            numbers["confidence"], numbers["bins"] = found.confidence, common.reliability_points(found)
            numbers["plane"] = plane(model, hidden, target) if seed == 0 else None
        records.append(common.record(NAME, method, EPS, seed, condition=condition, **numbers))
    return records


def frequent(target: Tensor) -> list[int]:
    return target.bincount().topk(3).indices.tolist()


def plane(model: nn.Module, hidden: Tensor, target: Tensor) -> list[list[list[float]]]:
    """Test features of the three most frequent words in the plane of their templates, as [[x, y], ...] each."""
    a, b, c = frequent(target)
    found = representation.template_plane(model.head.weight, (a, b, c))
    return [found.project(hidden[target == k]).tolist() for k in (a, b, c)]


def run(options: argparse.Namespace) -> None:
    size = QUICK if options.quick else FULL
    data = prepare(choose(options, size))
    classes, records = len(data.words), []
    seeds = common.seeds_of(options)
    for seed, method in tqdm(
        [(s, m) for s in seeds for m in common.METHODS], desc="networks and students", unit="pair"
    ):
        smoothed = common.loss_options(method, EPS, data.counts)
        common.set_up(seed)
        fresh, student = Listener(classes, size.width), Listener(classes, size.student_width)
        alone = copy.deepcopy(student)
        teacher = train(fresh, data, size.epochs, lambda m, x, y, s=smoothed: lsk.cross_entropy(m(x), y, **s))
        found = measured(method, seed, teacher, data)
        common.set_up(seed)  # students of all teachers, and the one without, see the same batches
        found[0]["student_accuracy"] = accuracy(distilled(teacher, student, data, size.epochs), data, USUAL)
        common.set_up(seed)
        if method == "hard":
            untaught = train(alone, data, size.epochs, lambda m, x, y: lsk.cross_entropy(m(x), y))
            found[0]["untaught_accuracy"] = accuracy(untaught, data, USUAL)
        records += found
    about = {
        "quick": options.quick,
        "eps": EPS,
        "source": data.source,
        "rows": {name: len(data.targets[name]) for name in ("training", "validation", USUAL)},
        "words": [data.words[i] for i in frequent(data.targets[USUAL])],
        "size": size._asdict(),
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (fresh, student)],
    }
    common.save(options.out, NAME, records, about)


def what_was_done(about: dict[str, Any]) -> str:
    rows, size, (large, small) = about["rows"], about["size"], about["parameters"]
    quiet, loud = sound.ROOM[::-1]
    return f"""
Words are told apart by their sound: {about["source"]}. {rows["training"]:,} recordings are for training,
{rows["validation"]:,} for validation and {rows[USUAL]:,} for the test, by different speakers: the test asks for voices
that were never heard. White noise lies {loud} to {quiet} dB below each recording, as in a room.

A convolutional network of {large:,} parameters learns from log-mel spectrograms for {size["epochs"]} epochs, with hard
targets, and with ε = {about["eps"]} spread uniformly over all classes, over the others only, or as the words are
distributed in the training data ("unigram"). The temperature T is the one that suits the validation speakers best.
Tightness is the share of the variance of the last hidden layer that lies within classes, 0 where each class is one
point: on test data, or on training data where that is said. Each network then teaches a student of {small:,}
parameters, by probabilities at T = {TEMPERATURE:g} with a weight of {ALPHA:g}; the labels' own loss has
{1 - ALPHA:.1f}. All methods of a seed start from the same weights and see the same batches."""


def difference(records: Sequence[common.Record], key: str, method: str = "uniform", other: str = "hard") -> common.Gap:
    found = common.gap(records, key, {"method": method}, {"method": other})
    return found._replace(spec=(MAIN | NOISY)[key][1])


def findings(records: list[common.Record]) -> str:
    usual = common.select(records, condition=USUAL)
    lines = [
        "## What appears, and what does not",
        "",
        "Uniform smoothing against hard targets, on the test speakers:",
        "",
    ]
    for what, key, expected in CLAIMS:
        found = difference(usual, key)
        verdict = {expected: "**appears**", 0: "does not show", -expected: "**the opposite appears**"}[found.sign]
        if found.seeds < 3:  # two seeds may agree to the last row by chance
            verdict = "not judged on fewer than three seeds"
        lines.append(f"- {what}: {verdict}; {found}.")
    lines += ["", "Beyond that:", ""]
    for method in ("hard", "uniform"):
        sure = common.gap(usual, "confidence", {"method": method}, "accuracy")._replace(spec=".2%")
        mended = common.gap(usual, "ece_scaled", {"method": method}, "ece")
        lines.append(
            f"- {method}: mean confidence against accuracy: {sure}; ECE after the temperature against before: {mended}."
        )
    ece, nll = difference(usual, "ece_scaled"), difference(usual, "nll_scaled")
    lines.append(f"- Uniform against hard, each with its temperature: ECE {ece}; NLL {nll}.")
    for method in ("others", "unigram"):
        parts = [f"{heading} {difference(usual, key, method, 'uniform')}" for key, (heading, _) in NOISY.items()][:3]
        lines.append(f"- {method} against uniform: {'; '.join(parts)}.")
    taught = common.gap(usual, "student_accuracy", {"method": "hard"}, "untaught_accuracy")._replace(spec=".2%")
    alone, _ = common.spread(common.values(usual, "untaught_accuracy"))
    lines.append(f"- A student without a teacher reaches {alone:.2%}; with the teacher of hard targets: {taught}.")
    return "\n".join(lines)


def under_noise(records: list[common.Record]) -> str:
    conditions = [condition for condition in dict.fromkeys(r["condition"] for r in records) if condition != USUAL]
    noisy = [r for condition in conditions for r in common.select(records, condition=condition)]
    lines = [
        "## Under more noise",
        "",
        f"In training it lay {sound.ROOM[0]} dB or more below. The temperatures are those from before.",
        "",
    ]
    lines += [common.table(noisy, NOISY, by=("condition", "method")), "", "Uniform smoothing against hard targets:", ""]
    for condition in conditions:
        there = common.select(noisy, condition=condition)
        parts = [f"{heading} {difference(there, key)}" for key, (heading, _) in NOISY.items() if "nll" not in key]
        lines.append(f"- {condition}: {'; '.join(parts)}.")
    return "\n".join(lines)


def draw(records: list[common.Record], about: dict[str, Any]) -> Figure:
    made = common.figure(2, 3)
    usual = common.select(records, condition=USUAL)
    draw_planes(made.axes[:2], usual, about["words"])
    reliability, accuracies, errors, students = made.axes[2:]
    conditions = list(dict.fromkeys(r["condition"] for r in records))
    for method, colour in common.COLOURS.items():
        bins = [r["bins"] for r in common.select(usual, method=method)]
        common.draw_reliability(reliability, bins, color=colour, label=method)
        for axes, key, style in ((accuracies, "accuracy", "-"), (errors, "ece", "-"), (errors, "ece_scaled", "--")):
            parts = [common.values(common.select(records, method=method, condition=c), key) for c in conditions]
            means, deviations = zip(*map(common.spread, parts), strict=True)
            axes.errorbar(conditions, means, deviations, fmt=style, color=colour, capsize=2)
        numbers = common.values(common.select(usual, method=method), "student_accuracy")
        students.plot([method] * len(numbers), numbers, "o", color=colour, alpha=0.7)
    untaught = common.values(usual, "untaught_accuracy")
    students.plot(["no teacher"] * len(untaught), untaught, "o", color="0.4", alpha=0.7)
    reliability.set(title="Test speakers", xlim=(0, 1), ylim=(0, 1))
    reliability.legend()
    accuracies.set(title="Accuracy under noise", xlabel="speech above noise")
    errors.set(title="ECE under noise (dashed: with temperature)", xlabel="speech above noise")
    students.set(title="Accuracy of students, by teacher")
    return made


def draw_planes(both: Sequence[Axes], usual: list[common.Record], words: list[str]) -> None:
    """Three words in the plane of their templates, from hard targets and from smoothed ones."""
    for axes, method in zip(both, ("hard", "uniform"), strict=True):
        for points, word, colour in zip(
            common.values(common.select(usual, method=method), "plane")[0], words, THREE, strict=True
        ):
            axes.plot(*zip(*points, strict=True), ".", color=colour, markersize=4, label=word)
        axes.set(title=f"{method}: test features of three words", xlabel="plane of their templates")
        axes.legend()


def main() -> None:
    parser = common.arguments(__doc__, seeds=3)
    parser.add_argument("--wav", type=Path, metavar="DIR", help="recordings, as DIR/WORD/SPEAKER_TAKE.wav of 16 bits")
    parser.add_argument("--most", type=int, default=100, metavar="N", help="recordings per word of --wav (%(default)s)")
    parser.add_argument(
        "--source", choices=("espeak", "tones"), help="without --wav (default: espeak-ng where installed)"
    )
    default = Path(tempfile.gettempdir(), "labelsmooth-speech")
    parser.add_argument(
        "--cache", type=Path, default=default, metavar="DIR", help="for recordings made here (%(default)s)"
    )
    options = parser.parse_args()
    if not options.render:
        run(options)
    records, about = common.load(options.out, NAME)
    common.save_figure(options.out, NAME, draw(records, about))
    usual = common.select(records, condition=USUAL)
    sections = [what_was_done(about), common.table(usual, MAIN), findings(records), under_noise(records)]
    common.page(options.out, NAME, "Spoken words and new voices", sections)


if __name__ == "__main__":
    main()
