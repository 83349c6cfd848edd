"""``python -m bench.kit make``: what a machine with a GPU and no network is spared, prepared where there is none.

The folder ``.kit`` (ignored by git) then holds, for Python 3.12, torch 2.11 and Triton 3.6 on an H100 or H200,

    *.whl       this package with its CUDA kernels, compiled for sm_90
    triton/     Triton's cache of the kernels that ``bench.parity``, ``bench.first`` and ``bench.counters`` launch
    peers/      wheels of the losses of others
    kit.json    what all that was made of

:func:`use` takes from it what fits the tree, the Python and the torch at hand, and says what it left.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".kit"
UNPACKED = ROOT / "out" / "kit"
PACKAGE = ROOT / "labelsmooth_kernels"
ARCHITECTURE = "9.0"
PEERS = ("liger-kernel==0.8.5", "cut-cross-entropy==25.1.1")
LIMIT = 60 * 2**20  # bytes


def fingerprint() -> dict[str, str]:
    """What a compiled extension depends on: its sources, the Python, the torch."""
    digest = hashlib.sha256()
    for path in sorted([ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    tag = f"{sys.version_info.major}.{sys.version_info.minor} {sysconfig.get_platform()}"
    return {"sources": digest.hexdigest()[:16], "python": tag, "torch": importlib.metadata.version("torch")}


def use(folder: Path, unpacked: Path) -> tuple[dict[str, str], list[str], bool]:
    """Put the kit to use: (environment variables of every later process, what was done or left, whether the compiled
    extension now lies in the tree). Nothing of the kit itself is changed."""
    variables: dict[str, str] = {}
    said: list[str] = []
    if not (folder / "kit.json").exists():
        return variables, [f"{folder.name}: there is no kit, so what it would spare is done here"], False
    known, here = json.loads((folder / "kit.json").read_text()), fingerprint()
    differ = [f"{name} {known.get(name)}, here {here[name]}" for name in here if known.get(name) != here[name]]
    wheels = sorted(folder.glob("labelsmooth_kernels-*.whl"))
    fits = bool(wheels) and not differ
    if fits:
        with zipfile.ZipFile(wheels[-1]) as wheel:
            for name in wheel.namelist():
                if name.endswith((".so", "_build_info.json")) and name.startswith(f"{PACKAGE.name}/"):
                    (PACKAGE / Path(name).name).write_bytes(wheel.read(name))
        said.append(f"the extension of {wheels[-1].name}")
    else:
        said.append(f"the kit's extension was left: {'; '.join(differ) or 'it has no wheel'}")
    if (folder / "triton").is_dir():
        cache = unpacked / "triton"
        shutil.copytree(folder / "triton", cache, dirs_exist_ok=True)
        variables["TRITON_CACHE_DIR"] = str(cache)
        said.append(f"Triton's cache: {len(list(cache.glob('*/*.cubin')))} kernels")
    if peers := sorted((folder / "peers").glob("*.whl")):
        site = unpacked / "peers"
        for path in peers:
            with zipfile.ZipFile(path) as wheel:
                wheel.extractall(site)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
        said.append(f"peers: {', '.join(path.name.split('-')[0] for path in peers)}")
    return variables, said, fits


def make_wheel(folder: Path) -> None:
    environment = {
        **os.environ,
        "LABELSMOOTH_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURE,
        "MAX_JOBS": str(os.cpu_count() or 1),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    subprocess.run([*command, str(ROOT)], env=environment, check=True)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([*install, *map(str, folder.glob("labelsmooth_kernels-*.whl"))], check=True)  # compile_ahead.py's


def fetch_peers(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
    ]
    subprocess.run([*command, *PEERS], check=True)


def fill_cache(folder: Path) -> None:
    """Compile the kernels of the first stages, in one process per core: nothing is launched, so no GPU is asked for."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    count, script = os.cpu_count() or 1, str(ROOT / "bench" / "compile_ahead.py")
    commands = [[sys.executable, script, str(i), str(count)] for i in range(count)]
    workers = [subprocess.Popen(command, env=environment) for command in commands]
    codes = [worker.wait() for worker in workers]
    if any(codes):
        raise SystemExit(f"kit: Triton's cache is not complete: exit codes {codes}; what went wrong stands above")
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix not in (".cubin", ".json"):
            path.unlink()  # what the compiler went through: nothing that a launch asks for


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


STEPS = {"wheel": make_wheel, "triton": fill_cache, "peers": fetch_peers}


def make(folder: Path, only: list[str]) -> int:
    folder.mkdir(exist_ok=True)
    for name in only or STEPS:
        if name == "wheel":
            for old in folder.glob("labelsmooth_kernels-*.whl"):
                old.unlink()
        target = folder if name == "wheel" else folder / name
        if name != "wheel":
            shutil.rmtree(target, ignore_errors=True)
        STEPS[name](target)
    (folder / "kit.json").write_text(json.dumps(fingerprint(), indent=1) + "\n")
    held = size(folder)
    print(f"{folder}: {held / 2**20:.1f} MiB")
    return 0 if held <= LIMIT else 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["make"])
    parser.add_argument("--only", nargs="+", choices=list(STEPS), default=[], help="default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: .kit in the tree")
    arguments = parser.parse_args()
    return make(arguments.folder, arguments.only)


if __name__ == "__main__":
    raise SystemExit(main())
