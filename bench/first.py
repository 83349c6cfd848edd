"""The cases of the first minutes on a GPU, what was predicted of them, and the table that holds both together.

The predictions come from counting: bytes over the speed of a copy, instructions in the machine code over the rate at
which a multiprocessor issues them. They were made before any kernel had run on a GPU, and stay as they were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import linear, logits, results
from .harness import Case, Entry
from .report import Table, number

if TYPE_CHECKING:
    from collections.abc import Iterable

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = ((8192, 128256), (8192, 32000), (32768, 32000), (4096, 50257), (8192, 4096), (16, 128256))
HEADS = (4096, 8192, 16384)  # rows; K = 128,256, D = 4,096

# (n, k, dtype): ms on an H100 and on an H200, of the Triton kernels and of the CUDA C++ kernels.
PREDICTED = {
    (8192, 32000, "bf16"): {"H100": (0.62, 0.55), "H200": (0.60, 0.53)},
    (8192, 128256, "bf16"): {"H100": (2.6, 2.2), "H200": (2.4, 2.1)},
    (32768, 32000, "bf16"): {"H100": (2.4, 2.2), "H200": (2.3, 2.1)},
    (8192, 128256, "fp32"): {"H100": (4.4, 3.1), "H200": (3.2, 2.5)},
    (16, 128256, "bf16"): {"H100": (0.030, 0.025), "H200": (0.030, 0.025)},
}
PREDICTED_HEAD = {"H100": 40.0, "H200": 39.0}  # 8192 × 128,256, D 4,096, bf16


def at_logits(device: str) -> list[Entry]:
    task = logits.Logits(with_compile=False, with_peers=False)
    shapes = SHAPES if device == "cuda" else ((64, 1000), (8, 4096))
    return [Entry(task, Case("logits", n, k, dtype=dtype, device=device)) for n, k in shapes for dtype in (BF16, F32)]


def at_heads(device: str) -> list[Entry]:
    if device == "cpu":
        return [Entry(linear.Linear(with_peers=False), Case("linear", 64, 1000, 64, F32))]
    return [
        Entry(
            linear.Linear(with_peers=False, chunk_rows=(2048, 8192), tiled=False),
            Case("linear", n, 128256, 4096, device="cuda"),
        )
        for n in HEADS
    ]


def beside_peers(device: str) -> list[Entry]:
    """The same shapes again, with the losses of others in the same rounds; then options, layouts and few rows."""
    if device == "cpu":
        return [Entry(logits.Logits(False, interpreted=False), Case("peers", 8, 512, dtype=F32))]
    bare = logits.Logits(with_compile=False)
    found = [Entry(bare, Case("peers", n, k, device="cuda")) for n, k in SHAPES[:3]]
    found.append(Entry(linear.Linear(chunk_rows=(), tiled=True), Case("peers", 4096, 128256, 4096, device="cuda"), 4))
    for change in ({"backward": False}, {"dtype": torch.float16}, {"eps": 0.0}, {"data": "zipf"}):
        found.append(Entry(bare, Case("peers", 8192, 128256, device="cuda", **change)))
    return found


def entries(device: str) -> list[Entry]:
    return [*at_logits(device), *at_heads(device), *beside_peers(device)]


def predicted(record: dict[str, Any]) -> float | None:
    """What was said beforehand of one row on its card, in ms."""
    card = next((name for name in ("H100", "H200") if name in record["device"]), "")
    sizes, provider = record["sizes"], record["provider"]
    if not card or not sizes.get("backward"):
        return None
    if sizes["d"]:
        wanted = (sizes["n"], sizes["k"], sizes["d"]) == (8192, 128256, 4096) and provider == linear.OURS
        return PREDICTED_HEAD[card] if wanted else None
    pair = PREDICTED.get((sizes["n"], sizes["k"], sizes["dtype"]), {}).get(card)
    names = (logits.OURS, logits.CUDA)
    return pair[names.index(provider)] if pair and provider in names else None


MISSED = 0.15  # a prediction that is off by more is to be explained


def summary(records: Iterable[dict[str, Any]]) -> str:
    """Each case: our ways and PyTorch's beside the ceiling of the same rounds and the prediction."""
    header = ["case", "", "ms", "% of ceiling", "× ours", "predicted, ms", ""]
    rows = []
    for record in results.newest([r for r in records if r["group"] in ("logits", "linear", "peers")]):
        said, ms = predicted(record), record.get("ms")
        off = "" if said is None or ms is None else f"{100 * (ms / said - 1):+.0f} %"
        verdict = record.get("refused", off + (" **missed**" if off and abs(ms / said - 1) > MISSED else ""))
        cells = (number(ms), number(record.get("percent_of_ceiling")), number(record.get("ratio")), number(said))
        rows.append([record["case"], record["provider"], *cells, verdict])
    return Table("", header, rows).markdown()
