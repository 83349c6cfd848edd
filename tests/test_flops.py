"""FlopCounterMode beside the heads: as many products as are computed, whichever way a call takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from conftest import skip_unless_available
from heads import operands
from sharded import draw, needs_gloo, spawn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import labelsmooth_kernels as lsk
from labelsmooth_kernels import parallel
from labelsmooth_kernels.distillation import distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

N, D, K = 48, 4, 20
PRODUCT = 2 * N * D * K
KEPT = 0.75  # of the rows: every fourth target is ignored


def products(loss: Callable[[], Any], *, backward: bool = True, product: int = PRODUCT) -> float:
    """How many products of all rows with a head forward and backward hold, as the counter sees them."""
    with FlopCounterMode(display=False) as counter:
        value = loss()
        if backward:
            value.sum().backward()
    return counter.get_total_flops() / product


def test_a_forward_holds_one_product_and_a_training_step_three(place: tuple[str, str]) -> None:
    """As many as PyTorch's own operations, which serve the reference, show by themselves."""
    hidden, weight, bias, y = operands(N, D, K, place)
    options: dict[str, Any] = {"linear_bias": bias, "backend": place[0], "skip_ignored": False}
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options)) == 3
    options["chunk_rows"] = 20
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options)) == 3
    with torch.no_grad():
        assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options), backward=False) == 1
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight.detach(), y, **options)) == 2
    assert products(lambda: lsk.linear_cross_entropy(hidden.detach(), weight, y, **options)) == 2


def test_logits_that_are_made_again_count_again(fast_place: tuple[str, str]) -> None:
    for dtype, reduction in ((torch.float32, "none"), (torch.float16, "mean")):
        hidden, weight, _, y = operands(N, D, K, fast_place, dtype)
        options: dict[str, Any] = {"reduction": reduction, "backend": fast_place[0], "skip_ignored": False}
        assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options)) == 4  # noqa: B023
        options["skip_ignored"] = True
        assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options)) == 4 * KEPT  # noqa: B023


def test_rows_left_out_of_the_products_do_not_count(fast_place: tuple[str, str]) -> None:
    hidden, weight, _, y = operands(N, D, K, fast_place)
    options: dict[str, Any] = {"backend": fast_place[0], "skip_ignored": True}
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **options)) == 3 * KEPT
    # These ask for every row: statistics, and probabilities, of which none is ignored.
    statistics = {**options, "return_stats": True}
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y, **statistics)[0]) == 3
    soft = torch.full((N, K), 1 / K, device=y.device)
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, soft, **options)) == 3


def test_a_teacher_counts_its_own_product(fast_place: tuple[str, str]) -> None:
    hidden, weight, _, _ = operands(N, D, K, fast_place)
    wide, other, _, _ = (t.detach() for t in operands(N, 3 * D, K, fast_place))
    teacher = lsk.Teacher(wide, other)
    assert products(lambda: lsk.linear_cross_entropy(hidden, weight, teacher, backend=fast_place[0])) == 3 + 3


def test_a_teacher_of_distillation_counts(served: tuple[str, str]) -> None:
    student = torch.randn(N, K, device=served[1], requires_grad=True)
    wide, other, _, _ = (t.detach() for t in operands(N, D, K, served))
    assert products(lambda: distillation_loss(student, lsk.Teacher(wide, other), backend=served[0])) == 1


@pytest.mark.emulated
def test_the_tiled_head_holds_five_products() -> None:
    skip_unless_available("triton")
    place = ("triton", "cuda" if torch.cuda.is_available() else "cpu")
    hidden, weight, bias, y = operands(N, D, K, place)
    options: dict[str, Any] = {"method": "tiled", "backend": "triton", "filter_eps": 0.0}

    def run(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> float:
        return products(lambda: lsk.linear_cross_entropy(h, w, y, linear_bias=b, **options))

    assert run(hidden, weight) == 5
    assert run(hidden, weight.detach()) == run(hidden.detach(), weight) == 3
    assert run(hidden.detach(), weight.detach(), bias) == 2, "the bias's gradient takes the logits again, no product"
    options["filter_eps"] = 1e-3
    assert run(hidden.detach(), weight) == 4, "what is filtered is found in a sweep of the hidden states"


def test_fake_targets_count_every_row() -> None:
    skip_unless_available("cpu")
    with FakeTensorMode():
        hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(K, D, requires_grad=True)
        y = torch.zeros(N, dtype=torch.int64)
        assert products(lambda: lsk.linear_cross_entropy(hidden, weight, y)) == 3


@needs_gloo
@pytest.mark.slow
def test_a_rank_counts_the_products_of_its_classes(tmp_path: Path) -> None:
    spawn(_rank, 2, tmp_path, str(tmp_path))
    for rank in range(2):
        assert json.loads((tmp_path / str(rank)).read_text()) == [3, 4, 1, 3]


def _rank(rank: int, folder: str) -> None:
    _, y, hidden, weight = draw(16)
    hidden, mine = hidden.requires_grad_(), weight[8 * rank : 8 * rank + 8].clone().requires_grad_()
    half = hidden.detach()[6 * rank : 6 * rank + 6].clone().requires_grad_()
    product = 2 * hidden.numel() * 8

    def run(*given: Any, backward: bool = True, **options: Any) -> float:
        loss = lambda: parallel.linear_cross_entropy(*given, **options)  # noqa: E731
        return products(loss, backward=backward, product=product)

    found = [run(hidden, mine, y), run(hidden, mine, y, reduction="none")]
    with torch.no_grad():
        found.append(run(hidden, mine, y, backward=False))
    found.append(run(half, mine, y, grad_reduce="scatter"))
    Path(folder, str(rank)).write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize("first", ["labelsmooth_kernels", "torch.utils.flop_counter"])
def test_the_formulas_are_there_whatever_is_imported_first(first: str) -> None:
    program = (
        f"import torch, importlib.util, {first}, labelsmooth_kernels\n"
        "importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "raise SystemExit(torch.ops.labelsmooth_kernels.chunked_forward not in flop_registry)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
