"""What autograd may ask of the loss: any derivative, any order of calls, and an error rather than a wrong gradient."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from cases import Place, draw, loss_and_grad, upstream_for
from conftest import EMULATED
from covering import Mode, cover, pairs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from tracing import allocated

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, ops
from labelsmooth_kernels.distillation import Probabilities, distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

N, K = 4, 5


def positive(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uniform": {"label_smoothing": 0.1},
    "others": {"label_smoothing": 0.1, "smoothing": "others"},
    "prior": {"label_smoothing": 0.1, "smoothing": positive(K) / positive(K).sum()},
    "finite": {"label_smoothing": 0.1, "smooth_over": "finite"},
    "weight": {"label_smoothing": 0.1, "weight": positive(K)},
    "z-loss": {"label_smoothing": 0.1, "z_loss": 0.1},
    "confidence penalty": {"label_smoothing": 0.1, "confidence_penalty": 0.3},
    "scale and softcap": {"label_smoothing": 0.1, "logit_scale": 0.7, "softcap": 3.0},
    "row weight": {"label_smoothing": 0.1, "row_weight": positive(N)},
    "normalizer": {"label_smoothing": 0.1, "normalizer": torch.tensor(3.0, dtype=torch.float64)},
    "epsilon per row": {"label_smoothing": positive(N) / 2},
    "probabilities": {"label_smoothing": 0.1, "weight": positive(K), "z_loss": 0.1, "target": positive(N, K)},
    "everything": {
        "label_smoothing": 0.1, "smoothing": "others", "smooth_over": "finite", "weight": positive(K), "z_loss": 0.1,
        "confidence_penalty": -0.2, "logit_scale": 0.7, "softcap": 3.0, "row_weight": positive(N),
    },
    "row weight, sum": {"row_weight": positive(N), "reduction": "sum"},
}  # fmt: skip


@pytest.mark.thin
@pytest.mark.parametrize("reduction", ["default", "none"])
@pytest.mark.parametrize("backend", [name for name, b in backends.BACKENDS.items() if torch.float64 in b.dtypes])
@pytest.mark.parametrize("name", OPTIONS)
def test_first_and_second_derivatives(name: str, backend: str, reduction: str) -> None:
    """gradcheck and gradgradcheck, in reverse and forward mode, with every tensor among the inputs that a backend
    differentiates: the options that enter q need the reference."""
    options = dict(OPTIONS[name])
    if reduction == "none":
        if options.pop("normalizer", None) is not None:
            pytest.skip("a normalizer belongs to a mean")
        options["reduction"] = "none"
    x, y = draw(("", "cpu"), N, K, torch.float64)
    probabilities = options.pop("target", None)
    asked = lsk.LossSpec(**options).features(index_target=probabilities is None)
    options["target"] = y if probabilities is None else probabilities
    serves = backends.BACKENDS[backend]
    if reason := serves.why_not("cpu", torch.float64, asked):
        pytest.skip(f"backend {backend}: {'; '.join(reason)}")
    everywhere = {"target", "row_weight", "normalizer"}
    tensors = {
        n: v
        for n, v in options.items()
        if isinstance(v, Tensor) and v.is_floating_point() and (backend == "reference" or n in everywhere)
    }

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return lsk.cross_entropy(x, backend=backend, **options | dict(zip(tensors, values, strict=True)))

    inputs = [x.requires_grad_(), *(v.clone().requires_grad_() for v in tensors.values())]
    fast = backend != "reference" and not Mode.whole  # a random product of the Jacobian, not all of it
    assert gradcheck(loss, inputs, check_forward_ad=True, fast_mode=fast)
    assert gradgradcheck(loss, inputs, check_fwd_over_rev=True, fast_mode=fast)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_create_graph_of_kernels(fast_place: Place, reduction: str) -> None:
    """A gradient penalty through the kernels equals the one through PyTorch in float64."""
    x, y = draw(fast_place)
    results = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        call: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
        ours = dtype == torch.float32
        loss = lsk.cross_entropy(leaf, y, backend=fast_place[0], **call) if ours else F.cross_entropy(leaf, y, **call)
        upstream = torch.full_like(loss, 0.37, requires_grad=True)
        (grad,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), [leaf, upstream]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_needs_retain_graph(place: Place, reduction: str) -> None:
    x, y = draw(place)
    loss = lsk.cross_entropy(x.requires_grad_(), y, reduction=reduction, label_smoothing=0.1, backend=place[0]).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_r09_softmax_before_an_inplace_loss_raises(fast_place: Place, reduction: str, dtype: torch.dtype) -> None:
    """softmax keeps its result for its backward; the loss wrote over it, and autograd must notice."""
    x, y = draw(fast_place, N, K, dtype)
    p = torch.softmax(x.requires_grad_(), 1)
    loss = lsk.cross_entropy(p, y, reduction=reduction, inplace=True, label_smoothing=0.1, backend=fast_place[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_r09_two_losses_on_one_tensor(place: Place, dtype: torch.dtype) -> None:
    """Together they give the sum of their gradients; the logits and the first loss's gradient stay as they are."""
    x, y = draw(place, N, K, dtype)
    grads = [loss_and_grad(place, x, y, reduction="sum", label_smoothing=eps)[1] for eps in (0.1, 0.4)]
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    first, second = (lsk.cross_entropy(h, y, reduction="sum", label_smoothing=e, backend=place[0]) for e in (0.1, 0.4))
    (first + second).backward()
    assert torch.equal(leaf.grad, grads[0] + grads[1])
    assert torch.equal(h, x)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_r09_checkpointing(place: Place, inplace: bool, use_reentrant: bool) -> None:
    x, y = draw(place)
    plain, checked = x.clone().requires_grad_(), x.clone().requires_grad_()

    def loss(x: Tensor) -> Any:
        return lsk.cross_entropy(x * 1.5, y, label_smoothing=0.1, inplace=inplace, backend=place[0])

    loss(plain).backward()
    checkpoint(loss, checked, use_reentrant=use_reentrant).backward()
    assert torch.equal(plain.grad, checked.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_overwrites_only_where_it_may(fast_place: Place, reduction: str) -> None:
    """The gradient lies in the logits' memory; a kept graph and create_graph are served right or refused."""
    x, y = draw(fast_place, ignored=0)
    call: dict[str, Any] = {"label_smoothing": 0.1, "reduction": reduction}
    upstream = torch.full((6,) if reduction == "none" else (), 1.0, device=fast_place[1])
    _, want = loss_and_grad(fast_place, x, y, upstream, **call)
    logits = [x.clone().requires_grad_() * 1 for _ in range(2)]
    losses = [lsk.cross_entropy(h, y, inplace=True, backend=fast_place[0], **call) for h in logits]
    for _ in range(2):
        (kept,) = torch.autograd.grad(losses[0], logits[0], upstream, retain_graph=True)
        assert torch.equal(kept, want)
    (last,) = torch.autograd.grad(losses[0], logits[0], upstream)
    assert torch.equal(last, want)
    assert last.data_ptr() == logits[0].data_ptr()
    with pytest.raises(RuntimeError, match=r"create_graph=True .*need the logits, which inplace=True overwrites"):
        torch.autograd.grad(losses[1], logits[1], upstream, create_graph=True)


def test_second_derivatives_at_masked_classes_under_a_softcap(place: Place) -> None:
    x, y = draw(place, N, K)
    x[:, 2] = -torch.inf
    y = torch.where(y == 2, 3, y)
    x.requires_grad_()
    loss = lsk.cross_entropy(x, y, softcap=3.0, reduction="sum", backend=place[0])
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    assert second.isfinite().all()
    assert (second[:, 2] == 0).all()


def test_a_row_weight_may_not_change_before_its_graph_is_asked_for(fast_place: Place) -> None:
    x, _ = draw(fast_place, N, K)
    weight = torch.ones(N, device=x.device)
    call = {"row_weight": weight, "reduction": "sum", "backend": fast_place[0]}
    loss = lsk.cross_entropy(x.requires_grad_(), torch.softmax(x.detach(), 1), **call)
    weight.mul_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_saved_tensor_hooks_see_the_gradient(fast_place: Place) -> None:
    """So that checkpointing drops it and ``save_on_cpu`` moves it: nothing of N×K hides in the graph."""
    x, y = draw(fast_place, N, K)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
        lsk.cross_entropy(x.requires_grad_(), y, backend=fast_place[0])
    assert seen.count(x.shape) == 2, "the logits and their gradient"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_are_detached(place: Place, reduction: str) -> None:
    x, y = draw(place)
    x.requires_grad_()
    for asked, given in ((True, 4), ("entropy", 5), ("all", 7)):
        loss, stats = lsk.cross_entropy(x, y, reduction=reduction, return_stats=asked, backend=place[0])
        assert loss.requires_grad
        assert [(value.requires_grad, value.shape) for value in stats[:given]] == [(False, y.shape)] * given
        assert stats[given:] == (None,) * (7 - given)


OUTPUTS = list(itertools.product((False, True), (False, True), (0, 1, 2, 4)))  # full, with_grad, n_stats


def calls(
    name: str, logits: Tensor, target: Tensor, full: bool, outputs: list[tuple[bool, int]]
) -> list[tuple[Any, ...]]:
    """Arguments of an operator, with few and with all of its optional tensors and outputs."""
    device = logits.device
    if full or name == "target_grad":
        target = positive(N, K).float().to(logits.device)
    vectors = (positive(K).float().to(device), positive(K).float().to(device)) if full else (None, None)
    eps, scale = (positive(N).float().to(device), upstream_for(N, device)) if full else (None, None)
    row = (target, *vectors, 0.1, eps, scale, -100, False, full, 0.1, 0.2 if full else 0.0, 1.5, 5.0 if full else None)
    z = logits * 1.5 if not full else 5.0 * torch.tanh(logits * 1.5 / 5.0)
    saved = torch.stack([z.amax(1), torch.logsumexp(z - z.amax(1, keepdim=True), 1), *torch.ones(2, N, device=device)])
    return {
        "forward": [(logits, *row, grad, stats) for grad, stats in outputs],
        "forward_": [(logits.clone(), *row, stats) for stats in (0, 2)],
        "backward": [(logits, *row, saved)],
        "backward_": [(logits.clone(), *row, saved)],
        "target_grad": [(logits, *row, saved)],
        "scale_": [(logits.clone(), torch.full((1,), 0.5 if full else 1.0, device=device))],
    }[name]


@pytest.mark.parametrize("name", ops.SCHEMAS)
def test_opcheck(fast_place: Place, name: str) -> None:
    """Schema, fake implementation and tracing of every operator."""
    op = getattr(backends.BACKENDS[fast_place[0]].kernels, name)
    thin = fast_place in EMULATED and not Mode.whole
    outputs = cover(OUTPUTS, lambda row: pairs(dict(enumerate(row)))) if thin else OUTPUTS
    for full, dtype in ((False, torch.float32), (True, torch.bfloat16)):  # beside float32 vectors and targets
        of_this = [output for has, *output in outputs if has == full]
        for arguments in calls(name, *draw(fast_place, N, K, dtype), full, of_this):
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("direction", "gradients"), [("no_grad", 0), ("mean", 1), ("none", 1), ("inplace", 0)])
def test_memory_beyond_logits_and_gradient_is_per_row(
    fast_place: Place, direction: str, gradients: int, dtype: torch.dtype
) -> None:
    n, k = 32 if fast_place not in EMULATED else 8, 2048
    x, y = draw(fast_place, n, k, dtype)
    leaf = (x.requires_grad_() * 1) if direction == "inplace" else x.requires_grad_(direction != "no_grad")
    reduction = "none" if direction == "none" else "mean"
    call: dict[str, Any] = {"label_smoothing": 0.1, "reduction": reduction, "inplace": direction == "inplace"}
    used = memory_of(fast_place, leaf, y, **call)
    assert used >= gradients * x.nbytes, "the measurement sees the gradient"
    assert used - gradients * x.nbytes <= 256 * n + 8192, "a few numbers per row, a few scalars"


