"""In the place of F.cross_entropy and nn.CrossEntropyLoss: values, gradients, shapes, errors; the known differences."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import Place, loss_and_grad
from conftest import EMULATED
from drop_in import K, X, Y, arguments
from torch import Tensor, nn
from tracing import compiled, compiler

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, smoothing

SHAPES = [(K,), (5, K), (1, K), (0, K), (3, K, 4), (2, K, 3, 2), (2, K, 0), (0, K, 3)]
REDUCTIONS = ["mean", "sum", "none"]


def compare(place: Place, x: Tensor, target: Tensor, class_dim: int = 1, **options: Any) -> None:
    """The same value, shape and gradient as PyTorch's in float64, within a few ulp of the largest term."""
    # On the CPU: for one row of (K,) that is ignored PyTorch's mean is NaN there and in two dimensions, 0 on a GPU.
    x64, y64, w = x.double().cpu().requires_grad_(), target.cpu(), options.get("weight")
    y64 = y64.double() if y64.is_floating_point() else y64
    own = options | {"weight": None if w is None else w.double().cpu()}
    want = F.cross_entropy(x64 if class_dim == 1 else x64.movedim(class_dim, 1), y64, **own)
    (want_grad,) = torch.autograd.grad(want, x64, torch.ones_like(want))
    loss, grad = loss_and_grad(place, x, target, class_dim=class_dim, **options)
    for got, oracle in ((loss.cpu(), want.detach()), (grad.cpu(), want_grad)):
        assert got.shape == oracle.shape
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), oracle, rtol=2**-20, atol=2**-21, equal_nan=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["all valid", "some ignored", "all ignored", "probabilities"])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_f_cross_entropy(place: Place, shape: tuple[int, ...], kind: str, weighted: bool) -> None:
    x, target = arguments(shape, kind, place[1])
    before = x.clone(), target.clone()
    weight = torch.linspace(0.2, 2, K, device=place[1]) if weighted else None
    pairs = itertools.product(REDUCTIONS, (0.0, 0.3, 1.0))
    if place in EMULATED:  # an emulation is slow: every reduction and every ε once
        pairs = zip(REDUCTIONS, (0.3, 0.0, 1.0), strict=True)
    for reduction, eps in pairs:
        compare(place, x, target, weight=weight, reduction=reduction, label_smoothing=eps)
    assert torch.equal(before[0], x)
    assert torch.equal(before[1], target)


def test_classes_last_is_a_view_of_the_same(place: Place) -> None:
    """class_dim=-1 takes (B, T, K); the values are those of the transposed call of PyTorch."""
    x, target = arguments((3, K, 4), "some ignored", place[1])
    last = x.movedim(1, -1).contiguous()
    for class_dim, reduction in itertools.product((-1, 2), REDUCTIONS):
        compare(place, last, target, class_dim, reduction=reduction, label_smoothing=0.1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "reduction": "sum"}, {"ignore_index": 2}])
