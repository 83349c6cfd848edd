"""Every option of the loss in one frozen object, checked once; the call it describes, flattened to rows."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn._reduction import get_enum, legacy_get_string

from .arguments import checks_names, plain_float, plain_int
from .torch_state import (
    assert_at_run_time,
    constant_in_graphs,
    func_level,
    nested_forward_mode,
    readable,
    savable,
    transformed,
)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
REDUCTIONS = ("none", "mean", "sum")


class ArgumentError(ValueError, RuntimeError):
    """A bad argument. ``torch.nn.functional.cross_entropy`` raises ValueError for some and RuntimeError for others:
    this is both, so that code which catches either keeps working."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the loss: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise an :class:`ArgumentError` that names the argument, its value and what is allowed, unless ``condition``."""
    if not condition:
        raise ArgumentError(f"{name} must be {allowed}, got {_shown(value)}")


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    layout = "" if value.layout == torch.strided else f" of layout {value.layout}"
    return f"a {tuple(value.shape)} {value.dtype} tensor{layout}"


_PLAIN = dict.fromkeys(("ignore_index", "class_dim"), plain_int) | dict.fromkeys(
    ("label_smoothing", "z_loss", "confidence_penalty", "logit_scale", "softcap", "normalizer"), plain_float
)

_PLAIN_TYPES = (int, float, type(None))


def reduction_of(reduction: str, size_average: bool | None, reduce: bool | None) -> str:
    """The reduction that PyTorch's old arguments stand for, with its warning, where one of them is given."""
    return reduction if size_average is None and reduce is None else _old_reduction(size_average, reduce)


@constant_in_graphs  # torch.compile takes PyTorch's function for an operator, which returns no text
def _old_reduction(size_average: bool | None, reduce: bool | None) -> str:
    return legacy_get_string(size_average, reduce)


