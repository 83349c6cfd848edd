"""Spoken words as log-mel spectrograms: espeak-ng speaks them, a folder holds them, or plain tones stand in for them.

Whatever the source, what is read in the end is a folder of WORD/SPEAKER_TAKE.wav files, as Speech Commands has it, and
every speaker is heard in one of training, validation and test only: the gap between the first and the last is that
between voices. Files are read by the standard library's ``wave``, and the spectrogram is a few lines of PyTorch.
"""

from __future__ import annotations

import functools
import math
import shutil
import subprocess
import wave
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# Many differ in one sound only, so that a word is sometimes hard to tell. The earlier ones are said more often.
SAID = (
    "seven bat nine pen light ship five bid ten cat zero fin three cup right sheep one dog pat four bet mine "
    "chip bin two cot time six pin night seat thin yes bed line cap stop bad fine cheap eight dime sit no pet "
    "fight cut left bit den go cab dock sat up beat pad down set might"
)
ACCENTS = ("en-us", "en", "en-gb-scotland")  # "en-gb" is another name of "en" that takes no variant: one voice for all
VARIANTS = {
    "training": ("m1", "m2", "m3", "m4", "f1", "f2"),
    "validation": ("m5", "f3", "klatt2"),
    "test": ("m6", "m7", "f4", "klatt"),
}
SPLITS = tuple(VARIANTS)
FRAME, HOP, BANDS = 0.025, 0.010, 40  # seconds, seconds, mel bands
ROOM = (10, 30)  # decibels of speech above the noise of a room: a synthetic voice has silence that no microphone has


@dataclass
class Corpus:
    """Where the recordings are, what they say, and which of them each part consists of."""

    source: str
    """in words, for the page"""
    words: list[str]
    files: dict[str, list[Path]]
    """by split"""
    seconds: float
    """a recording is cut, or filled with silence, to this length"""

    def target(self, split: str) -> Tensor:
        index = {word: i for i, word in enumerate(self.words)}
        return torch.tensor([index[path.parent.name] for path in self.files[split]])

    def spectrograms(self, split: str, snr: float | None = None) -> Tensor:
        """(N, BANDS, frames) of a part, with white noise ``snr`` decibels below the speech; None: each within ROOM."""
        generator = torch.Generator().manual_seed(0)
        return torch.stack([self._spectrogram(path, snr, generator) for path in self.files[split]])

    def _spectrogram(self, path: Path, snr: float | None, generator: torch.Generator) -> Tensor:
        signal, rate = read(path)
        signal = signal / signal.square().mean().sqrt().clamp_min(1e-8)  # every recording is equally loud
        length = round(self.seconds * rate)
        signal = torch.nn.functional.pad(signal, (0, length))[:length]
        if snr is None:
            snr = ROOM[0] + (ROOM[1] - ROOM[0]) * float(torch.rand((), generator=generator))
        return log_mel(signal + 10 ** (-snr / 20) * torch.randn(length, generator=generator), rate)


def read(path: Path) -> tuple[Tensor, int]:
    """(samples in [-1, 1), samples per second) of a WAV of 16 bits; several channels become their mean."""
    try:
        with wave.open(str(path)) as file:
            channels, width, rate, frames, *_ = file.getparams()
            content = bytearray(file.readframes(frames))
    except (wave.Error, EOFError) as error:
        raise SystemExit(f"{path} must be a WAV of 16-bit samples: {error}") from error
    if width != 2 or not content:
        raise SystemExit(f"{path} must be a WAV of 16-bit samples, got {len(content)} bytes of {8 * width} bits each")
    samples = torch.frombuffer(content, dtype=torch.int16)
    return samples.reshape(-1, channels).float().mean(1) / 2**15, rate


