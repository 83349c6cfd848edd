"""Tables of figures, for the terminal, the README and one HTML page; all from rows, none typed."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import aims, host, linear, logits, plot, results
from .results import ROOT
from .training import RECOMPILATIONS, TEMPERED

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

Record = dict[str, Any]
OTHERS = ("few rows", "few classes", "calls", "layouts", "distillation", TEMPERED, "training step", RECOMPILATIONS)


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    caption: str = ""

    def markdown(self) -> str:
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [f"| {' | '.join(self.header)} |", "|---" + "|---:" * (len(self.header) - 1) + "|"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in self.rows]
        return "\n".join([*lines, *([f"\n{self.caption}"] if self.caption else [])])

    def html(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c).replace('**', '')}</{tag}>" for c in cells) + "</tr>"

        body = "\n".join([line(self.header, "th"), *(line(row, "td") for row in self.rows)])
        caption = f"<p>{html.escape(self.caption)}</p>" if self.caption else ""
        return f"<h3>{html.escape(self.title)}</h3>\n<table>\n{body}\n</table>\n{caption}"


def number(value: float | None, digits: int = 3) -> str:
    """So many significant digits, never in exponents."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def error_cell(record: Record) -> str:
    return " / ".join(f"{error:.0e}" for error in record.get("errors", {}).values())


def of_case(records: list[Record]) -> Table:
    """Everything of one case; a refused provider keeps its row."""
    if records[0]["group"] == "counters":
        rows = [[name, number(value)] for r in records for name, value in r["sizes"].items()]
        return Table(f"counters: {records[0]['case']}", ["", records[0]["provider"]], rows)
    header = ["", "ms", "p20 to p80", "host ms", "GB/s", "TFLOP/s", "% of ceiling", "× baseline", "MB beyond inputs"]
    header += [f"error: {' / '.join(next((r['errors'] for r in records if 'errors' in r), {}))}"]
    if all("count" in r or "refused" in r for r in records):
        rows = [[r["provider"], str(r.get("count", r.get("refused")))] for r in records]
        return Table(f"{records[0]['group']}: {records[0]['case']}", ["", "count"], rows)
    rows = []
    for r in records:
        name = r["provider"] + (f" ({r['note']})" if "note" in r else "")
        if "refused" in r:
            rows.append([name, "—", r["refused"], *[""] * 6, error_cell(r)])
            continue
        if "ms" not in r:  # held against float64, not timed
            rows.append([name, *[""] * 8, error_cell(r)])
            continue
        spread = f"{number(r['p20'])} to {number(r['p80'])}" if "p20" in r else ""
        cells = [name, number(r["ms"]), spread, number(r.get("host_ms"))]
        cells += [number(r.get(k)) for k in ("gb_per_s", "tflop_per_s", "percent_of_ceiling", "ratio")]
        rows.append([*cells, memory_cell(r), error_cell(r)])
    return Table(f"{records[0]['group']}: {records[0]['case']}", header, rows)


def time_cell(record: Record) -> str:
    if "count" in record:
        return str(record["count"])
    if "ms" not in record:
        return "wrong" if "off by" in record["refused"] else "—"
    note = f", {record['note']}" if "note" in record else ""
    ratio = f" ({number(record['ratio'], 2)}×{note})" if record.get("ratio") not in (None, 1.0) else ""
    return number(record["ms"]) + ratio


def memory_cell(record: Record) -> str:
    return number(record["extra_bytes"] / 1e6) if "extra_bytes" in record else "—"


def ratio_cell(record: Record) -> str:
    return number(record.get("ratio"))


def pivot(
    records: Iterable[Record], group: str, cell: Callable[[Record], str], only: tuple[str, ...] = (), title: str = ""
) -> Table:
    """Cases down, providers across; what is nowhere but refused for want of a device has no column."""
    chosen = [r for r in records if r["group"] == group and (not only or r["provider"] in only)]
    seen = dict.fromkeys(r["provider"] for r in chosen if "ms" in r or "errors" in r or "count" in r)
    providers = list(only) or list(seen)
    cases: dict[str, dict[str, Record]] = {}
    for r in chosen:
        cases.setdefault(r["case"], {})[r["provider"]] = r
    lines = [
        [case, *(cell(found[name]) if name in found else "" for name in providers)] for case, found in cases.items()
    ]
    return Table(title, [group, *providers], lines, stamp(chosen))


def stamp(records: list[Record]) -> str:
    """The days and commits of figures."""
    runs = sorted({(r["date"][:10], str(r["commit"])) for r in records})
    return "; ".join(f"{day}, commit {commit}" for day, commit in runs)


def origin(records: list[Record]) -> str:
    """The machine and the software of figures; several of a kind are all named."""
    names = [name for name in results.SHOWN if name not in ("date", "commit", "load average")]
    return results.describe(
        {name: ", ".join(sorted({str(r[name]) for r in records if r.get(name)})) or None for name in names}
    )


