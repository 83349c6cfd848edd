"""Parallel text that machines carry: the messages of installed programs and their translations, cut into subwords.

A gettext catalogue (LANGUAGE/LC_MESSAGES/*.mo) maps each English message of a program to its translation. Where there
are none, a small parallel corpus is generated: dates and numbers written out in English and German.
"""

from __future__ import annotations

import heapq
import random
import re
import struct
import sys
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Pair = tuple[str, str]
FOLDERS = ("/usr/share/locale", "/usr/share/locale-langpack", "/usr/local/share/locale", "/opt/homebrew/share/locale")
LONGEST = 8  # words of a message, and half again as many of its translation
PAD, BEGIN, END, UNKNOWN = range(4)
_MAGIC = {b"\xde\x12\x04\x95": "<", b"\x95\x04\x12\xde": ">"}  # the byte order of a catalogue
_DIRECTIVE = re.compile(r"%[-+#0-9.*$'hlzjtq]*(?:\(\w+\))?[a-zA-Z]|\{\w*\}")
_MNEMONIC = re.compile(r"(?<!\w)_(?=\w)|&(?=\w)")  # which letter of a menu's entry is underlined


def default_folders() -> list[Path]:
    """Where systems keep catalogues; those of this Python's own prefix too."""
    folders = [Path(folder) for folder in FOLDERS] + [Path(sys.base_prefix, "share", "locale")]
    return [folder for folder in dict.fromkeys(folders) if folder.is_dir()]


def read_catalogue(path: Path) -> Iterator[Pair]:
    """(message, translation) of a .mo file, without messages that have a plural; contexts are dropped."""
    data = path.read_bytes()
    order = _MAGIC.get(data[:4])
    if order is None or len(data) < 20:
        return
    count, *tables = struct.unpack_from(f"{order}3I", data, 8)

    def entry(table: int, i: int) -> bytes:
        length, start = struct.unpack_from(f"{order}2I", data, table + 8 * i)
        return data[start : start + length]

    header = re.search(rb"charset=([\w-]+)", entry(tables[1], 0))  # the translation of the empty message, the first
    charset = header[1].decode() if header else "utf-8"
    for i in range(1, count):
        message, translation = (entry(table, i) for table in tables)
        if b"\0" not in message:
            yield message.decode(errors="replace").split("\x04")[-1], translation.decode(charset, errors="replace")


def clean(text: str) -> str:
    """Lower case without mnemonics; every format directive is a single %."""
    text = text.replace("%<", "'").replace("%>", "'").replace("%%", "%")  # GCC's quotation marks
    return " ".join(_DIRECTIVE.sub("%", _MNEMONIC.sub("", text)).lower().split())


def key_of(message: str) -> str:
    """What two messages have in common that differ in punctuation, case and directives only."""
    return " ".join(re.findall(r"[^\W\d_]+", message.lower()))


def collect(folders: Sequence[Path], language: str) -> tuple[list[Pair], Counter[str]]:
    """Distinct pairs of one line and 2 to LONGEST words, in a fixed order, and how many each catalogue gave.

    Of messages with the same :func:`key_of` the first is kept, so that a split of the pairs is one of messages.
    Untranslated messages and those that are mostly figures and punctuation are dropped.
    """
    paths = sorted({p.resolve() for folder in folders for p in folder.rglob(f"{language}/LC_MESSAGES/*.mo")})
    found: dict[str, tuple[Pair, str]] = {}
    for path in paths:
        for pair in read_catalogue(path):
            message, translation = map(clean, pair)
            if "\n" in pair[0].strip() or message == translation or "\ufffd" in message + translation:
                continue
            words, translated = (len(re.findall(r"\w+", text)) for text in (message, translation))
            letters = len(re.findall(r"[^\W\d_]", message))
            if 2 <= words <= LONGEST and 1 <= translated <= 1.5 * LONGEST and 2 * letters > len(message):
                found.setdefault(key_of(message), ((message, translation), path.stem))
    found.pop("", None)
    return [pair for pair, _ in found.values()], Counter(name for _, name in found.values())


_WORDS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen

null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn
neunzehn

twenty thirty forty fifty sixty seventy eighty ninety

zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig

january february march april may june july august september october november december

