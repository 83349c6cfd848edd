"""Import the CUDA build without a GPU, and read the machine code of its kernels.

    python tests/cuda_check.py [--md FILE]

A kernel fails if it spills registers, if it does not read, or where it makes a gradient write, 16 bytes at once, or if
the one that holds rows on chip does not copy them there asynchronously (from sm_80 on). Exit status 1 on a failure.
Needs the tools in Triton's wheel, and c++filt.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from labelsmooth_kernels import _C, backends

if TYPE_CHECKING:
    from collections.abc import Iterator


class Report(NamedTuple):
    """One kernel of one architecture."""

    kernel: str
    arch: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    wide_stores: int
    wide_copies: int
    problems: str


def tool(name: str, *arguments: str, text: str | None = None) -> str:
    """What a disassembler of Triton's wheel, or another program, prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(path) if path.exists() else name, *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def sections(listing: str, function: str) -> Iterator[tuple[str, str, str]]:
    """(architecture, mangled name, text) of the functions of a listing."""
    for part in re.split(r"^Fatbin elf code:", listing, flags=re.MULTILINE)[1:]:
        found = re.search(r"arch = (sm_\d+)", part)
        assert found is not None
        pieces = re.split(function, part, flags=re.MULTILINE)[1:]
        for name, text in zip(pieces[::2], pieces[1::2], strict=True):
            yield found[1], name, text


def judge(kernel: str, arch: str, spills: int, counts: collections.Counter[str]) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = ["spills"] if spills else []
    if kernel.startswith("merge_kernel"):
        return ", ".join(problems)
    on_chip = re.fullmatch(r"row_kernel<.*, true>", kernel) is not None
    copies = on_chip and int(arch.removeprefix("sm_")) >= 80
    if not counts["LDG wide"] and not copies:
        problems.append("no 128-bit loads")
    if copies and not counts["LDGSTS wide"]:
        problems.append("no asynchronous copies")
    if not kernel.startswith("part_kernel") and not counts["STG wide"]:
        problems.append("no 128-bit stores")
    return ", ".join(problems)


def short(name: str) -> str:
    """row_kernel<BFloat16, true, false> of a demangled signature."""
    found = re.search(r"(\w+_kernel<[^(]*>)\(", name.replace("(bool)1", "true").replace("(bool)0", "false"))
    return name if found is None else found[1].replace("c10::", "").replace("lsk::", "")


def read(extension: str) -> list[Report]:
    """Every kernel of the extension."""
    usage = {}
    for arch, name, text in sections(tool("cuobjdump", "-res-usage", extension), r"^ Function (\S+):$"):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
        assert found is not None
        usage[arch, name] = int(found[1]), int(found[3])
    reports = []
    for arch, name, text in sections(tool("cuobjdump", "-sass", extension), r"^\s*Function : (\S+)$"):
        counts: collections.Counter[str] = collections.Counter()
        for access, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|LDL|STL|LD|ST)((?:\.\w+)*) ", text):
            counts[access + (" wide" if re.search(r"\.128\b", modifiers) else "")] += 1
        spills = sum(counts[access + width] for access in ("LDL", "STL") for width in ("", " wide"))
        kernel = short(tool("c++filt", text=name).strip())
        registers, shared = usage[arch, name]
        wide = counts["LDG wide"], counts["STG wide"], counts["LDGSTS wide"]
        reports.append(Report(kernel, arch, registers, spills, shared, *wide, judge(kernel, arch, spills, counts)))
    return sorted(reports, key=lambda report: (int(report.arch[3:]), report.kernel))


def main() -> int:
    """Print what the build says of itself, the table, and the failures below it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--md", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    info = _C.build_info()
    print(f"torch {torch.__version__}, nvcc {info['cuda']}, architectures {info['architectures']}")
    print(f"backend cuda: {backends.BACKENDS['cuda'].unavailable() or 'available'}")
    for name in ("forward", "forward_", "backward", "backward_", "target_grad", "scale_"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"labelsmooth_kernels::cuda_{name}", "CUDA")
        assert registered, f"cuda_{name} is not registered"
    reports = read(_C.__file__)
    names = [name.replace("_", " ") for name in Report._fields]
    lines = [names, ["---"] * len(names), *([str(value) for value in report] for report in reports)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    print(table)
    if arguments.md:
        arguments.md.write_text(table + "\n")
    failures = [report for report in reports if report.problems]
    print(f"{len(failures)} of {len(reports)} kernels fail" if failures else f"all {len(reports)} kernels pass")
    return 1 if failures or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
