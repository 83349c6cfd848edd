"""Compile Triton kernels ahead of time, without a GPU, and hold their machine code against ``tests/aot_table.csv``.

A row of the table is one kernel for one architecture: Triton's version, a hash of everything that determines the
machine code, and the counts read from it. A kernel whose hash stands there is judged by those counts without being
compiled, but for one tenth of such kernels, another each day: they are compiled again and must count the same.
"""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import datetime
import functools
import hashlib
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported

sys.path.append(str(Path(__file__).resolve().parents[1]))

import triton
import triton.compiler
from triton.runtime.jit import JITFunction

from bench import stand_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "tests" / "aot_table.csv"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PACKAGE = "labelsmooth_kernels.triton_kernels"
SMS = {80: 108, 90: 132, 100: 148}
"""Streaming multiprocessors of a GPU of each architecture that kernels are compiled for."""
MATRIX = {80: r"\bHMMA\b", 90: r"\bHGMMA\b", 100: r"\bUTC\w*MMA\b"}
SLICES = 10


class Counts(NamedTuple):
    """Hold what is read from the machine code of a kernel; instructions are counted."""

    registers: int
    spills: int
    shared: int
    """bytes of shared memory"""
    instructions: int
    wide_loads: int
    """of 128 bits or 256"""
    wide_stores: int
    narrow_loads: int
    narrow_stores: int
    wide_copies: int
    """asynchronous, from global to shared memory"""
    products: int
    """of the matrix unit"""
    looped: int
    """instructions of the innermost loops that read 128 bits at a time, one turn of each"""


class Row(NamedTuple):
    """Hold a line of the table."""

    triton: str
    arch: str
    kernel: str
    hash: str
    call: str
    """the first that launches it"""
    counts: Counts


class Kernel:
    """Hold what Triton's compiler would be given, in the place of a compiled kernel, and a hash of it."""

    def __init__(self, source: Any, target: GPUTarget, options: dict[str, Any]) -> None:
        self.source, self.target, self.options = source, target, options
        backend = triton.compiler.make_backend(target)
        settled = backend.parse_options(dict(options))
        parts = (triton.__version__, source.hash(), backend.hash(), settled.hash())
        self.hash = hashlib.sha256("-".join(parts).encode()).hexdigest()[:16]
        self.name, self.arch = str(source.name), f"sm_{target.arch}"


class Launch(NamedTuple):
    """Hold a kernel, the call of an operator that launches it, and what says what is wrong with its counts."""

    kernel: Kernel
    call: str
    judge: Callable[[Counts], str]

    def row(self, counts: Counts) -> Row:
        """Make the kernel's line of the table."""
        return Row(triton.__version__, self.kernel.arch, self.kernel.name, self.kernel.hash, self.call, counts)


@functools.cache
def kernels_module(name: str) -> Any:
    """Import a module of this source tree's kernels under its installed name, without the package around it."""
    if PACKAGE not in sys.modules:
        path = ROOT / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            PACKAGE, path / "__init__.py", submodule_search_locations=[str(path)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules.setdefault(PACKAGE.partition(".")[0], types.ModuleType("parent"))
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACKAGE])
    module = importlib.import_module(f"{PACKAGE}.{name}")
    for own in [loaded for full_name, loaded in sys.modules.items() if full_name.startswith(PACKAGE)]:
        for function in vars(own).values():
            if isinstance(function, JITFunction):
                function.starting_line_number = 0  # part of Triton's hash, though not of the machine code
    return module


def compile_for(capability: int) -> None:
    """Let Triton compile for an architecture, whose number is that of its device."""
    stand_in.Compiler(divmod(capability, 10), capability).activate()