def test_same_as_the_module(options: dict[str, Any]) -> None:
    x, target = arguments((5, K), "some ignored", "cpu")
    target = torch.where(target < 0, 2, target)
    weight = torch.linspace(0.2, 2, K)
    for w in (None, weight):
        own, torchs = lsk.CrossEntropyLoss(w, **options), nn.CrossEntropyLoss(w, **options)
        assert own.state_dict().keys() == torchs.state_dict().keys()
        torch.testing.assert_close(own(x, target), torchs(x, target))
    own = lsk.LabelSmoothingCrossEntropy(0.2, "sum")
    torch.testing.assert_close(own(x, target), nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")(x, target))
    with pytest.raises(TypeError, match="smooting"):
        lsk.CrossEntropyLoss(smooting=0.1)


def test_the_classic_module_takes_the_names_of_others() -> None:
    """timm's ``smoothing``, ``eps``, by place, or nothing at all: ε is 0.1 then."""
    for module, eps in (
        (lsk.LabelSmoothingCrossEntropy(), 0.1),
        (lsk.LabelSmoothingCrossEntropy(0.2), 0.2),
        (lsk.LabelSmoothingCrossEntropy(smoothing=0.2), 0.2),
        (lsk.LabelSmoothingCrossEntropy(smoothing=0), 0.0),
        (lsk.LabelSmoothingCrossEntropy(eps=0.2), 0.2),
    ):
        torch.testing.assert_close(module(X, Y), F.cross_entropy(X, Y, label_smoothing=eps))
    with pytest.raises(lsk.ArgumentError, match="smoothing is another name of eps: give one of them"):
        lsk.LabelSmoothingCrossEntropy(0.1, smoothing=0.2)


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {  # what the message of ours must say
    "rows": ((X, Y[:3]), {}, r"target must have shape \(4,\) .*got \(3,\)"),
    "3-d rows": ((torch.zeros(4, 5, 3), Y[:, None]), {}, r"target must have shape \(4, 3\).*\(4, 1\)"),
    "0-dim input": ((torch.tensor(1.0), torch.tensor(0)), {}, r"input must have shape .*0-dimensional"),
    "weight shape": ((X, Y), {"weight": torch.ones(4)}, r"weight must have shape \(5,\).*\(4,\)"),
    "reduction": ((X, Y), {"reduction": "avg"}, r"reduction must be one of .*'avg'"),
    "smoothing above 1": ((X, Y), {"label_smoothing": 1.5}, r"label_smoothing must be .*at most 1.*1.5"),
    "outside": ((X, Y + 9), {}, "9"),
    "no classes": ((torch.zeros(4, 0), Y), {}, "0"),
    "complex weight": ((X, Y), {"weight": torch.ones(5, dtype=torch.complex64)}, "weight must be .*complex64"),
    "index target of input's shape": ((X, X.long()), {}, "target .*floating point.*int64"),
    "float index target": ((X, Y.float()), {}, "target of class indices must have .*float32"),
    "bool target": ((X, Y.bool()), {}, "target of class indices must have .*bool"),
    "int16 target": ((X, Y.short()), {}, "target of class indices must have .*int16"),
    "integer input": ((X.long(), Y), {}, "input must have one of .*int64"),
    "ignore_index with probabilities": ((X, X), {"ignore_index": 0}, "ignore_index"),
    "a list": (([1.0], Y), {}, "input"),
    "unknown option": ((X, Y), {"smooting": 0.1}, "smooting"),
}


@pytest.mark.parametrize("name", WRONG)
def test_same_error_classes(name: str) -> None:
    """What PyTorch raises is what ours can be caught as; the message names argument, value and what is allowed."""
    args, options, message = WRONG[name]
    with pytest.raises(Exception) as theirs:  # noqa: PT011  # which one is the question
        F.cross_entropy(*args, **options)
    with pytest.raises(theirs.type, match=message) as ours:
        lsk.cross_entropy(*args, **options)
    if theirs.type in (ValueError, RuntimeError):
        assert ours.type is lsk.ArgumentError, "both of them"


WITH_OPTIONS: dict[str, tuple[Any, tuple[Any, ...], dict[str, str]]] = {  # wrong keywords, and what they mean
    "cross_entropy": (lsk.cross_entropy, (X, Y), {"label_smooting": "label_smoothing", "dim": "class_dim"}),
    "linear_cross_entropy": (lsk.linear_cross_entropy, (X, X, Y), {"bias": "linear_bias", "chunk": "chunk_rows"}),
    "distillation_loss": (lsk.distillation.distillation_loss, (X, X), {"temprature": "temperature"}),
    "CrossEntropyLoss": (lsk.CrossEntropyLoss, (), {"smoothness": "smoothing", "zloss": "z_loss"}),
    "LabelSmoothingCrossEntropy": (lsk.LabelSmoothingCrossEntropy, (), {"epsilon": "eps"}),
    "LinearCrossEntropyLoss": (lsk.LinearCrossEntropyLoss, (3, 2), {"linear_bias": "bias", "chunk_row": "chunk_rows"}),
    "LossSpec": (lsk.LossSpec, (), {"sofcap": "softcap"}),
    "evaluate": (calibration.evaluate, (X, Y), {"bin": "bins", "classdim": "class_dim"}),
    "evaluate_classwise": (calibration.evaluate_classwise, (X, Y, X), {"bin": "bins", "bias": "linear_bias"}),
    "fit_temperature": (calibration.fit_temperature, (X, Y), {"max_step": "max_steps", "tol": "tolerance"}),
    "compare": (smoothing.compare, ({0.1: (X, Y)},), {"temperature": "temperatures", "bin": "bins"}),
}


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_a_wrong_keyword_names_the_function_and_the_nearest_option(name: str) -> None:
    function, given, wrong = WITH_OPTIONS[name]
    for keyword, meant in wrong.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) got .* '{keyword}'; did you mean '{meant}'\?$"):
            function(*given, **{keyword: 0.1})
    with pytest.raises(TypeError, match=rf"^{name}\(\) got .* 'qqqq'; its options are \w+, "):
        function(*given, qqqq=0.1)


