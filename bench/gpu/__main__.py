"""``python -m bench.gpu --out DIR`` measures as much as there is time for, in order of value; the same command goes on.

Notes, rows, log and summary are in DIR. ``--dry`` goes through the same plan on a CPU. The exit status is 1 if
something failed or was found wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path

DEFAULT = ("env", "verify", "headline", "memory", "offsets", "determinism", "profile")
STAGES = (*DEFAULT, "laws", "tune")  # the last ones only when asked for
DRY = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench.gpu", description=__doc__)
    p.add_argument("--out", type=Path, help="the folder of the results; default: build/gpu, or build/gpu-dry")
    p.add_argument("--carried", type=Path, help="a folder of results to go on from, where --out has none")
    p.add_argument("--stages", nargs="+", choices=STAGES, default=DEFAULT, help="default: the first 7")
    p.add_argument("--only", default="", help="items whose name contains this")
    p.add_argument("--minutes", type=float, default=9.0, help="end before so many have passed; default: %(default)s")
    p.add_argument("--wheels", type=Path, help="a folder of wheels to import TRL or Liger from, with what they need")
    p.add_argument("--commit", default="", help="what results are said to belong to where there is no git")
    p.add_argument("--dry", action="store_true", help="on a CPU, tiny shapes, through Triton's interpreter")
    p.add_argument("--collect", action="store_true", help="only take the rows in --out into bench/results")
    return p


def main(arguments: list[str] | None = None) -> int:
    began, options = time.time(), parser().parse_args(arguments)
    out = (options.out or Path("build", "gpu-dry" if options.dry else "gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.carried and not any(out.iterdir()):
        shutil.copytree(options.carried, out, dirs_exist_ok=True)
    os.environ |= DRY if options.dry else {}
    from .. import rows  # imports torch, which reads the environment
    from .campaign import Settings, supervise

    if options.collect:
        for row in rows.load(out / "rows.jsonl"):
            path = rows.file_of(row.conditions.device)
            rows.append(path, [row] if row not in rows.load(path) else [])
        return 0
    with tempfile.TemporaryDirectory() as unpacked:
        for wheel in options.wheels.glob("*.whl") if options.wheels else ():
            zipfile.ZipFile(wheel).extractall(unpacked)  # files, not archives: Triton reads a kernel's source
        sys.path.append(unpacked)  # last: what is installed goes before it
        end = began + 60 * options.minutes - 5  # to say what came out
        return supervise(Settings(out, options.dry, end, (*options.stages,), options.only, options.commit))


if __name__ == "__main__":
    sys.exit(main())
