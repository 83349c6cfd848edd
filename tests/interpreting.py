"""Triton's interpreter without the work that it repeats: the same results in a third of the time.

The interpreter replaces the functions of ``triton.language`` by its own at the start of a kernel and again, by listing
every member of every module, at each call of a function inside the kernel: 730 times for six rows of 37 classes, 60 %
of the time. The kernel's replacement holds for what it calls, so that once for each module of such functions is enough.
It also builds a table of dtypes at each look into it.
"""

from __future__ import annotations

import importlib
from typing import Any


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
