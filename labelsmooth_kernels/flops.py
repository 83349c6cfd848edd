"""The floating-point operations of the fused heads, for ``torch.utils.flop_counter.FlopCounterMode``.

The counter sees a whole operator of ours and none of the GEMMs inside, so each operator that holds some has a formula:
2·N·K·D for every product of (N, D) hidden states, or of their gradient, with a (K, D) head. A forward without gradients
makes one; forward and backward together make three (6·N·K·D) where the gradients are made in the forward, four where
the backward makes the logits again, five with ``method="tiled"`` (of which its filter may skip tiles that are counted).
Rows left out of the products (``skip_ignored``) are not counted, unless the targets are fake.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

from .ops import NAMESPACE
from .ranks import group_named

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

COUNTER = "torch.utils.flop_counter"


def _product(rows: int, head: torch.Tensor) -> int:
    return 2 * rows * head.shape[0] * head.shape[1]


def _chunked(call: Mapping[str, Any]) -> int:
    """The logits, the wanted ones of the gradients of hidden states and head, and a teacher's logits."""
    target, rows = call["target"], len(call["hidden"])
    skips = call["skip_ignored"] and call["positions"] == 1 and not call.get("n_stats", 0)
    if skips and not target.is_floating_point() and not isinstance(target, FakeTensor) and not target.is_meta:
        rows = int((target != call["ignore_index"]).sum())
    found: int = (1 + sum(call["wanted"][:2])) * _product(rows, call["linear_weight"])
    return found if call["teacher_weight"] is None else found + _product(rows, call["teacher_weight"])


def _tiled_forward(call: Mapping[str, Any]) -> int:
    return _product(len(call["hidden"]), call["linear_weight"])


def _tiled_backward(call: Mapping[str, Any]) -> int:
    """A sweep for each operand, which makes the logits again; that of the hidden states also finds what is filtered."""
    want_hidden, want_weight, want_bias = (call[f"want_{name}"] for name in ("hidden", "weight", "bias"))
    of_weight = want_weight or want_bias
    sweeps = (want_hidden or (of_weight and call["filter_eps"] > 0)) + of_weight
    return (sweeps + want_hidden + want_weight) * _product(len(call["hidden"]), call["linear_weight"])  # type: ignore[no-any-return]


def _sharded(call: Mapping[str, Any]) -> int:
    """This rank's part, as of :func:`_chunked`; with ``grad_reduce="scatter"`` the rows of every rank."""
    rows: int = len(call["hidden"])
    if call["grad_reduce"] == "scatter":
        rows *= dist.get_world_size(group_named(call["group"]))
    gradients = sum(call["wanted"][:2]) if call.get("one_pass", True) else 0
    return (1 + gradients) * _product(rows, call["linear_weight"])


def _distill(call: Mapping[str, Any]) -> int:
    """The logits of a teacher's head, in every pass."""
    return 0 if call["teacher_weight"] is None else _product(len(call["teacher"]), call["teacher_weight"])


FORMULAS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "chunked_forward": _chunked,
    "chunked_backward": _chunked,
    "tiled_forward": _tiled_forward,
    "tiled_backward": _tiled_backward,
    "sharded_linear_forward": _sharded,
    "sharded_linear_backward": _sharded,
    "distill": _distill,
}
"""The operators that hold GEMMs, with the count of a call given by the names of the operator's arguments."""


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        operator = getattr(getattr(torch.ops, NAMESPACE), name)
        names = [argument.name for argument in operator.default._schema.arguments]

        def count(*args: Any, out_val: Any = None, names: Any = names, formula: Any = formula, **kwargs: Any) -> int:
            return formula(dict(zip(names, args, strict=False)) | kwargs)  # type: ignore[no-any-return]

        counter.register_flop_formula(operator, get_raw=True)(count)


class _WhenImported(MetaPathFinder):
    """Registers the formulas when the counter is imported: not before, for it imports Triton, nor in a call, for a
    counter copies the registry when it is made. It stays, for the sake of a second look at the module or a reload."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register(module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def count_operators() -> None:
    """Give FlopCounterMode the formulas: now where it is imported, else as soon as it is."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    sys.meta_path.insert(0, _WhenImported())
