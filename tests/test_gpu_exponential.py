"""The loss with the worst 2ˣ that a GPU's ex2.approx.ftz may give: 2 units in the last place off, 0 below 2⁻¹²⁶.

Emulated, in Triton's interpreter and on the threads of ``cuda_shim``: every value is too large, too small, or either by
its bits. What is allowed follows from that and from float32, not from what was found.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import HAS_CUDA, skip_unless_available

import labelsmooth_kernels as lsk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cases import Place

K = 262_144
EPS = 0.1
HALVES = {"cuda": 8, "triton": K // 8192}
"""Units of 2⁻²⁴ by which a sum of exponentials may be off: CUDA C++ keeps what rounding loses, so that only the sums of
few terms count; in Triton a thread adds as many blocks, each off by half a unit, to the 1 of a maximum."""
ULPS = {"exact": 0, "high": 2, "low": -2, "either": 3}  # 3: the sign is the value's last bit
pytestmark = pytest.mark.skipif(HAS_CUDA, reason="the GPU's own exponential is what the other tests have there")


def worse(x: np.ndarray[Any, Any], how: str) -> np.ndarray[Any, Any]:
    """2ˣ of float32 as a GPU may give it."""
    y = np.exp2(x.astype(np.float64)).astype(np.float32)
    sign = np.where(y.view(np.int32) & 1, 1, -1) if how == "either" else np.sign(ULPS[how])
    ordinary = (y >= 2**-126) & (y < 2**127)
    off = (y.view(np.int32) + np.where(ordinary & (y != 1), 2 * sign, 0)).astype(np.int32).view(np.float32)
    return np.where(y < 2**-126, np.float32(0), off)


@pytest.fixture(params=["triton", "cuda"])
def place(request: pytest.FixtureRequest, how: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A backend whose exponential is ``how``."""
    skip_unless_available(request.param)
    if request.param == "triton":
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
        handle = interpreter.TensorHandle

        def create_exp2(self: Any, arg: Any) -> Any:
            return handle(worse(arg.data, how), arg.dtype.scalar)

        monkeypatch.setattr(type(interpreter.interpreter_builder), "create_exp2", create_exp2)
    else:
        torch.ops.labelsmooth_cuda_shim.worsen(ULPS[how])
    yield request.param, "cpu"
    if request.param == "cuda":
        torch.ops.labelsmooth_cuda_shim.worsen(0)


def rows() -> torch.Tensor:
    """Flat, as at the start of a training, as in its midst, sure of one class, and falling off evenly; with a maximum
    of 0, so that float32 has no digit of the logsum to round away but its last."""
    rng = torch.Generator().manual_seed(K)
    noise = torch.randn(K, generator=rng)
    sure = noise - 20
    sure[1000] = 0
    x = torch.stack([torch.zeros(K), noise, 3 * noise, sure, -torch.arange(K) / 2**12])
    return x - x.amax(1, keepdim=True)


@pytest.mark.parametrize("how", ULPS)
def test_sums_and_gradients_of_a_long_row(place: Place, how: str) -> None:
    x, y = rows(), torch.tensor([5, 6, 7, 1000, K - 1])
    leaf = x.clone().requires_grad_()
    loss, stats = lsk.cross_entropy(leaf, y, label_smoothing=EPS, reduction="sum", return_stats=True, backend=place[0])
    (grad,) = torch.autograd.grad(loss, leaf)
    z = x.double()
    lse, p = torch.logsumexp(z, 1), torch.softmax(z, 1)
    ex2 = 0 if how == "exact" else 2**-22  # relative, of each term; two roundings of its exponent beside it
    depth = -(p * z).sum(1)
    allowed = ex2 + depth * 2**-23 + HALVES[place[0]] * 2**-24 + lse.abs() * 2**-23
    off = (stats.lse.double() - lse).abs()
    assert (off <= allowed).all(), (off / allowed).tolist()
    q = torch.full_like(z, EPS / K)
    q[torch.arange(len(y)), y] += 1 - EPS
    most = p * (ex2 + (z - lse[:, None]).abs() * 2**-22 + allowed[:, None] + 2**-22) + (q + p) * 2**-23
    off_grad = (grad.double() - (p - q)).abs()
    assert (off_grad <= most + 2**-126).all(), (off_grad / most).amax(1).tolist()
