"""Triton's interpreter without the work that it repeats: the same results in a sixth of the time.

The interpreter replaces the functions of ``triton.language`` by its own at the start of a kernel and again, by listing
every member of every module, at each call of a function inside the kernel: 730 times for six rows of 37 classes, 60 %
of the time. The kernel's replacement holds for what it calls, so that once for each module of such functions is enough.
It also builds a table of dtypes at each look into it, the objects of a shape for each tensor, and repeats every sum
and product of integers in 64 bits for an assertion that it then leaves out.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
import sys
from typing import Any


def unusable() -> str | None:
    """Why Triton's interpreter cannot run any kernel here: before 3.7 it takes arrays of one element for numbers, which
    NumPy refuses from 2.4 on."""
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or "lambda self: int(self.handle.data)" not in inspect.getsource(interpreter):
        return None
    numpy = importlib.import_module("numpy")
    try:
        int(numpy.ones(1))
    except TypeError:
        return f"this Triton's interpreter needs NumPy < 2.4, and this is {numpy.__version__}"
    return None


def quicken() -> None:
    """Patch Triton's interpreter where it is what this module was written for; else leave it as it is."""
    try:
        interpreter = importlib.import_module("triton.runtime.interpreter")
    except ImportError:
        return
    function = getattr(interpreter, "InterpretedFunction", None)
    if not all(hasattr(function, name) for name in ("rewrite", "__call__")) or not hasattr(interpreter, "_patch_lang"):
        return
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call
    _remember_dtypes(interpreter)
    _remember_shapes(interpreter.tl)
    _assert_nothing(interpreter)


def _remember_dtypes(interpreter: Any) -> None:
    look, kind, found = getattr(interpreter, "_get_np_dtype", None), interpreter.tl.dtype, {}
    if look is None:
        return

    def remembered(dtype: Any) -> Any:
        if type(dtype) is not kind:
            return look(dtype)  # pointers and blocks
        if dtype.name not in found:
            found[dtype.name] = look(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = remembered


def _remember_shapes(tl: Any) -> None:
    """Make the objects of each shape once; a Triton whose tensors and types hold something else is left as it is."""
    tensor, block_type, tuples, constexpr = tl.tensor, tl.block_type, tl.core.tuple, tl.constexpr
    as_written = block_type.__init__
    scalar = tuples([]), constexpr(1)

    @functools.cache
    def of(sizes: tuple[int, ...]) -> tuple[Any, ...]:
        written = object.__new__(block_type)
        as_written(written, tl.float32, list(sizes))
        of_tensors = tuples([constexpr(size) for size in sizes]), constexpr(math.prod(sizes))
        return written.shape, written.numel, str(written.shape), of_tensors

    def create_type(self: Any, element_ty: Any, shape: Any) -> None:
        self.element_ty = element_ty
        self.shape, self.numel, text, self.of_tensors = of(tuple([getattr(size, "value", size) for size in shape]))
        self.name = f"<{text}, {element_ty}>"

    def create(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type.of_tensors if type.is_block() else scalar

    before = block_type(tl.float32, [2, 4])
    held = tensor(None, before)
    block_type.__init__ = create_type
    after, made = block_type(tl.float32, [2, constexpr(4)]), object.__new__(tensor)
    create(made, None, after)
    same = [{n: str(v) for n, v in vars(o).items() if n != "of_tensors"} for o in (before, after, held, made)]
    if same[0] == same[1] and same[2] == same[3]:
        tensor.__init__ = create
    else:
        block_type.__init__ = as_written


def _assert_nothing(interpreter: Any) -> None:
    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and getattr(options, "debug", True) is False:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
