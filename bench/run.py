"""One shape in one dtype, start to end: gate, memory, then everybody's time together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from . import gate, measure, memory
from .conditions import Conditions, Neighbours
from .measure import Sample
from .problem import make_problem
from .providers import FLOOR, PROVIDERS
from .roofline import Ceiling
from .rows import Row
from .shapes import Shape


def run(
    shape: Shape,
    dtype: str,
    names: Iterable[str],
    rounds: int,
    conditions: Conditions,
    ceiling: Ceiling,
    tick: Callable[[int], None],
    device: torch.device,
) -> list[Row]:
    """`tick` is told how many of a contender's ``rounds + 1`` steps are done. On CUDA there is a second row for each,
    with a cold cache."""
    found = {name: _before_timing(shape, dtype, name, device) for name in names}
    for facts in found.values():
        tick(1 + rounds if facts.get("note") else 1)
    problem = make_problem(shape, dtype, device)
    steps = {name: PROVIDERS[name].make(problem) for name, facts in found.items() if not facts.get("note")}
    rows = []
    for cache in ("hot", "cold") if device.type == "cuda" else ("hot",):
        neighbours = Neighbours()
        ticking, cold = (lambda: tick(1), False) if cache == "hot" else (lambda: None, True)
        samples = measure.times(steps, problem.clear, device, rounds, shape.calls, ticking, cold)
        busy = neighbours.cores()
        timed = {name: facts | _timing(samples, name, busy) for name, facts in found.items()}
        same = dict(dtype=dtype, rounds=rounds, conditions=conditions, ceiling=tuple(ceiling), cache=cache)
        rows += [row(shape, name, **same, **facts) for name, facts in timed.items()]
    return rows


def row(shape: Shape, name: str, **facts) -> Row:
    provider = PROVIDERS[name]
    size = dict(shape=shape.name, T=shape.T, V=shape.V, D=shape.D, rows=shape.rows, trainable=shape.trainable)
    who = dict(provider=name.split("@")[0], budget_bytes=provider.budget, partial=provider.computes == "dpo")
    return Row(**size, **who, **facts)


def _timing(samples: dict[str, list[Sample]], name: str, busy: float | None) -> dict:
    if name not in samples:
        return {}
    mine, floor = samples[name], samples[FLOOR]
    facts = {
        "seconds": measure.spread(s.both for s in mine),
        "forward": measure.spread(s.forward for s in mine),
        "backward": measure.spread(s.backward for s in mine),
        "ratio": measure.spread(s.both / f.both for s, f in zip(mine, floor, strict=True)),
        "busy_cores": busy,
    }
    if all(s.joules is not None for s in mine):
        facts["joules"] = measure.spread(s.joules for s in mine)
    return facts


def _before_timing(shape: Shape, dtype: str, name: str, device: torch.device) -> dict:
    """What is known of a contender before it is timed; a note says why it will not be."""
    provider = PROVIDERS[name]
    if provider.computes == "products":
        return {}
    if reason := provider.unavailable(shape, device):
        return {"note": f"skipped: {reason}"}
    if reason := memory.shortage(provider.needs(shape), device):
        return {"note": reason}
    verdict = gate.check(provider, shape, dtype, device)
    if verdict.complaint:
        return {"error": verdict.error, "red": True, "note": verdict.complaint}
    try:
        return {"error": verdict.error, "peak_extra_bytes": memory.peak_extra(shape, dtype, name, device)}
    except memory.MemoryFailure as failure:
        return {"error": verdict.error, "red": not failure.room, "note": str(failure)}
