"""Calls that the extension serves without Python: that they are those, and that nobody can tell but by the clock."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from direct_calls import EPS, NEEDS_EXTENSION, REDUCTIONS, SOFT, WEIGHT, X, Y, by_the_gate, close_the_gate, drawn
from drop_in import K, arguments
from rule import HALF, Problem, expect, judge_grad, judge_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import labelsmooth_kernels as lsk
from labelsmooth_kernels import direct, modules

DTYPES = (*HALF, torch.float32, torch.float64)
SHAPES = ((K,), (1, K), (9, K), (4, K, 3), (2, K, 3, 2), (2, K, 1, 2, 3))


pytestmark = NEEDS_EXTENSION


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    close_the_gate(monkeypatch)


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.movedim(min(1, tensor.dim() - 1), -1).reshape(-1, K)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["indices", "some ignored", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_pytorch_takes(shape: tuple[int, ...], kind: str, reduction: str, dtype: torch.dtype) -> None:
    """Every layout and target, with and without class weights, against float64."""
    x, y = arguments(shape, kind, "cpu")
    x, soft, acc = x.to(dtype), kind == "probabilities", torch.float64 if dtype == torch.float64 else torch.float32
    target = rows_of(y).to(acc) if soft else y.reshape(-1)
    n = len(target)
    for weight in (None, WEIGHT.to(dtype)):
        leaf = x.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, weight, reduction=reduction, label_smoothing=EPS)
        assert loss.dtype == acc
        assert loss.shape == F.cross_entropy(x.float(), y, reduction=reduction).shape
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=acc).view(loss.shape)
        loss.backward(upstream)
        assert leaf.grad is not None
        assert leaf.grad.stride() == leaf.stride()

        options = {"label_smoothing": EPS} | ({} if weight is None else {"weight": weight.to(acc)})
        problem, divisor = Problem(rows_of(x), target, options), 1.0
        if reduction == "mean":
            kept = torch.ones(n) if soft else torch.where(y == -100, 0.0, 1.0).reshape(-1)
            divisor = (kept if weight is None or soft else kept * weight.double()[target.clamp_min(0)]).sum().item()
        want = expect(problem, (upstream.double() / divisor).reshape(-1).expand(n))
        judge_loss(want, loss.detach().reshape(-1) if reduction == "none" else loss.detach(),
                   None if reduction == "none" else torch.ones(n), divisor)  # fmt: skip
        judge_grad(problem, want, rows_of(leaf.grad), 2 if dtype == torch.bfloat16 and reduction != "none" else 1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 100, 129, 300, 9000])
@pytest.mark.parametrize("n", [1, 5000])
def test_the_gate_computes_the_same(n: int, k: int, dtype: torch.dtype) -> None:
    """Many rows, whose sum is taken in blocks, and rows that other kernels serve."""
    if n * k > 2**21:
        n = 2**21 // k
    x, y = drawn(n, k, dtype)
    y[0] = 0
    for reduction in REDUCTIONS:
        results = []
        for loss_of in (lsk.cross_entropy, by_the_gate):
            leaf = x.clone().requires_grad_()
            loss = loss_of(leaf, y, label_smoothing=EPS, reduction=reduction)
            results.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaf)))
        (loss, grad), (want, want_grad) = results
        torch.testing.assert_close(loss, want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
        ulps = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
        tiny = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0
        torch.testing.assert_close(grad, want_grad, rtol=ulps, atol=max(tiny, 1e-7 * want_grad.abs().max().item()))


SAME: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    "rows apart": (X.repeat(1, 2)[:, :K], Y, {}),
    "classes apart": (X.t().contiguous().t(), Y, {}),
    "one row expanded": (X[:1].expand(9, K), Y, {}),
    "channels last": (X.view(3, K, 3, 1).to(memory_format=torch.channels_last), Y.clamp_min(0).view(3, 3, 1), {}),
    "targets apart": (X, Y.repeat_interleave(2)[::2], {}),
    "a whole number": (X, Y, {"label_smoothing": 0}),
    "sharpened": (X, Y, {"label_smoothing": -0.5}),
    "all of it": (X, Y, {"label_smoothing": 1.0}),
    "a class that is ignored": (X, Y.clamp_min(0), {"ignore_index": 3}),
    "all ignored": (X, torch.full((9,), -100), {}),
    "-inf": (X.masked_fill(torch.arange(K) == 2, -torch.inf), Y.clamp(0, 1), {}),
    "a row of nan": (X.masked_fill(torch.arange(9)[:, None] == 1, torch.nan), Y, {"reduction": "none"}),
    "weights of another dtype": (X, Y, {"weight": WEIGHT.double()}),
    "weights apart": (X, Y, {"weight": WEIGHT.repeat_interleave(2)[::2]}),
    "weights of 0 alone": (X, Y, {"weight": torch.zeros(K)}),
    "probabilities of another dtype": (X, SOFT.double(), {}),
    "probabilities and weights": (X, SOFT, {"weight": WEIGHT, "label_smoothing": EPS}),
}  # fmt: skip


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", SAME)
def test_odd_calls_are_the_same_calls(name: str) -> None:
    x, y, options = SAME[name]
    leaf = x.detach().requires_grad_()
    before = [t.clone() for t in (x, y)]
    loss = lsk.cross_entropy(leaf, y, **options)
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    want = by_the_gate(leaf, y, **options)
    (want_grad,) = torch.autograd.grad(want.sum(), leaf)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(grad, want_grad, rtol=1e-6, atol=1e-8, equal_nan=True)
    assert all(torch.equal(t.nan_to_num(0), b.nan_to_num(0)) for t, b in zip((x, y), before, strict=True))


class Subclass(Tensor):
    pass


class Seen(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


CALL: dict[str, Any] = {
    "input": X, "target": Y, "weight": None, "ignore_index": -100, "reduction": "mean", "eps": 0.0
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "a subclass": {"input": X.as_subclass(Subclass)},
    "targets of a subclass": {"target": Y.as_subclass(Subclass)},
    "a list": {"input": [1.0, 2.0]},
    "integers": {"input": Y[None]},
    "complex": {"input": X + 0j},
    "a view with the sign to come": {"input": torch.complex(X, X).conj().imag},
    "no dimension": {"input": torch.tensor(1.0), "target": torch.tensor(0)},
    "no rows": {"input": X[:0], "target": Y[:0]},
    "no classes": {"input": X[:, :0]},
    "sparse": {"input": X.to_sparse()},
    "another device": {"input": X.to("meta")},
    "int32 targets": {"target": Y.int()},
    "too few targets": {"target": Y[:-1]},
    "targets in a column": {"target": Y[:, None]},
    "probabilities that learn": {"target": SOFT.clone().requires_grad_()},
    "probabilities and a class to ignore": {"target": SOFT, "ignore_index": 1},
    "classes as integers": {"target": torch.ones(9, K, dtype=torch.int64)},
    "weights on another device": {"weight": WEIGHT.to("meta")},
    "weights that learn": {"weight": WEIGHT.clone().requires_grad_()},
    "too few weights": {"weight": WEIGHT[:-1]},
    "integer weights": {"weight": torch.ones(K, dtype=torch.int64)},
    "weights in a row": {"weight": WEIGHT[None]},
    "weights that are none": {"weight": 1.0},
    "a bool as ignore_index": {"ignore_index": True},
    "a float as ignore_index": {"ignore_index": 1.0},
    "more than 64 bits": {"ignore_index": 2**70},
    "another reduction": {"reduction": "max"},
    "a reduction that no encoding has": {"reduction": "\ud800"},
    "no reduction": {"reduction": None},
    "smoothing above 1": {"eps": 1.5},
    "smoothing just above 1": {"eps": math.nextafter(1.0, 2.0)},
    "smoothing that is no number": {"eps": float("nan")},
    "infinite smoothing": {"eps": -float("inf")},
    "a bool as smoothing": {"eps": True},
    "a tensor as smoothing": {"eps": torch.tensor(EPS)},
    "NumPy's smoothing": {"eps": np.float32(EPS)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_calls_are_left_to_the_gate(name: str) -> None:
    """And get its answer or its error, word for word."""
    given = {**CALL, **OTHERS[name]}
    assert direct.cross_entropy(**CALL) is not None
    assert direct.cross_entropy(**given) is None
    options = {"label_smoothing": given.pop("eps"), "ignore_index": given["ignore_index"]}
    options |= {"reduction": given["reduction"], "weight": given["weight"]}
    results: list[Any] = []
    for loss_of in (lsk.cross_entropy, by_the_gate):
        try:
            results.append(loss_of(given["input"], given["target"], **options))
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError) as error:
            results.append((type(error), str(error)))
    got, want = results
    if isinstance(want, Tensor):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    else:
        assert got == want


def test_a_mode_sees_the_operators() -> None:
    x = X.clone().requires_grad_()
    with Seen() as seen:
        lsk.cross_entropy(x, Y).backward()
    assert {"cpu_reduced", "cpu_scale_"} <= {*seen.names}
    assert "cpu_forward" not in seen.names


def test_nothing_is_served_while_pytorch_traces_or_transforms() -> None:
    """What transforms wrap and what tracers note are PyTorch's own operations, or autograd.Functions."""
    served: dict[str, bool] = {}

    def note(what: str, x: Tensor = X, weight: Tensor | None = None) -> Tensor:
        served[what] = direct.cross_entropy(**{**CALL, "input": x, "weight": weight}) is not None
        return x * 1

    with torch.device("cpu"):
        note("device")
    with forward_ad.dual_level():
        note("dual", forward_ad.make_dual(X, X))
        note("dual weight", X, forward_ad.make_dual(WEIGHT, WEIGHT))
    with FakeTensorMode(allow_non_fake_inputs=True):
        note("fake")
    torch.func.vmap(lambda x: note("vmap", x))(X[None])
    torch.func.grad(lambda x: note("grad", x).sum())(X)
    torch.func.jvp(lambda x: note("jvp", x), (X,), (X,))
    torch.jit.trace(lambda x: note("trace", x), (X,), check_trace=False)
    torch.compile(lambda x: note("compile", x), backend="eager")(X)
    make_fx(lambda x: note("make_fx", x))(X)
    assert len(served) == 10
    assert not any(served.values()), served


