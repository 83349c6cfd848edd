"""The failures that other losses had, by their numbers in the project's list; numbers tagged in ``cases.CASES`` are run by the table.

``NOT_YET`` names what the delivered interface cannot meet; ``test_every_number_is_met_or_named`` keeps the account.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, truncates, upstream_for
from conftest import HAS_CUDA
from rule import Problem, expect, judge_grad, judge_loss
from torch import Tensor

import labelsmooth_kernels as lsk

NOT_YET = {
    "R11": "frozen linear weight and bias: there is no fused linear yet; no_grad and a frozen input are tested here",
    "R24": "a compiled fused linear: there is no fused linear yet",
    "R30": "accumulation of a chunked weight gradient: there is no fused linear yet",
    "R33": "ranks: there is no vocabulary-parallel loss yet; the merging of unequal shards is tested here",
    "R37": "options and bias through a fused linear: there is no fused linear yet",
}
Place = tuple[str, str]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def draw(
    place: Place, n: int = 6, k: int = 37, dtype: torch.dtype = torch.float32, ignored: int = 3
) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(n * k)
    y = torch.randint(k, (n,), generator=rng)
    if ignored:
        y[::ignored] = -100
    return (torch.randn(n, k, generator=rng) * 3).to(place[1], dtype), y.to(place[1])


def judge_rows(
    place: Place,
    x: Tensor,
    y: Tensor,
    loss: Tensor,
    grad: Tensor,
    factors: Tensor,
    roundings: int = 1,
    **options: object,
) -> None:
    """Judge losses (N,) and the gradient (N, K) of Σ factor·loss for logits x (N, K)."""
    problem = Problem(x.detach(), y, options)
    want = expect(problem, factors.double())
    judge_loss(want, loss.detach())
    judge_grad(problem, want, grad, roundings, truncates(place[0], x))


def test_every_number_is_met_or_named() -> None:
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = "".join(re.findall(r"def test((?:_r\d\d)+)", here))
    met = {f"R{int(n)}" for n in re.findall(r"\d\d", named)} | {r for case in CASES for r in case.regressions.split()}
    assert met | NOT_YET.keys() == {f"R{n}" for n in range(1, 41)}
    assert NOT_YET.keys() & met == {"R11", "R33"}, "what is met in part is named with the part that is not"


def test_r03_linear_gradients_with_a_nonuniform_upstream(place: Place) -> None:
    (x, y), layer = draw(place, k=8), torch.nn.Linear(8, 37, device=place[1])
    upstream = upstream_for(len(y), place[1])
    grads = []
    for dtype in (torch.float32, torch.float64):
        own = torch.nn.Linear(8, 37).to(place[1], dtype)
        own.load_state_dict(layer.state_dict())
        logits = own(x.to(dtype))
        if dtype == torch.float64:
            loss = F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
        else:
            loss = lsk.cross_entropy(logits, y, reduction="none", label_smoothing=0.1, backend=place[0])
        loss.backward(upstream.to(loss.dtype))
        grads.append((own.weight.grad.double(), own.bias.grad.double()))
    for ours, oracle in zip(*grads, strict=True):  # two float32 GEMMs over 6 and 8 terms of size 1: some tens of ulps
        assert (ours - oracle).abs().max() < 50 * 2**-23 * oracle.abs().max()


def test_r04_expanded_upstream(place: Place) -> None:
    x, y = draw(place)
    x.requires_grad_()
    loss = lsk.cross_entropy(x, y, reduction="none", label_smoothing=0.1, backend=place[0])
    (grad,) = torch.autograd.grad(loss.sum(), x)
    judge_rows(place, x, y, loss, grad, torch.ones_like(loss), label_smoothing=0.1)


@pytest.mark.parametrize("class_dim", [1, -1])
def test_r05_transposed_upstream(place: Place, class_dim: int) -> None:
    flat, target = draw(place, 24, 11)
    x = flat.view(4, 6, 11).movedim(-1, class_dim).contiguous().requires_grad_()
    loss = lsk.cross_entropy(x, target.view(4, 6), reduction="none", class_dim=class_dim, backend=place[0])
    upstream = upstream_for(24, place[1]).view(6, 4).t()
    assert not upstream.is_contiguous()
    (grad,) = torch.autograd.grad(loss, x, upstream)
    judge_rows(place, flat, target, loss.reshape(-1), grad.movedim(class_dim, -1).reshape(24, 11), upstream.reshape(-1))


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "column slice": lambda x: F.pad(x, (3, 5), value=9.0)[:, 3 : 3 + x.shape[1]],
    "every second class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
    "rows backwards in memory by a flip": lambda x: x.flip(0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_r06_views_of_logits(place: Place, view: str, dtype: torch.dtype) -> None:
    x, y = draw(place, dtype=dtype)
    x = VIEWS[view](x).detach().requires_grad_()
    before = x.detach().clone()
    loss = lsk.cross_entropy(x, y, reduction="none", label_smoothing=0.1, backend=place[0])
    upstream = upstream_for(len(y), place[1])
    (grad,) = torch.autograd.grad(loss, x, upstream)
    judge_rows(place, before, y, loss, grad, upstream, label_smoothing=0.1)
    assert torch.equal(x, before)


TARGETS = {
    "labels[:, 1:]": lambda y: F.pad(y.view(2, -1), (1, 0), value=7)[:, 1:],
    "every second": lambda y: y.repeat_interleave(2).view(2, -1)[:, ::2],
    "int32": lambda y: y.view(2, -1).int(),
    "int32 labels[:, 1:]": lambda y: F.pad(y.view(2, -1).int(), (1, 0), value=7)[:, 1:],
    "uint8": lambda y: y.view(2, -1).to(torch.uint8),
    "transposed": lambda y: y.view(2, -1).t().contiguous().t(),
}


@pytest.mark.parametrize("view", TARGETS)
def test_r07_views_of_targets(place: Place, view: str) -> None:
    x, y = draw(place, 10, 21, ignored=0)
    target = TARGETS[view](y)
    leaf = x.view(2, 5, 21).clone().requires_grad_()
    loss = lsk.cross_entropy(leaf, target, reduction="none", class_dim=-1, label_smoothing=0.1, backend=place[0])
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    judge_rows(
        place, x, y, loss.reshape(-1), grad.reshape(10, 21), torch.ones(10, device=place[1]), label_smoothing=0.1
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("upstream", [1.0, 0.37, 0.0, -1.0, 65536.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_r08_upstreams(place: Place, reduction: str, upstream: float, dtype: torch.dtype) -> None:
    x, y = draw(place, dtype=dtype)
    x.requires_grad_()
    loss = lsk.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1, backend=place[0])
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
    problem = Problem(x.detach(), y, {"label_smoothing": 0.1})
    factor = upstream / (int(problem.keep.sum()) if reduction == "mean" else 1)
    want = expect(problem, torch.full((len(y),), factor, dtype=torch.float64, device=place[1]))
    one_pass = reduction != "none" and dtype == torch.bfloat16 and upstream != 1
    judge_grad(problem, want, grad, 2 if one_pass else 1, truncates(place[0], x))


def test_r10_two_backwards_with_different_upstreams(place: Place) -> None:
    for reduction in ("mean", "none"):
        x, y = draw(place)
        x.requires_grad_()
        loss = lsk.cross_entropy(x, y, reduction=reduction, label_smoothing=0.1, backend=place[0])
        grads = [torch.autograd.grad(loss, x, torch.full_like(loss, u), retain_graph=True)[0] for u in (0.5, 4.0, 0.5)]
        assert torch.equal(grads[0] * 8, grads[1]), "powers of two scale exactly"
        assert torch.equal(grads[0], grads[2])
        assert grads[0].abs().sum() > 0


def test_r11_no_grad_and_frozen_input(place: Place) -> None:
    x, y = draw(place)
    kept = lsk.cross_entropy(x.clone().requires_grad_(), y, label_smoothing=0.1, backend=place[0])
    frozen = lsk.cross_entropy(x, y, label_smoothing=0.1, backend=place[0])
    with torch.no_grad():
        silent = lsk.cross_entropy(x.clone().requires_grad_(), y, label_smoothing=0.1, backend=place[0])
    assert kept.requires_grad and not frozen.requires_grad and not silent.requires_grad
    assert frozen > 0 and torch.equal(frozen, silent)
    assert (kept.detach() - frozen).abs() <= 2**-22 * frozen  # mean as Σ(scale·loss) or as Σloss·scale: an ulp or two


HUGE = {
    "R12 fp32": (65_536, 50_257, torch.float32),
    "R12 fp16": (65_537, 32_768, torch.float16),
    "R12 bf16": (18_423, 131_072, torch.bfloat16),
    "R13 bf16, past 2^32": (33_000, 131_072, torch.bfloat16),
    "R14 fp16, only the last row past 2^31": (2**31 // 50_257 + 1, 50_257, torch.float16),
}


@pytest.mark.skipif(not HAS_CUDA, reason="more than 2^31 logits want the memory and the speed of a GPU")
@pytest.mark.parametrize("name", HUGE)
def test_r12_r13_r14_more_than_2_31_elements(fast_place: Place, name: str) -> None:
    n, k, dtype = HUGE[name]
    if fast_place[1] != "cuda":
        pytest.skip("a GPU test")
    need = n * k * dtype.itemsize * 2.2
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free GPU memory")
    torch.utils.deterministic.fill_uninitialized_memory = False  # the poison would cost a pass over everything
    x = torch.empty(n, k, dtype=dtype, device="cuda").normal_().requires_grad_()
    y = torch.randint(k, (n,), device="cuda")
    loss = lsk.cross_entropy(x, y, reduction="none", label_smoothing=0.1, backend=fast_place[0])
    upstream = upstream_for(n, "cuda")
    (grad,) = torch.autograd.grad(loss, x, upstream)
    across = 2**31 // k
    for first in (0, across - 1, n - 2):
        part = slice(first, first + 2)
        judge_rows(fast_place, x[part], y[part], loss[part], grad[part], upstream[part], label_smoothing=0.1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_r17_a_spoilt_row_stays_alone(place: Place, value: float) -> None:
    """The other rows are bit for bit what they are without it."""
    x, y = draw(place, ignored=0)
    results = []
    for spoilt in (x, x.index_fill(0, torch.tensor([2], device=place[1]), value)):
        leaf = spoilt.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, reduction="none", label_smoothing=0.1, backend=place[0])
        (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
        results.append((loss.detach(), grad))
    others = torch.arange(6) != 2
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[others], dirty[others])
        assert dirty[2].isnan().all()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("eps", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_r19_everything_ignored(place: Place, reduction: str, eps: float, weighted: bool) -> None:
    if weighted and place[0] != "reference":
        pytest.skip("class weights are served by the reference only")
    x, y = draw(place, ignored=1)
    x[0, 0] = torch.nan
    x.requires_grad_()
    weight = torch.rand(37, device=place[1]) if weighted else None
    loss = lsk.cross_entropy(x, y, weight, reduction=reduction, label_smoothing=eps, backend=place[0])
    (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert (grad == 0).all()


def check_r20(place: Place) -> None:
    """A batch with ignored rows has the sum, the mean (R21) and the gradients of the batch without them."""
    x, y = draw(place, 8, 50, ignored=2)
    keep = y != -100
    for reduction in ("sum", "mean"):
        losses, grads = [], []
        for logits, target in ((x, y), (x[keep], y[keep])):
            leaf = logits.clone().requires_grad_()
            losses.append(lsk.cross_entropy(leaf, target, reduction=reduction, label_smoothing=0.2, backend=place[0]))
            losses[-1].backward()
            grads.append(leaf.grad)
        assert (losses[0] - losses[1]).abs() <= 2**-22 * losses[1].abs(), "the same numbers, summed in another order"
        assert torch.equal(grads[0][keep], grads[1])
        assert (grads[0][~keep] == 0).all()


def test_r20_r21_ignored_rows_count_for_nothing(place: Place) -> None:
    check_r20(place)


@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_r22_r23_weights_and_ignore_index(ignore_index: int) -> None:
    x, y = draw(("reference", "cpu"), 9, 5, ignored=0)
    y[::3] = ignore_index
    weight = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0])
    for reduction in ("mean", "sum", "none"):
        call = {"ignore_index": ignore_index, "label_smoothing": 0.1, "reduction": reduction}
        ours = lsk.cross_entropy(x, y, weight, **call)
        torch.testing.assert_close(
            ours, F.cross_entropy(x.double(), y, weight.double(), **call).float(), rtol=1e-6, atol=0
        )


def test_r26_small_gradients_survive_a_loss_scale(place: Place) -> None:
    """fp16, a mean over 8192 rows of K = 128,256: ε/K/N is below the smallest subnormal, with a loss scale of 65536 it is not."""
    k = 1000 if place == ("triton", "cpu") else 128_256
    x, y = draw(place, 2, k, torch.float16, ignored=0)
    normalizer = 8192 * 128_256 / k
    logits = (x / 8).detach().requires_grad_()
    loss = lsk.cross_entropy(logits, y, label_smoothing=0.1, normalizer=normalizer, backend=place[0])
    (grad,) = torch.autograd.grad(loss * 65536, logits)
    problem = Problem(logits.detach(), y, {"label_smoothing": 0.1})
    want = expect(problem, torch.full((2,), 65536 / normalizer, dtype=torch.float64, device=place[1]))
    judge_grad(problem, want, grad)
    assert (want.grad.abs() > 2**-24).float().mean() > 0.5, "the case must ask for values that fp16 can hold"
    assert (grad != 0)[want.grad.abs() > 2**-24].all()


@pytest.mark.parametrize("shift", [1e3, 1e4, 1e5])
def test_r27_shift_changes_nothing(place: Place, shift: float) -> None:
    check_r27(place, shift)


def check_r27(place: Place, shift: float) -> None:
    """Logits on a grid that float32 holds at every shift: loss and gradient keep every bit."""
    x, y = draw(place, 4, 300)
    x = (x * 64).round() / 64
    results = []
    for logits in (x, x + shift):
        leaf = logits.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, reduction="none", label_smoothing=0.1, backend=place[0])
        (grad,) = torch.autograd.grad(loss, leaf, upstream_for(4, place[1]))
        results.append((loss.detach(), grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def check_r28(place: Place) -> None:
    """With a z-loss Σ_k dz_k = 2ζ·lse: the factor belongs to p, never to q, and whole norms would hide that."""
    x, y = (t.double() if t.is_floating_point() else t for t in draw(place, 5, 40))
    x.requires_grad_()
    loss = lsk.cross_entropy(x, y, reduction="sum", label_smoothing=0.1, z_loss=0.02, backend=place[0])
    (grad,) = torch.autograd.grad(loss, x)
    want = torch.where(y == -100, 0.0, 2 * 0.02 * torch.logsumexp(x.detach(), 1))
    assert (grad.sum(1) - want).abs().max() < 1e-13


def test_r28_z_loss_gradient_sums() -> None:
    check_r28(("reference", "cpu"))


def test_r33_merging_unequal_shards() -> None:
    """K = 8 over 2 and over 4 unequal shards, every piece with its own maximum and its own Σ q, is the whole row."""
    rng = torch.Generator().manual_seed(8)
    z, q = (
        torch.randn(3, 8, generator=rng, dtype=torch.float64) * 5,
        torch.rand(3, 8, generator=rng, dtype=torch.float64),
    )
    for cuts in ((3, 5), (1, 2, 4, 1), (8,)):
        pieces = []
        for zi, qi in zip(z.split(cuts, 1), q.split(cuts, 1), strict=True):
            m = zi.amax(1)
            pieces.append((m, (zi - m[:, None]).exp().sum(1), (qi * (zi - m[:, None])).sum(1), qi.sum(1)))
        m, s, d, mass = pieces[0]
        for piece in pieces[1:]:
            m, s, d, mass = lsk.reference.merge((m, s, d, mass), piece)
        torch.testing.assert_close(mass * s.log() - d, -(q * torch.log_softmax(z, 1)).sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bad", [37, -1, -101, 2**31, 2**31 + 5, 2**32 + 5, -(2**40)])
def test_r35_targets_outside(place: Place, bad: int, inplace: bool) -> None:
    x, y = draw(place)
    y[4] = bad
    leaf = x.clone().requires_grad_()
    call = {"label_smoothing": 0.1, "inplace": inplace, "backend": place[0]}
    if place[1] == "cpu":
        for reduction in ("mean", "none"):
            with pytest.raises(IndexError, match=rf"{bad}\b.*4|4.*{bad}\b"):
                lsk.cross_entropy(leaf, y, reduction=reduction, **call)
        assert torch.equal(leaf, x), "nothing is written before the targets are known to be good"
        return
    if place[0] == "reference":
        pytest.skip("the reference looks at the targets on a GPU too")
    loss = lsk.cross_entropy(leaf, y, reduction="none", **call)
    (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
    assert loss[4].isnan() and grad[4].isnan().all()
    assert not loss[[0, 1, 2, 3, 5]].isnan().any() and not grad[[0, 1, 2, 3, 5]].isnan().any()


def test_r36_autocast(place: Place) -> None:
    x, y = draw(place, k=8)
    layer = torch.nn.Linear(8, 11, device=place[1])
    y = torch.where(y < 0, y, y % 11)
    with torch.autocast(place[1], torch.bfloat16):
        logits = layer(x)
        loss = lsk.cross_entropy(logits, y, label_smoothing=0.1, backend=place[0])
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()
    assert torch.equal(
        loss.detach(),
        lsk.cross_entropy(logits.detach().requires_grad_(), y, label_smoothing=0.1, backend=place[0]).detach(),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_r36_a_tensor_on_another_device_than_the_current() -> None:
    x, y = (t.to("cuda:1") for t in draw(("triton", "cuda:1")))
    with torch.cuda.device(0):
        x.requires_grad_()
        loss = lsk.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
        (grad,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    judge_rows(("triton", "cuda"), x, y, loss, grad, torch.ones_like(loss), label_smoothing=0.1)


@pytest.mark.parametrize("on_device", [False, True])
def test_r39_one_batch_against_its_pieces(place: Place, on_device: bool) -> None:
    """With the same normalizer the gradients of 4 unequal pieces are those of the whole, bit for bit, and the losses add up."""
    x, y = draw(place, 8, 20)
    y[4:6] = -100
    count = int((y != -100).sum())
    normalizer = torch.tensor(count, device=place[1]) if on_device else count
    call = {"label_smoothing": 0.1, "normalizer": normalizer, "backend": place[0]}
    whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = lsk.cross_entropy(whole, y, **call)
    loss.backward()
    pieces = [lsk.cross_entropy(xi, yi, **call) for xi, yi in zip(parts.split(2), y.split(2), strict=True)]
    sum(pieces).backward()
    assert torch.equal(whole.grad, parts.grad)
    assert (sum(pieces) - loss).abs() < 1e-6 * loss
    mean = lsk.cross_entropy(x, y, label_smoothing=0.1, backend=place[0])
    assert (loss - mean).abs() < 1e-6 * mean, "the normalizer of the whole batch is its mean"


def test_r40_no_smoothing_is_exactly_none(place: Place) -> None:
    """0 as a number or a tensor, under every convention, keeps every bit, even where 0·(-inf) waits."""
    x, y = draw(place)
    x[:, 7] = -torch.inf
    y = torch.where(y == 7, 8, y)
    results = []
    for eps in (0.0, 0, torch.tensor(0.0, device=place[1]), torch.zeros(6, device=place[1])):
        for smoothing in ("uniform", "others"):
            leaf = x.clone().requires_grad_()
            loss = lsk.cross_entropy(
                leaf, y, reduction="none", label_smoothing=eps, smoothing=smoothing, backend=place[0]
            )
            (grad,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss))
            results.append(torch.cat([loss.detach()[:, None], grad], 1))
    assert results[0].isfinite().all()
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("eps", [torch.nan, 1.1, torch.inf, -torch.inf])
def test_r40_smoothing_outside_its_range(eps: float) -> None:
    x, y = draw(("reference", "cpu"))
    for value in (eps, torch.tensor(eps), torch.full((6,), eps)):
        with pytest.raises(lsk.ArgumentError, match="label_smoothing must be .* at most 1"):
            lsk.cross_entropy(x, y, label_smoothing=value)


def test_r40_others_needs_others(place: Place) -> None:
    x, y = torch.zeros(3, 1, device=place[1]), torch.zeros(3, dtype=torch.int64, device=place[1])
    with pytest.raises(lsk.ArgumentError, match="smoothing='others' needs at least 2 classes, got 1"):
        lsk.cross_entropy(x, y, label_smoothing=0.1, smoothing="others", backend=place[0])
    assert (lsk.cross_entropy(x, y, smoothing="others", reduction="none", backend=place[0]) == 0).all()


def test_equal_from_run_to_run(place: Place) -> None:
    """Bit for bit, also with another number of threads: no atomics, no order that a scheduler chooses."""
    x, y = draw(place, 16, 700)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (threads, threads, 1, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            loss = lsk.cross_entropy(leaf, y, label_smoothing=0.1, backend=place[0])
            loss.backward()
            results.append((loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])
