"""Drawn calls: any shape, dtype, layout and options against the oracle, and what must hold of every one of them.

5,000 examples and more, the same in every run; ``HYPOTHESIS_PROFILE=random`` in the environment draws others.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.nn.functional as F
from cases import Place, truncates
from conftest import EMULATED, places, skip_unless_available
from covering import Mode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rule import Problem, acc_dtype, expect, few_ulps, judge_grad, judge_loss, judge_stats
from torch import Tensor

import labelsmooth_kernels as lsk
from labelsmooth_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Callable

settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

FAST = "cpu"
EXAMPLES = {"oracle": 2000, "symmetry": 900, "identity": 700, "repeat": 700, "pieces": 800}


def many(kind: str) -> Callable[[Any], Any]:
    return settings(
        max_examples=EXAMPLES[kind] // (10 if Mode.quick else 1),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Layouts of logits (A·B, K): the same values as a view that is not contiguous, its class dimension, and the row shape.
LAYOUTS: dict[str, tuple[Callable[[Tensor, int], Tensor], int, bool]] = {
    "contiguous": (lambda x, a: x, 1, False),
    "classes first in memory": (lambda x, a: x.t().contiguous().t(), 1, False),
    "rows apart and misaligned": (lambda x, a: F.pad(x, (3, 5), value=7.0)[:, 3 : 3 + x.shape[1]], 1, False),
    "every second class": (lambda x, a: x.repeat_interleave(2, 1)[:, ::2], 1, False),
    "every second row": (lambda x, a: x.repeat_interleave(2, 0)[::2], 1, False),
    "(A, K, B)": (lambda x, a: x.view(a, -1, x.shape[1]).transpose(1, 2).contiguous(), 1, True),
    "(A, B, K) without its last step": (
        lambda x, a: F.pad(x.view(a, -1, x.shape[1]), (0, 0, 0, 1), value=7.0)[:, :-1], -1, True,
    ),
    "(K, A, B)": (lambda x, a: x.view(a, -1, x.shape[1]).movedim(2, 0).contiguous(), 0, True),
}  # fmt: skip


@dataclasses.dataclass
class Drawn:
    """A call: the problem as rows, and how its logits (and probabilities) lie in memory."""

    problem: Problem
    layout: str
    a: int
    soft_layout: str

    def arguments(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """What the caller hands over for these logits and targets of rows."""
        lay, class_dim, wide = LAYOUTS[self.layout]
        shape = (self.a, len(x) // self.a) if wide else (len(x),)
        options = dict(self.problem.options, class_dim=class_dim)
        eps = options.get("label_smoothing")
        if isinstance(eps, Tensor) and eps.numel() > 1:
            options["label_smoothing"] = eps.view(shape)
        if not target.is_floating_point():
            return lay(x, self.a), target.view(shape), options
        soft = self.soft_layout if LAYOUTS[self.soft_layout][1:] == (class_dim, wide) else self.layout
        return lay(x, self.a), LAYOUTS[soft][0](target, self.a), options

    def rows(self, like_input: Tensor) -> Tensor:
        """A gradient of the input's shape, as rows."""
        _, class_dim, wide = LAYOUTS[self.layout]
        return like_input.movedim(class_dim, -1).flatten(0, -2) if wide else like_input

    def run(self, backend: str, x: Tensor | None = None, target: Tensor | None = None, **more: Any) -> list[Tensor]:
        """Losses of the rows and the gradient of their weighted sum, for other logits or targets where given."""
        x = self.problem.logits if x is None else x
        given, target, options = self.arguments(x, self.problem.target if target is None else target)
        given = given.detach().requires_grad_()
        loss = lsk.cross_entropy(given, target, reduction="none", backend=backend, **options | more)
        (grad,) = torch.autograd.grad(loss, given, factors(len(x)).to(loss.dtype).view(loss.shape))
        return [loss.detach().flatten(), self.rows(grad)]


def factors(n: int) -> Tensor:
    return torch.linspace(0.5, 1.5, n)


