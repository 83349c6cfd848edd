"""What to pass to :func:`labelsmooth_kernels.cross_entropy` to have the loss of another project, number for number.

    loss = lsk.cross_entropy(logits, target, **conventions.fairseq(0.1, padding_idx=1))

Each function takes its project's own arguments and returns keyword arguments for logits with the classes last; give
the logits also where the project takes log-probabilities. Projects differ in q (the target weights, see
:mod:`labelsmooth_kernels.reference`), in what they divide by, and in whether they subtract the entropy of q: the form
Σ q·log(q/p) is the cross-entropy minus :func:`target_entropy` per valid row, a constant, so that the gradient is the
same. The versions named are those whose source was read.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from typing_extensions import Required

from .arguments import plain_float, plain_int, unscriptable
from .reference import uniform_epsilon, weights
from .spec import require

Number = float | Tensor


class Options(TypedDict, total=False):
    """Hold keyword arguments of a loss, function or module, without ``return_stats``: the result is a tensor. Where a
    denominator or weights of rows are given, ``normalizer`` or ``row_weight`` is there too, which a module takes in
    its call."""

    label_smoothing: Required[Number]
    smoothing: Required[str | Tensor]
    class_dim: Required[int]
    ignore_index: int
    reduction: str


@unscriptable
def target_entropy(label_smoothing: float, num_classes: int, smoothing: str = "uniform") -> float:
    """H(q) = -Σ q·log q of a smoothed row: what a Kullback-Leibler form subtracts from each valid row's loss.

    ε from 0 to 1, K >= 2 classes that q covers, ``smoothing`` "uniform" or "others"; ArgumentError otherwise.
    """
    label_smoothing, num_classes = plain_float(label_smoothing), plain_int(num_classes)
    require(0 <= label_smoothing <= 1, "label_smoothing", label_smoothing, "from 0 to 1")
    require(num_classes >= 2, "num_classes", num_classes, "at least 2")
    require(smoothing in ("uniform", "others"), "smoothing", smoothing, "'uniform' or 'others'")
    a, b = weights(float(uniform_epsilon(label_smoothing, num_classes, smoothing)), num_classes)
    return -sum(n * float(q) * math.log(q) for n, q in ((1, a + b), (num_classes - 1, b)) if q > 0)


@unscriptable
def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Labels (..., T) moved one position ahead, the last one ignored: position t is to predict token t + 1.

    With it the logits (..., T, K) go in whole, where ``logits[..., :-1, :]`` would have to be copied.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, 1), value=plain_int(ignore_index))


@unscriptable
def fairseq(
    label_smoothing: Number, padding_idx: int, sample_size: Number | None = None, smoothing: str = "others"
) -> Options:
    """fairseq, ``label_smoothed_nll_loss`` in criterions/label_smoothed_cross_entropy.py.

    Σ over non-padding rows of (1-ε-ε_i)·nll + ε_i·Σ_k -log p_k with ε_i = ε/(K-1), which is "others". Releases up to
    0.10.2 have (1-ε)·nll + (ε/K)·Σ_k -log p_k: for those pass ``smoothing="uniform"``. The padding class has its share
    of the smoothing in both.

    Divides by nothing (``reduce=True``); the trainer then divides the gradient by ``sample_size``, tokens or sentences:
    given here, the loss is divided by it. Source: fairseq 0.10.2, 0.12.2.
    """
    return _smoothed(label_smoothing, smoothing, ignore_index=padding_idx, **_over(sample_size, "sum"))


@unscriptable
def espnet(smoothing: Number, padding_idx: int = -1, batch_size: Number | None = None) -> Options:
    """ESPnet, ``LabelSmoothingLoss`` in nets/pytorch_backend/transformer/label_smoothing_loss.py.

    Σ over non-padding rows of Σ_k q_k·log(q_k/p_k), q "others": subtract ``target_entropy(smoothing, K, "others")``
    times the number of those rows over the denominator to have their value; the gradient is theirs without.

    Divides by ``batch_size``, the sequences; None: by those rows (``normalize_length=True``). Source: espnet 2f0785c.
    """
    return _smoothed(smoothing, "others", ignore_index=padding_idx, **_over(batch_size, "mean"))


@unscriptable
def wenet(smoothing: Number, padding_idx: int = -1, batch_size: Number | None = None) -> Options:
    """WeNet, ``LabelSmoothingLoss`` in wenet/transformer/label_smoothing_loss.py: :func:`espnet` in every number.

    Source: wenet decd0cf; 04e207e computes q·(log q - log p) term by term and is NaN for ``smoothing=0``, ours is not.
    """
    return espnet(smoothing, padding_idx, batch_size)


@unscriptable
def nemo(label_smoothing: Number, pad_id: int, labels: Tensor, eps: float = 1e-6) -> Options:
    """NeMo, ``SmoothedCrossEntropyLoss`` in collections/common/losses/smoothed_cross_entropy.py.

    Σ over non-padding rows of (1-s)·nll + s·mean_k -log p_k with s = ε·K/(K-1), which is "others".

    Divides by the number of those rows, counted from ``labels`` on their device, plus ``eps``, which makes a batch of
    padding 0, not NaN. For ``output_mask`` or ``predict_last_k`` fill the rest with ``pad_id``. Source: NeMo be4107e.
    """
    require(eps > 0, "eps", eps, "> 0")
    count = (labels != plain_int(pad_id)).sum(dtype=torch.float64) + plain_float(eps)
    return _smoothed(label_smoothing, "others", ignore_index=pad_id, normalizer=count)


@unscriptable
def megatron(label_smoothing: Number) -> Options:
    """Megatron-LM, ``vocab_parallel_cross_entropy`` in core/tensor_parallel/cross_entropy.py, at one rank.

    (1-s)·nll - s·mean_k log p_k per row with s = ε·K/(K-1), which is "others". At more ranks theirs takes K and the
    mean from each rank's own shard, so that its loss is another number on every rank; ours has the whole vocabulary.

    Divides by nothing: one loss per token (sequence, batch), which the caller masks and averages; a target of -100 has
    loss 0 here and there a number for the caller to mask. Source: Megatron-LM 00611e6.
    """
    return _smoothed(label_smoothing, "others", reduction="none")


@unscriptable
def opennmt(label_smoothing: Number, padding_idx: int, normalization: Number | None = None) -> Options:
    """OpenNMT-py from 3.0.3 on, ``LossCompute`` in onmt/utils/loss.py: PyTorch's uniform form, summed.

    Divides by ``normalization``, which the trainer counts over accumulated batches and ranks: non-padding tokens less
    one per sentence, or sentences; None leaves the sum. Source: OpenNMT-py 3.0.3, 3.5.1.
    """
    return _smoothed(label_smoothing, "uniform", ignore_index=padding_idx, **_over(normalization, "sum"))


@unscriptable
def opennmt_kl(
    label_smoothing: float,
    tgt_vocab_size: int,
    ignore_index: int,
    normalization: Number | None = None,
    device: torch.device | str | None = None,
) -> Options:
    """OpenNMT-py up to 3.0.2, ``LabelSmoothingLoss`` in onmt/utils/loss.py.

    Σ over non-padding rows of Σ_k q_k·log(q_k/p_k) with q = 1-ε on the target, 0 on the padding class ``ignore_index``
    and ε/(V-2) on the V-2 others. That is a prior u = 1/(V-1) on all classes but padding with ε·(V-1)/(V-2), on
    ``device``. Subtract ``target_entropy(label_smoothing, V - 1, "others")`` per non-padding row to have their value.

    Divides by ``normalization``, tokens or sentences; None leaves the sum. Raises ArgumentError for V < 3, a padding
    class outside the vocabulary (their default of -100 zeroes class V-100) and ε above (V-2)/(V-1), where the target
    would have less than the other classes. Source: OpenNMT-py 2.3.0, 3.0.0, 3.0.2.
    """
    v, ignore_index, label_smoothing = plain_int(tgt_vocab_size), plain_int(ignore_index), plain_float(label_smoothing)
    require(v >= 3, "tgt_vocab_size", v, "at least 3")
    require(0 <= ignore_index < v, "ignore_index", ignore_index, f"a class of the {v}")
    require(0 <= label_smoothing <= (v - 2) / (v - 1), "label_smoothing", label_smoothing, f"from 0 to {v - 2}/{v - 1}")
    prior = torch.full((v,), 1 / (v - 1), dtype=torch.float64, device=device)
    prior[ignore_index] = 0
    eps = uniform_epsilon(label_smoothing, v - 1, "others")
    return _smoothed(eps, prior, ignore_index=ignore_index, **_over(normalization, "sum"))


@unscriptable
def timm(smoothing: Number = 0.1) -> Options:
    """timm, ``LabelSmoothingCrossEntropy`` in loss/cross_entropy.py: uniform, mean over all rows. Source: 1.0.31."""
    return _smoothed(smoothing, "uniform")


@unscriptable
def timm_soft_target() -> Options:
    """timm, ``SoftTargetCrossEntropy`` in the same file: -Σ t·log p for class probabilities t, mean over all rows."""
    return _smoothed(0.0, "uniform")


@unscriptable
def hugging_face(epsilon: Number = 0.1, ignore_index: int = -100, num_items_in_batch: Number | None = None) -> Options:
    """transformers, ``LabelSmoother`` of the Trainer in trainer_pt_utils.py: uniform over the active tokens.

    Its ``shift_labels=True`` (causal models) is :func:`shift_labels` here. Negative labels other than ``ignore_index``
    count there as class 0 and raise here.

    Divides by the active tokens, or by ``num_items_in_batch`` where given, as the Trainer does under gradient
    accumulation (earlier ones did not, and scaled the gradient wrongly). Source: transformers 5.23.0.
    """
    return _smoothed(epsilon, "uniform", ignore_index=ignore_index, **_over(num_items_in_batch, "mean"))


@unscriptable
def keras(
    label_smoothing: Number = 0.0, reduction: str | None = "sum_over_batch_size", sample_weight: Number | None = None
) -> Options:
    """Keras 3, ``CategoricalCrossentropy`` in src/losses/losses.py: -Σ ((1-ε)·t + ε/K)·log p for probabilities t.

    Targets may be one-hot or probabilities, as there, or class indices. ``from_logits=False``: pass ``p.log()``; theirs
    clips p to [1e-7, 1 - 1e-7], ours does not. ``sample_weight`` is one number for all rows or has one per row, in the
    shape of the rows or (N, 1) for rows (N,); their other shapes, which broadcast, raise here.

    Divides by the number of rows, whatever the weights are; ``"mean_with_sample_weight"`` by the sum of the weights as
    they are given, which for one number is that number: their loss is then the sum of the rows.
    Source: keras 3.15.1.
    """
    reductions: dict[str | None, str] = {"sum": "sum", "none": "none", None: "none"}
    reductions |= dict.fromkeys(("sum_over_batch_size", "mean", "mean_with_sample_weight"), "mean")
    require(reduction in reductions, "reduction", reduction, f"one of {tuple(reductions)}")
    options: dict[str, Any] = {"reduction": reductions[reduction]}
    if sample_weight is None:
        return _smoothed(label_smoothing, "uniform", **options)
    if not isinstance(sample_weight, Tensor):
        sample_weight = torch.tensor(plain_float(sample_weight), dtype=torch.float64)
    options["row_weight"] = sample_weight
    if reduction in ("sum_over_batch_size", "mean"):
        options["normalizer"] = "rows"
    elif reduction == "mean_with_sample_weight" and sample_weight.numel() == 1:
        options["normalizer"] = sample_weight
    return _smoothed(label_smoothing, "uniform", **options)


@unscriptable
def optax(alpha: Number) -> Options:
    """optax, ``softmax_cross_entropy(logits, smooth_labels(labels, alpha))`` in losses/_classification.py.

    -Σ ((1-α)·t + α/K)·log p per row, not reduced, for one-hot labels, probabilities or class indices. A logit of -inf
    with weight 0 is NaN there and 0 here, as in their ``safe_softmax_cross_entropy``. Source: optax 0.2.8.
    """
    return _smoothed(alpha, "uniform", reduction="none")


def _smoothed(eps: Number, smoothing: str | Tensor, **options: Any) -> Options:
    return cast("Options", {"label_smoothing": eps, "smoothing": smoothing, "class_dim": -1, **options})


def _over(denominator: Number | None, otherwise: str) -> dict[str, Any]:
    return {"reduction": otherwise} if denominator is None else {"normalizer": denominator}
