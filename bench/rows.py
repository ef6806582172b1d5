"""A measured row, and where rows are kept: JSON Lines, one file per kind of device, only ever appended to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .conditions import DEVICE_KIND, Conditions

RESULTS = Path(__file__).resolve().parent / "results" / f"{DEVICE_KIND}.jsonl"
Spread = tuple[float, float, float]  # median, p20, p80


@dataclass(frozen=True)
class Row:
    """One contender at one shape and dtype. Without `seconds` it was not timed, and `note` says why."""

    shape: str
    T: int
    V: int
    D: int
    dtype: str
    provider: str
    budget_bytes: int | None
    rounds: int
    conditions: Conditions
    seconds: Spread | None = None
    ratio: Spread | None = None  # to the floor, round by round
    peak_extra_bytes: int | None = None  # above inputs and gradients
    error: float | None = None  # against float64, relative
    busy_cores: float | None = None  # taken by other processes while it was timed
    red: bool = False
    note: str | None = None

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        return self.shape, self.dtype, self.provider, self.budget_bytes


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> list[Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [_row(json.loads(line)) for line in lines if line.strip()]


def _row(data: dict) -> Row:
    for name in ("seconds", "ratio"):
        data[name] = None if data[name] is None else tuple(data[name])
    return Row(**data | {"conditions": Conditions(**data["conditions"])})


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key, in the order the keys first appeared."""
    return list({row.key: row for row in rows}.values())
