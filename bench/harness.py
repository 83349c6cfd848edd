"""One case, many providers: interleaved timing behind a correctness gate.

Bytes model: one unit is one read or one write of the N×K logits. The floor is 2 units for loss and gradient (read the
logits, write the gradient) and 1 for the loss alone; the GB/s of a row are those bytes over its time, whatever the
provider really moves. The ceiling is a copy (2 units) measured in the same rounds.

What is not timed: refilling logits that a provider overwrites, and freeing its results.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EPS = 0.1
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """Logits (n, k), ε = 0.1; ``backward`` False is the loss alone, under no_grad."""

    n: int
    k: int
    dtype: torch.dtype
    device: str = "cpu"
    backward: bool = True

    @property
    def units(self) -> int:
        return 2 if self.backward else 1

    @property
    def unit_bytes(self) -> int:
        return self.n * self.k * self.dtype.itemsize

    @property
    def name(self) -> str:
        what = "forward+backward" if self.backward else "loss only"
        return f"{self.n}×{self.k} {str(self.dtype).removeprefix('torch.')} {what}"


@dataclass
class Inputs:
    logits: Tensor  # a leaf that requires grad
    original: Tensor  # the same values, never handed to a provider
    target: Tensor


def make_inputs(case: Case) -> Inputs:
    generator = torch.Generator(case.device).manual_seed(0)
    values = torch.randn(case.n, case.k, generator=generator, device=case.device).mul_(2).to(case.dtype)
    target = torch.randint(case.k, (case.n,), generator=generator, device=case.device)
    return Inputs(values.clone().requires_grad_(case.backward), values, target)


Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[Inputs], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Provider:
    """One way to do the step of a case; a copy is a provider without a gate.

    ``exact``: arithmetic in float32 is promised, so in half precision the gate is one rounding of the gradient.
    """

    name: str
    step: Step
    overwrites: bool = False
    exact: bool = False
    is_copy: bool = False


def loss_step(loss: Loss, backward: bool) -> Step:
    def step(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        with torch.set_grad_enabled(backward):
            value = loss(inputs.logits, inputs.target)
        return value.detach(), torch.autograd.grad(value, inputs.logits)[0] if backward else None

    return step


@dataclass
class Errors:
    """Largest deviations from float64: of the loss, relative; of the gradient's entries p - q, relative to p + q."""

    loss: float
    target: float = 0.0
    rest: float = 0.0  # of the other classes; where p is small, a smoothing that was lost shows here as 1


@dataclass
class Row:
    provider: str
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    host_ms: float | None = None  # until the call returns; on a GPU the device may still be at work
    gb_per_s: float | None = None
    percent_of_copy: float | None = None
    extra_bytes: int | None = None  # peak beyond the inputs, results included
    errors: Errors | None = None
    repeats: int = 0
    refused: str | None = None
    samples_ms: list[float] = field(default_factory=list)


# Limits of (loss, target, rest). A provider that works in half precision rounds log-probabilities of -8 to -24 to 8
# bits, and so p by some per cent; one that works in float32 rounds the gradient once.
_LIMITS = {torch.float32: (1e-5, 1e-5, 1e-4), torch.bfloat16: (2**-7, 2**-6, 2**-3)}
_EXACT_LIMITS = {torch.float32: (2e-6, 2e-6, 1e-5), torch.bfloat16: (2e-6, 1.01 * 2**-8, 1.01 * 2**-8)}


