"""``python -m bench.prototype``: the cluster row kernel (prototypes/cluster_row.cu) beside a copy, on a GPU of sm_90.

The kernel is no part of the package. Here it is compiled (10 s), held against float64 by the gate of the other figures,
and timed in the rounds of a copy; its rows are the group "prototype". What is timed is the launch alone: losses of rows
and the gradient, whose factor 1 / N is given.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import logits, report, results
from .harness import IGNORED, Case, Inputs, Provider, Results, measure

if TYPE_CHECKING:
    from collections.abc import Callable

SOURCE = results.ROOT / "bench" / "prototypes" / "cluster_row.cu"
SHAPES = ((8192, 32000), (8192, 128256), (32768, 32000), (4096, 50304))
CASES = [Case("prototype", n, k, device="cuda") for n, k in SHAPES]
CASES += [Case("prototype", n, k, dtype=torch.float32, device="cuda") for n, k in SHAPES[:2]]
FORMS = [(blocks, threads, per_sm) for threads, per_sm in ((256, 3), (512, 2)) for blocks in (1, 2, 4, 8)]
REFUSALS = {
    -1: "itemsize and threads: 2 or 4 and 256 or 512 are allowed",
    -2: "blocks of a cluster: 1, 2, 4 or 8 are allowed",
    -3: "rows or classes: none, or too many for a grid",
    -4: "classes: whole vectors of 16 bytes are allowed",
    -5: "classes: a block's part of the row exceeds its shared memory",
    -6: "logits or gradient: memory aligned to 16 bytes is allowed",
}


def toolkit() -> Path | None:
    """The folder of CUDA that nvcc belongs to, known by the headers in it."""
    if (nvcc := shutil.which("nvcc")) is None:
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    found = [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.MULTILINE)]
    folders = [*found, Path(nvcc).resolve().parents[1], Path("/usr/local/cuda")]
    return next((folder for folder in folders if (folder / "include" / "cuda_runtime.h").exists()), None)


def compile_library(folder: Path) -> Path:
    """Compile the kernels for sm_90 into a shared library."""
    cuda = toolkit()
    if cuda is None:
        raise FileNotFoundError("nvcc and CUDA's headers are not on this machine: compile elsewhere, give --library")
    target = folder / "cluster_row.so"
    flags = ["-O3", "-std=c++17", "-arch=sm_90", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    subprocess.run([str(cuda / "bin" / "nvcc"), *flags, "-o", str(target), str(SOURCE)], check=True)
    return target


def load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path.resolve()))
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.cluster_row_refusal.argtypes = [number, number, number, size, size]
    library.cluster_row_launch.argtypes = [number] * 3 + [pointer] * 6 + [size, size, ctypes.c_float, size, pointer]
    library.cluster_row_gave_up.argtypes = [ctypes.POINTER(ctypes.c_uint)]
    return library


def gave_up(library: ctypes.CDLL) -> str | None:
    """Which wait on the device was the first to give up, if any did; synchronises."""
    words = (ctypes.c_uint * 4)()
    if code := library.cluster_row_gave_up(words):
        raise RuntimeError(f"CUDA error {code}")
    if not words[0]:
        return None
    return f"a wait gave up: {dict(zip(('code', 'block', 'thread', 'rank'), words, strict=True))}"


@dataclass(frozen=True)
class Prototype(logits.Logits):
    """The logits' inputs and limits; the providers are the forms of the kernel that hold a row of the case."""

    library: ctypes.CDLL | None = None
    baseline: str = logits.COPY

    def providers(self, case: Case) -> list[Provider]:
        found = []
        for blocks, threads, per_sm in FORMS:
            form = (case.dtype.itemsize, threads, blocks)
            if self.library is not None and not self.library.cluster_row_refusal(*form, case.n, case.k):
                name = f"cluster rows, C = {blocks}, {threads} × {per_sm}"
                found.append(Provider(name, launch(self.library, form, case), exact=True))
        return found + logits.copies(case)

    def errors(self, case: Case, provider: Provider, inputs: Inputs, results: Results) -> dict[str, float]:
        if self.library is not None and (why := gave_up(self.library)):
            raise RuntimeError(why)
        losses, grad = results
        return logits.smoothed_errors(inputs, case.eps, losses.double().mean(), grad)


def launch(library: ctypes.CDLL, form: tuple[int, int, int], case: Case) -> Callable[[Inputs], Results]:
    """The step of one form: (losses of rows, gradient of their mean); no row of the case is ignored."""
    scale = torch.full((1,), 1 / case.n, device=case.device)

    def step(inputs: Inputs) -> Results:
        x = inputs.leaves[0].detach()
        grad, rows = torch.empty_like(x), torch.empty(2, case.n, device=x.device)
        tensors = (x, grad, inputs.target, scale, rows[0], rows[1])
        stream = torch.cuda.current_stream().cuda_stream
        pointers = [tensor.data_ptr() for tensor in tensors]
        if code := library.cluster_row_launch(*form, *pointers, case.n, case.k, case.eps, IGNORED, stream):
            raise RuntimeError(REFUSALS.get(code, f"CUDA error {code}"))
        return rows[0], grad

    return step


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prototype", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/results.jsonl"), help="default: %(default)s")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: only says what it needs")
    parser.add_argument("--library", type=Path, help="the compiled kernels; default: nvcc compiles them")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case, about; default: %(default)s")
    parser.add_argument("--commit", help="of the tree, where it is a copy without git")
    arguments = parser.parse_args()
    if arguments.device == "cpu" or not torch.cuda.is_available():
        print("prototype: the kernel needs a GPU of compute capability 9.0", file=sys.stderr)
        return 2
    facts = results.provenance("cuda", arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        library = load(arguments.library or compile_library(Path(folder)))
    bad = False
    for case in CASES:
        records = results.append(arguments.out, measure(case, Prototype(library=library), arguments.seconds), facts)
        print(f"\n{report.of_case(records).markdown()}", flush=True)
        torch.cuda.empty_cache()
        bad |= any("refused" in record for record in records)
    if why := gave_up(library):
        print(f"prototype: {why}", file=sys.stderr)
    return 1 if bad or why else 0


if __name__ == "__main__":
    raise SystemExit(main())
