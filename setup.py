"""Builds the optional C++ extension ``labelsmooth_kernels._C``; all metadata stands in pyproject.toml.

LABELSMOOTH_BUILD is auto (default: the extension where it can be built, else a pure-Python package that works), off,
cpu, cuda (the CPU's kernels and the GPU's, with nvcc 12.4 to 13 and a CUDA build of torch) or sanitize, which is cpu
under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`); the last three fail loudly. No GPU is asked for
while building: TORCH_CUDA_ARCH_LIST names the architectures, by default every one that the kernels are written for and
nvcc knows. What came of it is recorded, for the doctor, in labelsmooth_kernels/_build_info.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "labelsmooth_kernels"
MODES = ("auto", "off", "cpu", "cuda", "sanitize")
MODE = os.environ.get("LABELSMOOTH_BUILD", "auto")
if MODE not in MODES:
    raise SystemExit(f"LABELSMOOTH_BUILD={MODE!r} is not one of {', '.join(MODES)}")


def cuda_home() -> str:
    """The folder of a CUDA toolkit. The nvcc on PATH may be a wrapper in a folder without headers, so nvcc is asked."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
        folders += re.findall(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE)
    tried = [folder for folder in (*folders, "/usr/local/cuda") if folder]
    for folder in tried:
        if Path(folder, "include", "cuda_runtime.h").is_file() and Path(folder, "bin", "nvcc").is_file():
            return str(Path(folder).resolve())
    raise SystemExit(
        "LABELSMOOTH_BUILD=cuda needs a CUDA toolkit, 12.4 to 13: set CUDA_HOME to a folder that holds bin/nvcc and "
        f"include/cuda_runtime.h. None of these does: {', '.join(tried)}"
    )


if MODE == "cuda":
    os.environ["CUDA_HOME"] = cuda_home()  # read by torch.utils.cpp_extension when it is imported
try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:  # metadata and source distributions need no torch; build_ext says how to get it
    torch, TORCH_ERROR, BuildExtension = None, str(error), build_ext

NO_TORCH = """the C++ extension is compiled against the PyTorch it will run with; torch cannot be imported here ({}).
Install torch first, then: pip install --no-build-isolation .
(LABELSMOOTH_BUILD=off installs the pure-Python package.)"""


def cuda_flags() -> tuple[list[str], dict[str, str]]:
    """Options of nvcc, and what the doctor tells of them."""
    if torch.version.cuda is None:
        raise SystemExit(f"LABELSMOOTH_BUILD=cuda needs a CUDA build of torch, and this is {torch.__version__}")
    nvcc = subprocess.run([Path(CUDA_HOME, "bin", "nvcc"), "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"release (\d+)\.(\d+)", nvcc.stdout)
    if found is None:
        raise SystemExit(f"LABELSMOOTH_BUILD=cuda: {CUDA_HOME}/bin/nvcc does not tell its version: {nvcc.stdout!r}")
    version = int(found[1]), int(found[2])
    every = "7.5;8.0;9.0;10.0+PTX" if version >= (12, 8) else "7.5;8.0;9.0+PTX"
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or every
    # Sums and products are rounded as on the CPU, so that forward and backward agree on every bit.
    flags = ["-O3", "--fmad=false", "--threads=2", "-diag-suppress=177"]
    return flags, {"cuda": ".".join(map(str, version)), "architectures": architectures}


def extension() -> Extension:
    sources = sorted(str(p) for p in Path("csrc").glob("*.cpp"))
    if torch is None:
        return Extension(f"{PACKAGE}._C", sources)
    flags = ["-O3", "-g0", "-Wall", "-Wno-psabi", "-fno-math-errno", "-fno-trapping-math"]
    if "OpenMP" in torch.__config__.parallel_info():
        # For the compiler only: unlinked, the OpenMP symbols resolve to the runtime and thread pool that torch loads.
        flags.append("-fopenmp")
    link = []
    if MODE == "sanitize":
        link = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        # Not optimised: the same checks, and the kernels compile in a third of the time.
        flags += [*link, "-O0", "-g1", "-fno-omit-frame-pointer"]
    headers = sorted(str(p) for p in Path("csrc").rglob("*.h"))
    shared = {"depends": headers, "extra_link_args": link}
    if MODE != "cuda":
        return CppExtension(f"{PACKAGE}._C", sources, extra_compile_args=flags, **shared)
    sources += sorted(str(p) for pattern in ("*.cpp", "*.cu") for p in Path("csrc/cuda").glob(pattern))
    nvcc, facts = cuda_flags()
    defined = [f'-DLSK_{name.upper()}="{value}"' for name, value in facts.items()]
    return CUDAExtension(
        f"{PACKAGE}._C", sources, extra_compile_args={"cxx": [*flags, *defined], "nvcc": nvcc}, **shared
    )


def record(folder: Path, built: str | None, reason: str | None, compiler: str | None = None) -> None:
    """Writes the outcome beside the package and removes an extension of an earlier build that it contradicts."""
    if built is None:
        for stale in folder.glob("_C.*"):
            stale.unlink()
    version = None if torch is None else torch.__version__
    info = {"requested": MODE, "built": built, "reason": reason, "torch": version, "compiler": compiler}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
    if built is None:
        print(f"{PACKAGE}: no C++ extension: {reason}")


class BuildOrExplain(BuildExtension):
    def run(self) -> None:
        if torch is None:
            raise SystemExit(NO_TORCH.format(TORCH_ERROR))
        self.reason: str | None = None
        self.cxx: str | None = None
        super().run()
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
        record(folder, None if self.reason else "cuda" if MODE == "cuda" else "cpu", self.reason, self.cxx)

    def build_extensions(self) -> None:
        try:
            self.cxx = compiler_version(self.compiler.compiler_cxx[0])
            super().build_extensions()
        except Exception as error:  # torch's ninja build knows nothing of Extension.optional
            if MODE != "auto":
                raise
            self.reason = f"{type(error).__name__}: {error}".splitlines()[0] + " (the build log has the details)"
            self.extensions = []


def compiler_version(command: str) -> str:
    if shutil.which(command) is None:
        raise RuntimeError(f"no C++ compiler: {command!r} is not installed")
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


class BuildPurePython(build_py):
    def run(self) -> None:
        super().run()
        record(Path(PACKAGE) if self.editable_mode else Path(self.build_lib, PACKAGE), None, "LABELSMOOTH_BUILD=off")


if MODE == "off":
    setup(cmdclass={"build_py": BuildPurePython})
else:
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildOrExplain})
