"""The loss over ranks under torch.compile: one graph, whose operators are what ranks tell each other."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from covering import Mode
from sharded import EPS, D, draw, needs_gloo, of_rank, options, same_as_one, spawn
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import labelsmooth_kernels as lsk
from labelsmooth_kernels import fusing, parallel, ranks
from labelsmooth_kernels.autograd import row_arguments
from labelsmooth_kernels.parallel_linear import Head
from labelsmooth_kernels.parallel_rows import Where
from labelsmooth_kernels.spec import Rows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = needs_gloo
CUTS = (0, 5, 8)


def compiled(
    function: Callable[..., Any], dynamic: bool | None = None, backend: str = "aot_eager"
) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def _joined(k: int) -> dict[str, dict[str, Any]]:
    """Three calls with the options of all those of ``options``: a graph is given each of them in a way of its own."""
    given = options(k)
    names = ("class weights and prior", "z-loss and penalty", "scale and cap", "row and class weights", "normalizer")
    joined = functools.reduce(operator.or_, (given[name] for name in names))
    by_rows = given["none"] | {"smoothing": "others", "smooth_over": "finite"}
    return {"sum": given["sum"], "joined": joined, "by rows": by_rows}


def _same(rank: int) -> None:
    """Eager and compiled, forward and backward, to the bit."""
    part = slice(CUTS[rank], CUTS[rank + 1])
    x, y, hidden, head = draw(8, torch.float32)
    soft = x.softmax(1)[:, part]
    for name, given in (options(8) if Mode.whole else _joined(8)).items():
        if name == "class 0 ignored":
            continue
        mine = of_rank(given, part)
        targets = (y,) if name in ("plain", "sum", "others") else (y, soft)
        for target in targets:
            run = lambda x, t=target, mine=mine: parallel.cross_entropy(2 * x, t, return_stats=True, **mine)  # noqa: E731
            torch._dynamo.reset()
            results = []
            for call in (run, compiled(run)):
                leaf = x[:, part].clone().requires_grad_()
                loss, stats = call(leaf)
                results.append((loss, *stats[:4], *torch.autograd.grad(loss.sum(), leaf)))
            for eager, graph in zip(*results, strict=True):
                torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        run = lambda h, w, mine=mine: parallel.linear_cross_entropy(h.tanh(), w, y, chunk_rows=5, **mine)  # noqa: E731
        results = []
        for call in (run, compiled(run)):
            leaves = [t.clone().requires_grad_() for t in (hidden, head[part])]
            loss = call(*leaves)
            results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def _sizes(rank: int) -> None:
    """One graph for any number of rows, and for any ε; inductor."""
    part = slice(CUTS[rank], CUTS[rank + 1])
    x, y, hidden, head = draw(8, torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(
        lambda x, y, eps: parallel.cross_entropy(x, y, label_smoothing=eps),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    for n, eps in ((12, 0.1), (7, 0.2), (3, 0.05)):
        want = lsk.cross_entropy(x[:n], y[:n], label_smoothing=eps)
        torch.testing.assert_close(run(x[:n, part].clone(), y[:n].clone(), torch.tensor(eps)), want)
    assert counter.frame_count == (1 if torch.__version__ >= (2, 13) else 2)  # torch 2.11 takes two
    model = nn.Linear(D, D)
    loss = compiled(
        lambda h: parallel.linear_cross_entropy(model(h), head[part], y, label_smoothing=EPS), backend="inductor"
    )
    torch.testing.assert_close(loss(hidden), lsk.linear_cross_entropy(model(hidden), head, y, label_smoothing=EPS))
    with pytest.raises(IndexError, match=r"target must be in \[0, 8\)"):
        run(x[:, part], y.index_fill(0, torch.tensor([3]), 8), torch.tensor(EPS))
    with pytest.raises(lsk.ArgumentError, match="label_smoothing must be the same on all ranks"):
        run(x[:, part], y, torch.tensor(0.1 * rank))
    bad = torch.compile(
        lambda x: parallel.cross_entropy(x, y, label_smoothing=3.0 if rank else 0.1), backend="aot_eager"
    )
    with pytest.raises(lsk.ArgumentError, match="rank 1: label_smoothing must be"):
        bad(x[:, part])


def _fused(rank: int) -> None:
    """As on GPUs: the rows made of all ranks' numbers by a graph of their own, one for every ε; the same bits. Of the
    hundred operations inductor would make kernels of a GPU there, and takes 50 seconds to make some of a CPU here."""
    ranks.fuses = fusing.fuses = lambda device: True  # type: ignore[assignment]
    if not Mode.whole:
        fusing._compiled = functools.cache(lambda f: torch.compile(f, dynamic=True, backend="aot_eager"))  # type: ignore[assignment]
    part = slice(CUTS[rank], CUTS[rank + 1])
    x, y, hidden, head = draw(8, torch.float32)
    given = options(8)["class weights and prior"] | {"smooth_over": "finite"}
    mine = of_rank(given, part)
    for loss in (lsk.cross_entropy, lsk.linear_cross_entropy) if Mode.whole else (lsk.linear_cross_entropy,):
        if loss is lsk.cross_entropy:
            ours, leaves, local = parallel.cross_entropy, [x], [x[:, part]]
            of_mine = lambda grad: [grad[:, part]]  # noqa: E731
        else:
            ours = functools.partial(parallel.linear_cross_entropy, chunk_rows=4)
            leaves, local = [hidden, head], [hidden, head[part]]
            of_mine = lambda d_hidden, d_head: [d_hidden, d_head[part]]  # noqa: E731
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for eps in (0.1, 0.2, 0.3):
            full, own = ([t.clone().requires_grad_() for t in tensors] for tensors in (leaves, local))
            want = loss(*full, y, return_stats="all", **given | {"label_smoothing": eps})
            got = ours(*own, y, return_stats="all", **mine | {"label_smoothing": eps})
            want_grads = of_mine(*torch.autograd.grad(want[0], full))
            same_as_one("fused", got, want, torch.autograd.grad(got[0], own), want_grads, torch.float32)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs <= 3, "what is sent, the rows, the gradient's call"


def _trained(rank: int) -> None:
    """By inductor, whose every result must have the strides that were announced; and where one rank drops its own."""
    part = slice(CUTS[rank], CUTS[rank + 1])
    x, y, *_ = draw(8, torch.float32)
    by_row = torch.linspace(0, 0.5, len(y))
    for eps in (0.1, torch.tensor(0.1), by_row) if Mode.whole else (by_row,):
        grads = []
        for call in (parallel.cross_entropy, torch.compile(parallel.cross_entropy)):
            leaf = x[:, part].clone().requires_grad_()
            call(leaf, y, label_smoothing=eps).backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1])
    run = compiled(
        lambda x: parallel.cross_entropy(x, y) + 1 if rank == 0 else (parallel.cross_entropy(x, y), x.sum())[1]
    )
    run(x[:, part])
    many = compiled(lambda x, n: parallel.cross_entropy(x, y, normalizer=n))
    for n in range(1, 13):
        torch.testing.assert_close(many(x[:, part].clone(), n / 2), lsk.cross_entropy(x, y, normalizer=n / 2))
    with pytest.raises(lsk.ArgumentError, match="rank 1: label_smoothing must be finite"):
        compiled(lambda x, eps: parallel.cross_entropy(x, y, label_smoothing=eps))(
            x[:, part], torch.tensor(3.0 if rank else 0.1)
        )
    with pytest.raises(NotImplementedError, match=r"torch\.func and forward mode are not served"):
        torch.func.grad(lambda x: parallel.cross_entropy(x, y))(x[:, part])


def _operators(rank: int) -> None:
    """What PyTorch's own check of operators says, at one rank."""
    x, y, hidden, head = draw(8, torch.float64)
    group, ops = dist.new_group([0]), torch.ops.labelsmooth_kernels
    if rank == 1:
        return
    for weight in (None, torch.ones(8, dtype=torch.float64)):
        spec = lsk.LossSpec(
            label_smoothing=torch.full((len(y),), EPS).double(), weight=weight, return_stats=bool(weight is None)
        )
        rows = Rows(spec, x, y, weight, None, spec.label_smoothing, None)
        where = Where.of(rows, y.shape, group, 8, "reference")
        call = row_arguments(rows, None)
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(ops.sharded_forward.default, (x, *call, *where), test_utils=checks)
        how = Head(torch.float64, "all", 5, True, [True, True, False])
        for one_pass in (False, True):
            given = (hidden, head, None, *call, *where, None, *how, one_pass)
            torch.library.opcheck(ops.sharded_linear_forward.default, given, test_utils=checks)


