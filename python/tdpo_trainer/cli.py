"""The command `tdpo`.

usage: tdpo train | data | eval | cache | merge | verify | bench | env [options], or tdpo --version

  train   TDPO on preference pairs: a model directory or hub name, a JSONL or Parquet file or hub name
  data    what the pairs of a run are: how many, how long, duplicates, what max_length cuts; no model is loaded
  eval    a trained model on held-out pairs: loss, accuracies, KLs, margins, with intervals over the pairs
  cache   only writes the reference cache that `train` with the same options and --reference_cache will use
  merge   an adapter that was trained and its model, into one model: tdpo merge ADAPTER FOLDER
  verify  every kernel backend against float64; a table, non-zero exit on a failure
  bench   time and memory against other implementations (in a checkout)
  env     versions, devices, and what runs here and why

Options of train, data, eval and cache: flags, or `--config FILE.yaml` with the same names; `tdpo train --help` lists
them.
Under several processes: `accelerate launch -m tdpo_trainer train ...`, or
`torchrun --nproc-per-node 2 -m tdpo_trainer train ...`.

What is wrong with options, or with a file behind one, is said in one line; with TDPO_TRACEBACK=1 in the environment
the traceback is shown instead.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

TRAINING_PACKAGES = ("transformers", "trl", "peft", "accelerate", "datasets", "safetensors", "deepspeed")
INSTALL = "pip install '.[train]' in a clone of tdpo-kernels"


def command_line() -> NoReturn:
    """Run the command `tdpo`. Under a launcher the process then ends without the interpreter's own cleaning up."""
    status = main()
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    # A thread of gloo that lets go of a tensor's Python object while the interpreter ends aborts the process, and the
    # launcher then calls a run that is done and saved a failure.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status, 2 where the command line is wrong."""
    command, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if command in ("train", "data", "eval", "cache", "merge"):
        return _training(command, rest)
    if command in ("verify", "env"):
        return _env(rest) if command == "env" else _python_m("tdpo_kernels", "verify", *rest)
    if command == "bench":
        return _bench(rest)
    if command in ("-h", "--help"):
        print(__doc__.strip())
        return 0
    if command == "--version":
        print(f"tdpo-kernels {_version('tdpo-kernels')}")
        return 0
    return _wrong(f"got {command!r}, wanted train, data, eval, cache, merge, verify, bench or env")


def _training(command: str, argv: list[str]) -> int:
    try:
        from . import evaluate, merge, report, run
        from .errors import UsageError
        from .head import UnsupportedModel
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        return _wrong(f"{command} needs {error.name}, which is not installed: {INSTALL}")
    try:
        commands = dict(train=run.train, data=report.data, eval=evaluate.evaluate, cache=run.cache, merge=merge.merge)
        return commands[command](argv)
    except (UsageError, UnsupportedModel) as error:
        if os.environ.get("TDPO_TRACEBACK"):
            raise
        return _wrong(str(error))


def _env(argv: list[str]) -> int:
    status = _python_m("tdpo_kernels", "env", *argv)
    print("\ntraining:")
    for package in TRAINING_PACKAGES:
        print(f"  {package:13}{_version(package)}")
    return status


def _bench(argv: list[str]) -> int:
    if importlib.util.find_spec("bench") is None or importlib.util.find_spec("bench.providers") is None:
        return _wrong("bench is run in a checkout of tdpo-kernels: it is not installed with the package")
    return _python_m("bench", *argv)


def _python_m(*arguments: str) -> int:
    sys.stdout.flush()
    return subprocess.call([sys.executable, "-m", *arguments])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _wrong(message: str) -> int:
    print(f"tdpo: {message}", file=sys.stderr)
    return 2
