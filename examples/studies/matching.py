"""Label smoothing for features that are compared by angle: does it hurt where the scale of the logits is fixed?

Face and product matching train a classifier with logits s·cos, features and templates normalised and s a constant, and
compare pictures by the cosine of their features afterwards, pictures of classes never seen in training among them. The
claim under test: there label smoothing hurts, because it can shrink no norm and so must pull angles together. With K
classes the smoothed loss is least where the target's logit leads each other by

    Δ = log((1 - ε + ε/K) / (ε/K))        so it wants cos_target - cos_other = Δ/s

which at s = 64 is next to no difference at all; features of unit length and their templates could differ by K/(K-1).
Tested on scikit-learn's digits with noise: seven digits to train on, pairs of the three others to tell apart.

    pip install scikit-learn matplotlib
    python examples/studies/matching.py          # minutes on one CPU core; writes docs/studies/matching.*
    python examples/studies/matching.py --quick  # a minute
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
from digits import augmented

import labelsmooth_kernels as lsk
from labelsmooth_kernels import representation

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

NAME = "matching"
UNSEEN, WIDTH, BATCH = 3, 32, 100
SEEN = 10 - UNSEEN
NOISE = 0.2  # of pixels between 0 and 1, drawn once per seed
FAR = 0.01  # share of different pairs that may be taken for the same
FIXED, LEARNED, FREE = (4, 16, 64), "learned", "free"
LOOKS = {4: "#9cc4ee", 16: "#4a90d9", 64: "#1b3f73", LEARNED: "#00573f", FREE: "#d55e00"}
NAMES = {s: f"s = {s}" for s in FIXED} | {LEARNED: "s learned", FREE: "no normalisation"}
CLASSIFIED = ("accuracy", "ece", "temperature", "ece_scaled")
MATCHED = {
    "unseen_eer": ("EER, unseen", ".2%"),
    "unseen_auc": ("AUC, unseen", ".4f"),
    "unseen_tar": ("TAR at FAR 1 %, unseen", ".1%"),
    "seen_eer": ("EER, seen", ".2%"),
    "seen_auc": ("AUC, seen", ".4f"),
    "seen_tar": ("TAR at FAR 1 %, seen", ".1%"),
}
ANGLES = {
    "lead": ("cos of the target less mean cos of the others", ".3f"),
    "lead_wanted": ("Δ/s", ".3f"),
    "scale_learned": ("s at the end", ".1f"),
    "tightness": ("tightness of the directions, training", ".3f"),
    "unseen_tightness": ("of unseen classes", ".3f"),
}
common.COLUMNS.update(MATCHED | ANGLES | {"scale": ("logits", ""), "rise": ("rise of the EER", ".2%")})


class Plan(NamedTuple):
    epochs: int
    scales: tuple[int | str, ...]
    smoothings: tuple[float, ...]


FULL = Plan(epochs=50, scales=(*FIXED, LEARNED, FREE), smoothings=(0.0, 0.1, 0.2))
QUICK = Plan(epochs=8, scales=(4, 64, FREE), smoothings=(0.0, 0.1))


class Data(NamedTuple):
    """Three parts of the images of seen classes, which are numbered anew, and all images of the unseen."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    unseen: tuple[Tensor, Tensor]


def read_digits(seed: int) -> Data:
    """Which digits stay unseen is drawn per seed too: the spread over seeds is also one over classes."""
    digits, generator = load_digits(), torch.Generator().manual_seed(seed)
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    images += NOISE * torch.randn(images.shape, generator=generator)
    order = torch.randperm(10, generator=generator)  # the first three are unseen
    target = order.argsort()[torch.tensor(digits.target)] - UNSEEN
    seen = (target >= 0).nonzero().flatten().tolist()
    train, rest = train_test_split(seen, train_size=0.6, stratify=target[seen], random_state=seed)
    validation, test = train_test_split(rest, train_size=0.4, stratify=target[rest], random_state=seed)
    parts = (train, validation, test, (target < 0).nonzero().flatten())
    return Data(*((images[part], target[part]) for part in parts))


