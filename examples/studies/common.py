"""What the studies share: methods, records, measures over seeds, tables, pages and plots.

A study trains, collects one :data:`Record` per trained model, and writes three files named after it: NAME.json (the
records), NAME.png and NAME.md. Page and plots are made from the records alone, so that ``--render`` remakes them
without training, and no sentence of a page can rest on anything but what is in the JSON:

    options = arguments(__doc__, seeds=5).parse_args()
    if not options.render:
        save(options.out, NAME, train(options), {"quick": options.quick, "eps": 0.1})
    records, about = load(options.out, NAME)
    save_figure(options.out, NAME, draw(records))
    page(options.out, NAME, "A title", [what_was_done(about), table(records, MEASURED), findings(records)])
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import re
import statistics
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit(f"{error}: the studies draw their plots with matplotlib; pip install matplotlib") from error

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from matplotlib.axes import Axes
    from torch import Tensor

Record = dict[str, Any]  # study, method, eps, seed, and numbers or lists of numbers
Pair = tuple["Tensor", "Tensor"]
START = time.perf_counter()

METHODS: dict[str, Callable[[float, Tensor], dict[str, Any]]] = {
    "hard": lambda eps, counts: {"label_smoothing": 0.0},
    "uniform": lambda eps, counts: {"label_smoothing": eps, "smoothing": "uniform"},
    "others": lambda eps, counts: {"label_smoothing": eps, "smoothing": "others"},
    "unigram": lambda eps, counts: {"label_smoothing": eps, "smoothing": counts.double() / counts.sum()},
}
COLOURS = {"hard": "#d55e00", "uniform": "#4a90d9", "others": "#00573f", "unigram": "#8e6bb0"}
MEASURED = ("accuracy", "nll", "ece", "temperature", "nll_scaled", "ece_scaled")
COLUMNS: dict[str, tuple[str, str]] = {  # heading and format of keys that several studies report
    "method": ("method", ""),
    "eps": ("ε", "g"),
    "accuracy": ("accuracy", ".2%"),
    "nll": ("NLL", ".3f"),
    "ece": ("ECE", ".2%"),
    "brier": ("Brier", ".3f"),
    "temperature": ("T", ".2f"),
    "nll_scaled": ("NLL after T", ".3f"),
    "ece_scaled": ("ECE after T", ".2%"),
    "tightness": ("tightness", ".3f"),
}
# Two-sided 95% quantiles of Student's t for 1, 2, ... degrees of freedom: few seeds make wide intervals.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def loss_options(method: str, eps: float, counts: Tensor) -> dict[str, Any]:
    """Options of ``lsk.cross_entropy`` and ``lsk.linear_cross_entropy`` for a method; counts (K,) of the classes."""
    return METHODS[method](eps, counts)


def arguments(description: str | None, seeds: int) -> argparse.ArgumentParser:
    """The options that all studies have; ``seeds`` is how many a full run trains."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: shows that it runs, not what it finds")
    parser.add_argument("--seeds", type=int, help=f"models per method (default: {seeds}, quick: 2)")
    parser.add_argument("--out", type=Path, default=Path("docs/studies"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--render", action="store_true", help="page and plots from the JSON in DIR, without training")
    # argparse converts a default that is a string, so this sets the threads whether or not the option is given.
    parser.add_argument("--threads", type=_use_threads, default="2", help="CPU threads (%(default)s)")
    parser.set_defaults(full_seeds=seeds)
    return parser


def seeds_of(options: argparse.Namespace) -> range:
    """The seeds to train: ``--seeds`` where given, else 2 with ``--quick`` and as many as the study says without."""
    return range(options.seeds or (2 if options.quick else options.full_seeds))


def _use_threads(text: str) -> int:
    count = int(text)
    torch.set_num_threads(count)
    return count


def set_up(seed: int) -> None:
    """All randomness of one model comes from its seed."""
    torch.manual_seed(seed)
    random.seed(seed)


def measure(validation: Pair, test: Pair, linear_weight: Tensor | None = None) -> dict[str, float]:
    """Accuracy and calibration on test data, as they are and after the temperature that suits the validation data best.

    Each pair is (logits, target), or (hidden, target) with the ``linear_weight`` of the head. Where no temperature is
    best (every validation row is right, and surer still at T → 0) the scaled figures are NaN, and tables leave such a
    seed out.
    """
    plain = calibration.evaluate(*test, linear_weight)
    found = {"accuracy": plain.accuracy, "nll": plain.nll, "ece": plain.ece, "brier": plain.brier}
    try:
        temperature = calibration.fit_temperature(*validation, linear_weight).temperature
    except lsk.ArgumentError as error:
        if "temperature suits" not in str(error):
            raise
        return {**found, "temperature": math.nan, "nll_scaled": math.nan, "ece_scaled": math.nan}
    scaled = calibration.evaluate(*test, linear_weight, logit_scale=1 / temperature)
    return {**found, "temperature": temperature, "nll_scaled": scaled.nll, "ece_scaled": scaled.ece}


def record(study: str, method: str, eps: float, seed: int, **numbers: Any) -> Record:
    """One trained model; the ``eps`` of hard targets is 0 whatever the others' is."""
    return {"study": study, "method": method, "eps": 0.0 if method == "hard" else eps, "seed": seed, **numbers}


def save(out: Path, name: str, records: Sequence[Record], about: Mapping[str, Any]) -> None:
    """Records, what the study says about itself, and where and how they were made, as out/name.json."""
    made = {
        "command": " ".join(("python", f"examples/studies/{name}.py", *_without_out(sys.argv[1:]))),
        "machine": {"cpu": _cpu(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "seconds": round(time.perf_counter() - START),
    }
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"about": {**about, **made}, "records": _finite(list(records))}, allow_nan=False)
    (out / f"{name}.json").write_text(content.replace('{"study"', '\n{"study"') + "\n", encoding="utf-8")


def load(out: Path, name: str) -> tuple[list[Record], dict[str, Any]]:
    """(records, about) of out/name.json; a number that was not finite is None."""
    path = out / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"--render needs {path}, which a run without it writes")
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["records"], content["about"]


def _finite(value: Any) -> Any:
    """JSON has no NaN; and six digits are more than any of these numbers is good for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def _without_out(argv: Sequence[str]) -> list[str]:
    """Where the files went says nothing about what is in them."""
    return re.sub(r"(^| )--out[ =]\S+", "", " ".join(argv)).split()


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.machine()


def select(records: Iterable[Record], **wanted: Any) -> list[Record]:
    """The records whose keys have these values."""
    return [r for r in records if all(r.get(key) == value for key, value in wanted.items())]


def values(records: Iterable[Record], key: str) -> list[float]:
    """The numbers under a key, where there are any."""
    return [r[key] for r in records if r.get(key) is not None]


def spread(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation, NaN where there are too few numbers for it."""
    mean = statistics.fmean(numbers) if numbers else math.nan
    return mean, statistics.stdev(numbers) if len(numbers) > 1 else math.nan


class Gap(NamedTuple):
    """By how much one method is above another, seed by seed; ``str`` says what the numbers allow to be said."""

    mean: float
    margin: float
    """half the width of the 95% interval of the mean; infinite with a single seed"""
    seeds: int
    spec: str

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, else 0: not told apart."""
        return (self.mean > self.margin) - (self.mean < -self.margin)

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"not known to differ ({self.seeds} seed)"
        size = _with_margin(abs(self.mean), self.margin, self.spec)
        if self.sign == 0:
            return f"not told apart (difference {_with_margin(self.mean, self.margin, self.spec)}, {self.seeds} seeds)"
        return f"{'higher' if self.sign > 0 else 'lower'} by {size} ({self.seeds} seeds)"

    def against(self, expected: int, source: str = "the paper") -> str:
        """The difference, and whether its sign is the ``expected`` one of ``source``."""
        says = {expected: f"as in {source}", -expected: f"the opposite of {source}"}
        return f"{self}: {says.get(self.sign, 'no such effect is seen at this size')}"


def gap(
    records: Sequence[Record],
    key: str,
    first: Mapping[str, Any],
    second: Mapping[str, Any] | str,
    other_key: str | None = None,
) -> Gap:
    """``key`` of the models that ``first`` selects less that of ``second``'s, paired by seed: data and initial weights
    are the same in a pair, so that their spread does not drown the difference.

    ``second`` may also be another key of the same models, such as "ece_scaled" against "ece"; and with ``other_key`` it
    is that key of the second models.
    """
    other, other_key = (first, second) if isinstance(second, str) else (second, other_key or key)
    left, right = _by_seed(records, key, first), _by_seed(records, other_key, other)
    both = [s for s in left if left[s] is not None and right.get(s) is not None]
    mean, deviation = spread([left[s] - right[s] for s in both])
    margin = math.inf
    if len(both) > 1:
        margin = _T95[min(len(both) - 1, len(_T95)) - 1] * deviation / math.sqrt(len(both))
    return Gap(mean, margin, len(both), COLUMNS.get(key, ("", ".3f"))[1])


def _by_seed(records: Sequence[Record], key: str, wanted: Mapping[str, Any]) -> dict[int, float | None]:
    found = select(records, **wanted)
    by_seed = {r["seed"]: r.get(key) for r in found}
    if len(by_seed) < len(found):
        raise ValueError(f"{dict(wanted)} selects more than one record of a seed: name what tells them apart")
    return by_seed


def _with_margin(mean: float, margin: float, spec: str) -> str:
    if spec.endswith("%"):
        return f"{100 * mean:{spec[:-1]}f} ± {100 * margin:{spec[:-1]}f} points"
    return f"{mean:{spec}} ± {margin:{spec}}"


def table(
    records: Sequence[Record],
    columns: Sequence[str] | Mapping[str, tuple[str, str]],
    by: Sequence[str] = ("method", "eps"),
) -> str:
    """A Markdown table: a row for every combination of the keys ``by``, in the order of the records; mean ± standard
    deviation over the records of the row, and of how many where some have no such number. ``columns`` are keys of
    COLUMNS, or keys with (heading, format)."""
    formats = columns if isinstance(columns, dict) else {key: COLUMNS.get(key, (key, ".3f")) for key in columns}
    labels = [COLUMNS.get(key, (key, "")) for key in by]
    lines = ["| " + " | ".join([heading for heading, _ in (*labels, *formats.values())]) + " |"]
    lines.append("|" + "---|" * len(by) + "---:|" * len(formats))
    for group in dict.fromkeys(tuple(r[key] for key in by) for r in records):
        rows = select(records, **dict(zip(by, group, strict=True)))
        cells = [format(part, spec) for part, (_, spec) in zip(group, labels, strict=True)]
        cells += [_cell(values(rows, key), spec, len(rows)) for key, (_, spec) in formats.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(numbers: Sequence[float], spec: str, wanted: int) -> str:
    mean, deviation = spread(numbers)
    if math.isnan(mean):
        return "–"
    scale, spec, unit = (100, spec[:-1] + "f", " %") if spec.endswith("%") else (1, spec, "")
    plus_minus = "" if math.isnan(deviation) else f" ± {scale * deviation:{spec}}"
    of = f" ({len(numbers)} of {wanted})" if len(numbers) < wanted else ""
    return f"{scale * mean:{spec}}{plus_minus}{unit}{of}"


def page(out: Path, name: str, title: str, sections: Sequence[str]) -> None:
    """out/name.md: the title, the first section, the plots, the other sections, and how the page was made."""
    records, about = load(out, name)
    machine, seeds = about["machine"], sorted({r["seed"] for r in records})
    note = (
        f"Made by `{about['command']}` on {about['date']} in {about['seconds']} s: {machine['cpu']}, "
        f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}, torch {machine['torch']}; seeds "
        f"{', '.join(map(str, seeds))}. Records: [{name}.json]({name}.json), from which `--render` remakes this "
        "page. ± is the standard deviation over seeds in tables; in sentences, half the 95% interval (Student's t) of "
        "the mean difference of pairs with the same seed."
    )
    if about.get("quick"):
        note += " **This was a `--quick` run: it shows that the study works, not what it finds.**"
    parts = [f"# {title}", sections[0], f"![Plots of this study]({name}.png)", *sections[1:], "---", note]
    (out / f"{name}.md").write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    print(f"wrote {out / name}.md, .png and .json")


def figure(rows: int, columns: int) -> Figure:
    """A figure with rows × columns axes, which are its ``.axes``, a flat list, row by row."""
    mpl.rcParams.update(
        {
            "axes.grid": True,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "font.size": 9,
            "grid.alpha": 0.25,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
        }
    )
    made = Figure(figsize=(4.0 * columns, 3.2 * rows), layout="constrained")  # no pyplot: no display, no global state
    made.subplots(rows, columns, squeeze=False)
    return made


def save_figure(out: Path, name: str, fig: Figure) -> None:
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / f"{name}.png", dpi=130)


def draw_over(axes: Axes, records: Sequence[Record], x: str, key: str, **look: Any) -> None:
    """The mean of ``key`` over seeds against the key ``x``, with its standard deviation."""
    at = sorted({r[x] for r in records})
    found = [spread(values(select(records, **{x: value}), key)) for value in at]
    deviations = [0.0 if math.isnan(deviation) else deviation for _, deviation in found]
    axes.errorbar(at, [mean for mean, _ in found], deviations, marker=".", capsize=2, **look)


def reliability_points(calibrated: calibration.Calibration) -> list[list[float]]:
    """[rows, mean confidence, accuracy] of the bins of equal width, as numbers for a record."""
    bins = calibrated.reliability()
    return [part.nan_to_num().tolist() for part in (bins.rows, bins.confidence, bins.accuracy)]


def draw_reliability(axes: Axes, points: Sequence[list[list[float]]], **look: Any) -> None:
    """One line of a reliability diagram, the rows of several seeds taken together."""
    rows, confidence, accuracy = torch.tensor(points, dtype=torch.float64).transpose(0, 1)
    seen = rows.sum(0) >= 20  # fewer make a point that jumps
    x, y = ((part * rows).sum(0)[seen] / rows.sum(0)[seen] for part in (confidence, accuracy))
    axes.plot((0, 1), (0, 1), color="0.6", linewidth=1, zorder=1)
    axes.plot(x, y, marker=".", **look)
    axes.set(xlabel="confidence", ylabel="accuracy")
