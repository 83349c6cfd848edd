"""DTensors in, by their placements: which process group holds the classes, and what a rank has of them.

Served: logits whose classes, or a head whose rows, are sharded on one dimension of the mesh, all the rest replicated;
hidden states replicated, or sharded along their first dimension on the mesh dimension of the head (sequence
parallelism). Losses and statistics come out as plain tensors, the same on every rank; gradients as DTensors placed like
what they are the gradients of. What has a value per class (class weights, priors, biases, probabilities as targets) may
be whole, or a DTensor placed like the classes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import functional, linear, parallel
from .ranks import told
from .spec import ArgumentError, LossSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .reference import RowStats
    from .targets import Teacher, TopK

    Result = Tensor | tuple[Tensor, RowStats]


def spec_of(input: DTensor, options: dict[str, Any]) -> LossSpec:
    """The options of a call, a bad one of which every rank that holds a part of ``input`` is to know."""
    at = [i for i, placement in enumerate(input.placements) if isinstance(placement, Shard)]
    if len(at) != 1:  # refused later, on every rank, or on one device each
        return LossSpec(**options)
    with told(input.device_mesh.get_group(at[0]), input.to_local()):
        return LossSpec(**options)


def cross_entropy(input: DTensor, target: Tensor, spec: LossSpec) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`labelsmooth_kernels.cross_entropy` of logits that are a DTensor."""
    dim = 0 if input.dim() == 1 else spec.class_dim % input.dim()
    mesh, local, k = input.device_mesh, input.to_local(), input.shape[dim]
    at = _sharded("input", input, dim, "its classes")
    if at is None:
        return functional.apply_spec(local, _target(target, k, mesh, at, dim), _local_spec(spec, k, mesh, at))
    group = mesh.get_group(at)
    with told(group, local):
        y, of_rank = _target(target, k, mesh, at, dim), _local_spec(spec, k, mesh, at)
    return parallel.apply_spec(local, y, of_rank, group, k)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor | TopK | Teacher,
    linear_bias: Tensor | None,
    given: dict[str, Any],
    chunks: dict[str, Any],
    only_here: dict[str, Any],
) -> Tensor | tuple[Tensor, RowStats]:
    """:func:`labelsmooth_kernels.linear_cross_entropy` where the head, or the hidden states, are DTensors."""
    if not isinstance(linear_weight, DTensor):
        raise ArgumentError(
            "linear_weight must be a DTensor beside an input that is one: distribute_tensor makes it one"
        )
    at = _sharded("linear_weight", linear_weight, 0, "its rows")
    mesh, k, along = linear_weight.device_mesh, linear_weight.shape[0], input.dim() - 1
    if at is None:
        vectors, y = _local(given | {"linear_bias": linear_bias}, k, mesh, at), _target(target, k, mesh, at, along)
        hidden, head = _whole("input", input), linear_weight.to_local()
        found: Result = linear.linear_cross_entropy(hidden, head, y, **vectors, **chunks, **only_here)
        return found
    group, head = mesh.get_group(at), linear_weight.to_local()
    with told(group, head):
        vectors, y = _local(given | {"linear_bias": linear_bias}, k, mesh, at), _target(target, k, mesh, at, along)
        for name, default in (("skip_ignored", None), ("method", "chunked"), ("filter_eps", None)):
            if only_here[name] is not False and only_here[name] != default:
                raise ArgumentError(f"{name} must be {default!r} where classes are sharded, got {only_here[name]!r}")
        reduce, hidden = _hidden(input, linear_weight, at)
    of_ranks: Result = parallel.linear_cross_entropy(
        hidden, head, y, group=group, num_classes=k, grad_reduce=reduce, **vectors, **chunks
    )
    return of_ranks


