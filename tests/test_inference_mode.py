"""Tensors made under torch.inference_mode, which autograd refuses to save, as any argument of a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from sharded import needs_gloo, spawn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel
from labelsmooth_kernels.distillation import Probabilities, distillation_loss
from labelsmooth_kernels.torch_state import savable

if TYPE_CHECKING:
    from pathlib import Path

    from cases import Place

N, D, K = 6, 4, 9
SMOOTH = {"label_smoothing": 0.1}


class Given:
    """All that a call can be given, made under inference mode or not."""

    def __init__(self, device: str, *, inference: bool) -> None:
        rng = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand(shape, generator=rng).to(device)

        with torch.inference_mode(inference):
            self.y = torch.tensor([0, 8, -100, 3, 3, 5], device=device) + 0
            self.p, self.prior = draw(N, K).softmax(-1), draw(K).softmax(0)
            self.eps, self.one_eps, self.rows, self.count = draw(N) / 5, draw(1) / 5, draw(N) + 0.5, draw() + 3
            self.classes, self.bias, self.indices = draw(K) + 0.5, draw(K), (draw(N, 2) * K).long()
            self.h, self.w, self.top = draw(N, D), draw(K, D), draw(N, 2)
        assert self.y.is_inference() == inference


CALLS: dict[str, Any] = {
    "target": lambda x, _, g, how: lsk.cross_entropy(x, g.y, **how),
    "int32 target": lambda x, _, g, how: lsk.cross_entropy(x, g.y.int(), **how),
    "probabilities": lambda x, _, g, how: lsk.cross_entropy(x, g.p, **how),
    "image": lambda x, _, g, how: lsk.cross_entropy(x.T.reshape(1, K, 2, 3), g.y.view(1, 2, 3), g.classes, **how),
    "logits beside trained probabilities": lambda x, _, g, how: lsk.cross_entropy(g.p, x.softmax(1), **how),
    "class weights": lambda x, _, g, how: lsk.cross_entropy(x, g.y, g.classes, **how),
    "prior": lambda x, _, g, how: lsk.cross_entropy(x, g.y, smoothing=g.prior, **SMOOTH, **how),
    "an ε for each row": lambda x, _, g, how: lsk.cross_entropy(x, g.y, label_smoothing=g.eps, **how),
    "one ε": lambda x, _, g, how: lsk.cross_entropy(x, g.y, label_smoothing=g.one_eps, **how),
    "row weights": lambda x, _, g, how: lsk.cross_entropy(x, g.y, row_weight=g.rows, **how),
    "normalizer": lambda x, _, g, how: lsk.cross_entropy(x, g.y, normalizer=g.count, **how | {"reduction": "mean"}),
    "target of a head": lambda x, w, g, how: lsk.linear_cross_entropy(x[:, :D], w, g.y, **SMOOTH, **how),
    "probabilities of a head": lambda x, w, g, how: lsk.linear_cross_entropy(x[:, :D], w, g.p, **how),
    "top k": lambda x, w, g, how: lsk.linear_cross_entropy(x[:, :D], w, lsk.TopK(g.indices, g.top), **how),
    "teacher of a head": lambda x, w, g, how: lsk.linear_cross_entropy(x[:, :D], w, lsk.Teacher(g.h, g.w), **how),
    "frozen features": lambda _, w, g, how: lsk.linear_cross_entropy(g.h, w, g.y, linear_bias=g.bias, **how),
    "frozen head": lambda x, _, g, how: lsk.linear_cross_entropy(x[:, :D], g.w, g.y, linear_bias=g.bias, **how),
    "target beside a teacher": lambda x, _, g, how: distillation_loss(x, g.p, g.y, **SMOOTH, **how),
    "probabilities of a teacher": lambda x, _, g, how: distillation_loss(x, Probabilities(g.p), **how),
    "prior beside a teacher": lambda x, _, g, how: distillation_loss(x, g.p, g.y, smoothing=g.prior, **SMOOTH, **how),
}


def derivatives(name: str, place: Place, reduction: str, *, inference: bool) -> tuple[Tensor, ...]:
    """(loss, gradients in what is trained)"""
    backend, device = place
    rng = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=rng).to(device).requires_grad_() for shape in ((N, K), (K, D)))
    loss = CALLS[name](x, w, Given(device, inference=inference), {"backend": backend, "reduction": reduction})
    grads = torch.autograd.grad(loss.sum(), (x, w), allow_unused=True)
    assert any(grad is not None for grad in grads)
    return loss.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_any_argument(served: Place, name: str, reduction: str) -> None:
    got, want = (derivatives(name, served, reduction, inference=inference) for inference in (True, False))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["target", "class weights", "top k"])
def test_another_derivative_and_torch_func(name: str) -> None:
    """A backward that is differentiated, and a closed-over tensor under torch.func, save them as well."""
    given = {inference: Given("cpu", inference=inference) for inference in (True, False)}
    rng = torch.Generator().manual_seed(1)
    x, w = (torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_() for shape in ((N, K), (K, D)))
    results = []
    for inference in (True, False):
        (grad,) = torch.autograd.grad(CALLS[name](x, w, given[inference], {}), x, create_graph=True)
        of_x = torch.func.grad(lambda x, of=given[inference]: CALLS[name](x, w.detach(), of, {}))(x.detach())
        results.append((*torch.autograd.grad(grad.square().sum(), x), of_x))
    torch.testing.assert_close(*results)


def test_vmap_inside_autograd() -> None:
    results = []
    for inference in (True, False):
        x, given = torch.linspace(-1, 1, N * K).view(N, K).requires_grad_(), Given("cpu", inference=inference)
        losses = torch.vmap(lambda row, y: lsk.cross_entropy(row[None], y[None], reduction="sum"))(x, given.y)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), x)))
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, N])
def test_traces_record_the_tensor_itself(rows: int) -> None:
    """Not the memory that stands in for it, of which a trace would know nothing."""
    x, given = torch.linspace(-1, 1, rows * K).view(rows, K), Given("cpu", inference=True)
    y = given.y[:rows]
    want = lsk.cross_entropy(x, y, given.classes, **SMOOTH)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return lsk.cross_entropy(x, y, given.classes, **SMOOTH)  # type: ignore[return-value]

    torch.testing.assert_close(torch.jit.trace(loss, (x, y))(x, y.clone()), want)
    torch.testing.assert_close(make_fx(loss)(x, y)(x, y.clone()), want)


def test_a_gradient_asked_of_such_a_tensor_is_refused() -> None:
    """By PyTorch: without that it would be None, and go unseen."""
    with torch.inference_mode():
        head = torch.nn.Linear(D, K)
    assert head.weight.requires_grad
    hidden, y = torch.ones(N, D, requires_grad=True), torch.arange(N)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        lsk.linear_cross_entropy(hidden, head.weight, y).backward()


@needs_gloo
def test_sharded_classes(tmp_path: Path) -> None:
    spawn(_rank, 1, tmp_path)


def _rank(_rank: int) -> None:
    for reduction in ("mean", "none"):
        results = []
        for inference in (True, False):
            given, w = Given("cpu", inference=inference), torch.linspace(-1, 1, K * D).view(K, D).requires_grad_()
            x = torch.linspace(1, -1, N * K).view(N, K).requires_grad_()
            how: Any = {"reduction": reduction, **SMOOTH}
            losses = (
                parallel.cross_entropy(x, given.y, given.classes, **how),
                parallel.linear_cross_entropy(given.h, w, given.y, linear_bias=given.bias, **how),
                parallel.linear_cross_entropy(x[:, :D], given.w, given.y, **how),
            )
            loss = sum(loss.sum() for loss in losses)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, w))))
        torch.testing.assert_close(*results)


def test_what_is_saved_is_no_copy() -> None:
    with torch.inference_mode():
        made = torch.randn(4, 6)
        stands_in = {"strided": made.t()[1:], "half": made.half(), "meta": made.to("meta")}
        assert savable(made) is made, "nothing is saved in this mode"
    for kind, tensor in stands_in.items():
        saved = savable(tensor)
        assert not saved.is_inference(), kind
        assert (saved.shape, saved.stride(), saved.dtype) == (tensor.shape, tensor.stride(), tensor.dtype), kind
        assert kind == "meta" or (saved.data_ptr() == tensor.data_ptr() and torch.equal(saved, tensor)), kind
    with torch.inference_mode():
        negated = torch.complex(made, made).conj().imag
    assert negated.is_neg()
    assert torch.equal(savable(negated), -made)
    plain = torch.ones(2)
    assert savable(plain) is plain
