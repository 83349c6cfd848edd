"""The fused linear + loss under autograd, torch.compile, autocast, checkpointing, DDP; its memory and its operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import EMULATED, skip_unless_available
from heads import EPS, grads_of, head_loss, operands
from sharded import needs_gloo, spawn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from tracing import Trap, allocated, compiled, compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import chunked, torch_state

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cases import Place


def pair(place: Place, y: Tensor, **options: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Our loss of (hidden, weight, bias) in chunks of 4, and PyTorch's."""
    call = {"label_smoothing": EPS, **options}
    return (
        lambda h, w, b: lsk.linear_cross_entropy(h, w, y, linear_bias=b, chunk_rows=4, backend=place[0], **call),
        lambda h, w, b: head_loss(h, w, y, linear_bias=b, **call),
    )


def assert_same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_in_float64(reduction: str) -> None:
    """First and second ones, against finite differences."""
    *leaves, y = operands(5, 3, 7, ("cpu", "cpu"), torch.float64)
    for options in ({}, {"softcap": 3.0, "z_loss": 0.1, "smoothing": "others", "weight": torch.rand(7).double()}):
        ours, _ = pair((None, "cpu"), y, reduction=reduction, **options)  # type: ignore[arg-type]
        assert torch.autograd.gradcheck(ours, leaves)
        assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("target", ["top-k", "teacher", "positions"])