REFUSED = {  # a wrong keyword, and the option near to it that such a call refuses
    "linear_cross_entropy": ("in_place", "inplace"),
    "CrossEntropyLoss": ("row_weigth", "row_weight"),
    "LinearCrossEntropyLoss": ("normaliser", "normalizer"),
    "evaluate": ("chunk_row", "chunk_rows"),
    "evaluate_classwise": ("classdim", "class_dim"),
    "fit_temperature": ("soft_cap", "softcap"),
    "compare": ("logitscale", "logit_scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_call_refuses_is_not_offered(name: str) -> None:
    function, given, _ = WITH_OPTIONS[name]
    keyword, near = REFUSED[name]
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument '{keyword}'; ") as refusal:
        function(*given, **{keyword: 1})
    assert near not in str(refusal.value)


OURS_ALONE = {  # options PyTorch does not have, refused by name
    "smoothing": ("twice", r"smoothing must be 'uniform', 'others' or a prior .*'twice'"),
    "smooth_over": ("some", "smooth_over must be 'all' or 'finite', got 'some'"),
    "z_loss": (-1.0, "z_loss must be >= 0, got -1.0"),
    "confidence_penalty": (torch.nan, "confidence_penalty must be a finite number, got nan"),
    "logit_scale": (torch.inf, "logit_scale must be a finite number, got inf"),
    "softcap": (0.0, "softcap must be a finite number > 0 or None, got 0.0"),
    "class_dim": (5, r"class_dim must be a dimension of input \(4, 5\), got 5"),
    "row_weight": (torch.ones(3), r"row_weight must have one value or the shape \(4,\) of target, got \(3,\)"),
    "normalizer": (0.0, "normalizer must be a finite number > 0 .*got 0.0"),
    "backend": ("fpga", "backend must be one of .*got 'fpga'"),
    "label_smoothing": (torch.ones(2, 3), r"label_smoothing must have one value or the shape \(4,\)"),
    "return_stats": ("nll", "return_stats must be False, True, 'entropy' or 'all', got 'nll'"),
    "ignore_index": (1.5, "ignore_index must be an int, got 1.5"),
}


@pytest.mark.parametrize("name", OURS_ALONE)
def test_refusals_name_value_and_allowed(name: str) -> None:
    value, message = OURS_ALONE[name]
    with pytest.raises(lsk.ArgumentError, match=message):
        lsk.cross_entropy(X, Y, **{name: value})


THEIRS = ["functional.cross_entropy", "CrossEntropyLoss", "functional.linear_cross_entropy", "LinearCrossEntropyLoss"]


@pytest.mark.parametrize("name", THEIRS)
def test_every_parameter_of_pytorch_is_ours(name: str) -> None:
    """The positional ones in its order; those by keyword with its defaults."""
    theirs, name = nn if "functional" not in name else F, name.split(".")[-1]
    if not hasattr(theirs, name):
        pytest.skip("this PyTorch has no linear_cross_entropy")
    ours, want = (dict(inspect.signature(getattr(m, name)).parameters) for m in (lsk, theirs))
    by_place = [n for n, p in want.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(by_place)] == by_place
    spec = inspect.signature(lsk.LossSpec).parameters
    takes_options = any(p.kind is p.VAR_KEYWORD for p in ours.values())
    for n, parameter in want.items():
        own = ours[n] if n in ours or not takes_options else spec[n]
        assert own.default == parameter.default
        assert n not in by_place or own.kind is parameter.kind


OLD_CALLS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((None, None, 3), {}),
    ((None, None, 3, None, "sum", 0.1), {}),
    ((torch.linspace(0.2, 2, 5), False, 3), {"label_smoothing": 0.1}),
    ((None, True, 3, False, "bogus"), {}),
    ((), {"size_average": None, "reduce": None}),
    ((), {"size_average": True, "reduction": "sum"}),
    ((), {"reduce": False}),
    ((), {"reduction": "elementwise_mean"}),
]


@pytest.mark.parametrize(("given", "options"), OLD_CALLS)
def test_old_calls_mean_what_they_mean_in_pytorch(given: tuple[Any, ...], options: dict[str, Any]) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    y, found = torch.tensor([0, 3, 4, 1]), []
    for f, module in ((F.cross_entropy, nn.CrossEntropyLoss), (lsk.cross_entropy, lsk.CrossEntropyLoss)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            loss = f(x, y, *given, **options)
            texts = [(str(w.message), w.category) for w in said]
            found.append((loss, texts, module(*given, **options)(x, y)))
    (want, want_texts, want_module), (got, texts, of_module) = found
    torch.testing.assert_close((got, of_module), (want, want_module))
    assert texts == want_texts


@compiler
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_old_calls_in_one_graph() -> None:
    for options in ({"size_average": False}, {"reduce": False}, {"reduction": "elementwise_mean"}):
        loss = compiled(functools.partial(lsk.cross_entropy, **options))[0](X, Y)
        torch.testing.assert_close(loss, F.cross_entropy(X, Y, **options))


class _Index:
    def __index__(self) -> int:
        return 3


@pytest.mark.parametrize(
    "value",
    [np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), _Index()],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'dtype', '')}",
)
def test_what_stands_for_an_int_is_one(value: Any) -> None:
    """As in PyTorch; where an option is another's than PyTorch's too."""
    x, y = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    want = F.cross_entropy(x, y, ignore_index=value)
    torch.testing.assert_close(lsk.cross_entropy(x, y, ignore_index=value), want)
    torch.testing.assert_close(lsk.CrossEntropyLoss(ignore_index=value)(x, y), want)
    torch.testing.assert_close(lsk.linear_cross_entropy(x, torch.eye(5), y, ignore_index=value, chunk_rows=value), want)
    assert type(lsk.LossSpec(class_dim=value).class_dim) is int
    for wrong in (True, np.bool_(True), 3.0, "3"):
        with pytest.raises(lsk.ArgumentError, match="ignore_index must be an int, got "):
            lsk.cross_entropy(x, y, ignore_index=wrong)