def constant(name: str, tensor: Tensor) -> Tensor:
    """An argument that the loss takes for a constant, :func:`savable`. An :class:`ArgumentError` where a derivative is
    asked of it: None would go unseen."""
    asked = tensor.requires_grad and torch.is_grad_enabled()
    if not asked and transformed():
        asked = forward_ad.unpack_dual(tensor).tangent is not None
    if asked:
        raise ArgumentError(f"{name} must not require a gradient: the loss takes it for a constant; detach() it")
    return savable(tensor.detach())


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)  # a tuple takes a third of a union's time


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class LossSpec:
    """The options of :func:`labelsmooth_kernels.cross_entropy`, under the same names and with the same meaning."""

    weight: Tensor | None = None
    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float | Tensor = 0.0
    smoothing: str | Tensor = "uniform"
    smooth_over: str = "all"
    class_dim: int = 1
    z_loss: float = 0.0
    confidence_penalty: float = 0.0
    logit_scale: float = 1.0
    softcap: float | None = None
    row_weight: Tensor | None = None
    normalizer: float | str | Tensor | None = None
    inplace: bool = False
    return_stats: bool | str = False
    backend: str | None = None

    def __post_init__(self) -> None:
        self._make_plain()
        if self.reduction not in REDUCTIONS:
            raise ArgumentError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        for name in ("weight", "row_weight"):
            value = getattr(self, name)
            require(value is None or isinstance(value, Tensor), name, value, "a tensor or None")
        if self.weight is not None:
            good = self.weight.dim() == 1 and self.weight.dtype in FLOAT_DTYPES
            require(good, "weight", self.weight, "a floating-point tensor of shape (K,)")
        require(isinstance(self.inplace, bool), "inplace", self.inplace, "a bool")
        require(self.backend is None or isinstance(self.backend, str), "backend", self.backend, "a name or None")
        known = isinstance(self.return_stats, bool) or self.return_stats in ("entropy", "all")
        require(known, "return_stats", self.return_stats, "False, True, 'entropy' or 'all'")
        _check_epsilon(self.label_smoothing)
        if isinstance(self.smoothing, Tensor):
            good = self.smoothing.dim() == 1 and self.smoothing.dtype in FLOAT_DTYPES
            require(good, "smoothing", self.smoothing, "a floating-point prior of shape (K,)")
        else:
            require(
                self.smoothing in ("uniform", "others"),
                "smoothing",
                self.smoothing,
                "'uniform', 'others' or a prior tensor (K,)",
            )
        require(self.smooth_over in ("all", "finite"), "smooth_over", self.smooth_over, "'all' or 'finite'")
        for name in ("ignore_index", "class_dim"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), name, value, "an int")
        for name in ("z_loss", "confidence_penalty", "logit_scale"):
            value = getattr(self, name)
            require(_is_number(value) and -math.inf < value < math.inf, name, value, "a finite number")
        require(self.z_loss >= 0, "z_loss", self.z_loss, ">= 0")
        if self.softcap is not None:
            require(
                _is_number(self.softcap) and 0 < self.softcap < math.inf,
                "softcap",
                self.softcap,
                "a finite number > 0 or None",
            )
        self._check_normalizer()

    def _make_plain(self) -> None:
        """Replace what PyTorch takes for an int, a float or "mean" by that."""
        for name, plain in _PLAIN.items():
            value = getattr(self, name)
            if not isinstance(value, _PLAIN_TYPES):
                object.__setattr__(self, name, plain(value))
        if self.reduction == "elementwise_mean":
            get_enum(self.reduction)  # PyTorch's warning
            object.__setattr__(self, "reduction", "mean")

    def _check_normalizer(self) -> None:
        n = self.normalizer
        if n is None:
            return
        if self.reduction != "mean":
            raise ArgumentError(
                f"normalizer replaces the denominator of reduction='mean', got reduction={self.reduction!r}"
            )
        allowed = "a finite number > 0 or 'rows' or a strided tensor of one element"
        if isinstance(n, Tensor):
            require(n.numel() == 1 and n.layout == torch.strided, "normalizer", n, allowed)
        else:
            require(n == "rows" or (_is_number(n) and 0 < n < math.inf), "normalizer", n, allowed)  # type: ignore[operator]

    @classmethod
    def of(cls, options: dict[str, Any]) -> LossSpec:
        """The same for names that are known to be right: without the 1 µs that looking at them takes."""
        spec = cls.__new__(cls)
        _init(spec, **options)
        return spec

    @property
    def smooths(self) -> bool:
        """Whether label smoothing can change the target weights at all."""
        return isinstance(self.label_smoothing, Tensor) or self.label_smoothing != 0.0

    @property
    def others(self) -> bool:
        """Whether ε goes to the other classes alone."""
        return isinstance(self.smoothing, str) and self.smoothing == "others"  # no graph compares a tensor with it

    @property
    def n_stats(self) -> int:
        """How many floating-point statistics of a row are asked of a kernel."""
        if isinstance(self.return_stats, str):
            return 2 if self.return_stats == "entropy" else 4
        return int(self.return_stats)

    def features(self, *, index_target: bool) -> frozenset[str]:
        """What a backend must know how to do to serve these options, as words."""
        asked = {
            "index target": index_target,
            "probability target": not index_target,
            "weight": self.weight is not None,
            "smoothing prior": isinstance(self.smoothing, Tensor) and self.smooths,
            "smooth_over='finite'": self.smooth_over == "finite" and self.smooths,
            "z_loss": self.z_loss != 0.0,
            "confidence_penalty": self.confidence_penalty != 0.0,
            "logit_scale": self.logit_scale != 1.0,
            "softcap": self.softcap is not None,
            "gradient of weight, label_smoothing or smoothing": (torch.is_grad_enabled() or transformed())
            and any(
                isinstance(t, Tensor) and t.requires_grad for t in (self.weight, self.label_smoothing, self.smoothing)
            ),
            "forward mode inside forward mode": nested_forward_mode(),
            # An exported program drops autograd.Functions; PyTorch differentiates plain operators again.
            "a gradient through torch.export (under torch.no_grad it serves)": self.backend is None
            and torch.compiler.is_exporting()
            and torch.is_grad_enabled(),
            "torch.func inside torch.compile": torch.compiler.is_compiling() and func_level() is not None,
        }
        return frozenset(word for word, is_asked in asked.items() if is_asked)


_init = LossSpec.__init__
LossSpec.__init__ = checks_names("LossSpec")(LossSpec.__init__)  # type: ignore[method-assign]
LOSS_PARAMETERS = tuple(inspect.signature(LossSpec).parameters.values())
LOSS_OPTIONS = frozenset(p.name for p in LOSS_PARAMETERS)


def _check_epsilon(eps: object) -> None:
    """ε must be finite and at most 1; the values of a tensor are read only where that needs no synchronisation."""
    if isinstance(eps, Tensor):
        good = eps.dtype in FLOAT_DTYPES and eps.layout == torch.strided
        require(good, "label_smoothing", eps, "a number or a floating-point tensor, strided")
        if readable(eps) and eps.numel():  # in this order: a tracer may not know numel()
            largest, smallest = eps.max().item(), eps.min().item()
            good = largest <= 1 and smallest > -math.inf
            require(good, "label_smoothing", (smallest, largest), "finite and at most 1 from its least to its largest")
    else:
        good = _is_number(eps) and -math.inf < eps <= 1  # type: ignore[operator]
        require(good, "label_smoothing", eps, "a finite number of at most 1")


