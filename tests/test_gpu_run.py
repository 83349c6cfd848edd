"""The first minutes on a GPU, rehearsed without one: stages, workers that die or hang, the kit, the counters' table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import skip_unless_available

pytest.importorskip("matplotlib", reason="the report draws with matplotlib")
from bench import counters, first, gpu, harness, kit, logits, parity, results, tune

COMMAND = ["bench.gpu", "--device", "cpu", "--commit", "abc", "--minutes", "1"]


def run_gpu(monkeypatch: pytest.MonkeyPatch, out: Path, scripts: dict[str, str], *more: str) -> int:
    """The program with stages that are these scripts, and nothing to install."""
    found = {name: [sys.executable, "-c", script] for name, script in scripts.items()}
    monkeypatch.setattr(gpu, "commands", lambda arguments, out: found)
    monkeypatch.setattr(gpu.Runner, "install", lambda self, limit_s: self.note("install", "ok"))
    monkeypatch.setattr(kit, "use", lambda folder, unpacked: ({"FROM_THE_KIT": "yes"}, [], True))
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--out", str(out), *more])
    return gpu.main()


def test_no_stage_stops_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STAGES", dict.fromkeys(gpu.STAGES, 3.0))
    scripts = {
        "parity": "raise SystemExit(1)",
        "counters": "import time; print('begun', flush=True); time.sleep(600)",
        "tests": "import os; os.abort()",
        "sanitizers": "import os; print(os.environ['FROM_THE_KIT'])",
    }
    assert run_gpu(monkeypatch, tmp_path, scripts, "--again", "parity") == 1
    state = json.loads((tmp_path / "state.json").read_text())
    assert state["parity"].startswith("failed with exit code 1")
    assert state["counters"].startswith("cut")
    assert state["tests"].startswith("failed with exit code -6")
    assert state["sanitizers"].startswith("ok")
    log = (tmp_path / "run.log").read_text()
    assert "begun" in log
    assert log.rstrip().endswith("yes")


def test_a_build_that_fails_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def run(self: gpu.Runner, name: str, command: list[str], limit_s: float, **more: str) -> str:
        builds.append((name, more))
        return "failed with exit code 1, 9 s" if more["LABELSMOOTH_BUILD"] == "cuda" else "ok, 2 s"

    monkeypatch.setattr(gpu.Runner, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(kit, "FOLDER", tmp_path / "nowhere")
    runner = gpu.Runner(tmp_path, 100.0)
    runner.install(3.0)
    cuda = {"TORCH_CUDA_ARCH_LIST": "9.0", "LABELSMOOTH_BUILD": "cuda"}
    off = ("install", {"LABELSMOOTH_BUILD": "off"})
    assert builds == [off, ("build", cuda), off]
    assert runner.outcomes["install"] == "ok, 2 s; the extension was not built"


def test_the_whole_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    scripts = {"parity": "import time; time.sleep(600)", "tests": "print('never')"}
    assert run_gpu(monkeypatch, tmp_path, scripts, "--minutes", "0.08") == 1
    assert time.monotonic() - begin < 60
    assert json.loads((tmp_path / "state.json").read_text())["tests"] == "no time was left"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--device", "cuda"], "torch finds no CUDA device"),
        (["--device", "cpu", "--out", "/proc/nowhere"], "--out /proc/nowhere"),
        (["--again", "nonsense"], "invalid choice: 'nonsense'"),
        (["--minutes", "-1"], "-1: more than 0"),
    ],
)
def test_what_cannot_run_says_so(
    more: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [*COMMAND, "--out", str(tmp_path), *more])
    try:
        code: Any = gpu.main()
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert said in capsys.readouterr().err


WORKER = """
import sys, time
first = int(sys.argv[-1])
for i in range(first, 4):
    if i == 1: sys.exit("no such kernel")
    if i == 2: time.sleep(600)
    print('{"group": "parity", "case": "%d", "provider": "x"}' % i, flush=True)
