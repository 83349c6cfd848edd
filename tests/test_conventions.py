"""``conventions`` against each project's loss, stated here from its definition: value and gradient in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

import labelsmooth_kernels as lsk
from labelsmooth_kernels import conventions

BATCH, LENGTH, PAD, NEMO_EPS = 3, 5, 1, 1e-6
Loss = Callable[[Tensor, Tensor, float], Tensor]


def log_p(x: Tensor) -> Tensor:
    return x - torch.logsumexp(x, -1, keepdim=True)


def nll(x: Tensor, y: Tensor) -> Tensor:
    return -torch.take_along_dim(log_p(x), y.clamp_min(0)[..., None], -1)[..., 0]


def spread(x: Tensor, y: Tensor, eps: float, off: float, zero: int | None = None) -> Tensor:
    """q with 1-ε on the target, ``off`` elsewhere and 0 on one class."""
    classes = torch.arange(x.shape[-1])
    q = torch.full_like(x, off).masked_fill(classes == y[..., None], 1 - eps)
    return q if zero is None else q.masked_fill(classes == zero, 0)


def uniform_rows(x: Tensor, y: Tensor, eps: float) -> Tensor:
    return (1 - eps) * nll(x, y) - eps * log_p(x).mean(-1)


def other_rows(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """1-ε of the target's nll and ε of the mean nll of the other classes."""
    others = -log_p(x).sum(-1) - nll(x, y)
    return (1 - eps) * nll(x, y) + eps * others / (x.shape[-1] - 1)


def kl_rows(x: Tensor, y: Tensor, eps: float) -> Tensor:
    q = spread(x, y, eps, eps / (x.shape[-1] - 1))
    return kl_divergence(Categorical(probs=q, validate_args=False), Categorical(logits=x))


def fairseq_new(x: Tensor, y: Tensor, eps: float) -> Tensor:
    each = eps / (x.shape[-1] - 1)
    rows = (1 - eps - each) * nll(x, y) - each * log_p(x).sum(-1)
    return rows[y != PAD].sum()


def nemo(x: Tensor, y: Tensor, eps: float) -> Tensor:
    s, mask = x.shape[-1] * eps / (x.shape[-1] - 1), (y != PAD).double()
    return (((1 - s) * nll(x, y) - s * log_p(x).mean(-1)) * mask).sum() / (mask.sum() + NEMO_EPS)


def opennmt_kl(x: Tensor, y: Tensor, eps: float) -> Tensor:
    q = spread(x, y, eps, eps / (x.shape[-1] - 2), zero=PAD)
    return (torch.xlogy(q, q) - q * log_p(x)).sum(-1)[y != PAD].sum()


