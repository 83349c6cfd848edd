"""User code that is wrong in one way each: type checkers must see it, as their unused ignores are errors, and so must
the call itself, whose error each function names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from right import D, K, head, hidden, logits, probabilities, target, weight

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration, conventions, parallel, smoothing
from labelsmooth_kernels.distillation import distillation_loss

if TYPE_CHECKING:
    from collections.abc import Callable

WRONG: dict[str, tuple[Callable[[], object], type[Exception]]] = {}
"""A call, and the class of its error."""


def raises(error: type[Exception]) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def mark(call: Callable[[], object]) -> Callable[[], object]:
        WRONG[call.__name__] = call, error
        return call

    return mark


@raises(TypeError)
def misspelt() -> None:
    lsk.cross_entropy(logits, target, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_for_a_head() -> None:
    lsk.linear_cross_entropy(hidden, head, target, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def bias_for_linear_bias() -> None:
    lsk.linear_cross_entropy(hidden, head, target, bias=weight)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def inplace_without_logits() -> None:
    lsk.linear_cross_entropy(hidden, head, target, inplace=True)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_over_ranks() -> None:
    parallel.cross_entropy(logits, target, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_for_a_head_over_ranks() -> None:
    parallel.linear_cross_entropy(hidden, head, target, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_module() -> None:
    lsk.CrossEntropyLoss(label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_head_module() -> None:
    lsk.LinearCrossEntropyLoss(D, K, label_smooting=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_classic() -> None:
    lsk.LabelSmoothingCrossEntropy(epsilon=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_spec() -> None:
    lsk.LossSpec(sofcap=30.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_temperature() -> None:
    distillation_loss(logits, probabilities, temprature=2.0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_evaluation() -> None:
    calibration.evaluate(logits, target, logit_scal=0.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_fit() -> None:
    calibration.fit_temperature(logits, target, backen="reference")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_comparison() -> None:
    smoothing.compare({0.1: (logits, target)}, bin=10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_convention() -> None:
    conventions.fairseq(0.1, 1, padding=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(ValueError)
def text_for_a_number() -> None:
    lsk.cross_entropy(logits, target, label_smoothing="0.1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def text_for_a_number_by_keyword_alone() -> None:
    lsk.cross_entropy(logits, target, z_loss="0.1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def text_for_a_number_of_a_head() -> None:
    lsk.linear_cross_entropy(hidden, head, target, softcap="30")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def text_for_a_number_of_a_module() -> None:
    lsk.CrossEntropyLoss(label_smoothing="0.1")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def text_for_a_number_of_a_head_module() -> None:
    lsk.LinearCrossEntropyLoss(D, K, chunk_rows="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def text_for_a_temperature() -> None:
    distillation_loss(logits, probabilities, temperature="2")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(ValueError)
def schedule_in_a_function() -> None:
    lsk.cross_entropy(logits, target, label_smoothing=smoothing.Schedule(smoothing.linear(0.1, 0.0, 10)))  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(UserWarning)
def reduction_in_its_old_place() -> None:
    lsk.cross_entropy(logits, target, weight, "sum")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(TypeError)
def no_target() -> None:
    lsk.cross_entropy(logits)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def list_for_a_tensor() -> None:
    lsk.cross_entropy(logits, [0, 4, 2, 1])  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


@raises(AttributeError)
def statistics_as_a_loss() -> None:
    lsk.cross_entropy(logits, target, return_stats=True).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@raises(AttributeError)
def statistics_of_a_head_as_a_loss() -> None:
    lsk.linear_cross_entropy(hidden, head, target, return_stats="all").backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@raises(AttributeError)
def statistics_of_a_module_as_a_loss() -> None:
    lsk.CrossEntropyLoss(return_stats=True)(logits, target).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@raises(AttributeError)
def perhaps_statistics_as_a_loss() -> None:
    lsk.cross_entropy(logits, target, return_stats=len(target) == 4).backward()  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]


@raises(AttributeError)
def terms_as_a_loss() -> None:
    distillation_loss(logits, probabilities, return_terms=True).backward()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


@raises(TypeError)
def batch_weights_of_a_module() -> None:
    lsk.CrossEntropyLoss(row_weight=torch.ones(4))  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_in_a_call_of_a_module() -> None:
    lsk.CrossEntropyLoss()(logits, target, normaliser=3.0)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@raises(TypeError)
def misspelt_key_of_a_convention() -> None:
    lsk.cross_entropy(logits, target, **conventions.timm(), smoothin="others")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