# ---- modules


@pytest.mark.usefixtures("alone")
def test_modules_are_served_alike() -> None:
    loss = lsk.CrossEntropyLoss(WEIGHT, label_smoothing=EPS, ignore_index=-1, reduction="sum")
    want = by_the_gate(X, Y.clamp_min(-1), weight=WEIGHT, label_smoothing=EPS, ignore_index=-1, reduction="sum")
    for module in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):
        torch.testing.assert_close(module(X, Y.clamp_min(-1)), want, rtol=1e-6, atol=0)
    plain = lsk.LabelSmoothingCrossEntropy(0.2)
    plain.label_smoothing = EPS
    torch.testing.assert_close(plain(X, Y), by_the_gate(X, Y, label_smoothing=EPS), rtol=1e-6, atol=0)


SQUARE = torch.arange(27.0).view(3, 3, 3).sin()  # the classes may be in the middle or last
CHANGES = {
    "z_loss": 0.5, "logit_scale": 2.0, "softcap": 1.0, "confidence_penalty": 0.1, "smoothing": "others",
    "smooth_over": "finite", "class_dim": -1, "inplace": True, "return_stats": True, "backend": "reference",
}  # fmt: skip


@pytest.mark.parametrize("name", [p for p in modules._DEFAULTS if p not in modules._OF_PYTORCH])
def test_a_module_whose_options_change_is_another_call(name: str) -> None:
    loss = lsk.CrossEntropyLoss(label_smoothing=EPS)
    x = SQUARE.masked_fill(torch.arange(3)[:, None] == 2, -torch.inf) if name == "smooth_over" else SQUARE.clone()
    y, change = torch.arange(9).view(3, 3) % 2, {name: CHANGES[name]}
    plain = loss(x, y)
    setattr(loss, name, CHANGES[name])
    want = lsk.cross_entropy(x.clone(), y, label_smoothing=EPS, **change)
    got = loss(x.clone().requires_grad_(name == "inplace") * 1, y)
    if name == "return_stats":
        assert isinstance(got, tuple)
    elif name == "inplace":
        assert "Loss" not in type(got.grad_fn).__name__, "the call that leaves the logits as they are"
    else:
        torch.testing.assert_close(got, want, rtol=0 if name != "backend" else 1e-6, atol=0)
        assert name == "backend" or not torch.equal(got, plain)


