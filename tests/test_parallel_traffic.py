"""Ranks that disagree, die, or talk of other things; what the loss over ranks sends."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import EPS, N, draw, needs_gloo, spawn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import labelsmooth_kernels as lsk
from labelsmooth_kernels import conventions, parallel, ranks

pytestmark = needs_gloo


def refused(kind: type[Exception], match: str, *arguments: Any, **given: Any) -> None:
    with pytest.raises(kind, match=match):
        parallel.cross_entropy(*arguments, **given)


def _disagree(rank: int) -> None:
    x, y, hidden, head = draw(8, torch.float32)
    part = slice(4 * rank, 4 * rank + 4)
    mine, bad = x[:, part], rank == 1
    same = "must be the same on all ranks, got"
    n = N - 1 if bad else N
    refused(lsk.ArgumentError, rf"shape of target {same} \[\[12\], \[11\]\]", mine[:n], y[:n])
    refused(lsk.ArgumentError, f"dtype {same}", mine.double() if bad else mine, y)
    refused(lsk.ArgumentError, f"label_smoothing {same}", mine, y, label_smoothing=0.2 if bad else 0.1)
    for name, (good, other) in {
        "ignore_index": (-100, -1), "smooth_over": ("all", "finite"), "z_loss": (0.0, 0.1), "softcap": (None, 3.0),
        "confidence_penalty": (0.1, 0.2), "logit_scale": (1.0, 2.0), "return_stats": (False, True),
        "smoothing": ("uniform", "others"), "label_smoothing": (0.0, torch.tensor(0.0)),
        "row_weight": (torch.ones(N), torch.full((N,), 2.0)), "normalizer": (torch.tensor(3), torch.tensor(4)),
    }.items():  # fmt: skip
        given = {"label_smoothing": EPS} | {name: other if bad else good}
        refused(lsk.ArgumentError, f"{name} {same}", mine, y, **given)
    rows = torch.full((N,), 0.1 * rank)
    refused(lsk.ArgumentError, f"label_smoothing {same}", mine, y, label_smoothing=rows)
    for first, second in (([0, 1], [2, 0]), ([9, 0], [7, 1])):  # whose sums of place times class are equal
        refused(lsk.ArgumentError, f"checksum of target {same}", mine[:2], torch.tensor(second if bad else first))
    refused(lsk.ArgumentError, f"reduction {same}", mine, y, reduction="sum" if bad else "mean")
    refused(lsk.ArgumentError, f"weight {same}", mine, y, torch.ones(4) if bad else None)
    refused(lsk.ArgumentError, f"checksum of target {same}", mine, y.roll(1) if bad else y)
    refused(lsk.ArgumentError, f"checksum of target {same}", mine, y.index_fill(0, torch.tensor([4]), 8) if bad else y)
    refused(lsk.ArgumentError, rf"normalizer {same} \[None, 12.0\]", mine, y, normalizer=12.0 if bad else None)
    refused(lsk.ArgumentError, "num_classes must be that of all ranks together, 8, got 9", mine, y, num_classes=9)
    refused(
        lsk.ArgumentError, rf"target {same} \['class indices', 'probabilities'\]", mine, mine.softmax(1) if bad else y
    )
    with pytest.raises(
        TypeError, match="rank 0: target must be a Tensor or a TopK where classes are sharded, got Teach"
    ):
        parallel.linear_cross_entropy(hidden, head[part], lsk.Teacher(hidden, head))  # type: ignore[arg-type]
    with pytest.raises(lsk.ArgumentError, match="rank 0: grad_reduce must be 'all', 'scatter' or 'none', got 'sum'"):
        parallel.linear_cross_entropy(hidden, head[part], y, grad_reduce="sum")
    with pytest.raises(lsk.ArgumentError, match=f"grad_reduce {same}"):
        parallel.linear_cross_entropy(hidden, head[part], y, grad_reduce="none" if bad else "all")
    leaf, rows = head[part].clone().requires_grad_(), torch.ones(N, requires_grad=bad)
    with pytest.raises(lsk.ArgumentError, match=f"requires_grad of input, .* or normalizer {same}"):
        parallel.linear_cross_entropy(hidden, leaf, y, row_weight=rows)
    with pytest.raises(lsk.ArgumentError, match=f"grad_reduce {same}"):  # another function altogether
        parallel.cross_entropy(mine, y) if bad else parallel.linear_cross_entropy(hidden, head[part], y)
    with pytest.raises(TypeError, match="rank 0: inplace is an option of cross_entropy"):
        parallel.linear_cross_entropy(hidden, head[part], y, inplace=True)
    with pytest.raises(lsk.ArgumentError, match=r"rank 0: input must be of shape \(N, D\)"):
        parallel.linear_cross_entropy(hidden[0], head[part], y[0], grad_reduce="scatter")
    for name in ("weight", "smoothing"):
        learnt = torch.full((4,), 0.1, requires_grad=True)
        refused(
            lsk.ArgumentError,
            f"rank 0: {name} must not require a gradient",
            mine,
            y,
            label_smoothing=0.1,
            **{name: learnt},
        )
    torch.testing.assert_close(parallel.cross_entropy(mine, y), lsk.cross_entropy(x, y))  # nothing is left behind


def _bad(rank: int) -> None:
    x, y, hidden, head = draw(8, torch.float32)
    part = slice(4 * rank, 4 * rank + 4)
    mine, bad = x[:, part], rank == 1
    refused(
        lsk.ArgumentError, "rank 1: num_classes must be the number of classes", mine, y, num_classes=8.0 if bad else 8
    )
    refused(TypeError, "rank 1: input must be a Tensor, got list", [1.0] if bad else mine, y)
    if not bad:
        refused(lsk.ArgumentError, r"rank 1: (a long text, ){100}", mine, y)
    else:
        with pytest.raises(lsk.ArgumentError, match="a long text"), ranks.told(dist.group.WORLD, mine):
            raise lsk.ArgumentError("a long text, " * 1000)
    refused(lsk.ArgumentError, "rank 1: label_smoothing must be a finite", mine, y, label_smoothing=3.0 if bad else 0.1)
    refused(
        TypeError,
        "rank 1: parallel.cross_entropy.. got an unexpected keyword argument 'smothing'; did you mean 'smoothing'",
        mine,
        y,
        **({"smothing": 1} if bad else {}),
    )
    for value, match in (
        (1.0, "smoothing must be a prior that sums to 1, got one that sums to 8:"),
        (-0.125 if rank else 0.125, "rank 1: smoothing must be a prior whose entries are all >= 0, got -0.125"),
    ):
        prior = torch.full((4,), value)
        refused(lsk.ArgumentError, match, mine, y, label_smoothing=EPS, smoothing=prior)
        with pytest.raises(lsk.ArgumentError, match=match):
            parallel.linear_cross_entropy(hidden, head[part], y, label_smoothing=EPS, smoothing=prior)
    given = conventions.hugging_face(0.1)
    torch.testing.assert_close(
        parallel.linear_cross_entropy(hidden, head[part], y, **given),
        lsk.linear_cross_entropy(hidden, head, y, **given),
    )
    with pytest.raises(lsk.ArgumentError, match=r"rank 0: class_dim must be one of \[-1, 1\]"):
        parallel.linear_cross_entropy(hidden, head[part], y, class_dim=0)
    with pytest.raises(lsk.ArgumentError, match="group must be a process group"):
        parallel.cross_entropy(mine, y, group="tensor parallel")
    torch.testing.assert_close(parallel.cross_entropy(mine, y), lsk.cross_entropy(x, y))  # nothing is left behind


def _changed(rank: int) -> None:
    """What changes between forward and backward is noticed, and the caller's checkpoint gives what the call gave."""
    x, y, hidden, head = draw(8, torch.float32)
    part = slice(4 * rank, 4 * rank + 4)
    for name in ("weight", "smoothing", "target"):
        own = {"weight": torch.ones(4), "smoothing": torch.full((4,), 0.125), "target": y.clone()}
        leaf, head_leaf = (t.clone().requires_grad_() for t in (x[:, part], head[part]))
        options = {k: v for k, v in own.items() if k != "target"} | {"label_smoothing": EPS}
        logits = parallel.cross_entropy(leaf, own["target"], **options)
        rows = parallel.linear_cross_entropy(hidden, head_leaf, own["target"], reduction="none", **options)
        own[name].mul_(0)
        for loss in (logits, rows.sum()):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
    grads = []
    for run in (
        parallel.linear_cross_entropy,
        functools.partial(checkpoint, parallel.linear_cross_entropy, use_reentrant=False),
    ):
        leaf = head[part].clone().requires_grad_()
        grads += torch.autograd.grad(run(hidden, leaf, y, label_smoothing=EPS), leaf)
    assert torch.equal(*grads)
    nothing = parallel.linear_cross_entropy(hidden[:0], head[part].clone().requires_grad_(), y[:0])
    assert nothing.isnan()
    masked = torch.full((1, 4), -torch.inf)
    assert parallel.cross_entropy(masked, y[:1] * 0, label_smoothing=1.0, return_stats="all")[0].isnan()
    assert not ranks._agreed.get(dist.group.WORLD), "nothing is kept where looking costs nothing"


