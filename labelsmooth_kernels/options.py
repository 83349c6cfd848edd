"""Names and types of the options that public functions and modules take by keyword, for type checkers and editors.

Defaults, checks and meaning stand in :class:`labelsmooth_kernels.LossSpec` and in the functions' own signatures, with
which the tests compare every name and type here. A function that passes options on can be annotated like ours::

    def loss_of(batch: Batch, **options: Unpack[LossOptions]) -> Tensor:
        return lsk.cross_entropy(model(batch.input), batch.target, **options)
"""

from typing import TypedDict

import torch
from torch import Tensor


class ModuleOptions(TypedDict, total=False):
    """Hold what every loss can be given and a module keeps."""

    smoothing: str | Tensor
    smooth_over: str
    class_dim: int
    z_loss: float
    confidence_penalty: float
    logit_scale: float
    softcap: float | None
    backend: str | None


class CallOptions(ModuleOptions, total=False):
    """Add what belongs to one batch."""

    row_weight: Tensor | None
    normalizer: float | str | Tensor | None


class LossOptions(CallOptions, total=False):
    """Add what ``cross_entropy`` takes by position as well."""

    reduction: str
    label_smoothing: float | Tensor


class PathOptions(TypedDict, total=False):
    """Hold how the loss of a head is computed."""

    chunk_rows: int | None
    grad_accumulation: str
    skip_ignored: bool | None
    method: str
    filter_eps: float | None


class LinearOptions(LossOptions, PathOptions, total=False):
    """Hold the keyword arguments of ``linear_cross_entropy`` but ``return_stats``."""

    linear_bias: Tensor | None
    weight: Tensor | None
    ignore_index: int | None
    options: object


class LinearModuleOptions(ModuleOptions, PathOptions, total=False):
    """Hold the keyword arguments of ``LinearCrossEntropyLoss`` but ``label_smoothing`` and ``return_stats``."""

    out_features: tuple[int, ...]
    bias: bool
    device: torch.device | str | None
    dtype: torch.dtype | None
    weight: Tensor | None
    ignore_index: int | None
    reduction: str
    options: object


class DistillationOptions(TypedDict, total=False):
    """Hold the keyword arguments of ``distillation_loss`` but ``return_terms``."""

    temperature: float
    alpha: float | None
    ignore_index: int
    reduction: str
    label_smoothing: float | Tensor
    smoothing: str | Tensor
    class_dim: int | None
    row_weight: Tensor | None
    normalizer: float | str | Tensor | None
    backend: str | None


class EvaluationOptions(TypedDict, total=False):
    """Hold what ``calibration.fit_temperature`` and ``smoothing.compare`` pass on to the loss."""

    class_dim: int
    backend: str | None
    linear_bias: Tensor | None
    chunk_rows: int | None


class ClasswiseOptions(TypedDict, total=False):
    """Hold what ``calibration.evaluate_classwise`` passes on."""

    class_dim: int
    linear_bias: Tensor | None
    chunk_rows: int | None
    logit_scale: float
    softcap: float | None


class ScaledEvaluationOptions(ClasswiseOptions, total=False):
    """Hold what ``calibration.evaluate`` passes on."""

    backend: str | None
