"""Time, as interleaved rounds in one process, so that a machine's moods hit everybody alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from .energy import meter
from .providers import Step

FLUSH = 512 * 2**20  # bytes written to empty a GPU's cache


@dataclass(frozen=True)
class Sample:
    """Seconds, and joules where they are reported, of one call."""

    forward: float
    backward: float
    joules: float | None = None

    @property
    def both(self) -> float:
        return self.forward + self.backward


def times(
    steps: dict[str, Step],
    clear: Callable[[], None],
    device: torch.device,
    rounds: int,
    calls: int,
    tick: Callable[[], None],
    cold: bool = False,
) -> dict[str, list[Sample]]:
    """A sample of each step in each round, in a new random order every round. One untimed round goes first.

    Args:
        clear: called before every call and after the last, outside the clock: a trainer's ``zero_grad`` is not the
            loss's work.
        cold: the device's cache is emptied before every call, outside the clock.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    timer = _Timer(clear, device, calls, cold)
    for name in order:
        timer(steps[name])
    gc.freeze()  # what is left over from imports and compilation need not be looked through every time
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                samples[name].append(timer(steps[name]))
                tick()
    finally:
        gc.unfreeze()
    return samples


class _Timer:
    def __init__(self, clear: Callable[[], None], device: torch.device, calls: int, cold: bool) -> None:
        self.clear, self.device, self.calls, self.joules = clear, device, calls, meter(device)
        self.flush = torch.empty(FLUSH, dtype=torch.uint8, device=self.device) if cold else None

    def __call__(self, step: Step) -> Sample:
        gc.collect()
        gc.disable()
        began = self.joules() if self.joules else None
        forward = backward = 0.0
        for _ in range(self.calls):
            self.clear()
            if self.flush is not None:
                self.flush.zero_()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # from an idle device on
            marks = [self._mark()]
            out = step.forward()
            marks.append(self._mark())
            step.backward(out)
            marks.append(self._mark())
            del out
            first, second = self._between(marks)
            forward, backward = forward + first, backward + second
        joules = None if began is None else (self.joules() - began) / self.calls
        gc.enable()
        self.clear()
        return Sample(forward / self.calls, backward / self.calls, joules)

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, marks: list) -> tuple[float, float]:
        a, b, c = marks
        if self.device.type != "cuda":
            return b - a, c - b
        c.synchronize()
        return a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3


def spread(values: Iterable[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    values = list(values)
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[1], tenths[7]
