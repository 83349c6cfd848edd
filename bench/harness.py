"""The providers of one case, each behind a correctness gate, timed in interleaved rounds.

A **task** (``logits``, ``linear``, ``options``, …) makes the inputs of a case, names the providers and measures their
errors against float64; this file times whatever passes. Work model: ``Case.floor_bytes`` and ``Case.flops`` are the
least that a case asks for, whatever a provider really moves; the ceiling of a case is a provider too (a copy, three
GEMMs), timed in the same rounds.

What is not timed: refilling logits that a provider overwrites, freeing its results, and evicting caches.
"""

from __future__ import annotations

import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

EPS = 0.1
IGNORED = -100
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


@dataclass(frozen=True)
class Case:
    """(n, k) logits, of d features where a linear head makes them (d = 0: they are given); ε; what is computed."""

    group: str
    n: int
    k: int
    d: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    eps: float = EPS
    backward: bool = True
    data: str = "randn"  # "zipf": see inputs.py
    inner: int = 0  # rows side by side, as an image's pixels lie: logits (n / inner, k, inner)
    threads: int = 0  # 0: as many as PyTorch takes

    @property
    def name(self) -> str:
        shape = f"{self.n} × {self.k:,}" + (f", D {self.d:,}" if self.d else "")
        words = [shape, SHORT[self.dtype]]
        words += [f"ε = {self.eps:g}"] * (self.eps != EPS) + ["loss only"] * (not self.backward)
        words += ["Zipf, ignored rows"] * (self.data == "zipf")
        words += [f"images of {self.inner:,}"] * (self.inner > 0)
        words += [f"{self.threads} thread" + "s" * (self.threads > 1)] * (self.threads > 0)
        return ", ".join(words)

    @property
    def logits_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize

    @property
    def floor_bytes(self) -> int:
        """Each operand read once, and its gradient, where there is one, written once."""
        operands = (self.n + self.k) * self.d * self.dtype.itemsize if self.d else self.logits_bytes
        return operands * (2 if self.backward else 1)

    @property
    def flops(self) -> int:
        """Of the head's products: one for the logits, two for the gradients."""
        return 2 * self.n * self.k * self.d * (3 if self.backward else 1)

    @property
    def work(self) -> int:
        """What bounds the case: products where there are any, else bytes."""
        return self.flops or self.floor_bytes


@dataclass
class Inputs:
    leaves: tuple[Tensor, ...]  # what gradients are asked of
    originals: tuple[Tensor, ...]  # the same values, never handed to a provider
    target: Any
    expected: dict[float, Any] = field(default_factory=dict)  # a task's oracle, by ε

    def refill(self) -> None:
        with torch.no_grad():
            for leaf, original in zip(self.leaves, self.originals, strict=True):
                leaf.copy_(original)

    def unchanged(self) -> bool:
        return all(torch.equal(a.detach(), b) for a, b in zip(self.leaves, self.originals, strict=True))


@contextlib.contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """Compute on the threads of a case."""
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Results = tuple[Tensor, ...]  # the loss, then the gradients of the leaves
Loss = Callable[..., Tensor]  # of (*leaves, target, ε)


@dataclass(frozen=True)
class Provider:
    """One way to do the step of a case. A ceiling has no errors; its ``work`` is what it does in the case's unit."""

    name: str
    step: Callable[[Inputs], Results] | None
    eps: float | None = None  # None: the case's; a provider that cannot smooth says 0, and so in its note
    note: str | None = None
    overwrites: bool = False
    exact: bool = False  # arithmetic in float32 is promised, so in half precision a gradient is rounded once
    work: int | None = None
    refused: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # what a task's oracle must know of it


def losing(name: str, loss: Loss, case: Case, *, eps: float | None = None, **traits: Any) -> Provider:
    """The provider of a loss and, where the case wants them, the gradients of its leaves."""
    smoothing = case.eps if eps is None else eps

    def step(inputs: Inputs) -> Results:
        with torch.set_grad_enabled(case.backward):
            value = loss(*inputs.leaves, inputs.target, smoothing)
        return value.detach(), *(torch.autograd.grad(value, inputs.leaves) if case.backward else ())

    return Provider(name, step, eps=eps, **traits)


