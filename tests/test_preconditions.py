"""Operators called directly with one argument broken: each checks what its kernels rely on before they touch memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import draw
from conftest import HAS_CUDA, skip_unless_available

from labelsmooth_kernels import backends

Place = tuple[str, str]
DEVICE = "cuda" if HAS_CUDA else "cpu"


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of a longer tensor."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


# What an operator relies on, broken: the argument, and what becomes of it.
BROKEN = {
    "target, too short": ("target", lambda t: t[:-1]),
    "target, int32": ("target", lambda t: t.int()),
    "target, a column": ("target", lambda t: t[:, None]),
    "target, strided": ("target", strided),
    "target, one for all": ("target", lambda t: t[:1].expand(len(t))),
    "probabilities of another shape": ("target", lambda t: torch.ones(len(t), 3, device=t.device)),
    "softcap, 0": ("softcap", lambda _: 0.0),
    "saved, short of a row": ("saved", lambda t: t[:3].contiguous()),
    "saved, short of a column": ("saved", lambda t: t[:, :-1].contiguous()),
    "saved, double": ("saved", lambda t: t.double()),
    "saved, transposed": ("saved", lambda t: t.mT.contiguous().mT),
    "logits, integers": ("logits", lambda t: t.int()),
    "logits, one row": ("logits", lambda t: t[0]),
    "logits, 4 dimensions": ("logits", lambda t: t[None, None]),
    "logits, no classes": ("logits", lambda t: t[:, :0]),
    "logits, overlapping": ("logits", lambda t: t[:1].expand(len(t), -1)),
    "n_stats, 3": ("n_stats", lambda _: 3),
}
for _name in ("weight", "prior", "eps_rows", "row_scale"):
    BROKEN |= {
        f"{_name}, too short": (_name, lambda t: t[:-1]),
        f"{_name}, bfloat16": (_name, lambda t: t.bfloat16()),
        f"{_name}, double": (_name, lambda t: t.double()),
        f"{_name}, strided": (_name, strided),
    }
if HAS_CUDA:
    BROKEN |= {
        f"{_name}, on a CPU": (_name, lambda t: t.cpu())
        for _name in ("target", "weight", "prior", "eps_rows", "row_scale", "saved")
    }
ROW = ("target", "weight", "prior", "eps", "eps_rows", "row_scale", "ignore_index", "others", "finite", "z_loss")
ROW += ("confidence_penalty", "logit_scale", "softcap")
OWN = {"forward": ("with_grad", "n_stats"), "forward_": ("n_stats",)}  # of the others: saved
WRITES = {"forward_", "backward_"}


@functools.cache
def _sound_call(backend: str, n: int = 6, k: int = 37) -> dict[str, Any]:
    x, y = draw((backend, DEVICE), n, k, torch.float32)
    new = {"device": x.device}
    kernels = backends.BACKENDS[backend].kernels
    given = {
        "logits": x, "target": y, "weight": torch.rand(k, **new), "prior": torch.full((k,), 1 / k, **new), "eps": 0.1,
        "eps_rows": torch.full((n,), 0.1, **new), "row_scale": torch.rand(n, **new), "ignore_index": -100,
        "others": False, "finite": False, "z_loss": 0.0, "confidence_penalty": 0.0, "logit_scale": 1.0,
        "softcap": 30.0, "with_grad": True, "n_stats": 1,
    }  # fmt: skip
    given["saved"] = kernels.forward(*(given[name] for name in ("logits", *ROW, *OWN["forward"])))[1]
    return given


def sound_call(backend: str) -> dict[str, Any]:
    """Every argument that an operator takes, all of them as they should be."""
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in _sound_call(backend).items()}


def names_of(operator: str) -> tuple[str, ...]:
    return ("logits", *ROW, *OWN.get(operator, ("saved",)))


CHECKED = [
    (operator, broken)
    for operator in ("forward", "forward_", "backward", "backward_", "target_grad")
    for broken, (name, _) in BROKEN.items()
    if name in names_of(operator) and (broken != "logits, overlapping" or operator in WRITES)
]


@pytest.mark.parametrize(("operator", "broken"), CHECKED, ids="-".join)
def test_operators_check_what_they_rely_on(fast_place: Place, operator: str, broken: str) -> None:
    """Called directly, whoever calls: nothing is read or written outside a tensor, nothing before all is checked."""
    given, (name, change) = sound_call(fast_place[0]), BROKEN[broken]
    if operator == "target_grad" and (name != "target" or "probabilities" in broken):
        given["target"] = given["logits"].softmax(-1)
    given[name] = change(given[name])
    before = given["logits"].clone()
    with pytest.raises((RuntimeError, TypeError), match=name):
        getattr(backends.BACKENDS[fast_place[0]].kernels, operator)(*(given[name] for name in names_of(operator)))
    assert torch.equal(given["logits"], before)


SCALES = {
    "scale, two": (lambda g: g, lambda s: s.expand(2).contiguous()),
    "scale, double": (lambda g: g, lambda s: s.double()),
    "grad, overlapping": (lambda g: g[:1].expand(6, -1), lambda s: s),
    "grad, integers": (lambda g: g.int(), lambda s: s),
}


@pytest.mark.parametrize("broken", SCALES)
def test_scale_checks_what_it_relies_on(fast_place: Place, broken: str) -> None:
    x, _ = draw(fast_place, 6, 37, torch.float32)
    grad, scale = (
        change(t) for change, t in zip(SCALES[broken], (x, torch.full((1,), 2.0, device=x.device)), strict=True)
    )
    before = grad.clone()
    with pytest.raises((RuntimeError, TypeError), match=broken.partition(",")[0]):
        backends.BACKENDS[fast_place[0]].kernels.scale_(grad, scale)
    assert torch.equal(grad, before)


TILED = {
    "hidden, double": ("hidden", lambda t: t.double()),
    "hidden, one row": ("hidden", lambda t: t[0]),
    "linear_weight, of other features": ("linear_weight", lambda t: t[:, :-1]),
    "linear_weight, half": ("linear_weight", lambda t: t.half()),
    "linear_weight, no classes": ("linear_weight", lambda t: t[:0]),
    "linear_bias, too short": ("linear_bias", lambda t: t[:-1]),
    "linear_bias, half": ("linear_bias", lambda t: t.half()),
    **{
        broken: given for broken, given in BROKEN.items() if given[0] in (*ROW[:-1], "saved") and "probab" not in broken
    },
}
LAYER = ("hidden", "linear_weight", "linear_bias")
OWN_OF_TILED = {"forward": ("n_stats",), "backward": ("saved", "filter_eps", "hidden_too", "weight_too", "bias_too")}


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("operator", "broken"),
    [(op, b) for op in OWN_OF_TILED for b, (name, _) in TILED.items() if name in (*LAYER, *ROW, *OWN_OF_TILED[op])],
    ids="-".join,
)
def test_the_tiled_operators_too(operator: str, broken: str) -> None:
    skip_unless_available("triton")
    given = sound_call("triton") | {"softcap": None, "filter_eps": 0.0}
    given |= dict.fromkeys(("hidden_too", "weight_too", "bias_too"), True)
    new = {"device": DEVICE}
    given |= {"hidden": torch.rand(6, 8, **new), "linear_weight": torch.rand(37, 8, **new)}
    given |= {"linear_bias": torch.rand(37, **new)}
    name, change = TILED[broken]
    given[name] = change(given[name])
    call = getattr(torch.ops.labelsmooth_kernels, f"tiled_{operator}")
    with pytest.raises((RuntimeError, TypeError), match=name):
        call(*(given[name] for name in (*LAYER, *ROW, *OWN_OF_TILED[operator])))


DISTILLED = {
    "student, integers": ("student", lambda t: t.int()),
    "student, 3 dimensions": ("student", lambda t: t[None]),
    "student, classes apart": ("student", strided),
    "teacher, half": ("teacher", lambda t: t.half()),
    "teacher, short of a class": ("teacher", lambda t: t[:, :-1]),
    "teacher, classes apart": ("teacher", strided),
    "temperature, 0": ("temperature", lambda _: 0.0),
    **{
        broken: given
        for broken, given in BROKEN.items()
        if given[0] in ("target", "prior", "eps_rows", "row_scale") and "probab" not in broken
    },
}
OF_DISTILLATION = (
    "student", "teacher", "target", "prior", "eps", "eps_rows", "row_scale", "ignore_index", "others", "alpha",
    "temperature", "with_grad",
)  # fmt: skip


@pytest.mark.parametrize("backend", ["triton"] if HAS_CUDA else ["cpu", "triton"])
@pytest.mark.parametrize("broken", DISTILLED)
def test_distillation_too(backend: str, broken: str) -> None:
    skip_unless_available(backend)
    given = sound_call(backend)
    given |= {"student": given["logits"], "teacher": given["logits"] + 1, "alpha": 0.5, "temperature": 2.0}
    name, change = DISTILLED[broken]
    given[name] = change(given[name])
    with pytest.raises((RuntimeError, TypeError), match=name):
        getattr(torch.ops.labelsmooth_kernels, f"{backend}_distill")(*(given[name] for name in OF_DISTILLATION))