januar februar märz april mai juni juli august september oktober november dezember
"""
_UNITS, _EINER, _TENS, _ZEHNER, _MONTHS, _MONATE = (part.split() for part in _WORDS.split("\n\n"))
_THINGS = {"hours": "stunden", "days": "tage", "weeks": "wochen", "files": "dateien", "messages": "nachrichten"}
_ASKED = {"before": "vor dem", "after": "nach dem", "since": "seit dem", "until": "bis zum"}


def english(n: int) -> str:
    """A number from 0 to 999, written out."""
    if n < 100:
        return _UNITS[n] if n < 20 else _TENS[n // 10 - 2] + (f"-{_UNITS[n % 10]}" if n % 10 else "")
    return f"{_UNITS[n // 100]} hundred" + (f" and {english(n % 100)}" if n % 100 else "")


def german(n: int) -> str:
    """A number from 0 to 999, written out, as it stands in front of others: ein, not eins."""
    if n < 100:
        return _EINER[n] if n < 20 else (f"{_EINER[n % 10]}und" if n % 10 else "") + _ZEHNER[n // 10 - 2]
    return f"{_EINER[n // 100]}hundert" + (german(n % 100) if n % 100 else "")


def generated(count: int, seed: int = 0) -> list[Pair]:
    """Distinct pairs from a small grammar. German has a choice that nothing in English tells: the day as an ordinal
    number or in figures."""
    draw = random.Random(seed)
    found: dict[str, Pair] = {}
    while len(found) < count:
        thing, asked, month = draw.choice([*_THINGS]), draw.choice([*_ASKED]), draw.randrange(12)
        day, amount = draw.randrange(1, 29), draw.randrange(2, 1000)
        tag = f"{german(day)}{'ten' if day < 20 else 'sten'}" if draw.random() < 0.5 else f"{day}."
        tag = {"einten": "ersten", "dreiten": "dritten", "siebenten": "siebten", "achtten": "achten"}.get(tag, tag)
        date, datum = f"{asked} {_MONTHS[month]} {english(day)}", f"{_ASKED[asked]} {tag} {_MONATE[month]}"
        message = f"{english(amount)} {thing} {date}"
        found.setdefault(message, (message, f"{german(amount)} {_THINGS[thing]} {datum}"))
    return list(found.values())


class Corpus(NamedTuple):
    train: list[Pair]
    validation: list[Pair]
    test: list[Pair]
    origin: str
    """what it is, for the page"""
    is_generated: bool


def corpus(folders: Sequence[Path], language: str, train: int, held_out: int) -> Corpus:
    """At most ``train`` pairs to train on and 2·``held_out`` others, the same ones every time."""
    pairs, files = collect(folders, language)
    wanted, few = train + 2 * held_out, len(pairs) < 10 * held_out
    if few:
        pairs = generated(wanted)
        origin = (
            "**A generated corpus**, as catalogues were not asked for, or too few found: dates and numbers written "
            "out, English to German"
        )
    else:
        most = ", ".join(name for name, _ in files.most_common(6))
        origin = (
            f"The messages of {len(files)} programs and libraries, as the gettext catalogues of a Linux distribution "
            f"hold them (most from {most}), and their translations, English to `{language}`"
        )
    random.Random(0).shuffle(pairs)
    cut = (held_out, 2 * held_out, wanted)
    return Corpus(pairs[cut[1] : cut[2]], pairs[: cut[0]], pairs[cut[0] : cut[1]], origin, few)


def pieces(text: str) -> list[str]:
    """Words with the space in front of them, and punctuation: joined, they are the text again."""
    return re.findall(r" ?\w+| ?[^\w\s]", f" {text}")


def joined(symbols: Sequence[str], pair: Pair) -> tuple[str, ...]:
    """The symbols with every occurrence of a pair made one."""
    made: list[str] = []
    for symbol in symbols:
        if made and (made[-1], symbol) == pair:
            made[-1] += symbol
        else:
            made.append(symbol)
    return tuple(made)


def learn(words: dict[str, int], size: int) -> dict[Pair, int]:
    """Pairs of symbols and the order in which they were joined: each time the commonest, in words with these counts."""
    parts = {word: tuple(word) for word in words}
    counts: Counter[Pair] = Counter()
    where: dict[Pair, dict[str, None]] = {}  # a set in a fixed order

    def count(word: str, sign: int) -> None:
        for pair in pairwise(parts[word]):
            counts[pair] += sign * words[word]
            where.setdefault(pair, {})[word] = None

    for word in words:
        count(word, 1)
    heap = [(-n, pair) for pair, n in counts.items()]
    heapq.heapify(heap)
    ranks: dict[Pair, int] = {}
    while heap and len(ranks) < size:
        often, best = heapq.heappop(heap)
        if -often != counts[best] or best in ranks:
            continue  # its count has changed since, and it is in the heap again
        ranks[best] = len(ranks)
        changed: dict[Pair, None] = {}
        for word in list(where[best]):
            changed.update(dict.fromkeys(pairwise(parts[word])))
            count(word, -1)
            parts[word] = joined(parts[word], best)
            count(word, 1)
            changed.update(dict.fromkeys(pairwise(parts[word])))
        for pair in changed:
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], pair))
    return ranks


class Subwords:
    """Byte-pair encoding over characters, learnt from texts: starting from the characters, the commonest pair of
    neighbours within words becomes a symbol until there are ``size`` (or no pair occurs twice)."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        words = Counter(piece for text in texts for piece in pieces(text))
        counts: Counter[str] = Counter()
        for word, n in words.items():
            counts.update({c: n * word.count(c) for c in word})
        characters = [c for c, n in counts.most_common() if n > 1]
        self.ranks = learn({word: n for word, n in words.items() if n > 1}, size - len(characters) - UNKNOWN - 1)
        self.symbols = ["", "", "", "\ufffd", *characters, *("".join(pair) for pair in self.ranks)]
        self.index = {symbol: i for i, symbol in enumerate(self.symbols) if i > UNKNOWN}
        self.word = cache(self._word)

    def _word(self, word: str) -> list[int]:
        symbols = tuple(word)
        while known := [pair for pair in pairwise(symbols) if pair in self.ranks]:
            symbols = joined(symbols, min(known, key=self.ranks.__getitem__))
        return [self.index.get(symbol, UNKNOWN) for symbol in symbols]

    def encode(self, text: str) -> list[int]:
        """Symbols of a text, between BEGIN and END."""
        return [BEGIN, *(i for piece in pieces(text) for i in self.word(piece)), END]

    def decode(self, symbols: Iterable[int]) -> str:
        return "".join(self.symbols[i] for i in symbols).strip()