class Matcher(nn.Module):
    """Images to logits: s·cos between features and templates, or ("free") features times templates as they are.

    Features are centred by a batch normalisation, as matching networks do it: otherwise they begin in a narrow cone,
    and at a large s nothing makes them leave it.
    """

    def __init__(self, scale: int | str) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * 16, WIDTH), nn.BatchNorm1d(WIDTH, affine=False)),
        )
        self.templates = nn.Parameter(torch.randn(SEEN, WIDTH) / math.sqrt(WIDTH))
        self.scale = scale
        self.log_scale = nn.Parameter(torch.tensor(math.log(16.0)), requires_grad=scale == LEARNED)

    def directions(self, images: Tensor) -> Tensor:
        return F.normalize(self.features(images), dim=-1)

    def cosines(self, images: Tensor) -> Tensor:
        return self.directions(images) @ F.normalize(self.templates, dim=-1).T

    def loss(self, images: Tensor, target: Tensor, **options: Any) -> Tensor:
        """A fixed scale is the loss's own option: the scaled logits are never held. A learned one needs a gradient."""
        if isinstance(self.scale, int):
            return lsk.cross_entropy(self.cosines(images), target, logit_scale=float(self.scale), **options)
        return lsk.cross_entropy(self(images), target, **options)

    def forward(self, images: Tensor) -> Tensor:
        if self.scale == FREE:
            return self.features(images) @ self.templates.T
        scale = self.log_scale.exp() if self.scale == LEARNED else self.scale
        return scale * self.cosines(images)


