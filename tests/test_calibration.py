"""Calibration: what is counted, how it adds up, and the temperature that is found."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from sharded import needs_gloo, spawn
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration

if TYPE_CHECKING:
    from cases import Place


def rows(n: int = 3000, k: int = 10, sharp: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits that are ``sharp`` times those that the targets were drawn from: the best temperature is ``sharp``."""
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(n, k, generator=rng, dtype=torch.float64) * 1.5
    y = torch.multinomial(x.softmax(-1), 1, generator=rng).squeeze(1)
    return (x * sharp).to(dtype), y


def fake(confidence: list[float], right: list[bool]) -> calibration.Calibration:
    """Rows of that confidence."""
    p, n = torch.tensor(confidence), len(right)
    nll = torch.full((n,), 0.5)
    stats = lsk.RowStats(nll, nll, p, torch.tensor(right).long())
    return calibration.collect(stats, torch.ones(n, dtype=torch.int64))


def by_definition(x: Tensor, y: Tensor, bins: int) -> dict[str, float]:
    """Every number from whole probabilities, in a loop over bins."""
    p = x.double().softmax(-1)
    confidence, prediction = p.max(-1)
    right = (prediction == y).double()
    ece, mce = 0.0, 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            gap = float((right[inside].mean() - confidence[inside].mean()).abs())
            ece, mce = ece + gap * float(inside.double().mean()), max(mce, gap)
    brier = (p - F.one_hot(y, x.shape[1])).square().sum(-1).mean()
    nll = F.cross_entropy(x.double(), y)
    return {"accuracy": float(right.mean()), "nll": float(nll), "ece": ece, "mce": mce, "brier": float(brier)}


def by_mass(x: Tensor, y: Tensor, bins: int) -> float:
    """ECE over bins of exactly equal mass, from sorted confidences."""
    confidence, prediction = x.double().softmax(-1).max(-1)
    order = confidence.argsort()
    gaps = ((prediction == y).double() - confidence)[order]
    return float(torch.stack([part.sum().abs() for part in gaps.tensor_split(bins)]).sum() / len(y))


def numbers(found: calibration.Calibration) -> dict[str, float]:
    return {name: getattr(found, name) for name in ("accuracy", "nll", "ece", "mce", "brier")}


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_every_number_is_that_of_its_definition(place: Place, bins: int) -> None:
    x, y = rows(100)
    found = calibration.evaluate(x.to(place[1]), y.to(place[1]), bins=bins, backend=place[0])
    assert numbers(found) == pytest.approx(by_definition(x, y, bins), rel=2e-6)
    assert found.rows == 100
    assert found.confidence == pytest.approx(float(x.softmax(-1).amax(-1).mean()), rel=1e-6)


def test_parity_with_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional.classification", reason="torchmetrics is not installed")
    x, y = rows(5000, 40)
    found = calibration.evaluate(x, y)
    for norm in ("l1", "l2", "max"):
        theirs = metrics.multiclass_calibration_error(x.softmax(-1), y, num_classes=40, n_bins=15, norm=norm)
        assert found.calibration_error(norm=norm) == pytest.approx(float(theirs), rel=1e-5)
    assert (found.ece, found.mce) == (found.calibration_error(norm="l1"), found.calibration_error(norm="max"))


def test_both_ends_are_closed() -> None:
    """Confidence 1 shares a bin with 0.95, and 0 has one: torchmetrics puts an exact 1 into a bin of its own, so that
    these two rows, right once at a mean confidence of 0.975, would be a perfect one and a bad one."""
    found = fake([1.0, 0.95], [True, False])
    assert found.ece == pytest.approx(0.475, rel=1e-6)
    assert found.reliability().rows.tolist() == [0.0] * 14 + [2.0]
    assert fake([0.0], [True]).ece == 1.0
    assert fake([0.0], [True]).reliability().rows[0] == 1
    edge = fake([1 / 15, 2 / 15], [True, True]).reliability().rows.tolist()
    assert edge[:4] == [0, 1, 1, 0], "bins are closed below"


