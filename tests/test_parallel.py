"""The loss over ranks that hold some of the classes: one device's numbers, to the bit on all; errors without a hang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import interpreting
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from covering import Mode, in_half
from sharded import (
    CUTS,
    EPS,
    PRECISE,
    D,
    N,
    agree_to_the_bit,
    draw,
    needs_gloo,
    of_case,
    of_rank,
    options,
    same_as_one,
    spawn,
)
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel, ranks, shards
from labelsmooth_kernels.backends import BACKENDS
from labelsmooth_kernels.spec import LossSpec, Rows

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_gloo


# ---- processes


# ---- one device's numbers


def _logits(rank: int, cuts: tuple[int, ...], backend: str | None, place: int | None = None) -> None:
    """``place``: that of the cuts in a design over cuts, dtypes and cases, which None leaves whole."""
    part = slice(cuts[rank], cuts[rank + 1])
    for j, dtype in enumerate((torch.float64, torch.float32)):
        x, y, *_ = draw(cuts[-1], dtype)
        masked = x.where((torch.arange(x.shape[1]) % 3 != 0) | (torch.arange(N)[:, None] > 5), -torch.inf)
        masked[torch.arange(N), y.clamp_min(0)] = 1.0
        masked[2] = torch.nan  # ignored
        cases = {name: (x, given) for name, given in options(cuts[-1]).items()}
        cases |= {
            f"masked, {name}": (masked, given) for name, given in options(cuts[-1]).items() if "scale" not in name
        }
        for name in ("uniform", "others", "class weights and prior"):
            cases[f"finite, {name}"] = (masked, options(cuts[-1])[name] | {"smooth_over": "finite"})
        for i, (name, (logits, given)) in enumerate(cases.items()):
            if place is not None and not in_half(i, j, place):
                continue
            target = of_case(name, y)
            full, mine = (t.clone().requires_grad_() for t in (logits, logits[:, part]))
            want = lsk.cross_entropy(full, target, return_stats="all", **given)
            got = parallel.cross_entropy(mine, target, return_stats="all", backend=backend, **of_rank(given, part))
            seed = torch.linspace(-1, 2, N, dtype=dtype) if want[0].dim() else torch.tensor(1.3, dtype=dtype)
            (want_grad,) = torch.autograd.grad(want[0], full, seed)
            (grad,) = torch.autograd.grad(got[0], mine, seed)
            same_as_one(name, got, want, [grad], [want_grad[:, part]], dtype)
            plain = parallel.cross_entropy(mine.detach(), target, backend=backend, **of_rank(given, part))
            few_ulps = 4 * torch.finfo(dtype).eps  # rows of few classes have another kernel with all statistics
            torch.testing.assert_close(plain, got[0].detach(), rtol=few_ulps, atol=few_ulps, equal_nan=True)


def _layouts(rank: int, cuts: tuple[int, ...]) -> None:
    part = slice(cuts[rank], cuts[rank + 1])
    x, y, *_ = draw(cuts[-1], torch.float32)
    want = lsk.cross_entropy(x, y, label_smoothing=EPS, reduction="none")
    cube = x.reshape(3, 4, -1)[..., part]
    for logits, dim in ((cube, -1), (cube.movedim(-1, 1).contiguous(), 1)):
        got = parallel.cross_entropy(logits, y.reshape(3, 4), label_smoothing=EPS, reduction="none", class_dim=dim)
        torch.testing.assert_close(got, want.reshape(3, 4))
    leaf = x[:, part].clone().requires_grad_()
    overwritten = leaf * 1.0
    (grad,) = torch.autograd.grad(parallel.cross_entropy(leaf, y, label_smoothing=EPS), leaf)
    loss = parallel.cross_entropy(overwritten, y, label_smoothing=EPS, inplace=True)
    squares = (overwritten * overwritten).sum()
    for kept in (True, True, False):  # overwritten only when the graph ends
        (again,) = torch.autograd.grad(loss, leaf, retain_graph=kept)
        assert torch.equal(grad, again)
    if BACKENDS["cpu"].unavailable() is None and leaf.numel():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(squares, overwritten)
    if BACKENDS["cpu"].unavailable() is None:  # the reference overwrites nothing
        assert torch.equal(overwritten, grad)
    hidden, head = (t.float().requires_grad_() for t in draw(cuts[-1])[2:])
    for loss, at in (
        (parallel.cross_entropy(leaf, y), leaf),
        (parallel.linear_cross_entropy(hidden, head[part], y), hidden),
        (parallel.linear_cross_entropy(hidden, head[part], y, reduction="none").sum(), hidden),
    ):
        with pytest.raises(RuntimeError, match="create_graph=True is not served where classes are sharded"):
            torch.autograd.grad(loss, at, create_graph=True)


def _linear(rank: int, cuts: tuple[int, ...], backend: str | None, place: int | None = None) -> None:
    part, size = slice(cuts[rank], cuts[rank + 1]), len(cuts) - 1
    every = place is not None or (Mode.whole and backend is None)
    for j, dtype in enumerate(PRECISE if every else (torch.float64,)):
        _, y, hidden, head = draw(cuts[-1], dtype)
        cases = options(cuts[-1])
        cases |= {f"finite, {name}": cases[name] | {"smooth_over": "finite"} for name in ("uniform", "others", "prior")}
        cases["finite, by rows"] = cases["none"] | {"smooth_over": "finite"}
        for i, (name, given) in enumerate(cases.items()):
            if place is not None and not in_half(i, j, place):
                continue
            bias = head[:, 0].contiguous()
            if "finite" in name:
                bias[0] = -torch.inf
            y = y.where(y != 0, cuts[-1] - 1) if "finite" in name else y
            full, target = [t.clone().requires_grad_() for t in (hidden, head, bias)], of_case(name, y)
            want = lsk.linear_cross_entropy(full[0], full[1], target, linear_bias=full[2], return_stats="all", **given)
            seed = torch.linspace(-1, 2, N, dtype=want[0].dtype) if want[0].dim() else torch.tensor(1.3).to(want[0])
            want_grads = list(torch.autograd.grad(want[0], full, seed))
            mine = slice(rank * N // size, (rank + 1) * N // size)
            ways = (("all", None), ("scatter", 2), ("none", 5), ("all", 5))
            all_ways = Mode.whole or name in ("none", "finite, by rows")
            for reduce, chunk in ways if all_ways else (ways[(i // 2 + j) % 4],):
                rows = mine if reduce == "scatter" else slice(None)
                leaves = [t.clone().requires_grad_() for t in (hidden[rows], head[part], bias[part])]
                got = parallel.linear_cross_entropy(
                    leaves[0], leaves[1], target, linear_bias=leaves[2], return_stats="all", backend=backend,
                    grad_reduce=reduce, chunk_rows=chunk, **of_rank(given, part),
                )  # fmt: skip
                torch.autograd.grad(got[0], leaves, seed, retain_graph=True)
                grads = list(torch.autograd.grad(got[0], leaves, seed))
                if reduce == "none":
                    dist.all_reduce(grads[0])
                elif reduce == "all":
                    agree_to_the_bit(grads[0])
                of_mine = [want_grads[0][rows], want_grads[1][part], want_grads[2][part]]
                same_as_one(f"{name}, {reduce}", got, want, grads, of_mine, dtype)


def _heavy(rank: int, cuts: tuple[int, ...]) -> None:
    """fp16 with class weights of which float16 cannot hold products, the largest on one rank: one factor for all."""
    _, y, hidden, head = draw(cuts[-1], torch.float16)
    part, weight = slice(cuts[rank], cuts[rank + 1]), torch.linspace(1e5, 1, cuts[-1])
    upstream, given = torch.linspace(-1, 2, N) * 1e-6, {"label_smoothing": EPS, "reduction": "none"}
    full = [t.double().requires_grad_() for t in (hidden, head)]
    loss = lsk.linear_cross_entropy(*full, y, weight=weight.double(), **given)
    want = torch.autograd.grad(loss, full, upstream.double())
    leaves = [t.clone().requires_grad_() for t in (hidden, head[part])]
    got = parallel.linear_cross_entropy(*leaves, y, weight=weight[part], chunk_rows=5, **given)
    for mine, wanted in zip(torch.autograd.grad(got, leaves, upstream.to(got)), (want[0], want[1][part]), strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=4e-3, atol=1e-3 * float(want[0].abs().max()))


def test_heavy_classes_in_half_precision(tmp_path: Path) -> None:
    spawn(_heavy, 3, tmp_path, CUTS["empty between"])


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_logits(cuts: tuple[int, ...], tmp_path: Path) -> None:
    spawn(_logits, len(cuts) - 1, tmp_path, cuts, None, [*CUTS.values()].index(cuts))


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_a_linear_head(cuts: tuple[int, ...], tmp_path: Path) -> None:
    spawn(_linear, len(cuts) - 1, tmp_path, cuts, None, [*CUTS.values()].index(cuts))


def test_plain_pytorch(tmp_path: Path) -> None:
    for run in (_logits, _linear):
        spawn(run, 3, tmp_path, CUTS["empty between"], "reference")


@pytest.mark.skipif("cpu" not in BACKENDS["triton"].devices, reason="the ranks of this test have CPU tensors")
@pytest.mark.skipif(BACKENDS["triton"].unavailable() is not None, reason="Triton does not run here")
def test_triton(tmp_path: Path) -> None:
    spawn(_triton, 2, tmp_path, CUTS["unequal"])


def _triton(rank: int, cuts: tuple[int, ...]) -> None:
    interpreting.quicken()  # conftest does it for the process of the tests, not for ranks
    part = slice(cuts[rank], cuts[rank + 1])
    x, y, *_ = draw(cuts[-1], torch.float32)
    for name, given in options(cuts[-1]).items():
        full, mine = (t.clone().requires_grad_() for t in (x, x[:, part]))
        target = of_case(name, y)
        want = lsk.cross_entropy(full, target, return_stats="all", backend="reference", **given)
        got = parallel.cross_entropy(mine, target, return_stats="all", backend="triton", **of_rank(given, part))
        (want_grad,) = torch.autograd.grad(want[0].sum(), full)
        same_as_one(name, got, want, torch.autograd.grad(got[0].sum(), mine), [want_grad[:, part]], torch.float32)


@pytest.mark.parametrize("run", ["logits", "linear"])
def test_many_ranks(run: str, tmp_path: Path) -> None:
    """Where each rank merges a part of the rows; 12 rows, and chunks of 5, over 3 ranks."""
    spawn(_many, 3, tmp_path, run)


def _many(rank: int, run: str) -> None:
    ranks.MANY = 2
    (_logits if run == "logits" else _linear)(rank, CUTS["empty between"], None)


def test_layouts_and_places(tmp_path: Path) -> None:
    spawn(_layouts, 3, tmp_path, CUTS["empty between"])


# ---- what others get wrong


def megatron(local: Tensor, y: Tensor, first: int, eps: float) -> Tensor:
    """Its smoothing, as published: K and Σ log p of one rank's classes."""
    k = local.shape[1]
    zmax = local.amax(1)
    dist.all_reduce(zmax, dist.ReduceOp.MAX)
    z = local - zmax[:, None]
    here = (y >= first) & (y < first + k)
    z_y = torch.where(here, z.gather(1, (y - first).clamp(0, k - 1)[:, None])[:, 0], 0.0)
    total = z.exp().sum(1)
    dist.all_reduce(z_y)
    dist.all_reduce(total)
    eps = eps * k / (k - 1)
    return (1 - eps) * (total.log() - z_y) - eps * (z.exp() / total[:, None]).log().mean(1)


