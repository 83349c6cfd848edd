"""Class probabilities as targets where every rank holds some of the classes, and only theirs of the probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from covering import Mode, in_half
from sharded import CUTS, N, agree_to_the_bit, draw, needs_gloo, of_rank, options, same_as_one, spawn
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel, ranks
from labelsmooth_kernels.targets import TopK

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = needs_gloo


def probabilities(k: int, dtype: torch.dtype) -> Tensor:
    """Rows that do not sum to 1, one of them only zeros."""
    rng = torch.Generator().manual_seed(k)
    t = torch.rand(N, k, generator=rng, dtype=torch.float64).pow(3).to(dtype)
    t[3], t[5, : k // 2] = 0, 0
    return t


def _logits(
    rank: int, cuts: tuple[int, ...], backend: str | None, many: int = ranks.MANY, place: int | None = None
) -> None:
    """``place``: that of the cuts in a design over cuts, dtypes and cases, which None leaves whole."""
    ranks.MANY = many
    part, k = slice(cuts[rank], cuts[rank + 1]), cuts[-1]
    number = 3 if backend is None else 2 if Mode.whole else 1
    for j, dtype in enumerate((torch.float64, torch.float32, torch.bfloat16)[:number]):
        x, target = draw(k, dtype)[0], probabilities(k, dtype)
        away = (torch.arange(k) % 3 == 0) & (torch.arange(N)[:, None] < 6)
        away[:2] = torch.arange(k) < cuts[2]  # nothing finite on the first two ranks
        away[:, -1] = False
        masked, fitting = x.where(~away, -torch.inf), target.where(~away, 0.0)
        cases = {name: (x, target, given) for name, given in options(k).items() if "ignored" not in name}
        for name in ("plain", "uniform", "others", "class weights and prior"):
            cases[f"masked, {name}"] = (masked, fitting, options(k)[name])
            cases[f"finite, {name}"] = (masked, fitting, options(k)[name] | {"smooth_over": "finite"})
        for i, (name, (logits, t, given)) in enumerate(cases.items()):
            if place is not None and not in_half(i, j, place):
                continue
            full, mine = (
                [v.clone().requires_grad_() for v in pair] for pair in ((logits, t), (logits[:, part], t[:, part]))
            )
            want = lsk.cross_entropy(*full, return_stats="all", **given)
            got = parallel.cross_entropy(*mine, return_stats="all", backend=backend, **of_rank(given, part))
            seed = torch.linspace(-1, 2, N).to(want[0]) if want[0].dim() else torch.tensor(1.3).to(want[0])
            want_grads = [g[:, part] for g in torch.autograd.grad(want[0], full, seed)]
            same_as_one(name, got, want, torch.autograd.grad(got[0], mine, seed), want_grads, dtype)
            assert torch.equal(
                parallel.cross_entropy(*mine, backend=backend, **of_rank(given, part)).isnan(), got[0].isnan()
            )


def _linear(rank: int, cuts: tuple[int, ...], backend: str | None) -> None:
    part, size, k = slice(cuts[rank], cuts[rank + 1]), len(cuts) - 1, cuts[-1]
    mine = slice(rank * N // size, (rank + 1) * N // size)
    for dtype in (torch.float64, torch.bfloat16) if backend is None else (torch.float64,):
        _, _, hidden, head = draw(k, dtype)
        dense = probabilities(k, dtype)
        top = TopK(*reversed(dense.topk(3)))
        top.indices[1] = k - 1  # thrice the same
        cases = {name: given for name, given in options(k).items() if "ignored" not in name}
        for i, (name, given) in enumerate(cases.items()):
            for target in (dense, top):
                full = [t.clone().requires_grad_() for t in (hidden, head)]
                want = lsk.linear_cross_entropy(*full, target, return_stats="all", **given)
                seed = torch.linspace(-1, 2, N).to(want[0]) if want[0].dim() else torch.tensor(1.3).to(want[0])
                want_grads = torch.autograd.grad(want[0], full, seed)
                reduce, chunk = (("all", None), ("scatter", 2), ("none", 5))[1 if name == "none" else i % 3]
                rows = mine if reduce == "scatter" else slice(None)
                leaves = [t.clone().requires_grad_() for t in (hidden[rows], head[part])]
                got = parallel.linear_cross_entropy(
                    leaves[0], leaves[1], target if target is top else dense[:, part], grad_reduce=reduce,
                    chunk_rows=chunk, return_stats="all", backend=backend, **of_rank(given, part),
                )  # fmt: skip
                grads = list(torch.autograd.grad(got[0], leaves, seed))
                if reduce == "none":
                    dist.all_reduce(grads[0])
                elif reduce == "all":
                    agree_to_the_bit(grads[0])
                same_as_one(f"{name}, {reduce}", got, want, grads, [want_grads[0][rows], want_grads[1][part]], dtype)
    wrong = TopK(top.indices.index_fill(0, torch.tensor([4]), k), top.probabilities)
    with pytest.raises(IndexError, match=rf"target.indices must be in \[0, {k}\), got {k}"):
        parallel.linear_cross_entropy(hidden, head[part], wrong)
    with pytest.raises(lsk.ArgumentError, match="rank 0: target must not require a gradient"):
        parallel.linear_cross_entropy(hidden, head[part], dense[:, part].clone().requires_grad_())
    other = TopK(top.indices.flip(0) if rank else top.indices, top.probabilities)
    for wrong in (other, TopK(top.indices, top.probabilities * (1 + rank))):
        with pytest.raises(lsk.ArgumentError, match="checksum of target must be the same on all ranks"):
            parallel.linear_cross_entropy(hidden, head[part], wrong)
    with pytest.raises(lsk.ArgumentError, match=r"classes of a target must be the same on all ranks, got \['all', 3"):
        parallel.linear_cross_entropy(hidden, head[part], top if rank else dense[:, part])


def _layouts(rank: int, cuts: tuple[int, ...]) -> None:
    part = slice(cuts[rank], cuts[rank + 1])
    x, t = draw(cuts[-1])[0], probabilities(cuts[-1], torch.float64)
    want = lsk.cross_entropy(x, t, label_smoothing=0.1, reduction="none")
    cube, soft = (v.reshape(3, 4, -1)[..., part].movedim(-1, 1) for v in (x, t))
    for layout in (torch.contiguous_format, torch.preserve_format):
        leaves = [v.clone(memory_format=layout).requires_grad_() for v in (cube, soft)]
        got = parallel.cross_entropy(*leaves, label_smoothing=0.1, reduction="none")
        torch.testing.assert_close(got, want.reshape(3, 4))
        assert [g.shape for g in torch.autograd.grad(got.sum(), leaves)] == [cube.shape, soft.shape]
    bad = soft.clone()
    bad[0] = torch.nan
    for eps in (0.1, 1.0):
        assert parallel.cross_entropy(cube, bad, label_smoothing=eps, reduction="none")[0].isnan().all()
    overwritten, leaf = cube.clone().requires_grad_(), cube.clone().requires_grad_()
    for grad in torch.autograd.grad(parallel.cross_entropy(overwritten * 1.0, soft, inplace=True), overwritten):
        torch.testing.assert_close(grad, *torch.autograd.grad(parallel.cross_entropy(leaf, soft), leaf))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_logits(cuts: tuple[int, ...], backend: str | None, tmp_path: Path) -> None:
    place = [*CUTS.values()].index(cuts) if backend is None else None
    spawn(_logits, len(cuts) - 1, tmp_path, cuts, backend, ranks.MANY, place)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("cuts", [CUTS["2"], CUTS["empty between"]], ids=["2", "empty between"])
def test_a_linear_head(cuts: tuple[int, ...], backend: str | None, tmp_path: Path) -> None:
    spawn(_linear, len(cuts) - 1, tmp_path, cuts, backend)


def test_many_ranks(tmp_path: Path) -> None:
    spawn(_logits, 3, tmp_path, CUTS["empty between"], None, 2)


def test_layouts(tmp_path: Path) -> None:
    spawn(_layouts, 2, tmp_path, CUTS["2"])
