"""Calibration of every class, and of what comes in batches: the temperature, its errors, and the class-wise error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from sharded import needs_gloo, spawn
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration

if TYPE_CHECKING:
    from collections.abc import Iterator


def rows(n: int = 600, k: int = 7, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits (float64) that are ``sharp`` times those that the targets were drawn from."""
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(n, k, generator=rng, dtype=torch.float64) * 1.5
    y = torch.multinomial(x.softmax(-1), 1, generator=rng).squeeze(1)
    y[::9] = -100
    return x * sharp, y


def by_definition(x: Tensor, y: Tensor, bins: int, norm: str) -> tuple[list[float], float]:
    """The error of each class and of all, one class, bin and row at a time, in float64."""
    p, n = x[y != -100].double().softmax(-1).tolist(), int((y != -100).sum())
    target, errors = y[y != -100].tolist(), []
    for k in range(x.shape[1]):
        inside: list[list[int]] = [[] for _ in range(bins)]
        for i in range(n):
            inside[min(int(p[i][k] * bins), bins - 1)].append(i)
        gaps = [(len(b) / n, abs(sum((target[i] == k) - p[i][k] for i in b)) / len(b)) for b in inside if b]
        of_norm = {
            "l1": sum(share * gap for share, gap in gaps),
            "l2": math.sqrt(sum(share * gap**2 for share, gap in gaps)),
            "max": max(gap for _, gap in gaps),
        }
        errors.append(of_norm[norm])
    together = {
        "l1": sum(errors) / len(errors),
        "l2": math.sqrt(sum(e**2 for e in errors) / len(errors)),
        "max": max(errors),
    }
    return errors, together[norm]


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
@pytest.mark.parametrize("bins", [1, 15])
def test_the_classwise_error_is_that_of_its_definition(bins: int, norm: str) -> None:
    x, y = rows()
    errors, error = by_definition(x, y, bins, norm)
    found = calibration.evaluate_classwise(x, y, bins=bins)
    assert found.per_class(norm).tolist() == pytest.approx(errors, abs=1e-9), "probabilities count in units of 2**-32"
    assert found.calibration_error(norm) == pytest.approx(error, abs=1e-9)
    assert found.rows == int((y != -100).sum())
    assert found.ece == found.calibration_error("l1")
    single = calibration.evaluate_classwise(x.float(), y, bins=bins)
    assert single.calibration_error(norm) == pytest.approx(error, abs=2e-6)


def test_logits_are_transformed_and_laid_out_as_in_the_loss() -> None:
    x, y = rows(n=60)
    z = 3 * torch.tanh(0.5 * x / 3)
    want = calibration.evaluate_classwise(z, y).sums
    options: dict[str, Any] = {"logit_scale": 0.5, "softcap": 3.0}
    assert torch.equal(calibration.evaluate_classwise(x, y, **options).sums, want)
    middle = x.unflatten(0, (6, 10)).transpose(1, 2)
    assert torch.equal(calibration.evaluate_classwise(middle, y.unflatten(0, (6, 10)), **options).sums, want)
    last = x.unflatten(0, (6, 10))
    found = calibration.evaluate_classwise(last, y.unflatten(0, (6, 10)), class_dim=-1, **options)
    assert torch.equal(found.sums, want)


def test_the_classes_of_a_head_are_judged_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((5, 12, 6), (9, 6), (9,)))
    y = torch.randint(9, (5, 12), generator=rng)
    y[0, :4] = -100
    whole = calibration.evaluate_classwise(F.linear(hidden, weight, bias), y, class_dim=-1)
    seen, linear = [], F.linear

    def note(*operands: Tensor) -> Tensor:
        seen.append(len(operands[0]))
        return linear(*operands)

    monkeypatch.setattr(F, "linear", note)
    found = calibration.evaluate_classwise(hidden, y, weight, linear_bias=bias, chunk_rows=16)
    assert max(seen) == 16
    assert torch.equal(found.sums, whole.sums)
    found = calibration.evaluate_classwise([(hidden[:2], y[:2]), (hidden[2:], y[2:])], None, weight, linear_bias=bias)
    assert torch.equal(found.sums, whole.sums)


def test_sums_of_classes_add_up_and_tell_what_is_broken() -> None:
    x, y = rows(n=90)
    whole = calibration.evaluate_classwise(x, y)
    parts = [calibration.evaluate_classwise(x[i::4], y[i::4]) for i in range(4)]
    assert torch.equal(sum(parts).sums, whole.sums)  # type: ignore[union-attr]
    with pytest.raises(lsk.ArgumentError, match="classes and bins must be as many"):
        whole + calibration.evaluate_classwise(x, y, bins=3)
    none = calibration.evaluate_classwise(x, torch.full_like(y, -100))
    assert none.rows == 0
    assert math.isnan(none.ece)
    spoilt = x.clone()
    spoilt[0] = math.nan
    assert y[0] == -100
    assert torch.equal(calibration.evaluate_classwise(spoilt, y).sums, whole.sums), "an ignored row may hold anything"
    spoilt[1] = math.nan
    assert math.isnan(calibration.evaluate_classwise(spoilt, y).ece)
    perfect = calibration.evaluate_classwise(1000.0 * F.one_hot(y.clamp_min(0), 7), y)
    assert perfect.ece == 0


