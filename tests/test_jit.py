"""torch.jit: a trace records the reference and holds for other inputs and numbers of rows; script says what to use."""

from __future__ import annotations

import inspect
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sharded import needs_gloo, spawn
from torch import Tensor, nn

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel
from labelsmooth_kernels.distillation import Probabilities, distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

K, D = 7, 3
SMOOTH = {"label_smoothing": 0.1}


class Inputs:
    """What calls are made of, for some rows: other values, targets and ignored rows for each number of them."""

    def __init__(self, n: int) -> None:
        rng = torch.Generator().manual_seed(n)
        self.n = n
        self.x, self.h, self.w, self.cube = (
            torch.randn(s, generator=rng).requires_grad_() for s in ((n, K), (n, D), (K, D), (n, K, 2))
        )
        self.teacher, self.wide, self.other = (torch.randn(s, generator=rng) for s in ((n, K), (n, 5), (K, 5)))
        self.y, self.top = torch.randint(K, (n,), generator=rng), torch.randint(K, (n, 2), generator=rng)
        self.y[n // 2] = -100
        self.pairs, self.rows = self.y[:, None].expand(n, 2), torch.rand(n, generator=rng)
        self.weights, self.prior = torch.rand(K, generator=rng), torch.full((K,), 1 / K)


CALLS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "every option": (
        "x y weights rows prior",
        lambda x, y, weight, rows, prior: lsk.cross_entropy(
            x, y, weight, label_smoothing=rows, smoothing=prior, z_loss=0.1, softcap=3.0, row_weight=rows
        ),
    ),
    "finite": ("x y", lambda x, y: lsk.cross_entropy(x, y, smoothing="others", smooth_over="finite", **SMOOTH)),
    "classes in the middle": ("cube pairs", lambda x, y: lsk.cross_entropy(x, y, reduction="none", **SMOOTH)),
    "probabilities": ("x teacher", lambda x, t: lsk.cross_entropy(x, t.softmax(1), normalizer="rows")),
    "statistics": ("x y", lambda x, y: lsk.cross_entropy(x, y, return_stats="all", **SMOOTH)[0]),
    "head": ("h w y", lambda h, w, y: lsk.linear_cross_entropy(h, w, y, **SMOOTH)),
    "top k": ("h w top rows", lambda h, w, i, p: lsk.linear_cross_entropy(h, w, lsk.TopK(i, p[:, None].expand(-1, 2)))),
    "teacher": ("h w wide other", lambda h, w, t, v: lsk.linear_cross_entropy(h, w, lsk.Teacher(t, v))),
    "distillation": ("x teacher y", lambda x, t, y: distillation_loss(x, t, y, **SMOOTH)),
    "from probabilities": ("x teacher", lambda x, t: distillation_loss(x, Probabilities(t.softmax(1)))),
    "from a head": ("x wide other", lambda x, t, v: distillation_loss(x, lsk.Teacher(t, v))),
    "module": ("x y", lsk.CrossEntropyLoss(torch.arange(1.0, K + 1), **SMOOTH)),
    "module of a head": ("h y", lsk.LinearCrossEntropyLoss(D, K)),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.loss = nn.Linear(D, K), lsk.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = self.loss(self.body(h), y)
        return loss


def loss_and_grads(run: Callable[..., Tensor], given: list[Tensor]) -> list[Tensor]:
    loss = run(*given)
    return [loss, *torch.autograd.grad(loss.sum(), [tensor for tensor in given if tensor.requires_grad])]


@pytest.mark.filterwarnings("ignore")  # the tracer's, of every shape that is checked
@pytest.mark.parametrize("name", CALLS)
def test_a_trace_is_the_loss_for_other_inputs_and_more_rows(name: str) -> None:
    names, call = CALLS[name]

    def given(n: int) -> list[Tensor]:
        return [getattr(Inputs(n), name) for name in names.split()]

    traced = torch.jit.trace(call, given(4))
    for n in (4, 9, 2):
        torch.testing.assert_close(loss_and_grads(traced, given(n)), loss_and_grads(call, given(n)))


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_trains_and_needs_nothing_of_ours() -> None:
    model, inputs = Model(), Inputs(5)
    traced = torch.jit.trace(model, (inputs.h, inputs.y))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert "labelsmooth_kernels::" not in str(loaded.inlined_graph), "no kernel of ours is recorded"
    inputs = Inputs(8)
    for run in (loaded, model):
        run.zero_grad()
        run(inputs.h, inputs.y).backward()
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_records_no_kernels() -> None:
    inputs = Inputs(4)
    with pytest.raises(lsk.ArgumentError, match=r"backend must be 'reference' or None under torch.jit.trace.*'cpu'"):
        torch.jit.trace(lambda x: lsk.cross_entropy(x, inputs.y, backend="cpu"), (inputs.x,))


@needs_gloo
@pytest.mark.slow
def test_a_trace_of_sharded_classes_is_refused(tmp_path: Path) -> None:
    spawn(_rank, 1, tmp_path)


def _rank(_rank: int) -> None:
    inputs = Inputs(4)
    head = inputs.w.detach()
    for run, given in (
        (lambda x: parallel.cross_entropy(x, inputs.y), inputs.x),
        (lambda h: parallel.linear_cross_entropy(h, head, inputs.y), inputs.h),
    ):
        with pytest.raises(NotImplementedError, match=r"torch.jit.trace is not served where classes are sharded"):
            torch.jit.trace(run, (given,))


def _calls(x: Tensor, y: Tensor) -> Tensor:
    return lsk.cross_entropy(x, y)


def _calls_head(x: Tensor, y: Tensor) -> Tensor:
    return lsk.linear_cross_entropy(x, x, y)  # type: ignore[return-value]


def _calls_distillation(x: Tensor, y: Tensor) -> Tensor:
    return distillation_loss(x, x, y)  # type: ignore[return-value]


def _calls_parallel(x: Tensor, y: Tensor) -> Tensor:
    return parallel.cross_entropy(x, y)  # type: ignore[return-value]


SCRIPTED: dict[str, Any] = {
    "function": lsk.cross_entropy,
    "sharded head": parallel.linear_cross_entropy,
    "module": lsk.CrossEntropyLoss(),
    "module of a head": lsk.LinearCrossEntropyLoss(D, K),
    "a model with the module": Model(),
    "a function that calls ours": _calls,
    "one that calls the head": _calls_head,
    "one that distils": _calls_distillation,
    "one over ranks": _calls_parallel,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTED)
def test_script_says_what_to_use_instead(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"cannot be compiled by torch.jit.script: use torch.compile or"):
        torch.jit.script(SCRIPTED[name])


OF_USERS = [lsk, lsk.calibration, lsk.conventions, lsk.distillation, parallel, lsk.representation, lsk.smoothing]


def offered(module: Any) -> list[Any]:
    """The functions of a module for users."""
    functions = inspect.getmembers(module, inspect.isfunction)
    own = getattr(module, "__all__", [name for name, f in functions if f.__module__ == module.__name__])
    return [function for name, function in functions if name in own and not name.startswith("_")]


TOOLS = {f"{module.__name__}.{tool.__name__}": tool for module in OF_USERS for tool in offered(module)}


@pytest.mark.filterwarnings("ignore")
def test_script_of_any_public_function_says_it_too() -> None:
    assert len(TOOLS) > 30
    for name, function in TOOLS.items():
        with pytest.raises(RuntimeError, match=r"cannot be compiled by torch.jit.script: use torch.compile or"):
            pytest.fail(f"{name}: {torch.jit.script(function)}")


class Trained(torch.nn.Module):
    """A model that holds its loss and computes without it."""

    __jit_ignored_attributes__ = ("loss",)

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.loss = torch.nn.Linear(D, K), lsk.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.filterwarnings("ignore")
def test_script_of_a_model_that_ignores_its_loss() -> None:
    model, x = Trained(), torch.randn(2, D)
    assert torch.equal(torch.jit.script(model)(x), model(x))
