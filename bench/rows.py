"""Keep measured rows: JSON Lines, one file for each name that a device has, only ever appended to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .conditions import Conditions

FOLDER = Path(__file__).resolve().parent / "results"
Spread = tuple[float, float, float]  # median, p20, p80
TUPLES = ("seconds", "ratio", "forward", "backward", "ceiling")


@dataclass(frozen=True)
class Row:
    """Hold one contender at one shape and dtype. Without `seconds` it was not timed, and `note` says why.

    Rows of the accuracy study have `drift`, of a whole training step `limit_bytes` where T is the longest context.
    """

    shape: str
    T: int
    V: int
    D: int
    dtype: str
    provider: str
    budget_bytes: int | None
    rounds: int
    conditions: Conditions
    seconds: Spread | None = None  # forward and backward
    ratio: Spread | None = None  # to the floor, round by round
    peak_extra_bytes: int | None = None  # above inputs and gradients
    error: float | None = None  # against float64, relative
    busy_cores: float | None = None  # taken by other processes while it was timed
    red: bool = False  # the gate found it wrong; its time, if any, is in no chart
    note: str | None = None
    forward: Spread | None = None
    backward: Spread | None = None
    ceiling: tuple[float, float] | None = None  # flops and bytes a second, measured in the same run
    partial: bool = False  # computes less than TDPO
    rows: int | None = None  # tokens that count; None: all T
    trainable: bool = True
    gradients: bool = True  # False: forward alone
    drift: float | None = None  # KL per token between the models, in nats
    kl_error: float | None = None  # of the KL, relative; `error` is then its gradient's
    limit_bytes: int | None = None

    @property
    def key(self) -> tuple:
        return self.shape, self.dtype, self.provider, self.budget_bytes


def file_of(device: str) -> Path:
    """Return the file of a device's rows: ratios of two kinds of processor are not shown together."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.jsonl"


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def load(path: Path) -> list[Row]:
    lines = path.read_text().splitlines() if path.exists() else []
    return [parse(json.loads(line)) for line in lines if line.strip()]


def parse(data: dict) -> Row:
    """Return the row of a line. What older rows had and rows no longer have is left out."""
    known = {field.name: data[field.name] for field in fields(Row) if field.name in data}
    tuples = {name: tuple(value) for name in TUPLES if (value := data.get(name)) is not None}
    return Row(**known | tuples | {"conditions": Conditions.parse(data["conditions"])})


def together(rows: Iterable[Row]) -> list[Row]:
    """Return each shape's and dtype's newest run, in the order in which shapes first appeared.

    Only what was measured together, round by round, is shown together.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.shape, row.dtype), []).append(row)
    kept = []
    for group in groups.values():
        newest = max(row.conditions.date for row in group)
        kept += {row.key: row for row in group if row.conditions.date == newest}.values()
    return kept
