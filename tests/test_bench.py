"""The benchmark suite measures what it says: its gate refuses planted errors, its figures keep their machine."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import labelsmooth_kernels as lsk

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
ROOT = Path(__file__).parent.parent
from bench import __main__ as main  # noqa: E402
from bench import aims, harness, inputs, linear, logits, peers, report, results, suite, training  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16
SMALL = harness.Case("logits", 24, 500, dtype=F32)
ZIPF = dataclasses.replace(SMALL, n=64, data="zipf")
HEAD = harness.Case("linear", 24, 300, 32, F32)


def planted(loss: Any, case: harness.Case = SMALL, **traits: Any) -> harness.Provider:
    return harness.losing("planted", loss, case, **traits)


def refusal(task: Any, case: harness.Case, provider: harness.Provider) -> str | None:
    return harness.gate(task, case, provider, task.inputs(case, 0))[1]


def scaled(x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """The right loss with a gradient 1 % too large."""
    loss = F.cross_entropy(x, y, label_smoothing=eps)
    return 1.01 * loss - 0.01 * loss.detach()


def of_ignored(x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """The right loss whose ignored rows get a small gradient."""
    loss = F.cross_entropy(x, y, label_smoothing=eps)
    waste = 1e-9 * x[y == -100].sum()
    return loss + waste - waste.detach()


def off_in_one_entry(x: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """The right loss whose gradient is wrong for one class of the last row."""
    loss = F.cross_entropy(x, y, label_smoothing=eps)
    waste = 1e-4 * x[-1, (y[-1] + 1) % x.shape[1]]
    return loss + waste - waste.detach()


@pytest.mark.parametrize(
    ("loss", "traits", "said"),
    [
        (lambda x, y, e: F.cross_entropy(x, y), {}, "off by"),
        (lambda x, y, e: F.cross_entropy(x, y, label_smoothing=0.99 * e), {}, "off by"),
        (lambda x, y, e: F.cross_entropy(x, y, label_smoothing=e * 500 / 499), {}, "off by"),
        (lambda x, y, e: F.cross_entropy(x, y, label_smoothing=e, reduction="sum"), {}, "the loss is off by"),
        (lambda x, y, e: F.cross_entropy(x * float("nan"), y, label_smoothing=e), {}, "off by nan"),
        (scaled, {}, "the target is off by"),
        (off_in_one_entry, {}, "the rest is off by"),
        (lambda x, y, e: F.cross_entropy(x.clone(), y, label_smoothing=e) + x.data.zero_()[0, 0], {}, "changed the"),
        (logits.eager, {"exact": True}, None),
        (logits.eager, {"eps": 0.0}, None),
    ],
)
def test_the_gate_refuses_what_is_wrong(loss: Any, traits: Any, said: str | None) -> None:
    found = refusal(logits.Logits(), SMALL, planted(loss, **traits))
    assert found is None if said is None else said in (found or "")


def test_the_gate_sees_every_chunk_of_rows() -> None:
    case = dataclasses.replace(SMALL, n=1500)
    assert len(logits.chunks(torch.empty(case.n, case.k))) > 1
    assert refusal(logits.Logits(), case, planted(logits.eager, case)) is None
    assert "rest" in (refusal(logits.Logits(), case, planted(off_in_one_entry, case)) or "")


def test_the_gate_sees_ignored_rows() -> None:
    assert refusal(logits.Logits(), ZIPF, planted(logits.eager, ZIPF)) is None
    assert "inf" in (refusal(logits.Logits(), ZIPF, planted(of_ignored, ZIPF)) or "")


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_gate_of_the_head_sees_a_smoothing_that_is_lost(dtype: torch.dtype) -> None:
    case = dataclasses.replace(HEAD, dtype=dtype)
    task = linear.Linear(with_peers=False)
    assert refusal(task, case, planted(linear.eager, case)) is None
    lost = planted(lambda h, w, y, e: F.cross_entropy(F.linear(h, w), y), case)
    assert "off by" in (refusal(task, case, lost) or "")
    inputs_ = task.inputs(case, 0)
    h, w = inputs_.originals
    value = F.cross_entropy(F.linear(h.double(), w.double()), inputs_.target, label_smoothing=0.1).item()
    assert linear.expected_results(inputs_, 0.1, None)[0].item() == pytest.approx(value, rel=1e-12)


def test_every_case_of_the_suite_has_a_floor_and_a_place_of_its_own() -> None:
    for device in ("cpu", "cuda"):
        for which in ("full", "smoke"):
            entries = suite.entries(device, which)
            names = [(entry.case.group, entry.case.name) for entry in entries]
            assert len(set(names)) == len(names)
            assert all(entry.case.work > 0 and entry.case.device == device for entry in entries)
    assert SMALL.floor_bytes == 2 * 24 * 500 * 4
    assert dataclasses.replace(SMALL, backward=False).floor_bytes == 24 * 500 * 4
    assert HEAD.flops == 3 * 2 * 24 * 300 * 32
    assert HEAD.floor_bytes == 2 * (24 + 300) * 32 * 4


def test_realistic_data_is_what_it_says() -> None:
    case = harness.Case("logits", 6400, 1000, dtype=F32, data="zipf")
    rng = torch.Generator().manual_seed(0)
    target = inputs.targets(case, rng)
    assert (target == -100).float().mean().item() == pytest.approx(26 / 64)
    kept = target[target != -100]
    shares = torch.bincount(kept, minlength=1000) / len(kept)
    frequencies = inputs.log_frequencies(case).softmax(0)
    assert (shares - frequencies).abs().max() < 0.02
    assert shares[0] > 20 * shares[500:].mean()
    top = inputs.logits(case, target, rng).softmax(-1).max(-1).values
    assert (top > 0.5).float().mean() > 0.2
    assert (top < 0.1).float().mean() > 0.1


def test_memory_is_the_peak_of_what_was_live() -> None:
    def step() -> torch.Tensor:
        first = torch.empty(1_000_000)
        second = torch.empty(500_000)
        del first
        return torch.empty(100_000) + second[:1]

    assert 6_000_000 <= harness.peak_bytes(step, "cpu") < 6_100_000


class Clock:
    """Time that passes only when a provider says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, name: str, *milliseconds: float, **traits: Any) -> harness.Provider:
        """A provider whose calls take so long, in turn."""
        pauses = itertools.cycle(milliseconds)

        def step(_: harness.Inputs) -> harness.Results:
            self.now += next(pauses) / 1e3
            return (torch.zeros(()),)

        return harness.Provider(name, step, **traits)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(harness, "time", clock)
    return clock


