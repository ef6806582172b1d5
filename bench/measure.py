"""Time, as interleaved rounds in one process, so that a machine's moods hit everybody alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable

from .problem import Problem
from .providers import Step


def times(
    steps: dict[str, Step], problem: Problem, rounds: int, calls: int, tick: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds per call of each step in each round, in a new random order every round. One untimed round goes first."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    for name in order:
        _timed(steps[name], problem, calls)
    gc.freeze()  # what is left over from imports and compilation need not be looked through every time
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(_timed(steps[name], problem, calls))
            tick()
    gc.unfreeze()
    return seconds


def _timed(step: Step, problem: Problem, calls: int) -> float:
    """Garbage and old gradients go outside the clock: a trainer's ``zero_grad`` is not the loss's work."""
    gc.collect()
    gc.disable()
    total = 0.0
    for _ in range(calls):
        problem.clear()
        start = time.perf_counter()
        step()
        total += time.perf_counter() - start
    gc.enable()
    problem.clear()
    return total / calls


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return statistics.median(values), tenths[1], tenths[7]