def transformer_engine(local: Tensor, y: Tensor, first: int, eps: float, k: int) -> Tensor:
    """The same with the K of all ranks, and Σ z of one."""
    loss = parallel.cross_entropy(local, y, reduction="none")
    lse = parallel.cross_entropy(local, y, reduction="none", return_stats=True)[1].lse
    return (1 - eps) * loss + eps * lse - eps / k * local.sum(1)


def _regressions(rank: int, cuts: tuple[int, ...]) -> None:
    part, k = slice(cuts[rank], cuts[rank + 1]), cuts[-1]
    x, y, *_ = draw(k, torch.float32)
    y = y.clamp_min(0)
    want = F.cross_entropy(x.double(), y, label_smoothing=EPS, reduction="none")
    got = parallel.cross_entropy(x[:, part], y, label_smoothing=EPS, reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    for other in (megatron(x[:, part], y, part.start, EPS), transformer_engine(x[:, part], y, part.start, EPS, k)):
        assert (other.double() - want).abs().max() > 0.05, "a rank's own K, or its own sum, must show"
    wide = torch.linspace(-100, 100, k).expand(N, k)[:, part].clone().requires_grad_()
    loss = parallel.cross_entropy(wide, y, label_smoothing=EPS, reduction="none")
    all_wide = torch.linspace(-100, 100, k, dtype=torch.float64).expand(N, k)
    torch.testing.assert_close(loss.double(), F.cross_entropy(all_wide, y, label_smoothing=EPS, reduction="none"))
    assert torch.autograd.grad(loss.sum(), wide)[0].isfinite().all()
    for wrong in (k, -1, 2**31 + 1, 2**40):
        with pytest.raises(IndexError, match=rf"target must be in \[0, {k}\).*got {wrong} in row 3"):
            parallel.cross_entropy(x[:, part], y.index_fill(0, torch.tensor([3]), wrong))
    far = x[:, part] + 1e5
    for value in (far, x[:, part]):
        exact = F.cross_entropy(torch.cat(_everyone(value), 1).double(), y, label_smoothing=EPS, reduction="none")
        found = parallel.cross_entropy(value, y, label_smoothing=EPS, reduction="none")
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def _everyone(mine: Tensor) -> list[Tensor]:
    """Of as many classes on every rank."""
    got, work = ranks.all_gather(mine.contiguous(), dist.group.WORLD)
    work.wait()
    return list(got)


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8)], ids=["2 ranks", "4 ranks"])
def test_failures_of_others(cuts: tuple[int, ...], tmp_path: Path) -> None:
    spawn(_regressions, len(cuts) - 1, tmp_path, cuts)


