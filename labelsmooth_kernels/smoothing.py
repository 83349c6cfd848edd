"""How much to smooth, over what, and when: closed forms, priors from counts, soft targets of neighbours, schedules.

A row's target weights q of mass 1 have their least loss where p = q, and it is their entropy H(q): what a loss exceeds
it by, the *excess loss* KL(q ‖ p), is 0 for a model that has learned all there is, whatever ε is, and can be compared
between values of ε. The logits of such a model differ by a finite gap:

    smoothing     H(q), least loss                          gap between the target's logit and another's
    "uniform"     q_y = 1 - ε + ε/K, others ε/K             log(1 + K·(1 - ε)/ε)
    "others"      q_y = 1 - ε, others ε/(K - 1)             log((K - 1)·(1 - ε)/ε)
    prior u       q = (1 - ε)·[k=y] + ε·u                   log((1 - ε + ε·u_y)/(ε·u_k))

Which ε is best for a task nobody can say beforehand: :func:`compare` lays models that were trained with several beside
each other on validation data, at several temperatures and at the one that suits each best.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .arguments import known_size, plain_float, plain_int, same_shape, takes, unscriptable
from .calibration import PASSED_ON, Calibration, check_options, evaluate, fit_temperature
from .conventions import target_entropy
from .reference import optimal_gap
from .spec import INDEX_DTYPES, ArgumentError, require
from .targets import TopK
from .torch_state import readable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Unpack

    from .options import EvaluationOptions

__all__ = [
    "Schedule", "Trial", "compare", "cosine", "excess_loss", "linear", "neighbour_targets", "optimal_gap",
    "plot_trials", "target_entropy", "temporal_targets", "trial_table", "unigram_prior",
]  # fmt: skip


@unscriptable
def excess_loss(loss: float, label_smoothing: float, num_classes: int, smoothing: str = "uniform") -> float:
    """A mean smoothed loss minus the least one, H(q): mean KL(q ‖ p), >= 0 but for rounding.

    Arguments as in :func:`target_entropy`, whose errors are raised. For a mean over rows without weights.
    """
    return loss - target_entropy(label_smoothing, num_classes, smoothing)


@unscriptable
def unigram_prior(counts: Tensor, power: float = 1.0, add: float = 0.0) -> Tensor:
    """u_k ∝ (counts_k + add)^power, a prior for ``smoothing=``: float64 (K,) that sums to 1.

    Args:
        counts: (K,) how often each class occurs, integers or floating point, finite and >= 0.
        power: 1 gives frequencies, 0 the uniform prior over classes with ``counts + add > 0``; 0.75 is usual where
            frequencies are very uneven (Mikolov et al. 2013).
        add: >= 0, added to every count, so that classes that never occur get something.

    Raises:
        ArgumentError: another shape; where values are looked at (see :func:`neighbour_targets`) also a count that is
            negative or not finite, and counts that are all 0, of which elsewhere a prior of NaN is made.
    """
    require(
        counts.dim() == 1 and not known_size(len(counts), 0) and not counts.is_complex(),
        "counts",
        counts,
        "of shape (K,)",
    )
    power, add = plain_float(power), plain_float(add)
    require(math.isfinite(power), "power", power, "a finite number")
    require(0 <= add < math.inf, "add", add, "a finite number >= 0")
    wide = counts.detach().double()
    good = wide.isfinite() & (wide >= 0)
    total = torch.where(good, wide + add, math.nan)
    if readable(counts):
        require(bool(good.all()), "counts", wide[~good][:1].tolist(), "finite and >= 0")
        require(bool((total > 0).any()), "counts", 0, "above 0 for one class at least")
    # as a softmax of power·log: a power of large counts overflows no more than one of small ones vanishes
    return torch.where(total == 0, -math.inf, power * total.log()).softmax(0)


@unscriptable
def neighbour_targets(target: Tensor, label_smoothing: float, neighbours: TopK) -> TopK:
    """Soft targets that smooth over each class's own neighbours: q = (1 - ε)·[k=y] + ε·neighbours of y.

    Args:
        target: (...) class indices in [0, K).
        label_smoothing: ε, from 0 to 1.
        neighbours: indices and counts, or other weights >= 0, (K, k): of each class, the classes that are mistaken for
            it or that stand beside it, for example ``TopK(*counts.topk(k)[::-1])`` of a matrix of counts. A class
            without neighbours (weights of 0) keeps its target whole.

    Returns:
        :class:`TopK` (..., k + 1) for :func:`labelsmooth_kernels.linear_cross_entropy`; its rows sum to 1.

    Raises:
        ArgumentError, IndexError: shapes, dtypes, an ε outside its range; on the CPU also a weight that is negative or
            not finite, and a class outside its range. As for the losses, values are not looked at on a GPU (but under
            LABELSMOOTH_CHECK_TARGETS=1) and while PyTorch traces: the probabilities of such a row are NaN there.
    """
    indices, weights = neighbours
    label_smoothing = plain_float(label_smoothing)
    good = isinstance(label_smoothing, int | float) and 0 <= label_smoothing <= 1
    require(good, "label_smoothing", label_smoothing, "a number from 0 to 1")
    require(target.dtype in INDEX_DTYPES, "target", target, f"class indices, of one of {INDEX_DTYPES}")
    good = indices.dim() == 2 and indices.dtype in INDEX_DTYPES
    require(good, "neighbours.indices", indices, "class indices (K, k)")
    require(
        same_shape(weights.shape, indices.shape),
        "neighbours.probabilities",
        weights,
        f"of shape {tuple(indices.shape)}",
    )
    wide = weights.detach().double()
    if readable(weights):
        good = bool((wide >= 0).all()) and bool(wide.isfinite().all())
        require(good, "neighbours.probabilities", wide, "finite, >= 0")
    known, target = _classes("target", target, len(indices))
    there, indices = _classes("neighbours.indices", indices, len(indices))
    wide = torch.where(there & (wide >= 0) & wide.isfinite(), wide, math.nan)
    of_row = wide[target]
    total = of_row.sum(-1, keepdim=True)
    share = torch.where(total == 0, 0.0, label_smoothing * of_row / total.clamp_min(1e-300))
    kept = torch.where(known.unsqueeze(-1), 1 - share.sum(-1, keepdim=True), math.nan)
    return TopK(torch.cat((target.unsqueeze(-1), indices[target]), -1), torch.cat((kept, share), -1).float())


@unscriptable
def temporal_targets(target: Tensor, weights: Sequence[float] = (0.05, 0.02), ignore_index: int = -100) -> TopK:
    """Soft targets that smooth over what stands before and after in a sequence: mass ``weights[i]`` in all on the two
    positions at distance i + 1, the rest on the target.

    Args:
        target: (..., T) class indices.
        weights: their sum at most 1; a neighbour beyond the end, or with ``ignore_index``, leaves its half to the
            target.
        ignore_index: rows with this target get probabilities of 0: no loss and no gradient. A mean counts them all the
            same; give it a ``normalizer``.

    Returns:
        :class:`TopK` (..., T, 1 + 2·len(weights)) for :func:`labelsmooth_kernels.linear_cross_entropy`.

    Raises:
        ArgumentError: shape, dtype, weights; on the CPU also a negative target other than ``ignore_index``. Elsewhere
            (see :func:`neighbour_targets`) the probabilities of its row, and of rows that it stands beside, are NaN.

    Source: Chorowski and Jaitly 2016, "Towards Better Decoding and Language Model Integration in Sequence to Sequence
    Models".
    """
    require(target.dim() > 0 and target.dtype in INDEX_DTYPES, "target", target, "class indices (..., T)")
    weights, ignore_index = tuple(map(plain_float, weights)), plain_int(ignore_index)
    good = all(w >= 0 for w in weights) and sum(weights) <= 1
    require(good, "weights", weights, "numbers >= 0 with a sum of at most 1")
    target = target.long()
    counted = target != ignore_index
    bad = counted & (target < 0)
    if readable(target) and bad.any():
        raise ArgumentError(f"target must be >= 0 or ignore_index={ignore_index}, got {int(target[bad].min())}")
    indices, shares = [target], []
    for distance, weight in enumerate(weights, 1):
        for step in (distance, -distance):
            position = torch.arange(target.shape[-1], device=target.device) - step
            there = target[..., position.remainder(target.shape[-1])]  # roll does not trace an unknown length
            inside = (position >= 0) & (position < target.shape[-1]) & (there != ignore_index)
            indices.append(there)
            shares.append(torch.where(inside & (there < 0), math.nan, inside.double() * (weight / 2)))
    rest = torch.stack(shares, -1) if shares else target.new_zeros((*target.shape, 0), dtype=torch.float32)
    own = torch.where(bad, math.nan, 1.0).double().unsqueeze(-1) - rest.sum(-1, keepdim=True)
    probabilities = torch.cat((own, rest), -1).where(counted.unsqueeze(-1), 0)
    stacked = torch.stack(indices, -1)
    return TopK(stacked.where((stacked >= 0) & (stacked != ignore_index), 0), probabilities.float())


def _classes(name: str, classes: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return which of the values are classes, and the values with 0 in the place of the others. The others raise an
    IndexError where they may be read."""
    good = (classes >= 0) & (classes < num_classes)
    if readable(classes) and not good.all():
        raise IndexError(f"{name} must be in [0, {num_classes}), got {int(classes[~good].flatten()[0])}")
    return good, torch.where(good, classes.long(), 0)