@st.composite
def drawn(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], plain: bool = False, small: bool = False) -> Drawn:
    """``plain``: without what breaks a symmetry: a scale, a softcap, a z-loss. ``small``: for an emulation."""
    a, b = draw(st.integers(1, 2 if small else 3)), draw(st.integers(1, 2 if small else 3))
    widest = 1025 if small else 4097  # one class more than a tile has
    n, k = a * b, draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 513, widest])))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    acc = acc_dtype(dtype)
    spread, shift = draw(st.sampled_from([0.0, 1.0, 3.0, 20.0])), draw(st.sampled_from([0.0, 50.0, -200.0]))
    x = torch.randn(n, k, generator=rng, dtype=torch.float64) * spread + shift
    options: dict[str, Any] = {}
    y = torch.randint(k, (n,), generator=rng)
    if masked := draw(st.sampled_from([0.0, 0.0, 0.3, 0.9])):
        kept = x.gather(1, y[:, None])
        x = torch.where(torch.rand(n, k, generator=rng) < masked, -torch.inf, x).scatter(1, y[:, None], kept)
    target = y
    if draw(st.booleans()):
        dtype_of_target = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
        target = torch.rand(n, k, generator=rng) * (torch.rand(n, k, generator=rng) < draw(st.sampled_from([0.5, 1.0])))
        target = torch.where(x == -torch.inf, 0.0, target).to(dtype_of_target)
    elif draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([-100, -1, int(y[0])]))
        target = torch.where(torch.rand(n, generator=rng) < 0.4, options["ignore_index"], y)
    eps = draw(st.sampled_from([0.0, 0.1, 0.1, 0.3, 1.0, -0.2, "scalar", "rows"]))
    if isinstance(eps, str):
        eps = torch.rand(n if eps == "rows" else 1, generator=rng, dtype=torch.float64).to(acc)
    options["label_smoothing"] = eps
    options["smoothing"] = draw(st.sampled_from(["uniform", "others", "prior"] if k > 1 else ["uniform", "prior"]))
    if options["smoothing"] == "prior":
        prior = torch.rand(k, generator=rng, dtype=torch.float64) * (torch.rand(k, generator=rng) < 0.8) + 1e-9
        options["smoothing"] = (prior / prior.sum()).to(acc)
    options["smooth_over"] = draw(st.sampled_from(["all", "finite"]))
    if draw(st.booleans()):
        options["weight"] = (torch.rand(k, generator=rng) * (torch.rand(k, generator=rng) < 0.9)).to(acc)
    if not plain:
        options["z_loss"] = draw(st.sampled_from([0.0, 0.0, 0.01]))
        options["confidence_penalty"] = draw(st.sampled_from([0.0, 0.0, 0.1, -0.1]))
        options["logit_scale"] = draw(st.sampled_from([1.0, 1.0, 0.5, -1.5]))
        options["softcap"] = draw(st.sampled_from([None, None, 5.0, 50.0]))
        if options["logit_scale"] < 0:  # what was masked must stay masked
            x = torch.where(x == -torch.inf, -60.0, x)
    layout, soft = (draw(st.sampled_from(sorted(LAYOUTS))) for _ in range(2))
    return Drawn(Problem(x.to(dtype), target, options), layout, a, soft)


HALF_TO_DOUBLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SINGLE = (torch.float32,)


def check_oracle(call: Drawn, place: Place) -> None:
    """Loss, gradient and statistics of any call are the oracle's; the caller's logits stay as they were."""
    problem, n = call.problem, len(call.problem.logits)
    want = expect(problem, factors(n).double())
    loss, grad = call.run(place[0])
    judge_loss(want, loss)
    judge_grad(problem, want, grad, truncated=truncates(place[0], problem.logits))
    given, target, options = call.arguments(problem.logits, problem.target)
    again, stats = lsk.cross_entropy(given, target, reduction="none", return_stats="all", backend=place[0], **options)
    judge_loss(want, again.flatten())
    judge_stats(problem, lsk.RowStats(*(value.flatten() for value in stats)))


@many("oracle")
@given(drawn(HALF_TO_DOUBLE))
def test_any_call_is_the_oracles(call: Drawn) -> None:
    skip_unless_available(FAST)
    check_oracle(call, (FAST, "cpu"))


@pytest.mark.parametrize("backend", sorted({place[0] for place in places()} - {FAST}))
def test_any_call_is_the_oracles_elsewhere(backend: str) -> None:
    """The same of the slower places, on fewer calls."""
    skip_unless_available(backend)
    dtypes = tuple(d for d in HALF_TO_DOUBLE if d in backends.BACKENDS[backend].dtypes)

    small = (backend, "cpu") in EMULATED

    @settings(
        max_examples=25 if small and not Mode.whole else 60,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn(dtypes, small=small and not Mode.whole))
    def check(call: Drawn) -> None:
        check_oracle(call, (backend, "cpu"))

    check()


