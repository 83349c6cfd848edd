"""What a driver is asked for, without a GPU: grids, blocks, shared memory, clusters; how many launches a call takes."""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from cuda_shim import build

from bench import host, stand_in

if TYPE_CHECKING:
    from bench.harness import Row

pytest.importorskip("triton", reason="the stand-in is compiled beside Triton's headers")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver is here, and a process has one"),
]
INVALID_VALUE, NO_BINARY, NOT_FOUND, OUT_OF_RESOURCES, INVALID_CLUSTER = 1, 209, 500, 701, 912
SHARED, ANY_CLUSTER = 8, 14  # attributes of a function, by their numbers in cuda.h
CLUSTER = 4  # attribute of a launch


def cubin(architecture: int, registers: int, static_shared: int = 0) -> bytes:
    """As much of a kernel's file as a driver reads before a launch: its architecture, registers, shared memory."""
    record = struct.pack("<BBHII", 4, 0x2F, 8, 1, registers)
    names = b"\0.shstrtab\0.nv.info\0.nv.shared.kernel\0.text.kernel\0"
    contents = [(b"", 0), (b".shstrtab", names), (b".nv.info", record), (b".nv.shared.kernel", static_shared)]
    contents.append((b".text.kernel", 128))
    at, body, sections = 64, b"", b""
    for name, content in contents:
        size = content if isinstance(content, int) else len(content)
        offset = at + len(body)
        body += b"" if isinstance(content, int) else content
        sections += struct.pack(
            "<IIQQQQIIQQ", names.index(name + b"\0") if name else 0, 1, 0, 0, offset, size, 0, 0, 1, 0
        )
    identity = b"\x7fELF\2\1\1\x41\x08".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, at + len(body), architecture << 8, 64, 0, 0, 64, 5, 1)
    return identity + header + body + sections


class Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("size", ctypes.c_uint * 16))


class Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


@pytest.fixture(params=["H100", "RTX 4090"])
def gpu(request: pytest.FixtureRequest) -> stand_in.Gpu:
    found = stand_in.GPUS[request.param]
    stand_in.library().stand_in_use(stand_in.add(found))
    return found


def launched(image: bytes, blocks: int, threads: int, shared: int = 0, cluster: int = 1, **wanted: int) -> int:
    """The driver's answer to a launch, or to what comes before it: 0 where it was done."""
    library, module, function = stand_in.library(), ctypes.c_void_p(), ctypes.c_void_p()
    if code := library.cuModuleLoadData(ctypes.byref(module), image):
        return int(code)
    if code := library.cuModuleGetFunction(ctypes.byref(function), module, b"kernel"):
        return int(code)
    for name, value in wanted.items():
        if code := library.cuFuncSetAttribute(
            function, {"shared_limit": SHARED, "any_cluster": ANY_CLUSTER}[name], value
        ):
            return int(code)
    attribute = Attribute(CLUSTER, b"", (ctypes.c_uint * 16)(cluster, 1, 1))
    grid, block = ((ctypes.c_uint * 3)(size, 1, 1) for size in (blocks, threads))
    config = Config(grid, block, shared, None, ctypes.pointer(attribute), int(cluster > 1))
    return int(library.cuLaunchKernelEx(ctypes.byref(config), function, None, None))


def test_the_stand_in_refuses_what_a_driver_refuses(gpu: stand_in.Gpu) -> None:
    (major, minor), most = gpu.capability, gpu.shared_per_block
    image, before = cubin(10 * major + minor, 64), int(stand_in.library().stand_in_count())
    assert launched(image, 7, 256, 1000) == 0
    assert launched(image, 2**31 - 1, 1024, most, shared_limit=most) == 0
    assert launched(image, 0, 256) == launched(image, 2**31, 256) == INVALID_VALUE
    assert launched(image, 1, 0) == launched(image, 1, 1025) == INVALID_VALUE
    assert launched(image, 1, 256, 48 * 1024 + 1) == INVALID_VALUE, "more than what comes unasked"
    assert launched(image, 1, 256, 0, shared_limit=most + 1) == INVALID_VALUE
    reserved = 1024 if major >= 9 else 0  # counted as the kernel's own, but not taken from it
    full = cubin(10 * major + minor, 64, reserved + 4096)
    assert launched(full, 1, 256, 44 * 1024) == launched(full, 1, 256, most - 4096, shared_limit=most - 4096) == 0
    assert launched(full, 1, 256, 44 * 1024 + 1) == launched(full, 1, 256, 0, shared_limit=most - 4095) == INVALID_VALUE
    assert launched(cubin(10 * major + minor, 65), 1, 1024) == OUT_OF_RESOURCES
    assert launched(cubin(10 * major + minor + 1, 64), 1, 32) == launched(cubin(120, 64), 1, 32) == NO_BINARY
    assert launched(b"no such file".ljust(64), 1, 32) != 0
    assert launched(image.replace(b".text.kernel", b".text.kernal"), 1, 32) == NOT_FOUND
    allowed = (0, 0) if major >= 9 else (INVALID_CLUSTER, INVALID_CLUSTER)
    assert (launched(image, 32, 256, cluster=8), launched(image, 32, 256, cluster=16, any_cluster=1)) == allowed
    assert launched(image, 32, 256, cluster=16) == launched(image, 12, 256, cluster=8) == INVALID_CLUSTER
    made = int(stand_in.library().stand_in_count()) - before
    assert made == (6 if major >= 9 else 4), "what is refused is not written down as a launch"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True
    )


def test_the_table_of_launches() -> None:
    """Part of what ``make aot`` runs: two GPUs, the longest rows."""
    if reason := build.missing():
        pytest.skip(reason)
    done = run("tests/launch_check.py", "--gpu", "H100", "RTX 4090", "--calls", "bfloat16, K 128256")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": 0 rows" not in done.stdout


@pytest.mark.parametrize("backend", [host.EAGER, host.TRITON, host.CUDA])
def test_launches_of_forward_and_backward(backend: str) -> None:
    """A mean: valid rows are found and counted (3), inverted, the row kernel, the sum, its division, and backward the
    1 that autograd begins with and its product with the gradient."""
    if backend == host.CUDA and (reason := build.missing()):
        pytest.skip(reason)
    expected = {"mean": (22, 9), "sum": (18, 4), "no reduction": (16, 2), "mean, fp16": (22, 10)}
    # Too few rows for all multiprocessors: parts of rows, their merge and the gradient, or in C++ wider clusters.
    expected["mean, long rows"] = (22, 11 if backend == host.TRITON else 9)
    found = {row.case.partition(", ")[2]: row for row in counts() if row.provider == backend}
    assert {name: row.refused or row.count for name, row in found.items()} == {
        name: pair[backend != host.EAGER] for name, pair in expected.items()
    }


@functools.cache
def counts() -> list[Row]:
    return [row for row in host.rows(rounds=0) if row.group == host.LAUNCHES]