class Task(Protocol):
    baseline: str  # the provider that ratios are over

    def inputs(self, case: Case, seed: int) -> Inputs: ...
    def providers(self, case: Case) -> list[Provider]: ...
    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]: ...
    def limits(self, case: Case, provider: Provider) -> dict[str, float]: ...


@dataclass(frozen=True)
class Entry:
    """A case, the task that it is given to, and its share of a run's time beside the others'."""

    task: Task
    case: Case
    share: float = 1.0


@dataclass
class Row:
    """One provider of one case; times in ms. What was not measured is None."""

    group: str
    case: str
    provider: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    host_ms: float | None = None  # until the call returns; on a GPU the device may still be at work
    ratio: float | None = None  # its time over the baseline's: the median over the rounds
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    percent_of_ceiling: float | None = None
    extra_bytes: int | None = None  # peak beyond the inputs, results included
    count: int | None = None  # of what is counted, not timed
    errors: dict[str, float] | None = None
    repeats: int = 0
    note: str | None = None
    refused: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)  # n, k, d, dtype, ... for plots


def gate(task: Task, case: Case, provider: Provider, inputs: Inputs) -> tuple[dict[str, float] | None, str | None]:
    """Run the provider once: (its errors, why its times are not to be printed)."""
    assert provider.step is not None
    results = provider.step(inputs)
    if provider.work is not None:
        return None, None
    if case.backward and len(results) != 1 + len(inputs.leaves):
        return None, "no gradient"
    if not provider.overwrites and not inputs.unchanged():
        return None, "it changed the caller's tensors"
    errors = task.errors(case, provider, inputs, results)
    limits = task.limits(case, provider)
    for name, error in errors.items():
        if not error <= limits[name]:  # also a NaN
            return errors, f"the {name} is off by {error:.1e}, allowed is {limits[name]:.1e}"
    return errors, None


