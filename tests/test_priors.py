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


class Marked(torch.Tensor):
    """Adds nothing that the values do not hold."""


X, Y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
FUNC: dict[str, Any] = {
    "grad": torch.func.grad,
    "vmap": lambda loss: torch.func.vmap(lambda row: loss(row[None])),
    "grads of a batch": lambda loss: torch.func.vmap(torch.func.grad(lambda row: loss(row[None]))),
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "jvp": lambda loss: lambda x: torch.func.jvp(loss, (x,), (x,)),
}


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("transform", FUNC)
def test_a_prior_is_read_under_torch_func(transform: str, backend: str | None) -> None:
    """Where it is closed over, also once a level of differentiation has computed with it."""

    def loss(x: torch.Tensor, prior: torch.Tensor, scale: float) -> torch.Tensor:
        y = Y[: len(x)]
        return lsk.cross_entropy(x, y, label_smoothing=0.1, smoothing=prior * scale, backend=backend)  # type: ignore[return-value]

    counts = torch.tensor([1.0, 4.0, 3.0])
    for given, scale, total in ((counts, 1.0, 8), (counts.as_subclass(Marked), 0.5, 4)):
        with pytest.raises(lsk.ArgumentError, match=f"a prior that sums to 1, got one that sums to {total}:"):
            FUNC[transform](lambda x, given=given, scale=scale: loss(x, given, scale))(X)
    FUNC[transform](lambda x: loss(x, counts, 1 / 8))(X)


def test_a_prior_is_read_in_forward_mode() -> None:
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(lsk.ArgumentError, match="got one that sums to 8"):
            lsk.cross_entropy(x, Y, label_smoothing=0.1, smoothing=torch.tensor([1.0, 4.0, 3.0]))


class Smoothed(torch.nn.Module):
    """Every loss of a prior that is given with the batch."""

    def __init__(self, entry: str) -> None:
        super().__init__()
        self.entry = entry

    def forward(self, x: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
        given: dict[str, Any] = {"label_smoothing": 0.1, "smoothing": prior}
        y = torch.zeros(len(x), dtype=torch.int64)
        if self.entry == "head":
            return lsk.linear_cross_entropy(x, x.new_zeros(prior.shape[0], x.shape[1]), y, **given)
        if self.entry == "distillation":
            return lsk.distillation.distillation_loss(x, x.detach(), y, **given)
        return lsk.cross_entropy(x, y, **given)


@pytest.mark.parametrize("entry", ["logits", "head", "distillation"])
@pytest.mark.parametrize("how", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow), "export"])
def test_a_compiled_program_reads_its_priors(entry: str, how: str) -> None:
    """When it runs, with gradients and without; it can show no values."""
    torch._dynamo.reset()
    model = Smoothed(entry)
    good, x = torch.tensor([0.125, 0.5, 0.375]), torch.zeros(2, 3)
    if how == "export":
        with torch.no_grad():
            run: Any = torch.export.export(model, (x, good)).module()
    else:
        run = torch.compile(model, fullgraph=True, backend=how)
    for grad in (False, True) if how != "export" else (False,):
        x = torch.zeros(2, 3, requires_grad=grad)
        torch.testing.assert_close(run(x, good), model(x, good))
        for bad in (good * 8, torch.tensor([1.5, -0.5, 0.0]), torch.tensor([0.5, torch.nan, 0.5])):
            with pytest.raises(RuntimeError, match="smoothing must be a prior whose entries are all >= 0 and sum to 1"):
                run(x, bad)


def test_an_exported_program_knows_its_number_of_classes_when_it_runs() -> None:
    k = torch.export.Dim("k", min=3, max=100)
    given = torch.zeros(2, 5), torch.full((5,), 0.2)
    with torch.no_grad():
        run = torch.export.export(Smoothed("logits"), given, dynamic_shapes=({1: k}, {0: k})).module()
    torch.testing.assert_close(run(torch.zeros(2, 4), torch.full((4,), 0.25)), torch.tensor(4.0).log())
    with pytest.raises(RuntimeError, match="smoothing must be a prior"):
        run(torch.zeros(2, 4), torch.full((4,), 0.2))


def test_a_compiled_program_allows_what_the_dtype_rounds() -> None:
    """For any number of classes."""
    torch._dynamo.reset()
    run = torch.compile(Smoothed("logits"), fullgraph=True, backend="eager", dynamic=True)
    for k in (50_257, 100_003):
        counts = torch.arange(1, k + 1, dtype=torch.float64).reciprocal()
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            prior = (counts / counts.sum()).to(dtype)
            run(torch.zeros(1, k), prior)
            with pytest.raises(RuntimeError, match="smoothing must be a prior"):
                run(torch.zeros(1, k), prior * 0.9)


def test_a_prior_is_not_read_where_that_would_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where vmap maps over it, under fake tensors, on the meta device, and on a GPU without the switch."""
    counts, x, y = torch.tensor([1.0, 4.0, 3.0]), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    given: dict[str, Any] = {"label_smoothing": 0.1, "backend": "reference"}

    def loss(prior: torch.Tensor, x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
        return lsk.cross_entropy(x, y, smoothing=prior, **given)

    torch.func.vmap(loss)(counts.expand(2, 3))
    torch.func.vmap(torch.func.grad(loss))(counts.expand(2, 3))
    torch.compile(torch.func.vmap(loss), fullgraph=True, backend="eager")(counts.expand(2, 3))
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
    assert lsk.spec.prior_mass(prior) is None
    monkeypatch.setenv(lsk.functional.CHECK_TARGETS, "1")
    assert lsk.spec.prior_mass(prior) == 3
