"""Study: label smoothing in machine translation, on the messages of installed programs and their translations.

A small transformer learns to translate short English messages, with and without smoothing. What smoothing does to the
probabilities of words is measured as in the other studies; what it does to translations, by BLEU with one beam and
with four, and beside it what a temperature alone does to those of the model with hard targets.

    python examples/studies/translation.py                         # this machine's catalogues, German; 15 to 20 minutes
    python examples/studies/translation.py --language fr --catalogues DIR ...
    python examples/studies/translation.py --quick                 # about a minute, on a generated corpus

Minimal systems strip /usr/share/locale; `apt-get download PACKAGE` and `dpkg -x FILE.deb DIR` need no root.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from catalogues import BEGIN, END, PAD, Corpus, Subwords, corpus, default_folders
from common import (
    COLOURS,
    MEASURED,
    METHODS,
    Record,
    arguments,
    draw_reliability,
    figure,
    gap,
    load,
    loss_options,
    measure,
    page,
    record,
    reliability_points,
    save,
    save_figure,
    seeds_of,
    select,
    set_up,
    table,
    values,
)
from torch import Tensor, nn

try:
    from sacrebleu.metrics import BLEU
except ImportError as error:
    raise SystemExit(f"{error}: translations are judged with sacrebleu; pip install sacrebleu") from error

import labelsmooth_kernels as lsk
from labelsmooth_kernels import calibration

if TYPE_CHECKING:
    import argparse

    from matplotlib.figure import Figure

NAME, EPS = "translation", 0.1
WIDTH, HEADS, LAYERS, LONGEST = 128, 4, 1, 64  # LONGEST: positions, in subwords
BEAM, LENGTH_PENALTY = 4, 0.6
SAMPLES = 6
IGNORED = -100  # the target of padding, which no loss and no measure counts
SCORES = {
    "bleu_1": ("BLEU, one beam", ".1f"),
    "bleu": (f"BLEU, {BEAM} beams", ".1f"),
    "bleu_scaled": (f"BLEU, {BEAM} beams, after T", ".1f"),
    "length": ("length / reference's", ".2f"),
}
Batch = tuple[Tensor, Tensor, Tensor]  # (B, S) source, (B, T) what the decoder is given, (B, T) what it is to say


class Size(NamedTuple):
    pairs: int
    held_out: int
    vocabulary: int
    epochs: int
    batch: int


FULL, QUICK = Size(8000, 400, 3000, 10, 64), Size(600, 60, 200, 3, 40)


class Model(nn.Module):
    """An encoder and a decoder, which share one embedding with the head."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, WIDTH)
        self.position = nn.Embedding(LONGEST, WIDTH)
        for table_ in (self.embedding, self.position):
            nn.init.normal_(table_.weight, std=WIDTH**-0.5)
        shape = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 4 * WIDTH, "dropout": 0.1}
        style = {"activation": "gelu", "batch_first": True, "norm_first": True}
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**shape, **style), LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**shape, **style), LAYERS, nn.LayerNorm(WIDTH))

    def embed(self, symbols: Tensor) -> Tensor:
        return WIDTH**0.5 * (self.embedding(symbols) + self.position.weight[: symbols.shape[1]])

    def encode(self, source: Tensor) -> Tensor:
        return self.encoder(self.embed(source), src_key_padding_mask=source == PAD)

    def decode(self, memory: Tensor, source: Tensor, given: Tensor) -> Tensor:
        """Hidden states (B, T, WIDTH) from which the head makes the logits of the symbol after each given one."""
        future = nn.Transformer.generate_square_subsequent_mask(given.shape[1], dtype=torch.bool)
        return self.decoder(self.embed(given), memory, tgt_mask=future, memory_key_padding_mask=source == PAD)

    def forward(self, source: Tensor, given: Tensor) -> Tensor:
        return self.decode(self.encode(source), source, given)


def padded(sequences: list[list[int]], filler: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True, padding_value=filler)


