"""Label smoothing on handwritten digits: accuracy, calibration, clusters, distillation and mutual information.

The data are scikit-learn's 1,797 digits of 8 × 8 pixels, which need no download. As they are, a small network errs on
one in a hundred, too few to tell methods apart; so every image gets Gaussian noise, drawn once per seed like the split,
in training and test alike. The teacher is a small convolutional network that sees shifted images and learns its 600
training images by heart; the student is a perceptron with one hidden layer.

    pip install scikit-learn matplotlib
    python examples/studies/digits.py            # minutes on one CPU core; writes docs/studies/digits.*
    python examples/studies/digits.py --quick    # a minute
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ImportError as error:
    raise SystemExit(f"{error}: the digits come with scikit-learn; pip install scikit-learn") from error

import common

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, distillation, representation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "digits"
EPS, CLASSES, WIDTH, BATCH = 0.1, 10, 64, 100
TRAIN, VALIDATION = 600, 400
TEST = 1797 - TRAIN - VALIDATION
NOISE = 0.3  # of pixels between 0 and 1
PLANE = (3, 8, 9)  # classes whose templates span the plane of the pictures; the first two also for the information
DRAWS = 10  # augmentations of an image for the mutual information
TEMPERATURES = tuple(2.0**k for k in torch.linspace(-2.5, 2.0, 19).tolist())
STUDENTS = {"student_2": (2.0, 1.0), "student_4": (4.0, 1.0), "student_4_half": (4.0, 0.5)}  # temperature, alpha
STUDENT_COLUMNS = {
    "accuracy": ("teacher", ".2%"),
    "student_2": ("student, T = 2, α = 1", ".2%"),
    "student_4": ("student, T = 4, α = 1", ".2%"),
    "student_4_half": ("student, T = 4, α = ½", ".2%"),
    "student_alone": ("same loss, no teacher", ".2%"),
}
FEATURE_COLUMNS = {
    "tightness": ("tightness, training", ".3f"),
    "tightness_validation": ("tightness, validation", ".3f"),
    "norm": ("mean feature norm", ".1f"),
    "information_last": ("mutual information, last epoch", ".2f"),
    "train_accuracy": ("training accuracy", ".2%"),
}
common.COLUMNS.update(STUDENT_COLUMNS | FEATURE_COLUMNS | {"accuracy": ("accuracy", ".2%")})


class Plan(NamedTuple):
    """How much is trained."""

    epochs: int
    student_epochs: int
    grid: tuple[float, ...]


FULL = Plan(epochs=100, student_epochs=100, grid=(0.02, 0.05, 0.2, 0.4))
QUICK = Plan(epochs=12, student_epochs=15, grid=(0.3,))


class Data(NamedTuple):
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def read_digits(seed: int) -> Data:
    """Images (N, 1, 8, 8) with noise, and their classes; every class in the same proportion in each part."""
    digits = load_digits()
    target = torch.tensor(digits.target)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images += NOISE * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    train, rest = train_test_split(range(len(target)), train_size=TRAIN, stratify=target, random_state=seed)
    validation, test = train_test_split(rest, train_size=VALIDATION, stratify=target[rest], random_state=seed)
    return Data(*((images[part], target[part]) for part in (train, validation, test)))


def augmented(images: Tensor) -> Tensor:
    """Half of the images shifted by up to a pixel each way, all with a little new noise."""
    n, size = len(images), images.shape[-1]
    shift = torch.randint(-1, 2, (2, n)) * (torch.rand(n) < 0.5)
    rows, columns = (1 + along[:, None] + torch.arange(size) for along in shift)
    padded = F.pad(images[:, 0], (1, 1, 1, 1))
    shifted = padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return shifted[:, None] + 0.05 * torch.randn_like(images)


class Teacher(nn.Module):
    """Two convolutions and a layer make the features; the head is linear."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 16, WIDTH), nn.ReLU()),
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def make_student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))


@torch.no_grad()
def information(teacher: Teacher, data: Data) -> float:
    """Between the training images of two classes and the difference of their logits, over random augmentations."""
    images, target = data.train
    two = images[(target == PLANE[0]) | (target == PLANE[1])]
    logits = teacher(augmented(two.repeat_interleave(DRAWS, 0)))
    return representation.mutual_information((logits[:, PLANE[0]] - logits[:, PLANE[1]]).reshape(-1, DRAWS))