"""


def test_a_fault_and_a_hang_cost_one_row_each(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = parity.Piece("cpu", torch.float32, "gradient", "cpu")
    checks = piece.checks()[:1] * 4
    monkeypatch.setattr(parity.Piece, "checks", lambda self: checks)
    monkeypatch.setattr(parity, "START_S", 5.0)
    popen = subprocess.Popen
    monkeypatch.setattr(
        parity.subprocess,
        "Popen",
        lambda command, **more: popen([sys.executable, "-c", WORKER, command[-1]], **more),
    )
    rows = parity.supervise(piece, 0.5)
    assert [row.case for row in rows] == ["0", rows[1].case, rows[2].case, "3"]
    assert rows[1].refused == "its process ended with code 1: no such kernel"
    assert (rows[2].refused or "").startswith("it hung")
    assert [row.refused for row in (rows[0], rows[3])] == [None, None]


def test_parity_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    piece = parity.Piece("cpu", torch.float32, "gradient", "cpu")
    assert parity.Piece.of(piece.word) == piece
    monkeypatch.setattr(parity, "ours", lambda **options: logits.eager)
    monkeypatch.setattr(logits, "EXACT_LIMITS", {torch.float32: (0.0, 0.0, 0.0)})
    parity.work(piece, 1)
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert "off by" in row["refused"]


def make_kit(folder: Path, **changed: str) -> Path:
    (folder / "peers").mkdir(parents=True)
    (folder / "triton" / "ABC").mkdir(parents=True)
    (folder / "triton" / "ABC" / "row_kernel.cubin").write_bytes(b"x")
    (folder / "kit.json").write_text(json.dumps(kit.fingerprint() | changed))
    with zipfile.ZipFile(folder / "labelsmooth_kernels-0-x.whl", "w") as wheel:
        wheel.writestr("labelsmooth_kernels/_C.so", b"extension")
        wheel.writestr("labelsmooth_kernels/__init__.py", b"never this one")
    with zipfile.ZipFile(folder / "peers" / "peer-0-x.whl", "w") as wheel:
        wheel.writestr("peer/__init__.py", b"")
    return folder


def test_a_kit_that_fits_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "PACKAGE", tmp_path / "labelsmooth_kernels")
    kit.PACKAGE.mkdir()
    variables, said, ready = kit.use(make_kit(tmp_path / "kit"), tmp_path / "unpacked")
    assert ready
    assert [path.name for path in kit.PACKAGE.iterdir()] == ["_C.so"]
    assert Path(variables["TRITON_CACHE_DIR"], "ABC", "row_kernel.cubin").exists()
    assert Path(variables["PYTHONPATH"].partition(":")[0], "peer").is_dir()
    assert len(said) == 3


def test_a_kit_of_other_sources_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit, "PACKAGE", tmp_path / "labelsmooth_kernels")
    kit.PACKAGE.mkdir()
    _, said, ready = kit.use(make_kit(tmp_path / "kit", sources="other"), tmp_path / "unpacked")
    assert not ready
    assert said[0].startswith("the kit's extension was left: sources other, here ")
    assert not list(kit.PACKAGE.iterdir())
    assert kit.use(tmp_path / "nowhere", tmp_path / "unpacked")[1:] == (
        ["nowhere: there is no kit, so what it would spare is done here"],
        False,
    )


def test_counters_are_read() -> None:
    page = (
        '==PROF== Profiling "row_kernel"\n"ID","Kernel Name","gpu__time_duration.sum","smsp__inst_executed.sum"\n'
        '"","","ns","inst"\n"0","row_kernel","1,400,000","2,000"\n"1","copy","700,000","n/a"\n'
    )
    found = counters.read(page)
    named, copy = counters.rows_of(found, [("triton, loss", 640), ("copy", 640)])
    assert named.case == "triton, loss"
    assert named.sizes["thread instructions per logit"] == 100
    assert named.sizes[counters.TIME] == 1.4e6
    assert copy.sizes == {counters.TIME: 7e5}
    assert [row.case for row in counters.rows_of(found, [("one call", 1)])] == ["0: row_kernel", "1: copy"]


def test_the_summary_tells_what_missed_its_prediction() -> None:
    sizes = {"n": 8192, "k": 128256, "d": 0, "dtype": "bf16", "backward": True}
    record = {"group": "logits", "case": "a", "device": "NVIDIA H100 80GB HBM3", "date": "", "sizes": sizes}
    rows = [record | {"provider": logits.OURS, "ms": 2.6}, record | {"provider": logits.CUDA, "ms": 3.3}]
    hit, miss = first.summary(rows).splitlines()[2:]
    assert "| 2.60 | +0 % |" in hit
    assert "| 2.20 | +50 % **missed** |" in miss
    assert first.predicted(record | {"provider": logits.EAGER}) is None
    assert first.predicted(rows[0] | {"device": "cpu"}) is None


AHEAD = """
import multiprocessing, pathlib, sys
import torch
from bench import stand_in, tune
from bench.harness import Case
from labelsmooth_kernels.triton_kernels import launch