def memory_of(place: Place, leaf: Tensor, target: Tensor, **call: Any) -> int:
    """Bytes that loss and gradient ask for."""

    def run() -> None:
        loss = lsk.cross_entropy(leaf, target, backend=place[0], **call)
        if loss.requires_grad:
            torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.37))

    return allocated(run, place[1])


UNCOPIED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "(N, K, D)": (lambda x: x.transpose(1, 2).contiguous(), 1),
    "(N, K, D) as a view": (lambda x: x.transpose(1, 2), 1),
    "(B, T, K) without the last step": (lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1], -1),
    "(B, T, K) transposed from (T, B, K)": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), -1),
    "every second class": (lambda x: x.repeat_interleave(2, 2)[..., ::2], -1),
}


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("layout", UNCOPIED)
def test_layouts_are_not_copied(fast_place: Place, layout: str, probabilities: bool) -> None:
    """Beyond the gradient, which has the logits' shape, no more memory than for contiguous rows."""
    a, b, k = (4, 8, 2048) if fast_place not in EMULATED else (2, 4, 1024)  # logits of more bytes than may be asked for
    lay, class_dim = UNCOPIED[layout]
    x, y = draw(fast_place, a * b, k)
    leaf = lay(x.view(a, b, k)).detach().requires_grad_()
    target = lay(torch.softmax(x, -1).view(a, b, k)) if probabilities else y.view(a, b)
    used = memory_of(fast_place, leaf, target, class_dim=class_dim, label_smoothing=0.1, weight=torch.ones_like(x[0]))
    assert used - leaf.nbytes <= 256 * a * b + 8192 + 4 * 4 * k, "a few numbers per row and class, a few scalars"