def _global_mean(rank: int) -> None:
    """Any split of one batch over ranks, with unequal numbers of valid rows, has the gradient of the whole."""
    _x, y, hidden, head = draw(7)
    y[6:11] = -100
    leaf = head.clone().requires_grad_()
    lsk.cross_entropy(hidden @ leaf.T, y, label_smoothing=EPS).backward()
    for cut in (6, 2, 11, 0):
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        part = head.clone().requires_grad_()
        count = parallel.token_count(y[mine])
        loss = lsk.cross_entropy(hidden[mine] @ part.T, y[mine], label_smoothing=EPS, normalizer=count)
        loss.backward()
        dist.all_reduce(part.grad)
        torch.testing.assert_close(part.grad, leaf.grad)
        assert int(count) == 6
    batch, target = hidden.reshape(3, 4, D), y.reshape(3, 4)  # along the sequence, as under context parallelism
    for cut in (2, 1):
        mine = slice(0, cut) if rank == 0 else slice(cut, None)
        part = head.clone().requires_grad_()
        options: dict[str, Any] = {"label_smoothing": EPS, "normalizer": parallel.token_count(target[:, mine])}
        lsk.linear_cross_entropy(batch[:, mine], part, target[:, mine], **options).backward()
        dist.all_reduce(part.grad)
        torch.testing.assert_close(part.grad, leaf.grad)


