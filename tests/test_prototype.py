"""The cluster row kernel of bench/prototypes, without a GPU: what it refuses, and what is claimed of its machine code.

Its speed rests on a row that stays on chip and on few instructions: in the time of a copy an H100 issues about 42 for
each bfloat16 logit. The results are held on a GPU, by the gate of ``python -m bench.prototype``.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
from bench import logits, prototype
from bench.harness import Case, measure

if TYPE_CHECKING:
    from collections.abc import Iterator

CLASSES = {"__nv_bfloat16": 8, "float": 4}  # of a vector
REGISTERS = {256: 80, 512: 64}  # three blocks of 256 threads, two of 512
PER_CLASS = {"__nv_bfloat16": 16, "float": 18}  # instructions of both passes, per class
VALID = (2, 256, 2, 64, 32000)


class Kernel(NamedTuple):
    dtype: str
    threads: int
    registers: int
    code: list[tuple[int, str]]  # (address, instruction)


def tool(*command: str) -> str:
    triton = pytest.importorskip("triton", reason="Triton's wheel holds the disassemblers")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / command[0]
    return subprocess.run([str(path), *command[1:]], capture_output=True, text=True, check=True).stdout


def kernels(library: Path) -> Iterator[Kernel]:
    usage = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", str(library)))
    assert all(stack == "0" for _, _, stack in usage)
    registers = {name: int(count) for name, count, _ in usage}
    for part in tool("cuobjdump", "-sass", str(library)).split("Function : ")[1:]:
        name = part.split(maxsplit=1)[0]
        dtype = next(dtype for dtype in CLASSES if f"{dtype[0] if dtype == 'float' else dtype}Li" in name)
        found = re.search(r"Li(256|512)E", name)
        assert found is not None
        code = [(int(a, 16), text) for a, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", part)]
        yield Kernel(dtype, int(found[1]), registers[name], code)


def loops(code: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """From the target of every branch backward to the branch."""
    for i, (address, text) in enumerate(code):
        found = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if found is not None and int(found[1], 16) < address:
            yield [entry for entry in code[: i + 1] if entry[0] >= int(found[1], 16)]


def executed(loop: list[tuple[int, str]]) -> int:
    """Without what a branch jumps over in all vectors but one: the target's entry, which neither loads nor stores."""
    left, until = 0, 0
    for i, (address, text) in enumerate(loop):
        if address < until:
            continue
        left += 1
        found = re.match(r"@!?U?P\d+ BRA 0x([0-9a-f]+)", text)
        if found is not None and (target := int(found[1], 16)) > address:
            over = [entry for at, entry in loop[i + 1 :] if at < target]
            rare = not any(re.search(r"EX2|LDS|STG|BRA", entry) for entry in over)
            until = target if rare else until
    return left


def instructions_per_class(kernel: Kernel) -> float:
    """Of the loop over batches, with its waits and its rest, and of the one that writes four vectors of gradient."""
    both = {}
    for loop in loops(kernel.code):
        text = " ; ".join(entry for _, entry in loop)
        vectors, stores = len(re.findall(r"\bLDS\.128", text)), len(re.findall(r"\bSTG\.E\.\S*128", text))
        name = "sums" if "TRYWAIT" in text and vectors >= 4 else "gradient" if vectors == stores == 4 else None
        if name:
            both[name] = executed(loop) / (vectors * CLASSES[kernel.dtype])
    assert sorted(both) == ["gradient", "sums"]
    return sum(both.values())


def refusals(library: ctypes.CDLL) -> None:
    def refusal(**changes: int) -> int:
        names = ("itemsize", "threads", "cluster", "n", "num_classes")
        code: int = library.cluster_row_refusal(*(dict(zip(names, VALID, strict=True)) | changes).values())
        return code

    assert refusal() == 0
    assert [refusal(itemsize=8), refusal(threads=128)] == [-1, -1]
    assert [refusal(cluster=c) for c in (-1, 0, 3, 16)] == [-2] * 4
    assert [refusal(n=0), refusal(n=2**30), refusal(num_classes=0), refusal(num_classes=2**31)] == [-3] * 4
    assert [refusal(num_classes=k) for k in (1, 32004, 50257)] == [-4] * 3
    assert [refusal(num_classes=k) for k in (230272, 230400)] == [0, -5]  # 2 × (227 KiB - 2,176) bytes of a row
    nothing = [None] * 4
    for logits_at, grad_at in ((8, 16), (16, 8)):  # refused before a device is asked for
        arguments = (*VALID[:3], logits_at, grad_at, *nothing, *VALID[3:], 0.1, -100, None)
        assert library.cluster_row_launch(*arguments) == -6