# ---- tensors beside the logits: a gradient, or an error

TENSORS = {
    "weight": positive(K), "smoothing": positive(K) / positive(K).sum(), "label_smoothing": positive(1)[0] / 4,
    "label_smoothing of rows": positive(N) / 4, "row_weight": positive(N), "normalizer": positive(1) + 3,
    "linear_bias": positive(K), "target": positive(N, K),
}  # fmt: skip
CALLS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda h, w, y, **options: lsk.cross_entropy(h @ w.T, y, **options),
    "linear_cross_entropy": lsk.linear_cross_entropy,
    "distillation_loss": lambda h, w, y, **options: distillation_loss(h @ w.T, 2 * (h @ w.T).detach(), y, **options),
}
UNKNOWN = {("cross_entropy", "linear_bias")} | {
    ("distillation_loss", name) for name in ("weight", "linear_bias", "target")
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("call", CALLS)
def test_every_tensor_argument_has_its_gradient(call: str, name: str, alone: bool, reduction: str) -> None:
    """In reverse mode and by torch.func, whether or not the logits have one too."""
    argument = name.split()[0]
    if (call, argument) in UNKNOWN or (argument == "normalizer" and reduction != "mean"):
        pytest.skip("no such argument")
    hidden, head = (positive(n, 3) for n in (N, K))
    options = {"label_smoothing": 0.1, "target": torch.arange(N), "reduction": reduction}
    if not alone:
        hidden.requires_grad_()

    def loss(value: Tensor) -> Tensor:
        given = options | {argument: value}
        return CALLS[call](hidden.detach() if alone else hidden, head, given.pop("target"), **given).sum()

    value = TENSORS[name]
    step = torch.linspace(-1e-6, 1e-6, value.numel()).reshape(value.shape) if value.numel() > 1 else 1e-6
    want = (loss(value + step) - loss(value - step)).detach() / 2
    leaf = value.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    for found in (grad, torch.func.grad(loss)(value)):
        torch.testing.assert_close((found * step).sum(), want, rtol=1e-4, atol=1e-14)


CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "target.hidden": lambda t: lsk.linear_cross_entropy(X, W, lsk.Teacher(t, W)),
    "target.linear_weight": lambda t: lsk.linear_cross_entropy(X, W, lsk.Teacher(X, t)),
    "target.linear_bias": lambda t: lsk.linear_cross_entropy(X, W, lsk.Teacher(X, W, t[0])),
    "target.probabilities": lambda t: lsk.linear_cross_entropy(X, W, lsk.TopK(torch.arange(K).expand(K, K), t)),
    "teacher": lambda t: distillation_loss(W, t),
    "teacher ": lambda t: distillation_loss(W, Probabilities(t)),
    "teacher.hidden": lambda t: distillation_loss(W, lsk.Teacher(t, W)),
    "teacher.linear_weight": lambda t: distillation_loss(W, lsk.Teacher(X, t)),
    "teacher.linear_bias": lambda t: distillation_loss(W, lsk.Teacher(X, W, t[0])),
}
X, W = positive(K, K), positive(K, K)


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_constant_that_requires_a_gradient_is_refused(name: str) -> None:
    """A None, or no tangent, would go unseen."""
    loss, leaf = CONSTANTS[name], positive(K, K).requires_grad_()
    match = f"{name.strip()} must not require a gradient.*detach"
    with pytest.raises(lsk.ArgumentError, match=match):
        loss(leaf)
    with pytest.raises(lsk.ArgumentError, match=match):
        torch.func.grad(loss)(leaf.detach())
    if name != "target.probabilities":  # whose tangent goes through whole logits
        with pytest.raises(lsk.ArgumentError, match=match):
            torch.func.jvp(loss, (leaf.detach(),), (torch.ones(K, K, dtype=torch.float64),))
    with torch.no_grad():
        want = loss(leaf)
    torch.testing.assert_close(loss(leaf.detach()), want)
