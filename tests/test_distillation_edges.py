"""Distillation where something is masked, infinite, NaN, absent or changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from conftest import skip_unless_available
from distilled import K, draw, oracle
from tracing import allocated

import labelsmooth_kernels as lsk
from labelsmooth_kernels import spec
from labelsmooth_kernels.distillation import Probabilities, distillation_loss

if TYPE_CHECKING:
    from cases import Place


def test_masked_classes_and_sure_teachers(served: Place) -> None:
    """A class that neither side has adds nothing; one that only the teacher has makes the loss infinite, as it is."""
    x, t, y = (v.to(served[1]) for v in draw(ignored=0))
    y[:] = 5
    x[:3, 7], t[:, 7] = -torch.inf, -torch.inf
    t[1], t[2] = -torch.inf, 0.0
    t[1, 4], t[2, 9], t[2, 7] = 2.0, 300.0, -torch.inf
    leaf = x.requires_grad_()
    loss = distillation_loss(leaf, t, y, temperature=2.0, reduction="none", backend=served[0])
    torch.testing.assert_close(loss.double(), oracle(x, t, y, temperature=2.0), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert not grad[:3, 7].any()
    assert grad.isfinite().all()
    hidden = x.detach().clone()
    hidden[1, 4] = -torch.inf
    assert distillation_loss(hidden, t, y, reduction="none", backend=served[0])[1] == torch.inf


def test_a_nan_stays_in_its_row(served: Place) -> None:
    x, t, y = (v.to(served[1]) for v in draw(ignored=0))
    x[1, 3], t[2, 4], x[4, 1], t[4, 1] = torch.nan, torch.nan, torch.nan, torch.nan
    y[4] = -100
    leaf = x.requires_grad_()
    loss = distillation_loss(leaf, t, y, temperature=2.0, reduction="none", backend=served[0])
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    assert loss.isnan().tolist() == [False, True, True, False, False, False]
    assert grad.isnan().all(-1).tolist() == [False, True, True, False, False, False]
    assert not grad[4].any()


@pytest.mark.parametrize("hidden", [slice(0, 4100), slice(900, None)], ids=["first", "last"])
def test_whole_blocks_of_masked_classes(served: Place, hidden: slice) -> None:
    """A block of which nothing is left adds nothing to any sum, of either side or of both."""
    x, t, y = (v.to(served[1]) for v in draw(torch.float32, 3, 5003, ignored=0))
    y[:] = 4500 if hidden.start == 0 else 7
    x[0, hidden], t[:2, hidden], t[2, hidden] = -torch.inf, -torch.inf, -200.0
    leaf = x.requires_grad_()
    loss = distillation_loss(leaf, t, y, temperature=2.0, reduction="none", backend=served[0])
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want_at = x.detach().double().requires_grad_()
    want = oracle(want_at, t, y, temperature=2.0)
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-6, atol=1e-6)
    kept = want_at.detach() > -torch.inf
    (want_grad,) = torch.autograd.grad(want[1:].sum(), want_at)  # -inf - -inf is NaN in log_softmax's own gradient
    torch.testing.assert_close(grad[1:].double(), want_grad[1:], rtol=1e-5, atol=1e-7)
    assert not grad[~kept].any()


def test_a_class_masked_in_the_student_alone_where_the_teacher_vanishes(served: Place) -> None:
    """0·log(0/0) is 0 also where its block was seen first, and its e^-900 only later found to be nothing."""
    x, t, y = (v.to(served[1]) for v in draw(torch.float32, 2, 5003, ignored=0))
    x[:, 3], y[:] = -torch.inf, 4500
    t[0, :3000] = t[0, :3000] - 900.0
    loss = distillation_loss(x, t, y, alpha=1.0, reduction="none", backend=served[0])
    want = oracle(x.double(), t.double().where(t > -500, -torch.inf), y, alpha=1.0)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=1e-6)
    assert want[0].isfinite()
    assert want[1] == torch.inf


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_teacher_without_a_share_may_be_anything(served: Place, wrong: float) -> None:
    x, t, y = (v.to(served[1]) for v in draw())
    want_at, got_at = x.clone().requires_grad_(), x.clone().requires_grad_()
    lsk.cross_entropy(want_at, y, label_smoothing=0.1).backward()
    distillation_loss(got_at, t.fill_(wrong), y, alpha=0.0, label_smoothing=0.1, backend=served[0]).backward()
    torch.testing.assert_close(got_at.grad, want_at.grad)


@pytest.mark.parametrize("name", ["label_smoothing", "smoothing", "teacher", "linear_weight"])
def test_what_changes_before_the_backward_is_noticed(served: Place, name: str) -> None:
    if served[0] == "reference":
        pytest.skip("autograd of PyTorch's own functions keeps what it needs")
    x, t, y = (v.to(served[1]) for v in draw())
    eps, prior, weight = t.new_tensor(0.3), t.new_full((K,), 1 / K), t[:, :4].new_ones(K, 4)
    head = name == "linear_weight"
    changed = {"label_smoothing": eps, "smoothing": prior, "teacher": t, "linear_weight": weight}[name]
    options = {"label_smoothing": eps, "smoothing": prior, "reduction": "none", "backend": served[0]}
    loss = distillation_loss(x.requires_grad_(), lsk.Teacher(t[:, :4], weight) if head else t, y, **options)
    changed.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_without_a_target_no_class_is_ignored(served: Place) -> None:
    x, t, _ = (v.to(served[1]) for v in draw())
    want = distillation_loss(x, t, backend=served[0])
    torch.testing.assert_close(distillation_loss(x, t, ignore_index=0, backend=served[0]), want)
    with pytest.raises(lsk.ArgumentError, match="class_dim must be given without a target"):
        distillation_loss(x[None], t[None], backend=served[0])
    torch.testing.assert_close(distillation_loss(x[None], t[None], class_dim=-1, backend=served[0]), want)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "head"])
def test_a_teacher_of_inference_mode(served: Place, kind: str) -> None:
    """Its tensors cannot be saved for a backward as they are."""
    x, teacher, y = (v.to(served[1]) for v in draw(ignored=0))
    head = torch.randn(K, 3, generator=torch.Generator().manual_seed(0)).to(served[1])

    def gradient() -> tuple[torch.Tensor, ...]:
        leaf = x.clone().requires_grad_()
        with torch.inference_mode(inference):
            hidden, bias = teacher[:, :3] + 1, head[:, 0] + 1
            given = {
                "logits": teacher + 1,
                "probabilities": Probabilities((teacher + 1).softmax(-1)),
                "head": lsk.Teacher(hidden, head + 1, bias),
            }[kind]
        loss = distillation_loss(leaf, given, y, alpha=0.4, temperature=2.0, backend=served[0])
        return loss.detach(), *torch.autograd.grad(loss, leaf)

    inference = False
    want = gradient()
    inference = True
    torch.testing.assert_close(gradient(), want)


def test_no_divergence_is_below_zero(served: Place) -> None:
    """Of a student who is nearly the teacher it is less than its roundings, which may have either sign; the gradient
    is what it is."""
    teacher = torch.randn(64, 50, generator=torch.Generator().manual_seed(0)).to(served[1])
    student = (teacher + 1e-6 * teacher.flip(0)).requires_grad_()
    loss, terms = distillation_loss(
        student, teacher, alpha=1.0, temperature=1.5, reduction="sum", return_terms=True, backend=served[0]
    )
    assert (terms.divergence >= 0).all()
    (grad,) = torch.autograd.grad(loss, student)
    assert grad[terms.divergence == 0].any(), "there are such rows"


def test_a_teacher_for_a_head_of_inference_mode() -> None:
    """As a target; and its memory stays where it is."""
    rng = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*shape, generator=rng).requires_grad_() for shape in ((5, 4), (K, 4)))
    results = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            teacher = lsk.Teacher(torch.ones(5, 3) / 2, torch.arange(3.0 * K).view(K, 3) / K)
        loss = lsk.linear_cross_entropy(h, w, teacher, label_smoothing=0.1)
        results.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(results[1], results[0])
    assert spec.constant("teacher", teacher.linear_weight).data_ptr() == teacher.linear_weight.data_ptr()


def test_one_pass_allocates_one_gradient() -> None:
    """The operator of the chunks makes no second one beside that of a kernel that took all rows at once."""
    skip_unless_available("cpu")
    x, teacher = torch.randn(64, 4096, requires_grad=True), torch.randn(64, 4096)
    bytes_of_logits = x.numel() * x.element_size()
    spent = allocated(lambda: distillation_loss(x, teacher, backend="cpu"), "cpu")
    assert bytes_of_logits <= spent < 1.5 * bytes_of_logits
