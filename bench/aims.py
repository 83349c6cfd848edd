"""What the project promises of its figures, each beside what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from . import linear, logits
from .peers import AT_LOGITS, FUSED, LIGER
from .results import key
from .training import COMPOSED, TEMPERED

if TYPE_CHECKING:
    from collections.abc import Iterator

Rows = dict[str, dict[str, Any]]  # of one case, by provider


class Aim(NamedTuple):
    case: str
    what: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool:
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def line(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.4g}"
        sign, verdict = "≥" if self.at_least else "≤", "met" if self.met else "**missed**"
        return f"| {self.case} | {self.what} | {value} | {sign} {self.bound:g} | {verdict} |"


def table(aims: list[Aim]) -> str:
    lines = ["| case | figure | measured | aim | |", "|---|---|---:|---:|---|"]
    return "\n".join([*lines, *(aim.line() for aim in aims)])


def times(rows: Rows, above: str, below: str) -> float | None:
    """How many times below's time is above's; from the ratios by round where one of them is the baseline."""
    a, b = (rows.get(name, {}).get("ratio") for name in (above, below))
    return a / b if a and b else None


def figure(rows: Rows, provider: str, name: str) -> float | None:
    return rows.get(provider, {}).get(name)


# Per row of logits: loss, zmax, logsum and what the reduction makes of them; and a constant for scalars.
BYTES_PER_ROW, BYTES_ONCE = 64, 4096
CPU_OPTIONS = {"class weights": 1.10, "prior": 1.10, "z_loss": 1.10, "logit_scale": 1.10, "softcap": 1.60}


def of_cpu(group: str, case: str, sizes: dict[str, Any], rows: Rows) -> Iterator[Aim]:
    single = sizes["dtype"] == "fp32"
    if (
        group == "logits"
        and sizes["backward"]
        and sizes["eps"]
        and sizes["data"] == "randn"
        and sizes["dtype"] != "fp16"
    ):
        yield Aim(
            case, "times as fast as F.cross_entropy", times(rows, logits.EAGER, logits.OURS), 6 if single else 5, True
        )
        if logits.COMPILED in rows:
            yield Aim(case, "times as fast as torch.compile", times(rows, logits.COMPILED, logits.OURS), 2.5, True)
        if single:
            over = times(rows, logits.OURS, logits.FRESH_COPY)
            yield Aim(case, "time over allocate-and-copy's", over, 0.85, False)
            yield Aim(
                case, "in place: times as fast as F.cross_entropy", times(rows, logits.EAGER, logits.INPLACE), 9, True
            )
        for name, result in ((logits.OURS, sizes["gradient_bytes"]), (logits.INPLACE, 0)):
            extra = figure(rows, name, "extra_bytes")
            beyond = None if extra is None else (extra - result) / sizes["n"]
            bound = BYTES_PER_ROW + BYTES_ONCE / sizes["n"]
            yield Aim(case, f"{name}: bytes per row beyond logits and gradient", beyond, bound, False)
    if group == TEMPERED:
        yield Aim(case, "times as fast as PyTorch's functions", times(rows, COMPOSED, logits.OURS), 3, True)
        extra = figure(rows, logits.OURS, "extra_bytes")
        beyond = None if extra is None else (extra - sizes["gradient_bytes"]) / sizes["n"]
        bound = BYTES_PER_ROW + BYTES_ONCE / sizes["n"]
        yield Aim(case, "bytes per row beyond logits and gradient", beyond, bound, False)
    if group == "few classes" and not rows.get(logits.EAGER, {}).get("refused"):  # a wrong loss sets no time to beat
        yield Aim(case, "time over F.cross_entropy's", times(rows, logits.OURS, logits.EAGER), 1.0, False)
    if group == "calls":
        yield Aim(case, "time over F.cross_entropy's", times(rows, logits.OURS, logits.EAGER), 1.5, False)
    if group == "options":
        for name, bound in CPU_OPTIONS.items():
            yield Aim(case, f"{name}: time over the plain loss's", figure(rows, name, "ratio"), bound, False)


def of_head(group: str, case: str, sizes: dict[str, Any], rows: Rows) -> Iterator[Aim]:
    if group == "linear" and sizes["data"] == "randn":
        bound = 1.15 if sizes["dtype"] == "fp32" else 1.30
        yield Aim(case, "time over the head's GEMMs", times(rows, linear.OURS, linear.GEMMS), bound, False)
        yield Aim(case, "times as fast as PyTorch's", times(rows, linear.EAGER, linear.OURS), 1.05, True)
        if linear.CHUNKED in rows:
            yield Aim(case, "times as fast as its chunks", times(rows, linear.CHUNKED, linear.OURS), 3, True)
        if sizes["n"] >= 2048:  # with fewer rows than some chunks what the head's gradient needs is most of the memory
            extra = [figure(rows, name, "extra_bytes") for name in (linear.OURS, linear.EAGER)]
            ours, theirs = (None if e is None else e - sizes["gradient_bytes"] for e in extra)
            over = ours / theirs if ours is not None and theirs else None
            yield Aim(case, "memory beyond the gradients over PyTorch's", over, 1 / 8, False)
    if group == "cost of smoothing":
        yield Aim(case, "ε = 0.1 over ε = 0", times(rows, linear.OURS, linear.NO_SMOOTHING), 1.01, False)
        yield Aim(case, "a prior over uniform", times(rows, linear.PRIOR, linear.OURS), 1.02, False)


ON_H200 = "on an H200"  # the card of an aim in ms: another card's times say nothing of it
# On an H200, forward and backward, bf16: ms of the best published losses without smoothing, which ours is to match.
LINEAR_MS = {(1024, 128256): 4.11, (4096, 128256): 16.71, (8192, 128256): 34.35, (16384, 128256): 73.7}


def of_cuda(group: str, case: str, sizes: dict[str, Any], rows: Rows) -> Iterator[Aim]:
    ours = min(
        (n for n in (logits.OURS, logits.CUDA) if figure(rows, n, "ms")), key=lambda n: rows[n]["ms"], default="ours"
    )
    plain = sizes.get("backward") and sizes.get("data") == "randn"
    if group == "logits" and plain and sizes["dtype"] == "bf16":
        if (sizes["n"], sizes["k"]) == (8192, 128256) and sizes["eps"]:
            yield Aim(case, f"ms, {ON_H200}", figure(rows, ours, "ms"), 1.10, False)
        if sizes["k"] >= 32000:
            yield Aim(case, "percent of a copy's bandwidth", figure(rows, ours, "percent_of_ceiling"), 88, True)
        if sizes["eps"]:
            yield Aim(case, "time over that of ε = 0", times(rows, logits.OURS, logits.NO_SMOOTHING), 1.01, False)
    if group in ("logits", "growth in K") and plain:
        yield Aim(case, "times as fast as Liger", times(rows, LIGER, ours), 1.4, True)
    others = [peer.name for peer in (*AT_LOGITS, *FUSED)] + [logits.EAGER, logits.COMPILED]
    if group == "few rows":
        best = min((r for n in others if (r := times(rows, n, ours))), default=None)
        yield Aim(case, "times as fast as the fastest other", best, 1.0, True)
    if group == "linear" and plain and (sizes["n"], sizes["k"]) in LINEAR_MS and sizes["d"] == 4096:
        bound = LINEAR_MS[sizes["n"], sizes["k"]]
        yield Aim(case, f"ms, {ON_H200}", figure(rows, linear.OURS, "ms"), bound, False)


def of(records: list[dict[str, Any]]) -> list[Aim]:
    """Every aim that speaks of a measured case; a provider without a time leaves its aim unmet."""
    cases: dict[tuple[str, str], Rows] = {}
    for record in records:
        cases.setdefault(key(record), {})[record["provider"]] = record
    found: list[Aim] = []
    for (group, case), rows in cases.items():
        first = next(iter(rows.values()))
        if not first["sizes"]:  # counted, not timed
            continue
        rules = (of_cpu if first["device"] == "cpu" else of_cuda), of_head
        aims = [aim for rule in rules for aim in rule(group, case, first["sizes"], rows)]
        found += [aim for aim in aims if not aim.what.endswith(ON_H200) or "H200" in first["device"]]
    return found
