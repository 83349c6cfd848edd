"""The doctor: what it says of every backend, of one that disagrees, and of kernels that are missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import skip_unless_available

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends, doctor

PACKAGE = Path(lsk.__file__).parent
COST = "served by the plain PyTorch reference"


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


def diagnosis(folder: Path, *, extension: bool, torch_version: str | None = None) -> tuple[int, int, str]:
    """The exit codes without and with ``--strict``, and the last words, of a copy of the package without GPUs."""
    copy = folder / "labelsmooth_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if torch_version is not None:
        (copy / "_build_info.json").write_text(json.dumps({"built": "cpu", "torch": torch_version}))
    elif not extension:
        (copy / "_build_info.json").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    # An editable install would find an extension that is removed from the copy, so it is hidden.
    hide = "" if extension else "sys.modules['labelsmooth_kernels._C'] = None; "
    program = (
        f"import sys; {hide}from labelsmooth_kernels.doctor import main; sys.exit(10 * main([]) + main(['--strict']))"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    once, twice = run.stdout.split("python  ")[1:]
    assert once == twice, run.stderr
    assert f"extension  {'cpu' if (copy / '_build_info.json').exists() else 'not built'}" in once
    return run.returncode // 10, run.returncode % 10, once.split("\nreference: ")[1]


@pytest.mark.slow
def test_nothing_is_missing_where_the_extension_is_built(tmp_path: Path) -> None:
    skip_unless_available("cpu")
    *codes, words = diagnosis(tmp_path, extension=True)
    assert codes == [0, 0], "a GPU's kernels are not missed without a GPU"
    assert words.endswith(
        "every available backend agrees with float64; no kernels that this machine could use are missing\n"
    )
    assert "MISSING" not in words


@pytest.mark.slow
@pytest.mark.parametrize("torch_version", [None, "1.0"], ids=["never built", "built for another torch"])
def test_missing_kernels_have_a_reason_a_cost_and_a_cure(tmp_path: Path, torch_version: str | None) -> None:
    if torch_version is not None:
        skip_unless_available("cpu")
    *codes, words = diagnosis(tmp_path, extension=torch_version is not None, torch_version=torch_version)
    assert codes == [0, 1]
    assert "MISSING: the C++ kernels for the CPU" in words
    why = "was not built" if torch_version is None else f"was built for torch 1.0 and this is {torch.__version__}"
    assert why in words
    assert f"CPU tensors are {COST}" in words
    assert "LABELSMOOTH_BUILD=cpu pip install --no-build-isolation ." in words
    assert words.endswith("every available backend agrees with float64; KERNELS ARE MISSING\n")


@pytest.mark.parametrize(
    ("capability", "working", "cures"),
    [
        ((9, 0), {"triton"}, []),
        ((9, 0), {"cuda"}, []),
        ((9, 0), set(), ["pip install 'triton>=3.4' or ", "LABELSMOOTH_BUILD=cuda"]),
        ((7, 5), {"triton"}, ["LABELSMOOTH_BUILD=cuda"]),
        ((7, 0), set(), []),
    ],
    ids=str,
)
def test_one_kind_of_kernel_is_enough_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], working: set[str], cures: list[str]
) -> None:
    """There is none for a GPU older than those that the kernels are checked on, and so none is missing there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        backends.Backend,
        "unavailable",
        lambda self: None if self.name in {"cpu", *working} else f"no {self.name} today",
    )
    found = doctor._missing()
    assert [m.kernels for m in found] == ["kernels for the GPU"] * bool(cures)
    for missing in found:
        assert f"GPU tensors are {COST}" in missing.cost
        assert all(cure in missing.mend for cure in cures)
        assert ("triton" in missing.mend) == (capability >= (8, 0)) == ("no triton today" in missing.reason)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert not doctor._missing(), "no kernels exist for ROCm"