def test_numpy_numbers_are_numbers() -> None:
    x, y = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    want = F.cross_entropy(x, y, label_smoothing=np.float32(0.25))
    torch.testing.assert_close(lsk.cross_entropy(x, y, label_smoothing=np.float32(0.25)), want)
    for name in ("z_loss", "confidence_penalty", "logit_scale", "softcap", "normalizer"):
        own = (lsk.cross_entropy(x, y, **{name: number}) for number in (np.float32(0.25), np.int64(1)))
        plain = (lsk.cross_entropy(x, y, **{name: number}) for number in (0.25, 1))
        assert all(map(torch.equal, own, plain))


LATE: list[tuple[type, tuple[int, ...], dict[str, Any], str]] = [  # options that fit no call
    (lsk.CrossEntropyLoss, (), {"weight": torch.ones(2, 3)}, r"weight must be a floating-point tensor of shape \(K,\)"),
    (lsk.CrossEntropyLoss, (), {"weight": torch.ones(3, dtype=torch.int64)}, "weight must be a floating-point tensor"),
    (lsk.CrossEntropyLoss, (), {"smoothing": torch.ones(3, dtype=torch.int64)}, "smoothing must be a floating-point"),
    (lsk.CrossEntropyLoss, (), {"backend": "fpga"}, "backend must be one of .*got 'fpga'"),
    (lsk.CrossEntropyLoss, (), {"inplace": "yes"}, "inplace must be a bool, got 'yes'"),
    (lsk.CrossEntropyLoss, (), {"weight": torch.ones(3), "smoothing": torch.ones(2) / 2}, r"smoothing must .*\(3,\)"),
    (lsk.LabelSmoothingCrossEntropy, (), {"eps": 1.5}, "label_smoothing must be .*1.5"),
    (lsk.LabelSmoothingCrossEntropy, (), {"reduction": "avg"}, "reduction must be .*'avg'"),
    (lsk.LinearCrossEntropyLoss, (3, 2), {"weight": torch.ones(3)}, r"weight must be of shape \(2,\)"),
    (lsk.LinearCrossEntropyLoss, (3, 2), {"smoothing": torch.ones(3) / 3}, r"smoothing must be of shape \(2,\)"),
    (lsk.LinearCrossEntropyLoss, (3, 1), {"smoothing": "others", "label_smoothing": 0.1}, "num_classes is 1"),
    (lsk.LinearCrossEntropyLoss, (3, 2), {"method": "tiled", "softcap": 5.0}, "method='tiled' cannot .*softcap"),
    (lsk.LinearCrossEntropyLoss, (3, 2), {"method": "tiled", "backend": "cpu"}, "'cpu' has no tiled kernels"),
    (lsk.LinearCrossEntropyLoss, (3, 2), {"chunk_rows": 0}, "chunk_rows must be an int > 0"),
]


