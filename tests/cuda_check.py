"""Import the CUDA build without a GPU, and read the machine code of its kernels.

    python tests/cuda_check.py [--write]

A kernel fails if it spills registers, if it does not read, or where it makes a gradient write, 16 bytes at once, if one
that holds rows on chip does not copy them there asynchronously, or if a main loop without options executes more
instructions for a class than ``MOST``. ``tests/cuda_table.csv`` holds what is read; it fails too where the code is
another than there and the compiler is not. Exit status 1 on a failure. Needs the tools in Triton's wheel, and c++filt.
"""

from __future__ import annotations

import argparse
import collections
import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from labelsmooth_kernels import _C, backends

if TYPE_CHECKING:
    from collections.abc import Iterator


TABLE = Path(__file__).resolve().with_name("cuda_table.csv")
MOST = {"cluster_kernel": 16.0, "row_kernel": 17.0, "part_kernel": 10.0, "grad_kernel": 8.0}
"""Instructions of the main loops per class without options, from sm_80 on: both, the loss, the gradient."""
PLAIN = re.compile(rf"({'|'.join(MOST)})<(\w+), false(?:, \w+)?>")
ITEMSIZE = {"BFloat16": 2, "Half": 2, "float": 4, "double": 8}


class Report(NamedTuple):
    """One kernel of one architecture."""

    nvcc: str
    kernel: str
    arch: str
    registers: int
    spills: int
    shared: int
    wide_loads: int
    """of 128 bits"""
    wide_stores: int
    wide_copies: int
    """of 128 bits each or in bulk, into shared memory"""
    per_class: float | None
    """instructions of the main loops, those that take most classes in a turn; without options"""
    problems: str


def loops_of(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    """The innermost loops of (address, instruction): what lies between a branch backward and its target."""
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target is not None and int(target[1], 16) < at:
            loops.append((int(target[1], 16), at))
    for first, last in loops:
        if not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last)):
            yield [text for at, text in code if first <= at <= last]


def instructions_per_class(kernel: str, sass: str) -> float | None:
    """Of the loops that sum and that write, the longest of each that reads most vectors of 16 bytes in a turn."""
    found = PLAIN.fullmatch(kernel)
    if found is None:
        return None
    lanes = 16 // ITEMSIZE[found[2]]
    code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", sass)]
    spent: dict[bool, tuple[int, float]] = {}
    for body in loops_of(code):
        vectors = sum(bool(re.search(r"\bLD[GS]\S*\.128\b", text)) for text in body)
        stores = [".128" in text for text in body if re.search(r"\bSTG\b", text)]
        if not all(stores):
            continue  # for a gradient whose memory does not allow more
        if vectors and sum("MUFU.EX2" in text for text in body) >= vectors * lanes:
            spent[bool(stores)] = max(spent.get(bool(stores), (0, 0.0)), (vectors, len(body) / (vectors * lanes)))
    return round(sum(per_class for _, per_class in spent.values()), 2) if spent else None


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


def is_empty(kernel: str, arch: int) -> bool:
    """Whether the form is for other GPUs: clusters from 9.0 on, blocks that copy by their threads before."""
    if kernel.startswith("cluster_kernel"):
        return arch < 90
    return re.fullmatch(r"row_kernel<.*, true>", kernel) is not None and not 80 <= arch < 90


def judge(kernel: str, arch: int, counts: collections.Counter[str], per_class: float | None) -> str:
    """What is wrong with one kernel; empty if nothing is."""
    problems = ["spills"] if counts["spills"] else []
    if kernel.startswith("merge_kernel") or is_empty(kernel, arch):
        return ", ".join(problems)
    on_chip = kernel.startswith("cluster_kernel") or re.fullmatch(r"row_kernel<.*, true>", kernel) is not None
    if on_chip and not counts["copies"]:
        problems.append("no asynchronous copies")
    if kernel.startswith("cluster_kernel") and not counts["STAS wide"]:
        problems.append("nothing is sent to the other blocks")
    if not on_chip and not counts["LDG wide"]:
        problems.append("no 128-bit loads")
    if not kernel.startswith("part_kernel") and not counts["STG wide"]:
        problems.append("no 128-bit stores")
    plain = PLAIN.fullmatch(kernel)
    if plain is not None and plain[2] != "double" and arch >= 80:
        if per_class is None:
            problems.append("no main loop was found")
        elif per_class > MOST[plain[1]]:
            problems.append(f"{per_class} instructions per class, allowed are {MOST[plain[1]]}")
    return ", ".join(problems)


