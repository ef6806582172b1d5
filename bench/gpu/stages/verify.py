"""`python -m tdpo_kernels verify`, one backend, dtype and problem at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from tdpo_kernels import verify as module
from tdpo_kernels.backends import BACKENDS

from ..device import Device, lacks, runnable
from ..plan import Facts, Failed, Item, Settings, Skipped

DRY_PROBLEMS = {"fused": ("one token",)}  # the interpreter takes its time
DRY_DTYPES = ("fp32", "fp16")


def items(device: Device, settings: Settings) -> list[Item]:
    names = [p.name for p in module.problems(device.torch)]
    return [
        Item(f"{backend} {dtype} {name}", lambda b=backend, d=dtype, n=name: check(device, b, d, n), 5, 240)
        for backend in runnable(device)
        for dtype in module.DTYPES
        for name in names
        if not lacks(device, backend, dtype)
        and (not settings.dry or name in DRY_PROBLEMS.get(backend, ("flat", "one token")) and dtype in DRY_DTYPES)
    ]


def check(device: Device, backend: str, dtype: str, problem: str) -> Facts:
    if why := runnable(device)[backend]:
        raise Skipped(why)
    with only(device, backend, dtype, problem):
        lines = module.verify(device.torch)
    facts = {"lines": [asdict(line) | {"passed": line.passed} for line in lines]}
    bad = [f"{x.quantity} at budget {x.budget} is off by {x.error:.1e}, {x.allowed:.1e} allowed" for x in lines if not x.passed]  # fmt: skip # noqa: E501
    if bad:
        raise Failed("; ".join(bad), facts)
    if not lines:
        raise Skipped("nothing was verified")
    return facts


@contextmanager
def only(device: Device, backend: str, dtype: str, problem: str) -> Iterator[None]:
    """`verify` as it is, with all that it goes through cut to one of each."""
    one = [p for p in module.problems(device.torch) if p.name == problem]
    cut = {
        "BACKENDS": {backend: BACKENDS[backend]},
        "DTYPES": {dtype: module.DTYPES[dtype]},
        "problems": lambda device: one,
    }
    whole = {name: getattr(module, name) for name in cut}
    for name, value in cut.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in whole.items():
            setattr(module, name, value)
