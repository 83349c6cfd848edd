"""What the studies of examples/studies stand on: their statistics, their data, their search and their scores."""

from __future__ import annotations

import gettext
import importlib
import json
import math
import re
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import ModuleType

FOLDER = Path(__file__).parent.parent / "examples" / "studies"
for _name in ("matplotlib", "sklearn", "sacrebleu", "tqdm"):
    pytest.importorskip(_name, reason=f"{_name}, which the studies need, is not installed")


@pytest.fixture(scope="module")
def study() -> Any:
    """Modules of the folder by name."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def common(study: Any) -> ModuleType:
    module: ModuleType = study("common")
    return module


def records(common: ModuleType, hard: list[float], smoothed: list[float]) -> list[dict[str, Any]]:
    rows = [("hard", 0.0, hard), ("uniform", 0.1, smoothed)]
    return [common.record("x", m, e, i, ece=v) for m, e, values in rows for i, v in enumerate(values)]


def test_a_difference_is_told_only_where_the_seeds_allow_it(common: ModuleType) -> None:
    """By hand: differences 0.01, 0.02, 0.03 have mean 0.02, deviation 0.01; t = 4.303 with two degrees of freedom."""
    one, other = {"method": "uniform"}, {"method": "hard"}
    found = common.gap(records(common, [0.1, 0.2, 0.3], [0.11, 0.22, 0.33]), "ece", one, other)
    assert found.mean == pytest.approx(0.02)
    assert found.margin == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert found.sign == 0
    assert str(found).startswith("not told apart")
    sure = common.gap(records(common, [0.1, 0.2, 0.3], [0.05, 0.15, 0.249]), "ece", one, other)
    assert sure.sign == -1
    assert sure.against(-1) == f"{sure}: as in the paper"
    assert sure.against(1) == f"{sure}: the opposite of the paper"
    assert found.against(1).endswith("no such effect is seen at this size")
    alone = common.gap(records(common, [0.1], [0.9]), "ece", one, other)
    assert str(alone) == "not known to differ (1 seed)"


GUIDE = FOLDER.parents[1] / "docs" / "label_smoothing.md"
CELLS = {
    "accuracy, points": ("accuracy", 100, 2),
    "NLL": ("nll", 1, 3),
    "NLL, each after its temperature": ("nll_scaled", 1, 3),
    "ECE, points": ("ece", 100, 2),
    "ECE, each after its temperature, points": ("ece_scaled", 100, 2),
}


def test_the_guide_says_what_the_studies_found(common: ModuleType) -> None:
    lines = GUIDE.read_text(encoding="utf-8").splitlines()
    table = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.split("|")[1:-1]] for line in lines) if cells}
    wanted = {"digits": {"eps": 0.1}, "speech": {"condition": "room"}, "translation": {}, "text": {"role": "model"}}
    for row, (key, unit, digits) in CELLS.items():
        for cell, (name, chosen) in zip(table[row], wanted.items(), strict=True):
            found = json.loads((GUIDE.parent / "studies" / f"{name}.json").read_text())["records"]
            hard = {k: v for k, v in chosen.items() if k != "eps"} | {"method": "hard"}
            gap = common.gap(found, key, {**chosen, "method": "uniform"}, hard)
            said = f"{gap.mean * unit:+.{digits}f} ± {gap.margin * unit:.{digits}f}"
            assert cell == (f"**{said}**" if gap.sign else f"{said} n.t."), (row, name)


def test_the_snippets_of_the_guide_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) > 6
    exec("\n".join(snippets), {})


def test_a_table_shows_the_spread_and_what_is_missing(common: ModuleType) -> None:
    rows = records(common, [0.1, 0.2], [0.3, math.nan])
    rows[-1]["ece"] = None
    table = common.table(rows, ["ece"]).splitlines()
    assert len(table) == 4
    assert "15.00 ± 7.07 %" in table[2]
    assert "30.00 % (1 of 2)" in table[3]


def test_records_come_back(common: ModuleType, tmp_path: Path) -> None:
    rows = records(common, [0.1, math.nan], [math.inf, 0.4])
    common.save(tmp_path, "x", rows, {"words": 3})
    back, about = common.load(tmp_path, "x")
    assert [r["ece"] for r in back] == [0.1, None, None, 0.4]
    assert about["words"] == 3


def catalogue(path: Path, messages: dict[str, str]) -> None:
    """A .mo file as msgfmt writes it: header, two tables of (length, offset), strings that end in a zero byte."""
    pairs = sorted((k.encode(), v.encode()) for k, v in messages.items())
    begin = 28 + 16 * len(pairs)
    tables: list[list[int]] = [[], []]
    content = b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += [len(pair[side]), begin + len(content)]
            content += pair[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, begin)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head + struct.pack(f"<{4 * len(pairs)}I", *tables[0], *tables[1]) + content)


def test_catalogues_are_read_as_gettext_reads_them(study: Any, tmp_path: Path) -> None:
    catalogues = study("catalogues")
    path = tmp_path / "de" / "LC_MESSAGES" / "tool.mo"
    messages = {
        "": "Content-Type: text/plain; charset=UTF-8\n", "cannot open file %s": "%s lässt sich nicht öffnen",
        "one file\0many files": "eine Datei\0viele Dateien", "menu\x04Open the _file": "Datei _öffnen", "ok": "ok",
        "Cannot open file '%d'!": "anders", "too many arguments given": "zu viele Argumente",
    }  # fmt: skip
    catalogue(path, messages)
    read = dict(catalogues.read_catalogue(path))
    with path.open("rb") as file:
        known = gettext.GNUTranslations(file)
    assert read.pop("Open the _file") == known.pgettext("menu", "Open the _file")
    assert all(known.gettext(message) == translation for message, translation in read.items())
    assert len(read) == 4
    pairs, files = catalogues.collect([tmp_path], "de")
    assert ("too many arguments given", "zu viele argumente") in pairs
    assert ("cannot open file '%'!", "anders") in pairs
    assert len(pairs) == files["tool"] == 3, "one of two that differ in punctuation only, and nothing untranslated"


def test_the_generated_corpus(study: Any) -> None:
    catalogues = study("catalogues")
    assert [catalogues.english(n) for n in (0, 13, 21, 340, 999)] == [
        "zero", "thirteen", "twenty-one", "three hundred and forty", "nine hundred and ninety-nine",
    ]  # fmt: skip
    assert [catalogues.german(n) for n in (1, 16, 21, 70, 317)] == [
        "ein", "sechzehn", "einundzwanzig", "siebzig", "dreihundertsiebzehn",
    ]  # fmt: skip
    pairs = catalogues.generated(300)
    assert pairs == catalogues.generated(300)
    assert len({message for message, _ in pairs}) == 300
    parts = catalogues.corpus([], "de", 200, 40)
    assert parts.is_generated
    assert [len(p) for p in parts[:3]] == [200, 40, 40]
    assert not {m for m, _ in parts.train} & {m for m, _ in (*parts.validation, *parts.test)}


def test_subwords_are_the_text_again(study: Any) -> None:
    catalogues = study("catalogues")
    texts = [text for pair in catalogues.generated(200) for text in pair]
    cut = catalogues.Subwords(texts, 120)
    assert len(cut.symbols) == 120
    assert all(cut.decode(cut.encode(text)[1:-1]) == text for text in texts)
    assert len(cut.encode("twenty files")) < len("twenty files")
    assert catalogues.UNKNOWN in cut.encode("ж")


def test_one_beam_is_the_greedy_search(study: Any) -> None:
    translation, catalogues = study("translation"), study("catalogues")
    torch.manual_seed(0)
    model = translation.Model(23).eval()
    source = torch.tensor([[5, 9, 7, 4], [6, 8, 0, 0]])
    found = translation.translate(model, source, 1)
    for row, want in zip(([5, 9, 7, 4], [6, 8]), found, strict=True):
        said, alone = [catalogues.BEGIN], torch.tensor([row])
        with torch.no_grad():
            while len(said) <= min(translation.LONGEST - 1, 2 * source.shape[1] + 4):
                logits = model(alone, torch.tensor([said]))[0, -1] @ model.embedding.weight.T
                logits[[catalogues.PAD, catalogues.BEGIN]] = -torch.inf
                said.append(int(logits.argmax()))
                if said[-1] == catalogues.END:
                    break
        assert [s for s in said[1:] if s != catalogues.END] == want


def test_scores_of_a_verification(study: Any) -> None:
    matching = study("matching")
    apart = matching.verification(torch.linspace(0.6, 1, 50), torch.linspace(-1, 0.5, 400))
    assert (apart["auc"], apart["tar"], apart["eer"]) == (1.0, 1.0, 0.0)
    rng = torch.Generator().manual_seed(0)
    same, different = torch.randn(4000, generator=rng) + 1, torch.randn(6000, generator=rng)
    found = matching.verification(same, different)
    assert found["auc"] == pytest.approx(_normal(1 / math.sqrt(2)), abs=0.01)
    assert found["eer"] == pytest.approx(_normal(-0.5), abs=0.01)
    chance = matching.verification(torch.ones(10), torch.ones(20))
    assert chance["auc"] == 0.5
    y = torch.tensor([0, 0, 1])
    inside, across = matching.pair_scores(torch.eye(3), y)
    assert (len(inside), len(across)) == (1, 2)


def _normal(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def tone(frequency: float, rate: int, seconds: float = 0.5) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * frequency * torch.arange(round(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
def test_a_tone_is_in_its_band(study: Any, rate: int) -> None:
    sound = study("sound")
    mel = [2595 * math.log10(1 + f / 700) for f in (60, min(8000, rate / 2))]
    for frequency in (300.0, 1000.0, 3000.0):
        spectrum = sound.log_mel(tone(frequency, rate), rate)
        assert spectrum.shape[0] == sound.BANDS
        where = (2595 * math.log10(1 + frequency / 700) - mel[0]) / (mel[1] - mel[0]) * (sound.BANDS + 1) - 1
        assert abs(float(spectrum.mean(1).argmax()) - where) <= 1


def test_waves_come_back(study: Any, tmp_path: Path) -> None:
    sound = study("sound")
    signal = tone(440.0, 8000)
    sound.write(tmp_path / "a.wav", signal, 8000)
    back, rate = sound.read(tmp_path / "a.wav")
    assert rate == 8000
    assert (back - signal).abs().max() < 1e-4
    (tmp_path / "b.wav").write_bytes(b"RIFF")
    with pytest.raises(SystemExit, match="must be a WAV of 16-bit samples"):
        sound.read(tmp_path / "b.wav")
