"""Every loss under torch.compile and torch.export where the number of rows is known at run time only.

A number that comes out of the data (a boolean mask, ``nonzero``) has no hint that the tracer could guard on, unlike one
that differs from call to call. Both are held here against the same call in float64, in plain Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import skip_unless_available
from sharded import needs_gloo, spawn
from torch import Tensor
from tracing import compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends
from labelsmooth_kernels.distillation import Probabilities, distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

K, D, EPS = 11, 5, 0.1
WEIGHT = torch.linspace(0.5, 2.0, K)
Loss = "Callable[[Tensor, Tensor, Tensor, str | None], Tensor]"


def of_logits(**options: Any) -> Loss:
    """A loss of (hidden (..., D), head (K, D), targets (...), backend) by :func:`cross_entropy`."""
    return lambda h, w, y, backend: lsk.cross_entropy(F.linear(h, w), y, class_dim=-1, backend=backend, **options)


def of_head(**options: Any) -> Loss:
    return lambda h, w, y, backend: lsk.linear_cross_entropy(h, w, y, backend=backend, **options)


def row_tensors(h: Tensor) -> dict[str, Tensor]:
    """A row weight, and an ε of its own for every row."""
    return {"row_weight": h[..., 0].detach().abs(), "label_smoothing": h[..., 1].detach().sigmoid()}


def classes(y: Tensor) -> Tensor:
    """The targets without ignored ones."""
    return y.clamp_min(0)


def top_k(h: Tensor, y: Tensor) -> lsk.TopK:
    shares = torch.stack((h[..., 0].detach().sigmoid(), h[..., 1].detach().sigmoid()), -1)
    return lsk.TopK(torch.stack((classes(y), (classes(y) + 1) % K), -1), shares)


def distilled(teacher: Callable[[Tensor, Tensor], Any], with_target: bool) -> Loss:
    def loss(h: Tensor, w: Tensor, y: Tensor, backend: str | None) -> Tensor:
        given = teacher(h.detach(), w.detach())
        options = {"temperature": 2.0, "class_dim": -1, "backend": backend}
        return distillation_loss(F.linear(h, w), given, y if with_target else None, **options)

    return loss


def with_statistics(h: Tensor, w: Tensor, y: Tensor, backend: str | None) -> Tensor:
    loss, stats = lsk.cross_entropy(F.linear(h, w), y, class_dim=-1, return_stats="all", backend=backend)
    return loss + stats.lse.sum() + stats.prediction.sum()


MODULES = {
    backend: lsk.CrossEntropyLoss(label_smoothing=EPS, class_dim=-1, backend=backend)
    for backend in (None, "cpu", "reference")
}
LOSSES: dict[str, Loss] = {
    "smoothed": of_logits(label_smoothing=EPS),
    "every row": of_logits(label_smoothing=EPS, reduction="none"),
    "many options": of_logits(label_smoothing=EPS, z_loss=0.01, confidence_penalty=0.1, softcap=5.0, logit_scale=1.5),
    "class weights": lambda h, w, y, backend: of_logits(weight=WEIGHT.to(h), normalizer="rows")(h, w, y, backend),
    "finite classes": of_logits(label_smoothing=EPS, smooth_over="finite", reduction="sum"),
    "in place": of_logits(inplace=True),
    "row tensors": lambda h, w, y, backend: of_logits(**row_tensors(h))(h, w, y, backend),
    "probabilities": lambda h, w, y, backend: of_logits()(h, w, F.one_hot(classes(y), K).to(h), backend),
    "statistics": with_statistics,
    "module": lambda h, w, y, backend: MODULES[backend](F.linear(h, w), y),
    "classes second": lambda h, w, y, backend: lsk.cross_entropy(F.linear(h, w).movedim(-1, 1), y, backend=backend),
    "head": of_head(label_smoothing=EPS),
    "head, every row": of_head(label_smoothing=EPS, reduction="none", chunk_rows=3),
    "head, options": of_head(label_smoothing=EPS, z_loss=0.01, softcap=5.0, skip_ignored=False),
    "head, row tensors": lambda h, w, y, backend: of_head(**row_tensors(h))(h, w, y, backend),
    "head, probabilities": lambda h, w, y, backend: of_head()(h, w, F.one_hot(classes(y), K).to(h), backend),
    "head, top-k": lambda h, w, y, backend: of_head(label_smoothing=EPS)(h, w, top_k(h, y), backend),
    "head, teacher": lambda h, w, y, backend: of_head()(h, w, lsk.Teacher(h.detach(), w.detach() * 2), backend),
    "distilled from logits": distilled(lambda h, w: F.linear(h, w) * 2, True),
    "distilled from probabilities": distilled(lambda h, w: Probabilities(F.linear(h, w).softmax(-1)), True),
    "distilled from a head": distilled(lambda h, w: lsk.Teacher(h, w * 2), False),
}


def masked(loss: Loss, h: Tensor, w: Tensor, y: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return loss(h[mask], w, y[mask], backend)


def indexed(loss: Loss, h: Tensor, w: Tensor, y: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    rows = mask.nonzero().squeeze(1)
    return loss(h.index_select(0, rows), w, y.index_select(0, rows), backend)


def plain(loss: Loss, h: Tensor, w: Tensor, y: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    return loss(h, w, y, backend)


FORMS = {"mask": masked, "nonzero": indexed, "unbacked": plain, "rows": plain, "batch and length": plain}
"""How a number of rows comes to be unknown: from data in the graph, at its entry, or as one that differs by call."""


def arguments(form: str, size: int) -> tuple[Tensor, ...]:
    """Hidden states, a head, targets, a mask of rows."""
    generator = torch.Generator().manual_seed(size)
    shape = (3, size) if form == "batch and length" else (size,)
    y = torch.randint(0, K, shape, generator=generator)
    y[..., 1] = -100
    mask = torch.rand(shape[0], generator=generator) < 0.6
    return torch.randn(*shape, D, generator=generator), torch.randn(K, D, generator=generator), y, mask


def evaluated(f: Callable[..., Tensor], h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """The sum of the loss and the gradients in hidden states and head."""
    leaves = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = f(*leaves, y, mask).sum()
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def judge(f: Callable[..., Tensor], exact: Callable[..., Tensor], form: str, size: int) -> None:
    call = arguments(form, size)
    h, w, y, mask = call
    want = evaluated(exact, h.double(), w.double(), y, mask)
    for got, true in zip(evaluated(f, *call), want, strict=True):
        torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def unknown_sizes() -> Any:
    """Sizes that come from data stay in the graph, which is not the default of torch.compile."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        yield