@pytest.mark.parametrize("bins", [5, 15])
def test_bins_of_equal_mass(bins: int) -> None:
    x, y = rows(20_000, 20)
    found = calibration.evaluate(x, y, bins=bins)
    assert found.adaptive_ece == pytest.approx(by_mass(x, y, bins), abs=2e-3)
    diagram = found.reliability("mass")
    torch.testing.assert_close(diagram.rows, torch.full((bins,), 20_000 / bins, dtype=torch.float64))
    assert bool((diagram.confidence.diff() > 0).all())
    assert bool(((diagram.confidence >= diagram.lower - 0.01) & (diagram.confidence <= diagram.upper + 0.01)).all())


def test_equal_rows_are_divided_evenly_between_bins_of_equal_mass() -> None:
    found = fake([0.8] * 100, [True] * 80 + [False] * 20)
    assert found.adaptive_ece == pytest.approx(0, abs=1e-6), "in whatever order the rows come"


def test_pieces_add_up_to_the_whole(place: Place) -> None:
    """Streams, shards and ranks: counts and binned sums to the bit, in any order; scores to the rounding of a sum."""
    x, y = (t.to(place[1]) for t in rows(60))
    y[::7] = -100
    evaluate = functools.partial(calibration.evaluate, backend=place[0])
    whole = evaluate(x, y)
    cuts = [0, 1, 20, 50, 60]
    parts = [evaluate(x[a:b], y[a:b]) for a, b in itertools.pairwise(cuts)]
    for order in (parts, parts[::-1]):
        merged = functools.reduce(lambda a, b: a + b, order)
        assert torch.equal(merged.bins, whole.bins)
        assert torch.equal(merged.cells, whole.cells)
        torch.testing.assert_close(merged.scores, whole.scores, rtol=1e-13, atol=0)
    batches = evaluate([x[:25], x[25:]], [y[:25], y[25:]])
    assert torch.equal(batches.bins, whole.bins)
    assert whole.rows == int((y != -100).sum())


@needs_gloo
@pytest.mark.slow
def test_sums_over_ranks(tmp_path: Path) -> None:
    spawn(_rank, 2, tmp_path, str(tmp_path))
    want = numbers(calibration.evaluate(*rows(400)))
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == pytest.approx(want, rel=1e-12)


def _rank(rank: int, folder: str) -> None:
    """What a rank of two finds, each with some of the rows."""
    x, y = rows(400)
    part = slice(0, 130) if rank == 0 else slice(130, None)
    found = calibration.evaluate(x[part], y[part]).all_reduce()
    Path(folder, str(rank)).write_text(json.dumps(numbers(found)))


def test_degenerate_rows() -> None:
    one = calibration.evaluate(torch.randn(5, 1), torch.zeros(5, dtype=torch.int64))
    assert numbers(one) == {"accuracy": 1.0, "nll": 0.0, "ece": 0.0, "mce": 0.0, "brier": 0.0}
    none = calibration.evaluate(torch.randn(3, 4), torch.full((3,), -100))
    assert none.rows == 0
    assert all(math.isnan(value) for value in (*numbers(none).values(), none.adaptive_ece))
    x = torch.randn(6, 4)
    x[2] = torch.nan
    poisoned = calibration.evaluate(x, torch.tensor([0, 1, 2, 3, 0, 1]))
    assert all(math.isnan(value) for value in (*numbers(poisoned).values(), poisoned.adaptive_ece))
    ignored = calibration.evaluate(x, torch.tensor([0, 1, -100, 3, 0, 1]))
    kept = calibration.evaluate(x[[0, 1, 3, 4, 5]], torch.tensor([0, 1, 3, 0, 1]))
    assert torch.equal(ignored.bins, kept.bins)
    masked = torch.tensor([[0.0, -torch.inf, 1.0]])
    assert calibration.evaluate(masked, torch.tensor([1])).nll == math.inf
    assert calibration.evaluate(masked, torch.tensor([1])).ece == pytest.approx(1 / (1 + math.exp(-1)), rel=1e-6)


