"""What PyTorch does to functions: torch.func, vmap, torch.compile, torch.export; no host synchronisation."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from cases import Place, draw
from conftest import skip_unless_available
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from tracing import Trap, compiled, compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, torch_state

if TYPE_CHECKING:
    from collections.abc import Callable

N, K, BATCH = 4, 5, 3


def pair(place: Place, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The loss under the backend of a place, and PyTorch's."""
    return (
        functools.partial(lsk.cross_entropy, backend=place[0], label_smoothing=0.1, **options),
        functools.partial(F.cross_entropy, label_smoothing=0.1, **options),
    )


def same(place: Place, f: Callable[[Callable[..., Tensor]], Any], **options: Any) -> None:
    """``f`` of our loss and of PyTorch's are the same."""
    ours, theirs = pair(place, **options)
    torch.testing.assert_close(f(ours), f(theirs), rtol=2e-6, atol=2e-6)


def batches(place: Place, probabilities: bool = False) -> tuple[Tensor, Tensor]:
    x, y = draw(place, BATCH * N, K, ignored=4)
    target = torch.softmax(x.flip(0), -1).view(BATCH, N, K) if probabilities else y.view(BATCH, N)
    return x.view(BATCH, N, K), target


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_torch_func(place: Place, probabilities: bool, reduction: str) -> None:
    """grad, jvp and hessian, alone and under vmap: of the logits, and of probabilities where they are the target."""
    xs, ys = batches(place, probabilities)
    x, y, v = xs[0], ys[0], xs[1]
    numbers = (0, 1) if probabilities else (0,)

    def scalar(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *call: (loss(*call) * torch.arange(1, N + 1, device=x.device)).sum()

    same(place, lambda loss: grad(scalar(loss), numbers)(x, y), reduction=reduction)
    same(place, lambda loss: jvp(lambda x: loss(x, y), (x,), (v,)), reduction=reduction)
    same(place, lambda loss: hessian(scalar(loss), numbers)(x, y), reduction=reduction)
    same(place, lambda loss: vmap(grad(scalar(loss), numbers))(xs, ys), reduction=reduction)
    same(place, lambda loss: vmap(lambda v: jvp(lambda x: loss(x, y), (x,), (v,)))(xs), reduction=reduction)


def batched(place: Place, f: Any, in_dims: tuple[int | None, ...], *tensors: Tensor, **options: Any) -> None:
    """vmap of ``f(ours)`` is ``f(theirs)`` of one call after the other: PyTorch's own loss refuses some vmaps."""
    ours, theirs = pair(place, **options)

    def slice_of(i: int) -> list[Tensor]:
        return [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]

    want = torch.stack([f(theirs)(*slice_of(i)) for i in range(BATCH)])
    torch.testing.assert_close(vmap(f(ours), in_dims)(*tensors), want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("f", [lambda loss: loss, grad], ids=["loss", "grad"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_vmap(place: Place, probabilities: bool, f: Any) -> None:
    """Batched logits, targets or both, along any dimension; class vectors; a row at a time; inside itself."""
    xs, ys = batches(place, probabilities)
    w = torch.rand(BATCH, K, generator=torch.Generator().manual_seed(0)).to(place[1]) + 0.1
    batched(place, f, (0, 0), xs, ys)
    batched(place, f, (0, None), xs, ys[0])
    batched(place, f, (None, 0), xs[0], ys)
    batched(place, f, (1, 1), xs.transpose(0, 1), ys.transpose(0, 1))
    batched(place, f, (0, 0, None), xs, ys, w[0])
    batched(place, f, (0, 0, 0), xs, ys, w)
    batched(
        place,
        f,
        (0, 0),
        xs.view(BATCH, 2, 2, K).transpose(2, 3),
        ys.view(BATCH, 2, 2, *ys.shape[2:]).movedim(-1, 2) if probabilities else ys.view(BATCH, 2, 2),
    )
    rows = lambda loss: vmap(f(lambda x, y: loss(x, y, reduction="sum")))  # noqa: E731
    batched(place, rows, (0, 0), xs, ys)


@pytest.mark.parametrize("f", [lambda loss: loss, grad], ids=["loss", "grad"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_vmap_of_one_row_with_what_all_share(place: Place, probabilities: bool, f: Any) -> None:
    """Repeated for the batch, the one value of a target, ε or upstream is a view that no kernel may read as rows."""
    xs, ys = batches(place, probabilities)
    ys = ys.clamp_min(0)  # the mean of one ignored row is 0/0
    rows, target = xs[:, 0], ys[0, 0]
    batched(place, f, (0, None), rows, target)
    batched(place, f, (None, 0), rows[0], ys[:, 0])
    eps = torch.tensor([0.3], device=place[1])
    smoothed = f(lambda x: lsk.cross_entropy(x, target, label_smoothing=eps, backend=place[0]))
    torch.testing.assert_close(vmap(smoothed)(rows), torch.stack([smoothed(row) for row in rows]))


@pytest.mark.parametrize("of", [0, 1])
def test_vmap_of_a_second_vjp_through_probabilities(place: Place, of: int) -> None:
    """The loss is linear in the target, whose second derivative is zero and thus no batch."""
    xs, qs = batches(place, True)
    along = xs.flip(1)
    pulled = lambda loss: lambda x, q: vjp(grad(loss, of), x, q)[1](along[0])  # noqa: E731
    same(place, lambda loss: vmap(pulled(loss))(xs, qs))
    same(place, lambda loss: vmap(lambda q: pulled(loss)(xs[0], q))(qs))


def test_vmap_of_statistics_and_epsilon_per_row(place: Place) -> None:
    xs, ys = batches(place)
    eps = torch.rand(BATCH, N, generator=torch.Generator().manual_seed(0)).to(place[1])

    def call(x: Tensor, y: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        loss, stats = lsk.cross_entropy(
            x, y, label_smoothing=eps, reduction="none", return_stats="all", backend=place[0]
        )
        return loss, *stats

    rows = [call(*one) for one in zip(xs, ys, eps, strict=True)]
    for got, want in zip(vmap(call)(xs, ys, eps), zip(*rows, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


def test_jacobians_in_every_order(place: Place) -> None:
    """Forward over forward, where PyTorch drops a tangent of autograd.Function, is the reference's, or refused."""
    (x, *_), (y, *_) = batches(place)
    same(place, lambda loss: jacrev(jacrev(lambda x: loss(x, y)))(x))
    same(place, lambda loss: jacrev(jacfwd(lambda x: loss(x, y)))(x))
    twice = lambda loss: jacfwd(jacfwd(lambda x: loss(x, y)))(x)  # noqa: E731
    same(("reference", place[1]), twice)
    if place[0] != "reference":
        with pytest.raises(lsk.ArgumentError, match="does not serve forward mode inside forward mode"):
            twice(pair(place)[0])


def test_tangents_of_options_are_not_dropped(fast_place: Place) -> None:
    """The kernels have no tangent of ε: an error, not a derivative that lacks it."""
    (x, *_), (y, *_) = batches(fast_place)
    eps = torch.tensor(0.1, device=x.device)
    with pytest.raises((NotImplementedError, lsk.ArgumentError), match="label_smoothing"):
        jvp(lambda e: lsk.cross_entropy(x, y, label_smoothing=e, backend=fast_place[0]), (eps,), (eps,))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_backward_under_forward_mode(place: Place, reduction: str) -> None:
    """Forward over reverse without torch.func: the tangent of the logits, or of the upstream of an earlier loss."""
    (x, v, _), (y, *_) = batches(place)

    def tangents(loss: Callable[..., Tensor]) -> list[Tensor]:
        found = []
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone().requires_grad_(), v)
            (over_reverse,) = torch.autograd.grad(loss(dual, y).sum(), dual)
            found.append(forward_ad.unpack_dual(over_reverse).tangent)
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y)
        with forward_ad.dual_level():
            upstream = forward_ad.make_dual(torch.ones_like(value), torch.full_like(value, 0.3))
            (linear,) = torch.autograd.grad(value, leaf, upstream)
            found.append(forward_ad.unpack_dual(linear).tangent)
        return found

    same(place, tangents, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tangents_in_half_precision_are_not_rounded_on_the_way(place: Place, dtype: torch.dtype) -> None:
    """Σ dz = 0: the roundings of a finished gradient would be what is left of its sum."""
    x, y = draw(place, 4, 700, dtype)
    v = x.flip(0) + 3
    tangents = []
    for loss, own in zip(pair(place), (dtype, torch.float64), strict=True):
        tangents.append(jvp(lambda x: loss(x, y), (x.to(own),), (v.to(own),))[1].double())  # noqa: B023
    torch.testing.assert_close(*tangents, rtol=1e-5, atol=1e-5)


def test_a_nan_tangent_of_an_ignored_row_stays_there(place: Place) -> None:
    x, y = draw(place, N, K, ignored=2)
    v = torch.ones_like(x)
    v[0] = torch.nan
    assert jvp(lambda x: lsk.cross_entropy(x, y, backend=place[0]), (x,), (v,))[1].isfinite()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_batch_of_upstreams(place: Place, reduction: str) -> None:
    """``torch.autograd.functional.jacobian(vectorize=True)``, ``is_grads_batched``: another vmap than torch.func's."""
    (x, *_), (y, *_) = batches(place)
    jacobian = functools.partial(torch.autograd.functional.jacobian, vectorize=True)
    same(place, lambda loss: jacobian(lambda x: loss(x, y), x), reduction=reduction)


# ---- compilers


def step(loss: Callable[..., Tensor], x: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    value = loss(leaf, *call) * 0.37
    value.sum().backward()
    return value.detach(), leaf.grad


EVERY_OPTION: dict[str, Any] = {
    "label_smoothing": 0.1, "smoothing": "others", "smooth_over": "finite", "z_loss": 0.01,
    "confidence_penalty": 0.1, "logit_scale": 1.5, "softcap": 20.0, "row_weight": torch.arange(1.0, 7),
    "weight": torch.arange(1.0, 38), "ignore_index": -1,
}  # fmt: skip


@pytest.mark.thin
@compiler
@pytest.mark.parametrize("form", ["static", "dynamic", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "none"}, EVERY_OPTION], ids=len)
def test_compiled_as_eager(fast_place: Place, options: dict[str, Any], dtype: torch.dtype, form: str) -> None:
    x, y = draw(fast_place, dtype=dtype)
    options = {n: v.to(x.device) if isinstance(v, Tensor) else v for n, v in options.items()}
    if form == "probabilities":
        options.pop("ignore_index", None)
        target = torch.softmax(x.float(), -1)
    else:
        target = torch.where(y < 0, options.get("ignore_index", -100), y)
    loss = lambda x, y: lsk.cross_entropy(x, y, backend=fast_place[0], **options)  # noqa: E731
    dynamic = {"static": False, "dynamic": True}.get(form)
    torch.testing.assert_close(step(compiled(loss, dynamic=dynamic)[0], x, target), step(loss, x, target))


@pytest.mark.claims.with_args(lambda fast_place: {"inductor"})  # what it rearranges is around the operators
@compiler
def test_compiled_by_inductor(fast_place: Place) -> None:
    """The default compiler, which rearranges what is around the operators."""
    x, y = draw(fast_place)
    loss = lambda x, y: lsk.cross_entropy(x * 2, y, label_smoothing=0.1, backend=fast_place[0])  # noqa: E731
    torch._dynamo.reset()
    torch.testing.assert_close(step(torch.compile(loss, fullgraph=True), x, y), step(loss, x, y))


@compiler
def test_torch_func_inside_torch_compile(fast_place: Place) -> None:
    """torch.compile cannot trace a custom Function under a transform: the reference serves, or the kernels refuse."""
    xs, ys = batches(fast_place)
    for backend in (None, fast_place[0]):
        loss = functools.partial(lsk.cross_entropy, label_smoothing=0.1, backend=backend)
        torch._dynamo.reset()
        f = torch.compile(vmap(grad(loss)), fullgraph=True, backend="aot_eager")
        if backend is None:
            torch.testing.assert_close(f(xs, ys), vmap(grad(loss))(xs, ys), rtol=2e-6, atol=2e-6)
        else:
            with pytest.raises(Exception, match=r"does not serve torch\.func inside torch\.compile"):
                f(xs, ys)


@pytest.mark.claims.with_args(lambda fast_place, numbers: {fast_place, numbers})
@compiler
@pytest.mark.parametrize("numbers", [False, True])
def test_nothing_recompiles(fast_place: Place, numbers: bool) -> None:
    """Not another ε, not other ignored rows, no other normaliser, not another N. A Python number is a constant to the
    compiler until it changes, which costs one more graph; a tensor costs none."""

    def loss(x: Tensor, y: Tensor, eps: Tensor | float, normalizer: Tensor | float) -> Tensor:
        return lsk.cross_entropy(x, y, label_smoothing=eps, normalizer=normalizer, backend=fast_place[0])

    f, graphs = compiled(loss, dynamic=None if numbers else True)
    counts = []
    for n, eps, ignored in ((6, 0.1, 3), (9, 0.3, 2), (9, 0.05, 1), (10, 0.2, 3), (17, 0.25, 2), (16, 0.15, 4)):
        x, y = draw(fast_place, n, 37, ignored=ignored)
        call = (eps, n + 0.5) if numbers else (torch.tensor(t, device=x.device) for t in (eps, n + 0.5))
        call = tuple(call)
        torch.testing.assert_close(step(f, x, y, *call), step(loss, x, y, *call))
        counts.append(graphs.frame_count)
    settled = counts[1 if numbers else 0 :]
    assert settled == settled[:1] * len(settled)


@compiler
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "weight": torch.arange(1.0, 38)}], ids=len)
def test_export_of_an_evaluation_loss(fast_place: Place, options: dict[str, Any]) -> None:
    x, y = draw(fast_place)
    module = lsk.CrossEntropyLoss(backend=fast_place[0], **options).to(x.device).eval()
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        exported = torch.export.export(module, (x, y), dynamic_shapes=({0: rows}, {0: rows}))
        more = draw(fast_place, 11)
        torch.testing.assert_close(exported.module()(*more), module(*more))
    assert any("labelsmooth_kernels" in str(node.target) for node in exported.graph.nodes)


# ---- host synchronisations


def sync_free_step(place: Place, options: dict[str, Any]) -> None:
    x, y = draw(place)
    leaf = x.requires_grad_()
    with Trap():
        loss = lsk.cross_entropy(leaf * 1, y, backend=place[0], **options)
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.backward(torch.full_like(loss, 0.37))


TENSORS: dict[str, Any] = {
    "label_smoothing": torch.tensor(0.1), "row_weight": torch.ones(6), "weight": torch.ones(37), "return_stats": True,
    "normalizer": torch.tensor(3.0), "z_loss": 0.1, "smoothing": torch.ones(37) / 37,
}  # fmt: skip


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"inplace": True}, TENSORS], ids=["mean", "none", "inplace", "tensors"]
)
def test_no_step_waits_for_the_device(
    fast_place: Place, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a step can be captured in a CUDA graph. What the host looks at only where that is free, on the CPU (the
    values of ε), is switched off as it is on a GPU."""
    monkeypatch.setattr(torch_state, "recorded", lambda: True)
    sync_free_step(fast_place, {n: v.to(fast_place[1]) if isinstance(v, Tensor) else v for n, v in options.items()})


def test_the_trap_sees_a_synchronisation(fast_place: Place) -> None:
    with pytest.raises(AssertionError, match="synchronises"):
        sync_free_step(fast_place, {"label_smoothing": torch.tensor(0.1)})  # its value is looked at on a CPU


def test_the_host_code_of_the_triton_operators_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators themselves, which the trap sees as one call; their kernels are not started."""
    skip_unless_available("triton")
    names = (f"labelsmooth_kernels.triton_kernels.{name}" for name in ("logits", "launch"))
    logits, launch = (importlib.import_module(name) for name in names)
    monkeypatch.setattr(logits, "_check_classes", lambda *_: None)  # of targets, on the CPU only
    started = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_: started.append(kernel))
    x, y = draw(("triton", "cpu"))
    row = (y, torch.ones(37), None, 0.1, None, torch.ones(6), -100, False, True, 0.1, 0.2, 1.5, None)
    with Trap():
        _, saved, *_, grad = logits.forward(x, *row, True, 2)
        logits.backward(x, *row, saved)
        logits.scale_(grad, torch.ones(1))
    assert len(started) >= 3


def test_the_backend_is_chosen_without_looking(fast_place: Place) -> None:
    backends._choose.cache_clear()
    sync_free_step(fast_place, {})