def label_smoother(x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Shifted: each position predicts the next label, so the last has none."""
    terms = [
        uniform_rows(x[b, t], y[b, t + 1], eps) for b in range(BATCH) for t in range(LENGTH - 1) if y[b, t + 1] != -100
    ]
    return torch.stack(terms).mean()


def keras_rows(x: Tensor, y: Tensor, eps: float) -> Tensor:
    t = F.one_hot(y, x.shape[-1]).double() * (1 - eps) + eps / x.shape[-1]
    return -(t * torch.softmax(x, -1).log()).sum(-1)


def sample_weight() -> Tensor:
    return torch.linspace(0.25, 2, BATCH * LENGTH, dtype=torch.float64).reshape(BATCH, LENGTH)


def soft(x: Tensor, y: Tensor) -> Tensor:
    """Two labels mixed, as mixup does, of mass 0.9."""
    k = x.shape[-1]
    return 0.6 * F.one_hot(y, k).double() + 0.3 * F.one_hot(y.flip(0), k).double()


class Case(NamedTuple):
    """A project: its loss, the arguments for ours, the class or index of padding, the constant that it subtracts."""

    formula: Loss
    options: Callable[[Tensor, float, int], dict[str, Any]]
    ignored: int | None = None
    constant: Callable[[Tensor, float, int], float] = lambda y, eps, k: 0.0
    target: Callable[[Tensor, Tensor], Tensor] = lambda x, y: y


def entropy_over(denominator: Callable[[Tensor], float], ignored: int, fewer: int = 0) -> Callable[..., float]:
    def constant(y: Tensor, eps: float, k: int) -> float:
        return conventions.target_entropy(eps, k - fewer, "others") * float((y != ignored).sum()) / denominator(y)

    return constant


def valid(y: Tensor) -> float:
    return float((y != -1).sum())


CASES = {
    "fairseq": Case(fairseq_new, lambda y, e, k: conventions.fairseq(e, PAD), PAD),
    "fairseq, over the sample size": Case(
        lambda x, y, e: fairseq_new(x, y, e) / 7, lambda y, e, k: conventions.fairseq(e, PAD, torch.tensor(7)), PAD
    ),
    "fairseq 0.10": Case(
        lambda x, y, e: uniform_rows(x, y, e)[y != PAD].sum(),
        lambda y, e, k: conventions.fairseq(e, PAD, smoothing="uniform"),
        PAD,
    ),
    "ESPnet, over the batch": Case(
        lambda x, y, e: kl_rows(x, y, e)[y != -1].sum() / BATCH,
        lambda y, e, k: conventions.espnet(e, batch_size=BATCH),
        -1,
        entropy_over(lambda y: BATCH, -1),
    ),
    "ESPnet, normalize_length": Case(
        lambda x, y, e: kl_rows(x, y, e)[y != -1].mean(),
        lambda y, e, k: conventions.espnet(e),
        -1,
        entropy_over(valid, -1),
    ),
    "WeNet": Case(
        lambda x, y, e: (
            F.kl_div(log_p(x), spread(x, y, e, e / (x.shape[-1] - 1)), reduction="none")[y != PAD].sum() / BATCH
        ),
        lambda y, e, k: conventions.wenet(e, PAD, BATCH),
        PAD,
        entropy_over(lambda y: BATCH, PAD),
    ),
    "NeMo": Case(nemo, lambda y, e, k: conventions.nemo(e, PAD, y), PAD),
    "Megatron": Case(other_rows, lambda y, e, k: conventions.megatron(e)),
    "OpenNMT": Case(
        lambda x, y, e: uniform_rows(x, y, e)[y != PAD].sum() / 4, lambda y, e, k: conventions.opennmt(e, PAD, 4), PAD
    ),
    "OpenNMT, KL": Case(
        opennmt_kl, lambda y, e, k: conventions.opennmt_kl(e, k, PAD), PAD, entropy_over(lambda y: 1.0, PAD, fewer=1)
    ),
    "timm": Case(lambda x, y, e: uniform_rows(x, y, e).mean(), lambda y, e, k: conventions.timm(e)),
    "timm, soft targets": Case(
        lambda x, y, e: (soft(x, y) * -log_p(x)).sum() / y.numel(),
        lambda y, e, k: conventions.timm_soft_target(),
        target=soft,
    ),
    "transformers, shifted": Case(
        label_smoother,
        lambda y, e, k: conventions.hugging_face(e),
        -100,
        target=lambda x, y: conventions.shift_labels(y),
    ),
    "transformers, accumulating": Case(
        lambda x, y, e: uniform_rows(x, y, e)[y != -100].sum() / 40,
        lambda y, e, k: conventions.hugging_face(e, num_items_in_batch=torch.tensor(40)),
        -100,
    ),
    "Keras": Case(lambda x, y, e: keras_rows(x, y, e).mean(), lambda y, e, k: conventions.keras(e)),
    "Keras, one-hot, not reduced": Case(
        keras_rows,
        lambda y, e, k: conventions.keras(e, None),
        target=lambda x, y: F.one_hot(y, x.shape[-1]).double(),
    ),
    "Keras, sum": Case(lambda x, y, e: keras_rows(x, y, e).sum(), lambda y, e, k: conventions.keras(e, "sum")),
    "Keras, sample weights": Case(
        lambda x, y, e: (keras_rows(x, y, e) * sample_weight()).mean(),
        lambda y, e, k: conventions.keras(e, sample_weight=sample_weight()),
    ),
    "Keras, weights (N, 1)": Case(
        lambda x, y, e: (keras_rows(x, y, e) * sample_weight()).mean(),
        lambda y, e, k: conventions.keras(e, sample_weight=sample_weight()[..., None]),
    ),
    "Keras, one weight": Case(
        lambda x, y, e: 2.3 * keras_rows(x, y, e).mean(),
        lambda y, e, k: conventions.keras(e, "mean", torch.tensor(2.3, dtype=torch.float64)),
    ),
    "Keras, a number as weight": Case(
        lambda x, y, e: 2.3 * keras_rows(x, y, e).mean(), lambda y, e, k: conventions.keras(e, sample_weight=2.3)
    ),
    "Keras, a number, not reduced": Case(
        lambda x, y, e: 2.3 * keras_rows(x, y, e), lambda y, e, k: conventions.keras(e, None, 2.3)
    ),
    "Keras, mean with one weight": Case(
        lambda x, y, e: (2.3 * keras_rows(x, y, e)).sum() / 2.3,
        lambda y, e, k: conventions.keras(e, "mean_with_sample_weight", 2.3),
    ),
    "Keras, mean with sample weights": Case(
        lambda x, y, e: torch.einsum("bt,bt", keras_rows(x, y, e), sample_weight()) / sample_weight().sum(),
        lambda y, e, k: conventions.keras(e, "mean_with_sample_weight", sample_weight()),
    ),
    "optax": Case(
        lambda x, y, e: -(((1 - e) * soft(x, y) + e / x.shape[-1]) * log_p(x)).sum(-1),
        lambda y, e, k: conventions.optax(e),
        target=soft,
    ),
}


def draw(k: int, ignored: int | None) -> tuple[Tensor, Tensor]:
    """Logits (B, T, K) and labels (B, T), some of them padding where the project has it, else among the classes."""
    rng = torch.Generator().manual_seed(k)
    x = torch.randn(BATCH, LENGTH, k, generator=rng, dtype=torch.float64) * 3
    y = torch.randint(k, (BATCH, LENGTH), generator=rng)
    if ignored is not None:
        y[0, 3:], y[2, 1:] = ignored, ignored
    return x, y


def value_and_grad(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its sum with a weight of its own for every entry."""
    leaf = x.clone().requires_grad_()
    loss = loss_of(leaf)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def difference(case: Case, k: int, eps: float, backend: str | None, **changed: Any) -> float:
    """The largest error of our loss (relative to 1 + loss) and gradient under the case's arguments, some changed."""
    x, y = draw(k, case.ignored)
    options = {**case.options(y, eps, k), **changed}
    want, want_grad = value_and_grad(lambda leaf: case.formula(leaf, y, eps), x)
    got, grad = value_and_grad(lambda leaf: lsk.cross_entropy(leaf, case.target(x, y), backend=backend, **options), x)
    assert got.shape == want.shape
    value = (got - case.constant(y, eps, k) - want).abs() / (1 + want.abs())
    return max(value.max().item(), (grad - want_grad).abs().max().item())


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("k", [3, 7, 50])
@pytest.mark.parametrize("name", CASES)
def test_same_loss_and_gradient(name: str, k: int, eps: float, backend: str | None) -> None:
    assert difference(CASES[name], k, eps, backend) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_same_loss_of_a_head(name: str) -> None:
    """The same arguments for the loss without logits, and for its module where none belongs to one batch."""
    case, k = CASES[name], 7
    x, y = draw(k, case.ignored)
    options, target = case.options(y, 0.1, k), case.target(x, y)
    want, want_grad = value_and_grad(lambda leaf: lsk.cross_entropy(leaf, target, **options), x)
    eye = torch.eye(k, dtype=torch.float64)
    got, grad = value_and_grad(lambda leaf: lsk.linear_cross_entropy(leaf, eye, target, **options), x)
    torch.testing.assert_close((got, grad), (want, want_grad))
    kept = {name: options.pop(name) for name in ("row_weight", "normalizer") if name in options}
    head = lsk.LinearCrossEntropyLoss(k, k, dtype=torch.float64, **options)
    head.linear.weight.data = eye
    torch.testing.assert_close(head(x, target, **kept).detach(), want)


@pytest.mark.parametrize("name", [name for name in CASES if name != "timm, soft targets"])
def test_the_other_convention_would_be_noticed(name: str) -> None:
    """ε/K taken for ε/(K-1), or the reverse, is ε times 7/6 or 6/7 at K = 7."""
    case = CASES[name]
    options = case.options(draw(7, case.ignored)[1], 0.1, 7)
    wrong = options["label_smoothing"] * (7 / 6 if options["smoothing"] == "uniform" else 6 / 7)
    assert difference(case, 7, 0.1, "reference", label_smoothing=wrong) > 1e-5


@pytest.mark.parametrize("smoothing", ["uniform", "others"])
@pytest.mark.parametrize(("eps", "k"), [(0.0, 5), (0.1, 2), (0.3, 33), (1.0, 4)])
def test_target_entropy(eps: float, k: int, smoothing: str) -> None:
    off = eps / k if smoothing == "uniform" else eps / (k - 1)
    q = torch.full((k,), off, dtype=torch.float64)
    q[0] = 1 - (k - 1) * off
    assert conventions.target_entropy(eps, k, smoothing) == pytest.approx(Categorical(q).entropy().item(), abs=1e-12)


def test_nemo_counts_a_batch_of_padding_as_zero() -> None:
    y = torch.full((2, 3), PAD)
    loss = lsk.cross_entropy(torch.randn(2, 3, 5), y, **conventions.nemo(0.1, PAD, y))
    assert loss.item() == 0


def test_keras_from_probabilities() -> None:
    x, y = draw(6, None)
    options = conventions.keras(0.1)
    torch.testing.assert_close(
        lsk.cross_entropy(torch.softmax(x, -1).log(), y, **options), lsk.cross_entropy(x, y, **options)
    )


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: conventions.target_entropy(-0.1, 5), "label_smoothing must be from 0 to 1, got -0.1"),
        (lambda: conventions.target_entropy(0.1, 1), "num_classes must be at least 2, got 1"),
        (lambda: conventions.target_entropy(0.1, 5, "other"), "smoothing must be 'uniform' or 'others', got 'other'"),
        (lambda: conventions.nemo(0.1, 0, torch.zeros(2), eps=0.0), "eps must be > 0, got 0.0"),
        (lambda: conventions.opennmt_kl(0.1, 2, 0), "tgt_vocab_size must be at least 3, got 2"),
        (lambda: conventions.opennmt_kl(0.1, 9, -100), "ignore_index must be a class of the 9, got -100"),
        (lambda: conventions.opennmt_kl(0.9, 9, 1), "label_smoothing must be from 0 to 7/8, got 0.9"),
        (lambda: conventions.keras(0.1, "avg"), "reduction must be one of .*, got 'avg'"),
    ],
)
def test_errors_name_the_argument(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(lsk.ArgumentError, match=named):
        call()
