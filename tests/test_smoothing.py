"""How much to smooth and over what: closed forms, priors, neighbours, schedules, the comparison of several ε."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import smoothing

if TYPE_CHECKING:
    from pathlib import Path


def trained(eps: float, convention: str | Tensor, k: int = 7) -> tuple[Tensor, float]:
    """Logits (k, k) of a model that learns all there is of k examples, one of each class, and its loss."""
    logits = torch.zeros(k, k, dtype=torch.float64, requires_grad=True)
    y = torch.arange(k)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = lsk.cross_entropy(logits, y, label_smoothing=eps, smoothing=convention)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return logits.detach(), closure().item()


@pytest.mark.parametrize("convention", ["uniform", "others"])
@pytest.mark.parametrize("eps", [0.05, 0.1, 0.4])
def test_a_model_trained_to_its_optimum_has_the_gap_and_the_loss_of_the_closed_forms(
    eps: float, convention: str
) -> None:
    logits, loss = trained(eps, convention)
    gaps = logits.diagonal()[:, None] - logits
    off = ~torch.eye(7, dtype=torch.bool)
    want = smoothing.optimal_gap(eps, 7, convention)
    torch.testing.assert_close(gaps[off], torch.full((42,), want, dtype=torch.float64), rtol=1e-5, atol=0)
    assert loss == pytest.approx(smoothing.target_entropy(eps, 7, convention), rel=1e-10)
    assert smoothing.excess_loss(loss, eps, 7, convention) == pytest.approx(0, abs=1e-9)
    worse = lsk.cross_entropy(logits * 1.3, torch.arange(7), label_smoothing=eps, smoothing=convention).item()
    q = F.one_hot(torch.arange(7)).double()
    e = eps * 7 / 6 if convention == "others" else eps
    q = (1 - e) * q + e / 7
    divergence = (q * (q.log() - (logits * 1.3).log_softmax(-1))).sum(-1).mean()
    assert smoothing.excess_loss(worse, eps, 7, convention) == pytest.approx(float(divergence), rel=1e-9)


def test_the_gap_under_a_prior() -> None:
    prior, eps = torch.arange(1.0, 8, dtype=torch.float64) / 28, 0.2
    logits, _ = trained(eps, prior)
    for y, k in ((0, 3), (5, 1)):
        want = math.log((1 - eps + eps * float(prior[y])) / (eps * float(prior[k])))
        assert float(logits[y, y] - logits[y, k]) == pytest.approx(want, rel=1e-3)


def test_unigram_priors() -> None:
    counts = torch.tensor([8, 0, 1, 7])
    prior = smoothing.unigram_prior(counts)
    torch.testing.assert_close(prior, torch.tensor([0.5, 0, 1 / 16, 7 / 16], dtype=torch.float64))
    torch.testing.assert_close(smoothing.unigram_prior(counts, 0.0), torch.tensor([1, 0, 1, 1]).double() / 3)
    want = (counts + 0.5).double() ** 0.75
    torch.testing.assert_close(smoothing.unigram_prior(counts, 0.75, 0.5), want / want.sum())
    large = smoothing.unigram_prior(torch.tensor([1e300, 1e300], dtype=torch.float64), power=3.0)
    assert large.tolist() == [0.5, 0.5]
    loss = lsk.cross_entropy(torch.zeros(2, 4), torch.tensor([0, 2]), label_smoothing=0.1, smoothing=prior)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


def dense(target: lsk.TopK, k: int) -> Tensor:
    shape = (*target.indices.shape[:-1], k)
    return torch.zeros(shape, dtype=torch.float64).scatter_add_(-1, target.indices, target.probabilities.double())


def test_targets_of_neighbours() -> None:
    counts = torch.tensor([[0, 3, 1, 0], [2, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    values, indices = counts.topk(3)
    y = torch.tensor([[0, 1], [2, 3]])
    found = dense(smoothing.neighbour_targets(y, 0.2, lsk.TopK(indices, values)), 4)
    third = 0.2 / 3
    want = [[[0.8, 0.15, 0.05, 0], [0.2, 0.8, 0, 0]], [[0, 0, 1, 0], [third, third, third, 0.8]]]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-7)
    hidden, weight = torch.randn(2, 2, 5), torch.randn(4, 5)
    soft = smoothing.neighbour_targets(y, 0.2, lsk.TopK(indices, values))
    loss = lsk.linear_cross_entropy(hidden, weight, soft)
    want_loss = F.cross_entropy((hidden @ weight.T).flatten(0, 1), found.flatten(0, 1).float())
    torch.testing.assert_close(loss, want_loss)


def test_targets_of_what_stands_beside() -> None:
    y = torch.tensor([[4, 1, 2, 3], [0, 5, -100, 1]])
    found = dense(smoothing.temporal_targets(y, (0.2, 0.1)), 6)
    want = torch.zeros(2, 4, 6, dtype=torch.float64)
    want[0, 0, [4, 1, 2]] = torch.tensor([0.85, 0.1, 0.05], dtype=torch.float64)
    want[0, 1, [1, 4, 2, 3]] = torch.tensor([0.75, 0.1, 0.1, 0.05], dtype=torch.float64)
    want[0, 2, [2, 1, 3, 4]] = torch.tensor([0.75, 0.1, 0.1, 0.05], dtype=torch.float64)
    want[0, 3, [3, 2, 1]] = torch.tensor([0.85, 0.1, 0.05], dtype=torch.float64)
    want[1, 0, [0, 5]] = torch.tensor([0.9, 0.1], dtype=torch.float64)
    want[1, 1, [5, 0, 1]] = torch.tensor([0.85, 0.1, 0.05], dtype=torch.float64)
    want[1, 3, [1, 5]] = torch.tensor([0.95, 0.05], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-7)
    alone = smoothing.temporal_targets(torch.tensor([3, 1]), ())
    assert dense(alone, 4).tolist() == F.one_hot(torch.tensor([3, 1]), 4).tolist()


def test_a_schedule_fills_one_tensor() -> None:
    schedule = smoothing.Schedule(smoothing.linear(0.2, 0.0, 4))
    eps, seen = schedule.eps, []
    for _ in range(6):
        seen.append(float(schedule.eps))
        schedule.step()
    assert seen == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0, 0.0], abs=1e-8)
    assert schedule.eps is eps
    again = smoothing.Schedule(smoothing.linear(0.2, 0.0, 4))
    again.load_state_dict({**schedule.state_dict(), "done": 3})
    assert float(again.eps) == pytest.approx(0.05)
    ramp = smoothing.cosine(0.0, 0.1, 10)
    assert [ramp(0), ramp(5), ramp(10), ramp(99)] == pytest.approx([0.0, 0.05, 0.1, 0.1])


@pytest.mark.slow
def test_annealing_reaches_the_loss_and_compiles_nothing_anew() -> None:
    schedule = smoothing.Schedule(smoothing.linear(0.5, 0.1, 2))
    x, y = torch.randn(4, 9), torch.tensor([1, 2, 3, 4])
    module, cast = lsk.CrossEntropyLoss(label_smoothing=schedule.eps), lsk.CrossEntropyLoss(label_smoothing=schedule)
    cast.bfloat16()
    head = lsk.LinearCrossEntropyLoss(9, 9, label_smoothing=schedule)
    torch.nn.init.eye_(head.linear.weight)
    given = lambda x, y, eps: lsk.cross_entropy(x, y, label_smoothing=eps)  # noqa: E731
    compiled = torch.compile(given, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for eps in (0.5, 0.3, 0.1):
        want = F.cross_entropy(x, y, label_smoothing=eps)
        for loss in (module(x, y), cast(x, y), head(x, y), compiled(x, y, schedule.eps)):
            torch.testing.assert_close(loss, want)
        schedule.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def outputs() -> dict[float, tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=rng)
    y = torch.multinomial(x.softmax(-1), 1, generator=rng).squeeze(1)
    return {0.0: (2 * x, y), 0.1: (0.5 * x, y)}


def test_several_epsilons_compared(tmp_path: Path) -> None:
    trials = smoothing.compare(outputs(), (1.0, 2.0))
    assert [(t.label_smoothing, t.fitted) for t in trials] == [(e, f) for e in (0.0, 0.1) for f in (False, False, True)]
    (x, y), _ = outputs().values()
    assert trials[1].found.nll == pytest.approx(F.cross_entropy(x / 2, y).item(), rel=1e-6)
    unscaled = smoothing.compare(outputs(), (2.0,), fit=False, logit_scale=None, softcap=None)  # type: ignore[call-arg]
    assert unscaled[0].found.nll == trials[1].found.nll
    assert trials[2].temperature == pytest.approx(2, rel=0.2)
    assert trials[5].temperature == pytest.approx(0.5, rel=0.2)
    assert trials[2].found.nll <= min(t.found.nll for t in trials[:2])
    table = smoothing.trial_table(trials).splitlines()
    assert len(table) == 2 + len(trials)
    assert "(fitted)" in table[4]
    assert f"{trials[0].found.nll:.4f}" in table[2]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    figure = smoothing.plot_trials(trials, str(tmp_path / "trials.png"))
    assert (tmp_path / "trials.png").stat().st_size > 5000
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["T = 1", "T = 2", "T fitted"]
    assert list(lines[0].get_ydata()) == pytest.approx([trials[0].found.nll, trials[3].found.nll])


PAIRS = lsk.TopK(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
BAD: dict[str, tuple[Any, str]] = {
    "negative count": (lambda: smoothing.unigram_prior(torch.tensor([1.0, -2.0])), r"counts must be finite.*-2"),
    "NaN count": (lambda: smoothing.unigram_prior(torch.tensor([1.0, torch.nan])), "counts must be finite"),
    "no count": (lambda: smoothing.unigram_prior(torch.zeros(3)), "above 0 for one class"),
    "shape": (lambda: smoothing.unigram_prior(torch.ones(3, 3)), r"counts must be of shape \(K,\)"),
    "add": (lambda: smoothing.unigram_prior(torch.ones(3), add=-1), "add must be"),
    "epsilon": (lambda: smoothing.neighbour_targets(torch.tensor([0]), 1.5, PAIRS), "label_smoothing must be a"),
    "weights": (lambda: smoothing.neighbour_targets(torch.tensor([0]), 0.1, PAIRS._replace(probabilities=-PAIRS[1])),
                "neighbours.probabilities must be finite, >= 0"),
    "mass": (lambda: smoothing.temporal_targets(torch.tensor([0, 1]), (0.9, 0.2)), "weights must be numbers >= 0"),
    "rule": (lambda: smoothing.Schedule(lambda step: 2.0), "rule must be finite and at most 1 at step 0, got 2.0"),
    "steps": (lambda: smoothing.linear(0.1, 0.0, 0), "steps must be > 0, got 0"),
    "no model": (lambda: smoothing.compare({}), "outputs must be of one ε at least"),
    "temperature": (lambda: smoothing.compare(outputs(), (0.0,)), r"temperatures must be finite and > 0, got \[0.0\]"),
    "iterator of one": (lambda: smoothing.compare({0.0: outputs()[0.0][0]}), r"outputs\[0.0\] must be"),
    "a cap": (lambda: smoothing.compare(outputs(), softcap=3.0), "softcap must be left out"),
    "all right": (lambda: smoothing.compare({0.1: (torch.eye(3), torch.arange(3))}), "every row is right"),
    "per row": (lambda: smoothing.neighbour_targets(torch.tensor([0]), torch.rand(3), PAIRS), "label_smoothing must"),
    "negative target": (lambda: smoothing.temporal_targets(torch.tensor([0, -1])), "target must be >= 0"),
    "gap, convention": (lambda: smoothing.optimal_gap(0.1, 10, "other"), "smoothing must be"),
    "gap, prior": (lambda: smoothing.optimal_gap(0.1, 10, torch.ones(10)), "smoothing must be"),
    "gap, epsilon": (lambda: smoothing.optimal_gap(math.nan, 10), "eps must be from 0 to 1, got nan"),
    "gap, classes": (lambda: smoothing.optimal_gap(0.1, 1, "others"), "K must be an int > 1, got 1"),
    "no trial": (lambda: smoothing.plot_trials([]), "trials must be one at least"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, match = BAD[name]
    with pytest.raises(lsk.ArgumentError, match=match):
        call()


def test_a_target_outside_is_named() -> None:
    with pytest.raises(IndexError, match=r"target must be in \[0, 3\), got 3"):
        smoothing.neighbour_targets(torch.tensor([0, 3]), 0.1, PAIRS)
    with pytest.raises(IndexError, match=r"neighbours.indices must be in \[0, 3\), got 7"):
        smoothing.neighbour_targets(torch.tensor([0]), 0.1, PAIRS._replace(indices=PAIRS.indices + 7))


def test_the_ends_of_the_gap() -> None:
    assert smoothing.optimal_gap(0.0, 5) == math.inf
    assert smoothing.optimal_gap(1.0, 5) == 0
    assert smoothing.optimal_gap(1.0, 5, "others") == -math.inf


@pytest.mark.parametrize("rule", [smoothing.linear(0.2, 0.0, 4), smoothing.cosine(0.2, 0.0, 4)])
def test_a_module_with_a_schedule_is_copied_and_saved(rule: Any, tmp_path: Path) -> None:
    module = lsk.CrossEntropyLoss(label_smoothing=smoothing.Schedule(rule))
    x, y = torch.randn(3, 7), torch.tensor([1, 2, 3])
    torch.save(module, tmp_path / "module.pt")
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    copies.append(torch.load(tmp_path / "module.pt", weights_only=False))
    for other in copies:
        for schedule in (one.label_smoothing for one in (module, other)):
            schedule.load_state_dict({"done": 0})
            schedule.step()
        assert other(x, y) == module(x, y)
        torch.testing.assert_close(other(x, y), F.cross_entropy(x, y, label_smoothing=rule(1)))


def test_a_module_made_on_the_meta_device_gets_its_values_there() -> None:
    with torch.device("meta"):
        module = lsk.CrossEntropyLoss(label_smoothing=smoothing.Schedule(smoothing.linear(0.2, 0.0, 4)))
    module.to_empty(device="cpu")
    x, y = torch.randn(3, 7), torch.tensor([1, 2, 3])
    torch.testing.assert_close(module(x, y), F.cross_entropy(x, y, label_smoothing=0.2))


def test_tensors_of_a_module_made_on_the_meta_device_are_set_again() -> None:
    """They are in no state dict that could bring them back."""
    with torch.device("meta"):
        module = lsk.CrossEntropyLoss(label_smoothing=torch.tensor(0.2), smoothing=torch.ones(7))
    module.to_empty(device="cpu")
    assert not module.state_dict()
    module.label_smoothing, module.smoothing = torch.tensor(0.2), torch.full((7,), 1 / 7)
    x, y = torch.randn(3, 7), torch.tensor([1, 2, 3])
    torch.testing.assert_close(module(x, y), F.cross_entropy(x, y, label_smoothing=0.2))