def oracle_errors(inputs: Inputs, loss: Tensor, grad: Tensor | None) -> Errors:
    """Against the closed form in float64, in chunks of rows: its memory stays small beside the case's."""
    n, k = inputs.original.shape
    chunk = max(1, 2**24 // k)
    total, targets, rest = 0.0, [], []
    for begin in range(0, n, chunk):
        z = inputs.original[begin : begin + chunk].double()
        y = inputs.target[begin : begin + chunk, None]
        lse = z.logsumexp(-1, keepdim=True)
        total += (lse - (1 - EPS) * z.gather(-1, y) - EPS * z.mean(-1, keepdim=True)).sum().item()
        if grad is None:
            continue
        p = z.sub_(lse).exp_()
        q = torch.full_like(p, EPS / k).scatter_add_(-1, y, torch.full_like(y, 1 - EPS, dtype=p.dtype))
        off = (grad[begin : begin + chunk].double().mul_(n) - (p - q)).abs_().div_(p.add_(q))
        targets.append(off.gather(-1, y).max())
        rest.append(off.scatter_(-1, y, 0).max())
    errors = Errors(abs(loss.double().item() * n / total - 1))
    if grad is not None:
        errors.target, errors.rest = (torch.stack(values).max().item() for values in (targets, rest))
    return errors


def gate(case: Case, provider: Provider, inputs: Inputs) -> tuple[Errors | None, str | None]:
    """Run the provider once: (its errors, why its times are not to be printed)."""
    loss, grad = provider.step(inputs)
    if provider.is_copy:
        return None, None
    if case.backward and grad is None:
        return None, "no gradient"
    if not provider.overwrites and not torch.equal(inputs.logits.detach(), inputs.original):
        return None, "it changed the caller's logits"
    errors = oracle_errors(inputs, loss, grad)
    limits = (_EXACT_LIMITS if provider.exact else _LIMITS)[case.dtype]
    for name, limit in zip(("loss", "target", "rest"), limits, strict=True):
        error = getattr(errors, name)
        if not error <= limit:  # also a NaN
            return errors, f"the {name} is off by {error:.1e}, allowed is {limit:.1e}"
    return errors, None


def refill(inputs: Inputs) -> None:
    with torch.no_grad():
        inputs.logits.copy_(inputs.original)


class Stopwatch:
    """(time, host time) of one call in ms: perf_counter on the CPU; on a GPU events, read by ``finish``."""

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self.pending: list[tuple[list[float], Any, Any]] = []
        if self.is_cuda:
            # Zeroing it evicts the L2 cache and keeps the device busy until the host has queued the call, so that the
            # events enclose the work of the device, not the launching.
            self.scratch = torch.empty(min(2**30, torch.cuda.mem_get_info()[0] // 8) // 4, device=device)

    def run(self, step: Step, inputs: Inputs, times: list[float], host_times: list[float]) -> None:
        if not self.is_cuda:
            begin = time.perf_counter()
            results = step(inputs)  # bound, so that freeing it comes after the clock is read
            times.append((time.perf_counter() - begin) * 1e3)
            host_times.append(times[-1])
            del results
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            self.scratch.zero_()
        start.record()
        begin = time.perf_counter()
        step(inputs)
        host_times.append((time.perf_counter() - begin) * 1e3)
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


def _admit(case: Case, provider: Provider, inputs: Inputs, row: Row) -> bool:
    """Gate, memory and warm-up of one provider; a failure is a reason in its row, not the end of the run."""
    try:
        row.errors, row.refused = gate(case, provider, inputs)
        refill(inputs)
        if row.refused is None:
            row.extra_bytes = peak_bytes(lambda: provider.step(inputs), case.device)
            refill(inputs)
    except Exception as error:  # whatever a foreign provider or a compiler raises
        row.refused = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        refill(inputs)
    return row.refused is None


def measure(case: Case, providers: list[Provider], ceiling: str, budget_s: float, least: int = 9) -> list[Row]:
    """Time the providers of a case for budget_s seconds, at least so many rounds, each in a new order: what one leaves
    behind (warm caches, free memory that the system has to fetch back) must not always meet the same next one."""
    inputs = make_inputs(case)
    rows = {provider.name: Row(provider.name) for provider in providers}
    admitted = [p for p in providers if _admit(case, p, inputs, rows[p.name])]
    host: dict[str, list[float]] = {p.name: [] for p in admitted}
    stopwatch, shuffler = Stopwatch(case.device), random.Random(0)
    warm_up, rounds, begin = 2, 0, 0.0
    while rounds < warm_up + least or (time.perf_counter() - begin < budget_s and rounds < 2000):
        if rounds == warm_up:
            for name, samples in host.items():
                samples.clear()
                rows[name].samples_ms.clear()
            begin = time.perf_counter()
        for provider in shuffler.sample(admitted, len(admitted)):
            stopwatch.run(provider.step, inputs, rows[provider.name].samples_ms, host[provider.name])
            if provider.overwrites:
                refill(inputs)
        stopwatch.finish()
        rounds += 1
    for provider in admitted:
        row = rows[provider.name]
        deciles = statistics.quantiles(row.samples_ms, n=10, method="inclusive")
        row.p20, row.ms, row.p80 = deciles[1], deciles[4], deciles[7]
        row.host_ms, row.repeats = statistics.median(host[row.provider]), len(row.samples_ms)
        row.gb_per_s = (2 if provider.is_copy else case.units) * case.unit_bytes / row.ms / 1e6
    copy_rate = rows[ceiling].gb_per_s
    for row in rows.values():
        if row.gb_per_s and copy_rate:
            row.percent_of_copy = 100 * row.gb_per_s / copy_rate
    return list(rows.values())


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _git(*command: str) -> str | None:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _commit() -> str | None:
    """The commit of the tree that is measured, marked where files differ from it; None outside a git checkout."""
    head = _git("rev-parse", "--short", "HEAD")
    return f"{head}+changes" if head and _git("status", "--porcelain") else head


def provenance(device: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": _cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "load average": round(os.getloadavg()[0], 1),  # before the run: others on the machine spoil a time
    }


def as_json(case: Case, rows: list[Row]) -> dict[str, Any]:
    rows_as_dicts = [asdict(row) for row in rows]
    return {"case": case.name, "device": case.device, "unit_bytes": case.unit_bytes, "rows": rows_as_dicts}


def describe(facts: dict[str, Any]) -> str:
    return " · ".join(f"{name}: {value}" for name, value in facts.items() if value is not None)
