"""What users write, as type checkers and help() see it: `make lint` checks the programs of tests/typing, here they run;
names, types and defaults of options are the same wherever they stand."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import subprocess
import sys
import typing
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typing_extensions
from sharded import needs_gloo, spawn
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import conventions, options
from labelsmooth_kernels.distillation import distillation_loss

sys.path.append(str(Path(__file__).parent / "typing"))
import right
import wrong

if TYPE_CHECKING:
    from collections.abc import Callable

RIGHT = {name: call for name, call in vars(right).items() if inspect.isfunction(call) and call.__module__ == "right"}
ON_ONE = [name for name in RIGHT if not inspect.signature(RIGHT[name]).parameters and name != "over_ranks"]
OPTIONS = {f.name: f for f in dataclasses.fields(lsk.LossSpec)}
PER_BATCH = {"row_weight", "normalizer"}
ALL = set(OPTIONS)
EVALUATED = {"ignore_index", "class_dim", "backend"}

FUNCTIONS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "cross_entropy": (lsk.cross_entropy, ALL),
    "linear_cross_entropy": (lsk.linear_cross_entropy, ALL - {"inplace"}),
    "parallel.cross_entropy": (lsk.parallel.cross_entropy, ALL),
    "parallel.linear_cross_entropy": (lsk.parallel.linear_cross_entropy, ALL - {"inplace"}),
    "CrossEntropyLoss": (lsk.CrossEntropyLoss.__init__, ALL - PER_BATCH),
    "LinearCrossEntropyLoss": (lsk.LinearCrossEntropyLoss.__init__, ALL - PER_BATCH - {"inplace"}),
    "distillation_loss": (distillation_loss, ALL & options.DistillationOptions.__annotations__.keys()),
    "evaluate": (lsk.calibration.evaluate, EVALUATED | {"logit_scale", "softcap"}),
    "evaluate_classwise": (lsk.calibration.evaluate_classwise, EVALUATED - {"backend"} | {"logit_scale", "softcap"}),
    "fit_temperature": (lsk.calibration.fit_temperature, EVALUATED),
    "compare": (lsk.smoothing.compare, EVALUATED),
}
"""Every public function and module with options, and which of the loss it has."""
EPSILON = float | Tensor | lsk.smoothing.Schedule
OTHERWISE = {
    ("linear_cross_entropy", "class_dim"): (int, -1),
    ("linear_cross_entropy", "ignore_index"): (int | None, None),
    ("parallel.linear_cross_entropy", "class_dim"): (int, -1),
    ("CrossEntropyLoss", "label_smoothing"): (EPSILON, 0.0),
    ("LinearCrossEntropyLoss", "class_dim"): (int, -1),
    ("LinearCrossEntropyLoss", "ignore_index"): (int | None, None),
    ("LinearCrossEntropyLoss", "label_smoothing"): (EPSILON, 0.0),
    ("distillation_loss", "class_dim"): (int | None, None),
}
"""(type, default) where they are not LossSpec's: PyTorch's, or of classes that are last."""


@pytest.mark.parametrize("name", ON_ONE)
def test_right_programs_run(name: str) -> None:
    RIGHT[name]()


def is_refused(name: str) -> None:
    call, error = wrong.WRONG[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("name", [name for name in wrong.WRONG if "over_ranks" not in name])
def test_wrong_calls_raise(name: str) -> None:
    is_refused(name)


def _on_one_rank(rank: int) -> None:
    right.over_ranks()
    for name in wrong.WRONG:
        if "over_ranks" in name:
            is_refused(name)


@needs_gloo
def test_programs_over_ranks(tmp_path: Path) -> None:
    spawn(_on_one_rank, 1, tmp_path)


ASIDE = ("self", "return", "return_stats", "return_terms")
"""What types tell apart by its value."""


def type_of(annotation: str, function: Callable[..., Any]) -> Any:
    return eval(annotation, {**vars(inspect.getmodule(function)), **vars(typing)})


def typed(function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function as type checkers see them: those it names, and those of its TypedDict."""
    found = dict(function.__annotations__)
    unpacked = found.pop("options").removeprefix("Unpack[").removesuffix("]")
    types = {name: type_of(a, function) for name, a in found.items() if name not in ASIDE}
    return {**types, **typing.get_type_hints(getattr(options, unpacked))}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_type_checkers_see_the_arguments_that_there_are(name: str) -> None:
    function, _ = FUNCTIONS[name]
    shown = inspect.signature(function).parameters
    real = {n: type_of(p.annotation, function) for n, p in shown.items() if n not in ASIDE}
    versions = typing.get_overloads(function)
    assert len(versions) == 3 or not shown.keys() & {"return_stats", "return_terms"}
    for version in versions or [function]:
        assert typed(version) == real
        for n, p in inspect.signature(version).parameters.items():
            if n not in ASIDE and p.kind is not p.VAR_KEYWORD:
                assert (p.kind, p.default) == (shown[n].kind, shown[n].default), n


@pytest.mark.parametrize("name", FUNCTIONS)
def test_help_shows_every_option_with_its_default(name: str) -> None:
    function, has = FUNCTIONS[name]
    shown = inspect.signature(function).parameters
    assert OPTIONS.keys() & shown.keys() == has
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    for n in has:
        usual = type_of(OPTIONS[n].type, lsk.LossSpec), OPTIONS[n].default
        assert (type_of(shown[n].annotation, function), shown[n].default) == OTHERWISE.get((name, n), usual), n
        assert f"{n}: " in pydoc.render_doc(function)
    public = getattr(lsk, name, None)
    if inspect.isclass(public):
        assert list(inspect.signature(public).parameters) == [n for n in shown if n != "self"]


def test_modules_declare_what_they_keep() -> None:
    kept = {n: type_of(a, lsk.CrossEntropyLoss) for n, a in lsk.CrossEntropyLoss.__annotations__.items()}
    types = {n: type_of(f.type, lsk.LossSpec) for n, f in OPTIONS.items() if n not in PER_BATCH}
    assert kept == types | {"label_smoothing": EPSILON}
    module = lsk.LinearCrossEntropyLoss(3, 5)
    assert all(hasattr(module, n) for n in kept)


def test_conventions_are_options() -> None:
    types = {n: type_of(f.type, lsk.LossSpec) for n, f in OPTIONS.items()}
    hints = typing_extensions.get_type_hints(conventions.Options)  # without Required, in Python 3.10 too
    assert hints.items() <= types.items()
    assert conventions.fairseq(0.1, 1).keys() <= hints.keys()
    assert "return_stats" not in hints


def test_options_are_there_to_annotate_with() -> None:
    """As the README says, without another import."""
    program = "import labelsmooth_kernels; labelsmooth_kernels.options.LossOptions"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
