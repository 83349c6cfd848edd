"""What autograd, threads and memory see of the calls that the extension serves without Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from direct_calls import EPS, NEEDS_EXTENSION, REDUCTIONS, SOFT, WEIGHT, X, Y, close_the_gate, drawn
from drop_in import K, arguments
from torch import Tensor
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import labelsmooth_kernels as lsk

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = NEEDS_EXTENSION


def doubles(kind: str, shape: tuple[int, ...] = (4, K)) -> tuple[Tensor, Tensor]:
    x, y = arguments(shape, kind, "cpu")
    return x.double().requires_grad_(), y.double() if kind == "probabilities" else y


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["some ignored", "probabilities"])
@pytest.mark.parametrize("shape", [(K,), (4, K), (2, K, 2)], ids=str)
def test_derivatives(shape: tuple[int, ...], kind: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second, one upstream at a time and several."""
    close_the_gate(monkeypatch)
    x, y = doubles(kind, shape)

    options: dict[str, Any] = {"label_smoothing": EPS, "reduction": reduction}
    if kind != "probabilities":
        y[y == -100], options["ignore_index"] = 3, 3

    def loss(x: Tensor) -> Tensor:
        return lsk.cross_entropy(x, y, WEIGHT.double(), **options)

    want = torch.autograd.functional.hessian(
        lambda x: F.cross_entropy(x, y, WEIGHT.double(), **options).sum(), x.detach()
    )
    got = torch.autograd.functional.hessian(lambda x: loss(x).sum(), x.detach())
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(loss, x, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, x, check_batched_grad=True)
    value = loss(x)
    upstream = torch.randn(3, *value.shape, dtype=x.dtype)
    for graph in (False, True):
        pull = torch.func.vmap(
            lambda u, g=graph: torch.autograd.grad(value, x, u, retain_graph=True, create_graph=g)[0]
        )
        want = torch.stack([torch.autograd.grad(value, x, u, retain_graph=True)[0] for u in upstream])
        torch.testing.assert_close(pull(upstream), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_graph_that_is_kept(reduction: str, dtype: torch.dtype) -> None:
    """The gradient is scaled in place only where nobody can ask again; whoever does is told that it is gone."""
    x = X.to(dtype, copy=True).requires_grad_()
    loss = lsk.cross_entropy(x, Y, reduction=reduction)
    upstream = torch.full_like(loss, 0.25)
    first, second = (torch.autograd.grad(loss, x, u, retain_graph=True)[0] for u in (upstream, 2 * upstream))
    last = torch.autograd.grad(loss, x, upstream)[0]
    assert torch.equal(first, last)
    torch.testing.assert_close(second, 2 * first, rtol=torch.finfo(dtype).eps, atol=1e-7)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, x, upstream)


def test_gradients_add_up_in_the_leaf() -> None:
    """And the one that a leaf takes over belongs to it alone."""
    x = X.clone().requires_grad_()
    for _ in range(3):
        lsk.cross_entropy(x, Y).backward()
    (once,) = torch.autograd.grad(lsk.cross_entropy(x, Y), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 3 * once)


