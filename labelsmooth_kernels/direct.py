"""Calls with the arguments of ``F.cross_entropy`` alone, which the compiled extension serves on a CPU from there to
autograd's node (csrc/direct.cpp): where rows are few, Python takes most of the time of a call."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from . import backends
from .autograd import LOGITS, Gradient, row_arguments
from .ops import LIBRARY
from .spec import LossSpec, Rows


@functools.cache
def _extension() -> Any:
    return None if backends.BACKENDS["cpu"].unavailable() else importlib.import_module("labelsmooth_kernels._C")


def is_default(backend: object) -> bool:
    """Return whether a backend is the one that serves a call here anyway."""
    return backend is None or (type(backend) is str and backend == "cpu")


def cross_entropy(
    input: object, target: object, weight: object, ignore_index: object, reduction: object, eps: object
) -> Tensor | None:
    """Return the loss of logits on the CPU; None where the gate has to look at the call: for other tensors,
    while PyTorch traces or transforms, and where something is wrong."""
    if torch.compiler.is_compiling() or (extension := _extension()) is None:
        return None
    return extension.cross_entropy(input, target, weight, ignore_index, reduction, eps)  # type: ignore[no-any-return]


def _gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, eps: float, ignore_index: int
) -> Tensor:
    """The operator ``cpu_gradient``: how the extension's backward is differentiated again."""
    spec = LossSpec(label_smoothing=eps, ignore_index=ignore_index)
    rows, kernels = Rows(spec, logits, target, weight, None, eps, None), backends.kernels_of("cpu")
    with torch.no_grad():
        _, saved, *_ = kernels.forward(logits, *row_arguments(rows, None), False, 0)
    tensors = (logits, target, weight, None, None, saved, scale.expand(rows.n))
    return Gradient.apply(*tensors, eps, spec, kernels, LOGITS)  # type: ignore[no-any-return, no-untyped-call]


# torch.func would otherwise take it for one operator without a rule of its own.
LIBRARY.impl("cpu_gradient", _gradient, "CompositeImplicitAutograd")
LIBRARY.impl("cpu_gradient", _gradient, "FuncTorchDynamicLayerFrontMode")
