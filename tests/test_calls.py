"""How a call reaches the kernels: every option of the module, compiled callers, each instruction set, the doctor."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import skip_unless_available
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, doctor

N, K = 6, 37
Place = tuple[str, str]


def draw(device: str = "cpu") -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    y = torch.randint(1, K, (N,), generator=rng)
    y[0] = -100
    return torch.randn(N, K, generator=rng).to(device), y.to(device)


OPTIONS: dict[str, Any] = {
    "weight": torch.linspace(0.1, 2, K),
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.3,
    "smoothing": torch.softmax(torch.arange(K) / 5, 0),
    "smooth_over": "finite",
    "class_dim": -1,
    "z_loss": 0.1,
    "logit_scale": 2.0,
    "softcap": 1.5,
    "inplace": True,
    "return_stats": True,
    "backend": "reference",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_module_passes_every_option_on(name: str) -> None:
    """Each one alone changes the loss, the gradient's place or the kind of result, the same way as in the function."""
    x, y = draw()
    x[1, 5:9] = -torch.inf
    y = torch.where((y == 3) | (y < 0) | ((y >= 5) & (y < 9)), 4, y)
    y[2] = 3
    if name == "class_dim":
        x, y = x.view(2, 3, K), y.view(2, 3)
    base = {"label_smoothing": 0.2, "smooth_over": "finite"} if name in ("smoothing", "smooth_over") else {}
    if name == "smooth_over":
        base["smooth_over"] = "all"
    given = {**base, name: OPTIONS[name]}
    module, got = lsk.CrossEntropyLoss(**given), []
    for call in (module, lambda *a, **k: lsk.cross_entropy(*a, **given, **k)):
        own = x.clone().requires_grad_()
        result = call(own, y)
        loss = result[0] if isinstance(result, tuple) else result
        loss.backward()
        got.append((result if isinstance(result, tuple) else (result, None), own.detach(), own.grad))
    for ours, theirs in zip(*got, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)
    assert repr(module) != repr(lsk.CrossEntropyLoss(**base))
    if name == "class_dim":
        return  # without it the call is an error
    if name == "inplace" and backends.BACKENDS["cpu"].unavailable() is None:
        assert not torch.equal(got[0][1], x)
    elif name not in ("inplace", "return_stats", "backend"):
        plain = lsk.cross_entropy(x, y, **base)
        assert not torch.equal(plain.nan_to_num(-1), got[0][0][0].detach().nan_to_num(-1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_row_weight_of_one_value_multiplies_every_row(place: Place, reduction: str) -> None:
    x, y = draw(place[1])
    results = []
    for weight in (torch.tensor(3.0, device=place[1]), torch.full((N,), 3.0, device=place[1])):
        leaf = x.clone().requires_grad_()
        loss = lsk.cross_entropy(leaf, y, reduction=reduction, row_weight=weight, backend=place[0])
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_caller_has_one_graph(reduction: str, inplace: bool) -> None:
    skip_unless_available("cpu")
    x, y = draw()

    def step(logits: Tensor, target: Tensor) -> Tensor:
        return lsk.cross_entropy(logits * 1, target, label_smoothing=0.1, reduction=reduction, inplace=inplace)

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        loss = call(leaf, y)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2**-21, atol=2**-27)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_passes_the_table(capability: str) -> None:
    """ATEN_CPU_CAPABILITY chooses the kernels at the start of a process, so the table runs again in one of its own."""
    skip_unless_available("cpu")
    from labelsmooth_kernels import _C

    env = dict(os.environ, ATEN_CPU_CAPABILITY=capability, CUDA_VISIBLE_DEVICES="")
    asked = "from labelsmooth_kernels import _C; print(_C.build_info()['cpu_capability'])"
    got = subprocess.run(
        [sys.executable, "-c", asked], env=env, capture_output=True, text=True, check=True
    ).stdout.strip()
    if got != capability.replace("default", "portable"):
        pytest.skip(f"this CPU and build run {got} when asked for {capability}")
    if got == _C.build_info()["cpu_capability"]:
        return  # what the rest of the suite runs with
    table = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu-cpu"]
    table.append(os.path.join(os.path.dirname(__file__), "test_parity_table.py"))
    run = subprocess.run(table, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def test_the_doctor_reports_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name, backend in backends.BACKENDS.items():
        section = printed.split(f"\n{name}: ")[1].split("\n\n")[0]
        assert ("missing" in section) == bool(backend.unavailable())
        assert ("agrees" in section) == (not backend.unavailable())


def test_the_doctor_finds_a_backend_that_disagrees(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lsk.reference, "weights", lambda e, _: (1 - e, 0 * e))
    monkeypatch.setattr(lsk.reference, "smoothing_distribution", lambda z, _: (z.new_zeros(z.shape[-1]), z.shape[-1]))
    assert doctor.main([]) == 1
    assert "DISAGREES" in capsys.readouterr().out


def test_the_switch_makes_a_bad_target_raise(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate looks at targets under the switch; ``--check-targets`` sets it for the program it runs."""
    looked = []
    monkeypatch.setattr(lsk.functional, "check_targets", looked.append)
    skip_unless_available("cpu")
    x, y = draw()
    lsk.cross_entropy(x, y, backend="cpu")
    assert not looked
    monkeypatch.setenv(lsk.functional.CHECK_TARGETS, "0")
    program = tmp_path / "program.py"
    program.write_text("import os, sys; print(os.environ['LABELSMOOTH_CHECK_TARGETS'], sys.argv[1:])")
    monkeypatch.setattr(sys, "argv", ["doctor"])
    assert doctor.main(["--check-targets", str(program), "--flag"]) == 0
    lsk.cross_entropy(x, y, backend="cpu")
    assert len(looked) == 1