@pytest.mark.parametrize(("module", "sizes", "options", "message"), LATE)
def test_a_module_refuses_when_it_is_made(
    module: type, sizes: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(lsk.ArgumentError, match=message):
        module(*sizes, **options)


def test_difference_probabilities_of_no_classes() -> None:
    none = torch.zeros(5, 0)
    assert F.cross_entropy(none, none).isnan()
    with pytest.raises(IndexError, match=r"input must have a class for every target, got shape \(5, 0\)"):
        lsk.cross_entropy(none, none)


def test_difference_targets_without_weight() -> None:
    """The smoothed part is divided by a weight of 0: inf here, and the NaN of 0·inf there."""
    x, weight = torch.randn(4, 5), torch.tensor([0.0, 1, 1, 1, 1])
    got, want = (f(x, Y, weight, label_smoothing=0.1) for f in (lsk.cross_entropy, F.cross_entropy))
    assert (got.item(), want.isnan().item()) == (torch.inf, True)


def test_difference_smoothing_as_text() -> None:
    for f, kind in ((F.cross_entropy, TypeError), (lsk.cross_entropy, ValueError)):
        with pytest.raises(kind, match="label_smoothing"):
            f(X, Y, label_smoothing="0.1")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_difference_half_precision_gives_a_float32_loss(place: Place, dtype: torch.dtype) -> None:
    x, y = X.to(place[1], dtype), Y.to(place[1])
    assert F.cross_entropy(x, y).dtype == dtype
    for reduction in REDUCTIONS:
        assert lsk.cross_entropy(x, y, reduction=reduction, backend=place[0]).dtype == torch.float32


def test_difference_negative_smoothing_sharpens(place: Place) -> None:
    x, y = arguments((5, K), "all valid", place[1])
    assert torch.equal(F.cross_entropy(x, y, label_smoothing=-0.3), F.cross_entropy(x, y)), "PyTorch ignores it"
    want = 1.3 * F.cross_entropy(x.double(), y) + 0.3 * torch.log_softmax(x.double(), 1).mean()
    got, _ = loss_and_grad(place, x, y, label_smoothing=-0.3)
    torch.testing.assert_close(got.double(), want, rtol=2**-20, atol=0)


def test_difference_int32_targets(place: Place) -> None:
    x, y = arguments((5, K), "some ignored", place[1])
    with pytest.raises(RuntimeError, match="Int"):
        F.cross_entropy(x, y.int())
    assert torch.equal(loss_and_grad(place, x, y.int())[1], loss_and_grad(place, x, y)[1])


def test_difference_ignored_nan_rows_have_no_gradient(place: Place) -> None:
    x, y = arguments((6, K), "some ignored", place[1])
    x[0] = torch.nan
    leaf = x.clone().requires_grad_()
    F.cross_entropy(leaf, y, label_smoothing=0.1).backward()
    assert leaf.grad[0].isnan().any(), "PyTorch: 0·NaN"
    _, grad = loss_and_grad(place, x, y, label_smoothing=0.1)
    assert (grad[0] == 0).all()
    assert grad.isfinite().all()


def test_differences_that_raise() -> None:
    """What PyTorch serves, and ours refuses: in the README's list."""
    nothing = torch.full((4,), -100)
    assert F.cross_entropy(X[:, :0], nothing).isnan()
    with pytest.raises(IndexError, match="input must have a class for every target"):
        lsk.cross_entropy(X[:, :0], nothing)
    assert F.cross_entropy(X, Y, label_smoothing=True) == F.cross_entropy(X, Y, label_smoothing=1.0)
    with pytest.raises(lsk.ArgumentError, match="label_smoothing must be a finite number of at most 1, got True"):
        lsk.cross_entropy(X, Y, label_smoothing=True)
    torch.testing.assert_close(F.cross_entropy(X, X.softmax(1).to_sparse()), F.cross_entropy(X, X.softmax(1)))


SPARSE = X.softmax(1).to_sparse()
SPARSE_CALLS: dict[str, Any] = {
    "input": lambda **options: lsk.cross_entropy(SPARSE, Y, **options),
    "target": lambda **options: lsk.cross_entropy(X, SPARSE, **options),
    "weight": lambda **options: lsk.cross_entropy(X, Y, weight=SPARSE[0], **options),
    "label_smoothing": lambda **options: lsk.cross_entropy(X, Y, label_smoothing=SPARSE[0], **options),
    "normalizer": lambda **options: lsk.cross_entropy(X, Y, normalizer=torch.ones(1).to_sparse(), **options),
    "input of a head": lambda **options: lsk.linear_cross_entropy(SPARSE, X, Y, **options),
    "linear_weight": lambda **options: lsk.linear_cross_entropy(X, SPARSE, Y, **options),
    "target of a head": lambda **options: lsk.linear_cross_entropy(X, torch.eye(5), SPARSE, **options),
    "teacher": lambda **options: lsk.distillation.distillation_loss(X, SPARSE, Y, **options),
}


@pytest.mark.parametrize("name", SPARSE_CALLS)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_sparse_tensors_are_refused_by_name(name: str, backend: str | None) -> None:
    argument = name.partition(" ")[0]
    with pytest.raises(lsk.ArgumentError, match=rf"^{argument} must be .*strided.*, got .*sparse_coo"):
        SPARSE_CALLS[name](backend=backend)