def short(name: str) -> str:
    """row_kernel<BFloat16, true, false> of a demangled signature."""
    found = re.search(r"(\w+_kernel<[^(]*>)\(", name.replace("(bool)1", "true").replace("(bool)0", "false"))
    return name if found is None else found[1].replace("c10::", "").replace("lsk::", "")


def read(extension: str, nvcc: str) -> list[Report]:
    """Every kernel of the extension."""
    usage = {}
    for arch, name, text in sections(tool("cuobjdump", "-res-usage", extension), r"^ Function (\S+):$"):
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
        assert found is not None
        usage[arch, name] = int(found[1]), int(found[3])
    reports = []
    for arch, name, text in sections(tool("cuobjdump", "-sass", extension), r"^\s*Function : (\S+)$"):
        counts: collections.Counter[str] = collections.Counter()
        for access, modifiers in re.findall(r"\b(LDGSTS|LDG|STG|STAS|UBLKCP|LDL|STL|LD|ST)((?:\.\w+)*) ", text):
            counts[access + (" wide" if re.search(r"\.128\b", modifiers) else "")] += 1
        counts["spills"] = sum(counts[access + width] for access in ("LDL", "STL") for width in ("", " wide"))
        counts["copies"] = counts["LDGSTS wide"] + counts["UBLKCP"]
        kernel = short(tool("c++filt", text=name).strip())
        number = int(arch.removeprefix("sm_"))
        per_class = None if is_empty(kernel, number) else instructions_per_class(kernel, text)
        seen = (counts["spills"], usage[arch, name][1], counts["LDG wide"], counts["STG wide"], counts["copies"])
        problems = judge(kernel, number, counts, per_class)
        reports.append(Report(nvcc, kernel, arch, usage[arch, name][0], *seen, per_class, problems))
    return sorted(reports, key=lambda report: (int(report.arch[3:]), report.kernel))


def lines_of(reports: list[Report]) -> list[list[str]]:
    """What stands in the table: all that is read, without the verdict."""
    return [["" if value is None else str(value) for value in report[:-1]] for report in reports]


def compare(reports: list[Report], path: Path) -> list[str]:
    """How the kernels differ from their lines of the table; those that another compiler made have none there."""
    with path.open(newline="") as file:
        held = {tuple(line[:3]): line for line in list(csv.reader(file))[1:]}
    if not any(key[0] == report.nvcc for key in held for report in reports[:1]):
        print(f"{path.name} is of another compiler: not compared")
        return []
    found = {tuple(line[:3]): line for line in lines_of(reports)}
    changed = [key for key in found.keys() & held.keys() if found[key] != held[key]]
    differ = [f"{path.name}: {','.join(held[key])} is {','.join(found[key])} now" for key in sorted(changed)]
    differ += [f"{path.name}: has no line {','.join(found[key])}" for key in sorted(found.keys() - held.keys())]
    built = {key[2] for key in found}
    gone = [key for key in held.keys() - found.keys() if key[2] in built]
    return differ + [f"{path.name}: there is no kernel {','.join(key)}" for key in sorted(gone)]


def main() -> int:
    """Print what the build says of itself, the table, and the failures below it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.name}")
    arguments = parser.parse_args()
    info = _C.build_info()
    print(f"torch {torch.__version__}, nvcc {info['cuda']}, architectures {info['architectures']}")
    print(f"backend cuda: {backends.BACKENDS['cuda'].unavailable() or 'available'}")
    for name in ("forward", "forward_", "backward", "backward_", "target_grad", "scale_"):
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"labelsmooth_kernels::cuda_{name}", "CUDA")
        assert registered, f"cuda_{name} is not registered"
    reports = read(_C.__file__, str(info["cuda"]))
    lines = [list(Report._fields[:-1]), *lines_of(reports)]
    print("\n".join(",".join(line) for line in lines))
    if arguments.write:
        with TABLE.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
    differ = compare(reports, TABLE)
    print(
        "\n".join(
            differ + [f"{report.kernel}, {report.arch}: {report.problems}" for report in reports if report.problems]
        )
    )
    failures = [report for report in reports if report.problems]
    print(f"{len(failures)} of {len(reports)} kernels fail" if failures else f"all {len(reports)} kernels pass")
    return 1 if failures or differ or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
