"""The table of cases, and how one of them is run under a backend; ``rule`` judges the numbers."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rule import HALF, Problem, acc_dtype, assert_close, expect, judge_grad, judge_loss, judge_stats
from torch import Tensor

import labelsmooth_kernels as lsk

SINGLE = (torch.float32,)
ALL = (*HALF, torch.float32, torch.float64)
Place = tuple[str, str]  # backend and device
Build = Callable[[torch.Generator], tuple[Tensor, Tensor, dict[str, Any]]]


def placed(options: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The options with their tensors on a device, and of a dtype."""
    return {name: v.to(device, dtype) if isinstance(v, Tensor) else v for name, v in options.items()}


@dataclass(frozen=True)
class Case:
    """One row of the table. ``large``: a vocabulary of real size, which the interpreter is too slow for."""

    name: str
    regressions: str
    build: Build
    dtypes: tuple[torch.dtype, ...] = ALL
    large: bool = False

    def problem(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
        x, target, options = self.build(torch.Generator().manual_seed(zlib.crc32(self.name.encode())))
        acc = acc_dtype(dtype)
        target = target.to(device, acc) if target.is_floating_point() else target.to(device)
        return Problem(x.to(dtype).to(device), target, placed(options, device, acc))

    @functools.cache  # noqa: B019  # a case lives as long as the table
    def features(self) -> frozenset[str]:
        """What a backend needs to serve it."""
        problem = self.problem()
        return lsk.LossSpec(**problem.options).features(index_target=not problem.target.is_floating_point())

    @functools.cache  # noqa: B019
    def traits(self) -> frozenset[str]:
        """What sets its rows apart, for a design to cover: its options and their kinds, and what its logits hold."""
        x, target, options = self.problem()
        kinds = {name: v if isinstance(v, str) else kind_of(v) for name, v in options.items()}
        found = {f"{name}={kind}" for name, kind in kinds.items()} | self.features()
        held = {"-inf": x == -torch.inf, "inf": x == torch.inf, "nan": x.isnan()}
        found |= {f"holds {name}" for name, there in held.items() if there.any()}
        if not target.is_floating_point() and (target == options.get("ignore_index", -100)).any():
            found.add("ignored rows")
        k = x.shape[1]
        return frozenset(found | {"large" if self.large else "some tiles" if k > 1024 else "one tile"})


def kind_of(value: object) -> str:
    """Tensors by their number of values, numbers by their sign."""
    if isinstance(value, Tensor):
        return "one value" if value.numel() == 1 else "values"
    return "negative" if isinstance(value, (int, float)) and value < 0 else "positive"


def normal(n: int, k: int, spread: float = 3.0, shift: float = 0.0, ignored: int = 0, **options: Any) -> Build:
    """Gaussian logits, random targets, every ``ignored``-th row ignored; options that are functions are drawn."""

    def build(rng: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x = torch.randn(n, k, generator=rng, dtype=torch.float64) * spread + shift
        y = torch.randint(k, (n,), generator=rng)
        if ignored:
            y[::ignored] = options.get("ignore_index", -100)
        return x, y, {name: v(rng) if callable(v) else v for name, v in options.items()}

    return build


def sure(k: int, rows: list[tuple[float, float]]) -> Build:
    """Rows (p, ε) with that probability at the target even after rounding to bf16: its logit is a multiple of 1/4, and
    the many small logits of the others, whose roundings average out, take up the rest."""

    def build(rng: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        n, odds = len(rows), torch.tensor([p / (1 - p) for p, _ in rows], dtype=torch.float64).log()
        x = torch.randn(n, k, generator=rng, dtype=torch.float64) * 0.05
        y = torch.randint(k, (n,), generator=rng)
        x.scatter_(1, y[:, None], -torch.inf)
        rest = torch.logsumexp(x, 1)
        top = ((odds + rest) * 4).round() / 4
        x = (x + (top - odds - rest)[:, None]).scatter(1, y[:, None], top[:, None])
        return x, y, {"label_smoothing": torch.tensor([eps for _, eps in rows])} if any(eps for _, eps in rows) else {}

    return build


def edit(build: Build, change: Callable[[Tensor, Tensor], None]) -> Build:
    """The logits and targets of ``build``, changed in place."""

    def edited(rng: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x, y, options = build(rng)
        change(x, y)
        return x, y, options

    return edited


def soft(n: int, k: int, mass: float, **options: Any) -> Build:
    """Class probabilities as targets, which sum to ``mass``."""

    def build(rng: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Any]]:
        x, _, drawn = normal(n, k, **options)(rng)
        return x, torch.softmax(torch.randn(n, k, generator=rng, dtype=torch.float64), -1) * mass, drawn

    return build


def only_one_finite(at: Callable[[int], int], aim: Callable[[int], int]) -> Callable[[Tensor, Tensor], None]:
    def change(x: Tensor, y: Tensor) -> None:
        x.masked_fill_(torch.arange(x.shape[1]) != at(x.shape[1]), -torch.inf)
        y.fill_(aim(x.shape[1]))

    return change


def mask_classes(x: Tensor, y: Tensor) -> None:
    """Every third class at -inf, the target's not."""
    kept = x.gather(1, y.clamp_min(0)[:, None])
    x[:, ::3] = -torch.inf
    x.scatter_(1, y.clamp_min(0)[:, None], kept)


def spoil_rows(x: Tensor, _: Tensor) -> None:
    x[1, 5], x[3, 2] = torch.nan, torch.inf
    x[5] = -torch.inf


def hide_nan(x: Tensor, _: Tensor) -> None:
    x[0, 4096:8192], x[0, 5000] = -torch.inf, torch.nan


def tie(x: Tensor, _: Tensor) -> None:
    x[:, [5, 300, 777, 1500]] = 50.0


def spoil_ignored(x: Tensor, _: Tensor) -> None:
    x[0], x[3, ::2], x[6] = torch.nan, torch.inf, -torch.inf


def positive(k: int) -> Callable[[torch.Generator], Tensor]:
    return lambda rng: torch.rand(k, generator=rng) * 0.75 + 0.25


def prior(k: int, zeros: int = 0) -> Callable[[torch.Generator], Tensor]:
    mask = torch.arange(k) >= zeros
    return lambda rng: F.normalize(torch.rand(k, generator=rng).double() * mask, p=1, dim=0)


SURE = [(p, 0.0) for p in (0.9, 0.99, 0.999)]
AS_SURE = [(1 - eps + step, eps) for eps in (0.05, 0.1, 0.2) for step in (-1e-3, -1e-4, 1e-4, 1e-3)]
FIRST, MIDDLE, LAST = (lambda k: 0), (lambda k: k // 2), (lambda k: k - 1)
ALONE = {"first": FIRST, "middle": MIDDLE, "last": LAST}
REAL = (torch.bfloat16, *SINGLE)
NOT_FP16 = (torch.bfloat16, *SINGLE, torch.float64)

EPS: dict[str, Any] = {"label_smoothing": 0.1}
BOTH: dict[str, Any] = {"smooth_over": "finite", **EPS}
EVERYTHING: dict[str, Any] = {
    "smoothing": "others", "z_loss": 0.01, "confidence_penalty": 0.2, "softcap": 8.0, "logit_scale": 1.5, **EPS
}  # fmt: skip

CASES = (
    Case("one class", "R31", normal(3, 1, **EPS)),
    Case("two classes", "R31", normal(4, 2, **EPS)),
    Case("three classes", "R31", normal(4, 3, smoothing="others", **EPS)),
    Case("smaller than a tile", "R31", normal(4, 17, shift=-100.0, **EPS)),
    Case("one above a tile", "R31", normal(3, 1025, shift=-30.0, **EPS)),
    Case("odd width", "R31", normal(2, 2003, **EPS)),
    Case("equal maxima far apart", "", edit(normal(2, 2003, **EPS), tie)),
    Case("a NaN among -inf", "R17", edit(normal(2, 9001, **EPS), hide_nan), large=True),
    Case("no smoothing", "R29", normal(4, 300)),
    Case("uniform", "R29", normal(4, 300, **EPS)),
    Case("others", "", normal(4, 300, smoothing="others", **EPS)),
    Case("only smoothing", "R40", normal(3, 130, label_smoothing=1.0)),
    Case("sharpening", "", normal(3, 130, label_smoothing=-0.3)),
    Case("one epsilon on the device", "", normal(3, 130, label_smoothing=lambda rng: torch.tensor(0.2))),
    Case("epsilon per row", "", normal(4, 130, smoothing="others", label_smoothing=positive(4))),
    Case("half the rows ignored", "R3 R20 R21", normal(6, 200, ignored=2, label_smoothing=0.2)),
    Case("everything ignored", "R19", normal(3, 50, ignored=1, **EPS)),
    Case("ignored rows of NaN and infinities", "R18", edit(normal(9, 60, ignored=3, **EPS), spoil_ignored)),
    Case("an ignored valid class", "R22", normal(9, 5, ignored=3, ignore_index=2, **EPS)),
    Case("sure of the target", "R1", sure(1000, SURE)),
    Case("as sure as smoothing asks", "R2", sure(1000, AS_SURE[::2])),
    *(Case(f"one finite class, {n}", "R15", edit(normal(1, 3001), only_one_finite(at, at))) for n, at in ALONE.items()),
    Case("one finite class, not the target", "R15", edit(normal(1, 3001), only_one_finite(MIDDLE, LAST))),
    Case("masked classes", "R16", edit(normal(4, 200), mask_classes)),
    Case("masked classes, smoothed", "R16", edit(normal(4, 200, **EPS), mask_classes)),
    Case("NaN and infinite logits", "R17", edit(normal(7, 40, **EPS), spoil_rows)),
    Case("shift 1e3", "R27", normal(2, 1000, shift=1e3, **EPS)),
    Case("shift 1e4", "R27", normal(2, 1000, shift=1e4, **EPS)),
    Case("shift 1e5", "R27", normal(2, 1000, shift=1e5, **EPS), NOT_FP16),
    Case("shift -1e4", "R27", normal(2, 500, shift=-1e4, **EPS)),
    Case("spread 200", "R34", normal(3, 300, spread=60.0, **EPS)),
    Case("equal logits", "", normal(2, 70, spread=0.0, shift=2.0, **EPS)),
    Case("class weights", "R22 R23", normal(8, 40, ignored=4, weight=positive(40), **EPS)),
    Case("class weights, a valid class ignored", "R22 R23",
         normal(8, 6, ignored=4, ignore_index=5, weight=positive(6), **EPS)),
    Case("class weights, everything ignored", "R19 R23",
         normal(4, 6, ignored=1, ignore_index=-1, weight=positive(6), **EPS)),
    Case("prior", "", normal(5, 40, smoothing=prior(40), **EPS)),
    Case("prior on masked classes", "R16", edit(normal(5, 41, smoothing=prior(41), **EPS), mask_classes)),
    Case("finite classes", "R16", edit(normal(5, 40, **BOTH), mask_classes)),
    Case("other finite classes", "R16", edit(normal(5, 40, smoothing="others", **BOTH), mask_classes)),
    Case("prior over finite classes", "R16", edit(normal(5, 40, smoothing=prior(40, 3), **BOTH), mask_classes)),
    Case("z-loss", "R28", normal(5, 60, z_loss=0.01, ignored=3, **EPS)),
    Case("confidence penalty", "", normal(5, 60, confidence_penalty=0.3, ignored=3, **EPS)),
    Case("entropy minimisation", "", normal(4, 60, confidence_penalty=-1.0, weight=positive(60))),
    Case("entropy alone", "", soft(4, 60, 0.0, confidence_penalty=-1.0)),
    Case("masked classes, confidence penalty", "R16", edit(normal(4, 2003, confidence_penalty=0.3), mask_classes)),
    Case("softcap 1", "R32", normal(4, 60, shift=-100.0, softcap=1.0, **EPS)),
    Case("softcap 5 and scale", "R32", normal(4, 60, softcap=5.0, logit_scale=0.5, **EPS)),
    Case("softcap 2, saturated", "R32", normal(4, 60, spread=8.0, softcap=2.0, **EPS), SINGLE),
    Case("masked classes, softcap", "R16 R32", edit(normal(4, 60, softcap=30.0), mask_classes)),
    Case("everything at once", "", normal(8, 40, ignored=4, weight=positive(40), **EVERYTHING)),
    Case("probabilities", "R38", soft(5, 30, 1.0, **EPS)),
    Case("probabilities that do not sum to 1", "R38", soft(5, 30, 1.7, weight=positive(30), label_smoothing=0.2)),
    *(Case(f"K {k:,}", "R31", normal(2, k, **EPS), REAL, True) for k in (32_003, 50_257, 51_865, 129_920)),
    *(Case(f"fp16, K {k:,}", "R25", normal(2, k, **EPS), HALF[:1], True) for k in (5000, 8000, 32_000, 128_256)),
    Case("sure of the target, K 32,000", "R1", sure(32_000, SURE), (*HALF, *SINGLE), True),
    Case("as sure as smoothing asks, K 32,000", "R2", sure(32_000, AS_SURE[::3]), (*HALF, *SINGLE), True),
    *(Case(f"one finite class of 100,000, {n}", "R15", edit(normal(1, 100_000), only_one_finite(at, at)), REAL, True)
      for n, at in ALONE.items()),
    *(Case(f"softcap {c}, K {k:,}", "R32", normal(2, k, 2.0, -100.0, softcap=c, **EPS), SINGLE, True)
      for c in (1.0, 5.0, 30.0) for k in (32_000, 65_537)),
)  # fmt: skip


def draw(place: Place, n: int = 6, k: int = 37, dtype: torch.dtype = torch.float32, ignored: int = 3) -> list[Tensor]:
    """Logits (N, K) and targets, every ``ignored``-th one ignored, for the tests beside the table."""
    x, y, _ = normal(n, k, ignored=ignored)(torch.Generator().manual_seed(n * k))
    return [x.to(place[1], dtype), y.to(place[1])]


def loss_and_grad(
    place: Place, x: Tensor, y: Tensor, upstream: Tensor | float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss under the backend of ``place`` and the gradient of Σ upstream·loss, on the caller's own memory."""
    leaf = x.detach().requires_grad_()
    loss = lsk.cross_entropy(leaf, y, backend=place[0], **options)
    upstream = upstream if isinstance(upstream, Tensor) else torch.full_like(loss, upstream)
    (grad,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), grad


def guarded(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy of ``tensor`` (N, K) inside a larger buffer of NaN, its rows apart and misaligned, and a check that every
    other bit of the buffer is what it was. NaN: a read outside shows in the result, a write outside in the check."""
    n, k = tensor.shape
    buffer = torch.full((n + 2, k + 7), torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:-1, 3 : 3 + k]
    outside = torch.ones_like(buffer, dtype=torch.bool)
    outside[1:-1, 3 : 3 + k] = False
    view.copy_(tensor)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    before = buffer.view(bits)[outside].clone()

    def check() -> None:
        assert torch.equal(buffer.view(bits)[outside], before), "memory outside the tensor was written"

    return view, check


def upstream_for(n: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random, non-uniform upstream of both signs, the same for every backend."""
    rng = torch.Generator().manual_seed(n)
    sign = torch.randint(0, 2, (n,), generator=rng) * 2 - 1
    return ((torch.rand(n, generator=rng) + 0.25) * sign).to(device, dtype)


def denominator_of(problem: Problem, row_weight: Tensor) -> float:
    """The mean's denominator by its definition: Σ over valid rows of row weight × class weight of the target."""
    counted, weight = row_weight.double() * problem.keep, problem.options.get("weight")
    if weight is not None and not problem.target.is_floating_point():
        counted = counted * weight[torch.where(problem.keep, problem.target, 0)]
    return float(counted.sum())


def truncates(backend: str, logits: Tensor) -> bool:
    """Whether Triton's interpreter stores this gradient (``test_interpreter_truncates`` watches that it still does)."""
    return backend == "triton" and logits.device.type == "cpu" and logits.dtype == torch.bfloat16


DIRECTIONS = ("forward", "rows", "mean", "inplace", "inplace rows")


def run_forward(problem: Problem, backend: str) -> None:
    """No gradient: losses and statistics; and the loss alone, which must be the same numbers."""
    call = {"reduction": "none", "backend": backend, **problem.options}
    loss, stats = lsk.cross_entropy(problem.logits, problem.target, return_stats="all", **call)
    assert loss.dtype == acc_dtype(problem.logits.dtype)
    want = expect(problem, torch.ones(len(loss), dtype=torch.float64, device=loss.device))
    judge_loss(want, loss)
    judge_stats(problem, stats)
    loss, stats = lsk.cross_entropy(problem.logits, problem.target, return_stats=True, **call)
    judge_stats(problem, stats)
    alone = lsk.cross_entropy(problem.logits, problem.target, **call)
    assert_close("loss without statistics", alone, loss, torch.zeros_like(loss))


def run_case(problem: Problem, backend: str, direction: str) -> None:
    """Loss and gradient, judged; nothing of the caller's is written but, with ``inplace``, the logits themselves."""
    if direction == "forward":
        run_forward(problem, backend)
        return
    inplace = direction.startswith("inplace")
    source = problem.logits.clone()
    logits, check_guard = guarded(source)
    given = [v for v in (problem.target, *problem.options.values()) if isinstance(v, Tensor)]
    copies = [v.clone() for v in given]
    x = logits.detach().requires_grad_()
    upstream = upstream_for(len(x), x.device, acc_dtype(x.dtype))
    call = {"backend": backend, "inplace": inplace, **problem.options}
    if direction.endswith("rows"):
        loss = lsk.cross_entropy(x, problem.target, reduction="none", **call)
        (grad,) = torch.autograd.grad(loss, x, upstream)
        want = expect(problem, upstream.double())
        judge_loss(want, loss.detach())
        roundings = 1
    else:
        row_weight, scalar = upstream.abs() + 0.5, 0.37
        denominator = denominator_of(problem, row_weight)
        loss = lsk.cross_entropy(x, problem.target, row_weight=row_weight, **call)
        (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, scalar))
        want = expect(problem, row_weight.double() * (scalar / denominator if denominator else 0.0))
        if denominator:
            judge_loss(want, loss.detach(), row_weight.double(), denominator)
        else:
            assert loss.isnan(), "a mean over nothing is NaN"
        roundings = (
            1 if scalar == 1 or x.dtype == torch.float16 else 2
        )  # fp16 recomputes: its upstream multiplies before rounding
    judge_grad(problem, want, grad, roundings, truncates(backend, x))
    check_guard()
    assert inplace or torch.equal(logits.nan_to_num(7), source.nan_to_num(7)), "the logits were written"
    assert all(torch.equal(a, b) for a, b in zip(given, copies, strict=True)), "an argument was written"