def launched(capability: int, call: Callable[[], None]) -> list[tuple[Kernel, dict[str, Any]]]:
    """Return the kernels that a call on meta tensors launches on a GPU, each with the options of its launch."""
    found = []

    def record(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append((kernel.warmup(*arguments, grid=grid, **options), options))

    launch = kernels_module("launch")
    machine = launch.Machine(divmod(capability, 10), SMS[capability])
    compile_for(capability)
    with (
        mock.patch.object(triton.compiler, "compile", Kernel),
        mock.patch.object(launch, "run", record),
        launch.override(machine=machine),
    ):
        call()
    return found


def read(cubin: bytes, capability: int, shared: int) -> Counts:
    """Count what the tools in Triton's wheel print."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
        usage = run([TOOLS / "cuobjdump", "-res-usage", file.name]).stdout
        sass = run([TOOLS / "nvdisasm", "-c", file.name]).stdout
        looped = _looped(run([TOOLS / "cuobjdump", "-sass", file.name]).stdout)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    n: collections.Counter[str] = collections.Counter()
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL)((?:\.\w+)*)", sass):
        n[name + (" wide" if re.search(r"\.(128|256)\b", modifiers) else " narrow")] += 1
    spills = sum(n[f"{access} {width}"] for access in ("LDL", "STL") for width in ("wide", "narrow"))
    instructions = len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?!NOP)", sass, re.MULTILINE))
    accesses = (n["LDG wide"], n["STG wide"], n["LDG narrow"], n["STG narrow"], n["LDGSTS wide"])
    products = len(re.findall(MATRIX[capability], sass))
    return Counts(int(registers[1]), spills, shared, instructions, *accesses, products, looped)


def _looped(sass: str) -> int:
    """Count what stands between a branch backward and its target, where there is no other such pair in between."""
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))]
    bodies = ([text for at, text in code if a <= at <= b] for a, b in innermost)
    return sum(len(body) for body in bodies if any(re.search(r"\bLDG\S*\.(128|256)\b", text) for text in body))


_pending: list[Kernel] = []


def _measure(index: int) -> Counts:
    """Compile one of the kernels that this process was forked with."""
    kernel = _pending[index]
    compile_for(kernel.target.arch)
    compiled = triton.compile(kernel.source, target=kernel.target, options=kernel.options)
    return read(compiled.asm["cubin"], kernel.target.arch, compiled.metadata.shared)


def compile_all(kernels: Iterable[Kernel]) -> dict[str, Counts]:
    """Compile kernels in two processes, with an empty compilation cache; return the counts by hash."""
    _pending[:] = kernels
    fork = multiprocessing.get_context("fork")  # what Triton's compiler is given cannot be pickled
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        concurrent.futures.ProcessPoolExecutor(2, mp_context=fork) as pool,
    ):
        counts = list(pool.map(_measure, range(len(_pending))))
    return {kernel.hash: count for kernel, count in zip(_pending, counts, strict=True)}


def load() -> dict[str, Row]:
    """Read the table: rows by hash."""
    if not TABLE.exists():
        return {}
    with TABLE.open(newline="") as file:
        _, *lines = csv.reader(file)
    return {line[3]: Row(line[0], line[1], line[2], line[3], line[4], Counts(*map(int, line[5:]))) for line in lines}


def save(rows: Iterable[Row]) -> None:
    """Write the table, sorted."""
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*Row._fields[:-1], *Counts._fields))
        writer.writerows((*row[:-1], *row.counts) for row in sorted(rows))


def today() -> int:
    """Return which tenth of the kernels in the table is compiled again today; ten days see them all."""
    return datetime.datetime.now(datetime.timezone.utc).toordinal() % SLICES


def difference(old: Row, new: Counts) -> str:
    """Say how a kernel that was compiled again contradicts its row; nothing if it does not."""
    pairs = [(name, *pair) for name, *pair in zip(Counts._fields, new, old.counts, strict=True) if pair[0] != pair[1]]
    found = ", ".join(f"{name} {now}, not {before}" for name, now, before in pairs)
    return found and f"{old.kernel} {old.hash} of {old.arch}, Triton {old.triton} ({old.call}): {found}"


def check(launches: list[Launch], tenth: int, write: bool) -> tuple[dict[str, Counts], list[str]]:
    """Compile what must be; return the counts of every kernel by hash, and what contradicts the table."""
    table, first = load(), {launch.kernel.hash: launch for launch in reversed(launches)}
    known = {name: table[name].counts for name in first if name in table}
    again = {name for name in known if int(name, 16) % SLICES == tenth}
    compiled = compile_all(launch.kernel for name, launch in first.items() if name not in known or name in again)
    counts, missing = known | compiled, len(first) - len(known)
    print(
        f"Triton {triton.__version__}: {len(launches)} launches of {len(first)} kernels, {len(known)} of them in "
        f"{TABLE.name}; compiled: {missing} that are not, {len(again)} that are (--tenth {tenth})"
    )
    stale = sum(row.triton == triton.__version__ for row in table.values()) - len(known)
    if write:
        others = [row for row in table.values() if row.triton != triton.__version__]
        save(others + [launch.row(counts[name]) for name, launch in first.items()])
    elif missing or stale:
        print(f"`make aot-table` adds those {missing} and takes out {stale} that nothing launches")
    return counts, [text for name in sorted(again) if (text := difference(table[name], compiled[name]))]


def markdown(launches: list[Launch], counts: dict[str, Counts]) -> str:
    """Format a row for each launch."""
    names = ["kernel", "arch", "call", *(name.replace("_", " ") for name in Counts._fields), "problems"]
    lines = [names, ["---"] * len(names)]
    for kernel, call, judge in launches:
        found = counts[kernel.hash]
        lines.append([kernel.name, kernel.arch, call, *map(str, found), judge(found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