def write(path: Path, signal: Tensor, rate: int) -> None:
    """Samples in [-1, 1] as a WAV of one channel and 16 bits."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((signal * (2**15 - 1)).round().short().numpy().tobytes())


@functools.cache
def mel_filters(rate: int, bins: int) -> Tensor:
    """(bins, BANDS): triangles over the frequencies 0 … rate/2, each from its left to its right neighbour's centre.

    Centres lie evenly on the mel scale, 2595·log10(1 + f/700), between 60 Hz and 8 kHz or the highest frequency.
    """
    low, high = (2595 * math.log10(1 + f / 700) for f in (60, min(8000, rate / 2)))
    edges = 700 * (10 ** (torch.linspace(low, high, BANDS + 2) / 2595) - 1)
    frequency = torch.linspace(0, rate / 2, bins)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (frequency - left) / (centre - left), (right - frequency) / (right - centre)
    return torch.minimum(rising, falling).clamp_min(0)


def log_mel(signal: Tensor, rate: int) -> Tensor:
    """(samples,) -> (BANDS, frames): the logarithm of the power in each mel band, frame by frame."""
    length, hop = round(FRAME * rate), round(HOP * rate)
    window = torch.hann_window(length)
    points = 2 ** math.ceil(math.log2(length))
    frames = signal.unfold(0, length, hop) * window
    power = torch.fft.rfft(frames, n=points).abs().square() / window.square().sum()
    return (power @ mel_filters(rate, points // 2 + 1) + 1e-5).log().T


def spoken(cache: Path, takes: int) -> Corpus:
    """SAID, spoken by espeak-ng: the most frequent word ``takes`` times by each voice, the rest less often."""
    words = SAID.split()
    program = shutil.which("espeak-ng")
    if program is None:
        raise SystemExit("--source espeak needs espeak-ng: apt-get install espeak-ng, brew install espeak-ng")

    def say(path: Path, word: str, speaker: str, generator: torch.Generator) -> None:
        speed, pitch = torch.randint(120, 221, (), generator=generator), torch.randint(20, 81, (), generator=generator)
        arguments = ("-v", speaker, "-s", str(int(speed)), "-p", str(int(pitch)), "-z", "-w", str(path), word)
        subprocess.run((program, *arguments), check=True, capture_output=True)

    speakers = {split: [f"{a}+{v}" for v in variants for a in ACCENTS] for split, variants in VARIANTS.items()}
    folder = cache / f"espeak-{takes}"
    recorded = record(folder, words, speakers, takes, say)
    return Corpus(f"{len(words)} English words spoken by espeak-ng", words, recorded, 0.65)


def toned(cache: Path, takes: int) -> Corpus:
    """The stand-in where there is no speech: two "vowels" one after the other, sums of harmonics under two formants."""
    formants = {"ee": (270, 2290), "eh": (530, 1840), "ah": (730, 1090), "oo": (300, 870), "er": (490, 1350)}
    words = [first + second for first in formants for second in formants if first != second]
    rate, seconds = 8000, 0.24

    def sound(path: Path, word: str, speaker: str, generator: torch.Generator) -> None:
        size = 0.85 + 0.3 * (zlib.crc32(speaker.encode()) % 100) / 100  # of the speaker: all formants are shifted by it
        pitch, shift = 90 + 120 * torch.rand((), generator=generator), 0.12 * torch.randn(2, 2, generator=generator)
        time = torch.arange(round(seconds * rate)) / rate
        harmonic = pitch * torch.arange(1, int(rate / 2 / float(pitch)))[:, None]
        voice = torch.zeros(2, len(time))
        for i, vowel in enumerate((word[:2], word[2:])):
            peaks = torch.tensor(formants[vowel]) * size * shift[i].exp()
            loudness = (1 / (1 + ((harmonic - peaks) / 90).square())).sum(1, keepdim=True)
            voice[i] = (loudness * (2 * math.pi * harmonic * time).sin()).sum(0)
        glide = torch.sigmoid((time - seconds / 2) / 0.01)
        signal = ((1 - glide) * voice[0] + glide * voice[1]) * (math.pi * time / seconds).sin()
        write(path, 0.5 * signal / signal.abs().max(), rate)

    speakers = {split: [f"{split}{i}" for i in range(n)] for split, n in zip(SPLITS, (6, 3, 4), strict=True)}
    recorded = record(cache / f"tones-{takes}", words, speakers, takes, sound)
    return Corpus(
        f"{len(words)} pairs of synthetic vowels (**not speech**: tones under two formants)", words, recorded, seconds
    )


def record(
    folder: Path,
    words: list[str],
    speakers: dict[str, list[str]],
    takes: int,
    make: Callable[[Path, str, str, torch.Generator], None],
) -> dict[str, list[Path]]:
    """Makes what is missing in ``folder``. Word r of K is said by every speaker about takes·4/(4 + 20·r/K) times, at
    least once: frequencies differ by a factor of five or six between the ends of the list, as in a small vocabulary."""
    files: dict[str, list[Path]] = {split: [] for split in speakers}
    for r, word in enumerate(words):
        (folder / word).mkdir(parents=True, exist_ok=True)
        count = max(1, round(takes * 4 / (4 + 20 * r / len(words))))
        for split, names in speakers.items():
            for speaker in names:
                for take in range(count):
                    path = folder / word / f"{speaker}_{take}.wav"
                    if not path.exists():
                        unfinished = path.with_suffix(".part")
                        seed = zlib.crc32(f"{word} {speaker} {take}".encode())
                        make(unfinished, word, speaker, torch.Generator().manual_seed(seed))
                        unfinished.rename(path)
                    files[split].append(path)
    return files


def folder_of_words(folder: Path, most: int) -> Corpus:
    """Any folder WORD/SPEAKER_TAKE.wav; of the speakers (names up to the first underscore) a fifth is for the test and
    a tenth for validation, by a hash of the name, so that the parts do not change when files are added. Of each word
    at most ``most`` recordings are taken, by a hash as well."""
    if not folder.is_dir():
        raise SystemExit(f"--wav {folder} must be a folder")
    words = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.wav")))
    if len(words) < 2:
        raise SystemExit(f"--wav {folder} must hold at least two folders, one for each word, of .wav files")
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for word in words:
        for path in sorted((folder / word).glob("*.wav"), key=lambda path: zlib.crc32(path.stem.encode()))[:most]:
            tenth = zlib.crc32(path.stem.split("_")[0].encode()) % 10
            files[SPLITS[2 if tenth < 2 else 1 if tenth < 3 else 0]].append(path)
    empty = [split for split, paths in files.items() if not paths]
    if empty:
        raise SystemExit(f"--wav {folder} has too few speakers: none fell to {' and '.join(empty)}")
    return Corpus(f"{len(words)} words from a folder of recordings", words, files, 1.0)
