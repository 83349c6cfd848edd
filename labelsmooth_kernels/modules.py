"""nn.Module shells around the functions: they hold options, nothing else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .functional import apply_spec
from .spec import LossSpec

if TYPE_CHECKING:
    from .reference import RowStats

_PER_CALL = ("row_weight", "normalizer")
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(LossSpec) if f.name not in _PER_CALL}


class CrossEntropyLoss(nn.Module):
    """:func:`labelsmooth_kernels.cross_entropy` as a module, a drop-in for ``torch.nn.CrossEntropyLoss``.

    ``weight`` and the options are those of the function, kept as attributes of the same names, so that
    ``loss.label_smoothing = 0.05`` anneals (a tensor: ``loss.label_smoothing.fill_(0.05)``); tensors among them are
    buffers and move with the module, and ``weight`` is part of the state dict as in PyTorch. ``row_weight`` and
    ``normalizer`` belong to a batch and are arguments of the call. Shapes, dtypes and errors: see the function.
    """

    def __init__(self, weight: Tensor | None = None, **options: object) -> None:
        super().__init__()
        for name in _PER_CALL:
            if name in options:
                raise TypeError(f"{name} belongs to one batch: pass it when calling the module")
        spec = LossSpec(weight=weight, **options)  # type: ignore[arg-type]  # it checks; unknown ones are a TypeError
        for name in _DEFAULTS:
            value = getattr(spec, name)
            if name == "weight" or isinstance(value, Tensor):
                self.register_buffer(name, value, persistent=name == "weight")
            else:
                setattr(self, name, value)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, RowStats]:
        options = {name: getattr(self, name) for name in _DEFAULTS}
        return apply_spec(input, target, LossSpec(row_weight=row_weight, normalizer=normalizer, **options))

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in _DEFAULTS}
        shown = {n: f"tensor{tuple(v.shape)}" if isinstance(v, Tensor) else repr(v) for n, v in values.items()}
        return ", ".join(f"{n}={shown[n]}" for n, v in values.items() if isinstance(v, Tensor) or v != _DEFAULTS[n])


class LabelSmoothingCrossEntropy(CrossEntropyLoss):
    """The classic recipe: input (N, K), target (N,), q = (1-ε)[k=y] + ε/K (Szegedy et al. 2016)."""

    def __init__(self, eps: float = 0.1, reduction: str = "mean") -> None:
        super().__init__(label_smoothing=eps, reduction=reduction)
