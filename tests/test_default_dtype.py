"""``torch.set_default_dtype`` changes no result: what a call makes for itself has a dtype of its own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import skip_unless_available
from torch import Tensor
from torch.utils import _pytree as pytree

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, conventions, distillation, representation, smoothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

N, K, D = 6, 11, 4


def given() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    made = {
        name: torch.randn(*shape, generator=rng, dtype=torch.float32)
        for name, shape in {"x": (N, K), "h": (N, D), "w": (K, D), "b": (K,), "teacher": (N, K)}.items()
    }
    return made | {
        "y": torch.tensor([3, 0, 10, -100, 7, 7]),
        "prior": torch.full((K,), 1 / K, dtype=torch.float32),
        "weight": torch.arange(1, K + 1, dtype=torch.float32),
        "eps": torch.full((N,), 0.3, dtype=torch.float32),
    }


def with_gradients(loss: Callable[..., Any], *leaves: Tensor) -> Any:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    result = loss(*leaves)
    value = result[0] if isinstance(result, tuple) else result
    return result, torch.autograd.grad(value.sum(), leaves)


OPTIONS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "mean": lambda g: {},
    "none": lambda g: {"reduction": "none", "return_stats": "all"},
    "weights": lambda g: {"weight": g["weight"], "smoothing": g["prior"], "label_smoothing": g["eps"]},
    "others": lambda g: {"smoothing": "others", "z_loss": 1e-3, "softcap": 5.0, "logit_scale": 0.7},
    "finite": lambda g: {"smooth_over": "finite", "confidence_penalty": 0.1, "normalizer": 3},
    "row weight": lambda g: {"row_weight": g["eps"], "normalizer": torch.tensor(2.5, dtype=torch.float32)},
    "nemo": lambda g: conventions.nemo(0.1, -100, g["y"]),
    "fairseq": lambda g: conventions.fairseq(0.1, -100),
    "keras": lambda g: conventions.keras(label_smoothing=0.1),
}
CALLS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "temporal targets": lambda g: smoothing.temporal_targets(g["y"][:3], (0.2, 0.1)),
    "no temporal targets": lambda g: smoothing.temporal_targets(g["y"][:3], ()),
    "neighbours": lambda g: smoothing.neighbour_targets(
        g["y"][:3], 0.1, lsk.TopK(torch.zeros(K, 2, dtype=torch.int64), torch.ones(K, 2, dtype=torch.int64))
    ),
    "unigram": lambda g: smoothing.unigram_prior(torch.arange(K), 0.7, 0.5),
    "schedule": lambda g: smoothing.Schedule(smoothing.cosine(0.1, 0.0, 7)),
    "sharpen": lambda g: distillation.sharpen(g["x"].softmax(-1), 0.5),
    "calibration": lambda g: vars(
        calibration.collect(lsk.cross_entropy(g["x"], g["y"], reduction="none", return_stats="all")[1], g["y"])
    ),
    "temperature": lambda g: calibration.fit_temperature(
        g["x"] + 2 * torch.eye(K)[g["y"].clamp_min(0)].to(g["x"]), g["y"]
    ),
    "plane": lambda g: representation.template_plane(g["w"], (0, 1, 2)),
    "scatter": lambda g: representation.class_scatter(g["h"], g["y"].clamp_min(0)),
    "information": lambda g: representation.mutual_information(g["h"]),
    "distillation": lambda g: with_gradients(
        lambda x: distillation.distillation_loss(
            x, g["teacher"], g["y"], alpha=0.4, temperature=2.0, label_smoothing=0.1
        ),
        g["x"],
    ),
    "top k": lambda g: with_gradients(
        lambda h, w: lsk.linear_cross_entropy(h, w, smoothing.temporal_targets(g["y"]), label_smoothing=0.1),
        g["h"],
        g["w"],
    ),
}


def results_of(call: Callable[[dict[str, Tensor]], Any]) -> list[Any]:
    return pytree.tree_leaves(call(given()))


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def check(call: Callable[[dict[str, Tensor]], Any], change: Callable[[], None]) -> None:
    want = results_of(call)
    change()
    got = results_of(call)
    assert len(got) == len(want) > 0
    for one, other in zip(got, want, strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
        elif isinstance(other, int | float):
            assert one == other


@pytest.mark.parametrize("name", CALLS)
def test_tools(name: str, default_dtype: Callable[[], None]) -> None:
    check(CALLS[name], default_dtype)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("entry", ["logits", "head"])
@pytest.mark.parametrize("options", OPTIONS)
def test_losses(options: str, entry: str, backend: str, default_dtype: Callable[[], None]) -> None:
    skip_unless_available(backend)

    def call(g: dict[str, Tensor]) -> Any:
        chosen = {"label_smoothing": 0.1, **OPTIONS[options](g), "backend": backend}
        if entry == "logits":
            return with_gradients(functools.partial(loss_of_logits, target=g["y"], **chosen), g["x"])
        chosen.pop("class_dim", None)
        head = functools.partial(lsk.linear_cross_entropy, target=g["y"], **chosen)
        return with_gradients(lambda h, w, b: head(h, w, linear_bias=b), g["h"], g["w"], g["b"])

    check(call, default_dtype)


def loss_of_logits(x: Tensor, **options: Any) -> Any:
    return lsk.cross_entropy(x, options.pop("target"), **options)