def test_second_derivatives_of_other_targets(target: str) -> None:
    hidden, weight, _, y = operands(5, 3, 8, ("cpu", "cpu"), torch.float64)
    given: Any = lsk.TopK(y.clamp_min(0)[:, None], torch.rand(5, 1).double())
    if target == "teacher":
        given = lsk.Teacher(torch.rand(5, 2).double(), torch.rand(8, 2).double())
    if target == "positions":
        weight, given = weight.detach().view(4, 2, 3).requires_grad_(), y[:, None].clamp(0, 3).expand(5, 2)
    loss = lambda h, w: lsk.linear_cross_entropy(h, w, given, label_smoothing=EPS, chunk_rows=2)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradgradcheck(loss, (hidden, weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backwards_that_repeat(fast_place: Place, reduction: str) -> None:
    """A retained graph with other upstreams, the graph of a gradient, and a second backward without either."""
    *leaves, y = operands(9, 8, 30, fast_place)
    ours, theirs = pair(fast_place, y, reduction=reduction)
    loss, want = ours(*leaves), theirs(*leaves)
    for scale in (1.0, 3.0, 0.5):
        upstream = torch.full_like(loss, scale)
        got = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        assert_same(got, torch.autograd.grad(want, leaves, upstream, retain_graph=True))
    got = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(want.sum(), leaves, create_graph=True)
    assert_same(got, expected)
    second, expected = ([g.square().sum() for g in grads] for grads in (got, expected))
    assert_same(grads_of(torch.stack(second), leaves), grads_of(torch.stack(expected), leaves))
    loss = ours(*leaves).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_torch_func(place: Place) -> None:
    """grad and vmap take the unfused path, as the docstring says."""
    *leaves, y = operands(9, 8, 30, place)
    ours, theirs = pair(place, y)
    got, want = (torch.func.grad(f, argnums=(0, 1, 2))(*(t.detach() for t in leaves)) for f in (ours, theirs))
    assert_same(got, want)
    hidden = torch.stack([leaves[0].detach()] * 2)
    got, want = (torch.func.vmap(torch.func.grad(f), (0, None, None))(hidden, *leaves[1:]) for f in (ours, theirs))
    assert_same(got, want)


# ---- compilers


@pytest.mark.thin
@compiler
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_r24_compiled_as_eager(fast_place: Place, reduction: str, dynamic: bool) -> None:
    """256 rows, a random ignore mask; no graph break, static and dynamic, forward and backward."""
    n = 256 if fast_place not in EMULATED else 20  # an emulation takes a second for a hundred rows
    *leaves, y = operands(n, 32, 64, fast_place)
    y = torch.where(torch.rand(n, generator=torch.Generator().manual_seed(0)).to(y.device) < 0.3, -100, y)
    call = {"reduction": reduction, "label_smoothing": EPS, "chunk_rows": n // 4, "backend": fast_place[0]}
    loss = lambda h, w, b, y: lsk.linear_cross_entropy(h, w, y, linear_bias=b, **call)  # noqa: E731
    want, got = loss(*leaves, y), compiled(loss, dynamic=dynamic)[0](*leaves, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads_of(got, leaves), grads_of(want, leaves))


@pytest.mark.claims.with_args(lambda fast_place: {"inductor"})  # what it rearranges is around the operators
@compiler
def test_compiled_by_inductor(fast_place: Place) -> None:
    *leaves, y = operands(9, 8, 30, fast_place)
    ours, _ = pair(fast_place, y)
    step = lambda h, w, b: ours(h * 2, w, b) * 3  # noqa: E731
    torch._dynamo.reset()
    leaves[0] = leaves[0].detach().t().contiguous().t().requires_grad_()  # strides that gradients do not take over
    got, want = torch.compile(step, fullgraph=True)(*leaves), step(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads_of(got, leaves), grads_of(want, leaves))


@compiler
def test_nothing_recompiles(fast_place: Place) -> None:
    """Not another ε, not other ignored rows, no other normaliser, not another N."""

    def loss(h: Tensor, w: Tensor, y: Tensor, eps: Tensor, normalizer: Tensor) -> Tensor:
        call = {"label_smoothing": eps, "normalizer": normalizer, "chunk_rows": 4, "backend": fast_place[0]}
        return lsk.linear_cross_entropy(h, w, y, **call)

    f, graphs = compiled(loss, dynamic=True)
    counts = []
    for n, eps in ((6, 0.1), (9, 0.3), (9, 0.05), (17, 0.2)):
        hidden, weight, _, y = operands(n, 8, 30, fast_place)
        numbers = (torch.tensor(v, device=y.device) for v in (eps, n + 0.5))
        call = (hidden, weight, y, *numbers)
        torch.testing.assert_close(f(*call), loss(*call))
        counts.append(graphs.frame_count)
    assert counts == counts[:1] * len(counts)


@compiler
def test_export_of_an_evaluation_loss(fast_place: Place) -> None:
    """With a number of rows that is not known."""
    head = lsk.LinearCrossEntropyLoss(8, 30, label_smoothing=EPS, chunk_rows=4, backend=fast_place[0])
    head = head.to(fast_place[1]).eval()
    (hidden, _, _, y), (more, _, _, others) = (operands(n, 8, 30, fast_place) for n in (9, 14))
    rows = torch.export.Dim("rows", min=2)
    with torch.no_grad():
        exported = torch.export.export(head, (hidden, y), dynamic_shapes=({0: rows}, {0: rows}))
        torch.testing.assert_close(exported.module()(more, others), head(more, others))
    assert any("chunked_forward" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize("method", ["chunked", "tiled"])
def test_no_step_waits_for_the_device(fast_place: Place, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the operators, and in the host code of the chunked ones, whose row kernels the trap sees as one call."""
    if method == "tiled" and fast_place[0] != "triton":
        pytest.skip("a method of the Triton backend")
    monkeypatch.setattr(torch_state, "recorded", lambda: True)  # the CPU looks at ε and the targets, a GPU does not
    monkeypatch.setattr(chunked, "check_index_targets", lambda *_: None)
    *leaves, y = operands(9, 8, 30, fast_place)
    eps = torch.tensor(EPS, device=y.device)
    call = {"label_smoothing": eps, "skip_ignored": False, "method": method, "backend": fast_place[0]}
    with Trap():
        loss = lsk.linear_cross_entropy(*leaves[:2], y, linear_bias=leaves[2], reduction="none", **call)
        loss.backward(torch.full_like(loss, 0.37))
    row = (y, None, None, EPS, None, torch.ones(9, device=y.device), -100, False, False, 0.0, 0.0, 1.0, None)
    how = (None, None, None, 1.0, fast_place[0], torch.float32, 1, 4, True)
    parameters = [t.detach() for t in leaves]
    with Trap():
        _, saved, *_ = chunked.forward(*parameters, *row, *how, False, [True] * 3, 0)
        chunked.backward(*parameters, *row, *how, False, [True] * 3, saved)
    with Trap(), pytest.raises(AssertionError, match="nonzero synchronises"):
        chunked.forward(*parameters, *row, *how, True, [True] * 3, 0)


@pytest.mark.parametrize("wanted", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_opcheck(fast_place: Place, name: str, dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    """Schema, fake implementation and tracing of the chunked operators."""
    op = getattr(torch.ops.labelsmooth_kernels, f"chunked_{name}").default
    *leaves, y = (t.detach() for t in operands(9, 8, 30, fast_place))
    row = (y, None, None, EPS, None, torch.rand(9, device=y.device), -100, False, False, 0.0, 0.0, 1.0, None)
    how = (None, None, None, 1.0, fast_place[0], dtype, 1, 4, True, False, list(wanted))
    saved = torch.stack([torch.randn(9), torch.rand(9) + 1, torch.ones(9), torch.full((9,), 30.0)])
    last = 1 if name == "forward" else saved.to(y.device)
    torch.library.opcheck(op, (*leaves, *row, *how, last))


# ---- mixed precision, checkpoints, processes


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_r36_autocast_with_float32_parameters(place: Place, reduction: str) -> None:
    """GEMMs in bfloat16, gradients of parameters in float32 and never rounded to bfloat16 as a whole."""
    *leaves, y = operands(21, 8, 130, place)
    ours, theirs = pair(place, y, reduction=reduction)
    with torch.autocast(place[1], torch.bfloat16):
        loss, want = ours(*leaves), theirs(*leaves)
    assert loss.dtype == torch.float32
    got, expected = grads_of(loss, leaves), grads_of(want, leaves)
    exact = grads_of(theirs(*leaves), leaves)
    for g, w, e in zip(got, expected, exact, strict=True):
        assert g.dtype == torch.float32
        assert (g - e).abs().max() <= 2 * (w - e).abs().max() + 2**-8 * e.abs().max()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(fast_place: Place, use_reentrant: bool) -> None:
    *leaves, y = operands(9, 8, 30, fast_place)
    ours, _ = pair(fast_place, y)
    loss = checkpoint(ours, *leaves, use_reentrant=use_reentrant)
    loss.backward()
    for leaf, want in zip(leaves, torch.autograd.grad(ours(*leaves), leaves), strict=True):
        assert torch.equal(leaf.grad, want)


def test_fp16_under_a_loss_scale_keeps_the_floor(fast_place: Place) -> None:
    """Upstream 65536 and a mean: the ε/K floor of each class's gradient survives, and nothing overflows."""
    n, k = 16, 4096
    hidden = torch.eye(n, dtype=torch.float16, device=fast_place[1])
    weight = torch.zeros(k, n, dtype=torch.float16, device=fast_place[1])
    y = torch.arange(n, device=fast_place[1])
    weight[y, y] = 16.0  # sure of the target: elsewhere p is nothing and the gradient is -ε/K
    weight.requires_grad_()
    loss = lsk.linear_cross_entropy(hidden, weight, y, label_smoothing=EPS, backend=fast_place[0], chunk_rows=8)
    (grad,) = torch.autograd.grad(loss, weight, torch.full_like(loss, 65536.0))
    logits = weight.detach().t().double()
    want = (logits.softmax(-1) - EPS / k).t() * 65536 / n
    want[y, y] -= (1 - EPS) * 65536 / n
    assert ((grad.double() - want).abs() <= 2e-3 * want.abs() + 1e-7).all()


class Model(nn.Module):
    """A body and a head that holds its loss, which divides by the 16 rows of all processes, averaged over them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), lsk.LinearCrossEntropyLoss(8, 30, label_smoothing=EPS, chunk_rows=4)

    def forward(self, x: Tensor, y: Tensor, world: int) -> Tensor:
        return self.head(self.body(x), y, normalizer=16.0 / world)


def _gradients(model: nn.Module, rank: int, world: int) -> list[Tensor | None]:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 6, generator=rng), torch.randint(30, (16,), generator=rng)
    model(x[rank::world], y[rank::world], world).backward()
    return [parameter.grad for parameter in model.parameters()]


def _train(rank: int) -> None:
    both = _gradients(DistributedDataParallel(Model()), rank, 2)
    torch.testing.assert_close(both, _gradients(Model(), 0, 1))


@needs_gloo
@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """DistributedDataParallel averages over processes: the gradients of one process with all rows."""
    spawn(_train, 2, tmp_path)


# ---- memory


def peak(run: Callable[[], object], device: str) -> int:
    """The most bytes of torch's allocator in use while ``run`` runs, its results among them."""
    if device == "cuda":
        return allocated(run, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = run()
    del kept
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def _skip_emulated(place: Place) -> None:
    if place in EMULATED:
        pytest.skip("an emulation's time and memory are not the kernels'; what allocates is the same code")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "nothing"])
def test_memory_is_one_chunk(fast_place: Place, trained: str, reduction: str) -> None:
    """Beyond inputs and demanded gradients: one chunk of logits, a few numbers per row and class."""
    _skip_emulated(fast_place)
    n, d, k, rows = 256, 16, 2048, 32
    hidden, weight, _, y = (t.detach() for t in operands(n, d, k, fast_place))
    leaves = [t.requires_grad_() for t, name in ((hidden, "hidden"), (weight, "weight")) if trained in (name, "both")]
    call = {"label_smoothing": EPS, "reduction": reduction, "chunk_rows": rows, "backend": fast_place[0]}
    call["skip_ignored"] = False

    def run() -> object:
        loss = lsk.linear_cross_entropy(hidden, weight, y, **call)
        return torch.autograd.grad(loss, leaves, torch.ones_like(loss)) if leaves else loss

    run()
    chunk, demanded = 4 * rows * k, sum(t.nbytes for t in leaves)
    used = peak(run, fast_place[1])
    assert used >= chunk, "the measurement sees the chunk"
    assert used <= chunk + demanded + 256 * (n + rows * d) + 64 * k
    assert 4 * n * k > 4 * used or demanded, "whole logits would show"


def test_memory_of_the_sum_of_a_bfloat16_gradient(fast_place: Place) -> None:
    """In 24 bits on a CPU: a byte more than the gradient itself; in the dtype of the input nothing more."""
    skip_unless_available("cpu")
    _skip_emulated(fast_place)
    n, d, k, rows = 256, 64, 2048, 32
    hidden, weight, _, y = (t.detach() for t in operands(n, d, k, fast_place, torch.bfloat16))
    weight.requires_grad_()
    for accumulation, extra in (("float32", 1 if fast_place[1] == "cpu" else 4), ("input", 0)):
        call = {"chunk_rows": rows, "backend": fast_place[0], "grad_accumulation": accumulation, "skip_ignored": False}
        run = lambda: torch.autograd.grad(lsk.linear_cross_entropy(hidden, weight, y, **call), weight)  # noqa: B023, E731
        run()
        used = peak(run, fast_place[1])
        bound = 2 * rows * k + weight.nbytes + extra * k * d + 256 * (n + rows * d) + 64 * k
        assert used <= bound + min(chunked._PART_BYTES, 2 * k * d) * (extra > 0)


def test_sums_in_24_bits() -> None:
    """Twenty numbers of changing size: the sum is the nearest bfloat16, or in a few cases its neighbour."""
    skip_unless_available("cpu")
    rng = torch.Generator().manual_seed(0)
    add = torch.ops.labelsmooth_kernels.cpu_add_split_
    for n in (1, 7, 16, 1003):
        terms = (torch.randn(20, n, generator=rng) * 10 ** torch.randn(20, 1, generator=rng)).bfloat16()
        high, low = terms[0].clone(), torch.zeros(n, dtype=torch.uint8)
        for i in range(1, 20):
            add(high, low, terms[i], i == 19)
        want = terms.double().sum(0)
        size = terms.double().cumsum(0).abs().amax(0)
        assert ((high.double() - want).abs() <= 2**-8 * want.abs() + 20 * 2**-17 * size).all()
    special = torch.tensor([torch.nan, torch.inf, 3e38, -3e38, 0.0]).bfloat16()
    low = torch.zeros(5, dtype=torch.uint8)
    add(special, low, torch.tensor([1.0, 1.0, 3e38, -3e38, 0.0]).bfloat16(), False)
    add(special, low, torch.zeros(5).bfloat16(), True)
    torch.testing.assert_close(
        special.float(), torch.tensor([torch.nan, torch.inf, torch.inf, -torch.inf, 0.0]), equal_nan=True
    )
    torch.library.opcheck(add, (special.clone(), low, special, False))
    for bad, match in ((low, "must be bfloat16"), (special[:4], "one shape")):
        with pytest.raises(RuntimeError, match=match):
            add(special, low, bad, False)


def test_ignored_rows_cost_no_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 rows 30 are ignored: 10 reach the GEMMs where rows are skipped, which is the default on a CPU."""
    skip_unless_available("cpu")
    hidden, weight, _, y = operands(40, 8, 30, ("cpu", "cpu"))
    y = torch.where(torch.arange(40) % 4 == 0, y.clamp_min(0), -100)
    seen = []
    sound = chunked._product
    monkeypatch.setattr(chunked, "_product", lambda h, *more: (seen.append(len(h)), sound(h, *more))[1])
    lsk.linear_cross_entropy(hidden, weight, y)
    lsk.linear_cross_entropy(hidden, weight, y, skip_ignored=False)
    assert seen == [10, 40]