@dataclasses.dataclass
class Given:
    """A task of given providers."""

    given: list[harness.Provider]
    baseline: str = "long"

    def inputs(self, case: harness.Case, seed: int) -> harness.Inputs:
        return harness.Inputs((), (), None)

    def providers(self, case: harness.Case) -> list[harness.Provider]:
        return self.given

    def errors(self, *_: Any) -> dict[str, float]:
        return {}

    def limits(self, *_: Any) -> dict[str, float]:
        return {}


def test_times_ratios_and_ceilings_are_those_of_the_calls(clock: Clock) -> None:
    calls = itertools.count()

    def tire(_: harness.Inputs) -> harness.Results:
        if next(calls) == 4:  # after the gate, the look at the memory and two rounds
            raise MemoryError("too tired")
        return (torch.zeros(()),)

    ways = [clock.taking("short", 4), clock.taking("long", 12), clock.taking("moody", 1, 1, 20)]
    ways += [clock.taking("copy", 2, work=2 * SMALL.floor_bytes), harness.Provider("tired", tire)]
    ways += [harness.Provider("broken", lambda _: 1 / 0)]  # type: ignore[arg-type,return-value]
    rows = {row.provider: row for row in harness.measure(SMALL, Given(ways), 1.0)}
    short = rows["short"]
    assert short.ms == pytest.approx(4)
    assert short.ratio == pytest.approx(1 / 3)
    assert rows["long"].ratio == 1
    assert (rows["moody"].p20, rows["moody"].ms, rows["moody"].p80) == pytest.approx((1, 1, 20))
    assert rows["copy"].percent_of_ceiling == pytest.approx(100)
    assert short.percent_of_ceiling == pytest.approx(25)
    assert short.gb_per_s == pytest.approx(SMALL.floor_bytes / 4e6)
    assert 30 < short.repeats < 40
    assert rows["broken"].ms is None
    assert "ZeroDivisionError" in (rows["broken"].refused or "")
    assert rows["tired"].refused == "MemoryError: too tired"
    assert rows["tired"].ms is None


