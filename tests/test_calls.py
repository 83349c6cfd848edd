"""How a call reaches the kernels: every option of the module, compiled callers, each instruction set, the doctor."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import draw, loss_and_grad, placed
from conftest import places, skip_unless_available
from covering import Mode
from drop_in import K, X, Y, arguments

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, doctor, modules

Place = tuple[str, str]


def test_the_module_passes_every_option_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {
        "weight": torch.ones(5), "ignore_index": 3, "reduction": "sum", "label_smoothing": torch.tensor(0.2),
        "smoothing": torch.ones(5) / 5, "smooth_over": "finite", "class_dim": -1, "z_loss": 0.1,
        "confidence_penalty": 0.2, "logit_scale": 2.0, "softcap": 5.0, "inplace": True,
        "return_stats": True, "backend": "reference",
    }  # fmt: skip
    call: dict[str, Any] = {"row_weight": torch.ones(4), "normalizer": 7.0}
    assert given.keys() | call.keys() == {f.name for f in dataclasses.fields(lsk.LossSpec)}
    monkeypatch.setattr(modules, "apply_spec", lambda _input, _target, spec: spec)
    module = lsk.CrossEntropyLoss(**given)
    assert dict(module.named_buffers()).keys() == {"weight", "label_smoothing", "smoothing"}, "they move with it"
    assert module.state_dict().keys() == {"weight"}
    spec = module(X, Y)
    assert all(getattr(spec, name) is value for name, value in given.items())
    module.reduction = "mean"
    spec = module(X, Y, **call)
    assert all(getattr(spec, name) is value for name, value in (given | call | {"reduction": "mean"}).items())


def test_probabilities_with_classes_last() -> None:
    x, target = arguments((3, K, 4, 2), "probabilities", "cpu")
    place = ("reference", "cpu")
    want, want_grad = loss_and_grad(place, x, target, reduction="none", label_smoothing=0.1)
    last = [t.movedim(1, -1).contiguous() for t in (x, target)]
    loss, grad = loss_and_grad(place, *last, reduction="none", label_smoothing=0.1, class_dim=-1)
    assert torch.equal(loss, want)
    assert torch.equal(grad.movedim(-1, 1), want_grad)


def test_the_gradient_of_an_option_is_not_lost(place: Place) -> None:
    """Kernels give none: unnamed, the call falls to the reference, loudly; a named backend refuses."""
    x, y = draw(place)
    eps = torch.tensor(0.1, device=place[1], requires_grad=True)
    if place[0] != "reference":
        with pytest.raises(lsk.ArgumentError, match=r"does not serve gradient of .*label_smoothing"):
            lsk.cross_entropy(x, y, label_smoothing=eps, backend=place[0])
        return
    (grad,) = torch.autograd.grad(lsk.cross_entropy(x, y, label_smoothing=eps), eps)
    assert grad.isfinite()
    assert grad != 0


def test_an_option_that_could_learn_costs_nothing_while_it_does_not(fast_place: Place) -> None:
    x, y = draw(fast_place)
    weight = torch.nn.Parameter(torch.ones(37, device=x.device))
    with torch.no_grad():
        assert lsk.cross_entropy(x, y, weight, backend=fast_place[0]).isfinite()


def test_a_fall_to_the_reference_warns_once() -> None:
    backends._choose.cache_clear()
    backends._warn_once.cache_clear()
    eps = torch.tensor(0.1, requires_grad=True)
    with pytest.warns(UserWarning, match=r"served by the plain PyTorch reference \(cpu: .*label_smoothing"):
        lsk.cross_entropy(X, Y, label_smoothing=eps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsk.cross_entropy(X, Y, label_smoothing=eps)


@pytest.mark.parametrize("place", [p for p in places() if torch.float64 in backends.BACKENDS[p[0]].dtypes])
@pytest.mark.parametrize(
    "options", [{}, {"row_weight": torch.arange(1.0, 7)}, {"normalizer": 3.0}, {"reduction": "none"}]
)
def test_the_gradient_with_a_graph_is_the_gradient(place: Place, options: dict[str, Any]) -> None:
    skip_unless_available(place[0])
    x, y = draw(place, dtype=torch.float64)
    x.requires_grad_()
    loss = lsk.cross_entropy(x, y, label_smoothing=0.1, backend=place[0], **placed(options, place[1]))
    upstream = torch.full_like(loss, 0.37)
    plain, graphed = (
        torch.autograd.grad(loss, x, upstream, create_graph=kept, retain_graph=True) for kept in (False, True)
    )
    torch.testing.assert_close(graphed[0].detach(), plain[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_row_weight_of_one_value_multiplies_every_row(place: Place, reduction: str, probabilities: bool) -> None:
    x, y = draw(place)
    y = torch.softmax(x.flip(0), 1) if probabilities else y
    results = []
    for weight in (torch.tensor(3.0, device=place[1]), torch.full((6,), 3.0, device=place[1])):
        leaf = x.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, reduction=reduction, row_weight=weight, backend=place[0])
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


INSTRUCTION_SETS = {"portable": "default", "avx2": "avx2", "avx512": "avx512"}
"""From narrow to wide, each with the ATEN_CPU_CAPABILITY that asks for it at the start of a process."""


def python(*arguments: str, capability: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability, CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_every_instruction_set_passes_the_table(name: str) -> None:
    """None is wider than this run's own: the CPU would lack it, or ATEN_CPU_CAPABILITY forbids it to this run."""
    skip_unless_available("cpu")
    from labelsmooth_kernels import _C

    widths, info = list(INSTRUCTION_SETS), _C.build_info()
    if widths.index(name) > widths.index(info["cpu_capability"]):
        pytest.skip(f"{info['cpu_capability']} runs here: {info['cpu_reason']}")
    if name == info["cpu_capability"]:
        return  # what the rest of the suite runs with
    table = str(Path(__file__).with_name("test_parity_table.py"))
    options = ("-x", "-p", "no:cacheprovider", "-k", "cpu-cpu", "--whole" if Mode.whole else "--design")
    run = python("-m", "pytest", *options, table, capability=INSTRUCTION_SETS[name])
    assert run.returncode == 0, run.stdout[-4000:]
    assert f"instruction set: {name}" in run.stdout
    assert " passed" in run.stdout


