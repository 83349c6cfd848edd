"""What the maths promises beside the values that the table judges: optimum, merging, closed form, symmetries."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES, Case, Place, draw, loss_and_grad, placed
from failures import check_r33, merged
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import dense_q, transformed
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import reference

INF = math.inf


def is_finite(case: Case) -> bool:
    x, target, options = case.problem()
    return bool(lsk.cross_entropy(x, target, reduction="none", backend="reference", **options).isfinite().all())


FINITE = [case for case in CASES if not case.large and is_finite(case)]


@pytest.mark.parametrize("smoothing", ["uniform", "others"])
def test_descent_ends_at_the_closed_form_optimum(smoothing: str) -> None:
    """Plain gradient steps from zero end at the gap, where the loss is the entropy of q; a row for each ε."""
    k, every = 10, [0.05, 0.3]
    x, y = torch.zeros(2, k, dtype=torch.float64, requires_grad=True), torch.tensor([3, 3])
    call = {"label_smoothing": torch.tensor(every, dtype=torch.float64), "smoothing": smoothing, "reduction": "none"}
    for _ in range(2000):
        loss = lsk.cross_entropy(x, y, backend="reference", **call)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        x = (x - 4.0 * grad).detach().requires_grad_()
    gaps = x[:, 3:4] - torch.cat([x[:, :3], x[:, 4:]], 1)
    for eps, gap, value in zip(every, gaps, loss.tolist(), strict=True):
        on, off = (1 - eps + eps / k, eps / k) if smoothing == "uniform" else (1 - eps, eps / (k - 1))
        assert (gap - math.log(on / off)).abs().max() < 1e-9
        assert abs(reference.optimal_gap(eps, k, smoothing) - math.log(on / off)) < 1e-12
        assert abs(value + on * math.log(on) + (k - 1) * off * math.log(off)) < 1e-12
    assert reference.optimal_gap(0.0, k, smoothing) == INF


logits = st.one_of(st.just(-INF), st.floats(-300, 300), st.floats(-5, 5))


@settings(max_examples=150, deadline=None)
@given(st.lists(logits, min_size=1, max_size=24), st.data())
def test_merging_any_cut_is_the_whole_row(values: list[float], data: st.DataObject) -> None:
    """In any cut and any order; a piece that is all -inf contributes exactly nothing."""
    z = torch.tensor(values, dtype=torch.float64)
    q = torch.tensor(data.draw(st.lists(st.floats(0, 1), min_size=len(z), max_size=len(z))), dtype=torch.float64)
    q = torch.where(z == -INF, 0.0, q)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(z) - 1)), max_size=6)) - {len(z)})
    m, s, d, mass = merged(z, q, cuts, data.draw(st.permutations(range(len(cuts) + 1))))
    assert m == z.max()
    if m == -INF:
        assert (s.item(), d.item()) == (0.0, 0.0)
        return
    want = q.sum() * torch.logsumexp(z, 0) - torch.where(q == 0, 0.0, q * z).sum()
    torch.testing.assert_close(mass * s.log() - d, want, rtol=1e-11, atol=1e-10)


def test_r33_merging_unequal_shards() -> None:
    check_r33()


@pytest.mark.parametrize("case", FINITE, ids=lambda c: c.name)
def test_dz_is_the_derivative_of_row_loss(case: Case) -> None:
    problem = case.problem()
    z = transformed(torch.where(problem.keep[:, None], problem.logits, 0.0), **problem.options).requires_grad_()
    q, zeta = dense_q(problem, z), problem.options.get("z_loss", 0.0)
    beta = problem.options.get("confidence_penalty", 0.0)
    loss, zmax, logsum = reference.row_loss(z, q, zeta, beta)
    (want,) = torch.autograd.grad(loss.sum(), z)
    got = reference.dz(z, q, zmax, logsum, zeta, beta)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("case", FINITE, ids=lambda c: c.name)
def test_symmetries(case: Case) -> None:
    """Σ_k dz_k = 2ζ·lse in every valid row; other names for the classes change nothing but names."""
    problem = case.problem()
    x, target, options = problem
    loss, grad = loss_and_grad(("reference", "cpu"), x, target, reduction="none", **options)
    if not options.keys() & {"softcap", "logit_scale"}:
        total = 2 * options.get("z_loss", 0.0) * torch.where(problem.keep, torch.logsumexp(x, 1), 0.0)
        assert (grad.sum(1) - total).abs().max() < 1e-11
    if options.get("ignore_index", -100) >= 0:
        return  # the class that is ignored must keep its name
    names = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
    if target.is_floating_point():
        target = target[:, names]
    else:
        target = torch.where(problem.keep, names.argsort()[torch.where(problem.keep, target, 0)], target)
    vectors = {o: v[names] for o, v in options.items() if o in ("weight", "smoothing") and isinstance(v, Tensor)}
    renamed = loss_and_grad(("reference", "cpu"), x[:, names], target, reduction="none", **options | vectors)
    torch.testing.assert_close(renamed[0], loss, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(renamed[1], grad[:, names], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("over_rows", [False, True], ids=["over the weights", "over the rows"])
def test_what_divides_the_z_loss_beside_class_weights(place: Place, over_rows: bool) -> None:
    """All terms are divided by Σ w_y; the README's recipe divides that of the z-loss by the rows and the others not."""
    x, y = draw(place)
    k = x.shape[1]
    weight = torch.rand(k, generator=torch.Generator().manual_seed(1)) + 0.1
    eps, zeta, valid = 0.1, 0.2, (y != -100).cpu()
    z = x.detach().cpu().double().requires_grad_()
    lse = z.logsumexp(1)
    surprise = (lse[:, None] - z)[valid] * weight.double()
    at_target = y.cpu()[valid]
    rows = (1 - eps) * surprise[range(len(surprise)), at_target] + eps * surprise.mean(1)
    mass = weight.double()[at_target].sum()
    want = rows.sum() / mass + zeta * lse[valid].square().sum() / (len(rows) if over_rows else mass)
    want.backward()

    options: dict[str, object] = {"weight": weight}
    if over_rows:
        options = {"weight": weight / weight[at_target].mean(), "normalizer": "rows"}
    options = placed(options | {"label_smoothing": eps, "z_loss": zeta}, place[1])
    loss, grad = loss_and_grad(place, x, y, **options)
    torch.testing.assert_close(loss.double().cpu(), want.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad.double().cpu(), z.grad, rtol=2e-5, atol=2e-6)
    eye = torch.eye(k, device=x.device)
    of_head = lsk.linear_cross_entropy(x, eye, y, backend=place[0], **options)
    torch.testing.assert_close(of_head.double().cpu(), want.detach(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_smoothing_over_finite_classes_wants_a_mask_of_minus_infinity(place: Place, dtype: torch.dtype) -> None:
    """The least finite number is no mask: its class keeps its share of ε, and the loss is huge or infinite."""
    x, y = draw(place, 6, 11)
    x, y = x.detach().to(dtype), y.clamp(0, 3)
    call = {"label_smoothing": 0.1, "backend": place[0]}
    rest = lsk.cross_entropy(x[:, :4], y, **call)
    least = torch.finfo(dtype).min
    masked = [torch.cat((x[:, :4], torch.full_like(x[:, 4:], value)), 1) for value in (-INF, least)]
    found, wrong = (lsk.cross_entropy(m, y, smooth_over="finite", **call) for m in masked)
    torch.testing.assert_close(found, rest, rtol=1e-5, atol=0)
    assert wrong.item() > 0.1 * 7 / 11 * -least * 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [0.001, 1 / 3, 0.7])
def test_a_scale_of_huge_logits(fast_place: Place, scale: float, dtype: torch.dtype) -> None:
    """Products are rounded before the maximum is taken from them: beside it, what rounding leaves is not small. Masked
    classes, alone in what a thread sees and together, and rows of one huge number."""
    x, y = draw(fast_place, 6, 96, dtype=dtype)
    least = torch.finfo(dtype).min
    x[0, 5], x[1, 16:], x[2], x[3], x[4] = least, least, least, 1e10, -1e12
    y[:6] = torch.tensor([7, 3, 40, 95, 0, 50], device=y.device)
    for inside in (x, x.t().contiguous().t()):
        # Without smoothing: masked classes, of which the loss then takes nothing.
        got = loss_and_grad(fast_place, inside.clone(), y, reduction="sum", logit_scale=scale)
        want = loss_and_grad(("reference", x.device.type), x.double(), y, reduction="sum", logit_scale=scale)
        assert got[0].isfinite()
        torch.testing.assert_close(got[0].double(), want[0], rtol=2**-20, atol=0)
        torch.testing.assert_close(got[1].double(), want[1], rtol=2**-7, atol=2**-12)
