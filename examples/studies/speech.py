"""Does smoothing help where a network hears voices it does not know? Spoken words, new speakers, noise, and students.

A small convolutional network learns to tell words apart from their log-mel spectrograms, with hard targets and three
kinds of smoothed ones, and is tested on speakers that it has not heard: as they are, and under noise that was not there
in training. Then each network teaches a smaller one, which learns from its probabilities.

    python examples/studies/speech.py                          # speaks the words itself where espeak-ng is installed
    python examples/studies/speech.py --wav speech_commands    # any folder of WORD/SPEAKER_TAKE.wav
    python examples/studies/speech.py --quick --source tones   # without speech: seconds, a check that the study runs
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import common
import sound
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, distillation, representation

try:
    from tqdm import tqdm
except ImportError as error:
    raise SystemExit(f"{error}: this study shows its progress; pip install tqdm") from error

NAME, EPS = "speech", 0.1
TEMPERATURE, ALPHA = 3.0, 0.9  # of distillation: softened probabilities, with a tenth of the loss from the labels
NOISE = (5, 0, -5)  # decibels that the speech is above the noise
CLEAN = "clean"
BATCH, SHIFT = 64, 4  # recordings of a step; frames by which each is moved at random in training
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Size(NamedTuple):
    """What makes a run long or short."""

    takes: int
    epochs: int
    width: int
    student_width: int


FULL, QUICK = Size(8, 16, 16, 6), Size(4, 8, 12, 6)


class Words(NamedTuple):
    """The data: spectrograms, each band with mean 0 and variance 1 over the training part, and what is said in them."""

    source: str
    words: list[str]
    inputs: dict[str, Tensor]
    """(N, 1, bands, frames) of "training", "validation", and the test part by condition: clean, "20 dB", ..."""
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
        return sound.folder_of_words(options.wav)
    source = options.source or ("espeak" if shutil.which("espeak-ng") else "tones")
    return sound.spoken(options.cache, size.takes) if source == "espeak" else sound.toned(options.cache, size.takes)


def prepare(corpus: sound.Corpus) -> Words:
    inputs = {split: corpus.spectrograms(split) for split in ("training", "validation")}
    inputs[CLEAN] = corpus.spectrograms("test")
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
    for condition in (CLEAN, *(f"{snr} dB" for snr in NOISE)):
        hidden, logits = outputs(model, data.inputs[condition])
        target = data.targets[condition]
        numbers: dict[str, Any] = common.measure(validation, (logits, target))
        if condition == CLEAN:
            numbers["tightness"] = representation.class_scatter(hidden, target).tightness
            known, known_target = outputs(model, data.inputs["training"]), data.targets["training"]
            numbers["training_tightness"] = representation.class_scatter(known[0], known_target).tightness
            numbers["training_accuracy"] = calibration.evaluate(known[1], known_target).accuracy
            bins = calibration.evaluate(logits, target, bins=10).reliability()
            numbers["bins"] = [part.nan_to_num().tolist() for part in (bins.rows, bins.confidence, bins.accuracy)]
            numbers["plane"] = plane(model, hidden, target) if seed == 0 else None
        records.append(common.record(NAME, method, EPS, seed, condition=condition, **numbers))
    return records


def plane(model: nn.Module, hidden: Tensor, target: Tensor) -> list[list[list[float]]]:
    """Test features of the three most frequent words in the plane of their templates, as [[x, y], ...] each."""
    a, b, c = target.bincount().topk(3).indices.tolist()
    found = representation.template_plane(model.head.weight, (a, b, c))
    return [found.project(hidden[target == k]).tolist() for k in (a, b, c)]


def run(options: argparse.Namespace) -> None:
    size = QUICK if options.quick else FULL
    data = prepare(choose(options, size))
    classes, records = len(data.words), []
    seeds = common.seeds_of(options)
    for seed, method in tqdm([(s, m) for s in seeds for m in common.METHODS], desc="networks and students", unit="pair"):
        smoothed = common.loss_options(method, EPS, data.counts)
        common.set_up(seed)
        fresh, student = Listener(classes, size.width), Listener(classes, size.student_width)
        alone = copy.deepcopy(student)
        teacher = train(fresh, data, size.epochs, lambda m, x, y, s=smoothed: lsk.cross_entropy(m(x), y, **s))
        found = measured(method, seed, teacher, data)
        common.set_up(seed)  # students of all teachers, and the one without, see the same batches
        found[0]["student_accuracy"] = accuracy(distilled(teacher, student, data, size.epochs), data, CLEAN)
        common.set_up(seed)
        if method == "hard":
            untaught = train(alone, data, size.epochs, lambda m, x, y: lsk.cross_entropy(m(x), y))
            found[0]["untaught_accuracy"] = accuracy(untaught, data, CLEAN)
        records += found
    about = {
        "quick": options.quick,
        "eps": EPS,
        "source": data.source,
        "rows": {name: len(data.targets[name]) for name in ("training", "validation", CLEAN)},
        "words": [data.words[i] for i in data.targets[CLEAN].bincount().topk(3).indices.tolist()],
        "size": size._asdict(),
        "parameters": [sum(p.numel() for p in m.parameters()) for m in (fresh, student)],
    }
    common.save(options.out, NAME, records, about)


def what_was_done(about: dict[str, Any]) -> str:
    rows, size, (large, small) = about["rows"], about["size"], about["parameters"]
    return f"""Words are told apart by their sound: {about["source"]}. {rows["training"]:,} recordings are for training,
{rows["validation"]:,} for validation and {rows[CLEAN]:,} for the test, of different speakers, so that the test asks for
voices that were never heard. A convolutional network with {large:,} parameters learns from log-mel spectrograms for
{size["epochs"]} epochs, with hard targets and with ε = {about["eps"]} spread uniformly over all classes, over the others only,
or as the words are distributed in the training data ("unigram"). The temperature T is the one that suits the validation
speakers best. Tightness is the share of the variance of the last hidden layer (test data) that lies within classes: 0 where
each class is one point. Each network then teaches a student of {small:,} parameters, with probabilities softened by
T = {TEMPERATURE:g} and a weight of {ALPHA:g} against {1 - ALPHA:.1f} of the labels' own loss. All methods of a seed
start from the same weights and see the same batches."""


COLUMNS = {key: common.COLUMNS[key] for key in (*common.MEASURED, "tightness")} | {
    "training_accuracy": ("training accuracy", ".2%"),
    "student_accuracy": ("student's accuracy", ".2%"),
}
NOISY = {key: common.COLUMNS[key] for key in ("accuracy", "nll", "ece", "nll_scaled", "ece_scaled")}
# What Müller et al. 2019 report of smoothing, as (what, key, sign of uniform less hard).
CLAIMS = (
    ("Better accuracy", "accuracy", 1),
    ("Better calibration: lower ECE without a temperature", "ece", -1),
    ("Tighter clusters", "tightness", -1),
    ("A worse teacher: lower accuracy of the student", "student_accuracy", -1),
)


def against_hard(records: Sequence[common.Record], key: str, method: str = "uniform") -> common.Gap:
    return common.gap(records, key, {"method": method}, {"method": "hard"})


def findings(records: list[common.Record]) -> str:
    clean = common.select(records, condition=CLEAN)
    lines = ["## What appears, and what does not", "Uniform smoothing against hard targets, on clean test speech:", ""]
    for what, key, expected in CLAIMS:
        found = against_hard(clean, key)
        verdict = {expected: "appears", 0: "does not show", -expected: "**the opposite appears**"}[found.sign]
        lines.append(f"- {what}: {verdict}. It is {found}.")
    temperature = {m: common.gap(clean, "ece_scaled", {"method": m}, "ece") for m in ("hard", "uniform")}
    scaled = common.gap(clean, "ece_scaled", {"method": "hard"}, {"method": "uniform"})
    lines.append(f"- What a temperature does: the ECE of hard targets is {temperature['hard']} than without, ".replace(
        "apart (", "apart from that (") + f"that of uniform smoothing {temperature['uniform']}.")
    lines.append(f"- Both with their temperature: the ECE of hard targets, less that of uniform smoothing, is {scaled}; "
                 f"the NLL is {common.gap(clean, 'nll_scaled', {'method': 'hard'}, {'method': 'uniform'})}.")
    return "\n".join(lines)
