"""``python bench/compile_ahead.py PART OF``: fill Triton's cache for a Hopper GPU, on a machine without one.

The operators run on tensors without memory, with the launch replaced by a compilation. The package must be installed:
this tree's folder of that name comes last on the path, since it holds no kernels before it is installed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:1] = []
sys.path.append(str(ROOT))

import torch  # noqa: E402

from bench import counters, first, parity, stand_in  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def calls(ops: Any) -> Iterator[tuple[Any, ...]]:
    """(operator, its arguments) of what the first stages call, kernels that they share many times."""
    shapes = {(n, k, dtype) for n, k in (*first.SHAPES, *parity.SHAPES) for dtype in DTYPES} | set(counters.SHAPES)
    shapes |= {(4096, 128256, torch.bfloat16), (512, 5000, torch.bfloat16), (512, 5000, torch.float32)}  # heads' chunks
    for n, k, dtype in sorted(shapes, key=str):
        new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731
        x, y = new(n, k, dtype=dtype), new(n, dtype=torch.int64)
        for scale in (None, new(1), new(n)):
            row = (y, None, None, 0.1, None, scale, -100, False, False, 0.0, 0.0, 1.0, None)
            if scale is None or scale.numel() == 1:
                yield ops.forward, x, *row, False, 0
            if scale is not None and scale.numel() == 1:
                yield ops.forward, x, *row, True, 0
            if scale is not None:
                yield ops.backward, x, *row, new(4, n)
        yield ops.scale_, x, new(())


def main(part: int, parts: int) -> None:
    from labelsmooth_kernels.triton_kernels import launch, logits

    mine: dict[Any, bool] = {}

    def wanted(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
        key = (kernel.fn.__name__, *map(str, options.values()), *(describe(a) for a in arguments))
        return mine.setdefault(key, len(mine) % parts == part)

    begin = time.monotonic()
    with stand_in.compiling(launch, stand_in.GPUS["H100"][:2], wanted):
        for operator, *arguments in calls(logits):
            operator(*arguments)
    distinct = sum(mine.values())
    print(f"part {part}: {distinct} kernels of {len(mine)}, {time.monotonic() - begin:.0f} s", flush=True)


def describe(argument: Any) -> str:
    """What a kernel is compiled for, of one argument."""
    if isinstance(argument, tuple):
        return f"({','.join(map(describe, argument))})"
    if isinstance(argument, torch.Tensor):
        return str(argument.dtype)
    return type(argument).__name__


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
