"""Who is measured. A provider is three things: a name, whether it can run here, and one step of a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..problem import Problem
from . import compiled, eager, floor, ours

Step = Callable[[], Tensor]  # one forward and backward: leaves gradients on the problem, returns the loss


class Provider(Protocol):
    name: str

    def available(self) -> str | None:
        """None, or why not."""
        ...

    def make(self, problem: Problem) -> Step: ...


PROVIDERS: dict[str, Provider] = {
    "floor": floor.Floor(),
    "floor-out": floor.FloorOut(),
    "eager": eager.Eager(),
    "compiled": compiled.Compiled(),
    "ours@all": ours.Ours("all", 2**40),  # more than any shape has to stage
    "ours@300MB": ours.Ours("300MB", 300 * 10**6),
    "ours@0": ours.Ours("0", 0),
}
FLOOR = "floor"
FLOORS = ("floor", "floor-out")  # compute nothing that could be right or wrong, or that needs memory
