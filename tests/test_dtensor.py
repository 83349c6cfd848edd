"""DTensors as they come out of tensor-parallel layers, and FSDP2's weights, beside one process with all of it."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sharded import EPS, D, N, draw, needs_gloo, options, spawn
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module

import labelsmooth_kernels as lsk
from labelsmooth_kernels.distillation import distillation_loss

PROGRAM = Path(__file__).parent.parent / "examples" / "train_tp.py"
pytestmark = needs_gloo


def close(got: Tensor, want: Tensor) -> None:
    got = got.full_tensor() if isinstance(got, DTensor) else got
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def _logits(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for k in (16, 5, 1):  # evenly, unevenly, and none at all for one rank
        x, y, *_ = draw(k)
        for name, given in options(k).items():
            if "ignored" in name or (k == 1 and name == "others"):
                continue
            full, leaf = x.clone().requires_grad_(), distribute_tensor(x, mesh, [Shard(1)]).requires_grad_()
            want, want_stats = lsk.cross_entropy(full, y, return_stats=True, **given)
            got, stats = lsk.cross_entropy(leaf, y, return_stats=True, **given)
            close(got, want)
            close(stats.nll, want_stats.nll)
            (grad,) = torch.autograd.grad(got.sum(), leaf)
            (want_grad,) = torch.autograd.grad(want.sum(), full)
            assert isinstance(grad, DTensor)
            assert grad.placements == leaf.placements
            close(grad, want_grad)
    x, y, *_ = draw(16)
    weight = options(16)["class weights"]["weight"]
    placed = distribute_tensor(weight, mesh, [Shard(0)])
    sharded, target = distribute_tensor(x, mesh, [Shard(1)]), distribute_tensor(y, mesh, [Replicate()])
    close(lsk.cross_entropy(sharded, target, placed), lsk.cross_entropy(x, y, weight))
    close(lsk.cross_entropy(distribute_tensor(x, mesh, [Replicate()]), y, weight), lsk.cross_entropy(x, y, weight))
    soft, everyone = x.softmax(1), [Replicate()]
    want = lsk.cross_entropy(x, soft, label_smoothing=EPS)
    for k_soft in (soft, distribute_tensor(soft, mesh, [Shard(1)]), distribute_tensor(soft, mesh, everyone)):
        close(lsk.cross_entropy(sharded, k_soft, label_smoothing=EPS), want)
    rows = distribute_tensor(torch.rand(N, dtype=x.dtype), mesh, everyone)
    got = lsk.cross_entropy(
        sharded,
        y,
        row_weight=rows,
        label_smoothing=distribute_tensor(torch.tensor([EPS], dtype=x.dtype), mesh, everyone),
    )
    close(got, lsk.cross_entropy(x, y, row_weight=rows.to_local(), label_smoothing=EPS))
    with pytest.raises(TypeError, match="rank 0: input must be a plain tensor of this rank, got a DTensor"):
        lsk.parallel.cross_entropy(sharded, y)
    learnt = distribute_tensor(soft, mesh, everyone).requires_grad_()
    lsk.cross_entropy(sharded, learnt, label_smoothing=EPS).backward()
    full = soft.clone().requires_grad_()
    lsk.cross_entropy(x, full, label_smoothing=EPS).backward()
    close(learnt.grad, full.grad)
    with pytest.raises(lsk.ArgumentError, match=r"rank 0: target must have shape \(12, 16\), one value per class"):
        lsk.cross_entropy(sharded, soft[:, :8])
    cube = distribute_tensor(x.reshape(3, 4, -1), mesh, [Shard(2)])
    close(
        lsk.CrossEntropyLoss(label_smoothing=EPS, class_dim=-1)(cube, y.reshape(3, 4)),
        F.cross_entropy(x, y, label_smoothing=EPS),
    )


def _colwise_head(rank: int) -> None:
    """A tensor-parallel head, trained a step; and what loss_parallel does."""
    mesh = init_device_mesh("cpu", (2,))
    _, y, hidden, head = draw(16)
    layers = [nn.Linear(D, 16, bias=True, dtype=torch.float64) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict({"weight": head, "bias": head[:, 0]})
    parallelize_module(layers[0], mesh, ColwiseParallel(use_local_output=False))
    logits = layers[0](hidden)
    assert logits.placements == (Shard(1),)
    lsk.cross_entropy(logits, y, label_smoothing=EPS).backward()
    F.cross_entropy(layers[1](hidden), y, label_smoothing=EPS).backward()
    for mine, want in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        close(mine.grad, want.grad)
    with loss_parallel():
        theirs = F.cross_entropy(layers[0](hidden), y)
        close(lsk.cross_entropy(layers[0](hidden), y), theirs.full_tensor())
        with pytest.raises((NotImplementedError, RuntimeError, AssertionError)):
            F.cross_entropy(layers[0](hidden), y, label_smoothing=EPS)  # the reason for ours


def _linear(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for k in (16, 5):
        _, y, hidden, head = draw(k)
        given: dict[str, Any] = options(k)["class weights and prior"]
        full = [t.clone().requires_grad_() for t in (hidden, head, head[:, 0])]
        want = lsk.linear_cross_entropy(full[0], full[1], y, linear_bias=full[2], **given)
        want.backward()
        for placed in (None, Replicate(), Shard(0)):
            h = hidden.clone() if placed is None else distribute_tensor(hidden, mesh, [placed])
            weight, bias = (distribute_tensor(t, mesh, [Shard(0)]).requires_grad_() for t in (head, head[:, 0]))
            got = lsk.linear_cross_entropy(h.requires_grad_(), weight, y, linear_bias=bias, chunk_rows=2, **given)
            got.backward()
            close(got, want)
            for mine, wanted in zip((h, weight, bias), full, strict=True):
                close(mine.grad, wanted.grad)
        bias = distribute_tensor(head[:, 0], mesh, [Replicate()]).requires_grad_()
        placed_head = distribute_tensor(head, mesh, [Shard(0)])
        lsk.linear_cross_entropy(hidden, placed_head, y, linear_bias=bias, **given).backward()
        close(bias.grad, full[2].grad)
        with pytest.raises(lsk.ArgumentError, match="rank 0: linear_bias must be a DTensor to get a gradient"):
            lsk.linear_cross_entropy(hidden, placed_head, y, linear_bias=full[2], **given)
        soft = (hidden @ head.T).softmax(1)
        top = lsk.TopK(*reversed(soft.topk(2)))
        for target in (soft, distribute_tensor(soft, mesh, [Shard(1)]), top):
            plain = target if target is top else soft
            want = lsk.linear_cross_entropy(hidden, head, plain, label_smoothing=EPS)
            close(lsk.linear_cross_entropy(hidden, placed_head, target, label_smoothing=EPS, class_dim=-1), want)
        whole = distribute_tensor(head, mesh, [Replicate()])
        close(lsk.linear_cross_entropy(hidden, whole, soft, class_dim=-1), lsk.linear_cross_entropy(hidden, head, soft))
        close(
            lsk.linear_cross_entropy(hidden, whole, y, label_smoothing=EPS),
            lsk.linear_cross_entropy(hidden, head, y, label_smoothing=EPS),
        )


def _refused(rank: int) -> None:
    mesh, flat = init_device_mesh("cpu", (2, 2)), init_device_mesh("cpu", (4,))
    x, y, hidden, head = draw(16)
    for placements in ([Shard(0)], [Partial()]):
        with pytest.raises(
            lsk.ArgumentError, match="input must have its classes sharded on one mesh dimension at most"
        ):
            lsk.cross_entropy(DTensor.from_local(x, flat, placements), y)
    with pytest.raises(lsk.ArgumentError, match=r"input must have its classes sharded.*got .*redistribute"):
        lsk.cross_entropy(distribute_tensor(x, mesh, [Shard(1), Shard(1)]), y)
    sharded = distribute_tensor(x, mesh, [Replicate(), Shard(1)])
    close(lsk.cross_entropy(sharded, y, label_smoothing=EPS), F.cross_entropy(x, y, label_smoothing=EPS))
    with pytest.raises(
        lsk.ArgumentError, match=r"rank 0: weight must have shape \(16,\), one value per class, got \(8,\)"
    ):
        lsk.cross_entropy(sharded, y, torch.ones(8))
    with pytest.raises(lsk.ArgumentError, match="rank 0: target must be replicated"):
        lsk.cross_entropy(sharded, distribute_tensor(y, mesh, [Shard(0), Replicate()]))
    with pytest.raises(lsk.ArgumentError, match=r"rank 1: label_smoothing must be a finite .*got 2\.0"):
        lsk.cross_entropy(sharded, y, label_smoothing=2.0 if mesh.get_local_rank(1) else 0.1)
    placed = distribute_tensor(head, mesh, [Replicate(), Shard(0)])
    with pytest.raises(
        lsk.ArgumentError, match="rank 0: method must be 'chunked' where classes are sharded, got 'tiled'"
    ):
        lsk.linear_cross_entropy(hidden, placed, y, method="tiled")
    with pytest.raises(
        lsk.ArgumentError, match="rank 0: input must be sharded on the mesh dimension of linear_weight, 1, got 0"
    ):
        lsk.linear_cross_entropy(distribute_tensor(hidden, mesh, [Shard(0), Replicate()]), placed, y)
    with pytest.raises(lsk.ArgumentError, match="rank 0: input must have slices of one size on 2 ranks, got 11 rows"):
        lsk.linear_cross_entropy(distribute_tensor(hidden[1:], mesh, [Replicate(), Shard(0)]), placed, y[1:])
    with pytest.raises(lsk.ArgumentError, match=r"rank 1: weight must have shape \(16,\)"):
        lsk.cross_entropy(sharded, y, torch.ones(15 if mesh.get_local_rank(1) else 16))
    plain = (
        r"must be a plain tensor, got a DTensor: cross_entropy and linear_cross_entropy serve them .*full_tensor\(\)"
    )
    for name, call in {
        "input": lambda: distillation_loss(sharded, x, y),
        "teacher": lambda: distillation_loss(x, sharded, y),
        "weight": lambda: lsk.cross_entropy(x, y, distribute_tensor(torch.ones(16), mesh, [Replicate(), Replicate()])),
        "linear_weight": lambda: lsk.calibration.evaluate_classwise(hidden, y, placed),
        "normalizer": lambda: lsk.cross_entropy(
            x, y, normalizer=distribute_tensor(torch.ones(()), mesh, [Replicate(), Replicate()])
        ),
    }.items():
        with pytest.raises(lsk.ArgumentError, match=f"^{name} {plain}"):
            call()
    with pytest.raises(lsk.ArgumentError, match="linear_weight must be a DTensor beside an input that is one"):
        lsk.linear_cross_entropy(distribute_tensor(hidden, mesh, [Replicate(), Replicate()]), head, y)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D, dtype=torch.float64)
        self.loss = lsk.LinearCrossEntropyLoss(D, 16, label_smoothing=EPS, bias=True, dtype=torch.float64)

    def forward(self, hidden: Tensor, y: Tensor, normalizer: Tensor | None = None) -> Tensor:
        loss: Tensor = self.loss(torch.tanh(self.layer(hidden)), y, normalizer=normalizer)
        return loss


def _fsdp(rank: int, tensor_parallel: bool) -> None:
    """FSDP2 over one mesh dimension, the head's classes over the other; each data rank sees its rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    _, y, hidden, _ = draw(16)
    torch.manual_seed(0)
    alone, model = Model(), Model()
    model.load_state_dict(alone.state_dict())
    if tensor_parallel:
        for name, parameter in list(model.loss.linear.named_parameters()):
            placed = distribute_tensor(parameter.detach(), mesh["classes"], [Shard(0)])
            setattr(model.loss.linear, name, nn.Parameter(placed))
    fully_shard(model.loss, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    rows = slice(0, 7) if mesh["data"].get_local_rank() == 0 else slice(7, N)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (alone, model)]
    for _ in range(3):
        alone(hidden, y).backward()
        count = lsk.parallel.token_count(y[rows], mesh["data"].get_group()) / 2  # FSDP averages gradients
        model(hidden[rows], y[rows], count).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for mine, want in zip(model.parameters(), alone.parameters(), strict=True):
        close(mine, want.detach())


