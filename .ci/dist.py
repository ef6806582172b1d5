"""Build the wheel and the sdist of what is committed, into `dist/`, and check both: `make dist`.

What is checked: that each of them has every file of the two packages and nothing else, the licence and metadata that a
registry takes; and that in an empty environment, outside the tree, both packages import from the wheel and compute,
without the `train` extra and then with it.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"tdpo_kernels/": "tdpo_kernels/", "python/tdpo_trainer/": "tdpo_trainer/"}  # in the tree, in the wheel
BESIDE = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}  # in the sdist
MADE = {"PKG-INFO", "setup.cfg"}

WITHOUT_EXTRA = """
import sys, torch, tdpo_kernels, tdpo_trainer
weight, hidden, labels = torch.randn(7, 4), torch.randn(2, 3, 4), torch.randint(7, (2, 3))
out = tdpo_kernels.fused_tdpo_loss(hidden.requires_grad_(), weight, hidden, weight, labels)
out.loss.backward()
assert abs(out.loss.item() - 0.693147) < 1e-6 and hidden.grad.any()
assert "trl" not in sys.modules
"""
WITH_EXTRA = "from tdpo_trainer import PlainTDPOTrainer, TDPOConfig, TDPOTrainer; TDPOConfig('out', use_cpu=True)"
TYPED = """
from importlib.metadata import distribution
from importlib.resources import files
import tdpo_kernels, tdpo_trainer
for package in (tdpo_kernels, tdpo_trainer):
    assert "site-packages" in package.__file__, package.__file__
    assert (files(package) / "py.typed").is_file(), package
assert any(str(path).endswith("licenses/LICENSE") for path in distribution("tdpo-kernels").files)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Build and check the wheel and the sdist of what is committed.")
    parser.add_argument("--scratch", type=Path, default=ROOT / "build" / "dist", help="where to work; emptied first")
    scratch = parser.parse_args().scratch.resolve()
    shutil.rmtree(scratch, ignore_errors=True)
    source = scratch / "source"
    source.mkdir(parents=True)
    export(source)
    wheel, sdist = built(source, ROOT / "dist")
    files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    check_contents(wheel, sdist, files)
    check_installed(wheel, scratch)
    print(f"dist/{wheel.name} and dist/{sdist.name} are in order")


def export(folder: Path) -> None:
    """Write the committed tree, so that neither a stale list of files nor one that git ignores finds its way in."""
    if run("git", "status", "--porcelain", at=ROOT):
        print("what is not committed is left out")
    archive = folder.parent / "source.tar"
    run("git", "archive", "--output", archive, "HEAD", at=ROOT)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def built(source: Path, out: Path) -> tuple[Path, Path]:
    """Return the wheel, which is built from the sdist, and the sdist, with metadata that a registry takes."""
    shutil.rmtree(out, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", out, source, at=source)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, at=out)
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path, files: list[str]) -> None:
    """Raise unless wheel and sdist have each file of both packages and, but for metadata, no other."""
    ours = {
        name: inside + name.removeprefix(at) for name in files for at, inside in PACKAGES.items() if name.startswith(at)
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        about = next(name for name in names if name.endswith(".dist-info/METADATA")).removesuffix("METADATA")
        metadata = message_from_string(archive.read(about + "METADATA").decode())
    same("wheel", {name for name in names if not name.startswith(about)}, set(ours.values()))
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    same("sdist", {name for name in inside if ".egg-info/" not in name}, set(ours) | BESIDE | MADE)
    same("License-Expression", {metadata["License-Expression"]}, {"Apache-2.0"})
    same("licence files", {name for name in names if "/licenses/" in name}, {about + "licenses/LICENSE"})


def check_installed(wheel: Path, scratch: Path) -> None:
    """Raise unless the wheel works in an environment of its own, first without the `train` extra and then with it."""
    print("installing the wheel into an empty environment (minutes)")
    venv.create(scratch / "venv", with_pip=True)
    python, tdpo = scratch / "venv" / "bin" / "python", scratch / "venv" / "bin" / "tdpo"
    away = scratch / "away"
    away.mkdir()
    pinned = (python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt")
    run(*pinned, "torch", at=away)  # alone and by its exact version, as `make` does
    run(*pinned, wheel, at=away)
    for code in (TYPED, WITHOUT_EXTRA):
        run(python, "-c", code, at=away)
    version = wheel.name.split("-")[1]
    same("tdpo --version", {run(tdpo, "--version", at=away)}, {f"tdpo-kernels {version}"})
    run(python, "-m", "tdpo_kernels", "verify", "flat", at=away)
    run(*pinned, f"{wheel}[train]", at=away)
    run(python, "-c", WITH_EXTRA, at=away)
    run(tdpo, "train", "--help", at=away)


def same(what: str, got: set[str], wanted: set[str]) -> None:
    if got != wanted:
        sys.exit(f"{what}: too much: {sorted(got - wanted)}, missing: {sorted(wanted - got)}")


def run(*command: object, at: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=at, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