def check_prior(prior: Tensor) -> None:
    """Raise for a prior (K,) that is no distribution, where it is readable; what torch.compile makes of the call on a
    CPU looks when it runs, and can show no values."""
    mass = prior_mass(prior)
    if mass is not None:
        check_prior_mass(mass, len(prior))
    elif torch.compiler.is_compiling() and prior.device.type == "cpu" and func_level() is None:
        total, allowed = prior.detach().sum(dtype=accumulate_dtype(prior.dtype)), _mass_may_be_off_by(prior.shape[0])
        good = (prior.detach() >= 0).all() & ((total - 1).abs() <= allowed)
        assert_at_run_time(good, "smoothing must be a prior whose entries are all >= 0 and sum to 1")


def prior_mass(prior: Tensor) -> float | None:
    """Return the sum of a prior, or of a rank's part of it, whose entries must be >= 0; None where it is unreadable."""
    if not readable(prior):
        return None
    prior = prior.detach()
    least = prior.amin().item() if prior.numel() else 0.0
    require(least >= 0, "smoothing", least, "a prior whose entries are all >= 0")  # false for NaN too
    return prior.sum(dtype=accumulate_dtype(prior.dtype)).item()


def check_prior_mass(mass: float, num_classes: int) -> None:
    """Raise for a prior that is not normalised."""
    if not abs(mass - 1) <= _mass_may_be_off_by(num_classes):
        raise ArgumentError(
            f"smoothing must be a prior that sums to 1, got one that sums to {mass:.7g}: divide it by that"
        )


def _mass_may_be_off_by(num_classes: int) -> float:
    """What the sum of a normalised prior may be off by: bfloat16 rounds counts, their sum and the quotient by 2⁻⁸ each,
    2⁻⁶ is more than that; float16 rounds an entry below its normal numbers by up to 2⁻²⁵, all of them in one direction
    at worst. The dtype says nothing of either, as a prior may have been cast since."""
    return 2**-6 + num_classes * 2**-25


def is_dtensor(value: object) -> bool:
    """Told by name: torch.distributed.tensor takes long to import, and few need it."""
    return type(value).__name__ == "DTensor"


def check_plain(name: str, value: object) -> None:
    """Raise for a DTensor, where none is served."""
    if is_dtensor(value):
        raise ArgumentError(
            f"{name} must be a plain tensor, got a DTensor: cross_entropy and linear_cross_entropy serve them where "
            "input, or linear_weight, is one; elsewhere use its full_tensor()"
        )


def check_same_device(name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise unless a tensor lies whole on the device of input, element by element."""
    check_plain(name, tensor)
    if tensor.layout != torch.strided:
        raise ArgumentError(f"{name} must be a strided tensor, got one of layout {tensor.layout}")
    if tensor.device != input.device:
        raise ArgumentError(f"{name} must be on the device of input ({input.device}), got {tensor.device}")


def check_index_targets(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise IndexError for the first of the targets (N,) that is neither a class nor ``ignore_index``."""
    bad = (target != ignore_index) & ((target < 0) | (target >= num_classes))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(
            f"target must be in [0, {num_classes}) or ignore_index={ignore_index}, got {int(target[row])} in row {row}"
        )


class Rows(NamedTuple):
    """One call as rows: what the gate hands to a backend or to the reference. "acc": the dtype of the arithmetic."""

    spec: LossSpec
    logits: Tensor
    """(N, K) or (A, B, K) with A·B = N, the caller's memory wherever a view can be had"""
    target: Tensor
    """(N,) int64 class indices, or class probabilities of the shape of logits"""
    weight: Tensor | None
    """(K,), contiguous, acc"""
    prior: Tensor | None
    """(K,), contiguous, acc: ``smoothing`` where that is a tensor"""
    eps: float | Tensor
    """ε: a float, or contiguous acc with one element or one per row (N,)"""
    row_weight: Tensor | None
    """(N,) acc"""

    @property
    def index_target(self) -> bool:
        return not self.target.is_floating_point()

    @property
    def n(self) -> int:
        """How many rows there are."""
        return math.prod(self.logits.shape[:-1])  # Size.numel would make a symbolic size a constant

    @property
    def valid(self) -> Tensor:
        """(N,) bool: the rows that count."""
        if not self.index_target:
            return torch.ones(self.n, dtype=torch.bool, device=self.logits.device)
        return self.target != self.spec.ignore_index

    def flat(self) -> Rows:
        """The same with logits, and probabilities, as (N, K)."""
        target = self.target if self.index_target else self.target.flatten(0, -2)
        return self._replace(logits=self.logits.flatten(0, -2), target=target)
