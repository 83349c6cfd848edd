"""The pictures: speed and memory against K, time against N and D, error against time. Rows in, figures out."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from . import linear, logits, peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

Record = dict[str, Any]
# Okabe and Ito's colours, which most colour-blind readers tell apart; ours are blue.
COLOURS = {
    logits.OURS: "#0072b2",
    logits.INPLACE: "#56b4e9",
    logits.NO_SMOOTHING: "#7b6cc4",
    logits.CUDA: "#003f6b",
    linear.UNFUSED: "#56b4e9",
    linear.TILED: "#7b6cc4",
    logits.EAGER: "#d55e00",
    linear.EAGER: "#d55e00",
    logits.COMPILED: "#e69f00",
    linear.CHUNKED: "#b8860b",
    peers.LIGER: "#009e73",
    peers.LIGER_LINEAR: "#009e73",
    "quack": "#cc79a7",
    "quack, fused linear": "#cc79a7",
    "CCE": "#7a5230",
}
CEILINGS = {logits.COPY: "--", logits.FRESH_COPY: ":", linear.GEMMS: "--"}
BESIDE = (*CEILINGS, logits.NO_SMOOTHING)  # of what they bound or equal
plt.rcParams.update({"svg.hashsalt": "labelsmooth", "font.size": 10, "axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})


def curves(
    records: list[Record],
    group: str,
    against: str,
    value: Callable[[Record], float | None],
    labels: tuple[str, str, str],
    scale: str = "log",
) -> Figure | None:
    """A line for each provider over one size, that on a logarithmic axis; ceilings are grey."""
    chosen = [r for r in records if r["group"] == group and "ms" in r]
    if not chosen:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(r["provider"] for r in chosen):
        points = sorted((r["sizes"][against], value(r)) for r in chosen if r["provider"] == name if value(r))
        if len(points) < 2:
            continue
        axes.plot(*zip(*points, strict=True), label=name, ms=4, **style(name))
    title, x, y = labels
    axes.set(title=title, xlabel=x, ylabel=y, xscale="log", yscale=scale)
    if scale == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({r["sizes"][against] for r in chosen})
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=30, ha="right")
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(plain)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def style(name: str) -> dict[str, Any]:
    if name in CEILINGS:
        return {"color": "#444", "ls": CEILINGS[name], "lw": 1.2}
    if name == logits.NO_SMOOTHING:  # lies on ours where smoothing costs nothing
        return {"color": COLOURS[name], "ls": (0, (1.5, 3)), "lw": 2.5, "zorder": 3}
    return {"color": COLOURS.get(name), "marker": "o"}


def plain(value: float, _: int | None) -> str:
    """A tick without an exponent."""
    return f"{value:,.4g}"


def errors(records: list[Record]) -> Figure | None:
    """Every provider of the largest case by its time and its worst error, in each dtype."""
    wanted = [r for r in records if r["group"] == "logits" and r["sizes"]["backward"] and r["sizes"]["data"] == "randn"]
    chosen = [r for r in wanted if "ms" in r and "errors" in r and r["sizes"]["eps"]]
    if not chosen:
        return None
    largest = max(r["sizes"]["n"] * r["sizes"]["k"] for r in chosen)
    chosen = [r for r in chosen if r["sizes"]["n"] * r["sizes"]["k"] == largest]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    markers = {"fp32": "o", "bf16": "s", "fp16": "^"}
    for r in chosen:
        worst, dtype = max(r["errors"].values()), r["sizes"]["dtype"]
        colour = COLOURS.get(r["provider"], "#888")
        axes.plot(r["ms"], worst, markers[dtype], color=colour, label=f"{r['provider']}, {dtype}")
    names = ", ".join(dict.fromkeys(f"{r['sizes']['n']} × {r['sizes']['k']:,}" for r in chosen))
    axes.set(title=f"Error against time, {names}", xlabel="ms, loss and gradient", ylabel="largest relative error")
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axes.xaxis.set_minor_formatter(plain)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def megabytes(record: Record) -> float | None:
    return record["extra_bytes"] / 1e6 if record["provider"] not in CEILINGS else None


def shape(records: list[Record], group: str, fixed: str) -> str:
    """What the curves of a group have in common, for their title."""
    found = [r["sizes"] for r in records if r["group"] == group and r["sizes"]]
    return f"{fixed.upper()} = {found[0][fixed]:,}, {found[0]['dtype']}, ε = {found[0]['eps']:g}" if found else ""


def figures(records: list[Record]) -> dict[str, Figure]:
    """What the rows are enough for, by name."""
    k = shape(records, "growth in K", "n")
    n = shape(records, "growth in N", "k")
    d = shape(records, "growth in D", "k")
    timed: Callable[[Record], float | None] = lambda r: r["ms"]  # noqa: E731
    made = {
        "speed-k": curves(
            records, "growth in K", "k", lambda r: r["gb_per_s"],
            (f"Speed against K: {k}", "classes K", "GB/s: one read and one write of the logits"), "linear",
        ),
        "memory-k": curves(
            records, "growth in K", "k", megabytes, (f"Memory beyond the logits: {k}", "classes K", "MB, peak")
        ),
        "time-n": curves(records, "growth in N", "n", timed, (f"Time against N: {n}", "rows N", "ms")),
        "time-d": curves(records, "growth in D", "d", timed, (f"Head and loss against D: {d}", "features D", "ms")),
        "error-time": errors(records),
    }  # fmt: skip
    return {name: figure for name, figure in made.items() if figure is not None}


def svg(figure: Figure) -> str:
    """The figure as an element of an HTML page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def save(records: list[Record], folder: Path, prefix: str) -> list[Path]:
    """PREFIX-NAME.png of every figure; the page of ``report`` holds them as SVG."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures(records).items():
        written.append(folder / f"{prefix}-{name}.png")
        figure.savefig(written[-1], dpi=110)
        plt.close(figure)
    return written
