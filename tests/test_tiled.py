"""The tiled linear loss against float64 of the same, already rounded, inputs, and against the products it replaces.

*Rule*: few ulps of the numbers that the arithmetic adds, for every loss and every entry of a gradient, plus dz rounded
to half-precision operands; and ||error|| <= max(2·||error of PyTorch in float32||, few ulps of ||gradient||).
"""

from __future__ import annotations

import importlib
from collections import namedtuple
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import guarded
from conftest import HAS_CUDA, skip_unless_available
from rule import FEW, HALF, Problem, assert_close, dense_q, few_ulps, ulp
from torch import Tensor

from labelsmooth_kernels.linear import default_filter_eps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

DEVICE = "cuda" if HAS_CUDA else "cpu"
SINGLE = torch.float32
NAMES = ("d_hidden", "d_weight", "d_bias")


@pytest.fixture
def linear(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module under test; the interpreter rounds to bfloat16 here, as hardware does: what it cuts off adds up."""
    skip_unless_available("triton")
    if not HAS_CUDA:
        interpreter, tl = (importlib.import_module(f"triton.{name}") for name in ("runtime.interpreter", "language"))
        convert = interpreter._convert_float

        def rounded(values: Any, source: Any, destination: Any, mode: Any) -> Any:
            if (source, destination) == (tl.bfloat16, tl.float32):  # no other number, in less time
                return values.astype(np.uint32) << 16
            if (source, destination) != (tl.float32, tl.bfloat16):
                return convert(values, source, destination, mode)
            half = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16()
            return half.view(torch.int16).numpy().view(np.uint16)

        monkeypatch.setattr(interpreter, "_convert_float", rounded)
    return importlib.import_module("labelsmooth_kernels.triton_kernels.linear")


class Given(NamedTuple):
    """One call; the options are those of ``rule.dense_q`` and g, the factor of the rows."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    options: dict[str, Any]
    g: Tensor | None = None

    @property
    def row(self) -> tuple[Any, ...]:
        """The arguments from target to softcap."""
        o = self.options
        eps, smoothing = o.get("label_smoothing", 0.0), o.get("smoothing", "uniform")
        eps, eps_rows = (0.0, eps) if isinstance(eps, Tensor) else (eps, None)
        prior, others = (smoothing, False) if isinstance(smoothing, Tensor) else (None, smoothing == "others")
        head = (self.target, o.get("weight"), prior, eps, eps_rows, self.g, o.get("ignore_index", -100), others)
        return *head, False, o.get("z_loss", 0.0), 0.0, o.get("logit_scale", 1.0), None

    @property
    def keep(self) -> Tensor:
        return self.target != self.options.get("ignore_index", -100)

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.hidden, self.weight, self.bias


Got = namedtuple("Got", "loss saved stats prediction d_hidden d_weight d_bias")


def run(linear: Any, given: Given, filter_eps: float = 0.0, want: tuple[bool, ...] = ()) -> Got:
    want = want or (True, True, given.bias is not None)
    out = linear.forward(*given.operands, *given.row, 1)
    return Got(*out, *linear.backward(*given.operands, *given.row, out[1], filter_eps, *want))


def draw(n: int, k: int, d: int, dtype: Any = SINGLE, bias: bool = True, ignored: int = 0, **options: Any) -> Given:
    """Logits of spread 2 or so; options that are functions are drawn; every ``ignored``-th row is, and holds NaN."""
    rng = torch.Generator().manual_seed(n * k + d)
    hidden, weight = ((torch.randn(size, d, generator=rng) * by).to(dtype) for size, by in ((n, 1), (k, 2 / d**0.5)))
    target = torch.randint(k, (n,), generator=rng)
    if ignored:
        target[::ignored] = options.get("ignore_index", -100)
        hidden[::ignored] = torch.nan
    drawn = {name: v(rng).to(DEVICE) if callable(v) else v for name, v in options.items()}
    b = torch.randn(k, generator=rng).to(DEVICE, dtype) if bias else None
    return Given(hidden.to(DEVICE), weight.to(DEVICE), b, target.to(DEVICE), drawn, drawn.pop("g", None))


def uniform(size: int, low: float = 0.25) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.rand(size, generator=rng) + low


def prior(k: int, first: int = 0) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: F.normalize(torch.rand(k, generator=rng) * (torch.arange(k) >= first), p=1, dim=0)


def factors(given: Given) -> Tensor:
    return given.keep.double() * (1.0 if given.g is None else given.g.double())


def evaluate(given: Given, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(z, loss, gradients of Σ g·loss) by autograd; float64 is the oracle."""
    keep, options = given.keep, given.options
    hidden = torch.where(keep[:, None], given.hidden.to(dtype), 0.0).requires_grad_()
    weight = given.weight.to(dtype).requires_grad_()
    bias = (weight.new_zeros(len(weight)) if given.bias is None else given.bias.to(dtype)).requires_grad_()
    z = F.linear(hidden, weight, bias) * options.get("logit_scale", 1.0)
    q = dense_q(Problem(z, given.target, options), z).to(dtype)
    loss = -torch.where(q == 0, 0.0, q * torch.log_softmax(z, -1)).sum(-1)
    loss = torch.where(keep, loss + options.get("z_loss", 0.0) * torch.logsumexp(z, -1).square(), 0.0)
    grads = torch.autograd.grad(torch.where(keep, loss, 0.0), (hidden, weight, bias), factors(given).to(dtype))
    return z.detach().double(), loss.detach().double(), [grad.double() for grad in grads]


def bounds(given: Given, z: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Few ulps of what is added, carried through the formulas of the gradient; plus, in half precision, dz rounded."""
    (n, d), k, dtype = given.hidden.shape, len(given.weight), given.hidden.dtype
    scale, zeta = abs(given.options.get("logit_scale", 1.0)), given.options.get("z_loss", 0.0)
    hidden, weight = given.hidden.double().nan_to_num(0, 0, 0).abs(), given.weight.double().abs()
    size = hidden @ weight.T + (0 if given.bias is None else given.bias.double().abs().nan_to_num(0, 0, 0))
    off_z, of_sum = few_ulps(SINGLE, d) * scale * size, few_ulps(SINGLE, k)
    q = dense_q(Problem(z, given.target, given.options), z, sizes=True).abs()
    zmax, lse, p = z.amax(-1, keepdim=True), torch.logsumexp(z, -1, keepdim=True), torch.softmax(z, -1)
    down, logsum = torch.where(z == -torch.inf, 0.0, zmax - z), lse - zmax
    off_lse = (p * off_z).sum(-1, keepdim=True)
    mass = q.sum(-1, keepdim=True)
    loss = mass * (off_lse + of_sum * (1 + logsum)) + (q * (off_z + of_sum * down)).sum(-1, keepdim=True)
    loss = loss + 2 * zeta * lse.abs() * (off_lse + of_sum * lse.abs())
    mass = mass + 2 * zeta * lse.abs()
    off_dz = mass * p * (off_z + off_lse + of_sum * (1 + down + logsum)) + 2 * zeta * p * off_lse + few_ulps(SINGLE) * q
    g = (scale * factors(given).abs())[:, None]
    if dtype in HALF:  # without the smoothing; lifted, so that fp16 loses no more than 2⁻³⁶ of the largest
        least = 2**-36 * (g * (mass + q.amax(-1, keepdim=True))).amax() / g.clamp_min(1e-30)
        off_dz = off_dz + torch.finfo(dtype).eps / 2 * (mass * p + q) + least
    off_dz, dz = g * off_dz, g * (mass * p + q)
    of_rows = off_dz + few_ulps(SINGLE, n) * dz
    return loss[:, 0], [(off_dz + of_sum * dz) @ weight, of_rows.T @ hidden, of_rows.sum(0)]


def judge(given: Given, got: Got) -> None:
    (z, loss, grads), (_, loss_32, grads_32) = evaluate(given, torch.float64), evaluate(given, SINGLE)
    loss_off, grads_off = bounds(given, z)
    assert_close("loss", got.loss, loss, torch.maximum(loss_off, 2 * (loss_32 - loss).abs().nan_to_num(0, 0)))
    dtype = given.hidden.dtype
    for name, grad, oracle, grad_32, off in zip(NAMES, got[4:], grads, grads_32, grads_off, strict=True):
        if grad.numel() == 0:
            continue
        assert grad.dtype == dtype
        rounding = ulp(oracle, dtype) / 2 if dtype in HALF else 0.0
        assert_close(name, grad, oracle, off + rounding)
        error, error_32 = (grad.double() - oracle).norm(), (grad_32 - oracle).norm()
        few = FEW * torch.finfo(dtype).eps * oracle.norm() if dtype in HALF else few_ulps(SINGLE) * oracle.norm()
        if dtype != torch.float16 or oracle.abs().max() > 1e-3:  # else fp16 has no more than subnormals for it
            assert error <= max(2 * error_32, few), f"{name}: {error:.3g}, float32 {error_32:.3g}, few {few:.3g}"
    assert (got.d_hidden[~given.keep] == 0).all(), "an ignored row has a gradient"
    top, found = z.amax(-1), z.gather(1, got.prediction[:, None])[:, 0]
    off = few_ulps(SINGLE, given.hidden.shape[1]) * (1 + top.abs()) * 8
    assert ((top - found <= off) | ~given.keep).all(), "prediction"
    kept = {name: v for name, v in given.options.items() if name in ("logit_scale", "ignore_index")}
    _, plain, _ = evaluate(given._replace(options=kept), torch.float64)
    assert_close("nll", got.stats[0], plain, loss_off + few_ulps(SINGLE, 1000) * (1 + plain) + off)


N, K, D = 21, 130, 16  # two blocks of rows, three tiles of classes
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "uniform": {"label_smoothing": 0.1},
    "sharpened": {"label_smoothing": -0.2},
    "per row": {"label_smoothing": lambda rng: torch.rand(N, generator=rng) - 0.3},
    "others": {"label_smoothing": 0.1, "smoothing": "others"},
    "weights": {"label_smoothing": 0.1, "weight": uniform(K)},
    "weights and prior": {"label_smoothing": 0.1, "weight": uniform(K, 0.0), "smoothing": prior(K)},
    "z-loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "one epsilon, scaled": {"label_smoothing": lambda rng: torch.full((1,), 0.2), "logit_scale": -0.5},
    "factors": {"label_smoothing": 0.1, "g": lambda rng: torch.randn(N, generator=rng)},
    "a large factor": {"label_smoothing": 0.1, "g": lambda rng: torch.full((1,), 65536.0 / N)},
    "a small factor": {"label_smoothing": 0.1, "g": lambda rng: torch.full((1,), 1e-4 / N)},
    "ignored rows": {"label_smoothing": 0.1, "ignored": 3},
    "ignored class": {"label_smoothing": 0.1, "ignored": 2, "ignore_index": 7},
    "no bias": {"label_smoothing": 0.1, "bias": False},
    "everything": {"label_smoothing": uniform(N, 0.0), "smoothing": prior(K), "weight": uniform(K), "z_loss": 1e-3}
    | {"logit_scale": 1.5, "ignored": 4, "g": uniform(N)},
}
IN_HALF = {"a large factor", "a small factor", "weights", "ignored rows", "no bias", "everything"}


RUNS = [(name, dtype) for dtype in (SINGLE, *HALF) for name in CASES if dtype == SINGLE or name in IN_HALF]
SHAPES = [(1, 3, 8), (5, 3, 16), (1, 130, 50), (5, 1000, 40), (67, 130, 8), (67, 3, 200)]


@pytest.mark.parametrize(("name", "dtype"), RUNS, ids=str)
def test_options(linear: Any, name: str, dtype: torch.dtype) -> None:
    judge(given := draw(N, K, D, dtype, **CASES[name]), run(linear, given))


@pytest.mark.parametrize(("shape", "dtype"), [*((s, SINGLE) for s in SHAPES), (SHAPES[-1], torch.bfloat16)], ids=str)
def test_shapes(linear: Any, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Smaller than a tile, one above a multiple, and more features than an accumulator in registers has."""
    judge(given := draw(*shape, dtype, label_smoothing=0.1), run(linear, given))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_masked_classes(linear: Any, eps: float) -> None:
    """A bias of -inf masks a class; with a prior that leaves it out the loss is finite, as its gradients always are."""
    given = draw(N, K, D, label_smoothing=eps, **({"smoothing": prior(K, 70)} if eps else {}))
    given.bias[:70] = -torch.inf  # whole tiles of it
    given.target.clamp_(min=70)
    got = run(linear, given)
    judge(given, got)
    assert got.loss.isfinite().all()
    assert not got.d_weight[:70].any()


def test_a_shift_of_the_logits_changes_nothing(linear: Any) -> None:
    """Logits that are multiples of 1/64 below 2¹⁴ are exact in float32, and so is all that is computed of them."""
    given = draw(N, K, D, label_smoothing=0.1)
    for value in given.operands:
        value.mul_(4).round_().div_(8)
    near, far = run(linear, given), run(linear, given._replace(bias=given.bias + 8192.0))
    assert same((near.loss, *near[4:]), (far.loss, *far[4:]))


def same(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(some, others, strict=True))


def test_runs_are_equal_and_nothing_else_is_written(linear: Any) -> None:
    """Rows apart, misaligned, between NaNs."""
    given = draw(N, K, D, torch.float16, label_smoothing=0.1, ignored=5)
    (hidden, unharmed), (weight, unharmed_too) = guarded(given.hidden), guarded(given.weight)
    apart = given._replace(hidden=hidden, weight=weight, bias=given.bias.repeat_interleave(2)[::2])
    copies = [value.clone() for value in apart.operands]
    columns = given._replace(hidden=given.hidden.T.contiguous().T, weight=given.weight.T.contiguous().T)
    first = run(linear, given)
    assert same(first, run(linear, apart))
    assert same(first, run(linear, columns))
    assert same(apart.operands, copies)
    unharmed()
    unharmed_too()


@pytest.mark.parametrize("filter_eps", [0.0, 1e-2])
def test_what_is_not_wanted_is_empty(linear: Any, filter_eps: float) -> None:
    given = draw(5, 40, 16, label_smoothing=0.1)
    whole = run(linear, given, filter_eps)
    for i in (0, 1, 2, 4, 6):
        want = (bool(i & 1), bool(i & 2), bool(i & 4))
        for wanted, grad, all_of_it in zip(want, run(linear, given, filter_eps, want)[4:], whole[4:], strict=True):
            assert torch.equal(grad, all_of_it) if wanted else grad.numel() == 0


@pytest.mark.skipif(HAS_CUDA, reason="memory that is not touched costs nothing on a CPU only")
def test_rows_2_31_apart(linear: Any) -> None:
    given = draw(3, 3, 8, torch.float16, label_smoothing=0.1)
    memory = [torch.from_numpy(np.empty(2 * 2**31 + 64, np.float16)) for _ in range(2)]
    hidden, weight = (m.as_strided((3, 8), (2**31 + 5, 1)) for m in memory)
    far = given._replace(hidden=hidden.copy_(given.hidden), weight=weight.copy_(given.weight))
    assert same(run(linear, given), run(linear, far))


def test_no_rows(linear: Any) -> None:
    got = run(linear, draw(0, 5, 8))
    assert [v.shape for v in got] == [(0,), (4, 0), (1, 0), (0,), (0, 8), (5, 8), (5,)]
    assert not any(grad.any() for grad in got[4:])


@pytest.mark.parametrize("ignored", [1, 3])
def test_ignored_rows(linear: Any, ignored: int) -> None:
    given = draw(N, K, D, ignored=ignored, label_smoothing=0.1)
    given.weight[5, 3] = torch.inf  # 0·inf is no 0
    for filter_eps in (0.0, 1e-3):
        got = run(linear, given, filter_eps)
        assert not any(v[~given.keep].any() for v in (got.loss, got.d_hidden))
        assert given.keep.any() or not any(grad.any() for grad in got[5:])
    assert not linear.forward(*given[:3], *given.row, 0)[1][:, ~given.keep].any()


@pytest.mark.parametrize("bad", [-1, 40, 2**32 + 5])
def test_targets_outside(linear: Any, monkeypatch: pytest.MonkeyPatch, bad: int) -> None:
    """The CPU raises; where looking would stall a GPU, the row becomes NaN, and what it adds to with it."""
    given = draw(20, 40, 16, label_smoothing=0.1)
    good = run(linear, given)
    given.target[4] = bad
    if not HAS_CUDA:
        with pytest.raises(IndexError, match=f"{bad} at position 4"):
            run(linear, given)
    monkeypatch.setattr(linear, "_check_classes", lambda *_: None)
    for filter_eps in (0.0, 1e-3):
        got = run(linear, given, filter_eps)
        others = torch.arange(20, device=DEVICE) != 4
        assert torch.equal(got.loss[others], good.loss[others])
        assert filter_eps or torch.equal(got.d_hidden[others], good.d_hidden[others])
        assert got.d_hidden[others].isfinite().all()
        assert all(v.isnan().all() for v in (got.loss[4], got.d_hidden[4], got.d_weight, got.d_bias))


def test_what_is_not_served(linear: Any) -> None:
    given = draw(3, 5, 8)
    for i, value in ((8, True), (12, 30.0), (0, torch.rand(3, 5))):
        with pytest.raises(TypeError):
            linear.forward(*given.operands, *(value if i == j else v for j, v in enumerate(given.row)), 0)


def zipf(k: int, n: int, d: int, dtype: torch.dtype, noise: float, sure: float = 0.0) -> Given:
    """Classes sorted by frequency, probabilities of about 1/rank, targets drawn from them; ``sure`` is added to the
    logit of a row's target, as training does."""
    rng = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, d, generator=rng), torch.randn(k, d, generator=rng) * noise / d**0.5
    bias = -torch.arange(1.0, k + 1).log()
    target = torch.multinomial(torch.softmax(bias, 0).expand(n, k), 1, generator=rng)[:, 0]
    weight[target] += sure * hidden / hidden.square().sum(-1, keepdim=True)
    made = (value.to(DEVICE, dtype) for value in (hidden, weight, bias))
    return Given(*made, target.to(DEVICE), {"label_smoothing": 0.1})


@pytest.fixture
def skipped(linear: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Which tiles of 64 rows and 128 classes each backward skips."""
    found: list[Tensor] = []
    made = linear._Skipped
    monkeypatch.setattr(linear, "_Skipped", lambda tiles, mass: found.append(tiles) or made(tiles, mass))

    def tiles(_: object, hidden: Tensor, k: int) -> Any:
        wide = hidden.dtype == torch.bfloat16 and not HAS_CUDA
        backward = linear.Tiles(64, 128, 32, 4, 1, 32, 64, 8, wide=wide)
        return backward._replace(classes=512), backward

    monkeypatch.setattr(linear, "_tiles", tiles)
    monkeypatch.setattr(linear, "_SLICE", 64)
    with linear.launch.override(machine=linear.launch.Machine((0, 0), sms=64)):
        yield found


@pytest.mark.parametrize(("sure", "at_least"), [(0.0, 0.1), (18.0, 0.6)])
def test_filter_is_worth_it_and_exact_enough(linear: Any, skipped: list[Tensor], sure: float, at_least: float) -> None:
    """Rows as flat as a vocabulary, and rows that are sure of their target: against PyTorch in bfloat16."""
    given = zipf(16384, 16, 32, torch.bfloat16, 0.5, sure)
    got = run(linear, given, default_filter_eps(torch.bfloat16), (True, True, False))
    assert (share := float(skipped[0].float().mean())) > at_least, f"only {share:.0%} of the tiles are skipped"
    z, _, oracle = evaluate(given, torch.float64)
    lost = torch.softmax(z, -1) * skipped[0].repeat_interleave(128, 1)  # there is one block of rows
    assert lost.sum(-1).max() <= linear._BUDGET
    theirs = [value.clone().requires_grad_() for value in given.operands]
    F.cross_entropy(F.linear(*theirs), given.target, label_smoothing=0.1, reduction="sum").backward()
    for name, grad, their, want in zip(NAMES, got[4:6], theirs, oracle, strict=False):
        error, theirs_off = (grad.double() - want).norm(), (their.grad.double() - want).norm()
        assert error < theirs_off, f"{name}: error {error:.3g}, F.linear and F.cross_entropy {theirs_off:.3g}"


def test_filter_keeps_sums_and_targets(linear: Any, skipped: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows of the identity dW is dzᵀ: Σ_k dz_k is 0, no entry is off by the filter, none at a target is off."""
    monkeypatch.setattr(linear, "_BUDGET", 1.0)  # as much as can be skipped
    given = zipf(8192, 16, 16, SINGLE, 0.5)._replace(hidden=torch.eye(16, device=DEVICE))
    given.target[-4:] = torch.tensor([8191, 6172, 4999, 2500], device=DEVICE)  # where p alone would be skipped
    got = run(linear, given, 2.0**-12)
    assert skipped[0].float().mean() > 0.5
    want = evaluate(given, torch.float64)[2][1]
    assert got.d_weight.double().sum(0).abs().max() <= 1e-5 * 0.1
    assert (got.d_weight.double() - want).abs().max() <= 2.0**-12
    assert (got.d_weight.double() - want)[given.target, range(16)].abs().max() <= 1e-6
    assert got.d_bias.double().sum().abs() <= 16 * 1e-5 * 0.1
    on_the_other_side = got.d_weight.double().T @ given.weight.double()
    assert_close("d_hidden", got.d_hidden, on_the_other_side, torch.full_like(on_the_other_side, 1e-6))


def test_filter_decides_once(linear: Any, skipped: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry is within the filter of the exact gradient, with ignored rows, weights, factors and a last tile."""
    monkeypatch.setattr(linear, "_BUDGET", 10.0)
    given = draw(70, 600, 20, label_smoothing=0.1, ignored=2, weight=uniform(600), g=uniform(70), logit_scale=0.5)
    given = given._replace(target=torch.where(given.target < 0, given.target, given.target % 250))
    given.target[-1] = 599  # only the second block keeps the last tile, which is smaller
    _, _, oracle = evaluate(given, torch.float64)
    got, exact = run(linear, given, 1e-1), run(linear, given)
    assert len(skipped) == 1, "without a filter nothing is decided"
    assert skipped[0][:, -1].tolist() == [1, 0]
    assert got.d_bias.double().sum().abs() <= 1e-5
    alone = run(linear, given, 1e-1, (False, True, True))
    assert torch.equal(skipped[0], skipped[1])
    assert torch.equal(alone.d_weight, got.d_weight)
    hidden, weight = given.hidden.double().nan_to_num().abs(), given.weight.double().abs()
    off = 1e-1 * 0.5 * factors(given)[:, None] * torch.ones(70, 600, device=DEVICE)
    allowed = (off @ weight, off.T @ hidden, off.sum(0))
    for name, grad, want, allow in zip(NAMES, got[4:], oracle, allowed, strict=True):
        assert_close(name, grad, want, allow)
    judge(given, exact)