@pytest.mark.slow
def test_the_kernel_refuses_and_compiles_as_claimed(tmp_path: Path) -> None:
    """One test, so that workers side by side compile once."""
    if prototype.toolkit() is None:
        pytest.skip("nvcc and the headers of CUDA are not on this machine")
    path = prototype.compile_library(tmp_path)
    library = prototype.load(path)
    refusals(library)
    case = Case("prototype", 8192, 128256, dtype=torch.float32)
    names = [p.name for p in prototype.Prototype(library=library).providers(case)]
    assert [name for name in names if "512" in name] == [f"cluster rows, C = {c}, 512 × 2" for c in (4, 8)]
    assert logits.COPY in names
    found = list(kernels(path))
    assert sorted((k.dtype, k.threads) for k in found) == sorted((d, t) for d in CLASSES for t in REGISTERS)
    for kernel in found:
        texts = [text for _, text in kernel.code]
        assert kernel.registers <= REGISTERS[kernel.threads]
        assert not [text for text in texts if re.search(r"\b(LDL|STL)\b", text)], "spills, or an array in memory"
        assert any("STAS.128" in text for text in texts), "sums are sent"
        assert any("UBLKCP" in text for text in texts), "rows come as bulk copies"
        assert not [text for text in texts if re.search(r"\bLDG\.E\.\S*128", text)], "each logit is read once"
        assert instructions_per_class(kernel) <= PER_CLASS[kernel.dtype]


class Library:
    """What the compiled library does, on the CPU; ``wrong`` is added to the gradient."""

    def __init__(self, wrong: float = 0.0, stuck: int = 0) -> None:
        self.wrong, self.stuck = wrong, stuck

    def cluster_row_refusal(self, itemsize: int, threads: int, cluster: int, n: int, k: int) -> int:
        return 0 if threads == 256 else -5

    def cluster_row_gave_up(self, words: Any) -> int:
        words[0] = self.stuck
        return 0

    def cluster_row_launch(self, *call: Any) -> int:
        x_at, grad_at, target_at, scale_at, loss_at, lse_at, n, k, eps = call[3:12]

        def at(address: int, dtype: torch.dtype, count: int) -> torch.Tensor:
            memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
            return torch.frombuffer(memory, dtype=dtype)

        z, target = at(x_at, torch.float32, n * k).view(n, k), at(target_at, torch.int64, n)
        lse, q = z.logsumexp(1), torch.full((n, k), eps / k)
        q.scatter_add_(1, target[:, None], torch.full((n, 1), 1 - eps))
        grad = ((z - lse[:, None]).exp() - q) * at(scale_at, torch.float32, 1) + self.wrong
        at(grad_at, torch.float32, n * k).copy_(grad.flatten())
        at(loss_at, torch.float32, n).copy_(lse - (q * z).sum(1))
        at(lse_at, torch.float32, n).copy_(lse)
        return 0


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Library(), None),
        (Library(wrong=1e-4), "the target is off by"),
        (Library(stuck=3), "a wait gave up: {'code': 3"),
    ],
)
def test_the_gate_holds_it(monkeypatch: pytest.MonkeyPatch, library: Library, said: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    task = prototype.Prototype(library=library)  # type: ignore[arg-type]
    rows = {row.provider: row for row in measure(Case("prototype", 4, 1000, dtype=torch.float32), task, 0.0)}
    row = rows["cluster rows, C = 2, 256 × 3"]
    assert (row.refused is None) if said is None else row.refused is not None and said in row.refused
    assert (row.percent_of_ceiling is not None) == (said is None)
    assert rows[logits.COPY].ms is not None


def test_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.prototype", "--device", "cpu"])
    assert prototype.main() == 2
    assert "compute capability 9.0" in capsys.readouterr().err