WRONG = {
    "z_loss": torch.zeros(2), "class_dim": 1.0, "logit_scale": True, "inplace": 0, "return_stats": 0,
    "backend": np.array("cpu"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_module_refuses_attributes_of_a_wrong_type(name: str) -> None:
    loss = lsk.CrossEntropyLoss()
    setattr(loss, name, WRONG[name])
    with pytest.raises((lsk.ArgumentError, TypeError), match=name):
        loss(X, Y)


@pytest.mark.usefixtures("alone")
def test_the_backend_that_serves_may_be_named() -> None:
    assert torch.equal(lsk.cross_entropy(X, Y, backend="cpu"), lsk.CrossEntropyLoss(backend="cpu")(X, Y))
    with pytest.raises(lsk.ArgumentError, match="backend"):
        lsk.cross_entropy(X, Y, backend=np.array(["cpu", "cpu"]))  # type: ignore[call-overload]


def test_modules_compile_whole() -> None:
    for module in (lsk.CrossEntropyLoss(WEIGHT), lsk.LabelSmoothingCrossEntropy(), lsk.CrossEntropyLoss(z_loss=0.1)):
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X, Y), module(X, Y), rtol=1e-6, atol=0)


def test_a_module_takes_what_belongs_to_a_batch() -> None:
    loss, weight = lsk.CrossEntropyLoss(), torch.rand(9)
    want = lsk.cross_entropy(X, Y, row_weight=weight, normalizer=3.0)
    assert torch.equal(loss(X, Y, row_weight=weight, normalizer=3.0), want)
    assert not torch.equal(loss(X, Y), want)
