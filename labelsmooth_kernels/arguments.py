"""What a call is written with, before any of it is looked at: names of arguments, and types that stand for numbers."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import operator
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_P = ParamSpec("_P")
_T = TypeVar("_T")


def check_names(function: str, given: Iterable[str], options: Iterable[str]) -> None:
    """Raise a TypeError for the first given name that is none of the ``options`` of a public function."""
    for name in given:
        if name not in options:
            part = [option for option in options if name in option or option in name]  # bias and linear_bias
            near = difflib.get_close_matches(name, part, 1, 0) or difflib.get_close_matches(name, options, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"its options are {', '.join(sorted(options))}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {hint}")


def takes(parameters: Iterable[inspect.Parameter]) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Show ``parameters``, which are keyword-only, in help() and completion in place of a function's ``**options``; the
    function's own parameters stay as they are."""

    def mark(function: Callable[_P, _T]) -> Callable[_P, _T]:
        signature = inspect.signature(function)
        own = {name: p for name, p in signature.parameters.items() if p.kind is not p.VAR_KEYWORD}
        more = [p for p in parameters if p.name not in own]
        function.__signature__ = signature.replace(parameters=[*own.values(), *more])  # type: ignore[attr-defined]
        return function

    return mark


def options_of(function: Callable[..., object]) -> frozenset[str]:
    """The names by which a function can be given its arguments."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in inspect.signature(function).parameters.values() if p.kind in named)


def not_scriptable(*_: object) -> NoReturn:
    """Raise the error of ``torch.jit.script``, which asks a function for its ``__prepare_scriptable__``."""
    raise RuntimeError(
        "labelsmooth_kernels cannot be compiled by torch.jit.script: use torch.compile or torch.export, or "
        "torch.jit.trace, which records the loss as plain operations of PyTorch"
    )


def unscriptable(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let ``torch.jit.script`` say what to use instead, where it would complain about the function's signature."""
    function.__prepare_scriptable__ = not_scriptable  # type: ignore[attr-defined]
    return function


def checks_names(name: str, more: Iterable[str] = ()) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Let a public function or constructor refuse a wrong keyword under its own ``name``, with the nearest option; for
    the names in ``more`` it has an error of its own, and so they are not offered."""

    def mark(function: Callable[_P, _T]) -> Callable[_P, _T]:
        offered = options_of(function) - {"self"}
        options = offered.union(more)

        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            if not options.issuperset(kwargs):
                check_names(name, (given for given in kwargs if given not in options), offered)
            return function(*args, **kwargs)

        return unscriptable(run)

    return mark


def same_shape(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Return whether two shapes are equal. A size that torch.compile does not know while it traces counts as equal; the
    compiled program then checks it at run time, as PyTorch's own operators do."""
    if len(shape) != len(other):
        return False
    if not torch.compiler.is_compiling():
        return tuple(shape) == tuple(other)
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # which a compiler has loaded

    pairs = list(zip(shape, other, strict=True))
    if not all(guard_or_true(size == its) for size, its in pairs):
        return False
    for size, its in pairs:
        torch._check(size == its)
    return True


def known_size(size: int, expected: int) -> bool:
    """Return whether a size is the expected one; False where torch.compile does not know the size while it traces."""
    if not torch.compiler.is_compiling():
        return size == expected
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(size == expected))


def plain_int(value: Any) -> Any:
    """The int that a value with ``__index__`` stands for (NumPy's, a tensor of one int), as PyTorch takes them; any
    other value, bools among them, as it is."""
    if isinstance(value, int) or not hasattr(value, "__index__") or getattr(value, "dtype", None) == torch.bool:
        return value
    try:
        return operator.index(value)
    except TypeError:  # NumPy's bool, a tensor that is no int
        return value


def plain_float(value: Any) -> Any:
    """The float that a real number of another type (NumPy's float32) stands for; any other value as it is."""
    if isinstance(value, int | float | Tensor) or not isinstance(value, numbers.Real):
        return value
    return float(value)
