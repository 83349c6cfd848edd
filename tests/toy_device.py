"""A device that no kernel serves, "toy": PyTorch's backend in Python, whose operations run on CPU tensors behind it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "toy"
_setup_privateuseone_for_python_backend(DEVICE)
_FALLBACK, _ATEN = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_BEHIND: dict[int, tuple[Any, Tensor]] = {}
"""For each storage of the device the CPU tensor behind it, and that storage, which thereby outlives its number."""


def to_toy(raw: Tensor) -> Tensor:
    """A tensor of the device with these numbers."""
    tensor: Tensor = torch._C._acc.create_empty_tensor(raw.shape, raw.dtype)
    storage = tensor.untyped_storage()
    _BEHIND[storage._cdata] = storage, raw.contiguous()
    return tensor


def to_cpu(tensor: Tensor) -> Tensor:
    return _BEHIND[tensor.untyped_storage()._cdata][1] if tensor.device.type == DEVICE else tensor


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.device.type == DEVICE]
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map_only(Tensor, to_cpu, (args, kwargs))
    if op is torch.ops.aten._copy_from.default:  # from one device to another
        args[1].copy_(args[0])
        return given[-1]

    def on_toy(result: Tensor) -> Tensor:
        """What was written in place is the caller's tensor."""
        written = [tensor for tensor in given if to_cpu(tensor) is result]
        return written[0] if written else to_toy(result)

    return tree_map_only(Tensor, on_toy, op(*args, **kwargs))


_FALLBACK.fallback(_run, "PrivateUse1")
_aten = torch.ops.aten
for _op in (_aten.arange.default, _aten.arange.start, _aten.arange.start_step, _aten.logsumexp.default):
    # PyTorch would make them of an empty tensor that another operation enlarges, which is not seen behind it.
    _ATEN.impl(_op, functools.partial(_run, _op), "PrivateUse1")
