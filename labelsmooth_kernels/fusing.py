"""Some dozens of small operations on a few numbers per row: as few kernels on GPUs as torch.compile makes of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch.utils._triton import has_triton

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_T = TypeVar("_T")


def fuses(device: torch.device) -> bool:
    """Whether small operations take longer to start there than to run, and torch.compile can make few of many."""
    return not torch.compiler.is_compiling() and device.type == "cuda" and has_triton()


def fused(function: Callable[_P, _T], device: torch.device) -> Callable[_P, _T]:
    """``function``, compiled where that helps; it should make no objects but tensors and tuples of them."""
    return _compiled(function) if fuses(device) else function


@functools.cache
def _compiled(function: Callable[_P, _T]) -> Callable[_P, _T]:
    return torch.compile(function, dynamic=True)
