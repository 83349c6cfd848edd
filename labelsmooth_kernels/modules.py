"""nn.Module shells around the functions: they hold options, nothing else."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from . import backends, direct
from .arguments import checks_names, not_scriptable, takes
from .functional import apply_spec
from .linear import HEAD_PARAMETERS, LinearSpec, head_options, linear_cross_entropy, options_not_tiled
from .smoothing import Schedule
from .spec import LOSS_PARAMETERS, ArgumentError, LossSpec, check_prior, reduction_of, require

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import LinearModuleOptions, ModuleOptions
    from .reference import RowStats
    from .targets import Teacher, TopK

_PER_CALL = ("row_weight", "normalizer")
_MODULE_PARAMETERS = tuple(p for p in LOSS_PARAMETERS if p.name not in _PER_CALL)
_HEAD_PARAMETERS = (
    *inspect.signature(LinearSpec).parameters.values(), *(p for p in HEAD_PARAMETERS if p.name not in _PER_CALL)
)  # fmt: skip
_DEFAULTS = {p.name: p.default for p in _MODULE_PARAMETERS}
_OF_PYTORCH = ("weight", "ignore_index", "reduction", "label_smoothing")
_BEYOND_PYTORCH = [(name, v, type(v)) for name, v in _DEFAULTS.items() if name not in (*_OF_PYTORCH, "backend")]


Result = TypeVar("Result", default=Tensor)
"""What a call of a module returns, as its ``return_stats`` says: the loss, or a pair (loss, RowStats)."""


class _Unscriptable(nn.Module):
    forward = property(not_scriptable)


class CrossEntropyLoss(nn.Module, Generic[Result]):
    """:func:`labelsmooth_kernels.cross_entropy` as a module, a drop-in for ``torch.nn.CrossEntropyLoss``.

    ``weight`` and the options are those of the function, kept as attributes of the same names, so that
    ``loss.label_smoothing = 0.05`` anneals (a tensor: ``loss.label_smoothing.fill_(0.05)``); tensors among them are
    buffers and move with the module, and ``weight`` is part of the state dict as in PyTorch. Those given as
    ``label_smoothing`` or ``smoothing`` are not, so that after ``to_empty()`` of a module that was made on the meta
    device they must be set again. A :class:`labelsmooth_kernels.smoothing.Schedule` as ``label_smoothing`` is asked for
    its ε in every call. ``row_weight`` and ``normalizer`` belong to a batch and are arguments of the call. Shapes,
    dtypes and errors: see the function. What fits no call is refused here: class weights and a prior of different
    lengths, an unknown backend. ``size_average`` and ``reduce`` are PyTorch's deprecated spelling of ``reduction``,
    with its warning.
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str
    label_smoothing: float | Tensor | Schedule
    smoothing: str | Tensor
    smooth_over: str
    class_dim: int
    z_loss: float
    confidence_penalty: float
    logit_scale: float
    softcap: float | None
    inplace: bool
    return_stats: bool | str
    backend: str | None

    @overload
    def __init__(
        self: CrossEntropyLoss[Tensor], weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float | Tensor | Schedule = 0.0, *, inplace: bool = False,
        return_stats: Literal[False] = False, **options: Unpack[ModuleOptions],
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: CrossEntropyLoss[tuple[Tensor, RowStats]], weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float | Tensor | Schedule = 0.0, *, inplace: bool = False,
        return_stats: Literal[True, "entropy", "all"], **options: Unpack[ModuleOptions],
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: CrossEntropyLoss[Tensor | tuple[Tensor, RowStats]], weight: Tensor | None = None,
        size_average: bool | None = None, ignore_index: int = -100, reduce: bool | None = None, reduction: str = "mean",
        label_smoothing: float | Tensor | Schedule = 0.0, *, inplace: bool = False,
        return_stats: bool | str, **options: Unpack[ModuleOptions],
    ) -> None: ...  # fmt: skip
    @checks_names("CrossEntropyLoss", _PER_CALL)
    @takes(_MODULE_PARAMETERS)
    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float | Tensor | Schedule = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        for name in _PER_CALL:
            if name in options:
                raise TypeError(f"{name} belongs to one batch: pass it when calling the module")
        schedule = label_smoothing
        spec = LossSpec(
            weight=weight,
            ignore_index=ignore_index,
            reduction=reduction_of(reduction, size_average, reduce),
            label_smoothing=schedule.eps if isinstance(schedule, Schedule) else schedule,
            **options,
        )
        backends.check_name(spec.backend)
        if isinstance(spec.smoothing, Tensor):
            shape = (spec.smoothing if spec.weight is None else spec.weight).shape
            good = spec.smoothing.shape == shape
            require(good, "smoothing", spec.smoothing, f"of the shape {tuple(shape)} of weight")
            check_prior(spec.smoothing)
        for name in _DEFAULTS:
            value = getattr(spec, name)
            if name == "label_smoothing" and isinstance(schedule, Schedule):
                value = schedule  # no buffer: of that a module that is cast or moved would have a copy of its own
            if name == "weight" or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=name == "weight")
            else:
                setattr(self, name, value)

    def __prepare_scriptable__(self) -> nn.Module:
        """Give torch.jit.script what it cannot compile and need not where the loss is among its ignored attributes."""
        return _Unscriptable()

    def _options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in _DEFAULTS}
        eps = options["label_smoothing"]
        return {**options, "label_smoothing": eps.eps} if isinstance(eps, Schedule) else options

    def _is_pytorchs(self) -> bool:
        """Return whether no option is set that PyTorch lacks. Values of a wrong type are left to the gate to refuse."""
        own = self.__dict__  # numbers and words; tensors are buffers
        plain = all(type(own.get(name)) is kind and own[name] == value for name, value, kind in _BEYOND_PYTORCH)
        return plain and direct.is_default(own.get("backend", ""))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | str | Tensor | None = None,
    ) -> Result:
        if row_weight is None and normalizer is None and not torch.compiler.is_compiling() and self._is_pytorchs():
            eps = self.label_smoothing
            loss = direct.cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, eps)
            if loss is not None:
                return loss  # type: ignore[return-value]
        options = {**self._options(), "row_weight": row_weight, "normalizer": normalizer}
        return apply_spec(input, target, LossSpec.of(options))  # type: ignore[return-value]  # as __init__ was told

    if TYPE_CHECKING:  # nn.Module's __call__ returns Any

        def __call__(
            self,
            input: Tensor,
            target: Tensor,
            *,
            row_weight: Tensor | None = None,
            normalizer: float | str | Tensor | None = None,
        ) -> Result: ...

    def extra_repr(self) -> str:
        values = self._options()
        shown = {n: f"tensor{tuple(v.shape)}" if isinstance(v, Tensor) else repr(v) for n, v in values.items()}
        return ", ".join(f"{n}={shown[n]}" for n, v in values.items() if isinstance(v, Tensor) or v != _DEFAULTS[n])