class Cut(torch.autograd.Function):
    """Has no gradient to give, which reaches the node before as undefined."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> None:
        return None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_upstream_no_gradient(reduction: str) -> None:
    x = X.clone().requires_grad_()
    Cut.apply(lsk.cross_entropy(x, Y, reduction=reduction)).sum().backward()
    assert x.grad is None or not x.grad.any()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_upstreams_that_hold_more_than_numbers(reduction: str) -> None:
    """A tangent, and a subclass of two tensors: the gradient is linear in both."""
    x = X.double().requires_grad_()
    loss = lsk.cross_entropy(x, Y, reduction=reduction)
    one, two = (torch.linspace(a, 2, loss.numel(), dtype=x.dtype).view(loss.shape) for a in (0.5, 1.5))
    (want_one,), (want_two,) = (torch.autograd.grad(loss, x, u, retain_graph=True) for u in (one, two))
    (pair,) = torch.autograd.grad(lsk.cross_entropy(x, Y, reduction=reduction), x, TwoTensor(one, two))  # not kept
    assert isinstance(pair, TwoTensor)
    with forward_ad.dual_level():
        (dual,) = torch.autograd.grad(loss, x, forward_ad.make_dual(one, two))
        tangent = forward_ad.unpack_dual(dual).tangent
    for got, want in ((pair.a, want_one), (pair.b, want_two), (dual, want_one), (tangent, want_two)):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_checkpoints_across_a_mode(reduction: str, dtype: torch.dtype) -> None:
    """What is made again under a mode of the backward's is what was made without."""
    x = X.to(dtype, copy=True).requires_grad_()
    loss = checkpoint(lambda x: lsk.cross_entropy(x * 1, Y, reduction=reduction).sum(), x, use_reentrant=False)
    with FlopCounterMode(display=False):
        (grad,) = torch.autograd.grad(loss, x)
    assert torch.equal(grad, torch.autograd.grad(lsk.cross_entropy(x, Y, reduction=reduction).sum(), x)[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logits_that_changed_are_noticed(reduction: str) -> None:
    leaf = X.clone().requires_grad_()
    x = leaf * 1
    loss = lsk.cross_entropy(x, Y, reduction=reduction).sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_what_is_saved_can_be_moved_and_made_again(reduction: str, dtype: torch.dtype) -> None:
    def loss(x: Tensor) -> Tensor:
        return lsk.cross_entropy(x, Y, WEIGHT, reduction=reduction, label_smoothing=EPS).sum()

    x = X.to(dtype, copy=True).requires_grad_()
    (want,) = torch.autograd.grad(loss(x), x)
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hooked = loss(x)
    assert [t.data_ptr() == x.data_ptr() for t in packed].count(True) == 1
    again = checkpoint(loss, x, use_reentrant=False)
    for value in (hooked, again):
        assert isinstance(value, Tensor)
        assert torch.equal(torch.autograd.grad(value, x)[0], want)


# ---- the operator, its memory and its time


def operators(call: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        call()
    return {event.name for event in profile.events() if "::" in event.name and "autograd" not in event.name}


def test_a_call_is_one_operator_and_its_gradient_another() -> None:
    """Small calls cost what they call. Beside it tensors are allocated, and the backward begins with a 1."""
    x = X.clone().requires_grad_()
    lsk.cross_entropy(x, Y).backward()
    made = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::fill_", "aten::ones_like", "aten::detach"}
    poison = {"aten::resolve_conj", "aten::view_as_real"}
    x.grad = None
    found = operators(lambda: lsk.cross_entropy(x, Y, label_smoothing=EPS).backward())
    assert found - made - poison == {"labelsmooth_kernels::cpu_reduced", "labelsmooth_kernels::cpu_scale_"}
    with torch.no_grad():
        assert operators(lambda: lsk.cross_entropy(x, Y)) - made - poison == {"labelsmooth_kernels::cpu_reduced"}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_bits_from_any_number_of_threads(weighted: bool) -> None:
    x, y = drawn(100_000, 3)
    weight = torch.tensor([0.1, 0.7, 1.3]) if weighted else None
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = lsk.cross_entropy(leaf, y, weight, label_smoothing=EPS)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])
    want = F.cross_entropy(x.double(), y, weight if weight is None else weight.double(), label_smoothing=EPS)
    torch.testing.assert_close(results[0][0].double(), want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [2, 1000])
def test_losses_that_are_all_alike(k: int) -> None:
    """At the start of a training float32 would round them in one direction, each time that one is added."""
    x = torch.zeros(8192, k)
    loss = lsk.cross_entropy(x, torch.zeros(8192, dtype=torch.int64))
    torch.testing.assert_close(loss.double(), torch.tensor(k, dtype=torch.float64).log(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [-1, 3, 2**31, -(2**62)])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_target_outside_is_named(bad: int, threads: int) -> None:
    """Of several, in the second and a later block of rows."""
    x, y = drawn(50_000, 3)
    y[5001], y[40_000] = bad, 7
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(IndexError, match=rf"target\[5001\] = {bad} is outside \[0, 3\)"):
            lsk.cross_entropy(x, y)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_gradients(reduction: str) -> None:
    x = X.clone().requires_grad_()
    want = lsk.cross_entropy(x, Y, reduction=reduction).detach()
    with torch.no_grad():
        silent = lsk.cross_entropy(x, Y, reduction=reduction)
    with torch.inference_mode():
        inferred = lsk.cross_entropy(X, Y, reduction=reduction)
    for loss in (silent, inferred, lsk.cross_entropy(X, Y, reduction=reduction)):
        assert not loss.requires_grad
        assert not loss._is_view()
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)


REDUCED = torch.ops.labelsmooth_kernels.cpu_reduced.default


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("k", [K, 300])
def test_opcheck(k: int, dtype: torch.dtype) -> None:
    x, y = drawn(6, k, dtype)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    for target in (y, x.softmax(1)):
        for saved, grad in ((False, False), (False, True), (True, False)):
            torch.library.opcheck(REDUCED, (x, target, torch.rand(k, dtype=acc), EPS, -100, True, saved, grad))


BROKEN: dict[str, dict[str, Tensor]] = {
    "target, too short": {"target": Y[:-1]},
    "target, int32": {"target": Y.int()},
    "target, strided": {"target": Y.repeat_interleave(2)[::2]},
    "target, of another shape": {"target": SOFT[:, :-1]},
    "weight, too short": {"weight": WEIGHT[:-1]},
    "weight, double": {"weight": WEIGHT.double()},
    "weight, strided": {"weight": WEIGHT.repeat_interleave(2)[::2]},
    "logits, integers": {"logits": X.int()},
    "logits, one row": {"logits": X[0]},
    "logits, no classes": {"logits": X[:, :0]},
}


@pytest.mark.parametrize("broken", BROKEN)
def test_the_operator_checks_what_it_relies_on(broken: str) -> None:
    given = {"logits": X, "target": Y, "weight": WEIGHT, **BROKEN[broken]}
    with pytest.raises(RuntimeError, match=broken.partition(",")[0]):
        REDUCED(*given.values(), EPS, -100, True, False, True)