def _bits(rank: int) -> None:
    """Rows enough for an order of adding of its own to show; and a gradient's call with a target that is no class."""
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2000, 40, generator=rng, dtype=torch.float64), torch.randint(40, (2000,), generator=rng)
    mine = x[:, 10 * rank : 10 * rank + 10]
    loss, stats = parallel.cross_entropy(mine, y, label_smoothing=EPS, reduction="none", return_stats="all")
    for values in (loss, *(s.double() for s in stats if s is not None)):
        agree_to_the_bit(values)
    y = torch.tensor([40, -1, 3, -100, 2**40])
    rows = Rows(LossSpec(label_smoothing=EPS), mine[:5], y, None, None, EPS, None)
    saved, e = torch.ones(4, 5, dtype=torch.float64), torch.full((5,), EPS, dtype=torch.float64)
    call, _ = shards.gradient_call(rows, shards.Place(0, 10, 40), saved, e, torch.ones(5))
    assert call.row_scale is not None
    assert call.row_scale.isnan().tolist() == [True, True, False, False, True]


def test_the_same_bits_on_four_ranks(tmp_path: Path) -> None:
    spawn(_bits, 4, tmp_path)


def test_a_mean_over_all_ranks(tmp_path: Path) -> None:
    spawn(_global_mean, 2, tmp_path)