def test_a_slow_provider_leaves_the_time_to_the_others(clock: Clock) -> None:
    ways = [clock.taking("short", 20), clock.taking("other", 20), clock.taking("long", 80)]

    def repeats(budget_s: float) -> list[int]:
        return [row.repeats for row in harness.measure(SMALL, Given(ways), budget_s)]

    assert repeats(0.0) == [harness.LEAST] * 3
    short, other, long = repeats(0.8)  # the gate, the look at the memory, three rounds and then some
    assert short == other > long == harness.LEAST
    assert len(set(repeats(2.0))) == 1
    alike = Given([clock.taking(name, 100) for name in "abc"])
    assert len({row.repeats for row in harness.measure(SMALL, alike, 2.0)}) == 1


def rows_of(**changes: Any) -> list[dict[str, Any]]:
    row = {"group": "logits", "case": "a", "provider": "ours", "ms": 2.0, "date": "2026-01-01", "commit": "x"}
    machine = {"device": "cpu", "cpu": "one", "cpu capability": "AVX2", "threads": 2}
    return [{**row, **machine, **changes}]


def test_figures_of_two_machines_are_not_compared(tmp_path: Path) -> None:
    table = results.compare(rows_of(), rows_of(ms=1.0, commit="y", date="2026-01-02"))
    assert "| logits | a | ours | 2 | 1 | 0.50 |" in table
    with pytest.raises(ValueError, match="one machine"):
        results.compare(rows_of(), rows_of(cpu="another"))
    with pytest.raises(ValueError, match="no rows"):
        results.compare([], [])
    for name, rows in (("a", rows_of()), ("b", rows_of(threads=4))):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert "'threads': 4" in run.stderr


def test_files_of_figures_are_added_to_and_carry_their_origin(tmp_path: Path) -> None:
    path, facts = tmp_path / "x.jsonl", results.provenance("cpu")
    results.append(path, [harness.Row("g", "c", "p", ms=1.0)], facts)
    before = path.read_text()
    results.append(path, [harness.Row("g", "c", "p", ms=1.23456789)], facts | {"date": "2999"})
    assert path.read_text().startswith(before)
    rows = results.load(path)
    assert [row["ms"] for row in rows] == [1.0, 1.2346]
    assert {"torch", "triton", "commit", "date", "device", "cpu"} <= rows[0].keys()
    assert results.newest(rows) == rows[1:]
    assert results.measured(path, facts) == {("g", "c")}
    assert results.measured(path, facts | {"commit": "another"}) == set()
    assert results.measured(tmp_path / "none", facts) == set()


def test_peers_that_are_missing_are_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = peers.providers(peers.AT_LOGITS, SMALL)
    assert {p.refused for p in on_cpu} == {"it needs a GPU"}

    def broken(name: str) -> Any:
        raise ImportError("libcuda.so.1 not found") if "flash" in name else ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    found = {p.name: p.refused for p in peers.providers(peers.AT_LOGITS, SMALL, interpreted=True)}
    assert found[peers.LIGER] == "not installed"
    assert found["flash-attention"] == "ImportError: libcuda.so.1 not found"


