"""What the operators rely on, looked at before a kernel reads memory; in the words of ``csrc/operands.h``."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

SERVED = (torch.float16, torch.bfloat16, torch.float32)


def require(holds: bool, name: str, rule: str, got: object) -> None:
    if not holds:
        raise RuntimeError(f"{name} must {rule}, got {got}")


def check_served(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SERVED:
        raise TypeError(f"{name}: {tensor.dtype} is not served by the Triton kernels: float16, bfloat16, float32 are")


def check_rows(name: str, tensor: Tensor, written: bool) -> None:
    """Logits, or a tensor like them: whose dtype is served, and whose rows have classes."""
    check_served(name, tensor)
    shape = tuple(tensor.shape)
    require(len(shape) in (2, 3), name, "have 2 or 3 dimensions", f"shape {shape}")
    require(shape[-1] >= 1 or 0 in shape[:-1], name, "have at least one class", f"shape {shape}")
    if written:
        check_writable(name, tensor)


def check_writable(name: str, tensor: Tensor) -> None:
    """Dimensions in the order of their strides, of which each steps over all that lies before it."""
    last = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            rule = "not overlap itself, since it is written in place"
            require(stride > last, name, rule, f"strides {tensor.stride()}")
            last += stride * (size - 1)


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    require(tensor.device == device, name, f"be on the device of the logits, {device}", tensor.device)


def check_vector(name: str, vector: Tensor | None, sizes: tuple[int, ...], device: torch.device) -> None:
    """float32, as the arithmetic is, and contiguous."""
    if vector is None:
        return
    require(vector.dtype == torch.float32, name, "be float32", vector.dtype)
    check_device(name, vector, device)
    require(vector.is_contiguous(), name, "be contiguous", f"strides {vector.stride()}")
    require(vector.numel() in sizes, name, f"have {' or '.join(map(str, sizes))} elements", vector.numel())


def check_index_target(target: Tensor, n: int, device: torch.device) -> None:
    require(target.dtype == torch.int64, "target", "be int64 or floating-point", target.dtype)
    require(tuple(target.shape) == (n,), "target", f"have shape ({n},)", tuple(target.shape))
    require(target.is_contiguous(), "target", "be contiguous", f"strides {target.stride()}")
    check_device("target", target, device)


def check_call(call: Any, n: int, k: int, logits: Tensor) -> None:
    """All but the logits themselves of a call of the row operators."""
    device = logits.device
    if call.target.is_floating_point():
        same = call.target.shape == logits.shape
        require(same, "target", f"have the shape of logits, {tuple(logits.shape)}", tuple(call.target.shape))
        check_device("target", call.target, device)
    else:
        check_index_target(call.target, n, device)
    for name, size in (("weight", (k,)), ("prior", (k,)), ("eps_rows", (1, n)), ("row_scale", (1, n))):
        check_vector(name, getattr(call, name), size, device)
    require(call.softcap is None or call.softcap > 0, "softcap", "be positive", call.softcap)


def check_saved(saved: Tensor, n: int, device: torch.device) -> None:
    require(tuple(saved.shape) == (4, n), "saved", f"have shape (4, {n})", tuple(saved.shape))
    check_vector("saved", saved, (4 * n,), device)


def check_n_stats(n_stats: int) -> None:
    require(n_stats in (0, 1, 2, 4), "n_stats", "be 0, 1, 2 or 4", n_stats)