def batches(pairs: list[tuple[list[int], list[int]]], size: int) -> list[Batch]:
    """Pairs of like lengths together, so that little is padding."""
    ordered = sorted(pairs, key=lambda pair: (len(pair[1]), len(pair[0])))
    made = []
    for i in range(0, len(ordered), size):
        sources, targets = zip(*ordered[i : i + size], strict=True)
        made.append(
            (padded(sources, PAD), padded([t[:-1] for t in targets], PAD), padded([t[1:] for t in targets], IGNORED))
        )
    return made


def train(model: Model, data: list[Batch], options: dict[str, Any], epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(data), pct_start=0.12)
    for _ in range(epochs):
        for i in torch.randperm(len(data)).tolist():
            source, given, target = data[i]
            optimizer.zero_grad(set_to_none=True)
            hidden, weight = model(source, given), model.embedding.weight
            lsk.linear_cross_entropy(hidden, weight, target, ignore_index=IGNORED, **options).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def features(model: Model, data: list[Batch]) -> tuple[Tensor, Tensor]:
    """(hidden, target) of every symbol that is not padding."""
    hidden = torch.cat([model(source, given)[target != IGNORED] for source, given, target in data])
    return hidden, torch.cat([target[target != IGNORED] for _, _, target in data])


@torch.no_grad()
def translate(model: Model, source: Tensor, beam: int, logit_scale: float = 1.0) -> list[list[int]]:
    """Beam search (one beam is greedy). Of the ``beam`` translations that remain, each ended or as long as may be, that
    with the largest log-probability / ((5 + length)/6)^LENGTH_PENALTY is taken (Wu et al. 2016)."""
    rows, vocabulary = len(source), model.embedding.num_embeddings
    memory, source = (x.repeat_interleave(beam, 0) for x in (model.encode(source), source))
    said = torch.full((rows * beam, 1), BEGIN)
    scores = torch.full((rows, beam), -torch.inf)
    scores[:, 0] = 0.0  # all beams start alike: only one of them may go on
    after_end = torch.full((vocabulary,), -torch.inf)
    after_end[PAD] = 0.0
    for _ in range(min(LONGEST - 1, 2 * source.shape[1] + 4)):
        hidden = model.decode(memory, source, said)[:, -1]
        following = torch.log_softmax(logit_scale * F.linear(hidden, model.embedding.weight), -1)
        following[:, [PAD, BEGIN]] = -torch.inf
        following[(said == END).any(1)] = after_end
        scores, best = (scores[..., None] + following.view(rows, beam, -1)).flatten(1).topk(beam)
        origin = (torch.arange(rows)[:, None] * beam + best // vocabulary).flatten()
        said = torch.cat((said[origin], (best % vocabulary).view(-1, 1)), 1)
        if (said == END).any(1).all():
            break
    lengths = (said != PAD).sum(1).view(rows, beam) - 1
    chosen = (scores / ((5 + lengths) / 6) ** LENGTH_PENALTY).argmax(1)
    return [
        [s for s in row if s not in (PAD, BEGIN, END)]
        for row in said.view(rows, beam, -1)[range(rows), chosen].tolist()
    ]


def said_by(model: Model, cut: Subwords, sources: list[str], beam: int, logit_scale: float = 1.0) -> list[str]:
    """Translations of texts, 50 of like lengths at a time."""
    encoded = [cut.encode(text) for text in sources]
    order = sorted(range(len(sources)), key=lambda i: len(encoded[i]))
    made = [""] * len(sources)
    for start in range(0, len(order), 50):
        chunk = order[start : start + 50]
        found = translate(model, padded([encoded[i] for i in chunk], PAD), beam, logit_scale)
        for i, symbols in zip(chunk, found, strict=True):
            made[i] = cut.decode(symbols)
    return made


def examine(model: Model, cut: Subwords, data: Corpus, validation: list[Batch], test: list[Batch]) -> dict[str, Any]:
    """What the tables and plots say of a model."""
    model.eval()
    weight = model.embedding.weight.detach()
    hidden, target = features(model, test)
    numbers = measure(features(model, validation), (hidden, target), weight)
    sources, references = (list(side) for side in zip(*data.test, strict=True))
    bleu, greedy = BLEU(), said_by(model, cut, sources, 1)
    beams = said_by(model, cut, sources, BEAM)
    score, scaled = bleu.corpus_score(beams, [references]), math.nan
    if math.isfinite(numbers["temperature"]):
        scaled = bleu.corpus_score(said_by(model, cut, sources, BEAM, 1 / numbers["temperature"]), [references]).score
    return {
        **numbers,
        "bleu_1": bleu.corpus_score(greedy, [references]).score,
        "bleu": score.score,
        "bleu_scaled": scaled,
        "length": score.sys_len / score.ref_len,
        "bins": reliability_points(calibration.evaluate(hidden, target, weight)),
        "samples": list(zip(sources, references, beams, strict=True))[:SAMPLES],
    }


def run(options: argparse.Namespace) -> tuple[list[Record], dict[str, Any]]:
    size = QUICK if options.quick else FULL
    folders = options.catalogues or ([] if options.quick else default_folders())
    data = corpus(folders, options.language, options.pairs or size.pairs, size.held_out)
    print(data.origin)
    cut = Subwords((text for pair in data.train for text in pair), size.vocabulary)
    encoded = [[(cut.encode(a), cut.encode(b)) for a, b in part] for part in data[:3]]
    fitting = [[pair for pair in part if max(map(len, pair)) <= LONGEST] for part in encoded]
    training, validation, test = (batches(part, size.batch) for part in fitting)
    counts = torch.bincount(torch.tensor([s for _, said in fitting[0] for s in said[1:]]), minlength=len(cut.symbols))
    records = []
    for seed in seeds_of(options):
        for method in METHODS:
            set_up(seed)
            model = Model(len(cut.symbols))
            train(model, training, loss_options(method, EPS, counts), size.epochs)
            made = record(NAME, method, EPS, seed, **examine(model, cut, data, validation, test))
            records.append(made)
            print(f"seed {seed}  {method:8}" + "".join(f"  {key} {made[key]:.3f}" for key in (*MEASURED, *SCORES)))
    about = {
        "origin": data.origin,
        "generated": data.is_generated,
        "vocabulary": len(cut.symbols),
        "epochs": size.epochs,
    }
    return records, {**about, "pairs": len(fitting[0]), "held_out": len(fitting[2]), "symbols": int(counts.sum())}


def what_was_done(about: dict[str, Any]) -> str:
    catalogues = """ Messages that differ only in case, punctuation or format directives count as one, so that no
message is both trained on and measured. All is in lower case, every directive is a single %, and messages of several
lines or with plurals are left out."""
    return f"""
{about["origin"]}: {about["pairs"]:,} pairs to train on ({about["symbols"]:,} subwords of translations),
{about["held_out"]} to fit the temperature on and as many to measure.{"" if about["generated"] else catalogues}

The model is a transformer of {LAYERS} + {LAYERS} layers of width {WIDTH} with one embedding for both languages and the
head, over {about["vocabulary"]:,} subwords of a byte-pair encoding learnt from the training pairs, and goes
{about["epochs"]} times through these. *hard* is plain cross-entropy; the others smooth with ε = {EPS}: *uniform* over
all subwords, *others* over all but the target, *unigram* in proportion to their counts. Padding is `ignore_index`.
Accuracy, NLL and ECE are of the next subword, given those of the reference before it. Beam search divides
log-probabilities by ((5 + length)/6)^{LENGTH_PENALTY:g}; "after T" it runs on the logits divided by the temperature.
BLEU is sacrebleu's.
"""


def findings(records: list[Record]) -> str:
    """Each finding of the paper beside what the differences over seeds allow to say here."""
    hard, uniform, unigram = ({"method": method} for method in ("hard", "uniform", "unigram"))
    rows = [  # what is said, the sign it asks for, and the difference: key, of these, less that of those
        (f"smoothing raises BLEU with {BEAM} beams", 1, "bleu", uniform, hard),
        ("... and with one", 1, "bleu_1", uniform, hard),
        (f"{BEAM} beams are better than one with hard targets", 1, "bleu", hard, "bleu_1"),
        ("... and with smoothing", 1, "bleu", uniform, "bleu_1"),
        ("smoothing lowers the ECE", -1, "ece", uniform, hard),
        ("hard targets make the more confident model (T is lower with smoothing)", -1, "temperature", uniform, hard),
        ("one temperature lowers the ECE of hard targets", -1, "ece_scaled", hard, "ece"),
        ("one temperature raises the BLEU of hard targets", 1, "bleu_scaled", hard, "bleu"),
        ("smoothing has the better BLEU even then", 1, "bleu", uniform, hard, "bleu_scaled"),
        ("smoothing costs NLL", 1, "nll", uniform, hard),
        ("smoothing raises the accuracy of the next subword", 1, "accuracy", uniform, hard),
        ("the unigram prior suits words better than the uniform one, by NLL", -1, "nll", unigram, uniform),
    ]
    lines = ["| what might be expected | here | the difference |", "|---|---|---|"]
    for said, sign, *compared in rows:
        found = gap(records, *compared)
        verdict = {sign: "appears", -sign: "**the opposite**"}.get(found.sign, "cannot be told")
        lines.append(f"| {said} | {verdict} | {found} |")
    return "\n".join(lines)


def samples(records: list[Record]) -> str:
    """The first test messages, not chosen, as the first seed's models translate them."""
    seed = records[0]["seed"]
    told = {method: select(records, method=method, seed=seed)[0]["samples"] for method in ("hard", "uniform")}
    lines = ["| message | reference | hard | uniform |", "|---|---|---|---|"]
    for (message, reference, hard), (_, _, uniform) in zip(*told.values(), strict=True):
        lines.append("| " + " | ".join(t.replace("|", "\\|") for t in (message, reference, hard, uniform)) + " |")
    return "\n".join(lines)


def draw(records: list[Record]) -> Figure:
    fig = figure(2, 2)
    panels = (
        (("ece", "ece_scaled"), 100, "ECE, %: as it is, and with T"),
        (("nll", "nll_scaled"), 1, "NLL: as it is, and with T"),
        (("bleu_1", "bleu", "bleu_scaled"), 1, f"BLEU: one beam, {BEAM}, {BEAM} with T"),
    )
    for axes, (keys, scale, title) in zip(fig.axes, panels, strict=False):
        for i, method in enumerate(METHODS):
            for j, key in enumerate(keys):
                numbers = [scale * number for number in values(select(records, method=method), key)]
                x = i + 0.26 * (j - (len(keys) - 1) / 2)
                if numbers:
                    axes.bar(x, statistics.fmean(numbers), 0.24, color=COLOURS[method], alpha=0.95 - 0.3 * j)
                    axes.plot([x] * len(numbers), numbers, ".", color="0.2", markersize=3)
        axes.set(title=title)
        axes.set_xticks(range(len(METHODS)), METHODS)
    for method in METHODS:
        points = [r["bins"] for r in select(records, method=method)]
        draw_reliability(fig.axes[3], points, color=COLOURS[method], label=method)
    fig.axes[3].set(title="reliability on test messages, all seeds")
    fig.axes[3].legend()
    return fig


def main() -> None:
    parser = arguments(__doc__, seeds=2)
    parser.add_argument(
        "--catalogues", type=Path, nargs="+", metavar="DIR", help="folders of LANGUAGE/LC_MESSAGES/*.mo"
    )
    parser.add_argument("--language", default="de", help="(%(default)s)")
    parser.add_argument("--pairs", type=int, help=f"to train on, at most (default: {FULL.pairs}, quick: {QUICK.pairs})")
    options = parser.parse_args()
    if not options.render:
        records, about = run(options)
        save(options.out, NAME, records, {"quick": options.quick, "eps": EPS, **about})
    records, about = load(options.out, NAME)
    save_figure(options.out, NAME, draw(records))
    sections = [what_was_done(about), "## Calibration", table(records, MEASURED), "## Translations"]
    sections += [table(records, SCORES), samples(records), "## Which findings appear", findings(records)]
    page(options.out, NAME, "Label smoothing in machine translation", sections)


if __name__ == "__main__":
    main()