def test_without_the_collision_there_is_no_brier_score() -> None:
    x, y = rows(20)
    _, stats = lsk.cross_entropy(x, y, return_stats=True)
    found = calibration.collect(stats, y)
    assert math.isnan(found.brier)
    assert found.ece == pytest.approx(calibration.evaluate(x, y).ece, rel=1e-6)  # other statistics, other kernel


@pytest.mark.parametrize("sharp", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_temperature_is_where_the_derivative_vanishes(sharp: float, dtype: torch.dtype) -> None:
    x, y = rows(sharp=sharp, dtype=dtype)
    found = calibration.fit_temperature(x, y)
    assert found.temperature == pytest.approx(sharp, rel=0.05)
    beta = torch.tensor(1 / found.temperature, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cross_entropy(x.double() * beta, y), beta)
    assert abs(float(slope)) < 2e-5
    assert found.after.nll <= found.before.nll + 1e-9
    assert found.before.nll == pytest.approx(float(F.cross_entropy(x.double(), y)), rel=1e-6)
    assert found.steps <= 12
    assert sharp == 1.0 or found.after.ece < found.before.ece


def test_a_head_is_fitted_without_its_logits(place: Place) -> None:
    rng = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*s, generator=rng).to(place[1]) for s in ((24, 8), (20, 8), (20,)))
    logits = hidden @ weight.T + bias
    y = torch.multinomial((logits / 2).softmax(-1).cpu(), 1, generator=rng).squeeze(1).to(place[1])
    whole = calibration.fit_temperature(logits, y, backend=place[0])
    fused = calibration.fit_temperature(
        [hidden[:10], hidden[10:]], [y[:10], y[10:]], weight, linear_bias=bias, chunk_rows=7, backend=place[0]
    )
    assert fused.temperature == pytest.approx(whole.temperature, rel=1e-4)
    assert fused.after.ece == pytest.approx(whole.after.ece, abs=1e-3)


def test_a_large_vocabulary() -> None:
    rng = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 16, generator=rng), torch.randn(262_144, 16, generator=rng)
    y = torch.stack([torch.multinomial((h @ weight.T).softmax(-1), 1, generator=rng)[0] for h in hidden / 1.5])
    found = calibration.fit_temperature(hidden, y, weight, chunk_rows=16)
    assert 1.2 < found.temperature < 1.9
    assert found.after.nll < found.before.nll