def test_a_changing_epsilon_compiles_once() -> None:
    tensors = [(8, torch.tensor(0.01 * i), 0) for i in range(4)]
    assert training.graphs(lsk.cross_entropy, tensors, "cpu") == 1
    numbers = [(8, 0.01 * i, 0) for i in range(1, 5)]
    assert training.graphs(F.cross_entropy, numbers, "cpu") == 4  # which shows that it counts


@pytest.mark.skipif(not linear.HAS_HEAD_LOSS, reason="tables name PyTorch's loss of a head, which this torch has not")
def test_the_readme_shows_the_committed_figures() -> None:
    records = results.newest(results.load(results.FOLDER))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(report.BLOCK.findall(readme)) >= 4
    assert report.fill(readme, records) == readme, "python -m bench report --readme"


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    page = report.page(results.newest(results.load(results.FOLDER)))
    assert page.count("<svg") >= 4
    assert "<link" not in page
    assert "<script" not in page
    assert " src=" not in page


def test_aims_without_figures_are_not_met() -> None:
    counted = rows_of(group="recompilations", count=1, sizes={})
    timed = rows_of(group="calls", sizes={"dtype": "fp32"})
    assert [found.value for found in aims.of(counted + timed)] == [None]
    aim = aims.Aim("case", "what", None, 1.0, False)
    assert not aim.met
    assert "not measured" in aim.line()
    assert aims.Aim("case", "what", 1.0, 1.0, False).met
    assert aims.Aim("case", "what", 1.0, 1.0, True).met
    assert not aims.Aim("case", "what", 0.9, 1.0, True).met
    assert not aims.Aim("case", "what", 1.1, 1.0, False).met


def test_a_wrong_or_slow_kernel_of_ours_fails_the_smoke_run(capsys: pytest.CaptureFixture[str]) -> None:
    def ours_and_eager(times: float, **changes: Any) -> list[dict[str, Any]]:
        return rows_of(provider=logits.INPLACE, ratio=0.5, **changes) + rows_of(provider=logits.EAGER, ratio=times / 2)

    assert main.verdict(ours_and_eager(main.REGRESSION + 1), "smoke") == 0
    assert main.verdict(ours_and_eager(main.REGRESSION - 1), "smoke") == 1
    assert main.verdict(ours_and_eager(main.REGRESSION - 1), "full") == 0
    assert main.verdict(ours_and_eager(9, refused="the loss is off by 1"), "full") == 1
    assert "REFUSED logits, a, ours, in place: the loss is off by 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--minutes", "-1"], "-1: more than 0"),
        (["run", "--group", "nonsense"], "there are calls, cost of smoothing"),
        (["compare", "nowhere", "nowhere"], "nowhere: there is no such file"),
        (["report", "--results", "nowhere"], "nowhere: there is no such file"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    assert said in f"{stop.value} {capsys.readouterr().err}"


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    cases = [dataclasses.replace(SMALL, n=n) for n in (1, 2)]
    entries = [suite.Entry(Given([clock.taking("ours", 1)], "ours"), case) for case in cases]
    path = tmp_path / "x.jsonl"
    command = ["bench", "run", "--group", "logits", "--out", str(path), "--resume", "--minutes", "0.1"]
    monkeypatch.setattr(sys, "argv", [*command, "--commit", "abc"])
    monkeypatch.setattr(suite, "entries", lambda device, which: entries[:1])
    assert main.main() == 0
    first = path.read_text()
    monkeypatch.setattr(suite, "entries", lambda device, which: entries)
    assert main.main() == 0
    assert path.read_text().startswith(first)
    assert [row["case"] for row in results.load(path)] == [case.name for case in cases]
    path.unlink()
    monkeypatch.setattr(main, "LATE_S", 1e9)
    assert main.main() == main.INCOMPLETE