def _mixed(rank: int) -> None:
    """One rank in a graph and one not agree."""
    part = slice(CUTS[rank], CUTS[rank + 1])
    x, y, *_ = draw(8, torch.float32)
    run = lambda x: parallel.cross_entropy(x, y, label_smoothing=EPS, normalizer=7.0)  # noqa: E731
    got = (compiled(run) if rank else run)(x[:, part])
    torch.testing.assert_close(got, lsk.cross_entropy(x, y, label_smoothing=EPS, normalizer=7.0))


def _dtensors(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    _, y, hidden, head = draw(16, torch.float32)
    layer = nn.Linear(D, 16, bias=False)
    layer.load_state_dict({"weight": head})
    parallelize_module(layer, mesh, ColwiseParallel(use_local_output=False))
    weight = distribute_tensor(head, mesh, [Shard(0)])
    want = lsk.linear_cross_entropy(hidden, head, y, label_smoothing=EPS)
    for run in (
        lambda h: lsk.cross_entropy(layer(h), y, label_smoothing=EPS),
        lambda h: lsk.linear_cross_entropy(h, weight, y, label_smoothing=EPS),
    ):
        torch.testing.assert_close(compiled(run)(hidden), want)


@pytest.mark.parametrize("run", [_same, _sizes, _trained, _operators, _fused, _mixed, _dtensors])
def test_one_graph(run: Callable[[int], None], tmp_path: Path) -> None:
    spawn(run, 2, tmp_path)
