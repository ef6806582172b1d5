"""Tables of what was measured, one JSON file per device. `bench/tune.py` is the only one that writes them.

{"device": "NVIDIA H200", "arch": "sm_90",
 "configs": [{"case": {"kernel": "fused_stats", "product": "16bit", ...}, "D": 4096, "config": {"R": 128, ...},
              "ms": 21.3, "runner_up": {"config": {...}, "ms": 22.0},
              "date": "2026-11-30", "versions": {"triton": "3.7.1", ...}}],
 "winners": [{"itemsize": 2, "D": 4096, "V": 128256, "ms": {"fused": 101.0, "tiled": 88.0},
              "date": ..., "versions": ...}]}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from .config import Case, Device, TileConfig

TABLES = Path(__file__).parent / "tables"
SMALL = 1024  # hidden sizes up to here and above it are two classes: their epilogues weigh differently
BACKENDS = ("fused", "tiled")


@dataclass(frozen=True)
class Measured:
    """A configuration that won, what came second, and where the numbers are from."""

    case: Case
    D: int
    config: TileConfig
    ms: float
    runner_up: tuple[TileConfig, float] | None  # None: there was no other
    date: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Winner:
    """How long each backend took for a whole step."""

    itemsize: int
    D: int
    V: int
    ms: Mapping[str, float]
    date: str
    versions: Mapping[str, str]

    @property
    def backend(self) -> str:
        return min(self.ms, key=self.ms.__getitem__)


@dataclass(frozen=True)
class Table:
    device: str
    arch: str
    configs: tuple[Measured, ...] = ()
    winners: tuple[Winner, ...] = ()

    def config(self, case: Case, D: int, allowed: Callable[[TileConfig], bool] = lambda _: True) -> TileConfig | None:
        """Of the rows of this case and this class of D that are allowed, the one measured nearest to it."""
        rows = [row for row in self.configs if row.case == case and (row.D <= SMALL) == (D <= SMALL)]
        rows = [row for row in rows if allowed(row.config)]
        return min(rows, key=lambda row: _apart(row.D, D)).config if rows else None

    def backend(self, itemsize: int, D: int, V: int) -> str | None:
        rows = [row for row in self.winners if row.itemsize == itemsize]
        nearest = min(rows, key=lambda row: _apart(row.D, D) + _apart(row.V, V), default=None)
        return nearest and nearest.backend

    def to_json(self) -> str:
        data = asdict(self)
        for row in data["configs"]:
            if row["runner_up"] is not None:
                row["runner_up"] = dict(zip(("config", "ms"), row["runner_up"], strict=True))
        return json.dumps(data, indent=1) + "\n"


def table_path(device: Device, folder: Path = TABLES) -> Path:
    """``NVIDIA H200`` has ``nvidia-h200.json``."""
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', device.name.lower()).strip('-')}.json"


@cache
def table_of(device: Device, folder: Path = TABLES) -> Table | None:
    """The device's table, read once per process; None if nothing was measured on it.

    Raises:
        ValueError: the table is not well-formed; says where.
    """
    path = table_path(device, folder)
    if not path.is_file():
        return None
    table = parse(path.read_text(), str(path))
    if table.arch != device.arch:
        raise ValueError(f"{path}: of arch {table.arch!r}, the device is {device.arch!r}")
    return table


def parse(text: str, name: str) -> Table:
    """`name` is what errors call it."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: no JSON: {error}") from error
    data = _keys(Table, data, name)
    for key in ("configs", "winners"):
        if not isinstance(data[key], list):
            raise ValueError(f"{name}: {key} is a {type(data[key]).__name__}, wanted a list")
    configs = [_measured(row, f"{name}: configs[{i}]") for i, row in enumerate(data["configs"])]
    winners = [_winner(row, f"{name}: winners[{i}]") for i, row in enumerate(data["winners"])]
    for i, row in enumerate(configs):
        if (row.case, row.D) in [(other.case, other.D) for other in configs[:i]]:
            raise ValueError(f"{name}: configs[{i}] is there twice: {row.case} at D={row.D}")
    device, arch = (_string(data[key], f"{name}: {key}") for key in ("device", "arch"))
    return Table(device, arch, (*configs,), (*winners,))


def _measured(row: Any, where: str) -> Measured:
    row = _keys(Measured, row, where)
    config, ms, second = _config(row["config"], where), _ms(row["ms"], where), row["runner_up"]
    if second is not None:
        if not isinstance(second, dict) or second.keys() != {"config", "ms"}:
            raise ValueError(f"{where}: runner_up is {second!r}, wanted null or config and ms")
        second = _config(second["config"], f"{where}: runner_up"), _ms(second["ms"], f"{where}: runner_up")
        if second[1] < ms:
            raise ValueError(f"{where}: the runner-up took {second[1]} ms, less than the winner's {ms}")
    case = _made(Case, row["case"], f"{where}: case")
    if case != case.relevant():
        raise ValueError(f"{where}: case says more of {case.kernel} than it looks at: {case}")
    return Measured(case, _count(row["D"], f"{where}: D"), config, ms, second, *_provenance(row, where))


def _winner(row: Any, where: str) -> Winner:
    row = _keys(Winner, row, where)
    if row["itemsize"] not in (2, 4):
        raise ValueError(f"{where}: itemsize is {row['itemsize']!r}, wanted 2 or 4")
    if not isinstance(row["ms"], dict) or set(row["ms"]) != set(BACKENDS):
        raise ValueError(f"{where}: ms is {row['ms']!r}, wanted one for each of {', '.join(BACKENDS)}")
    ms = {name: _ms(value, where) for name, value in row["ms"].items()}
    sizes = (_count(row[name], f"{where}: {name}") for name in ("D", "V"))
    return Winner(row["itemsize"], *sizes, ms, *_provenance(row, where))


def _provenance(row: dict, where: str) -> tuple[str, dict[str, str]]:
    date, versions = row["date"], row["versions"]
    if not isinstance(date, str) or not re.match(r"\d{4}-\d\d-\d\d", date):
        raise ValueError(f"{where}: date is {date!r}, wanted YYYY-MM-DD")
    if not isinstance(versions, dict) or not {"triton", "torch"} <= versions.keys():
        raise ValueError(f"{where}: versions is {versions!r}, wanted at least triton and torch")
    return date, versions


def _keys(kind: type, data: Any, where: str) -> dict:
    """`data`, which has the fields of `kind`, no more and no less."""
    wanted = {field.name for field in fields(kind)}
    if not isinstance(data, dict):
        raise ValueError(f"{where}: a {type(data).__name__}, wanted an object with {', '.join(sorted(wanted))}")
    if odd := wanted ^ data.keys():
        raise ValueError(f"{where}: keys missing or unknown: {', '.join(sorted(odd))}")
    return data


def _made(kind: type, data: Any, where: str) -> Any:
    try:
        return kind(**data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _config(data: Any, where: str) -> TileConfig:
    return _made(TileConfig, data, f"{where}: config")


def _ms(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{where}: ms is {value!r}, wanted a positive number")
    return value


def _count(value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{where}: {value!r}, wanted a positive integer")
    return value


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {value!r}, wanted a name")
    return value


def _apart(a: int, b: int) -> float:
    return abs(math.log(a / max(b, 1)))
