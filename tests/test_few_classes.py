"""Rows of few classes, which the CPU's kernels take a lane each: against float64, around their blocks and vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import guarded, loss_and_grad, upstream_for
from conftest import skip_unless_available
from rule import HALF, Problem, expect, judge_grad, judge_loss, judge_stats
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

Place = tuple[str, str]
CLASSES = (1, 2, 3, 7, 10, 19, 64, 128, 129, 255, 256, 257)
DTYPES = (*HALF, torch.float32, torch.float64)
ROWS = 299  # a block of the fewest classes and more, and no multiple of a vector
EPS = 0.1


@pytest.fixture(params=[("cpu", "cpu")], ids="-".join)
def compiled(request: pytest.FixtureRequest) -> Place:
    skip_unless_available("cpu")
    return request.param


def drawn(n: int, k: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits, and targets of which every fifth is ignored."""
    rng = torch.Generator().manual_seed(1000 * n + k)
    x = (torch.randn(n, k, generator=rng, dtype=torch.float64) * spread).to(dtype)
    y = torch.randint(k, (n,), generator=rng)
    y[::5] = -100
    return x, y


def judged(place: Place, x: Tensor, rows: Tensor, y: Tensor, **options: Any) -> None:
    """Losses and gradients of logits x in any layout, whose rows are ``rows``, under a random upstream and as a sum."""
    problem = Problem(rows.detach(), y, options)
    shape = (*x.shape[:1], *x.shape[2:])
    for reduction in ("none", "sum"):
        upstream = upstream_for(len(y), x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        upstream = upstream if reduction == "none" else torch.ones_like(upstream)
        sent = upstream.view(shape) if reduction == "none" else 1.0
        given = {name: v.view(shape) if name == "label_smoothing" and isinstance(v, Tensor) else v
                 for name, v in options.items()}  # fmt: skip
        loss, grad = loss_and_grad(place, x, y.view(shape), sent, reduction=reduction, **given)
        want = expect(problem, upstream.double())
        if reduction == "none":
            judge_loss(want, loss.reshape(-1))
        judge_grad(problem, want, grad.movedim(1, -1).reshape(rows.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_rows(compiled: Place, eps: float, k: int, dtype: torch.dtype) -> None:
    x, y = drawn(ROWS, k, dtype)
    judged(compiled, x, x, y, label_smoothing=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", CLASSES)
@pytest.mark.parametrize("spatial", [(), (1, 1), (13, 23), (3,)], ids=str)
def test_classes_in_front(compiled: Place, spatial: tuple[int, ...], k: int, dtype: torch.dtype) -> None:
    """(N, K, d1, ...): rows side by side, of which some blocks hold several runs, and all of them the shortest."""
    rows, y = drawn(3 * 13 * 23, k, dtype)
    n = len(y) // torch.Size(spatial).numel()
    x = rows.view(n, *spatial, k).movedim(-1, 1).contiguous()
    judged(compiled, x, rows, y, label_smoothing=EPS)


@pytest.mark.parametrize("k", [2, 10, 100, 256])
@pytest.mark.parametrize(
    "view",
    {
        "transposed": lambda x: x.t().contiguous().t(),
        "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
        "one row expanded": lambda x: x[:1].expand(len(x), -1),
        "one class expanded": lambda x: x[:, :1].expand(-1, x.shape[1]),
        "rows that overlap": lambda x: x.flatten().as_strided(x.shape, (1, 1)),
    }.items(),
    ids=lambda item: item[0],
)
def test_views(compiled: Place, view: tuple[str, Any], k: int) -> None:
    x, y = drawn(ROWS, k)
    x = view[1](x)
    judged(compiled, x, x.contiguous(), y, label_smoothing=EPS)


def options_of(k: int, n: int) -> dict[str, dict[str, Any]]:
    rng = torch.Generator().manual_seed(k)
    weight, prior = torch.rand(k, generator=rng), torch.rand(k, generator=rng) + 0.1
    weight[0] = 0
    rows = torch.rand(n, generator=rng)
    return {
        "weight": {"weight": weight, "label_smoothing": EPS},
        "prior": {"smoothing": prior / prior.sum(), "label_smoothing": EPS},
        "weight and prior": {"smoothing": prior / prior.sum(), "label_smoothing": EPS, "weight": weight},
        "others": {"smoothing": "others", "label_smoothing": EPS},
        "others, sharpened": {"smoothing": "others", "label_smoothing": -0.3},
        "smoothing by row": {"label_smoothing": rows},
        "all of it": {"label_smoothing": 1.0},
        "z-loss": {"z_loss": 0.01, "label_smoothing": EPS},
        "scale": {"logit_scale": 1.7, "label_smoothing": EPS},
        "negative scale": {"logit_scale": -0.4, "label_smoothing": EPS},
        "another ignore_index": {"ignore_index": 1},
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 19, 100])
@pytest.mark.parametrize("name", options_of(2, 1))
@pytest.mark.parametrize("adjacent", [True, False], ids=["classes adjacent", "rows adjacent"])
def test_options(compiled: Place, adjacent: bool, name: str, k: int, dtype: torch.dtype) -> None:
    rows, y = drawn(ROWS, k, dtype)
    if name == "another ignore_index":
        y[y == -100] = 1
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    options = {o: v.to(acc) if isinstance(v, Tensor) else v for o, v in options_of(k, ROWS)[name].items()}
    judged(compiled, rows if adjacent else rows.t().contiguous().t(), rows, y, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 10, 128, 256])
def test_statistics(compiled: Place, k: int, dtype: torch.dtype) -> None:
    """The lowest index among equal maxima, in all rows, ignored ones too."""
    rows, y = drawn(ROWS, k, dtype)
    rows = rows.round()
    for x in (rows, rows.t().contiguous().t()):
        _, stats = lsk.cross_entropy(x, y, label_smoothing=EPS, return_stats=True, backend="cpu")
        judge_stats(Problem(rows, y, {"label_smoothing": EPS}), stats)
        assert torch.equal(stats.prediction, rows.argmax(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 3, 10, 200])
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_odd_rows(compiled: Place, eps: float, k: int, dtype: torch.dtype) -> None:
    """Infinities and NaNs give what the formula gives, stay in their row, and do nothing where it is ignored."""
    rows, y = drawn(64, k, dtype)
    inf = torch.inf
    for row, values in enumerate((torch.nan, inf, -inf)):
        rows[row], y[row] = values, 0
        rows[row + 10, 0], y[row + 10] = values, 1
        rows[row + 20, 0], y[row + 20] = values, 0
        rows[row + 30], y[row + 30] = values, -100
    x = rows.t().contiguous().t()
    upstream = torch.ones(64, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    want = F.cross_entropy(rows.double().requires_grad_(), y, label_smoothing=eps, reduction="none")
    for given in (rows, x):
        loss, grad = loss_and_grad(compiled, given, y, upstream, reduction="none", label_smoothing=eps)
        torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert (loss[y == -100] == 0).all()
        assert (grad[y == -100] == 0).all()
        odd = torch.tensor([0, 1, 2, 10, 11, 20, 21])
        assert grad[odd].isnan().all()
        assert grad[torch.tensor([12])].isfinite().all()
    if not eps:
        assert want[12].isfinite(), "a class that is ruled out, and is not the target"
        assert want[22].isinf()


@pytest.mark.parametrize("k", [2, 10, 19, 256])
def test_a_weight_of_zero_switches_its_term_off(compiled: Place, k: int) -> None:
    rows, y = drawn(40, k)
    weight = torch.ones(k)
    weight[1] = 0
    y[y == 1] = 0
    rows[:, 1] = -torch.inf
    for x in (rows, rows.t().contiguous().t()):
        loss, grad = loss_and_grad(compiled, x, y, weight=weight, label_smoothing=EPS, reduction="sum")
        assert loss.isfinite()
        assert (grad[:, 1] == 0).all()
    y[3] = 1
    loss, _ = loss_and_grad(compiled, rows, y, weight=weight, reduction="none")
    assert loss[3] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 10, 100])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("n", [1, 7, 16, 33, 257])
def test_memory_around_the_rows(compiled: Place, n: int, inplace: bool, k: int, dtype: torch.dtype) -> None:
    """Neither read nor written, whichever of the two dimensions is the inner one; and the results in place are those
    of another place."""
    rows, y = drawn(n, k, dtype)
    upstream = upstream_for(n, "cpu", torch.float64 if dtype == torch.float64 else torch.float32)
    want = loss_and_grad(compiled, rows, y, upstream, reduction="none", label_smoothing=EPS)
    for turned in (False, True):
        source, unharmed = guarded(rows.t().contiguous() if turned else rows)
        x = source.t() if turned else source
        loss, grad = loss_and_grad(compiled, x, y, upstream, reduction="none", label_smoothing=EPS, inplace=inplace)
        unharmed()
        assert torch.equal(loss, want[0])
        assert torch.equal(grad, want[1])


@pytest.mark.parametrize("k", [2, 19, 128])
@pytest.mark.parametrize("shape", [(20_000,), (4, 50, 100)], ids=str)
def test_the_number_of_threads_changes_no_bit(compiled: Place, shape: tuple[int, ...], k: int) -> None:
    rows, y = drawn(20_000, k)
    x = rows.view(*shape, k).movedim(-1, 1)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(loss_and_grad(compiled, x, y.view(shape), 1.0, label_smoothing=EPS, reduction="none"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [2, 10, 256])
def test_the_loss_of_a_confident_row_keeps_its_digits(compiled: Place, k: int, dtype: torch.dtype) -> None:
    """log(1 + t) for every size of t, although 1 + t keeps none of the digits of the smallest."""
    gaps = torch.linspace(0, 80, ROWS, dtype=torch.float64).to(dtype)
    x = -gaps.expand(k, -1).clone().t()
    x[:, 0] = 0
    loss = lsk.cross_entropy(x, torch.zeros(ROWS, dtype=torch.int64), reduction="none", backend="cpu")
    want = torch.log1p((k - 1) * torch.exp(-gaps.double()))
    torch.testing.assert_close(loss.double(), want, rtol=16 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [2, -1, 2**32])
def test_bad_targets_raise_before_anything_is_written(compiled: Place, bad: int) -> None:
    x, y = drawn(ROWS, 2)
    y[7] = bad
    before = x.clone()
    with pytest.raises(IndexError, match=rf"target\[7\] = {bad} is outside"):
        lsk.cross_entropy(x.requires_grad_(), y, inplace=True, backend="cpu")
    assert torch.equal(x, before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("k", [2, 10])
def test_means_of_many_rows(compiled: Place, k: int, reduction: str) -> None:
    """The sum and the number of valid rows, each of which a long float32 sum could lose."""
    x, y = drawn(200_000, k)
    loss, grad = loss_and_grad(compiled, x, y, label_smoothing=EPS, reduction=reduction)
    wide = x.double().requires_grad_()
    want = F.cross_entropy(wide, y, label_smoothing=EPS, reduction=reduction)
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=0, check_dtype=False)
    (expected,) = torch.autograd.grad(want, wide)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=2e-7 * expected.abs().max().item())


def test_the_kernels_know_every_row_operator(compiled: Place) -> None:
    """The gradient of saved rows is the one that comes with the loss, but for the roundings of lse."""
    kernels = backends.BACKENDS[compiled[0]].kernels
    assert kernels is not None
    x, y = drawn(ROWS, 10)
    row = (y, None, None, EPS, None, None, -100, False, False, 0.0, 0.0, 1.0, None)
    loss, saved, _, _, grad = kernels.forward(x, *row, True, 0)
    torch.testing.assert_close(kernels.backward(x, *row, saved), grad, rtol=2e-6, atol=2e-7)
    other = x.clone()
    assert torch.equal(kernels.forward_(other, *row, 0)[0], loss)
    assert torch.equal(other, grad)


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("k", [2, 10, 100])
def test_a_backward_spreads_over_as_many_classes_as_were_saved(compiled: Place, k: int, others: bool) -> None:
    """A rank's rows count the classes of all ranks, and one of them may have its own number."""
    n = 37
    x, y = drawn(n, k, torch.float64)
    classes = torch.linspace(1, 3 * k, n, dtype=torch.float64)
    eps = torch.linspace(0, 1, n, dtype=torch.float64)
    zmax = x.amax(1)
    logsum, mass = (x - zmax[:, None]).exp().sum(1).log(), torch.linspace(0.5, 2, n, dtype=torch.float64)
    e = torch.where(classes > 1, eps * classes / (classes - 1), 0.0) if others else eps
    q = torch.where(torch.arange(k) == y[:, None], (1 - e)[:, None], 0.0) + (e / classes)[:, None]
    want = torch.where((y == -100)[:, None], 0.0, mass[:, None] * x.softmax(1) - q)
    for dtype in (torch.float64, torch.float32):
        saved = torch.stack((zmax, logsum, mass, classes)).to(dtype)
        row = (y, None, None, 0.0, eps.to(dtype), None, -100, others, False, 0.0, 0.0, 1.0, None)
        grad = torch.ops.labelsmooth_kernels.cpu_backward(x.to(dtype), *row, saved)
        torch.testing.assert_close(grad.double(), want, rtol=0, atol=1e-14 if dtype == torch.float64 else 2e-6)
