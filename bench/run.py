"""Measure one shape in one dtype, start to end: gate, memory, then everybody's time together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from . import drift, gate, measure, memory, step
from .conditions import Conditions, Neighbours
from .measure import Ceiling, Sample
from .providers import FLOOR, PROVIDERS
from .rows import Row
from .shapes import Shape


def run(
    shape: Shape,
    dtype: str,
    names: Iterable[str],
    rounds: int,
    conditions: Conditions,
    ceiling: Ceiling | None,
    tick: Callable[[int], None],
    device: torch.device,
) -> list[Row]:
    """Return a row of each contender. `tick` is told how many of its ``rounds + 1`` steps are done."""
    found = {name: _before_timing(shape, dtype, name, device) for name in names}
    for runs, _ in found.values():
        tick(1 if runs else 1 + rounds)
    samples, busy = {}, None
    if timed := [name for name, (runs, _) in found.items() if runs]:
        inputs, neighbours = step.setup(shape, dtype, device), Neighbours()
        steps = {name: inputs.step(PROVIDERS[name].make) for name in timed}
        samples = measure.times(steps, inputs.clear, device, rounds, shape.calls, lambda: tick(1))
        busy = neighbours.cores()
    same = dict(dtype=dtype, rounds=rounds, conditions=conditions, ceiling=ceiling and tuple(ceiling))
    return [_row(shape, name, same | facts | _timing(samples, name, busy)) for name, (_, facts) in found.items()]


def _row(shape: Shape, name: str, facts: dict) -> Row:
    provider = PROVIDERS[name]
    size = dict(shape=shape.name, T=shape.T, V=shape.V, D=shape.D, rows=shape.rows, trainable=shape.trainable)
    who = dict(provider=name.split("@")[0], budget_bytes=provider.budget, partial=provider.computes == "dpo")
    return Row(**size | who | dict(gradients=shape.gradients) | facts)


def _timing(samples: dict[str, list[Sample]], name: str, busy: float | None) -> dict:
    if name not in samples:
        return {}
    mine, floor = samples[name], samples.get(FLOOR)
    return {
        "seconds": measure.spread(s.both for s in mine),
        "forward": measure.spread(s.forward for s in mine),
        "backward": measure.spread(s.backward for s in mine),
        "ratio": floor and measure.spread(s.both / f.both for s, f in zip(mine, floor, strict=True)),
        "busy_cores": busy,
    }


def _before_timing(shape: Shape, dtype: str, name: str, device: torch.device) -> tuple[bool, dict]:
    """Return whether a contender is timed, and what is known of it so far.

    Who ran and was wrong is timed all the same: the time stands beside the finding, in red.
    """
    provider = PROVIDERS[name]
    if provider.computes == "products":
        return True, {}
    reason = provider.unavailable(shape, device)
    if reason := f"skipped: {reason}" if reason else memory.shortage(provider.needs(shape), device):
        return False, {"note": reason}
    try:
        return _without_clock(shape, dtype, name, device)
    except memory.MemoryFailure as failure:
        return False, {"red": not failure.room, "note": str(failure)}
    except Exception as error:  # a finding about this one, not the end of the others' measurement
        return False, {"red": True, "note": f"{type(error).__name__}: {error}".splitlines()[0]}


def _without_clock(shape: Shape, dtype: str, name: str, device: torch.device) -> tuple[bool, dict]:
    if shape.drift:
        return False, drift.errors(shape, dtype, name, device)
    if shape.limit:
        return False, step.longest(shape, lambda longer: memory.peak_extra(longer, dtype, name, device))
    verdict = gate.check(PROVIDERS[name], shape, dtype, device)
    error = None if PROVIDERS[name].like else verdict.error  # which then is no error against float64
    facts = {"error": error, "red": verdict.complaint is not None, "note": verdict.complaint}
    return True, facts | {"peak_extra_bytes": memory.peak_extra(shape, dtype, name, device)}
