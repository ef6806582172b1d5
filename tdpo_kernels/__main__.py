"""Run ``python -m tdpo_kernels env | verify``: say what runs here, or compare every backend with float64."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from .backends import auto_says, availability
from .op import DEFAULT_BUDGET
from .verify import DTYPES, Line, skipped, verify
from .version import __version__
from .ways import way


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tdpo_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    env = commands.add_parser("env", help="versions, devices, backends, and what a loss of some size costs in products")
    for name, value in dict(tokens=8192, pairs=4, vocab=128256, hidden_size=4096, memory_budget=DEFAULT_BUDGET).items():
        env.add_argument(f"--{name.replace('_', '-')}", type=_positive, default=value, help="default: %(default)s")
    env.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    check = commands.add_parser("verify", help="worst errors of every backend against float64; exits 1 on a failure")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    check.add_argument("problems", nargs="*", metavar="PROBLEM", help="by name, as the table has them; default: all")
    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        return _env(arguments)
    try:
        device = torch.device(arguments.device)
        torch.zeros(1, dtype=torch.float64, device=device).item()  # the truth is float64, and wants reading
    except (RuntimeError, AssertionError, TypeError) as error:
        parser.error(f"--device {arguments.device}: {str(error).splitlines()[0]}")
    return _verify(device, tuple(arguments.problems))


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, wanted a number >= 1")
    return int(text)


def _env(size: argparse.Namespace) -> int:
    print(f"tdpo-kernels {__version__}")
    for package in ("torch", "triton", "transformers", "trl"):
        print(f"{package:13}{_version(package)}")
    print(f"{'python':13}{platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"{'cpu threads':13}{torch.get_num_threads()}")
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    for device in [torch.device("cpu"), *(torch.device(kind.type, i) for i in range(count))]:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        print(f"\n{device}: {name or device.type}")
        for name, reason in availability(device).items():
            print(f"  {name:9}{reason}")
        print(f"  auto     {auto_says(device)}")
    print(
        f"\na loss of {size.tokens:,} tokens in {size.pairs:,} pairs, V = {size.vocab:,}, D = {size.hidden_size:,}, "
        f"{size.dtype}, memory_budget {size.memory_budget:,}, on {device.type}; one product is 2 T V D flops"
    )
    dimensions = size.tokens, size.pairs, size.vocab, size.hidden_size, DTYPES[size.dtype]
    for head, trained in (("trained", True), ("frozen", False)):
        print(f"  {head:9}{way(*dimensions, trained=trained, memory_budget=size.memory_budget, device=device)}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


HEADER = f"{'backend':9}{'dtype':7}{'problem':19}{'budget':8}{'worst':10}{'error':>9}{'plain':>9}{'allowed':>9}"


def _verify(device: torch.device, names: tuple[str, ...]) -> int:
    print(f"errors against float64 on {device}, relative to the truth's norm; plain: torch's own in the same dtype\n")
    for name, reason in skipped(device).items():
        print(f"{name} is skipped: {reason}")
    print(HEADER)
    lines = verify(device, lambda line: print(_row(line), flush=True), names)
    failures = [line for line in lines if not line.passed]
    print(f"\n{len(lines) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures or not lines else 0


def _row(line: Line) -> str:
    verdict = "" if line.passed else "  FAILED"
    return (
        f"{line.backend:9}{line.dtype:7}{line.problem:19}{line.budget:8}{line.quantity:10}"
        f"{line.error:9.1e}{line.plain:9.1e}{line.allowed:9.1e}{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
