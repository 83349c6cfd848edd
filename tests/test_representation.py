"""Representations: the plane of three templates, scatter, and how much a number tells of the input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import representation


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_templates_keep_their_distances_in_their_plane() -> None:
    weight = normal(6, 9)
    plane = representation.template_plane(weight, (4, 0, 3))
    torch.testing.assert_close(plane.basis @ plane.basis.T, torch.eye(2, dtype=torch.float64))
    corners = plane.project(weight[[4, 0, 3]])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        k = [4, 0, 3]
        torch.testing.assert_close((corners[i] - corners[j]).norm(), (weight[k[i]] - weight[k[j]]).norm())
    torch.testing.assert_close(corners[0], torch.zeros(2, dtype=torch.float64))
    assert corners[1, 0] > 0
    torch.testing.assert_close(corners[1, 1], torch.zeros((), dtype=torch.float64))
    assert corners[2, 1] > 0


def test_a_projection_is_the_nearest_point() -> None:
    plane = representation.template_plane(normal(3, 5), (0, 1, 2))
    h = normal(2, 3, 5)
    there = plane.project(h.float())
    assert there.shape == (2, 3, 2)
    rest = h - (plane.origin + plane.project(h) @ plane.basis)
    torch.testing.assert_close(rest @ plane.basis.T, torch.zeros(2, 3, 2, dtype=torch.float64))


def test_scatter_is_that_of_its_definition() -> None:
    h, y = normal(50, 4) + 3, torch.arange(50) % 7
    found = representation.class_scatter(h, y)
    means = torch.stack([h[y == c].mean(0) for c in range(7)])
    within = sum(float((h[i] - means[y[i]]).square().sum()) for i in range(50)) / 50
    assert found.within == pytest.approx(within, rel=1e-12)
    total = float((h - h.mean(0)).square().sum(1).mean())
    assert found.within + found.between == pytest.approx(total, rel=1e-12)
    assert found.norm == pytest.approx(float(h.norm(dim=1).mean()), rel=1e-12)
    assert 0 < found.tightness < 1


def test_the_ends_of_tightness() -> None:
    means, y = normal(3, 4), torch.tensor([0, 1, 2, 2, 1, 0])
    assert representation.class_scatter(means[y], y).tightness == pytest.approx(0, abs=1e-30)
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert representation.class_scatter(h, torch.tensor([0, 0, 1, 1])).tightness == 1


def test_features_that_are_all_the_same_have_no_tightness() -> None:
    assert math.isnan(representation.class_scatter(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])).tightness)


def test_ignored_rows_and_gaps_between_classes_change_nothing() -> None:
    h, y = normal(2, 10, 4), torch.arange(20).view(2, 10) % 3
    more = torch.cat((h, torch.full((1, 10, 4), torch.nan)))
    labels = torch.cat((y * 50, torch.full((1, 10), -100)))
    assert representation.class_scatter(more, labels) == representation.class_scatter(h, y)


def by_hand(values: Tensor) -> float:
    """The estimate in loops."""
    n, draws = values.shape
    mu = [sum(row) / draws for row in values.tolist()]
    variance = sum((v - m) ** 2 for row, m in zip(values.tolist(), mu, strict=True) for v in row) / (n * draws)
    total = 0.0
    for row, m in zip(values.tolist(), mu, strict=True):
        for v in row:
            density = sum(math.exp(-((v - other) ** 2) / (2 * variance)) for other in mu)
            total += -((v - m) ** 2) / (2 * variance) - math.log(density / n)
    return total / (n * draws)


def test_mutual_information_is_that_of_its_definition() -> None:
    values = normal(7, 1) + 0.5 * normal(7, 5)
    assert representation.mutual_information(values) == pytest.approx(by_hand(values), rel=1e-12)
    assert representation.mutual_information(values * 1e4 - 9) == pytest.approx(by_hand(values), rel=1e-9)


def test_mutual_information_between_its_ends() -> None:
    """Inputs far apart beside their noise are told apart; the same numbers for all tell nothing; a Gaussian channel
    of signal-to-noise ratio s carries log(1 + s)/2 nats."""
    n = 400
    apart = torch.arange(n, dtype=torch.float64)[:, None] * 100 + normal(n, 10)
    assert representation.mutual_information(apart) == pytest.approx(math.log(n), rel=1e-9)
    assert abs(representation.mutual_information(normal(1, 50).expand(n, 50))) < 1e-9
    assert representation.mutual_information(normal(n, 1).expand(n, 3)) == pytest.approx(math.log(n), rel=1e-12)
    two = torch.tensor([0.0, 1.0]).repeat(n // 2)[:, None].expand(n, 3)
    assert representation.mutual_information(two) == pytest.approx(math.log(2), rel=1e-12)
    for ratio in (1.0, 9.0):
        values = ratio**0.5 * normal(n, 1) + normal(n, 200)
        assert representation.mutual_information(values) == pytest.approx(math.log(1 + ratio) / 2, rel=0.1)


def test_what_mutual_information_makes_of_noise() -> None:
    """μ_i holds its own draw: of L draws of pure noise ½·log(L/(L-1)) nats are left. More inputs than fit a block."""
    for draws in (2, 10):
        found = representation.mutual_information(normal(1500, draws))
        assert found == pytest.approx(math.log(draws / (draws - 1)) / 2, abs=0.02)


W = normal(4, 3)
BAD: dict[str, tuple[Any, str]] = {
    "same class": (lambda: representation.template_plane(W, (0, 1, 1)), "three different classes of"),
    "class outside": (lambda: representation.template_plane(W, (0, 1, 4)), r"classes of \[0, 4\)"),
    "a line": (lambda: representation.template_plane(torch.arange(9.0).view(3, 3), (0, 1, 2)), "on a line"),
    "equal templates": (lambda: representation.template_plane(torch.ones(3, 3), (0, 1, 2)), "on a line"),
    "weight": (lambda: representation.template_plane(W[0], (0, 1, 2)), "linear_weight must be"),
    "classes": (lambda: representation.template_plane(W, (0.0, 1, 2)), "classes must be three different"),
    "NaN weight": (lambda: representation.template_plane(W * torch.nan, (0, 1, 2)), "linear_weight must be finite"),
    "features": (
        lambda: representation.template_plane(W, (0, 1, 2)).project(normal(5, 4)),
        "features must be of shape",
    ),
    "target shape": (lambda: representation.class_scatter(W, torch.zeros(3).long()), "target must be class indices"),
    "negative class": (lambda: representation.class_scatter(W, torch.tensor([0, -1, 0, 1])), "classes >= 0, got -1"),
    "no row": (lambda: representation.class_scatter(W, torch.full((4,), -100)), "of one row at least"),
    "NaN feature": (lambda: representation.class_scatter(W * torch.nan, torch.zeros(4).long()), "features must be fin"),
    "one draw": (lambda: representation.mutual_information(W[:, :1]), "at least 2 inputs and 2 augmentations"),
    "NaN": (lambda: representation.mutual_information(W * torch.nan), "values must be finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, match = BAD[name]
    with pytest.raises(lsk.ArgumentError, match=match):
        call()
