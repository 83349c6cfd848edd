"""The fused linear + loss: numbers, targets, shapes, errors; what PyTorch does to it is in test_linear_transforms."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case, Place, denominator_of, truncates, upstream_for
from conftest import EMULATED, places, skip_unless_available
from heads import EPS, grads_of, head_loss, operands
from rule import HALF, acc_dtype, expect, judge_grad, judge_loss, judge_stats
from torch import Tensor, nn

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends


def compare(got: list[Tensor], want: list[Tensor], theirs: list[Tensor]) -> None:
    """Largest errors against float64 at most twice PyTorch's in the same dtype, and 4 ulp of the largest entry."""
    for g, w, t in zip(got, want, theirs, strict=True):
        assert g.dtype == t.dtype or g.dtype == torch.float32
        error, error_theirs = ((x.double() - w).abs().max() for x in (g, t))
        few = 16 if t.dtype == torch.float64 else 4  # in float64 the oracle errs as much
        slack = few * torch.finfo(t.dtype).eps * w.abs().max()
        assert error <= 2 * error_theirs + slack, (error, error_theirs, slack)


def in_float64(leaves: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in leaves]


# ---- the table of cases: with hidden = 1 the logits are the weight, and d_weight their gradient, entry for entry


def table() -> list[Any]:
    rows = []
    for backend, device in places():
        for case in CASES:
            traits = case.traits()
            finite = not traits & {"holds nan", "holds inf", "holds -inf"}  # a product with 1 0 0 ... spreads them
            if case.large or not finite or not any(trait.startswith("label_smoothing=") for trait in traits):
                continue
            dtypes = case.dtypes if (backend, device) not in EMULATED else (torch.float32,)
            for dtype in (d for d in dtypes if d in backends.BACKENDS[backend].dtypes):
                name = f"{case.name}-{backend}-{device}-{str(dtype)[6:]}"
                rows.append(pytest.param(case, (backend, device), dtype, id=name))
    return rows


@pytest.mark.parametrize("direction", ["rows", "mean"])
@pytest.mark.parametrize(("case", "place", "dtype"), table())
def test_table(case: Case, place: Place, dtype: torch.dtype, direction: str) -> None:
    skip_unless_available(place[0])
    problem = case.problem(dtype, place[1])
    n = len(problem.logits)
    hidden = torch.eye(n, dtype=dtype, device=place[1])
    weight = problem.logits.t().contiguous().requires_grad_()
    upstream = upstream_for(n, place[1], acc_dtype(dtype))
    call = {"backend": place[0], "chunk_rows": 2, **problem.options}
    if direction == "rows":
        call["reduction"], row_weight, scalar, denominator = "none", torch.ones_like(upstream), upstream, 1.0
    else:
        row_weight, scalar = upstream.abs() + 0.5, upstream.new_tensor(0.37)
        call["row_weight"], denominator = row_weight, denominator_of(problem, row_weight)
    loss, stats = lsk.linear_cross_entropy(hidden, weight, problem.target, return_stats="entropy", **call)
    (grad,) = torch.autograd.grad(loss, weight, scalar.expand(loss.shape))
    factors = (row_weight * scalar).double()
    want = expect(problem, factors / denominator if denominator else torch.zeros_like(factors))
    if direction == "rows":
        judge_loss(want, loss.detach())
    elif denominator:
        judge_loss(want, loss.detach(), row_weight.double(), denominator)
    judge_stats(problem, stats)
    roundings = 2 if direction == "mean" or dtype == torch.float16 else 1
    judge_grad(problem, want, grad.t(), roundings, truncates(place[0], problem.logits))


# ---- products


@pytest.mark.parametrize("chunk_rows", [None, 8])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_r37_gradients_of_all_operands(
    place: Place, dtype: torch.dtype, reduction: str, chunk_rows: int | None
) -> None:
    if dtype not in backends.BACKENDS[place[0]].dtypes:
        pytest.skip(f"{place[0]} does not serve {dtype}")
    *leaves, y = operands(21, 24, 130, place, dtype)
    options = {"linear_bias": None, "label_smoothing": EPS, "reduction": reduction}

    def run(loss: Any, leaves: list[Tensor], **more: Any) -> list[Tensor]:
        value = loss(leaves[0], leaves[1], y, **options | {"linear_bias": leaves[2], **more})
        return [value.detach(), *grads_of(value, leaves)]

    want, theirs = run(head_loss, in_float64(leaves)), run(head_loss, leaves)
    compare(run(lsk.linear_cross_entropy, leaves, backend=place[0], chunk_rows=chunk_rows), want, theirs)