@needs_gloo
@pytest.mark.slow
def test_sums_of_classes_over_ranks(tmp_path: Path) -> None:
    spawn(_rank, 2, tmp_path, str(tmp_path))
    want = calibration.evaluate_classwise(*rows()).per_class().tolist()
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == want


def _rank(rank: int, folder: str) -> None:
    x, y = rows()
    part = slice(0, 130) if rank == 0 else slice(130, None)
    found = calibration.evaluate_classwise(x[part], y[part]).all_reduce()
    Path(folder, str(rank)).write_text(json.dumps(found.per_class().tolist()))


def test_bad_input_of_classes_is_named() -> None:
    x, y = rows(n=20)
    head = torch.eye(7, dtype=x.dtype)
    for given, match in (
        ({"bins": 0}, "bins must be an int > 0"),
        ({"target": x.softmax(-1)}, r"target must be class indices of the shape \(20,\)"),
        ({"input": [], "target": []}, "input must be at least one batch"),
        ({"input": x, "linear_weight": head, "chunk_rows": 0}, "chunk_rows must be an int > 0"),
    ):
        with pytest.raises(lsk.ArgumentError, match=match):
            calibration.evaluate_classwise(**{"input": x, "target": y, **given})  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="7"):
        calibration.evaluate_classwise(x, torch.full_like(y, 7))
    with pytest.raises(lsk.ArgumentError, match="norm must be one of"):
        calibration.evaluate_classwise(x, y).per_class("mean")
    for name, match in (
        ("label_smoothing", "unexpected"),
        ("linear_bias", "no option here"),
        ("backend", "unexpected"),
    ):
        with pytest.raises(TypeError, match=match):
            calibration.evaluate_classwise(x, y, **{name: None})


class Batches:
    """Pairs (logits, target), counting how often they are asked for; ``drops`` rows are lost after the first pass."""

    def __init__(self, *tensors: Tensor, size: int = 100, drops: int = 0) -> None:
        self.tensors, self.size, self.drops, self.passes = tensors, size, drops, 0

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n = len(self.tensors[0]) - (self.drops if self.passes else 0)
        self.passes += 1
        yield from zip(*(t[:n].split(self.size) for t in self.tensors), strict=True)


def test_the_temperature_of_batches_is_that_of_the_whole() -> None:
    x, y = rows()
    whole = calibration.fit_temperature(x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    batches = Batches(x, y)
    for given in (loader, batches, list(batches), tuple(loader)):
        found = calibration.fit_temperature(given)
        assert found.temperature == pytest.approx(whole.temperature, rel=1e-12)
        assert found.after.nll == pytest.approx(whole.after.nll, rel=1e-12)
        assert torch.equal(found.before.bins, whole.before.bins)
        assert found.steps == whole.steps
    assert batches.passes == whole.steps + 1, "one for each step, and one for the list"
    assert torch.equal(calibration.evaluate(batches).bins, whole.before.bins)
    assert torch.equal(calibration.evaluate(pair for pair in batches).bins, whole.before.bins), "a pass is enough here"
    assert torch.equal(calibration.evaluate_classwise(loader).sums, calibration.evaluate_classwise(x, y).sums)


def test_the_temperature_of_a_head_in_batches() -> None:
    rng = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((200, 8), (20, 8)))
    y = torch.multinomial((hidden @ weight.T / 2).softmax(-1), 1, generator=rng).squeeze(1)
    whole = calibration.fit_temperature(hidden, y, weight)
    found = calibration.fit_temperature(Batches(hidden, y, size=64), linear_weight=weight)
    assert found.temperature == pytest.approx(whole.temperature, rel=1e-12)


def test_batches_that_cannot_serve_are_named() -> None:
    x, y = rows()
    with pytest.raises(
        lsk.ArgumentError, match="iterable once for each step, as a list or a DataLoader, got a generator"
    ):
        calibration.fit_temperature(pair for pair in Batches(x, y))
    with pytest.raises(lsk.ArgumentError, match="the same 533 rows in each pass, got 444"):
        calibration.fit_temperature(Batches(x, y, drops=100))
    with pytest.raises(lsk.ArgumentError, match="target must be given, unless input is an iterable of pairs"):
        calibration.fit_temperature(x)
    for bad in ([x, x], [(x,)], [(x, y, y)], [(x, None)], ["xy"]):
        with pytest.raises(lsk.ArgumentError, match="input must give pairs of tensors"):
            calibration.fit_temperature(bad)
    with pytest.raises(lsk.ArgumentError, match="input must be at least one batch"):
        calibration.fit_temperature([])
