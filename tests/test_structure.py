"""The shape of the code, kept by reading it: floors, public names, names of the maths, sizes, environment."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import labelsmooth_kernels as lsk
from labelsmooth_kernels import torch_state

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
PACKAGE, TRITON, CSRC = ROOT / "labelsmooth_kernels", ROOT / "triton_kernels", ROOT / "csrc"
# A module imports only from the floors before its own.
FLOORS = """arguments fusing options torch_state | spec | reference ops | backends conventions reliability |
    autograd chunked | direct | functional linear_autograd shards | targets ranks distillation_autograd | linear |
    classwise | parallel_rows calibration distillation representation | parallel_linear smoothing | parallel |
    modules doctor dtensor flops | __init__ __main__"""
LATE = {("functional", "dtensor"), ("linear", "dtensor")}
"""Upward, inside a function: a call with DTensors goes to those who know them."""
PUBLIC = """ArgumentError CrossEntropyLoss LabelSmoothingCrossEntropy LinearCrossEntropyLoss LossSpec RowStats Teacher
    TopK calibration conventions cross_entropy distillation functional linear_cross_entropy options parallel
    reference representation smoothing"""
PARAMETERS = """input target weight size_average ignore_index reduce reduction label_smoothing smoothing smooth_over
    class_dim z_loss confidence_penalty logit_scale softcap row_weight normalizer inplace return_stats backend"""
ENVIRONMENT = {"LABELSMOOTH_CHECK_TARGETS", "LABELSMOOTH_DEBUG", "TRITON_INTERPRET"}
SOURCES = [
    path
    for folder in ("labelsmooth_kernels", "triton_kernels", "csrc", "tests", "bench", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in {".py", ".cpp", ".h", ".cu", ".cuh"}
]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(level, first name) of every import of a file, also those inside functions; ``from . import a, b`` gives each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_imports_point_downward(path: Path) -> None:
    floor = {name: i for i, names in enumerate(FLOORS.split("|")) for name in names.split()}
    assert path.stem in floor, "a new module needs a floor"
    own = {name for level, name in imports(path) if level or name in ("labelsmooth_kernels", "triton_kernels")}
    upward = {name for name in own if floor.get(name, len(floor)) >= floor[path.stem] and (path.stem, name) not in LATE}
    assert not upward, f"{path.stem} imports {upward} from its own floor or above"


def test_the_state_of_pytorch_is_asked_for_in_one_module() -> None:
    private = re.compile(r"\b(torch\._C|torch\._assert|forward_ad\._)")
    found = {path.name for path in PACKAGE.glob("*.py") if private.search(path.read_text())}
    assert found == {"torch_state.py"}


@pytest.mark.parametrize("path", sorted(TRITON.glob("*.py")), ids=lambda path: path.stem)
def test_triton_kernels_is_a_leaf(path: Path) -> None:
    outside = {name for level, name in imports(path) if not level} - {"torch", "triton"} - sys.stdlib_module_names
    assert not outside


def test_no_module_imports_a_test_module() -> None:
    """What several of them use is in a module that holds no test, so that one can change or run without another."""
    files = (path for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py")))
    found = {(path.name, name) for path in files for _, name in imports(path) if name.startswith("test_")}
    assert not found


def test_public_names_are_pinned() -> None:
    assert sorted(lsk.__all__) == PUBLIC.split()
    assert all(hasattr(lsk, name) for name in lsk.__all__)
    assert list(inspect.signature(lsk.cross_entropy).parameters) == PARAMETERS.split()
    options = [name for name in PARAMETERS.split()[2:] if name not in ("size_average", "reduce")]
    assert options == list(inspect.signature(lsk.LossSpec).parameters), "one frozen object holds every option"
    assert (PACKAGE / "py.typed").exists()


IMPORTED = """
import sys, time, torch
before, known = time.process_time(), set(sys.modules)
import labelsmooth_kernels as lsk
seconds = time.process_time() - before
assert seconds < 0.3, seconds
x, y = torch.ones(2, 3, requires_grad=True), torch.tensor([0, 1])
lsk.cross_entropy(x, y, label_smoothing=0.1).backward()
lsk.LinearCrossEntropyLoss(3, 4)(x, y).backward()
lsk.distillation.distillation_loss(x, x.detach()).backward()
heavy = {"torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.flop_counter", "triton", "sympy"}
assert not heavy & (set(sys.modules) - known), heavy & (set(sys.modules) - known)
"""


def test_the_import_and_a_call_on_the_cpu_load_nothing_heavy() -> None:
    """torch._dynamo takes 2.5 s and 70 MB; the marks that torch.compiler would set with it are these."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [subprocess.run([sys.executable, "-c", IMPORTED], env=environment, check=False) for _ in range(3)]
    assert not min(program.returncode for program in run), "once in three times no other process was in the way"
    theirs = torch.compiler.assume_constant_result(lambda: 1), torch.compiler.disable(lambda: 1, reason="why")
    ours = torch_state.constant_in_graphs(lambda: 1), torch_state.outside_graphs("why")(lambda: 1)
    assert vars(theirs[0]) == vars(ours[0])
    for name in ("_torchdynamo_disable", "_torchdynamo_disable_msg"):
        assert vars(theirs[1])[name] == vars(ours[1])[name]
    assert ours[1]() == 1


@pytest.mark.parametrize("name", ["weights", "merge", "row_loss", "dz"])
def test_the_maths_has_one_set_of_names(name: str) -> None:
    for path in (PACKAGE / "reference.py", TRITON / "row_math.py"):
        assert name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert re.search(rf"^LSK_INLINE .*\b{name}\(", (CSRC / "row_math.h").read_text(), re.MULTILINE)


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """(name, lines of its body after the docstring)."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, (node.end_lineno or 0) - body[0].lineno + 1 if body else 0


def c_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks that end as far to the left as they begin, as clang-format leaves functions and those of a class."""
    begin, indent = None, ""
    for i, line in enumerate(text.splitlines()):
        if begin is not None:
            if line.startswith(indent + "}"):
                yield f"line {begin + 1}", i - begin - 1
                begin = None
        elif found := re.match(r"( *)(?!namespace|struct|extern|enum|class|union)[A-Za-z].*\{$|( +)\S.*\) \{$", line):
            begin, indent = i, found[1] or found[2] or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    functions = list((python_functions if path.suffix == ".py" else c_functions)(text))
    assert not [(name, lines) for name, lines in functions if lines > 60]


def test_at_most_three_environment_variables() -> None:
    """Read by name or through a constant; all of them in the README."""
    texts = [p.read_text() for p in SOURCES if p.is_relative_to(PACKAGE) or p.parent in (TRITON, CSRC)]
    every, read = "\n".join(texts), set()
    for found in re.findall(r"(?:environ(?:\.get\(|\[)|getenv\()\s*([\"'\w]+)", every):
        constant = re.search(rf"^{found} = (.*)$", every, re.MULTILINE)
        read.add((constant.group(1) if constant else found).strip("\"'"))
    assert not re.search(r"environ\b(?!\.get\(|\[|ment)", every.replace("environment", "")), "read in another way"
    assert read == ENVIRONMENT
    assert len(ENVIRONMENT) <= 3
    assert all(name in (ROOT / "README.md").read_text() for name in ENVIRONMENT)