def test_changes_between_forward_and_backward(tmp_path: Path) -> None:
    spawn(_changed, 2, tmp_path)


@pytest.mark.parametrize("run", [_disagree, _bad])
def test_ranks_that_disagree_all_say_so(run: Any, tmp_path: Path) -> None:
    spawn(run, 2, tmp_path)


def _traffic(rank: int) -> None:
    """Messages of others on the same group, before, between and behind; a subgroup; a compiled caller."""
    x, y, hidden, head = draw(8, torch.float32)
    part = slice(4 * rank, 4 * rank + 4)
    mine = x[:, part].clone().requires_grad_()
    buffer, before = torch.full((1000,), float(rank + 1)), parallel.token_count(y)
    work = dist.all_reduce(buffer, async_op=True)
    loss = parallel.cross_entropy(mine, y, label_smoothing=EPS, normalizer=before)
    head_loss = parallel.linear_cross_entropy(hidden, head[part], y, chunk_rows=2)
    work.wait()
    assert buffer.eq(3).all()
    assert before == 22
    torch.testing.assert_close(loss, lsk.cross_entropy(x, y, label_smoothing=EPS, normalizer=22))
    torch.testing.assert_close(head_loss, lsk.linear_cross_entropy(hidden, head, y))
    alone = [dist.new_group([r]) for r in range(2)][rank]
    torch.testing.assert_close(parallel.cross_entropy(x, y, group=alone), lsk.cross_entropy(x, y))
    compiled = torch.compile(lambda x: parallel.cross_entropy(2 * x, y, label_smoothing=EPS), backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(mine), mine)
    want = x.clone().requires_grad_()
    (want_grad,) = torch.autograd.grad(lsk.cross_entropy(2 * want, y, label_smoothing=EPS), want)
    torch.testing.assert_close(grad, want_grad[:, part])


