"""Distillation: its loss and gradient against float64 and against the composition of PyTorch's own functions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from cases import guarded, placed, truncates
from covering import Mode
from distilled import K, N, draw, judge, oracle
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels.backends import BACKENDS
from labelsmooth_kernels.distillation import DistillationTerms, Probabilities, distillation_loss, sharpen

if TYPE_CHECKING:
    from cases import Place

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MIXES: dict[str, dict[str, Any]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 4": {"temperature": 4.0, "alpha": 0.9, "label_smoothing": 0.1},
    "temperature 0.5": {"temperature": 0.5, "alpha": 0.3, "label_smoothing": 0.1, "smoothing": "others"},
    "teacher alone": {"temperature": 2.0, "alpha": 1.0},
    "targets alone": {"temperature": 2.0, "alpha": 0.0, "label_smoothing": 0.1},
    "prior": {"temperature": 2.0, "label_smoothing": 0.2, "smoothing": torch.arange(1.0, K + 1) / (K * (K + 1) / 2)},
    "epsilon per row": {"temperature": 2.0, "label_smoothing": torch.linspace(-0.2, 1, N)},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mix", MIXES)
def test_loss_and_gradient(served: Place, mix: str, dtype: torch.dtype) -> None:
    if dtype not in BACKENDS[served[0]].dtypes:
        pytest.skip(f"{served[0]} does not serve {dtype}")
    options = placed(MIXES[mix], served[1])
    x, t, y = (v.to(served[1]) for v in draw(dtype))
    call = functools.partial(distillation_loss, backend=served[0], **options)
    student, check = guarded(x)
    leaf = student.detach().requires_grad_()
    loss, terms = call(leaf, t, y, reduction="none", return_terms=True)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    factors = torch.linspace(-1, 2, N, dtype=loss.dtype, device=loss.device)
    (grad,) = torch.autograd.grad(loss, leaf, factors)
    judge(x, t, y, loss.detach(), grad, factors, truncates(served[0], x), **options)
    check()
    assert isinstance(terms, DistillationTerms)
    alpha, temperature = options.get("alpha", 0.5), options["temperature"]
    mixed = alpha * temperature**2 * terms.divergence + (1 - alpha) * terms.loss
    torch.testing.assert_close(mixed, loss.detach(), rtol=1e-6, atol=1e-7)
    for reduction in ("sum", "mean"):
        leaf = student.detach().requires_grad_()
        total = call(leaf, t, y, reduction=reduction)
        (one_pass,) = torch.autograd.grad(total, leaf, torch.full_like(total, 1.5))
        even = torch.full((N,), 1.5 / (int((y != -100).sum()) if reduction == "mean" else 1), dtype=torch.float64)
        judge(x, t, y, loss.detach(), one_pass, even.to(x.device), True, **options)  # two roundings
        assert total.item() == pytest.approx(
            float((oracle(x, t, y, **options) * even.to(x.device)).sum()) / 1.5, rel=1e-5
        )
    check()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("k", [1, 2, 16, 1000, 5003])
def test_sizes(served: Place, k: int, n: int) -> None:
    x, t, y = (v.to(served[1]) for v in draw(torch.float32, n, k, ignored=0))
    y[0] = k - 1
    leaf = x.requires_grad_()
    mix = {"temperature": 2.0, "label_smoothing": 0.1}
    loss = distillation_loss(leaf, t, y, reduction="none", backend=served[0], **mix)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    judge(x, t, y, loss.detach(), grad, torch.ones(n, device=x.device), False, **mix)


def test_a_student_like_its_teacher_has_nothing_to_learn(served: Place) -> None:
    x, _, _ = draw(n=3, k=2003)
    leaf = x.to(served[1]).requires_grad_()
    loss = distillation_loss(leaf, leaf.detach().clone(), temperature=3.0, backend=served[0])
    (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.abs() < 1e-5
    assert grad.abs().max() < 1e-6


def test_a_term_without_a_share_counts_for_nothing(served: Place) -> None:
    x, t, y = (v.to(served[1]) for v in draw(ignored=0))
    x[0, (y[0] + 1) % K] = -torch.inf  # an infinite divergence
    hard = distillation_loss(x, t, y, alpha=0.0, reduction="none", backend=served[0])
    torch.testing.assert_close(hard, F.cross_entropy(x, y, reduction="none"))
    x, t, y = (v.to(served[1]) for v in draw(ignored=0))
    x[0, y[0]], t[0, y[0]] = -torch.inf, -torch.inf  # an infinite cross-entropy
    soft = distillation_loss(x, t, y, alpha=1.0, reduction="none", backend=served[0])
    y[0] = (y[0] + 1) % K
    torch.testing.assert_close(soft.double(), oracle(x, t, y, alpha=1.0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["probabilities", "logits"])
def test_a_teacher_of_more_digits_keeps_them(served: Place, form: str) -> None:
    """float32 beside a student in bfloat16, in which log p would be off by percents of p."""
    x, t, y = (v.to(served[1]) for v in draw(torch.bfloat16))
    t = t.float() * 1.37
    teacher = Probabilities(t.softmax(-1)) if form == "probabilities" else t
    leaf = x.requires_grad_()
    loss = distillation_loss(leaf, teacher, y, temperature=2.0, reduction="none", backend=served[0])
    want = oracle(x, t, y, temperature=2.0)
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    judge(x, t, y, loss.detach(), grad, torch.ones(N, device=x.device), truncates(served[0], x), temperature=2.0)


TEACHERS = ("logits", "probabilities", "half-precision logits", "head", "head in another size")


@pytest.mark.parametrize("form", TEACHERS)
def test_forms_of_a_teacher(served: Place, form: str) -> None:
    rng = torch.Generator().manual_seed(1)
    hidden, weight, bias = (torch.randn(*s, generator=rng).to(served[1]) for s in ((N, 5), (K, 5), (K,)))
    logits = 0.7 * (hidden @ weight.T + bias)
    x, _, y = (v.to(served[1]) for v in draw())
    teacher: Any = logits
    if form == "probabilities":
        teacher = Probabilities(logits.softmax(-1))
    elif form == "half-precision logits":
        teacher = logits.bfloat16()
        logits = teacher.float()
    elif form == "head":
        teacher = lsk.Teacher(hidden, weight, bias, 0.7)
    elif form == "head in another size":
        teacher = lsk.Teacher(hidden.view(2, 3, 5), weight.double(), bias.double(), 0.7)
        x, y = x.view(2, 3, K), y.view(2, 3)
    mix = {"temperature": 2.0, "label_smoothing": 0.1, "backend": served[0], "class_dim": -1}
    for reduction in ("mean", "none"):
        leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss = distillation_loss(leaf, teacher, y, reduction=reduction, **mix)
        want = distillation_loss(same, logits.view(x.shape), y, reduction=reduction, **mix)
        torch.testing.assert_close(loss, want, rtol=3e-6, atol=3e-6)
        (grad,), (want_grad,) = (torch.autograd.grad(v.sum(), at) for v, at in ((loss, leaf), (want, same)))
        torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", [("cpu", "cpu"), ("reference", "cpu")], ids=lambda p: p[0])
def test_a_head_is_computed_in_chunks(served: Place) -> None:
    """1,000 rows make three chunks on a CPU, beside ignored rows and one ε and weight per row."""
    rng = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(1000, 4, generator=rng), torch.randn(60, 4, generator=rng)
    x, _, y = draw(n=1000, k=60, ignored=7)
    mix: dict[str, Any] = {
        "temperature": 2.0, "label_smoothing": torch.rand(1000, generator=rng) / 2,
        "row_weight": torch.rand(1000, generator=rng), "backend": served[0],
    }  # fmt: skip
    leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, want = (
        distillation_loss(a, t, y, **mix) for a, t in ((leaf, lsk.Teacher(hidden, weight)), (same, hidden @ weight.T))
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, at)[0] for v, at in ((loss, leaf), (want, same))))


def test_layouts(served: Place) -> None:
    rng = torch.Generator().manual_seed(4)
    x, t = (torch.randn(2, 3, 11, generator=rng).to(served[1]) for _ in range(2))
    y = torch.randint(11, (2, 3), generator=rng).to(served[1])
    want = oracle(x.flatten(0, 1), t.flatten(0, 1), y.flatten(), temperature=2.0).view(2, 3)
    call = functools.partial(distillation_loss, temperature=2.0, reduction="none", backend=served[0])
    torch.testing.assert_close(call(x, t, y, class_dim=-1).double(), want, rtol=1e-6, atol=1e-6)
    moved = x.movedim(-1, 1).contiguous().requires_grad_()
    loss = call(moved, t.movedim(-1, 1), y)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), moved)
    assert grad.shape == moved.shape
    assert call(x[0, 0], t[0, 0], y[0, 0]).item() == pytest.approx(want[0, 0].item(), rel=1e-6)
    alone = call(x, t, class_dim=-1)
    assert alone.shape == (2, 3)
    torch.testing.assert_close(alone, call(x, t, y, class_dim=-1, alpha=1.0))
    assert distillation_loss(x[:0], t[:0], class_dim=-1, reduction="sum", backend=served[0]) == 0


def test_derivatives_of_any_order(served: Place) -> None:
    if torch.float64 not in BACKENDS[served[0]].dtypes:
        pytest.skip(f"{served[0]} does not serve float64")
    x, t, y = (v.to(served[1]) for v in draw(torch.float64, 4, 7))
    for reduction in ("mean", "none"):
        call = functools.partial(distillation_loss, temperature=2.0, reduction=reduction, backend=served[0])
        leaf = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: call(x, t, y, label_smoothing=0.1), leaf)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: call(x, t, y, label_smoothing=0.1), leaf)  # noqa: B023


def test_a_graph_may_be_kept(served: Place) -> None:
    x, t, y = (v.to(served[1]) for v in draw())
    leaf = x.requires_grad_()
    loss = distillation_loss(leaf, t, y, temperature=2.0, backend=served[0])
    (first,) = torch.autograd.grad(3 * loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, leaf)
    assert torch.equal(first, second)
    if served[0] == "reference":
        return  # autograd watches what it needs, and that is not the teacher
    leaf = x.detach().requires_grad_()
    rows = distillation_loss(leaf, t, y, reduction="none", backend=served[0])
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


@pytest.mark.slow
def test_compiled() -> None:
    x, t, y = draw(n=5, k=300)

    def step(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return distillation_loss(x, t, y, temperature=2.0, label_smoothing=0.1)

    leaf, same = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss, want = (
        torch.compile(step, fullgraph=True, backend="inductor" if Mode.whole else "aot_eager")(leaf, t, y),
        step(same, t, y),
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf), torch.autograd.grad(want, same))


def test_parity_with_pytorchs_own_functions() -> None:
    x, t, y = draw(ignored=0)
    a, b, T = x.clone().requires_grad_(), x.clone().requires_grad_(), 3.0
    loss = distillation_loss(a, t, y, temperature=T, alpha=0.7, label_smoothing=0.1)
    soft = F.kl_div(F.log_softmax(b / T, -1), F.softmax(t / T, -1), reduction="batchmean")
    want = 0.7 * T * T * soft + 0.3 * F.cross_entropy(b, y, label_smoothing=0.1)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, a), torch.autograd.grad(want, b))


X, T_, Y = draw()
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "temperature": ((X, T_, Y), {"temperature": 0.0}, "temperature must be a finite number > 0, got 0.0"),
    "alpha": ((X, T_, Y), {"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
    "no target": ((X, T_), {"alpha": 0.5}, "alpha must be 1 without a target, got 0.5"),
    "shape": ((X, T_[:2], Y), {}, r"teacher must be of the shape \(6, 37\) of input"),
    "integers": ((X, T_.long(), Y), {}, "teacher must be floating point"),
    "probabilities": ((X, Probabilities(-T_.abs()), Y), {}, "teacher must be >= 0 everywhere, got -"),
    "soft target": ((X, T_, X.softmax(-1)), {}, "target must hold class indices"),
    "head": ((X, lsk.Teacher(T_[:, :4], T_[:, :4]), Y), {}, r"teacher.linear_weight must be of shape \(37, 4\)"),
    "hidden": ((X, lsk.Teacher(T_[:2, :4], torch.ones(37, 4)), Y), {}, r"teacher.hidden must be of shape \(6, 'D'\)"),
    "backend": ((X, T_, Y), {"backend": "fpga"}, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    arguments, options, match = BAD[name]
    with pytest.raises(lsk.ArgumentError, match=match):
        distillation_loss(*arguments, **options)


def test_other_errors() -> None:
    with pytest.raises(TypeError, match="teacher must be a Tensor of logits"):
        distillation_loss(X, "a good one", Y)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="37"):
        distillation_loss(X, T_, torch.full((N,), K))
    with pytest.raises(TypeError, match="weight"):
        distillation_loss(X, T_, Y, weight=torch.ones(K))  # type: ignore[call-arg]


def test_sharpen() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2], [0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    for temperature in (0.5, 1.0, 3.0):
        want = p ** (1 / temperature) / (p ** (1 / temperature)).sum(-1, keepdim=True)
        torch.testing.assert_close(sharpen(p, temperature), want)
    assert sharpen(p, 1e-4)[0].tolist() == [1.0, 0.0, 0.0]
    torch.testing.assert_close(sharpen(p[0] * 7, 2.0), sharpen(p[0], 2.0))
    torch.testing.assert_close(sharpen(p.T, 0.5, dim=0), sharpen(p, 0.5).T)
    assert torch.autograd.gradcheck(lambda v: sharpen(v, 0.5), p[0].detach().clone().requires_grad_())
    edge = torch.tensor([0.0, 0.6, 0.4], dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(sharpen(edge, 0.5).square().sum(), edge)
    assert grad.isfinite().all()
    assert sharpen(torch.tensor([0.3, 0.7]), 1e-300).tolist() == [0.0, 1.0]
    tiny = torch.tensor([3e-45, 1e-45, 0.0])
    assert sharpen(tiny, 0.1).isfinite().all(), "p^10 would have been 0/0"
    assert sharpen(p.detach().half(), 2.0).dtype == torch.float16
    for bad, match in ((-1.0, "temperature must be"), (float("inf"), "temperature must be")):
        with pytest.raises(lsk.ArgumentError, match=match):
            sharpen(p, bad)
    with pytest.raises(lsk.ArgumentError, match=r"probabilities must be >= 0 everywhere, got -0\.5"):
        sharpen(torch.tensor([-0.5, 1.5]), 1.0)
