"""What the ranks of a process group tell each other: before a call, what must be the same; in it, their numbers."""

from __future__ import annotations

import itertools
import json
import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .fusing import fused, fuses
from .shards import Found, Layout, Whole, merge, packed
from .spec import ArgumentError, Rows, check_index_targets, check_prior_mass
from .torch_state import outside_graphs, recorded

MANY = 16
"""Up to so many ranks one message is as fast as two: its bytes take less time than a message does."""
_HEADER = 2048  # bytes that a rank tells before a call
_KEPT = 256
OWN = ("classes", "mass of smoothing")
"""Facts that every rank has its own of: how many classes, and the sum of their prior (None where nobody looked)."""
_ERRORS = {kind.__name__: kind for kind in (ArgumentError, IndexError, NotImplementedError, TypeError)}
_agreed: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def group_of(group: Any) -> Any:
    """The process group that an argument names."""
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError("group must be a process group, and torch.distributed has none: call init_process_group")
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(f"group must be a process group that this rank belongs to or None, got {group!r}")
    return group


def group_named(name: str) -> Any:
    """The process group with this ``group_name``: operators take no other objects."""
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type, attr-defined]


def all_gather(sent: Tensor, group: Any) -> tuple[Tensor, Any]:
    """(what all ranks sent, (ranks, ...); the work to wait for)"""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # PyTorch 2.13 renamed it
    got = sent.new_empty(dist.get_world_size(group), *sent.shape)
    return got, gather(got.flatten(0, 1) if sent.dim() > 1 else got.flatten(), sent, group=group, async_op=True)


def refuse_graph() -> None:
    """Of a backward: what it returns must not look as if it had been differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError("create_graph=True is not served where classes are sharded: differentiate whole logits")


class Agreement:
    """The exchange of facts before a call, begun here and looked at in :meth:`wait`. The facts are the same on every
    rank, but for :data:`OWN`; "error" holds the kind and the text of an error instead.

    To look waits for a GPU. So there, where the facts name the classes of all ranks, what was agreed once holds from
    then on: as long as as many classes are always cut alike, all ranks know the facts, or none does.
    """

    def __init__(self, group: Any, facts: dict[str, Any], device: torch.device) -> None:
        if "error" in facts:
            kind, text = facts["error"]
            while len(json.dumps(facts)) > _HEADER:
                text = text[: len(text) * 3 // 4]
                facts = {"error": [kind, text]}
        self.group, self.mine, self.work = group, json.dumps(facts), None
        self.kept = device.type != "cpu" and facts.get("num_classes") is not None
        if self.kept and self.mine in _agreed.setdefault(group, {}):
            return
        header = torch.frombuffer(bytearray(self.mine.ljust(_HEADER), "ascii"), dtype=torch.uint8)
        self.headers, self.work = all_gather(header.to(device), group)

    def wait(self) -> Layout:
        """Where this rank's classes lie; raises, on every rank, where one has refused or two disagree."""
        rank = dist.get_rank(self.group)
        if self.work is None:
            return Layout(rank, _agreed[self.group][self.mine])
        self.work.wait()
        facts = [json.loads(bytes(row)) for row in self.headers.cpu().tolist()]
        for r, fact in enumerate(facts):
            if "error" in fact:
                kind, text = fact["error"]
                raise _ERRORS.get(kind, RuntimeError)(f"rank {r}: {text}")
        for name in dict.fromkeys(itertools.chain(*facts)):
            values = [fact.get(name) for fact in facts]
            if name not in OWN and any(value != values[0] for value in values):
                raise ArgumentError(
                    f"{name} must be the same on all ranks, got {values} on ranks 0 to {len(facts) - 1}"
                )
        starts = [0]
        for fact in facts:
            starts.append(starts[-1] + fact["classes"])
        _check_masses(facts, starts[-1])
        known = facts[0].get("num_classes")
        if known not in (None, starts[-1]):
            raise ArgumentError(f"num_classes must be that of all ranks together, {starts[-1]}, got {known}")
        if self.kept:
            if len(_agreed[self.group]) >= _KEPT:
                _agreed[self.group].clear()  # on all ranks at once: they make the same calls
            _agreed[self.group][self.mine] = tuple(starts)
        return Layout(rank, tuple(starts))