def test_other_traffic(tmp_path: Path) -> None:
    spawn(_traffic, 2, tmp_path)


def _one_dies(rank: int) -> None:
    x, y, *_ = draw(8, torch.float32)
    mine = x[:, 4 * rank : 4 * rank + 4]
    parallel.cross_entropy(mine, y)
    if rank == 1:
        os._exit(0)
    with pytest.raises(RuntimeError):
        parallel.cross_entropy(mine, y)
    os._exit(0)  # the group cannot be left in order


def test_a_rank_that_dies_is_noticed(tmp_path: Path) -> None:
    spawn(_one_dies, 2, tmp_path, seconds=10)


def _messages(rank: int) -> None:
    x, y, *_ = draw(8, torch.float32)
    sent: list[Tensor] = []
    real = ranks.all_gather

    def counting(tensor: Tensor, group: Any) -> Any:
        sent.append(tensor)
        return real(tensor, group)

    ranks.all_gather = counting  # type: ignore[assignment]
    mine = x[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
    for given, numbers in (({}, 3), ({"label_smoothing": EPS}, 4), ({"label_smoothing": EPS, "z_loss": 0.1}, 4)):
        sent.clear()
        parallel.cross_entropy(mine, y, **given).backward()  # type: ignore[arg-type]
        assert [(t.shape, t.dtype) for t in sent[1:]] == [((numbers, N), torch.float32)]
        assert sent[0].dtype == torch.uint8  # the facts


def test_the_figures_on_paper() -> None:
    """Bytes by hand: 8 ranks, 100 rows; and that one message up to MANY ranks is not slower than two."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    paper = importlib.import_module("bench.ranks")
    (gather,) = paper.messages(paper.OURS, 8, 100)
    assert gather == (3, 16 * 100 * 7)
    assert paper.messages(paper.THREE, 8, 100) == [(6, 2 * 400 * 7 / 8)] * 3
    scatter, spread = paper.messages(paper.OURS, 32, 100)
    assert scatter.received + spread.received == pytest.approx(64 * 100 * 31 / 32)
    for size in (32, 64, 1024):
        once, twice = (
            sum(m.seconds(paper.NETWORK) for m in paper.messages(who, size, 8192))
            for who in (paper.OURS_ONCE, paper.OURS)
        )
        assert twice < once
    assert paper.paper(8192, 262_144) in (paper.results.ROOT / "docs" / "ranks.md").read_text()


def test_one_message_of_a_few_numbers_per_row(tmp_path: Path) -> None:
    spawn(_messages, 2, tmp_path)


def test_without_a_group() -> None:
    with pytest.raises(lsk.ArgumentError, match=r"torch\.distributed has none: call init_process_group"):
        parallel.cross_entropy(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
