"""A prior is a distribution, which is looked at where that costs nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import labelsmooth_kernels as lsk


def prior_calls(prior: torch.Tensor) -> dict[str, Any]:
    """Every way to give a prior to K classes."""
    x, y = torch.zeros(2, len(prior)), torch.zeros(2, dtype=torch.int64)
    given: dict[str, Any] = {"label_smoothing": 0.1, "smoothing": prior}
    return {
        "cross_entropy": lambda: lsk.cross_entropy(x, y, **given),
        "of the reference": lambda: lsk.cross_entropy(x, y, backend="reference", **given),
        "linear_cross_entropy": lambda: lsk.linear_cross_entropy(
            torch.zeros(2, 3), x.new_zeros(len(prior), 3), y, **given
        ),
        "distillation_loss": lambda: lsk.distillation.distillation_loss(x, x, y, **given),
        "module": lambda: lsk.CrossEntropyLoss(**given),
        "head": lambda: lsk.LinearCrossEntropyLoss(3, len(prior), **given),
    }


@pytest.mark.parametrize(
    ("prior", "match"),
    [
        (torch.tensor([1.0, 4.0, 3.0]), "smoothing must be a prior that sums to 1, got one that sums to 8: divide"),
        (torch.tensor([0.5, 0.4, 0.0]), "got one that sums to 0.9"),
        (torch.tensor([0.5, torch.inf, 0.0]), "got one that sums to inf"),
        (torch.tensor([0.5, 0.7, -0.2]), r"smoothing must be a prior whose entries are all >= 0, got -0\.2"),
        (torch.tensor([0.5, torch.nan, 0.5]), "smoothing must be a prior whose entries are all >= 0, got nan"),
    ],
)
def test_a_prior_is_a_distribution(prior: torch.Tensor, match: str) -> None:
    for name, call in prior_calls(prior).items():
        with pytest.raises(lsk.ArgumentError, match=match):
            pytest.fail(f"{name} takes it: {call()}")


@pytest.mark.parametrize("k", [3, 50_257, 1_000_000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_prior_may_be_as_rough_as_its_dtype(dtype: torch.dtype, k: int) -> None:
    """Uniform, so that every rounding goes in one direction, and as word counts are; also cast to another dtype."""
    counts = torch.arange(1, k + 1, dtype=torch.float64).reciprocal()
    for made in (torch.full((k,), 1 / k), torch.full((k,), 0.75 / k), counts, (counts * k).to(dtype).double()):
        for prior in ((made / made.sum()).to(dtype), made.to(dtype) / made.to(dtype).sum()):
            if prior.sum(dtype=torch.float64) < 0.9 or not prior.isfinite().all():
                continue  # the sum itself overflowed, or what was divided had vanished: no longer normalised
            for values in (prior, prior.float()):
                lsk.cross_entropy(torch.zeros(1, k), torch.zeros(1, dtype=torch.int64), smoothing=values)


def test_a_prior_is_not_read_where_that_would_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile, torch.func and fake tensors, on the meta device, and on a GPU without the switch."""
    counts, x, y = torch.tensor([1.0, 4.0, 3.0]), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    given: dict[str, Any] = {"label_smoothing": 0.1, "backend": "reference"}

    def loss(prior: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
        return lsk.cross_entropy(x, y, smoothing=prior, **given)

    torch.func.vmap(loss)(counts.expand(2, 3))
    torch.compile(loss, fullgraph=True, backend="eager")(counts)
    with FakeTensorMode():
        fake = torch.empty(3, device="cuda")
        loss(torch.empty(3), torch.empty(2, 3), torch.softmax(torch.empty(2, 3), 1))
        monkeypatch.setenv(lsk.functional.CHECK_TARGETS, "1")
        assert lsk.spec.prior_mass(fake) is None
    assert lsk.spec.prior_mass(fake) is None
    assert lsk.spec.prior_mass(counts.to("meta")) is None


def test_the_switch_reads_priors_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU:
        type = "cuda"

    class Prior(torch.Tensor):
        device = OnGPU()  # type: ignore[assignment]

    prior = torch.ones(3).as_subclass(Prior)
    monkeypatch.setattr(lsk.spec, "Tensor", Prior)
    assert lsk.spec.prior_mass(prior) is None
    monkeypatch.setenv(lsk.functional.CHECK_TARGETS, "1")
    assert lsk.spec.prior_mass(prior) == 3
