"""Correct user code: type checkers accept each line and find the types that ``assert_type`` names; the tests run it."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, conventions, distillation, parallel, representation, smoothing
from labelsmooth_kernels.distillation import DistillationTerms, distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from labelsmooth_kernels.options import LossOptions

Pair = tuple[Tensor, lsk.RowStats]
K, D = 5, 3
logits, target = torch.randn(4, K, requires_grad=True), torch.tensor([0, 4, 2, 1])
hidden, head, bias = torch.randn(4, D), torch.randn(K, D, requires_grad=True), torch.zeros(K)
weight, prior, rows = torch.ones(K), torch.full((K,), 1 / K), torch.ones(4)
probabilities = logits.detach().softmax(1)
asked: bool = len(target) == 4
word: str = "entropy"


def logits_given() -> None:
    loss = assert_type(lsk.cross_entropy(logits, target, label_smoothing=0.1), Tensor)
    loss.backward()
    assert_type(lsk.cross_entropy(logits, target, weight, None, -100, None, "sum", 0.1), Tensor)
    assert_type(lsk.cross_entropy(logits, probabilities, label_smoothing=torch.tensor(0.1)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, reduction="none", row_weight=rows, smoothing=prior), Tensor)
    assert_type(lsk.cross_entropy(logits, target, z_loss=1e-4, softcap=30, logit_scale=2, smooth_over="finite"), Tensor)
    assert_type(lsk.cross_entropy(logits, target, normalizer="rows", confidence_penalty=0.1, class_dim=-1), Tensor)
    assert_type(lsk.cross_entropy(logits * 1, target, inplace=True, backend=None, return_stats=False), Tensor)
    loss, stats = assert_type(lsk.cross_entropy(logits, target, return_stats=True), Pair)
    assert_type(stats.prediction, Tensor)
    assert_type(lsk.cross_entropy(logits, target, weight, return_stats="all"), Pair)
    assert_type(lsk.cross_entropy(logits, target, return_stats=asked), "Tensor | Pair")
    assert_type(lsk.cross_entropy(logits, target, return_stats=word), "Tensor | Pair")
    assert_type(lsk.LossSpec(label_smoothing=0.1, smoothing="others").softcap, "float | None")
    loss_of: Callable[[Tensor, Tensor], Tensor] = lsk.cross_entropy
    loss_of(logits, target).backward()
    functools.partial(lsk.cross_entropy, label_smoothing=0.1)(logits, target).backward()
    assert_type(my_loss(logits, label_smoothing=0.1, softcap=None), Tensor)


def my_loss(x: Tensor, **options: Unpack[LossOptions]) -> Tensor:
    return lsk.cross_entropy(x, target, **options) + lsk.linear_cross_entropy(hidden, head, target, **options)


def other_projects() -> None:
    options = conventions.fairseq(0.1, padding_idx=1)
    assert_type(options["label_smoothing"], "float | Tensor")
    assert_type(lsk.cross_entropy(logits, target, **options), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.fairseq(0.1, 1, sample_size=3)), Tensor)
    assert_type(lsk.linear_cross_entropy(hidden, head, target, **conventions.espnet(0.1, 1)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.wenet(0.1, batch_size=2)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.nemo(0.1, 1, target)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.megatron(0.1), return_stats=True), Pair)
    assert_type(lsk.cross_entropy(logits, target, **conventions.opennmt(0.1, 1, torch.tensor(3))), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.opennmt_kl(0.1, K, 1)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.timm(), z_loss=1e-4), Tensor)
    assert_type(lsk.cross_entropy(logits, probabilities, **conventions.timm_soft_target()), Tensor)
    assert_type(lsk.CrossEntropyLoss(**conventions.hugging_face(0.1))(logits, target), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.keras(0.1, None, sample_weight=rows)), Tensor)
    assert_type(lsk.cross_entropy(logits, target, **conventions.optax(0.1)), Tensor)
    assert_type(conventions.target_entropy(0.1, K), float)
    assert_type(conventions.shift_labels(target), Tensor)


def without_logits() -> None:
    loss = assert_type(lsk.linear_cross_entropy(hidden, head, target, linear_bias=bias, weight=weight), Tensor)
    loss.backward()
    top = lsk.TopK(torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5))
    assert_type(lsk.linear_cross_entropy(hidden, head, top, label_smoothing=0.1, ignore_index=None), Tensor)
    assert_type(lsk.linear_cross_entropy(hidden, head, lsk.Teacher(hidden, head.detach()), chunk_rows=2), Tensor)
    assert_type(lsk.linear_cross_entropy(hidden, head, probabilities, skip_ignored=False, class_dim=-1), Tensor)
    assert_type(lsk.linear_cross_entropy(hidden, head, target, return_stats="entropy", row_weight=rows), Pair)
    assert_type(lsk.linear_cross_entropy(hidden, head, target, return_stats=asked, method="chunked"), "Tensor | Pair")


def modules() -> None:
    loss = lsk.CrossEntropyLoss(label_smoothing=0.1, z_loss=1e-4)
    loss(logits, target).backward()
    loss.label_smoothing = 0.05
    assert_type(loss(logits, target, row_weight=rows, normalizer=3.0), Tensor)
    assert_type(loss.forward(logits, target), Tensor)
    assert_type(lsk.CrossEntropyLoss(weight, None, -100, None, "sum", 0.1)(logits, target), Tensor)
    assert_type(lsk.CrossEntropyLoss(return_stats="all")(logits, target), Pair)
    assert_type(lsk.CrossEntropyLoss(return_stats=asked)(logits, target), "Tensor | Pair")
    schedule = smoothing.Schedule(smoothing.linear(0.1, 0.0, steps=10))
    assert_type(lsk.CrossEntropyLoss(label_smoothing=schedule)(logits, target), Tensor)
    schedule.step()
    assert_type(lsk.LabelSmoothingCrossEntropy(0.1, "sum")(logits, target), Tensor)
    assert_type(lsk.LabelSmoothingCrossEntropy(smoothing=0.1)(logits, target), Tensor)
    linear = lsk.LinearCrossEntropyLoss(D, K, bias=True, label_smoothing=schedule, chunk_rows=2, reduction="mean")
    linear.linear.weight = nn.Parameter(head.detach())
    linear(hidden, target).backward()
    assert_type(linear(hidden, lsk.Teacher(hidden, head.detach()), normalizer="rows"), Tensor)
    assert_type(lsk.LinearCrossEntropyLoss(D, K, return_stats=True)(hidden, target), Pair)
    assert_type(Model().training_loss(logits), Tensor)
    assert_type(Mine()(logits, target), Tensor)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss: lsk.CrossEntropyLoss = lsk.CrossEntropyLoss(label_smoothing=0.1)
        self.watched: lsk.CrossEntropyLoss[Pair] = lsk.CrossEntropyLoss(return_stats=True)

    def training_loss(self, x: Tensor) -> Tensor:
        _, stats = self.watched(x, target)
        return self.loss(x, target) + stats.nll.mean()


class Mine(lsk.CrossEntropyLoss):
    def __init__(self) -> None:
        super().__init__(label_smoothing=0.1)


def teachers() -> None:
    teacher = lsk.Teacher(hidden, head.detach(), bias, logit_scale=0.5)
    loss = assert_type(distillation_loss(logits, teacher, target, temperature=2.0, alpha=0.5), Tensor)
    loss.backward()
    assert_type(distillation_loss(logits, probabilities, label_smoothing=0.0, class_dim=1), Tensor)
    given = distillation.Probabilities(distillation.sharpen(probabilities, 0.5))
    _, terms = assert_type(
        distillation_loss(logits, given, target, return_terms=True, reduction="none"), tuple[Tensor, DistillationTerms]
    )
    assert_type(terms.divergence, Tensor)
    assert_type(distillation_loss(logits, given, return_terms=asked), "Tensor | tuple[Tensor, DistillationTerms]")


def figures() -> None:
    found = assert_type(calibration.evaluate(logits.detach(), target, logit_scale=0.5), calibration.Calibration)
    assert_type(found.ece, float)
    assert_type(calibration.evaluate(hidden, target, head, linear_bias=bias, chunk_rows=2).accuracy, float)
    noisy, labels = torch.eye(K).repeat(4, 1), torch.arange(K).repeat(4).where(torch.arange(4 * K) > 3, 0)
    fitted = assert_type(calibration.fit_temperature(noisy, labels, class_dim=1), calibration.Temperature)
    assert_type(fitted.temperature, float)
    trials = smoothing.compare({0.1: (noisy, labels)}, (1.0, 2.0), fit=False, bins=10, backend="reference")
    assert_type(smoothing.trial_table(trials), str)
    _, stats = lsk.cross_entropy(logits, target, return_stats=True)
    assert_type(calibration.collect(stats, target, bins=5).reliability("mass"), calibration.Bins)
    assert_type(smoothing.unigram_prior(torch.arange(K), power=0.75), Tensor)
    assert_type(smoothing.temporal_targets(target), lsk.TopK)
    assert_type(smoothing.excess_loss(2.0, 0.1, K), float)
    assert_type(representation.class_scatter(hidden, target).tightness, float)
    try:
        with TemporaryDirectory() as folder:
            calibration.plot_reliability({"before": fitted.before}, str(Path(folder) / "before.png"))
    except ImportError:
        pass  # matplotlib is an extra


def over_ranks() -> None:
    """Needs a process group, here of one rank."""
    group = torch.distributed.group.WORLD
    loss = assert_type(parallel.cross_entropy(logits, target, weight, group=group, label_smoothing=0.1), Tensor)
    loss.backward()
    assert_type(parallel.cross_entropy(logits, target, num_classes=K, **conventions.fairseq(0.1, 1)), Tensor)
    assert_type(parallel.cross_entropy(logits, target, return_stats=True), Pair)
    assert_type(parallel.cross_entropy(logits, target, return_stats=asked), "Tensor | Pair")
    assert_type(parallel.linear_cross_entropy(hidden, head, target, linear_bias=bias, grad_reduce="none"), Tensor)
    assert_type(parallel.linear_cross_entropy(hidden, head, target, return_stats="all", ignore_index=1), Pair)
    assert_type(parallel.token_count(target, group), Tensor)
