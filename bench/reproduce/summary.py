"""Turn runs into numbers: means and spreads over seeds, orderings held against the paper's, losses against losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .settings import KL, METHODS, PUBLISHED, Ordering, orderings
from .store import Record

Value = Callable[[Record], float | None]


@dataclass(frozen=True)
class Spread:
    """Hold a value's mean and range over seeds."""

    mean: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        if self.low == self.high:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def spread(values: Sequence[float]) -> Spread:
    return Spread(sum(values) / len(values), min(values), max(values))


def of_part(records: Iterable[Record], part: str) -> list[Record]:
    return [record for record in records if record.run.part == part]


def by_method(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the frontier's runs, methods in their order and seeds in theirs."""
    found = sorted(of_part(records, "frontier"), key=lambda record: record.run.seed)
    groups = {method: [record for record in found if record.run.method == method] for method in METHODS}
    return {method: group for method, group in groups.items() if group}


def final(name: str) -> Value:
    return lambda record: getattr(record.points[-1], name)


def reward_at(kl: float) -> Value:
    """Read the reward where a run first comes to that KL, on a straight line between two looks; None if it does not."""

    def value(record: Record) -> float | None:
        for before, after in zip(record.points, record.points[1:], strict=False):
            if before.kl < kl <= after.kl:
                share = (kl - before.kl) / (after.kl - before.kl)
                return before.reward + share * (after.reward - before.reward)
        return None

    return value


def over_seeds(records: Iterable[Record], value: Value) -> Spread | None:
    """Return the spread, None where a run does not have the value."""
    values = [value(record) for record in records]
    return spread(values) if values and None not in values else None


@dataclass(frozen=True)
class Verdict:
    """Compare seeds one by one: within a seed both methods saw the same pairs in the same order."""

    ordering: Ordering
    pairs: list[tuple[float, float]]  # of each seed, what should be more and what less; none where not comparable

    @property
    def spreads(self) -> list[Spread]:
        """Return those of both methods and of their difference."""
        return [spread(values) for values in (*zip(*self.pairs, strict=True), [a - b for a, b in self.pairs])]

    @property
    def text(self) -> str:
        seeds, agreeing = len(self.pairs), sum(a > b for a, b in self.pairs)
        if agreeing in (0, seeds):
            return "not comparable" if not seeds else "holds" if agreeing else "does not hold"
        return f"in {agreeing} of {seeds} seeds"


def verdicts(records: Iterable[Record]) -> list[Verdict]:
    groups = by_method(records)
    return [_verdict(o, groups) for o in orderings() if o.more in groups and o.less in groups]


def _verdict(ordering: Ordering, groups: dict[str, list[Record]]) -> Verdict:
    value = reward_at(KL) if ordering.quantity == "reward_at_kl" else final(ordering.quantity)
    more, less = ({r.run.seed: value(r) for r in groups[method]} for method in (ordering.more, ordering.less))
    pairs = [(more[seed], less[seed]) for seed in sorted(more.keys() & less.keys())]
    return Verdict(ordering, [] if any(None in pair for pair in pairs) else pairs)


@dataclass(frozen=True)
class Parity:
    """Say how far apart, step by step, the losses of two runs are that should be the same."""

    one: Record
    other: Record

    @property
    def name(self) -> str:
        return " - ".join(f"{record.run.loss} {record.run.dtype}" for record in (self.one, self.other))

    @property
    def differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.one.losses, self.other.losses, strict=True)]

    @property
    def largest(self) -> float:
        return max(self.differences)

    def within(self, steps: int) -> float:
        return max(self.differences[:steps])

    @property
    def step(self) -> int:
        """Return the step of the largest difference."""
        return self.differences.index(self.largest) + 1


def parities(records: Iterable[Record]) -> list[Parity]:
    """Pair each backend with the published formula in the same dtype, and that formula in fp32 with itself in float64,
    which is what rounding alone does."""
    runs = of_part(records, "parity")
    published = {r.run.dtype: r for r in runs if r.run.loss == PUBLISHED}
    ours = [Parity(r, published[r.run.dtype]) for r in runs if r.run.loss != PUBLISHED and r.run.dtype in published]
    rounding = [Parity(published["float32"], published["float64"])] if len(published) == 2 else []
    return sorted(ours, key=lambda p: (p.one.run.dtype, p.one.run.loss)) + rounding
