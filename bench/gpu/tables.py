"""Tuning tables: where a campaign keeps its own, and the checkout that they are measured in and meant for."""

from __future__ import annotations

import json
from pathlib import Path

from tdpo_kernels.tuning import Device
from tdpo_kernels.tuning.table import TABLES, parse

from .. import tune
from .plan import Settings


def folder(settings: Settings) -> Path:
    """Tables of a dry run stay there."""
    return Path(settings.out) / ("dry-tables" if settings.dry else "tables")


def install(settings: Settings) -> list[Path]:
    """Into the checkout's own, unless the run is dry."""
    if settings.dry:
        return []
    written = []
    for path in sorted(folder(settings).glob("*.json")):
        table = parse(path.read_text(), str(path))
        written.append(tune.write(Device(table.device, table.arch), table.configs, table.winners))
    return written


def chosen() -> str:
    """Every configuration in the checkout's tables, without when and how fast: what results depend on."""
    tables = [json.loads(path.read_text()) for path in sorted(TABLES.glob("*.json"))]
    rows = [[t["device"], [[row["case"], row["D"], row["config"]] for row in t["configs"]]] for t in tables]
    return json.dumps(rows, sort_keys=True)
