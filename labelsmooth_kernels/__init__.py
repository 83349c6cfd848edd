"""Label-smoothed cross-entropy for large vocabularies: fused, exact, a drop-in for PyTorch's."""

from . import conventions, functional, reference
from .functional import cross_entropy
from .modules import CrossEntropyLoss, LabelSmoothingCrossEntropy
from .reference import RowStats
from .spec import ArgumentError, LossSpec

__version__ = "0.1.0"
__all__ = [
    "ArgumentError",
    "CrossEntropyLoss",
    "LabelSmoothingCrossEntropy",
    "LossSpec",
    "RowStats",
    "conventions",
    "cross_entropy",
    "functional",
    "reference",
]