def train_matcher(data: Data, seed: int, scale: int | str, epochs: int, **options: Any) -> Matcher:
    """With one seed all settings start from the same weights and see the same batches."""
    common.set_up(seed)
    matcher, (images, target) = Matcher(scale), data.train
    optimizer = torch.optim.Adam([p for p in matcher.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(target)).split(BATCH):
            loss = matcher.loss(augmented(images[rows]), target[rows], **options)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return matcher.eval()


def pair_scores(directions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of the same class, and of all others."""
    first, second = torch.triu_indices(len(target), len(target), offset=1)
    cosines = (directions.double() @ directions.double().T)[first, second]
    same = target[first] == target[second]
    return cosines[same], cosines[~same]


def verification(same: Tensor, different: Tensor) -> dict[str, float]:
    """How well a threshold on the score tells pairs of one class from pairs of two.

    auc: the chance that a same pair scores above a different one, a tie counting half. tar: the share of same pairs
    accepted by the threshold that accepts FAR of the different ones. eer: where as large a share of same pairs is
    refused as of different ones is accepted.
    """
    low, high = same.sort().values, different.sort().values
    below, upto = (torch.searchsorted(high, low, right=right).double() for right in (False, True))
    threshold = high[math.ceil((1 - FAR) * len(high)) - 1]
    refused = torch.arange(len(low)) / len(low)  # of same pairs, by a threshold at each of their scores
    accepted = 1 - below / len(high)
    crossing = (refused - accepted).abs().argmin()
    return {
        "auc": float((below + upto).mean() / 2 / len(high)),
        "tar": float((low > threshold).double().mean()),
        "eer": float((refused[crossing] + accepted[crossing]) / 2),
    }


def lead_wanted(scale: int | str, eps: float) -> float:
    """Δ/s, or the most that there is if that is less; NaN where hard targets or a free scale want no particular one."""
    if eps == 0 or not isinstance(scale, int):
        return math.nan
    return min(math.log((1 - eps + eps / SEEN) / (eps / SEEN)) / scale, SEEN / (SEEN - 1))


@torch.no_grad()
def numbers_of(matcher: Matcher, data: Data, eps: float, seed: int) -> dict[str, Any]:
    validation, test = ((matcher(images), target) for images, target in (data.validation, data.test))
    numbers: dict[str, Any] = {"scale": matcher.scale, **common.measure(validation, test)}
    for part, (images, target) in (("seen", data.test), ("unseen", data.unseen)):
        same, different = pair_scores(matcher.directions(images), target)
        numbers |= {f"{part}_{key}": value for key, value in verification(same, different).items()}
        if seed == 0:
            counts = [torch.histc(scores.clamp(-1, 1), 50, -1, 1) / len(scores) for scores in (same, different)]
            numbers[f"{part}_histograms"] = [share.tolist() for share in counts]
    images, target = data.train
    cosines = matcher.cosines(images)
    own = cosines.gather(1, target[:, None])[:, 0]
    unseen = representation.class_scatter(matcher.directions(data.unseen[0]), data.unseen[1] + UNSEEN)
    return numbers | {
        "lead": float((own - (cosines.sum(1) - own) / (SEEN - 1)).mean()),
        "lead_wanted": lead_wanted(matcher.scale, eps),
        "scale_learned": float(matcher.log_scale.exp()) if matcher.scale == LEARNED else math.nan,
        "tightness": representation.class_scatter(matcher.directions(images), target).tightness,
        "unseen_tightness": unseen.tightness,
    }


def train(seed: int, plan: Plan) -> list[common.Record]:
    records, data = [], read_digits(seed)
    counts = torch.bincount(data.train[1], minlength=SEEN)
    for scale in plan.scales:
        for eps in plan.smoothings:
            method = "uniform" if eps else "hard"
            options = common.loss_options(method, eps, counts)
            matcher = train_matcher(data, seed, scale, plan.epochs, **options)
            records.append(common.record(NAME, method, eps, seed, **numbers_of(matcher, data, eps, seed)))
    return records


def draw(records: list[common.Record]) -> Figure:
    figure = common.figure(2, 3)
    ax = figure.axes
    scales = list(dict.fromkeys(r["scale"] for r in records))
    for axes, key in zip(ax, ("unseen_eer", "unseen_tar", "seen_eer", "lead"), strict=False):
        for scale in scales:
            look = {"color": LOOKS[scale], "label": NAMES[scale]}
            common.draw_over(axes, common.select(records, scale=scale), "eps", key, **look)
        axes.set(title=common.COLUMNS[key][0], xlabel="ε", xticks=sorted({r["eps"] for r in records}))
    for scale in (s for s in scales if s in FIXED):
        eps = [e / 100 for e in range(2, 21)]
        ax[3].plot(eps, [lead_wanted(scale, e) for e in eps], ":", color=LOOKS[scale])
    ax[3].set_title("lead of the target's cosine; dotted: Δ/s")
    ax[0].legend()
    shown = [(scales[-1] if scales[-1] in FIXED else max(s for s in scales if s in FIXED), eps) for eps in (0.0, 0.1)]
    edges = [-1 + k / 25 for k in range(51)]
    for axes, (scale, eps) in zip(ax[4:], shown, strict=True):
        found = next(r for r in common.select(records, scale=scale, eps=eps) if "unseen_histograms" in r)
        for share, colour, label in zip(
            found["unseen_histograms"], ("#00573f", "#d55e00"), ("same", "different"), strict=True
        ):
            axes.stairs(share, edges, fill=True, alpha=0.5, color=colour, label=label)
        axes.set(title=f"unseen pairs, s = {scale}, ε = {eps:g}, seed {found['seed']}", xlabel="cosine")
        axes.legend()
    return figure


def with_rises(records: list[common.Record]) -> list[common.Record]:
    """Each record with its equal error rate less that of hard targets at the same scale and seed."""
    hard = {(r["scale"], r["seed"]): r for r in records if r["eps"] == 0}
    return [{**r, "rise": r["unseen_eer"] - hard[r["scale"], r["seed"]]["unseen_eer"]} for r in records]


def effect(records: list[common.Record], key: str, title: str, harm: int) -> str:
    """What smoothing does to a number, setting by setting, and in one sentence; ``harm`` is the sign that is worse."""
    scales = list(dict.fromkeys(r["scale"] for r in records))
    smoothings = sorted({r["eps"] for r in records} - {0.0})
    gaps = {
        (s, eps): common.gap(records, key, {"scale": s, "eps": eps}, {"scale": s, "eps": 0.0})
        for s in scales
        for eps in smoothings
    }
    signs = {s: [harm * gaps[s, eps].sign for eps in smoothings] for s in scales}
    said = {
        "it hurts (at some ε, and helps at none)": [s for s in scales if max(signs[s]) > 0 and min(signs[s]) >= 0],
        "it helps (at some ε, and hurts at none)": [s for s in scales if min(signs[s]) < 0 and max(signs[s]) <= 0],
        "it does both, at different ε": [s for s in scales if max(signs[s]) > 0 > min(signs[s])],
        "it is not told apart from doing nothing": [s for s in scales if not any(signs[s])],
    }
    summary = "; ".join(f"{what}: {', '.join(NAMES[s] for s in found)}" for what, found in said.items() if found)
    lines = "\n".join(f"- {NAMES[s]}, ε = {eps:g}: {found}." for (s, eps), found in gaps.items())
    return f"**{title}**, smoothed against hard targets – {summary}.\n\n{lines}"


def findings(records: list[common.Record]) -> str:
    """The claim is of harm where the scale is fixed, and of more harm than where it is not."""
    parts = [
        effect(records, "unseen_eer", "Equal error rate on pairs of unseen classes", 1),
        effect(records, "seen_eer", "Equal error rate on pairs of seen classes", 1),
        effect(records, "accuracy", "Accuracy of the classifier", -1),
        "How much more the error rate on unseen classes rises with smoothing than it does without normalisation:",
    ]
    settings = dict.fromkeys((r["scale"], r["eps"]) for r in records if r["scale"] in FIXED and r["eps"] > 0)
    rises = with_rises(records)
    found = {
        (s, eps): common.gap(rises, "rise", {"scale": s, "eps": eps}, {"scale": FREE, "eps": eps})
        for s, eps in settings
    }
    parts.append("\n".join(f"- {NAMES[s]}, ε = {eps:g}: {rise}." for (s, eps), rise in found.items()))
    parts.append("Of so many 95% intervals one in twenty misses: single lines that stand out mean little.")
    return "\n\n".join(parts)


WHAT = f"""
A small convolutional network on scikit-learn's digits with pixel noise of standard deviation {NOISE}: {SEEN} digits
to train on, drawn per seed, with {WIDTH} features after a batch normalisation. Logits are s·cos with s fixed, s·cos
with s learned (from 16), or features times templates without normalisation. Afterwards all pairs of test images are
compared by the cosine of their features: of the classes seen in training, and of the {UNSEEN} that were not. EER: the
rate at which as many same pairs are refused as different ones are accepted; TAR: same pairs accepted where {FAR:.0%}
of the different are.

The claim, from a blog: label smoothing hurts here, because with a fixed scale it can only act on angles. What it asks
of them is that the target's cosine leads each other by Δ/s = log((1 − ε + ε/K)/(ε/K))/s, or by K/(K−1) where that is
more than there is. Hard targets ask for as much as there is, whatever s, but hardly any more once s times the lead is
a few nats.
"""


def write(out: Path) -> None:
    """Plots and page, from the records alone."""
    records, _ = common.load(out, NAME)
    common.save_figure(out, NAME, draw(records))
    named = [{**r, "scale": NAMES[r["scale"]]} for r in records]
    by = ("scale", "eps")
    sections = [
        WHAT,
        "## Matching\n\n" + common.table(named, MATCHED, by),
        "## Does the claim show?\n\n" + findings(records),
        "## Classification and angles\n\n" + common.table(named, (*CLASSIFIED, *ANGLES), by),
    ]
    common.page(out, NAME, "Matching: label smoothing where only angles count", sections)


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