def blocks(records: list[Record], device: str) -> dict[str, str]:
    """The README's generated parts, by name."""
    mine = [r for r in records if (r["device"] == "cpu") == (device == "cpu") and r["group"] not in host.GROUPS]
    copies = (logits.FRESH_COPY, logits.COPY) if device == "cpu" else (logits.COPY,)
    main = (logits.OURS, logits.INPLACE, logits.EAGER, logits.COMPILED, *copies)
    memory = (logits.OURS, logits.INPLACE, logits.EAGER, logits.COMPILED)
    tables = {
        "logits": [pivot(mine, "logits", time_cell, main if device == "cpu" else ())],
        "logits memory": [pivot(mine, "logits", memory_cell, memory)],
        "options": [transposed(pivot(mine, "options", ratio_cell))],
        "linear": [pivot(mine, "linear", time_cell)],
        "linear memory": [pivot(mine, "linear", memory_cell, (linear.OURS, linear.UNFUSED, linear.EAGER))],
        "peers": [pivot(mine, "peers", time_cell)],
        "smoothing": [pivot(mine, "cost of smoothing", ratio_cell)],
        "others": [pivot([r for r in mine if r["provider"] not in plot.BESIDE], name, time_cell) for name in OTHERS],
    }
    made = {f"{device} {name}": "\n\n".join(t.markdown() for t in found if t.rows) for name, found in tables.items()}
    if device == "cpu":  # of a machine of its own
        found = [r for r in records if r["group"] in host.GROUPS]
        shown = [pivot(found, name, time_cell) for name in host.GROUPS]
        parts = [origin(found), *(table.markdown() for table in shown if table.rows)]
        made[f"{device} host"] = "\n\n".join(parts)
    missed = [aim for aim in aims.of(mine) if not aim.met]
    every = len(aims.of(mine))
    made[f"{device} machine"] = origin(mine)
    made[f"{device} aims"] = f"{every - len(missed)} of {every} aims are met; missed:\n\n{aims.table(missed)}"
    return made


def transposed(table: Table) -> Table:
    cells = [list(line) for line in zip(table.header, *table.rows, strict=True)]
    return Table(table.title, cells[0], cells[1:], table.caption) if cells else table


BLOCK = re.compile(r"(<!-- bench: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, records: list[Record]) -> str:
    """A text whose blocks between ``<!-- bench: NAME -->`` and ``<!-- end -->`` hold what the figures say."""
    made = {name: block for device in ("cpu", "cuda") for name, block in blocks(records, device).items()}

    def replace(found: re.Match[str]) -> str:
        if found["name"] not in made:
            raise SystemExit(f"<!-- bench: {found['name']} -->: there are {', '.join(made)}")
        return f"{found[1]}{made[found['name']]}\n{found[3]}"

    return BLOCK.sub(replace, text)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;font-size:13px;display:block;overflow-x:auto}td,th{padding:.2rem .6rem;text-align:right;
border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto}"""


def page(records: list[Record]) -> str:
    """One HTML page that needs nothing else: pictures, aims, every table."""
    parts = [f"<p>{html.escape(origin(records))}</p>\n<p>{html.escape(stamp(records))}</p>"]
    parts += [plot.svg(figure) for figure in plot.figures(records).values()]
    if found := aims.of(records):
        cells = [aim.line().strip("| ").split(" | ") for aim in found]
        parts.append(Table("Aims", ["case", "figure", "measured", "aim", ""], cells).html())
    cases: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        cases.setdefault(results.key(r), []).append(r)
    parts += [of_case(rows).html() for rows in cases.values()]
    head = f'<meta charset="utf-8"><title>labelsmooth_kernels: figures</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body><h1>Figures</h1>\n{body}\n</body></html>\n"


def main(arguments: argparse.Namespace) -> int:
    records = results.newest(results.load(arguments.results))
    if not records:
        raise SystemExit(f"--results {arguments.results}: no figures there")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for device, mine in by_device(records).items():
        target = Path(arguments.out, f"{device}-report.html")
        target.write_text(page(mine), encoding="utf-8")
        print(f"written: {target}")
        if arguments.readme:
            plot.save(mine, ROOT / "bench" / "plots", device)
    if arguments.readme:
        readme = ROOT / "README.md"
        readme.write_text(fill(readme.read_text(encoding="utf-8"), records), encoding="utf-8")
    return 0


def by_device(records: list[Record]) -> dict[str, list[Record]]:
    """Of CPUs and of GPUs: the two are never drawn into one picture."""
    split = {"cpu": [r for r in records if r["device"] == "cpu"], "cuda": [r for r in records if r["device"] != "cpu"]}
    return {name: rows for name, rows in split.items() if rows}