# ---- the choice of ε


class Trial(NamedTuple):
    """One model at one temperature."""

    label_smoothing: float
    """that it was trained with"""
    temperature: float
    fitted: bool
    """whether the temperature is the one that suits the model best, or one of those asked for"""
    found: Calibration


@unscriptable
@takes(PASSED_ON)
def compare(
    outputs: Mapping[float, Sequence[Any]],
    temperatures: Sequence[float] = (1.0,),
    *,
    fit: bool = True,
    bins: int = 15,
    ignore_index: int = -100,
    **options: Unpack[EvaluationOptions],
) -> list[Trial]:
    """Accuracy, NLL and calibration over a grid of ε and temperatures.

    Args:
        outputs: for each ε, what a model trained with it says of the validation set: (logits, target), or (hidden,
            target, linear_weight), as :func:`labelsmooth_kernels.calibration.evaluate` takes them.
        temperatures: at which every model is evaluated.
        fit: also at the temperature that minimises its NLL, on these same data: to report that number of a model, fit
            it on others.
        bins, ignore_index, options: of ``evaluate``, but for ``logit_scale`` and ``softcap``.

    Raises:
        ArgumentError: no model, a temperature that is not above 0, a model that no temperature suits best; and as
            ``evaluate`` and ``fit_temperature``.
    """
    require(len(outputs) > 0, "outputs", outputs, "of one ε at least")
    for name in ("logit_scale", "softcap"):
        require(options.get(name) is None, name, options.get(name), "left out: what is scaled are the logits as given")
    grid = [float(temperature) for temperature in temperatures]
    require(all(0 < t < math.inf for t in grid), "temperatures", grid, "finite and > 0")
    own = {name: value for name, value in options.items() if name not in ("logit_scale", "softcap")}
    for eps, given in outputs.items():
        good = isinstance(given, list | tuple) and len(given) in (2, 3)
        require(good, f"outputs[{eps}]", given, "(logits, target) or (hidden, target, linear_weight)")
        check_options(compare, own, head=len(given) == 3)
    shared: dict[str, Any] = {"bins": bins, "ignore_index": ignore_index, **own}
    trials = []
    for eps, given in outputs.items():
        for temperature in grid:
            found = evaluate(*given, logit_scale=1 / temperature, **shared)
            trials.append(Trial(float(eps), temperature, False, found))
        if fit:
            try:
                best = fit_temperature(*given, **shared)
            except ArgumentError as error:
                raise ArgumentError(f"outputs[{eps}]: {error}; fit=False leaves the fitted temperature out") from error
            trials.append(Trial(float(eps), best.temperature, True, best.after))
    return trials


