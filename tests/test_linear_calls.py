"""The fused linear + loss: what it refuses, and how it is cut into chunks."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from heads import EPS, operands
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize, prune, spectral_norm

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends
from labelsmooth_kernels.chunked import How, Problem, RowCall, Soft, rows_per_chunk

if TYPE_CHECKING:
    from cases import Place


def test_bad_arguments_are_named() -> None:
    hidden, weight, bias, y = operands(6, 8, 30, ("cpu", "cpu"))

    def refused(match: str, kind: type[Exception] = lsk.ArgumentError, target: Any = y, **options: Any) -> None:
        h, w = options.pop("hidden", hidden), options.pop("linear_weight", weight)
        with pytest.raises(kind, match=match):
            lsk.linear_cross_entropy(h, w, target, **options)

    refused(r"linear_weight must end in the 8 features of input, got \(30, 9\)", linear_weight=torch.rand(30, 9))
    refused(r"linear_bias must have shape \(30,\), got \(29,\)", linear_bias=bias[:29])
    refused("linear_weight must have the dtype of input, torch.float32", linear_weight=weight.double())
    refused(r"target must have shape \(6,\), or \(6, 30\) for class probabilities.*got \(5,\)", target=y[:5])
    refused("chunk_rows must be an int > 0 or None, got 0", chunk_rows=0)
    refused("grad_accumulation must be 'float32' or 'input', got 'bf16'", grad_accumulation="bf16")
    refused("method must be 'chunked' or 'tiled', got 'best'", method="best")
    refused("filter_eps is for method='tiled'", filter_eps=0.0)
    refused("method='tiled' cannot serve this call: backend .* has no tiled kernels", method="tiled")
    refused("inplace is an option of cross_entropy", TypeError, inplace=True)
    refused(r"class_dim must be one of \[-1, 1\], where a head .* got 0", class_dim=0)
    refused(r"class_dim must be one of \[1\], where a head .* got -1", class_dim=-1, target=y[:, None],
            linear_weight=weight[:, None])  # fmt: skip
    with pytest.raises(lsk.ArgumentError, match=r"class_dim must be one of \[-1\]"):
        lsk.LinearCrossEntropyLoss(8, 30, class_dim=1)
    with pytest.raises(TypeError, match="inplace is an option of cross_entropy"):
        lsk.LinearCrossEntropyLoss(8, 30, inplace=True)
    refused("unexpected keyword argument 'epsilon'", TypeError, epsilon=0.1)
    refused("linear_weight must be a Tensor, got list", TypeError, linear_weight=[1.0])
    refused("target must be a Tensor, TopK or Teacher, got str", TypeError, target="yes")
    refused("input must have one of the dtypes", NotImplementedError, hidden=torch.ones(6, 8, dtype=torch.int64))
    refused("linear_weight must be of shape", linear_weight=weight[0])
    refused("target.indices must be .* 'k'", target=lsk.TopK(y, torch.rand(6)))
    refused(r"target.indices must be in \[0, 30\), got 30", IndexError,
            target=lsk.TopK(torch.full((6, 1), 30), torch.rand(6, 1)))  # fmt: skip
    refused("target.linear_weight must be", target=lsk.Teacher(torch.rand(6, 5), torch.rand(30, 4)))
    refused("target.probabilities must not require a gradient",
            target=lsk.TopK(torch.zeros(6, 1, dtype=torch.int64), torch.rand(6, 1).requires_grad_()))  # fmt: skip


@pytest.mark.parametrize("bad", [30, -1, 2**40])
def test_r35_a_target_outside_is_named_by_its_own_row(fast_place: Place, bad: int) -> None:
    hidden, weight, _, y = operands(9, 8, 30, fast_place)
    y = y.clamp_min(0)
    y[7] = bad
    call = {"chunk_rows": 4, "backend": fast_place[0], "label_smoothing": EPS, "reduction": "none"}
    if fast_place[1] == "cpu":
        with pytest.raises(IndexError, match=f"got {bad} in row 7"):
            lsk.linear_cross_entropy(hidden, weight, y, **call)
        return
    loss = lsk.linear_cross_entropy(hidden, weight, y, **call)
    assert loss.isnan().tolist() == [i == 7 for i in range(9)]


@pytest.mark.parametrize(
    ("n", "rows", "dtype", "wanted", "wide"),
    [
        (2048 + 128, 2048 + 128, torch.bfloat16, True, True),
        (2048 + 129, 1104, torch.bfloat16, True, True),
        (2048 + 128, 1088, torch.bfloat16, False, True),  # no gradient of the weight, no sum
        (2048 + 128, 1088, torch.float32, True, True),  # the float32 sum is the gradient itself
        (2048 + 128, 1088, torch.bfloat16, True, False),  # summed in bfloat16
    ],
)
def test_whole_logits_where_the_sum_of_chunks_is_larger(
    n: int, rows: int, dtype: torch.dtype, wanted: bool, wide: bool
) -> None:
    """On a GPU, which fake tensors stand for: D = 64, a bfloat16 GEMM, so up to 2,048 + 128 rows."""
    with FakeTensorMode():
        hidden = torch.empty(n, 64, dtype=torch.bfloat16, device="cuda")
        weight, target = torch.empty(1000, 64, dtype=dtype, device="cuda"), torch.empty(n, dtype=torch.int64)
        call = RowCall(target, None, None, EPS, None, None, -100, False, False, 0.0, 0.0, 1.0, None)
        how = How("triton", torch.bfloat16, 1, 0, wide, False, [True, wanted, True])
        assert Problem((hidden, weight, None), call, Soft(), how).rows == rows


def test_the_plan_of_chunks(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_per_chunk(2048, 4 * 32000, "cpu") == 352
    assert rows_per_chunk(2048, 4 * 10**6, "cpu") <= 2**30 / (4 * 10**6)
    assert rows_per_chunk(600, 4 * 32000, "cpu") == 304, "two even chunks, not 384 and 216"
    assert rows_per_chunk(2048, 4 * 32000, "cpu", 100) == 100
    assert rows_per_chunk(8192, 2 * 128256, "cuda") == 2048
    sum_bytes = 4 * 4096 * 128256  # of d_weight; whole logits are smaller than it and a chunk up to 2048 + 2·D rows
    assert rows_per_chunk(2048 + 8192, 2 * 128256, "cuda", sum_bytes=sum_bytes) == 2048 + 8192
    assert rows_per_chunk(2049 + 8192, 2 * 128256, "cuda", sum_bytes=sum_bytes) <= 2048
    assert rows_per_chunk(8192, 2 * 128256, "cuda", 1024, sum_bytes) == 1024
    assert rows_per_chunk(0, 4, "cpu") == 1
    monkeypatch.setenv("LABELSMOOTH_DEBUG", "1")
    hidden, weight, _, y = operands(9, 8, 30, ("cpu", "cpu"))
    lsk.linear_cross_entropy(hidden, weight, y, chunk_rows=4, skip_ignored=False)
    if backends.BACKENDS["cpu"].unavailable() is None:
        assert "9 x 30 logits of torch.float32 in chunks of 4 rows" in capfd.readouterr().err


class LowRank(nn.Module):
    """What an adapter adds to a weight: as a parametrization of it, or beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.weight, self.bias, self.in_features = [base], base.weight, base.bias, base.in_features
        self.down = nn.Parameter(torch.full((2, base.in_features), 0.1))
        self.up = nn.Parameter(torch.full((base.out_features, 2), 0.1).cumsum(0))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape == self.weight.shape:
            return x + self.up @ self.down
        return self.base[0](x) + x @ self.down.T @ self.up.T


