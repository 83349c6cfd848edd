"""What PyTorch is doing at the moment, and what it tells of a tensor: by its private names, which stand here alone."""

from __future__ import annotations

import functools
import os
import sys
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from collections.abc import Callable

_P = ParamSpec("_P")
_T = TypeVar("_T")

CHECK_TARGETS = "LABELSMOOTH_CHECK_TARGETS"
"""The environment variable that makes an out-of-range target, or a bad prior, raise on a GPU too; looking
synchronises."""


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is in progress, which may wrap any tensor; what
    torch.compile makes of them shows no sign of it."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def constant_in_graphs(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Mark a function that torch.compile calls while tracing and whose result it takes for a constant.

    ``torch.compiler.assume_constant_result`` sets the same mark, but imports torch._dynamo first: 2.5 s of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_graphs(reason: str) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
    """Keep a function out of what torch.compile traces; ``reason`` is part of the error under ``fullgraph=True``.

    This is ``torch.compiler.disable``, which imports torch._dynamo, put off until somebody else has imported that: the
    wrapper carries the marks by which the tracer stops at it, and calls the function disabled.
    """

    def mark(function: Callable[_P, _T]) -> Callable[_P, _T]:
        @functools.wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
            plain = torch.compiler.disable(function) if "torch._dynamo" in sys.modules else function
            return plain(*args, **kwargs)

        run._torchdynamo_disable, run._torchdynamo_disable_msg = True, reason  # type: ignore[attr-defined]
        return run

    return mark


@constant_in_graphs  # torch.compile guards on it by itself
def func_level() -> int | None:
    return torch._C._functorch.maybe_current_level()


def nested_forward_mode() -> bool:
    """Whether torch.func.jvp runs inside itself, where PyTorch drops the outer tangent of any autograd.Function."""
    if torch.compiler.is_compiling():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1


def recorded() -> bool:
    """Whether torch.jit.trace, or an exporter that uses it, records what is computed."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def readable(tensor: Tensor) -> bool:
    """Whether the gate may read the values of an argument: they exist, outside of tracing and fake tensors, and reading
    them does not synchronise, or :data:`CHECK_TARGETS` asks for it."""
    if torch.compiler.is_compiling() or recorded():
        return False
    if _active("FAKE") or _active("PROXY"):
        return False
    while torch._C._functorch.is_gradtrackingtensor(tensor):  # a level of differentiation wraps what it computes
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or not _holds_values(tensor):
        return False
    return tensor.device.type == "cpu" or os.environ.get(CHECK_TARGETS) == "1"


def _active(mode: str) -> bool:
    """Whether one of PyTorch's own dispatch modes is: that of fake tensors, or that of make_fx."""
    return torch._C._get_dispatch_mode(getattr(torch._C._TorchDispatchModeKey, mode)) is not None


def _holds_values(tensor: Tensor) -> bool:
    """Whether a tensor is one of PyTorch's own, or of a subclass that only adds to them. Other subclasses, such as
    DTensors, stand for values that lie elsewhere."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.device.type != "meta"


def savable(tensor: Tensor) -> Tensor:
    """A tensor as autograd can save it, also where it was made under torch.inference_mode; without a copy. As it is
    where a gradient is asked of it, which PyTorch then refuses; and where it is traced: torch.compile does not tell
    which tensors these are, and its programs refuse them."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not tensor.is_inference():
        return tensor
    if tensor.requires_grad or recorded() or _active("PROXY"):
        return tensor
    if tensor.is_neg():  # what its memory holds is not all there is to it
        return tensor.clone()
    memory, offset = tensor.untyped_storage(), tensor.storage_offset()
    return tensor.new_empty(0).set_(memory, offset, tensor.size(), tensor.stride())


def graph_is_kept() -> bool:
    """Whether the backward in progress may run again (retain_graph): then what it needs must stay as it is. A compiled
    backward cannot know, so it takes itself for kept."""
    return torch.compiler.is_compiling() or bool(torch._C._autograd._get_current_graph_task_keep_graph())


def gradient_is_shared(upstream: Tensor) -> bool:
    """Whether the gradient that a forward made must stay as it is: for a backward that runs again, or for the others of
    a batch of upstreams (``is_grads_batched``)."""
    return graph_is_kept() or torch._C._functorch.is_legacy_batchedtensor(upstream)


def assert_at_run_time(condition: Tensor, message: str) -> None:
    """Let a program that is being compiled or exported raise a RuntimeError where a bool tensor () is False."""
    torch._assert_async(condition, message)