def train_teacher(data: Data, seed: int, epochs: int, options: dict[str, Any]) -> tuple[Teacher, list[list[float]]]:
    """A teacher, and (epoch, mutual information) as it learns. With one seed all methods start from the same weights
    and see the same batches."""
    common.set_up(seed)
    teacher, (images, target) = Teacher(), data.train
    optimizer = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    told = [[0, information(teacher, data)]]
    every = max(1, epochs // 20)
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(TRAIN).split(BATCH):
            loss = lsk.cross_entropy(teacher(augmented(images[rows])), target[rows], **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % every == 0 or epoch == epochs:
            told.append([epoch, information(teacher, data)])
    return teacher, told


def student_accuracy(data: Data, seed: int, epochs: int, teacher_logits: Tensor | None = None, **options: Any) -> float:
    """Of a student that learns from the teacher's logits on the training images, or from their classes alone."""
    common.set_up(1000 + seed)
    student, (images, target) = make_student(), data.train
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(TRAIN).split(BATCH):
            logits = student(images[rows])
            if teacher_logits is None:
                loss = lsk.cross_entropy(logits, target[rows], **options)
            else:
                loss = distillation.distillation_loss(logits, teacher_logits[rows], target[rows], **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return calibration.evaluate(student(data.test[0]), data.test[1]).accuracy


def ece_of_truth(logits: Tensor, draws: int = 20) -> float:
    """The mean ECE if targets were drawn from the probabilities themselves: what counting so few rows leaves of it."""
    targets = torch.multinomial(logits.softmax(-1), draws, replacement=True)
    return sum(calibration.evaluate(logits, t.contiguous()).ece for t in targets.T) / draws


@torch.no_grad()
def numbers_of(teacher: Teacher, data: Data) -> dict[str, Any]:
    """All that a teacher is asked: predictions, and features of training and validation images."""
    features = {part: teacher.features(images) for part, (images, _) in data._asdict().items()}
    logits = {part: teacher.head(hidden) for part, hidden in features.items()}
    scatter = representation.class_scatter(features["train"], data.train[1])
    measured = common.measure((logits["validation"], data.validation[1]), (logits["test"], data.test[1]))
    return {
        **measured,
        "ece_floor": ece_of_truth(logits["test"] / measured["temperature"]),
        "train_accuracy": calibration.evaluate(logits["train"], data.train[1]).accuracy,
        "tightness": scatter.tightness,
        "norm": scatter.norm,
        "tightness_validation": representation.class_scatter(features["validation"], data.validation[1]).tightness,
    }


@torch.no_grad()
def drawn_of(teacher: Teacher, data: Data, temperature: float, seed: int) -> dict[str, Any]:
    """What only the plots need: reliability, NLL over temperatures and, of one seed, features in a plane."""
    images, target = data.test
    logits = teacher(images)
    found: dict[str, Any] = {}
    for key, scale in (("reliability", 1.0), ("reliability_scaled", 1 / temperature)):
        scaled = calibration.evaluate(logits, target, bins=10, logit_scale=scale)
        found[key] = common.reliability_points(scaled)
    found["nll_over_t"] = [calibration.evaluate(logits, target, logit_scale=1 / t).nll for t in TEMPERATURES]
    if seed == 0:
        plane = representation.template_plane(teacher.head.weight, PLANE)
        for part, (images, target) in zip(("train", "validation"), data[:2], strict=True):
            chosen = [plane.project(teacher.features(images[target == k])).tolist() for k in PLANE]
            found[f"plane_{part}"] = [[[round(x, 2) for x in point] for point in points] for points in chosen]
        found["plane_templates"] = plane.project(teacher.head.weight[list(PLANE)]).tolist()
    return found


def one_model(data: Data, method: str, eps: float, seed: int, plan: Plan, distil: bool) -> common.Record:
    """Trains a teacher and, if ``distil``, the students that learn from it and one that learns from its loss alone."""
    options = common.loss_options(method, eps, torch.bincount(data.train[1], minlength=CLASSES))
    teacher, told = train_teacher(data, seed, plan.epochs, options)
    numbers = {**numbers_of(teacher, data), "information_last": told[-1][1]}
    if distil:
        with torch.no_grad():
            logits = teacher(data.train[0])
        for key, (temperature, alpha) in STUDENTS.items():
            how = {"temperature": temperature, "alpha": alpha}
            numbers[key] = student_accuracy(data, seed, plan.student_epochs, logits, **how)
        numbers |= {"information": told, "student_alone": student_accuracy(data, seed, plan.student_epochs, **options)}
        if method in ("hard", "uniform"):
            numbers |= drawn_of(teacher, data, numbers["temperature"], seed)
    return common.record(NAME, method, eps, seed, **numbers)


def train(seed: int, plan: Plan) -> list[common.Record]:
    data = read_digits(seed)
    records = [one_model(data, method, EPS, seed, plan, distil=True) for method in common.METHODS]
    return records + [one_model(data, "uniform", eps, seed, plan, distil=False) for eps in plan.grid]


def of(records: list[common.Record], method: str) -> list[common.Record]:
    """The models of a method at the eps of the tables, without those of the grid."""
    return common.select(records, method=method, eps=0.0 if method == "hard" else EPS)


def mean_over_seeds(rows: list[common.Record], key: str) -> Tensor:
    return torch.tensor([r[key] for r in rows], dtype=torch.float64).mean(0)


def draw_reliability(axes: Axes, records: list[common.Record]) -> None:
    for method in ("hard", "uniform"):
        for key, style, after in (("reliability", "-", ""), ("reliability_scaled", ":", " after T")):
            points = [r[key] for r in of(records, method) if key in r]
            look = {"color": common.COLOURS[method], "linestyle": style, "label": method + after}
            common.draw_reliability(axes, points, **look)
    axes.set(title="reliability, all seeds", xlim=(0.2, 1), ylim=(0.2, 1))
    axes.legend()


def draw_planes(axes: Sequence[Axes], records: list[common.Record]) -> None:
    """Features of three classes, training above and validation beside it, for hard and smoothed targets."""
    cells = [(method, part) for method in ("hard", "uniform") for part in ("train", "validation")]
    for ax, (method, part) in zip(axes, cells, strict=True):
        drawn = next(r for r in of(records, method) if f"plane_{part}" in r)
        for k, points, colour in zip(PLANE, drawn[f"plane_{part}"], ("#d55e00", "#4a90d9", "#00573f"), strict=True):
            ax.scatter(*zip(*points, strict=True), s=6, color=colour, alpha=0.6, label=str(k), linewidths=0)
        ax.scatter(*zip(*drawn["plane_templates"], strict=True), marker="^", color="black", s=25, zorder=3)
        ax.set(title=f"{method}: {part} features, seed {drawn['seed']}")
    axes[0].legend(title="digit")


def draw_bars(axes: Axes, records: list[common.Record]) -> None:
    keys = [key for key in STUDENT_COLUMNS if key != "accuracy"]
    for i, method in enumerate(common.METHODS):
        found = [common.spread(common.values(of(records, method), key)) for key in keys]
        places = [j + 0.2 * (i - 1.5) for j in range(len(keys))]
        deviations = [d if d == d else 0.0 for _, d in found]
        axes.bar(places, [m for m, _ in found], 0.18, yerr=deviations, color=common.COLOURS[method], label=method)
    lowest = min(value for key in keys for value in common.values(records, key))
    labels = [STUDENT_COLUMNS[key][0].removeprefix("student, ").replace(", ", "\n") for key in keys]
    axes.set_xticks(range(len(keys)), labels)
    axes.set(title="students, by their teacher's loss", ylabel="accuracy", ylim=(lowest - 0.01, None))
    axes.legend(ncols=2)


def draw(records: list[common.Record]) -> Figure:
    figure = common.figure(4, 3)
    ax = figure.axes
    draw_reliability(ax[0], records)
    draw_bars(ax[2], records)
    draw_planes((ax[3], ax[4], ax[6], ax[7]), records)
    for method in ("hard", "uniform"):
        nll = mean_over_seeds(of(records, method), "nll_over_t")
        ax[1].plot(TEMPERATURES, nll, color=common.COLOURS[method], label=method)
    ax[1].set(title="test NLL over temperature", xlabel="T", ylabel="NLL", xscale="log", ylim=(0, 1.2))
    ax[1].set_xticks((0.25, 0.5, 1, 2, 4), ("¼", "½", "1", "2", "4"), minor=False)
    ax[1].set_xticks((), minor=True)
    for method in common.METHODS:
        told = mean_over_seeds(of(records, method), "information")
        ax[5].plot(told[:, 0], told[:, 1], color=common.COLOURS[method], label=method)
    ax[5].set(title=f"mutual information, image and z{PLANE[0]} − z{PLANE[1]}", xlabel="epoch", ylabel="nats")
    grid = [r for r in records if r["method"] in ("hard", "uniform")]
    keys = (("tightness", "tightness_validation"), ("nll", "nll_scaled"), ("ece", "ece_scaled"), ("accuracy",))
    for i, pair in enumerate(keys, start=8):
        for key, style in zip(pair, ("-", ":"), strict=False):
            look = {"linestyle": style, "color": common.COLOURS["uniform"], "label": common.COLUMNS[key][0]}
            common.draw_over(ax[i], grid, "eps", key, **look)
        ax[i].set(title=f"{common.COLUMNS[pair[0]][0]} over ε, uniform", xlabel="ε")
    for i in (1, 5, 8, 9, 10):
        ax[i].legend()
    return figure


def findings(records: list[common.Record]) -> str:
    uniform, hard = ({"method": "uniform", "eps": EPS}, {"method": "hard"})
    expected = {
        "accuracy": ("Accuracy", 1),
        "ece": ("ECE, without temperature scaling", -1),
        "tightness": ("Tightness of the training features (smaller is tighter)", -1),
        "tightness_validation": ("Tightness of the validation features", -1),
        "information_last": ("Mutual information at the end of training", -1),
        "student_2": ("Accuracy of the student, T = 2, α = 1", -1),
        "student_4": ("Accuracy of the student, T = 4, α = 1", -1),
        "student_4_half": ("Accuracy of the student, T = 4, α = ½", -1),
    }
    lines = [
        f"- {what}: {common.gap(records, key, uniform, hard).against(sign)}." for key, (what, sign) in expected.items()
    ]
    for name, method in (("hard", hard), ("smoothed", uniform)):
        found = common.gap(records, "student_4", method, "student_alone")
        lines.append(
            f"- Accuracy of the student (T = 4, α = 1) of a {name} teacher against the same loss alone: {found}."
        )
    return "Smoothed (uniform) against hard targets, or students of such teachers:\n\n" + "\n".join(lines)


def calibration_text(records: list[common.Record]) -> str:
    uniform, hard = ({"method": "uniform", "eps": EPS}, {"method": "hard"})
    heat = [common.spread(common.values(of(records, method), "temperature"))[0] for method in ("hard", "uniform")]
    sure = [f"{'over' if t > 1 else 'under'}confident (T = {t:.2f})" for t in heat]
    floor = common.spread(common.values(of(records, "hard"), "ece_floor"))[0]
    tried = sorted({r["eps"] for r in records if r["eps"] > 0})
    against = [common.gap(records, "ece", {"method": "uniform", "eps": eps}, hard) for eps in tried]
    return (
        f"On average the network is {sure[0]} with hard targets and {sure[1]} with ε = {EPS}. Smoothed against hard, "
        f"both scaled: the ECE is {common.gap(records, 'ece_scaled', uniform, hard)}, the NLL "
        f"{common.gap(records, 'nll_scaled', uniform, hard)}. Smoothed, unscaled, against hard, scaled, the ECE is "
        f"{common.gap(records, 'ece', uniform, hard, other_key='ece_scaled')}. The ECE is not 0 even for a perfect "
        "forecast of so few rows: had the scaled hard network's probabilities been the truth, it would be "
        f"{floor:.2%} on average.\n\nECE with uniform smoothing against hard targets, both unscaled:\n\n"
        + "\n".join(f"- ε = {eps:g}: {found}." for eps, found in zip(tried, against, strict=True))
    )


def what_was_done() -> str:
    images = 2 * TRAIN // CLASSES
    return (
        f"Small teachers on scikit-learn's digits with pixel noise of standard deviation {NOISE}: {TRAIN} training, "
        f"{VALIDATION} validation and {TEST} test images, split by seed. Methods: hard targets; ε = {EPS} spread "
        "uniformly over the classes, over the *other* classes, or by class frequency (*unigram*). The digits are "
        "almost equally frequent, so that *unigram* is nearly uniform here, and *others* is uniform with an ε larger "
        "by a ninth: how far the three differ is a measure of chance.\n\n"
        "T is fitted on the validation images and judged on the test images. Tightness is the share of the scatter of "
        "the penultimate features that lies within classes: 0 where each class is a point. Students are perceptrons "
        "that see the training images without augmentation. The mutual information is between which image it was (of "
        f"about {images} training images of the digits {PLANE[0]} and {PLANE[1]}) and the difference of the two "
        f"logits, over {DRAWS} augmentations of each; it is at most log {images} = {math.log(images):.2f} nats."
    )


def write(out: Path) -> None:
    """Plots and page, from the records alone."""
    records, _ = common.load(out, NAME)
    common.save_figure(out, NAME, draw(records))
    main = [r for method in common.METHODS for r in of(records, method)]
    grid = sorted((r for r in records if r["method"] in ("hard", "uniform")), key=lambda r: r["eps"])
    sections = [
        what_was_done(),
        "## Accuracy and calibration\n\n" + common.table(main, common.MEASURED),
        calibration_text(records),
        "## Findings against those of Müller et al. 2019\n\n" + findings(records),
        "## Features and information\n\n" + common.table(main, tuple(FEATURE_COLUMNS)),
        "## Distillation\n\nTest accuracy. The last column is a student without a teacher, on the loss that the row's "
        "teacher was trained with.\n\n" + common.table(main, STUDENT_COLUMNS, by=("method",)),
        "## Over ε, uniform smoothing\n\n" + common.table(grid, (*common.MEASURED, "tightness"), by=("eps",)),
    ]
    common.page(out, NAME, "Digits: when does label smoothing help?", sections)


def main() -> None:
    options = common.arguments(__doc__, seeds=5).parse_args()
    if not options.render:
        records: list[common.Record] = []
        for seed in common.seeds_of(options):
            records += train(seed, QUICK if options.quick else FULL)
            common.save(options.out, NAME, records, {"quick": options.quick})  # an interrupted run keeps its seeds
            print(f"seed {seed} done", flush=True)
    write(options.out)


if __name__ == "__main__":
    main()