def test_r37_a_bias_of_large_negative_entries(place: Place) -> None:
    """Padding classes masked through the bias: no negative loss, and with "finite" a finite one."""
    hidden, weight, _, y = operands(8, 16, 40, place)
    bias = torch.zeros(40, device=place[1])
    bias[30:] = -torch.inf
    y = torch.where(y >= 30, 3, y)
    for options in ({}, {"label_smoothing": EPS, "smooth_over": "finite"}):
        loss = lsk.linear_cross_entropy(hidden, weight, y, linear_bias=bias, backend=place[0], chunk_rows=4, **options)
        want = lsk.cross_entropy(F.linear(hidden, weight[:30]), y, **options)
        torch.testing.assert_close(loss, want)
        got, expected = (torch.autograd.grad(value, weight)[0] for value in (loss, want))
        torch.testing.assert_close(got, expected)
        assert (got[30:] == 0).all()


@pytest.mark.parametrize("dtype", HALF)
def test_r30_the_weight_gradient_is_summed_in_float32(dtype: torch.dtype) -> None:
    """4,096 rows in chunks of 16: the error of one chunk; in the input's dtype it grows with their number."""
    skip_unless_available("cpu")
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, 16, generator=rng).to(dtype)
    weight = torch.randn(50, 16, generator=rng).to(dtype).requires_grad_()
    y = torch.randint(50, (4096,), generator=rng)

    def error(**options: Any) -> float:
        loss = lsk.linear_cross_entropy(hidden, weight, y, label_smoothing=EPS, reduction="sum", **options)
        return float((torch.autograd.grad(loss, weight)[0].double() - want).abs().max() / want.abs().max())

    leaf = weight.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(head_loss(hidden.double(), leaf, y, label_smoothing=EPS, reduction="sum"), leaf)
    whole, chunks = error(chunk_rows=4096), error(chunk_rows=16)
    assert chunks <= 1.5 * whole + torch.finfo(dtype).eps / 2
    assert error(chunk_rows=16, grad_accumulation="input") > 2 * chunks