def test_there_may_be_no_best_temperature() -> None:
    x, y = rows(50)
    with pytest.raises(lsk.ArgumentError, match="every row is right"):
        calibration.fit_temperature(10 * F.one_hot(y, 10).float(), y)
    with pytest.raises(lsk.ArgumentError, match="no likelier"):
        calibration.fit_temperature(-10.0 * F.one_hot(y, 10).float(), y)
    with pytest.raises(lsk.ArgumentError, match="finite mean loss, got inf"):
        calibration.fit_temperature(x.scatter(1, y[:, None], -torch.inf), y)
    with pytest.raises(lsk.ArgumentError, match="finite mean loss, got nan"):
        calibration.fit_temperature(x * torch.nan, y)
    with pytest.raises(lsk.ArgumentError, match="max_steps"):
        calibration.fit_temperature(x, y, max_steps=1)
    noisy = 9 * F.one_hot(y, 10) + 0.02 * torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    with pytest.raises(lsk.ArgumentError, match="every row is right"):
        calibration.fit_temperature(noisy, y)
    for nothing in (torch.full_like(y, -100), y[:0]):
        with pytest.raises(lsk.ArgumentError, match="target must be of one row at least"):
            calibration.fit_temperature(x[: len(nothing)], nothing)
    for name, value in (("tolerance", math.nan), ("tolerance", -1.0), ("max_steps", 5.0)):
        with pytest.raises(lsk.ArgumentError, match=f"{name} must be"):
            calibration.fit_temperature(x, y, **{name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [3e-6, 1e-2, 100.0, 1e5])
def test_logits_of_any_scale_have_the_same_best_temperature(scale: float, dtype: torch.dtype) -> None:
    x, y = rows(500)
    want = calibration.fit_temperature(x.double(), y).temperature
    found = calibration.fit_temperature((x.double() * scale).to(dtype), y)
    assert found.temperature / scale == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("height", [5.0, 200.0, 1000.0])
def test_a_model_that_is_always_sure_and_wrong_in_one_row_of_five(height: float) -> None:
    """All rows have p = 1/(1 + 11·exp(-height/T)), which fits best where it is their accuracy."""
    y = torch.arange(1000) % 12
    said = torch.where(torch.arange(1000) % 5 == 0, (y + 1) % 12, y)
    found = calibration.fit_temperature(height * F.one_hot(said, 12).float(), y)
    assert found.temperature == pytest.approx(height / math.log(11 * 800 / 200), rel=1e-4)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "bins": ({"bins": 0}, "bins must be an int > 0, got 0"),
    "shape": ({"target": torch.zeros(3, dtype=torch.int64)}, "target must have shape"),
    "probabilities": ({"target": torch.rand(20, 10)}, r"target must be class indices of the shape \(20,\)"),
    "batches": ({"target": [torch.zeros(20, dtype=torch.int64)] * 2}, "as many batches as input, got 2 and 1"),
    "no batch": ({"input": [], "target": []}, "input must be at least one batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    given, match = BAD[name]
    x, y = rows(20)
    with pytest.raises(lsk.ArgumentError, match=match):
        calibration.evaluate(**{"input": x, "target": y, **given})


def test_options_of_other_losses_are_refused() -> None:
    x, y = rows(20)
    for name, value in (("return_stats", False), ("label_smoothing", 0.1), ("row_weight", y)):
        with pytest.raises(TypeError, match=rf"evaluate\(\) got an unexpected keyword argument '{name}'"):
            calibration.evaluate(x, y, **{name: value})
    with pytest.raises(TypeError, match=r"linear_bias is no option here: evaluate\(\) takes it with linear_weight"):
        calibration.evaluate(x, y, linear_bias=x)
    with pytest.raises(lsk.ArgumentError, match="input must be a tensor, or a list"):
        calibration.evaluate(None, y)  # type: ignore[arg-type]


def test_bad_statistics_are_named() -> None:
    x, y = rows(20)
    _, stats = lsk.cross_entropy(x, y.where(y > 4, -1), ignore_index=-1, return_stats=True)
    with pytest.raises(lsk.ArgumentError, match="target must be >= 0 or ignore_index=-100, got -1"):
        calibration.collect(stats, y.where(y > 4, -1))
    with pytest.raises(lsk.ArgumentError, match="stats must be RowStats"):
        calibration.collect((x, stats), y)  # type: ignore[arg-type]
    assert sum([calibration.collect(stats, y)] * 2).rows == 40  # type: ignore[union-attr]
    with pytest.raises(lsk.ArgumentError, match=r"stats.confidence must be from 0 to 1, got 1.5 in row 1"):
        fake([0.5, 1.5], [True, True])
    found = fake([0.5], [True])
    with pytest.raises(lsk.ArgumentError, match="scheme must be one of"):
        found.reliability("depth")
    with pytest.raises(lsk.ArgumentError, match="norm must be"):
        found.calibration_error(norm="mean")
    x, y = rows(20)
    with pytest.raises(lsk.ArgumentError, match="bins must be as many"):
        found + calibration.evaluate(x, y, bins=3)
    with pytest.raises(lsk.ArgumentError, match="logit_scale must be left out"):
        calibration.fit_temperature(x, y, logit_scale=2.0)


def test_the_diagram_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    x, y = rows(200)
    found = calibration.fit_temperature(x, y)
    path = tmp_path / "reliability.png"
    figure = calibration.plot_reliability({"before": found.before, "after": found.after}, str(path))
    assert path.stat().st_size > 5000
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    want = found.before.reliability().accuracy.nan_to_num()
    assert heights == pytest.approx(want.tolist())
    with pytest.raises(lsk.ArgumentError, match="calibrations must be at least one"):
        calibration.plot_reliability({})
