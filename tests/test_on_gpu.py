"""What only a GPU has: CUDA graphs, streams, several devices, waiting. Parity there is the other tests' matter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from cases import draw
from conftest import HAS_CUDA

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel

if TYPE_CHECKING:
    from pathlib import Path

    from cases import Place

pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="needs an NVIDIA GPU")
SIZES = [(6, 37), (64, 1000), (3, 128_256), (3, 600_001), (300, 50_257)]  # warps, blocks, few rows, parts, edges


def step(place: Place, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = lsk.cross_entropy(x, y, label_smoothing=0.1, backend=place[0])
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def skip_cpu(place: Place) -> None:
    if place[1] != "cuda":
        pytest.skip("a backend of the CPU")


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_a_captured_step_replays_with_other_logits(fast_place: Place, n: int, k: int) -> None:
    skip_cpu(fast_place)
    x, y = draw(fast_place, n, k)
    x.requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Triton compiles, and allocators settle, outside the graph
        step(fast_place, x, y)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(fast_place, x, y)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for got, want in zip(results, step(fast_place, x, y), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_work_is_queued_on_the_current_stream(fast_place: Place, n: int, k: int) -> None:
    """The logits appear late, on a stream of their own."""
    skip_cpu(fast_place)
    x, y = draw(fast_place, n, k)
    want = step(fast_place, x.clone().requires_grad_(), y)
    late = torch.full_like(x, torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = step(fast_place, late.requires_grad_(), y)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(fast_place: Place) -> None:
    skip_cpu(fast_place)
    x, y = draw(fast_place, 6, 1000)
    want = step(fast_place, x.clone().requires_grad_(), y)
    got = step(fast_place, x.to("cuda:1").requires_grad_(), y.to("cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_ranks_do_not_wait_for_the_gpu(tmp_path: Path) -> None:
    """A group of one rank: with ``num_classes`` nothing is looked at after a first call like it."""
    if not torch.distributed.is_nccl_available():
        pytest.skip("torch is built without NCCL")
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x, y = torch.randn(64, 1000, device="cuda"), torch.randint(1000, (64,), device="cuda")
        hidden, head = torch.randn(64, 32, device="cuda"), torch.randn(1000, 32, device="cuda")

        def calls() -> list[torch.Tensor]:
            logits, layer = x.clone().requires_grad_(), head.clone().requires_grad_()
            losses = [
                parallel.cross_entropy(logits, y, label_smoothing=0.1, num_classes=1000),
                parallel.linear_cross_entropy(hidden, layer, y, label_smoothing=0.1, num_classes=1000),
            ]
            return [*losses, *torch.autograd.grad(sum(losses), (logits, layer))]

        calls()
        torch.cuda.set_sync_debug_mode("error")
        got = calls()
        torch.cuda.set_sync_debug_mode("default")
        logits, layer = x.clone().requires_grad_(), head.clone().requires_grad_()
        want = [
            lsk.cross_entropy(logits, y, label_smoothing=0.1),
            lsk.linear_cross_entropy(hidden, layer, y, label_smoothing=0.1),
        ]
        for mine, wanted in zip(got, [*want, *torch.autograd.grad(sum(want), (logits, layer))], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.distributed.destroy_process_group()
