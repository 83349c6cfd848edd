"""Builds the optional C++ extension ``labelsmooth_kernels._C``; all metadata stands in pyproject.toml.

LABELSMOOTH_BUILD is auto (default: the extension where it can be built, else a pure-Python package that works), off,
cpu, cuda or sanitize, which is cpu under AddressSanitizer and UndefinedBehaviorSanitizer (`make sanitize`); the last
three fail loudly. No GPU is asked for while building. What came of it is recorded, for the doctor,
in labelsmooth_kernels/_build_info.json.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:  # metadata and source distributions need no torch; build_ext says how to get it
    torch, TORCH_ERROR, BuildExtension = None, str(error), build_ext

PACKAGE = "labelsmooth_kernels"
MODES = ("auto", "off", "cpu", "cuda", "sanitize")
MODE = os.environ.get("LABELSMOOTH_BUILD", "auto")
if MODE not in MODES:
    raise SystemExit(f"LABELSMOOTH_BUILD={MODE!r} is not one of {', '.join(MODES)}")

NO_TORCH = """the C++ extension is compiled against the PyTorch it will run with; torch cannot be imported here ({}).
Install torch first, then: pip install --no-build-isolation .
(LABELSMOOTH_BUILD=off installs the pure-Python package.)"""
NO_CUDA = "LABELSMOOTH_BUILD=cuda: CUDA kernels are not part of this version yet; use auto, cpu or off"


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
        flags += [*link, "-O1", "-g", "-fno-omit-frame-pointer"]
    headers = sorted(str(p) for p in Path("csrc").glob("*.h"))
    return CppExtension(f"{PACKAGE}._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=link)


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
        if MODE == "cuda":
            raise SystemExit(NO_CUDA)
        self.reason: str | None = None
        self.cxx: str | None = None
        super().run()
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
        record(folder, None if self.reason else "cpu", self.reason, self.cxx)

    def build_extensions(self) -> None:
        try:
            self.cxx = compiler_version(self.compiler.compiler_cxx[0])
            super().build_extensions()
        except Exception as error:  # torch's ninja build knows nothing of Extension.optional
            if MODE in ("cpu", "sanitize"):
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
