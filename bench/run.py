"""One shape in one dtype, start to end: gate, memory, then everybody's time together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from . import gate, measure, memory
from .conditions import Conditions, Neighbours
from .problem import make_problem
from .providers import FLOOR, FLOORS, PROVIDERS
from .rows import Row
from .shapes import Shape


def run(
    shape: Shape, dtype: str, names: Iterable[str], rounds: int, conditions: Conditions, tick: Callable[[int], None]
) -> list[Row]:
    """`tick` is told how many of a contender's ``rounds + 1`` steps are done."""
    found = {name: _before_timing(shape, dtype, name) for name in names}
    for facts in found.values():
        tick(1 + rounds if facts.get("note") else 1)
    problem = make_problem(shape, dtype)
    steps = {name: PROVIDERS[name].make(problem) for name, facts in found.items() if not facts.get("note")}
    neighbours = Neighbours()
    seconds = measure.times(steps, problem, rounds, shape.calls, lambda: tick(1))
    busy = neighbours.cores()
    for name, values in seconds.items():
        ratios = [value / floor for value, floor in zip(values, seconds[FLOOR], strict=True)]
        found[name] |= {"seconds": measure.spread(values), "ratio": measure.spread(ratios), "busy_cores": busy}
    same = dict(shape=shape.name, T=shape.T, V=shape.V, D=shape.D, dtype=dtype, rounds=rounds, conditions=conditions)
    return [
        Row(**same, provider=name.split("@")[0], budget_bytes=getattr(PROVIDERS[name], "budget", None), **facts)
        for name, facts in found.items()
    ]


def _before_timing(shape: Shape, dtype: str, name: str) -> dict:
    """What is known of a contender before it is timed; a note says why it will not be."""
    if name in FLOORS:
        return {}
    if reason := PROVIDERS[name].available():
        return {"note": f"skipped: {reason}"}
    verdict = gate.check(PROVIDERS[name], shape, dtype)
    if verdict.complaint:
        return {"error": verdict.error, "red": True, "note": verdict.complaint}
    try:
        return {"error": verdict.error, "peak_extra_bytes": memory.peak_extra(shape, dtype, name)}
    except memory.MemoryFailure as failure:
        return {"error": verdict.error, "red": True, "note": str(failure)}
