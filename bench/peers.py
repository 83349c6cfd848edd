"""Losses of others, where they can be imported: names, how they are called, what they cannot do.

``pip install .[bench]`` fetches what is on PyPI. A peer that is not there, or not made for the device, is a row that
says so.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .harness import IGNORED, Case, Loss, Provider, losing, reason

if TYPE_CHECKING:
    from collections.abc import Callable


def mean(losses: Tensor, target: Tensor) -> Tensor:
    return losses.sum() / (target != IGNORED).sum()


def liger(module: Any) -> Loss:
    return lambda x, y, eps: module.liger_cross_entropy(x, y, label_smoothing=eps)


def liger_linear(module: Any, **options: Any) -> Loss:
    fused = module.liger_fused_linear_cross_entropy
    return lambda h, w, y, eps: fused(h, w, y, label_smoothing=eps, **options)


def quack(module: Any) -> Loss:
    return lambda x, y, eps: module.cross_entropy(x, y)


def quack_linear(module: Any) -> Loss:
    return lambda h, w, y, eps: module.chunked_linear_cross_entropy(h, w, y)


def cce(module: Any) -> Loss:
    return lambda h, w, y, eps: module.linear_cross_entropy(h, w, y)


def cce_exact(module: Any) -> Loss:
    return lambda h, w, y, eps: module.linear_cross_entropy(h, w, y, filter_eps=None)


def flash_attention(module: Any) -> Loss:
    return lambda x, y, eps: mean(module.cross_entropy_loss(x, y, label_smoothing=eps)[0], y)


def apex(module: Any) -> Loss:
    return lambda x, y, eps: mean(module.SoftmaxCrossEntropyLoss.apply(x, y, eps, IGNORED, True), y)


def transformer_engine(module: Any) -> Loss:
    return lambda x, y, eps: mean(module.parallel_cross_entropy(x[None], y[None], eps)[0], y)


class Peer(NamedTuple):
    name: str
    module: str
    adapter: Callable[[Any], Loss]
    traits: dict[str, Any]


CANNOT_SMOOTH = {"eps": 0.0, "note": "no smoothing"}
FUNCTIONAL = "liger_kernel.transformers.functional"
LIGER, LIGER_LINEAR = "Liger", "Liger, fused linear"
AT_LOGITS = (
    Peer(LIGER, FUNCTIONAL, liger, {"overwrites": True}),
    Peer("quack", "quack.cross_entropy", quack, CANNOT_SMOOTH),
    Peer("flash-attention", "flash_attn.ops.triton.cross_entropy", flash_attention, {}),
    Peer("apex", "apex.contrib.xentropy", apex, {}),
    Peer("Transformer Engine", "transformer_engine.pytorch", transformer_engine, {"overwrites": True}),
)
FUSED = (
    Peer(LIGER_LINEAR, FUNCTIONAL, liger_linear, {}),
    Peer(
        "Liger, fused linear, float32 sums",
        FUNCTIONAL,
        functools.partial(liger_linear, accum_dtype=torch.float32),
        {},
    ),
    Peer("CCE", "cut_cross_entropy", cce, CANNOT_SMOOTH),
    Peer("CCE without its filter", "cut_cross_entropy", cce_exact, CANNOT_SMOOTH),
    Peer("quack, fused linear", "quack.linear_cross_entropy", quack_linear, CANNOT_SMOOTH),
)


def providers(peers: tuple[Peer, ...], case: Case, *, interpreted: bool = False) -> list[Provider]:
    """A provider of every peer; on a CPU only ``interpreted``, which shows that a peer is called rightly."""
    found = []
    for peer in peers:
        if case.device == "cpu" and not interpreted:
            found.append(Provider(peer.name, None, refused="it needs a GPU"))
            continue
        try:
            loss = peer.adapter(importlib.import_module(peer.module))
        except Exception as error:  # a package may fail at import in any way, such as for want of a driver
            missing = isinstance(error, ModuleNotFoundError)
            found.append(Provider(peer.name, None, refused="not installed" if missing else reason(error)))
            continue
        found.append(losing(peer.name, loss, case, **peer.traits))
    return found
