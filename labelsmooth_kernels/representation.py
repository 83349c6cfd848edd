"""What smoothing does to the features in front of a linear head: clusters, norms, and what is left of the input.

Smoothing asks every example of a class for the same logits, and so draws its features to one point, equally far from
the templates (rows of the head's weight) of all other classes. Three ways to look at it, after Müller et al. 2019,
"When Does Label Smoothing Help?": :func:`template_plane`, a picture of the clusters; :func:`class_scatter`, their
tightness in numbers; and :func:`mutual_information`, how many nats of which-example-it-was a logit still tells, which
is what a student could learn from it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import plain_int, unscriptable
from .spec import INDEX_DTYPES, require


class Plane(NamedTuple):
    """A plane in the space of features, in float64: through ``origin`` along the two orthonormal rows of ``basis``."""

    origin: Tensor
    """(D,)"""
    basis: Tensor
    """(2, D)"""

    def project(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 2): coordinates in the plane of what lies nearest."""
        good = features.dim() > 0 and features.shape[-1] == len(self.origin)
        require(good, "features", features, f"of shape (..., {len(self.origin)})")
        return (features.double() - self.origin) @ self.basis.T


@unscriptable
def template_plane(linear_weight: Tensor, classes: tuple[int, int, int]) -> Plane:
    """The plane through the templates of three classes.

    ``basis`` is the QR decomposition of (w_b - w_a, w_c - w_a): template a lies at (0, 0), b at (‖w_b - w_a‖, 0) and c
    above the first axis.

    Args:
        linear_weight: (K, D) of the head, K >= 3, D >= 2, floating point.
        classes: three different classes.

    Raises:
        ArgumentError: classes that are not three different ones of the K, or whose templates lie on a line.

    Source: Müller et al. 2019, section 2.
    """
    require(linear_weight.dim() == 2 and linear_weight.is_floating_point(), "linear_weight", linear_weight, "(K, D)")
    a, b, c = _three(classes, len(linear_weight))
    templates = linear_weight.detach().double()
    require(bool(templates[[a, b, c]].isfinite().all()), "linear_weight", linear_weight, "finite in these classes")
    first, second = templates[b] - templates[a], templates[c] - templates[a]
    e1 = first / first.norm()
    across = second - (second @ e1) * e1
    flat = not (across.norm() > 1e-9 * second.norm())
    require(not flat, "classes", classes, "of templates that do not lie on a line")
    return Plane(templates[a], torch.stack((e1, across / across.norm())))


def _three(classes: tuple[int, int, int], num_classes: int) -> tuple[int, int, int]:
    found = [plain_int(k) for k in classes]
    good = len(set(found)) == len(found) == 3 and all(isinstance(k, int) and 0 <= k < num_classes for k in found)
    require(good, "classes", classes, f"three different classes of [0, {num_classes})")
    a, b, c = found
    return a, b, c


class Scatter(NamedTuple):
    """Mean squared distances of features, float64: total = within + between."""

    within: float
    """of a feature to the mean of its class"""
    between: float
    """of the mean of its class to the mean of all"""
    norm: float
    """mean ‖h‖ of a feature"""

    @property
    def tightness(self) -> float:
        """within/(within + between): 0 where every class is one point, 1 where the classes' means coincide, NaN where
        all features are the same."""
        total = self.within + self.between
        return self.within / total if total > 0 else math.nan


@unscriptable
def class_scatter(features: Tensor, target: Tensor, *, ignore_index: int = -100) -> Scatter:
    """How tightly the features of each class lie together, and how far apart the classes.

    within = 1/N·Σ_i ‖h_i - μ_{y_i}‖², between = 1/N·Σ_i ‖μ_{y_i} - μ‖²: the traces of the scatter matrices of
    discriminant analysis over N. Computed in float64, in two sweeps.

    Args:
        features: (..., D), floating point and finite.
        target: (...) class indices; rows with ``ignore_index`` are left out.

    Raises:
        ArgumentError: shapes that do not match, a negative class, no row, a feature that is not finite.
    """
    shape = tuple(features.shape[:-1])
    require(features.dim() > 1 and features.is_floating_point(), "features", features, "(..., D), floating point")
    good = target.dtype in INDEX_DTYPES and tuple(target.shape) == shape
    require(good, "target", target, f"class indices of shape {shape}")
    keep = target != plain_int(ignore_index)
    h, y = features[keep].detach().double(), target[keep].long()
    require(len(h) > 0, "target", target, "of one row at least that is not ignored")
    require(bool(h.isfinite().all()), "features", features, "finite")
    require(int(y.min()) >= 0, "target", int(y.min()), "of classes >= 0")
    _, y = y.unique(return_inverse=True)
    counts = torch.bincount(y)
    means = h.new_zeros(len(counts), h.shape[1]).index_add_(0, y, h) / counts[:, None]
    within = (h - means[y]).square().sum(1).mean()
    between = ((means - h.mean(0)).square().sum(1) * counts).sum() / len(h)
    return Scatter(float(within), float(between), float(h.norm(dim=1).mean()))


@unscriptable
def mutual_information(values: Tensor) -> float:
    """An estimate of the mutual information, in nats, between which input it was and a number the network makes of it.

    With y_il the number for input i of N under its l-th of L random augmentations (the paper takes the difference of
    two logits), μ_i = mean_l y_il and σ² = mean (y_il - μ_i)², and a Gaussian y | i,

        I = log N + mean_il [ -(y_il - μ_i)²/2σ² - log Σ_j exp(-(y_il - μ_j)²/2σ²) ]

    which lies between about ½·log(L/(L - 1)) (the number forgets the input, but μ_i holds its own draw) and log N (it
    identifies the input). 3·N·min(N, 1024) numbers of memory, N²·L exponentials.

    Args:
        values: (N, L), N >= 2, L >= 2, finite.

    Raises:
        ArgumentError: another shape, a value that is not finite.

    Source: Müller et al. 2019, section 4.
    """
    good = values.dim() == 2 and min(values.shape) >= 2 and values.is_floating_point()
    require(good, "values", values, "a floating-point (N, L) of at least 2 inputs and 2 augmentations")
    require(bool(values.isfinite().all()), "values", values, "finite")
    y = values.detach().double()
    means = y.mean(1)
    variance = float((y - means[:, None]).square().mean())
    total = y.new_zeros(())
    for own, draws in zip(means.split(1024), y.split(1024), strict=True):
        for drawn in draws.T:
            far, near = (drawn[:, None] - means).square(), (drawn - own).square()
            if variance > 0:
                total += (-near / (2 * variance) - torch.logsumexp(-far / (2 * variance), 1)).sum()
            else:  # no noise: only inputs of exactly the same number are mistaken for each other
                total -= (far == 0).sum(1).double().log().sum()
    return math.log(len(y)) + float(total) / y.numel()