@pytest.mark.parametrize(
    ("aten", "cpu", "name", "reason"),
    [
        (64, 64, "avx512", "the CPU has it"),
        (64, 32, "avx2", "the CPU has no AVX-512, though ATEN_CPU_CAPABILITY asks for more"),
        (64, 16, "portable", "the CPU lacks AVX2"),
        (32, 64, "avx2", "ATEN_CPU_CAPABILITY"),
        (32, 32, "avx2", "the CPU has no AVX-512"),
        (32, 16, "portable", "the CPU lacks AVX2"),
        (16, 64, "portable", "ATEN_CPU_CAPABILITY"),
        (16, 32, "portable", "ATEN_CPU_CAPABILITY"),
        (16, 16, "portable", "the CPU lacks AVX2"),
    ],
)
def test_the_cpu_decides_before_pytorch_does(aten: int, cpu: int, name: str, reason: str) -> None:
    """Bytes of a vector: 64 is AVX-512, 32 AVX2."""
    skip_unless_available("cpu")
    from labelsmooth_kernels import _C

    if "GCC" in (built := _C.choose_instruction_set(64, 64))[1]:
        pytest.skip(built[1])
    got = _C.choose_instruction_set(aten, cpu)
    assert got[0] == name
    assert reason in got[1]


def test_every_feature_that_kernels_are_compiled_with_is_looked_for() -> None:
    csrc = Path(__file__).parents[1] / "csrc"
    looked_for = (csrc / "cpu_dispatch.cpp").read_text().lower()
    for name in ("avx2", "avx512"):
        (features,) = re.findall(r'GCC target\("(.*)"\)', (csrc / f"cpu_{name}.cpp").read_text())
        for feature in features.split(","):
            assert f'__builtin_cpu_supports("{feature}")' in looked_for or f"bit_{feature}" in looked_for