case, machine = Case("tune", 64, 32000, device="meta"), stand_in.GPUS["H100"][:2]
sizes = {"block": 4096, "warps": 8}
plans = [{"form": "sweep", **sizes, "programs": 132 * p} for p in (1, 2)]
plans += [{"form": "split", **sizes, "splits": splits} for splits in (4, 8)]
broken = {"form": "sweep", "block": 4095, "warps": 8}
with multiprocessing.get_context("spawn").Pool(1) as pool, launch.override(machine=launch.Machine(*machine)):
    ahead = tune.Ahead(pool)
    ahead.compile(case, [*plans, broken])
    assert len(ahead.jobs) == 4, "the number of programs is no matter of a compilation"
    for job in ahead.jobs.values():
        job.wait(60)
    print(ahead.failure(case, plans[1]), "|", ahead.failure(case, broken))
    cubins = lambda: set(pathlib.Path(sys.argv[1]).rglob("*.cubin"))
    made, driver = cubins(), stand_in.driver("H100")
    driver.activate()
    new = torch.empty(64, 32000, dtype=case.dtype, device="meta")
    rows = [torch.empty(64, dtype=torch.int64, device="meta"), torch.empty(1, device="meta")]
    for plan in plans:
        tune.forward(new, *rows, case, plan)
    print(len(made), cubins() == made, [launch.blocks for launch in driver.since(0)])
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real driver is here, and a process has one")
def test_plans_are_compiled_ahead_in_processes(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", AHEAD, str(tmp_path)]
    done = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why, launches = done.stdout.splitlines()
    assert why.startswith("None | ")
    assert "CompilationError" in why
    assert launches == "5 True [64, 64, 256, 64, 256, 512, 64, 256]", "from the cache: sweeps; parts, merge, gradient"


def fake_measure(case: harness.Case, task: tune.Plans, budget_s: float) -> list[harness.Row]:
    return [harness.Row(case.group, case.name, provider.name, ms=1.0) for provider in task.providers(case)]


def test_tuning_writes_rows_as_it_goes_and_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are timed as they become ready; of a compiler that never ends it does not wait beyond the deadline."""
    first, second = (harness.Case("tune", n, 1000) for n in (64, 32))
    plans = [{"form": "sweep", "block": 2048 + i} for i in range(tune.TOGETHER + 3)]
    begin = time.monotonic()

    def ready(self: tune.Ahead, case: harness.Case, plans: list[tune.Plan]) -> list[tune.Plan]:
        assert time.monotonic() < begin + 5, "it waits beyond its deadline"
        return [plan for plan in plans if plan["block"] != 2050]

    monkeypatch.setattr(tune, "measure", fake_measure)
    monkeypatch.setattr(tune.Ahead, "ready", ready)
    monkeypatch.setattr(tune.Ahead, "failure", lambda self, case, plan: "no" if plan["block"] == 2049 else None)
    ahead = tune.Ahead(None)
    batches = list(tune.timed({first: plans, second: plans[2:3]}, ahead, begin + 0.5))
    assert 0.5 <= time.monotonic() - begin < 2
    providers = [[row.provider.partition("block=")[2] or row.provider for row in rows] for rows in batches]
    assert providers[0] == ["2049", tune.TABLE, "2048", "2051", "2052", "2053", "2054", logits.COPY]
    assert providers[1:] == [["2055", "2056"], [tune.TABLE, logits.COPY]], "the second case without waiting for a plan"
    assert [row.refused for row in batches[0]][:2] == ["no", None]
    assert list(tune.timed({first: plans}, ahead, begin)) == []
    assert [len(rows) for rows in tune.timed({first: plans[:2]}, ahead, begin + 100)] == [4], "it ends when all is done"


def test_tuning_runs_on_a_cpu(tmp_path: Path) -> None:
    """What time is left for is written, and the exit code says that it is not all."""
    skip_unless_available("triton")
    out = tmp_path / "x.jsonl"
    command = [sys.executable, "-m", "bench.tune", "--device", "cpu", "--tiny", "--minutes", "0.05", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=results.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert "no time was left for" in done.stdout
    found = {row["provider"] for row in results.load(out)}
    assert {tune.TABLE, logits.COPY} <= found


def test_the_cases_run_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "run", "--cases", "first", "--group", "linear", "--minutes", "0.06"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "x.jsonl")], cwd=results.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {row["group"] for row in results.load(tmp_path / "x.jsonl")} == {"linear"}
