"""Measure time as interleaved rounds in one process, so that a machine's moods hit everybody alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from .problem import Step

GEMM = {"cpu": (2048, 4096, 1024), "cuda": (8192, 16384, 4096)}  # rows, columns, depth
COPY = {"cpu": 256 * 2**20, "cuda": 2**30}  # bytes
TRIES = 10


class Sample(NamedTuple):
    """Seconds of one call."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Ceiling(NamedTuple):
    """Hold what the machine gives a second: flops of a large product, and bytes that a large copy reads and writes."""

    flops: float
    bytes: float


def ceiling(dtype: str, device: torch.device) -> Ceiling:
    """Return the best of a few tries each, not an average. Data is random, as zeros multiply faster."""
    rows, columns, depth = GEMM[device.type]
    a, b = (torch.randn(n, depth, device=device).to(getattr(torch, dtype)) for n in (rows, columns))
    out, source = a.new_empty(rows, columns), torch.ones(COPY[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps = {
        "product": Step(lambda: torch.mm(a, b.T, out=out), lambda out: None),
        "copy": Step(lambda: target.copy_(source), lambda out: None),
    }
    samples = times(steps, lambda: None, device, TRIES, 1, lambda: None)
    product, copy = (min(sample.both for sample in samples[name]) for name in steps)
    return Ceiling(2.0 * rows * columns * depth / product, 2 * source.numel() / copy)


def times(
    steps: dict[str, Step],
    clear: Callable[[], None],
    device: torch.device,
    rounds: int,
    calls: int,
    tick: Callable[[], None],
) -> dict[str, list[Sample]]:
    """Return a sample of each step in each round, in a new random order every round. One untimed round goes first.

    Args:
        clear: called before every call and after the last, outside the clock: a trainer's ``zero_grad`` is not the
            loss's work.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for name in order:
        _sample(steps[name], clear, device, calls)
    gc.freeze()  # what is left over from imports and compilation need not be looked through every time
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(_sample(steps[name], clear, device, calls))
                tick()
    finally:
        gc.unfreeze()
    return samples


def _sample(step: Step, clear: Callable[[], None], device: torch.device, calls: int) -> Sample:
    gc.collect()
    gc.disable()
    forward = backward = 0.0
    for _ in range(calls):
        clear()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # from an idle device on
        begin = _mark(device)
        out = step.forward()
        middle = _mark(device)
        step.backward(out)
        end = _mark(device)
        del out
        forward, backward = forward + _between(begin, middle), backward + _between(middle, end)
    gc.enable()
    clear()
    return Sample(forward / calls, backward / calls)


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(a: float | torch.cuda.Event, b: float | torch.cuda.Event) -> float:
    if isinstance(a, float):
        return b - a
    b.synchronize()
    return a.elapsed_time(b) / 1e3


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the median, and the 20th and 80th percentile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[1], tenths[7]