def test_avx512_asked_of_a_cpu_without_it_does_not_run() -> None:
    """PyTorch believes ATEN_CPU_CAPABILITY, and its own kernels may crash; ours run on prepared memory alone."""
    skip_unless_available("cpu")
    from labelsmooth_kernels import _C

    if "no AVX-512" not in (reason := _C.build_info()["cpu_reason"]):
        pytest.skip(f"cannot be tried here: {reason}")
    program = """if True:
        import torch
        from labelsmooth_kernels import _C, cross_entropy
        x = torch.tensor([[float(i * k % 7) for k in range(301)] for i in range(5)], requires_grad=True)
        loss = cross_entropy(x, torch.tensor([0, 7, 300, -100, 2]), label_smoothing=0.1, backend="cpu")
        loss.backward()
        print(_C.build_info()["cpu_capability"], loss.item(), x.grad.tolist())
    """
    asked = python("-c", program, capability="avx512")
    assert asked.returncode == 0, asked
    here = io.StringIO()
    with contextlib.redirect_stdout(here):
        exec(program, {})  # by AVX2, which is what runs where the CPU has no AVX-512
    assert asked.stdout == here.getvalue()
    assert asked.stdout.startswith("avx2 ")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_the_backward_needs_may_not_change_before_it(fast_place: Place, reduction: str) -> None:
    """The logits that hold the gradient, and for the recompute form the targets and a scheduled ε: autograd's error."""
    x, y = draw(fast_place)
    eps = torch.full((1,), 0.1, device=x.device)
    changes = {"mean": [], "none": [y, eps]}[reduction]
    for changed in changes:
        leaf = x.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, label_smoothing=eps, reduction=reduction, backend=fast_place[0])
        changed.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    loss = lsk.cross_entropy(logits, y, label_smoothing=eps, reduction=reduction, inplace=True, backend=fast_place[0])
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_class_weights_are_summed_in_float32(dtype: torch.dtype) -> None:
    x, y = torch.zeros(70_000, 2), torch.zeros(70_000, dtype=torch.int64)
    got = lsk.cross_entropy(x, y, weight=torch.ones(2, dtype=dtype))
    torch.testing.assert_close(got, torch.tensor(2.0).log(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_an_ignored_row_counts_for_nothing_whatever_it_holds(softcap: float | None) -> None:
    x, y = draw(("cpu", "cpu"))
    weight = torch.ones(6)
    want = loss_and_grad(("reference", "cpu"), x, y, row_weight=weight, softcap=softcap)
    x[y == -100], weight[y == -100] = torch.nan, torch.nan
    got = loss_and_grad(("reference", "cpu"), x, y, row_weight=weight, softcap=softcap)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("option", [{"weight": [1.0] * 5}, {"row_weight": 2.0}, {"backend": ["cpu"]}], ids=str)
def test_an_option_of_the_wrong_type_is_named(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(lsk.ArgumentError, match=f"{name} must be"):
        lsk.cross_entropy(X, Y, **option)


@pytest.mark.parametrize("probabilities", [False, True])
def test_a_mean_over_the_rows(place: Place, probabilities: bool) -> None:
    """Of the valid rows, whatever row weights and class weights are; at every entry point; (N, 1) stands for (N,)."""
    x, y = draw(place)
    n, k = x.shape
    target = torch.softmax(x.flip(0), 1) if probabilities else y
    weighted: dict[str, Any] = {"row_weight": torch.rand(n, device=x.device), "backend": place[0]}
    classes = {"weight": torch.rand(k, device=x.device)}
    count = n if probabilities else (y != -100).sum()
    eye = torch.eye(k, device=x.device)
    calls: list[Any] = [
        lambda **options: lsk.cross_entropy(x, target, **classes, **options),
        lambda **options: lsk.linear_cross_entropy(x, eye, target, **classes, **options),
    ]
    if not probabilities:
        calls.append(lambda **options: lsk.distillation.distillation_loss(x, x.flip(0), target, **options))
    for call in calls if place[0] != "cuda" else calls[:2]:
        want = call(reduction="sum", **weighted) / count
        torch.testing.assert_close(call(normalizer="rows", **weighted), want)
        column = weighted | {"row_weight": weighted["row_weight"][:, None]}
        torch.testing.assert_close(call(normalizer="rows", **column), want)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_the_slope_of_a_saturated_softcap(place: Place, softcap: float) -> None:
    """In float32 1 - tanh² loses its digits from v = 5 on and is 0 from 10 on; 4e/(1 + e)² of exp(-2|v|) does not."""
    v = torch.tensor([[0.0, 0.3, -1.0, 3.0, -5.0, 7.0, 9.0, -10.0, 12.0]], device=place[1])
    x, y = softcap * v, torch.tensor([4], device=place[1])
    z, slope = softcap * v.double().tanh(), 1 / v.double().cosh().square()
    want = slope * (z.softmax(-1) - F.one_hot(y, v.shape[1]))
    options = {"softcap": softcap, "backend": place[0]}
    (grad,) = torch.autograd.grad(lsk.cross_entropy(x.requires_grad_(), y, **options), x)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-12 if softcap == 30 else 0)
    head = torch.eye(v.shape[1], device=place[1])
    (grad,) = torch.autograd.grad(lsk.linear_cross_entropy(x, head, y, **options), x)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-12 if softcap == 30 else 0)


def test_the_switch_makes_a_bad_target_raise(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate looks at targets under the switch; ``--check-targets`` sets it for the program it runs."""
    looked = []
    monkeypatch.setattr(lsk.functional, "check_targets", looked.append)
    skip_unless_available("cpu")
    x, y = draw(("cpu", "cpu"))
    lsk.cross_entropy(x, y, z_loss=0.1, backend="cpu")
    assert not looked
    monkeypatch.setenv(lsk.functional.CHECK_TARGETS, "0")
    program = tmp_path / "program.py"
    program.write_text("import os, sys; print(os.environ['LABELSMOOTH_CHECK_TARGETS'], sys.argv[1:])")
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main(["--check-targets", str(program), "--flag"]) == 0
    lsk.cross_entropy(x, y, z_loss=0.1, backend="cpu")
    assert len(looked) == 1