def test_smoothing_is_rank_one() -> None:
    """d(ε) - d(0) = ε·(target's - mean's): what smoothing adds is one vector times another for either operand."""
    hidden, weight, bias, y = operands(12, 8, 30, ("cpu", "cpu"), torch.float64)
    y = y.clamp_min(0)
    grads = []
    for eps in (0.0, EPS):
        loss = lsk.linear_cross_entropy(
            hidden, weight, y, linear_bias=bias, label_smoothing=eps, reduction="sum", chunk_rows=5
        )
        grads.append(torch.autograd.grad(loss, (hidden, weight, bias)))
    moved = F.one_hot(y, 30).double() - 1 / 30
    for a, b, want in zip(*grads, (moved @ weight, moved.t() @ hidden, moved.sum(0)), strict=True):
        torch.testing.assert_close(b - a, EPS * want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("skip_ignored", [False, True, None])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_leave_no_trace(place: Place, reduction: str, skip_ignored: bool | None) -> None:
    """Even where their hidden states are NaN: exact zeros, nothing in the other gradients."""
    hidden, weight, bias, y = operands(13, 8, 30, place)
    ignored = y == -100
    spoilt = torch.where(ignored[:, None], torch.nan, hidden.detach()).requires_grad_()
    call = {"label_smoothing": EPS, "reduction": reduction, "backend": place[0]}
    if place[0] == "reference" and spoilt.isnan().any():
        pytest.skip("the unfused path multiplies 0 by NaN, as F.linear does")
    grads = []
    for leaf in (hidden, spoilt):
        loss = lsk.linear_cross_entropy(
            leaf, weight, y, linear_bias=bias, chunk_rows=4, skip_ignored=skip_ignored, **call
        )
        grads.append([loss.detach(), *grads_of(loss, [leaf, weight, bias])])
    assert (grads[1][1][ignored] == 0).all()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    value, _ = lsk.linear_cross_entropy(
        spoilt, weight, y, linear_bias=bias, chunk_rows=4, skip_ignored=skip_ignored, return_stats=True, **call
    )
    torch.testing.assert_close(grads_of(value, [weight, bias]), grads[0][2:])


@pytest.mark.parametrize("n", [0, 1, 7])
@pytest.mark.parametrize("ignored", [False, True])
def test_no_rows_and_nothing_but_ignored_ones(fast_place: Place, n: int, ignored: bool) -> None:
    hidden, weight, bias, y = operands(n, 8, 30, fast_place)
    y = torch.full_like(y, -100) if ignored else y.clamp_min(0)
    for reduction in ("mean", "sum", "none"):
        call = {"linear_bias": bias, "label_smoothing": EPS, "reduction": reduction}
        loss = lsk.linear_cross_entropy(hidden, weight, y, chunk_rows=3, backend=fast_place[0], **call)
        want = head_loss(hidden, weight, y, **call)
        torch.testing.assert_close(loss, want, equal_nan=True)
        got = grads_of(loss, [hidden, weight, bias])
        if ignored or n == 0:
            assert all((g == 0).all() for g in got), "PyTorch's are NaN here for a mean"


@pytest.mark.parametrize("missing", range(4))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_r11_only_demanded_gradients(fast_place: Place, missing: int, reduction: str) -> None:
    """A frozen hidden, weight or bias; and no_grad (3)."""
    *leaves, y = operands(9, 8, 30, fast_place)
    call = {"label_smoothing": EPS, "reduction": reduction, "chunk_rows": 4, "backend": fast_place[0]}
    full = lsk.linear_cross_entropy(leaves[0], leaves[1], y, linear_bias=leaves[2], **call)
    if missing == 3:
        with torch.no_grad():
            loss = lsk.linear_cross_entropy(leaves[0], leaves[1], y, linear_bias=leaves[2], **call)
        assert not loss.requires_grad
    else:
        kept = [leaf for i, leaf in enumerate(leaves) if i != missing]
        want = [g for i, g in enumerate(grads_of(full, leaves)) if i != missing]
        frozen = [t.detach() if i == missing else t for i, t in enumerate(leaves)]
        loss = lsk.linear_cross_entropy(frozen[0], frozen[1], y, linear_bias=frozen[2], **call)
        for g, w in zip(grads_of(loss, kept), want, strict=True):
            assert torch.equal(g, w)
    assert torch.equal(loss, full)


def test_equal_from_run_to_run_and_nothing_is_written(fast_place: Place) -> None:
    *leaves, y = operands(33, 24, 130, fast_place, torch.float32)
    before = [t.detach().clone() for t in (*leaves, y)]
    runs = []
    for _ in range(3):
        loss = lsk.linear_cross_entropy(
            leaves[0], leaves[1], y, linear_bias=leaves[2], chunk_rows=16, label_smoothing=EPS, backend=fast_place[0]
        )
        runs.append([loss.detach(), *grads_of(loss, leaves)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (*leaves, y), strict=True))


# ---- targets and shapes


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["dense", "top-k", "teacher"])
def test_soft_targets(place: Place, kind: str, reduction: str) -> None:
    *leaves, _ = operands(11, 8, 30, place)
    rng = torch.Generator().manual_seed(1)
    indices = torch.randint(30, (11, 4), generator=rng).to(place[1])
    probabilities = torch.rand(11, 4, generator=rng).to(place[1])
    states, head, offset = (torch.randn(s, generator=rng).to(place[1]) for s in ((11, 5), (30, 5), (30,)))
    weight = torch.rand(30, generator=rng).to(place[1])
    dense = torch.zeros(11, 30, device=place[1]).scatter_add_(1, indices, probabilities)
    target: Any = {"dense": dense, "top-k": lsk.TopK(indices, probabilities)}.get(kind)
    if kind == "teacher":
        dense = torch.softmax(0.5 * F.linear(states, head, offset), -1)
        target = lsk.Teacher(states, head, offset, logit_scale=0.5)
    call = {"weight": weight, "label_smoothing": EPS, "reduction": reduction}
    loss = lsk.linear_cross_entropy(
        leaves[0], leaves[1], target, linear_bias=leaves[2], chunk_rows=4, backend=place[0], **call
    )
    want = F.cross_entropy(F.linear(*leaves), dense, **call)
    torch.testing.assert_close(loss, want)
    for g, w in zip(grads_of(loss, leaves), grads_of(want, leaves), strict=True):
        torch.testing.assert_close(g, w)


def test_the_gradient_of_dense_probabilities(place: Place) -> None:
    hidden, weight, _, _ = operands(5, 8, 30, place)
    target = torch.rand(5, 30, device=place[1]).requires_grad_()
    got, want = (
        torch.autograd.grad(f(hidden, weight, target, label_smoothing=EPS), target)[0]
        for f in (lsk.linear_cross_entropy, head_loss)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3)])
