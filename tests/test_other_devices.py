"""A device without kernels: the reference serves every call there, with the numbers that it has on a CPU."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils import backend_registration

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends
from labelsmooth_kernels.distillation import Probabilities, distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

K = 7
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "every option": lambda g: lsk.cross_entropy(
        g.x, g.y, g.classes, label_smoothing=0.1, smoothing=g.prior, z_loss=0.1, row_weight=g.rows, softcap=3.0
    ),
    "statistics": lambda g: (
        torch.stack([value.float() for value in lsk.cross_entropy(g.x, g.y, return_stats="all")[1]]).detach()
        * g.x.sum()
    ),
    "others": lambda g: lsk.cross_entropy(g.x, g.y, label_smoothing=g.rows, smoothing="others", reduction="none"),
    "named": lambda g: lsk.cross_entropy(g.x, g.y, backend="reference", normalizer=3.0, reduction="mean"),
    "probabilities": lambda g: lsk.cross_entropy(g.x, g.teacher.softmax(1)),
    "head": lambda g: lsk.linear_cross_entropy(g.h, g.w, g.y, label_smoothing=0.1),
    "head of each row": lambda g: lsk.linear_cross_entropy(g.h, g.w, g.y, reduction="none", skip_ignored=True),
    "top k": lambda g: lsk.linear_cross_entropy(g.h, g.w, lsk.TopK(g.indices, g.rows[:, None])),
    "teacher": lambda g: lsk.linear_cross_entropy(g.h, g.w, lsk.Teacher(g.h.detach(), g.w.detach())),
    "distillation": lambda g: distillation_loss(g.x, g.teacher, g.y, label_smoothing=0.1),
    "distillation from probabilities": lambda g: distillation_loss(g.x, Probabilities(g.teacher.softmax(1))),
    "distillation from a head": lambda g: distillation_loss(g.x, lsk.Teacher(g.h.detach(), g.w.detach()), g.y),
    "module": lambda g: lsk.CrossEntropyLoss(g.classes, label_smoothing=0.1)(g.x, g.y),
    "module of a head": lambda g: g.head(g.h, g.y),
}


def numbers(name: str, put: Callable[[Tensor], Tensor], get: Callable[[Tensor], Tensor], device: str) -> list[Tensor]:
    """The loss of a call and the gradients of its leaves, with tensors of a device."""
    rng = torch.Generator().manual_seed(0)
    x, h, w, teacher = (torch.randn(s, generator=rng) for s in ((4, K), (4, 3), (K, 3), (4, K)))
    classes, rows, prior = (torch.rand(n, generator=rng) for n in (K, 4, K))
    torch.manual_seed(0)
    g = types.SimpleNamespace(
        x=put(x).requires_grad_(), h=put(h).requires_grad_(), w=put(w).requires_grad_(), teacher=put(teacher),
        classes=put(classes), rows=put(rows), prior=put(prior / prior.sum()), y=put(torch.tensor([1, 6, -100, 4])),
        indices=put(torch.tensor([[1], [2], [0], [3]])), head=lsk.LinearCrossEntropyLoss(3, K).to(device),
    )  # fmt: skip
    loss = CALLS[name](g)
    assert loss.device.type == device
    loss.sum().backward()
    leaves = (g.x, g.h, g.w, *g.head.parameters())
    return [get(loss.detach()), *(get(leaf.grad) for leaf in leaves if leaf.grad is not None)]


def compare() -> None:
    """In a process of its own, for a device is registered for good."""
    import toy_device

    toy = (toy_device.to_toy, toy_device.to_cpu, toy_device.DEVICE)
    for name in CALLS:
        want = numbers(name, torch.clone, torch.clone, "cpu")
        assert len(want) > 1
        torch.testing.assert_close(numbers(name, *toy), want, msg=lambda text, name=name: f"{name}: {text}")
        print(name)
    x, y = toy_device.to_toy(torch.randn(4, K)), toy_device.to_toy(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(lsk.ArgumentError, match="backend='cpu' cannot serve this call: it serves cpu tensors, not toy"):
        lsk.cross_entropy(x, y, backend="cpu")


@pytest.mark.slow
def test_a_device_that_no_kernel_serves_has_the_numbers_of_the_cpu() -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:labelsmooth_kernels",
        "-c",
        "import test_other_devices as t; t.compare()",
    ]
    run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert run.stdout.splitlines() == list(CALLS), run.stderr[-3000:]
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("device", ["mps", "xpu", "xla", "hpu", "mtia", "meta", "privateuseone", "lazy"])
def test_the_reference_is_chosen_wherever_there_are_no_kernels(device: str) -> None:
    for backend in backends.BACKENDS.values():
        reasons = backend.why_not(device, torch.float32, frozenset({"index target"}))
        assert (not reasons) == (backend.name == "reference")
    assert backends._choose(device, torch.float32, frozenset({"index target"}), None) == "reference"


def test_autocast_is_not_asked_of_a_device_without_it() -> None:
    h, w, y = (torch.empty(s, device="meta", dtype=d) for s, d in (((4, 3), None), ((K, 3), None), ((4,), torch.int64)))
    with torch.autocast("cpu", torch.bfloat16):
        assert lsk.linear_cross_entropy(h, w, y).dtype == torch.float32
        assert lsk.linear.autocasts(torch.empty(1))
    assert not lsk.linear.autocasts(torch.empty(1))