def claims(name: str, form: str, backend: str | None) -> set[tuple[object, ...]]:
    """Every loss by the backend that serves it, with a size from data; every form under each backend."""
    return {(form, backend)} | ({name} if backend is None and form in ("mask", "nonzero", "unbacked") else set())


@compiler
@pytest.mark.thin
@pytest.mark.claims.with_args(claims)
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name: str, form: str, backend: str | None) -> None:
    step = lambda *call: FORMS[form](LOSSES[name], *call, backend)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    run = compiled
    if form == "unbacked":

        def run(h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
            for tensor in (h, y):
                torch._dynamo.decorators.mark_unbacked(tensor, 0)
            return compiled(h, w, y, mask)

    for size in (9, 14):
        judge(run, lambda *call: FORMS[form](LOSSES[name], *call, "reference"), form, size)


class Program(torch.nn.Module):
    def __init__(self, name: str, form: str, backend: str | None) -> None:
        super().__init__()
        self.call = name, form, backend

    def forward(self, h: Tensor, w: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        name, form, backend = self.call
        return FORMS[form](LOSSES[name], h, w, y, mask, backend)


def exported(name: str, form: str, backend: str | None) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=1000)
    size = {1: rows} if form == "batch and length" else {0: rows}
    masks = {} if form == "batch and length" else size
    return torch.export.export(
        Program(name, form, backend), arguments(form, 9), dynamic_shapes=(size, {}, size, masks), strict=False
    )


@compiler
@pytest.mark.thin
@pytest.mark.claims.with_args(lambda name, form: {name, form})
@pytest.mark.parametrize("form", ["mask", "rows", "batch and length"])
@pytest.mark.parametrize("name", LOSSES)
def test_exported(name: str, form: str) -> None:
    """The kernels serve an evaluation. With gradients the program is in plain PyTorch, which differentiates it again:
    an autograd.Function of ours would be lost in it."""
    if name == "in place":
        pytest.skip("an exported program may overwrite no argument's view")
    exact = lambda *call: FORMS[form](LOSSES[name], *call, "reference")  # noqa: E731
    program = exported(name, form, None)
    judge(program.module(), exact, form, 14)
    assert not any("labelsmooth_kernels" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        program = exported(name, form, "cpu" if backends.BACKENDS["cpu"].unavailable() is None else None)
        h, w, y, mask = arguments(form, 14)
        want = exact(h.double(), w.double(), y, mask)
        torch.testing.assert_close(program.module()(h, w, y, mask).double(), want, rtol=1e-5, atol=1e-6)


@compiler
def test_an_export_keeps_the_kernels_that_it_names() -> None:
    skip_unless_available("cpu")
    backends._warn_once.cache_clear()
    backends._choose.cache_clear()
    with pytest.warns(UserWarning, match=r"torch\.export \(under torch\.no_grad it serves\)"):
        exported("smoothed", "rows", None)
    program = exported("smoothed", "rows", "cpu")
    assert any("labelsmooth_kernels" in str(node.target) for node in program.graph.nodes)


@compiler
def test_an_unknown_number_of_classes() -> None:
    h, w, y, mask = *arguments("rows", 9)[:3], torch.arange(K) != 5
    y = torch.where(y >= 5, 0, y)
    options: dict[str, Any] = {"smoothing": "others", "label_smoothing": EPS}
    for loss in (
        lambda h, w, y, mask: lsk.cross_entropy(F.linear(h, w)[:, mask], y, WEIGHT.to(h)[mask], **options),
        lambda h, w, y, mask: lsk.linear_cross_entropy(h, w[mask], y, weight=WEIGHT.to(h)[mask], **options),
    ):
        torch._dynamo.reset()
        run = torch.compile(loss, fullgraph=True, backend="aot_eager")
        want = evaluated(loss, h.double(), w.double(), y, mask)
        for got, true in zip(evaluated(run, h, w, y, mask), want, strict=True):
            torch.testing.assert_close(got.double(), true, rtol=1e-5, atol=1e-6)


SHARDED: dict[str, Callable[..., Tensor]] = {
    "logits": lambda h, w, y: lsk.parallel.cross_entropy(F.linear(h, w), y, label_smoothing=EPS),
    "row tensors": lambda h, w, y: lsk.parallel.cross_entropy(F.linear(h, w), y, reduction="none", **row_tensors(h)),
    "head": lambda h, w, y: lsk.parallel.linear_cross_entropy(h, w, y, label_smoothing=EPS),
    "head, top-k": lambda h, w, y: lsk.parallel.linear_cross_entropy(h, w, top_k(h, y)),
}
WHOLE: dict[str, Loss] = {
    "logits": of_logits(label_smoothing=EPS),
    "row tensors": lambda h, w, y, backend: of_logits(reduction="none", **row_tensors(h))(h, w, y, backend),
    "head": of_head(label_smoothing=EPS),
    "head, top-k": lambda h, w, y, backend: of_head()(h, w, top_k(h, y), backend),
}


def compiled_over_ranks(rank: int) -> None:
    """Each rank holds some classes; a mask of the rows, among them one that is true nowhere, is the same on both."""
    part = slice(*((0, 7), (7, K))[rank])
    for name, sharded in SHARDED.items():
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            torch._dynamo.reset()
            step = lambda h, w, y, mask, sharded=sharded: sharded(h[mask], w, y[mask])  # noqa: E731
            run = torch.compile(step, fullgraph=True, backend="aot_eager")
            for size, none in ((9, False), (14, False), (5, True)):
                h, w, y, mask = arguments("mask", size)
                mask = mask & (not none)
                got = evaluated(run, h, w[part], y, mask)
                exact = lambda h, w, y, mask, name=name: masked(WHOLE[name], h, w, y, mask, "reference")  # noqa: E731
                loss, d_hidden, d_weight = evaluated(exact, h.double(), w.double(), y, mask)
                if not name.startswith("head"):  # hidden states of all ranks, outside of what knows of ranks
                    dist.all_reduce(got[1])
                for mine, true in zip(got, (loss, d_hidden, d_weight[part]), strict=True):
                    torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6, equal_nan=True)


@needs_gloo
@compiler
def test_compiled_over_ranks(tmp_path: Path) -> None:
    spawn(compiled_over_ranks, 2, tmp_path)