def test_shapes_of_pytorch(place: Place, shape: tuple[int, ...], probabilities: bool) -> None:
    """(D,), (N, D), and with weights of (K, d1, ..., D); their targets, and every reduction."""
    rng = torch.Generator().manual_seed(2)
    for out in ((), (2, 3)) if len(shape) == 1 else ((),):
        hidden = torch.randn(*shape[:1], 8, generator=rng).to(place[1]) if len(shape) < 2 else None
        if hidden is None:
            continue
        weight = torch.randn(10, *out, 8, generator=rng).to(place[1]).requires_grad_()
        bias = torch.randn(10, *out, generator=rng).to(place[1]).requires_grad_()
        y = torch.randint(10, (*hidden.shape[:-1], *out), generator=rng).to(place[1])
        if probabilities:
            y = torch.rand(*hidden.shape[:-1], 10, *out, generator=rng).to(place[1])
        for reduction in ("mean", "sum", "none"):
            call = {"linear_bias": bias, "label_smoothing": EPS, "reduction": reduction}
            loss = lsk.linear_cross_entropy(hidden, weight, y, backend=place[0], chunk_rows=4, **call)
            want = head_loss(hidden, weight, y, **call)
            torch.testing.assert_close(loss, want)
            for g, w in zip(grads_of(loss, [weight, bias]), grads_of(want, [weight, bias]), strict=True):
                torch.testing.assert_close(g, w)


def test_batches_of_sequences(place: Place) -> None:
    """(B, T, D) as transformers produce it, with one value per row where it is asked for."""
    *leaves, y = operands(12, 8, 30, place)
    hidden = leaves[0].detach().reshape(3, 4, 8).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    call = {"label_smoothing": torch.rand(3, 4, device=place[1]), "row_weight": torch.rand(3, 4, device=place[1])}
    loss, stats = lsk.linear_cross_entropy(
        hidden, leaves[1], y.view(3, 4), reduction="none", return_stats=True, chunk_rows=5, backend=place[0], **call
    )
    want, expected = lsk.cross_entropy(
        F.linear(hidden, leaves[1]), y.view(3, 4), class_dim=-1, reduction="none", return_stats=True, **call
    )
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(stats[:4], expected[:4])
    (got,), (grad,) = grads_of(loss, [hidden]), grads_of(want, [hidden])
    torch.testing.assert_close(got, grad)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="PyTorch has the module from 2.13 on")
def test_the_module_is_that_of_pytorch(place: Place) -> None:
    """Same constructor, same state dict, same numbers; options of ours beside; a head tied to an embedding."""
    for more in ({}, {"out_features": (2,), "bias": True}):
        theirs = nn.LinearCrossEntropyLoss(8, 30, label_smoothing=EPS, weight=torch.rand(30), **more).to(place[1])
        ours = lsk.LinearCrossEntropyLoss(
            8, 30, label_smoothing=EPS, weight=torch.rand(30), backend=place[0], chunk_rows=4, **more
        ).to(place[1])
        ours.load_state_dict(theirs.state_dict())
        hidden = torch.randn(6, 8, device=place[1])
        y = torch.randint(30, (6, *more.get("out_features", ())), device=place[1])
        torch.testing.assert_close(ours(hidden, y), theirs(hidden, y))
    embedding = nn.Embedding(30, 8, device=place[1])
    tied = lsk.LinearCrossEntropyLoss(8, 30, z_loss=1e-4, backend=place[0], device=place[1])
    tied.linear.weight = embedding.weight
    tied(embedding(torch.arange(6, device=place[1])), torch.arange(6, device=place[1])).backward()
    assert embedding.weight.grad is not None
    assert "z_loss=0.0001" in repr(tied)


def test_every_option_reaches_the_loss() -> None:
    """The names of LossSpec but for two, each changed once: the module and the function pass all of them on."""
    hidden, weight, _, y = operands(6, 8, 30, ("cpu", "cpu"))
    changed = {
        "weight": torch.rand(30), "ignore_index": int(y[1]), "reduction": "sum", "label_smoothing": 0.3,
        "smoothing": "others", "smooth_over": "finite", "z_loss": 0.1, "confidence_penalty": 0.2,
        "logit_scale": 0.5, "softcap": 2.0, "row_weight": torch.rand(6), "normalizer": 3.0,
        "return_stats": True, "backend": "reference",
    }  # fmt: skip
    names = {f.name for f in dataclasses.fields(lsk.LossSpec)} - {"class_dim", "inplace"}
    assert changed.keys() == names
    for name, value in changed.items():
        base: dict[str, Any] = {"label_smoothing": EPS, "ignore_index": -100}
        options = base | {name: value}
        want = lsk.cross_entropy(F.linear(hidden, weight), torch.where(y == -100, 0, y), **options)
        got = lsk.linear_cross_entropy(hidden, weight, torch.where(y == -100, 0, y), **options)
        torch.testing.assert_close(tuple(got) if isinstance(got, tuple) else got,
                                   tuple(want) if isinstance(want, tuple) else want)  # fmt: skip
