"""What is measured: sizes by name, and for each the dtypes, contenders and rounds that answer its question."""

from __future__ import annotations

from dataclasses import dataclass

EVERYONE = ("floor", "floor-out", "eager", "compiled", "ours@all", "ours@300MB", "ours@0")
NO_COMPILER = ("floor", "eager", "ours@all", "ours@0")


@dataclass(frozen=True)
class Shape:
    """T valid tokens in 2 * pairs sequences of one length, V words, D features, the same for policy and reference."""

    name: str
    T: int
    V: int
    D: int
    asks: str  # the question this shape answers
    contenders: tuple[str, ...]
    rounds: int
    dtypes: tuple[str, ...] = ("float32",)
    pairs: int = 2
    calls: int = 1  # timed calls per round, where one is too short for the clock


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cpu-32k", 2048, 32000, 1024, "time and memory against eager and compiled, at three budgets", EVERYONE, 7,
              ("float32", "bfloat16")),
        Shape("cpu-152k", 1024, 151936, 896, "a large vocabulary, staged and not", ("floor", "ours@all", "ours@0"), 5),
        Shape("long-1k", 1024, 32000, 256, "long-16k's memory, a sixteenth of its time", ("floor", "ours@0"), 7),
        Shape("long-16k", 16384, 32000, 256, "long-1k's memory, 16 times its time", ("floor", "ours@0"), 3),
        Shape("small", 64, 1000, 64, "overhead per call against eager", NO_COMPILER, 50, calls=10),
        Shape("tiny", 32, 500, 32, "does the benchmark itself work", NO_COMPILER, 5, calls=5),
    )
}  # fmt: skip
QUICK = ("tiny",)
FULL = tuple(name for name in SHAPES if name not in QUICK)