class LabelSmoothingCrossEntropy(CrossEntropyLoss[Tensor]):
    """The classic recipe: input (N, K), target (N,), q = (1-ε)[k=y] + ε/K (Szegedy et al. 2016).

    ε is the first argument, or ``eps=``, or ``smoothing=`` as in timm's class of this name; the attribute is
    ``label_smoothing``, a number that may be changed.
    """

    @checks_names("LabelSmoothingCrossEntropy")
    def __init__(self, eps: float | None = None, reduction: str = "mean", *, smoothing: float | None = None) -> None:
        if eps is not None and smoothing is not None:
            raise ArgumentError(f"smoothing is another name of eps: give one of them, got {eps!r} and {smoothing!r}")
        eps = smoothing if eps is None else eps
        super().__init__(label_smoothing=0.1 if eps is None else eps, reduction=reduction)


class LinearCrossEntropyLoss(CrossEntropyLoss[Result]):
    """A linear head and its loss, :func:`labelsmooth_kernels.linear_cross_entropy` as a module; a drop-in for
    ``torch.nn.LinearCrossEntropyLoss``.

    The head is ``self.linear``, an ``nn.Linear(in_features, num_classes·prod(out_features), bias)``; to tie it to an
    embedding assign ``loss.linear.weight = embedding.weight``. The loss reads its weight and bias and never calls it:
    one that computes something else (an adapter, a hook) raises an ArgumentError; parametrizations and DTensors work.
    Options are those of the function, kept as attributes of the same names; shapes, dtypes and errors: see there.
    """

    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor], in_features: int, num_classes: int, *,
        label_smoothing: float | Tensor | Schedule = 0.0,
        return_stats: Literal[False] = False, **options: Unpack[LinearModuleOptions],
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[tuple[Tensor, RowStats]], in_features: int, num_classes: int, *,
        label_smoothing: float | Tensor | Schedule = 0.0,
        return_stats: Literal[True, "entropy", "all"], **options: Unpack[LinearModuleOptions],
    ) -> None: ...  # fmt: skip
    @overload
    def __init__(
        self: LinearCrossEntropyLoss[Tensor | tuple[Tensor, RowStats]], in_features: int, num_classes: int, *,
        label_smoothing: float | Tensor | Schedule = 0.0,
        return_stats: bool | str, **options: Unpack[LinearModuleOptions],
    ) -> None: ...  # fmt: skip
    @checks_names("LinearCrossEntropyLoss", (*_PER_CALL, "inplace"))
    @takes(_HEAD_PARAMETERS)
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float | Tensor | Schedule = 0.0,
        options: object = None,
        **loss_options: Any,
    ) -> None:
        how = {f.name: loss_options.pop(f.name) for f in dataclasses.fields(LinearSpec) if f.name in loss_options}
        loss_options = head_options(loss_options, None, 2 + len(out_features))
        loss_options |= {"ignore_index": -100 if ignore_index is None else ignore_index, "weight": weight}
        super().__init__(label_smoothing=label_smoothing, **loss_options)  # type: ignore[misc]  # not one result's self
        self.num_classes, self.out_features, self.how = num_classes, tuple(out_features), LinearSpec(**how)
        self._check_options()
        rows = math.prod(self.out_features, start=num_classes)
        self.linear = nn.Linear(in_features, rows, bias=bias, device=device, dtype=dtype)

    def _check_options(self) -> None:
        """Raise for options that fit no call, so many classes being known."""
        spec, k = LossSpec(**self._options()), self.num_classes
        for name, value in (("weight", spec.weight), ("smoothing", spec.smoothing)):
            good = not isinstance(value, Tensor) or value.shape == (k,)
            require(good, name, value, f"of shape ({k},), one value per class")
        good = not (spec.others and spec.smooths and k == 1)
        require(good, "smoothing", spec.smoothing, "'uniform' where num_classes is 1: there is no other class")
        if self.how.method == "tiled":
            positions = math.prod(self.out_features)
            if reasons := options_not_tiled(spec, spec.backend or "triton", positions):
                raise ArgumentError(f"method='tiled' cannot serve these options: {'; '.join(reasons)}")

    def forward(
        self,
        input: Tensor,
        target: Tensor | TopK | Teacher,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | str | Tensor | None = None,
    ) -> Result:
        _check_plain(self.linear)
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        options = {name: value for name, value in self._options().items() if name not in ("class_dim", "inplace")}
        result: Result = linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            row_weight=row_weight,
            normalizer=normalizer,
            **dataclasses.asdict(self.how),
            **options,
        )
        return result

    if TYPE_CHECKING:

        def __call__(
            self,
            input: Tensor,
            target: Tensor | TopK | Teacher,
            *,
            row_weight: Tensor | None = None,
            normalizer: float | str | Tensor | None = None,
        ) -> Result: ...


def _check_plain(linear: nn.Module) -> None:
    """Raise for a head that computes more than ``F.linear(input, weight, bias)``, which the loss would leave out."""
    reason = None
    own = [name for name in ("forward", "__call__") if getattr(type(linear), name) is not getattr(nn.Linear, name)]
    if own or "forward" in vars(linear):
        reason = f"{type(linear).__name__} with a {own[0] if own else 'forward'} of its own"
    else:
        registered = (
            linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks
        )  # fmt: skip
        for hook in (hook for hooks in registered for hook in hooks.values()):
            # Those of parallelize_module only place inputs and outputs, as the loss of a DTensor head does by itself.
            if not str(getattr(hook, "__module__", "")).startswith("torch.distributed.tensor"):
                reason = f"one with the hook {getattr(hook, '__qualname__', type(hook).__name__)}"
    if reason is not None:
        raise ArgumentError(
            f"linear must be an nn.Linear, whose weight and bias the loss reads without calling it, got {reason}: "
            "merge it into the weight, make it a parametrization (torch.nn.utils.parametrize), or pass "
            "loss.linear(input) to cross_entropy"
        )