@pytest.mark.parametrize(("run", "size"), [(_logits, 2), (_colwise_head, 2), (_linear, 2), (_refused, 4)])
def test_dtensors(run: Any, size: int, tmp_path: Path) -> None:
    spawn(run, size, tmp_path)


@pytest.mark.parametrize("tensor_parallel", [False, True])
def test_fsdp(tensor_parallel: bool, tmp_path: Path) -> None:
    spawn(_fsdp, 4, tmp_path, tensor_parallel)


def _example(rank: int) -> None:
    sys.path.insert(0, str(PROGRAM.parent))
    program = importlib.import_module(PROGRAM.stem)
    words = torch.randint(2000, (10_000,), generator=torch.Generator().manual_seed(0))
    vars(program)["read_words"] = lambda _: (words, None)  # to read text takes half of the test
    small = argparse.Namespace(device="cpu", data=1, vocabulary=2000, steps=3, rows=4, bound=1e-4)
    assert program.run(small)


def test_the_example(tmp_path: Path) -> None:
    """Its own check of the curves, at a small size."""
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    spawn(_example, 2, tmp_path)


@pytest.mark.repeats  # test_data_parallel starts a program by torchrun, and test_fsdp has 2 x 2 processes
@pytest.mark.parametrize("arguments", [("2",), ("4", "--data", "2")], ids=["2", "2 x 2"])
def test_the_example_by_torchrun(arguments: tuple[str, ...]) -> None:
    for name in ("matplotlib", "tqdm"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    size, *more = arguments
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, str(PROGRAM)]
    small = ["--vocabulary", "2000", "--steps", "3", "--rows", "4", *more]
    ended = subprocess.run([*launch, *small], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "one curve" in ended.stdout
