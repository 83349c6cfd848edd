"""Soft targets of a head: probability on some classes of a row, or the distribution of another head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import plain_float, same_shape
from .chunked import Soft
from .spec import FLOAT_DTYPES, INDEX_DTYPES, ArgumentError, check_same_device, constant, require
from .torch_state import readable, savable


class TopK(NamedTuple):
    """A soft target with probability on k classes of each row; ``linear_cross_entropy`` takes it as ``target``."""

    indices: Tensor
    """(..., k) int64, int32 or uint8 classes; where one occurs twice its probabilities add up"""
    probabilities: Tensor
    """(..., k) floating point, not assumed to sum to 1; without a gradient, which dense probabilities have"""


class Teacher(NamedTuple):
    """A soft target softmax(logit_scale·(hidden·linear_weightᵀ + linear_bias)), computed a chunk of rows at a time;
    ``linear_cross_entropy`` takes it as ``target``. A constant: a tensor of it that requires a gradient raises an
    ArgumentError, so compute it under torch.no_grad or detach() it; or, where the loss is not compiled, under
    torch.inference_mode."""

    hidden: Tensor
    """(..., D') of any D'"""
    linear_weight: Tensor
    """(K, D')"""
    linear_bias: Tensor | None = None
    logit_scale: float = 1.0
    """1/temperature"""


def flat(rows: Tensor) -> Tensor:
    """(N, D)"""
    return rows.unsqueeze(0) if rows.dim() == 1 else rows.flatten(0, -2)


def top_k(target: TopK, logits: Tensor) -> tuple[Tensor, Soft]:
    """The target beside logits with the classes last: probabilities (N, k) and the rest, whose classes are to be
    checked by :func:`check_top_k`."""
    indices, probabilities = target
    shape = tuple(logits.shape[:-1])
    for name, value, dtypes in (("indices", indices, INDEX_DTYPES), ("probabilities", probabilities, FLOAT_DTYPES)):
        require(isinstance(value, Tensor), f"target.{name}", value, "a Tensor")
        good = value.dtype in dtypes and value.dim() == logits.dim() and value.shape[-1] == indices.shape[-1]
        good = good and same_shape(value.shape[:-1], logits.shape[:-1])
        require(good, f"target.{name}", value, f"of shape {(*shape, 'k')}, one of {dtypes}")
        check_same_device(f"target.{name}", value, logits)
    if probabilities.requires_grad and torch.is_grad_enabled():
        raise ArgumentError("target.probabilities must not require a gradient: use detach(), or dense probabilities")
    return savable(flat(probabilities)), Soft(indices=savable(flat(indices).to(torch.int64)))


def check_top_k(indices: Tensor, num_classes: int) -> None:
    """Raise IndexError for what is no class, on a CPU."""
    if readable(indices) and indices.numel():
        least, largest = indices.min().item(), indices.max().item()
        if least < 0 or largest >= num_classes:
            raise IndexError(f"target.indices must be in [0, {num_classes}), got {least if least < 0 else largest}")


def teacher_rows(name: str, teacher: Teacher, logits: Tensor) -> tuple[Tensor, Soft]:
    """The teacher of the argument ``name``, beside logits with the classes last: hidden states (N, D') and the rest."""
    if not isinstance(teacher, Teacher):
        raise TypeError(f"{name} must be a Tensor, TopK or Teacher, got {type(teacher).__name__}")
    hidden, weight, bias, scale = teacher
    shape, num_classes = tuple(logits.shape[:-1]), logits.shape[-1]
    for part, value in (("hidden", hidden), ("linear_weight", weight), ("linear_bias", bias)):
        if value is not None or part != "linear_bias":
            good = isinstance(value, Tensor) and value.dtype in FLOAT_DTYPES
            require(good, f"{name}.{part}", value, "a floating-point Tensor")
            check_same_device(f"{name}.{part}", value, logits)  # type: ignore[arg-type]
    good = hidden.dim() > 0 and same_shape(hidden.shape[:-1], logits.shape[:-1])
    require(good, f"{name}.hidden", hidden, f"of shape {(*shape, 'D')}")
    head = (num_classes, hidden.shape[-1])
    require(weight.shape == head, f"{name}.linear_weight", weight, f"of shape {head}")
    require(bias is None or bias.shape == (num_classes,), f"{name}.linear_bias", bias, f"of shape ({num_classes},)")
    scale = plain_float(scale)
    good = isinstance(scale, int | float) and -math.inf < scale < math.inf
    require(good, f"{name}.logit_scale", scale, "a finite number")
    hidden, weight = constant(f"{name}.hidden", hidden), constant(f"{name}.linear_weight", weight)
    return flat(hidden), Soft(None, weight, None if bias is None else constant(f"{name}.linear_bias", bias), scale)