@many("symmetry")
@given(drawn((torch.float32, torch.float64), plain=True), st.sampled_from([64.0, -1024.0, 4096.0]))
def test_symmetries(call: Drawn, shift: float) -> None:
    """A shift that the logits can hold changes no bit; new names for the classes change only names; Σ_k dz = 0."""
    skip_unless_available(FAST)
    x, target, options = call.problem
    x = (x * 64).round() / 64
    loss, grad = call.run(FAST, x)
    for a, b in zip(call.run(FAST, x + shift), (loss, grad), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    finite = grad.isfinite().all(1)
    size = grad.abs().sum(1) + 1
    assert ((grad.sum(1).abs() <= few_ulps(grad.dtype, x.shape[1]) * 4 * size) | ~finite).all()
    names = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3))
    if options.get("ignore_index", -100) >= 0:
        return  # the class that is ignored must keep its name
    if target.is_floating_point():
        renamed_target = target[:, names]
    else:
        renamed_target = torch.where(call.problem.keep, names.argsort()[target.clamp_min(0)], target)
    vectors = {o: options[o][names] for o in ("weight", "smoothing") if isinstance(options.get(o), Tensor)}
    renamed = dataclasses.replace(call, problem=Problem(x[:, names], renamed_target, options | vectors))
    renamed_loss, renamed_grad = renamed.run(FAST)
    tolerance = {
        "rtol": 2e-5 if x.dtype == torch.float32 else 1e-12,
        "atol": 2e-5 if x.dtype == torch.float32 else 1e-12,
    }
    torch.testing.assert_close(renamed_loss, loss, equal_nan=True, **tolerance)
    torch.testing.assert_close(renamed_grad, grad[:, names], equal_nan=True, **tolerance)


@many("identity")
@given(drawn(HALF_TO_DOUBLE))
def test_no_smoothing_is_exactly_none(call: Drawn) -> None:
    """ε = 0, as a number, a tensor or one per row, is bit for bit the loss that never heard of smoothing; over finite
    classes an ε that may be more keeps the call from the CPU's kernels of few classes, which round in their own way."""
    skip_unless_available(FAST)
    bare = {n: v for n, v in call.problem.options.items() if n not in ("label_smoothing", "smoothing", "smooth_over")}
    want = dataclasses.replace(call, problem=call.problem._replace(options=bare)).run(FAST)
    acc = acc_dtype(call.problem.logits.dtype)
    for eps in (0.0, torch.zeros(1, dtype=acc), torch.zeros(len(call.problem.logits), dtype=acc)):
        options = call.problem.options | {"label_smoothing": eps}
        got = dataclasses.replace(call, problem=call.problem._replace(options=options)).run(FAST)
        other = options.get("smooth_over") == "finite" and not isinstance(eps, float)
        for a, b in zip(got, want, strict=True):
            close = {"rtol": 8 * torch.finfo(a.dtype).eps, "atol": 1e-5 if acc == torch.float32 else 1e-13}
            exactly = {"rtol": 0.0, "atol": 0.0}
            torch.testing.assert_close(a, b, equal_nan=True, **(close if other else exactly))


@many("repeat")
@given(drawn(HALF_TO_DOUBLE))
def test_every_run_has_the_same_bits(call: Drawn) -> None:
    """Another run, another number of threads, the gradient over the logits: the same bits."""
    skip_unless_available(FAST)
    want = call.run(FAST)
    threads = torch.get_num_threads()
    try:
        for other, inplace in ((threads, False), (1, False), (4, False), (threads, True)):
            torch.set_num_threads(other)
            for a, b in zip(call.run(FAST, call.problem.logits.clone(), inplace=inplace), want, strict=True):
                assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    finally:
        torch.set_num_threads(threads)


@many("pieces")
@given(drawn(HALF_TO_DOUBLE), st.integers(1, 8))
def test_pieces_of_a_batch_are_the_batch(call: Drawn, at: int) -> None:
    """Rows in two calls are the rows of one, bit for bit; with one normalizer so are gradients of the means."""
    skip_unless_available(FAST)
    x, target, options = call.problem
    at = min(at, len(x))
    whole = dataclasses.replace(call, layout="contiguous", soft_layout="contiguous")
    want = whole.run(FAST)
    got = []
    for part in (slice(None, at), slice(at, None)):
        eps = options["label_smoothing"]
        rows = isinstance(eps, Tensor) and eps.numel() > 1
        own = options | {"label_smoothing": eps[part] if rows else eps}
        piece = dataclasses.replace(whole, problem=Problem(x[part], target[part], own))
        loss = lsk.cross_entropy(*piece.arguments(x[part], target[part])[:2], reduction="none", backend=FAST, **own)
        given = x[part].detach().requires_grad_()
        mean = lsk.cross_entropy(given, target[part], normalizer=7.0, backend=FAST, **own)
        got.append((loss, *torch.autograd.grad(mean, given)))
    assert torch.equal(torch.cat([g[0] for g in got]).nan_to_num(7), want[0].nan_to_num(7))
    given = x.detach().requires_grad_()
    mean = lsk.cross_entropy(given, target, normalizer=7.0, backend=FAST, **options)
    (grad,) = torch.autograd.grad(mean, given)
    assert torch.equal(torch.cat([g[1] for g in got]).nan_to_num(7), grad.nan_to_num(7))


def test_at_least_5000_examples() -> None:
    assert sum(EXAMPLES.values()) >= 5000