def _hidden(input: Tensor, linear_weight: DTensor, at: int) -> tuple[str, Tensor]:
    """(grad_reduce, what a rank has of the hidden states)"""
    if not isinstance(input, DTensor):
        return "all", input
    rows, size = _sharded("input", input, 0, "its first dimension"), linear_weight.device_mesh.size(at)
    if rows not in (None, at):
        raise ArgumentError(f"input must be sharded on the mesh dimension of linear_weight, {at}, got {rows}")
    if rows is not None and input.shape[0] % size:
        raise ArgumentError(f"input must have slices of one size on {size} ranks, got {input.shape[0]} rows")
    return "all" if rows is None else "scatter", input.to_local()


def _sharded(name: str, tensor: DTensor, dim: int, what: str) -> int | None:
    """The mesh dimension on which ``dim`` is sharded, where that is all the placement says; None where it is not."""
    found = [i for i, p in enumerate(tensor.placements) if isinstance(p, Shard) and p.dim % tensor.dim() == dim]
    others = [p for i, p in enumerate(tensor.placements) if i not in found]
    if len(found) > 1 or not all(isinstance(p, Replicate) for p in others):
        raise ArgumentError(
            f"{name} must have {what} sharded on one mesh dimension at most and be replicated on the others, got "
            f"{tuple(tensor.placements)}: redistribute() it"
        )
    return found[0] if found else None


def _whole(name: str, tensor: Any) -> Any:
    """What every rank has all of."""
    if not isinstance(tensor, DTensor):
        return tensor
    if not all(isinstance(p, Replicate) for p in tensor.placements):
        raise ArgumentError(f"{name} must be replicated, got {tuple(tensor.placements)}: redistribute() it")
    return tensor.to_local()


def _of_rank(name: str, tensor: Tensor, k: int, mesh: DeviceMesh, at: int | None, along: int = 0) -> Tensor:
    """The part of a tensor with a value per class ``along`` a dimension that belongs to this rank's classes."""
    if isinstance(tensor, DTensor) and at is not None and _sharded(name, tensor, along, "its classes") == at:
        return tensor.to_local()
    whole: Tensor = _whole(name, tensor)
    want = (*whole.shape[:along], k, *whole.shape[along + 1 :])
    if whole.shape != want:
        raise ArgumentError(f"{name} must have shape {want}, one value per class, got {tuple(whole.shape)}")
    if at is None:
        return whole
    if tensor.requires_grad and not isinstance(tensor, DTensor):
        raise ArgumentError(f"{name} must be a DTensor to get a gradient beside one: distribute_tensor()")
    if isinstance(tensor, DTensor):  # so that a gradient comes back whole
        placements = [Shard(along) if i == at else p for i, p in enumerate(tensor.placements)]
        return tensor.redistribute(placements=placements).to_local()
    each = -(-k // mesh.size(at))  # as Shard cuts: like torch.chunk
    begin = min(each * mesh.get_local_rank(at), k)
    return whole.narrow(along, begin, min(each, k - begin))


def _target(target: Any, k: int, mesh: DeviceMesh, at: int | None, along: int) -> Any:
    """Class indices and top-k rows whole, of class probabilities this rank's."""
    soft = isinstance(target, Tensor) and target.is_floating_point() and target.dim() > along
    if isinstance(target, tuple):  # TopK, Teacher
        return type(target)(*(_whole("target", part) for part in target))
    return _of_rank("target", target, k, mesh, at, along) if soft else _whole("target", target)


def _local(options: dict[str, Any], k: int, mesh: DeviceMesh, at: int | None) -> dict[str, Any]:
    """Options as this rank has them: of a value per class its part, of all others the whole."""
    per_class = ("linear_bias", "weight", "smoothing")
    return {
        name: _of_rank(name, value, k, mesh, at)
        if name in per_class and isinstance(value, Tensor)
        else _whole(name, value)
        for name, value in options.items()
    }


def _local_spec(spec: LossSpec, k: int, mesh: DeviceMesh, at: int | None) -> LossSpec:
    tensors = {name: value for name in spec.__slots__ if isinstance(value := getattr(spec, name), Tensor)}
    return dataclasses.replace(spec, **_local(tensors, k, mesh, at))
