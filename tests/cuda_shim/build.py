"""Compile the CUDA kernels for the CPU: ``python tests/cuda_shim/build.py`` (``make test`` does).

``shim.so`` registers them as the operators of the CUDA backend on CPU tensors; ``races`` is a program that runs them
under ThreadSanitizer, and ``races_planted`` the same without the barriers of a block.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = ROOT / "out" / "cuda_shim"
KERNELS = [HERE / "kernels.cpp", ROOT / "csrc" / "cuda" / "run.cpp"]
INCLUDES = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests", *include_paths())]
# As nvcc: no product is contracted with a sum.
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", *INCLUDES]
TORCH = [part for path in library_paths() for part in (f"-L{path}", f"-Wl,-rpath,{path}")] + ["-ltorch_cpu", "-lc10"]
TSAN = ["-fsanitize=thread"]
TARGETS = {
    "shim.so": ([*KERNELS, HERE / "ops.cpp"], [], ["-shared", *TORCH]),
    "races": ([*KERNELS, HERE / "races.cpp"], TSAN, []),
    "races_planted": ([*KERNELS, HERE / "races.cpp"], [*TSAN, "-DLSK_SHIM_WITHOUT_BARRIERS"], []),
}


def _sources() -> list[Path]:
    shared = [ROOT / "csrc" / name for name in ("row_math.h", "call.h", "operands.h")]
    files = [path for folder in (ROOT / "csrc" / "cuda", HERE) for path in folder.iterdir()]
    return shared + [path for path in files if path.suffix in (".h", ".cu", ".cpp")]


def missing(target: str = "shim.so") -> str | None:
    """Why a target cannot be used: it is not there, or older than what it is made of."""
    path = OUT / target
    if not path.exists():
        return "the CUDA kernels were not compiled for the CPU: python tests/cuda_shim/build.py"
    if path.stat().st_mtime < max(source.stat().st_mtime for source in _sources()):
        return "the CUDA kernels changed since they were compiled for the CPU: python tests/cuda_shim/build.py"
    return None


def build(target: str) -> None:
    """Compile and link one of the targets, its sources side by side."""
    sources, flags, link = TARGETS[target]
    folder = OUT / f"{target}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen(["c++", *FLAGS, *flags, "-c", source, "-o", made])
        for source, made in zip(sources, objects, strict=True)
    ]
    exits = [compiler.wait() for compiler in compilers]
    if any(exits):
        raise SystemExit(f"{target} does not compile")
    subprocess.run(["c++", "-pthread", *flags, *objects, *link, "-o", OUT / target], check=True)


if __name__ == "__main__":
    for name in sys.argv[1:] or TARGETS:
        if missing(name):
            build(name)
