"""Triton without a GPU: as far as a compilation (:class:`Compiler`), or as far as the driver (:class:`Driver`).

``libcuda.c`` takes the place of libcuda.so.1. Triton's own launcher loads a kernel into it and launches it; nothing
runs, each launch is written down, and what the driver of the GPU would refuse is refused. That shows grids, blocks,
shared memory and clusters as a GPU gets them, and what a call costs on the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).with_name("libcuda.c")
FOLDER = SOURCE.parent.parent / "out" / "stand_in"


class Gpu(NamedTuple):
    """What a choice of kernel, grid or block may depend on, of one GPU."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_per_block: int
    """bytes, where a kernel asks for more than 48 KiB"""
    shared_per_multiprocessor: int


_DATACENTER = (227 * 1024, 228 * 1024)
GPUS = {
    "H100": Gpu((9, 0), 132, *_DATACENTER),  # SXM
    "H200": Gpu((9, 0), 132, *_DATACENTER),
    "B200": Gpu((10, 0), 148, *_DATACENTER),
    "RTX 4090": Gpu((8, 9), 128, 99 * 1024, 100 * 1024),
}


class Launch(NamedTuple):
    """One launch, as a driver is asked for it."""

    kernel: str
    blocks: int
    threads: int
    shared: int
    """bytes"""
    cluster: int


class _Context(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("major", "minor", "sms", "block_shared", "all_shared"))


class _Launch(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        ("blocks", ctypes.c_uint * 3),
        *((name, ctypes.c_uint) for name in ("threads", "shared", "cluster")),
    )


@dataclass(frozen=True)
class Compiler:
    """What Triton's JIT asks of a driver before it compiles; ``device`` tells what is compiled for apart."""

    capability: tuple[int, int]
    device: int = 0

    def get_current_target(self) -> Any:
        major, minor = self.capability
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def activate(self) -> None:
        importlib.import_module("triton.runtime.driver").driver.set_active(self)


@contextlib.contextmanager
def compiling(launch: Any, machine: tuple[Any, ...], wanted: Callable[..., bool] = lambda *_: True) -> Iterator[None]:
    """Inside, the kernels that ``launch`` would launch on a machine are compiled for it, into Triton's cache; nothing
    can be launched in this process afterwards. ``wanted`` may leave one out, by its kernel, arguments and options."""

    def compile_only(kernel: Any, grid: tuple[int], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if wanted(kernel, arguments, options):
            kernel.warmup(*arguments, grid=grid, **options)

    major, minor = machine[0]
    Compiler(machine[0], 10 * major + minor).activate()
    with mock.patch.object(launch, "run", compile_only), launch.override(machine=launch.Machine(*machine)):
        yield


@dataclass(frozen=True)
class Driver(Compiler):
    """The same, and kernels are loaded and launched: into the library, which writes that down."""

    utils: Any = None
    launcher_cls: Any = None

    def set_current_device(self, device: int) -> None:
        assert device == self.device

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def activate(self) -> None:
        super().activate()
        library().stand_in_use(self.device)

    def count(self) -> int:
        """How many launches there were, of every driver."""
        return int(library().stand_in_count())

    def since(self, first: int) -> list[Launch]:
        """The launches after the first so many; a few thousand are kept."""
        return [self._launch(i) for i in range(first, self.count())]

    def _launch(self, i: int) -> Launch:
        found = library().stand_in_launch(i).contents
        assert list(found.blocks[1:]) == [1, 1]
        return Launch(found.name.decode(), found.blocks[0], found.threads, found.shared, found.cluster)


@functools.cache
def library() -> Any:
    """The stand-in, compiled where it is not yet; whoever asks for libcuda.so.1 in this process later gets it."""
    target = FOLDER / "libcuda.so.1"
    if not target.exists() or target.stat().st_mtime < SOURCE.stat().st_mtime:
        FOLDER.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")  # others may be making it at the same time
        headers = Path(importlib.import_module("triton.backends.nvidia").__path__[0], "include")
        flags = ["-O1", "-shared", "-fPIC", f"-I{headers}", f"-Wl,-soname,{target.name}"]
        subprocess.run(["cc", *flags, str(SOURCE), "-o", str(made)], check=True)
        made.replace(target)
    with contextlib.suppress(OSError):
        ctypes.CDLL(target.name, mode=os.RTLD_NOLOAD)
        raise RuntimeError("this process has a driver already, which nothing can stand in for")
    found = ctypes.CDLL(str(target), mode=ctypes.RTLD_GLOBAL)
    found.stand_in_add.argtypes = [_Context]
    found.stand_in_count.restype = ctypes.c_uint64
    found.stand_in_launch.argtypes = [ctypes.c_uint64]
    found.stand_in_launch.restype = ctypes.POINTER(_Launch)
    return found


def add(gpu: Gpu) -> int:
    """Make a GPU one of the stand-in's devices; its number."""
    device = int(library().stand_in_add(_Context(*gpu.capability, *gpu[1:])))
    assert device >= 0, "the stand-in has no room for another GPU"
    return device


@functools.cache
def driver(name: str) -> Driver:
    """The driver of one of :data:`GPUS`."""
    gpu, device = GPUS[name], add(GPUS[name])
    os.environ["TRITON_LIBCUDA_PATH"] = str(FOLDER)
    module = importlib.import_module("triton.backends.nvidia.driver")
    return Driver(gpu.capability, device, module.CudaUtils(), module.CudaLauncher)


class Shim:
    """The tests' shim for the CUDA kernels, as it writes down launches on a GPU instead of running them."""

    def __init__(self) -> None:
        build = importlib.import_module("tests.cuda_shim.build")
        if reason := build.missing():
            raise RuntimeError(reason)
        torch.ops.load_library(build.OUT / "shim.so")
        self._ops = torch.ops.labelsmooth_cuda_shim

    def pretend(self, gpu: Gpu) -> None:
        major, minor = gpu.capability
        self._ops.pretend(10 * major + minor, gpu.multiprocessors, gpu.shared_per_multiprocessor)

    def launches(self) -> list[Launch]:
        """Those since the last look."""
        lines = (line.split(maxsplit=4) for line in self._ops.launched().splitlines())
        return [Launch(kernel, *map(int, numbers)) for *numbers, kernel in lines]