def _check_masses(facts: list[dict[str, Any]], num_classes: int) -> None:
    """Raise where a prior, of which every rank has read its part, is not normalised."""
    masses = [mass for fact in facts if (mass := fact.get("mass of smoothing")) is not None]
    if len(masses) == len(facts):
        check_prior_mass(sum(masses), num_classes)


class told:  # noqa: N801  # with told(group, input):
    """An error that a rank finds in its own arguments is every rank's: the others would wait for it."""

    def __init__(self, group: Any, input: object) -> None:
        if recorded():  # which has no place for a process group, not even to tell the others
            raise NotImplementedError("torch.jit.trace is not served where classes are sharded: use torch.compile")
        self.group, self.input = group, input

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self._tell(error)

    @outside_graphs("an argument of labelsmooth_kernels.parallel is refused: plain Python tells which")
    def _tell(self, error: Exception) -> None:
        served = [device.type for device in self.group._device_types]
        device = torch.device("cpu" if "cpu" in served else served[0])
        device = self.input.device if isinstance(self.input, Tensor) else device
        Agreement(self.group, {"error": [type(error).__name__, str(error)]}, device).wait()


def check_together(rows: Rows, layout: Layout) -> None:
    """What needs the classes of all ranks, and fails on all of them alike."""
    if rows.spec.others and layout.num_classes == 1 and rows.spec.smooths:
        raise ArgumentError("smoothing='others' needs at least 2 classes, got 1: there is no other to smooth over")
    if rows.logits.device.type == "cpu" and rows.index_target:
        check_index_targets(rows.target, layout.num_classes, rows.spec.ignore_index)


class Exchange:
    """The numbers of a call's or a chunk's rows, under way from here on until :meth:`wait`.

    One message where few ranks are: all send all rows' numbers to all. Where many are, that would be as many times the
    bytes; there each rank merges a part of the rows, and sends what it found to all: two messages, 1/ranks of the work.
    """

    def __init__(self, found: Found, rows: Rows, layout: Layout, group: Any) -> None:
        device = rows.logits.device
        if fuses(device) and not isinstance(rows.eps, Tensor):  # every number would be compiled anew
            rows = rows._replace(eps=torch.full((1,), rows.eps, dtype=torch.float64, device=device))
        self.rows, self.layout, self.group = rows, layout, group
        of_target = {"z_y": rows.index_target, "w_y": rows.index_target and rows.weight is not None}
        self.sent = tuple(v is not None or of_target.get(name, False) for name, v in found._asdict().items())
        mine = fused(packed, device)(found, rows, layout.place)
        n, ranks = mine.shape[1], dist.get_world_size(group)
        self.each = -(-n // ranks) if ranks > MANY else 0
        if self.each == 0:
            self.got, self.work = all_gather(mine, group)
            return
        mine = torch.nn.functional.pad(mine, (0, self.each * ranks - n))
        mine = mine.unflatten(1, (ranks, self.each)).movedim(1, 0).contiguous()
        self.got = torch.empty_like(mine)
        self.work = dist.all_to_all_single(self.got, mine, group=group, async_op=True)

    def wait(self) -> Whole:
        self.work.wait()
        rows, device = self.rows if self.each == 0 else self._part(), self.got.device
        whole = fused(merge, device)(self.got, self.sent, rows, self.layout.starts_on(device))
        if self.each == 0:
            return whole
        got, work = all_gather(whole.packed(), self.group)
        work.wait()
        return whole.unpacked(got.movedim(0, 1).flatten(1)[:, : self.rows.n])

    def _part(self) -> Rows:
        """The rows that this rank merges, filled up with ignored ones."""
        begin, rows = self.each * self.layout.rank, self.rows
        n, index = rows.n, torch.arange(begin, begin + self.each, device=rows.target.device)
        at = index.clamp_max(n - 1)
        target = rows.target
        if rows.index_target:
            target = torch.where(index < n, target[at], rows.spec.ignore_index)
        eps = rows.eps[at] if isinstance(rows.eps, Tensor) and rows.eps.numel() > 1 else rows.eps
        return rows._replace(target=target, eps=eps)