class Stopwatch:
    """(time, host time) of one call in ms: perf_counter on the CPU; on a GPU events, read by ``finish``.

    ``cold`` writes memory beyond every cache before each call. On a GPU something must keep the device busy until the
    host has queued the call, so that the events enclose the work of the device, not the launching: that writing, or
    else a kernel that spins.
    """

    def __init__(self, device: str, cold: bool) -> None:
        self.is_cuda, self.cold = device == "cuda", cold
        self.pending: list[tuple[list[float], Any, Any]] = []
        self.scratch = torch.empty(0)
        if cold:
            size = min(2**30, torch.cuda.mem_get_info()[0] // 8) if self.is_cuda else 2**28
            self.scratch = torch.empty(size // 4, device=device)

    def run(self, step: Callable[[Inputs], Results], inputs: Inputs, times: list[float], host: list[float]) -> None:
        if self.cold:
            for _ in range(3 if self.is_cuda else 1):
                self.scratch.zero_()
        if not self.is_cuda:
            begin = time.perf_counter()
            results = step(inputs)  # bound, so that freeing it comes after the clock is read
            times.append((time.perf_counter() - begin) * 1e3)
            host.append(times[-1])
            del results
            return
        if not self.cold:
            torch.cuda._sleep(1_000_000)  # cycles: half a millisecond
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        begin = time.perf_counter()
        step(inputs)
        host.append((time.perf_counter() - begin) * 1e3)
        end.record()
        self.pending.append((times, start, end))

    def finish(self) -> None:
        if self.pending:
            torch.cuda.synchronize()
        for times, start, end in self.pending:
            times.append(start.elapsed_time(end))
        self.pending.clear()


def peak_bytes(step: Callable[[], Any], device: str) -> int:
    """Peak of the bytes live beyond those live before, as the CUDA allocator or the profiler records it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = step()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        results = step()
    del results
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(accumulate((change["args"]["Bytes"] for change in changes), initial=0))


def reason(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"


def admit(task: Task, case: Case, provider: Provider, inputs: Inputs, row: Row) -> bool:
    """Gate and memory of one provider; a failure is a reason in its row, not the end of the run."""
    row.refused = provider.refused
    row.note = provider.note if case.eps else None
    if provider.step is None:
        return False
    try:
        row.errors, row.refused = gate(task, case, provider, inputs)
        inputs.refill()
        if row.refused is None:
            step = provider.step
            row.extra_bytes = peak_bytes(lambda: step(inputs), case.device)
    except Exception as error:  # whatever a foreign provider or a compiler raises
        row.refused = reason(error)
    inputs.refill()
    return row.refused is None


def input_sets(task: Task, case: Case) -> list[Inputs]:
    """One set where its bytes exceed the caches several times, else as many as do: no call meets its own data."""
    size = max(1, case.floor_bytes)
    caches = 2**28 if case.device == "cuda" else 2**26
    return [task.inputs(case, seed) for seed in range(min(8, -(-caches // size)))]


LEAST, MOST = 3, 2000


def measure(case: Case, task: Task, budget_s: float, *, cold: bool | None = None, rotate: bool = True) -> list[Row]:
    """Every provider of a case, gated and then timed: about budget_s seconds in all, but at least LEAST rounds.

    ``cold`` None: on a GPU.
    """
    deadline = time.perf_counter() + budget_s
    sets = input_sets(task, case) if rotate else [task.inputs(case, 0)]
    providers = task.providers(case)
    sizes = {name: getattr(case, name) for name in ("n", "k", "d", "eps", "backward", "data")}
    sizes |= {"dtype": SHORT[case.dtype], "gradient_bytes": case.floor_bytes // 2 if case.backward else 0}
    rows = {p.name: Row(case.group, case.name, p.name, sizes=sizes) for p in providers}
    admitted = [p for p in providers if admit(task, case, p, sets[0], rows[p.name])]
    for inputs in sets:
        inputs.expected.clear()
    watch = Stopwatch(case.device, case.device == "cuda" if cold is None else cold)
    times, host, failed = time_rounds(admitted, sets, watch, deadline)
    for name, why in failed.items():
        rows[name].refused = why
    admitted = [p for p in admitted if p.name not in failed]
    for provider in admitted:
        row, samples = rows[provider.name], times[provider.name]
        deciles = statistics.quantiles(samples, n=10, method="inclusive")
        row.p20, row.ms, row.p80 = deciles[1], deciles[4], deciles[7]
        row.host_ms, row.repeats = statistics.median(host[provider.name]), len(samples)
        if base := times.get(task.baseline):
            row.ratio = statistics.median(a / b for a, b in zip(samples, base, strict=False))
        work = provider.work or case.work
        row.gb_per_s = (case.floor_bytes if case.flops else work) / row.ms / 1e6
        row.tflop_per_s = work / row.ms / 1e9 if case.flops else None
    rates = {p.name: (p.work or case.work) / (rows[p.name].ms or 1) for p in admitted}
    if best := max((rates[p.name] for p in admitted if p.work is not None), default=None):
        for name, rate in rates.items():
            rows[name].percent_of_ceiling = 100 * rate / best
    return list(rows.values())


Samples = dict[str, list[float]]


def time_rounds(
    providers: list[Provider], sets: list[Inputs], watch: Stopwatch, deadline: float
) -> tuple[Samples, Samples, dict[str, str]]:
    """(times, host times) of every provider by round, and what made some fail; the gate and the look at their memory
    have warmed them up.

    Each round has a new order, since what one leaves behind (caches, free memory that the system has to fetch back)
    must not always meet the same next one. Where time is too short for ten rounds, a provider that takes over half of
    a round sits out after LEAST of them.
    """
    times: Samples = {p.name: [] for p in providers}
    host: Samples = {p.name: [] for p in providers}
    failed: dict[str, str] = {}
    shuffler, playing, rounds = random.Random(0), providers, 0
    while rounds < LEAST or (time.perf_counter() < deadline and rounds < MOST):
        inputs = sets[rounds % len(sets)]
        for provider in shuffler.sample(playing, len(playing)):
            assert provider.step is not None
            try:
                watch.run(provider.step, inputs, times[provider.name], host[provider.name])
            except Exception as error:  # such as memory that many sets of inputs leave no room for
                failed[provider.name] = reason(error)
                playing = [p for p in playing if p is not provider]
            if provider.overwrites:
                inputs.refill()
        watch.finish()
        rounds += 1
        if rounds == LEAST:
            took = {p.name: times[p.name][-1] for p in playing}
            if deadline - time.perf_counter() < (10 - LEAST) * sum(took.values()) / 1e3:
                playing = [p for p in playing if took[p.name] < 0.5 * sum(took.values())]
    return times, host, failed
