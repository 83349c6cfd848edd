"""The tiled path through the public function: the chunked path's results, and what it refuses; its kernels' own tests
are in test_tiled."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import HAS_CUDA, skip_unless_available
from heads import EPS, grads_of, operands
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from tracing import compiled, compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

PLACE = ("triton", "cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def triton() -> None:
    skip_unless_available("triton")


def losses(leaves: list[Tensor], y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Of the tiled and of the chunked path."""
    call = {"linear_bias": leaves[2], "label_smoothing": EPS, "backend": "triton", **options}
    tiled = lsk.linear_cross_entropy(leaves[0], leaves[1], y, method="tiled", filter_eps=0.0, **call)
    return tiled, lsk.linear_cross_entropy(leaves[0], leaves[1], y, chunk_rows=8, **call)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "none": {"reduction": "none"},
    "options": {"smoothing": "others", "z_loss": 0.01, "logit_scale": 0.5, "reduction": "sum"},
    "tensors": {"weight": torch.rand(50), "label_smoothing": torch.rand(17), "row_weight": torch.rand(17)},
    "prior": {"smoothing": torch.full((50,), 1 / 50), "normalizer": torch.tensor(3.0)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiled_as_chunked(options: dict[str, Any]) -> None:
    *leaves, y = operands(17, 24, 50, PLACE)
    options = {n: v.to(PLACE[1]) if isinstance(v, Tensor) else v for n, v in options.items()}
    tiled, chunks = losses(leaves, y, **options)
    torch.testing.assert_close(tiled, chunks)
    torch.testing.assert_close(grads_of(tiled, leaves), grads_of(chunks, leaves), rtol=2e-5, atol=2e-6)


def test_tiled_statistics_and_second_derivatives() -> None:
    *leaves, y = operands(9, 8, 30, PLACE)
    (tiled, stats), (chunks, expected) = losses(leaves, y, return_stats=True)
    torch.testing.assert_close(stats[:4], expected[:4])
    seconds = []
    for loss in (tiled, chunks):
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    torch.testing.assert_close(*seconds)


def test_tiled_under_autocast() -> None:
    *leaves, y = operands(9, 8, 30, PLACE)
    with torch.autocast(PLACE[1], torch.bfloat16):
        tiled, chunks = losses(leaves, y)
    torch.testing.assert_close(tiled, chunks, rtol=1e-2, atol=1e-2)
    for got, want in zip(grads_of(tiled, leaves), grads_of(chunks, leaves), strict=True):
        assert got.dtype == torch.float32
        assert (got - want).abs().max() <= 0.03 * want.abs().max()


@compiler
def test_tiled_compiled_as_eager() -> None:
    *leaves, y = operands(9, 8, 30, PLACE)
    call = {"label_smoothing": EPS, "method": "tiled", "backend": "triton"}
    loss = lambda h, w, b, y: lsk.linear_cross_entropy(h, w, y, linear_bias=b, **call)  # noqa: E731
    got, want = compiled(loss)[0](*leaves, y), loss(*leaves, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads_of(got, leaves), grads_of(want, leaves))


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_opcheck(name: str) -> None:
    op = getattr(torch.ops.labelsmooth_kernels, f"tiled_{name}").default
    hidden, weight, bias, y = (t.detach() for t in operands(9, 8, 30, PLACE))
    row = (y, None, None, EPS, None, torch.rand(9, device=y.device), -100, False, False, 0.0, 0.0, 1.0, None)
    saved = torch.stack([torch.randn(9), torch.rand(9) + 1, torch.ones(9), torch.full((9,), 30.0)]).to(y.device)
    for last in (
        ((0,), (1,)) if name == "forward" else ((saved, 0.0, True, True, True), (saved, 1e-3, False, True, False))
    ):
        torch.library.opcheck(op, (hidden, weight, bias, *row, *last))


FIRST = [((7, 5), "triton"), ((8, 9), "triton"), ((9, 0), "cuda"), ((12, 0), "cuda")]


@pytest.mark.parametrize(("oldest", "first"), FIRST)
def test_the_order_of_backends_on_a_gpu(oldest: tuple[int, int], first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every backend works. CUDA C++ has no tiled kernels, Triton none of float64."""
    monkeypatch.setattr(backends.Backend, "unavailable", lambda self: None)
    monkeypatch.setattr(backends, "oldest_capability", lambda: oldest)
    choose = functools.partial(backends._choose.__wrapped__, "cuda")
    assert choose(torch.bfloat16, frozenset({"index target"}), None) == first
    assert choose(torch.bfloat16, frozenset({"index target"}) | backends.TILED, None) == "triton"
    assert choose(torch.float64, frozenset({"index target"}), None) == "cuda"
    assert choose(torch.bfloat16, frozenset({"gradient of label_smoothing"}), None) == "reference"


@pytest.mark.parametrize(("method", "needed"), [("tiled", backends.TILED), ("chunked", frozenset())])
def test_a_head_on_a_gpu_asks_for_tiles_where_it_needs_them(
    method: str, needed: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def select(rows: Any, more: frozenset[str] = frozenset()) -> Any:
        asked.append(more)
        raise LookupError("no kernel is run")

    monkeypatch.setattr(backends, "select", select)
    with FakeTensorMode():
        hidden, weight = (torch.empty(rows, 8, device="cuda") for rows in (6, 30))
        target = torch.empty(6, dtype=torch.int64, device="cuda")
        with pytest.raises(LookupError):
            lsk.linear_cross_entropy(hidden, weight, target, method=method)
    assert asked == [needed]


def test_the_tiled_path_says_what_it_refuses() -> None:
    hidden, weight, _, y = operands(6, 8, 30, PLACE)
    refused: list[tuple[str, Any, dict[str, Any]]] = [
        ("class indices, not soft targets", torch.rand(6, 30, device=PLACE[1]), {}),
        ("softcap", y, {"softcap": 5.0}),
        ("smooth_over='finite'", y, {"smooth_over": "finite", "label_smoothing": EPS}),
        ("return_stats='entropy'", y, {"return_stats": "entropy"}),
        ("confidence_penalty", y, {"confidence_penalty": 0.1}),
        ("backend 'reference' has no tiled kernels", y, {"backend": "reference"}),
    ]
    for match, target, options in refused:
        with pytest.raises(lsk.ArgumentError, match=match):
            lsk.linear_cross_entropy(hidden, weight, target, method="tiled", **{"backend": "triton", **options})