class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CalledTwice(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)  # type: ignore[no-any-return]


class Named(nn.Linear):
    """Plain under another name."""


def double(module: nn.Module, x: Any, result: Tensor) -> Tensor:
    return 2 * result


def hooked(linear: nn.Linear, register: str, hook: Any) -> nn.Linear:
    getattr(linear, register)(hook)
    return linear


def replaced(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: 2 * nn.Linear.forward(linear, x)  # type: ignore[method-assign]
    return linear


ADAPTED: dict[str, Any] = {
    "LowRank with a forward of its own": LowRank,
    "Twice with a forward of its own": lambda linear: Twice(8, 30),
    "CalledTwice with a __call__ of its own": lambda linear: CalledTwice(8, 30),
    "Linear with a forward of its own": replaced,
    "Sequential with a forward of its own": nn.Sequential,
    "one with the hook double": lambda linear: hooked(linear, "register_forward_hook", double),
    "one with the hook": lambda linear: hooked(linear, "register_full_backward_hook", lambda m, g, h: None),
    "one with the hook L1Unstructured": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "one with the hook SpectralNorm": spectral_norm,
}


@pytest.mark.parametrize("reason", ADAPTED)
def test_a_head_that_computes_more_is_refused(reason: str) -> None:
    hidden, _, _, y = operands(6, 8, 30, ("cpu", "cpu"))
    loss = lsk.LinearCrossEntropyLoss(8, 30)
    loss.linear = ADAPTED[reason](loss.linear)
    with pytest.raises(lsk.ArgumentError, match=f"linear must be an nn.Linear.* got {reason}.*parametrize"):
        loss(hidden, y)


def test_heads_that_are_plain_or_parametrized() -> None:
    """The adapter that is refused as a module is served as a parametrization, with its gradient."""
    hidden, _, _, y = operands(6, 8, 30, ("cpu", "cpu"))
    loss = lsk.LinearCrossEntropyLoss(8, 30, bias=True, label_smoothing=EPS)
    loss.linear = Named(8, 30)
    adapter = LowRank(loss.linear)
    want = lsk.cross_entropy(adapter(hidden), y, label_smoothing=EPS)
    parametrize.register_parametrization(loss.linear, "weight", adapter)
    got = loss(hidden, y)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, (adapter.down, adapter.up)) for v in (got, want)))
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(hidden, y), want)


def test_targets_are_pickled_by_name_and_found_where_they_were() -> None:
    """Pickles of before name ``labelsmooth_kernels.linear``."""
    for kind in (lsk.TopK, lsk.Teacher):
        assert getattr(lsk.linear, kind.__name__) is kind
        copy = pickle.loads(pickle.dumps(kind(torch.zeros(2, 1), torch.ones(2, 1))))
        assert type(copy) is kind