@unscriptable
def trial_table(trials: Sequence[Trial]) -> str:
    """The trials as a Markdown table."""
    lines = [
        "| ε | temperature | accuracy | NLL | ECE | adaptive ECE | Brier |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for trial in trials:
        at = f"{trial.temperature:.3g}{' (fitted)' if trial.fitted else ''}"
        c = trial.found
        shares = f"{c.ece:.2%} | {c.adaptive_ece:.2%}"
        lines.append(
            f"| {trial.label_smoothing:g} | {at} | {c.accuracy:.2%} | {c.nll:.4f} | {shares} | {c.brier:.4f} |"
        )
    return "\n".join(lines)


@unscriptable
def plot_trials(trials: Sequence[Trial], path: str | None = None) -> Any:
    """NLL, ECE and accuracy over ε, a line for every temperature and a dotted one for the fitted; written to ``path``
    where one is given. Returns the figure. Needs matplotlib (``pip install labelsmooth_kernels[plot]``)."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot_trials needs matplotlib: pip install 'labelsmooth_kernels[plot]'") from error
    require(len(trials) > 0, "trials", trials, "one at least")
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, 3), ("nll", "ece", "accuracy"), strict=True):
        for line in sorted(
            {None if t.fitted else t.temperature for t in trials}, key=lambda t: math.inf if t is None else t
        ):
            points = sorted((t for t in trials if (None if t.fitted else t.temperature) == line), key=lambda t: t[0])
            label, style = ("T fitted", ":") if line is None else (f"T = {line:g}", "-")
            values = [getattr(t.found, name) for t in points]
            axes.plot([t.label_smoothing for t in points], values, style, marker="o", markersize=3, label=label)
        axes.set(xlabel="ε in training", title={"nll": "NLL", "ece": "ECE"}.get(name, name))
    figure.axes[0].legend(frameon=False)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


# ---- schedules


@unscriptable
def linear(start: float, end: float, steps: int) -> Callable[[int], float]:
    """ε that goes from ``start`` to ``end`` in equal steps and stays there."""
    require(steps > 0, "steps", steps, "> 0")
    return functools.partial(_linear, start, end, steps)


def _linear(start: float, end: float, steps: int, step: int) -> float:
    return start + (end - start) * min(max(step / steps, 0.0), 1.0)


@unscriptable
def cosine(start: float, end: float, steps: int) -> Callable[[int], float]:
    """ε that goes from ``start`` to ``end`` along half a cosine and stays there."""
    require(steps > 0, "steps", steps, "> 0")
    return functools.partial(_cosine, start, end, steps)


def _cosine(start: float, end: float, steps: int, step: int) -> float:
    return end + (start - end) * (1 + math.cos(_linear(0.0, math.pi, steps, step))) / 2


class Schedule:
    """Keeps an ε that changes: ``eps`` is a tensor, so that no step of a compiled or captured loop is compiled anew.

    >>> schedule = Schedule(linear(0.1, 0.0, steps=10))
    >>> schedule.step(); round(float(schedule.eps), 6)
    0.09

    Pass ``label_smoothing=schedule.eps`` to any loss, or the schedule itself to ``CrossEntropyLoss``, and call
    :meth:`step` after the optimizer's. ``rule`` takes the number of steps done; its ε must be finite and at most 1
    (ArgumentError). A schedule can be pickled if its rule can; those of this module can. Made where the default device
    is "meta", it has its ε on the CPU: the value must be there.
    """

    def __init__(self, rule: Callable[[int], float], device: torch.device | str | None = None) -> None:
        self.rule, self.done = rule, 0
        place = torch.get_default_device() if device is None else torch.device(device)
        device = "cpu" if place.type == "meta" else place
        self.eps = torch.empty((), dtype=torch.float32, device=device)
        self._fill()

    def step(self) -> None:
        self.done += 1
        self._fill()

    def _fill(self) -> None:
        eps = float(self.rule(self.done))
        require(-math.inf < eps <= 1, "rule", eps, f"finite and at most 1 at step {self.done}")
        self.eps.fill_(eps)

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = int(state["done"])
        self._fill()
