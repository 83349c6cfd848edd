"""Label-smoothed cross-entropy for large vocabularies: fused, exact, a drop-in for PyTorch's."""

from . import (
    calibration,
    conventions,
    distillation,
    functional,
    options,
    parallel,
    reference,
    representation,
    smoothing,
)
from .flops import count_operators as _count_operators
from .functional import cross_entropy
from .linear import linear_cross_entropy
from .modules import CrossEntropyLoss, LabelSmoothingCrossEntropy, LinearCrossEntropyLoss
from .reference import RowStats
from .spec import ArgumentError, LossSpec
from .targets import Teacher, TopK

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "CrossEntropyLoss",
    "LabelSmoothingCrossEntropy",
    "LinearCrossEntropyLoss",
    "LossSpec",
    "RowStats",
    "Teacher",
    "TopK",
    "calibration",
    "conventions",
    "cross_entropy",
    "distillation",
    "functional",
    "linear_cross_entropy",
    "options",
    "parallel",
    "reference",
    "representation",
    "smoothing",
]

_count_operators()
