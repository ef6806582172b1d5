"""Write the report. Every number comes from a row unless called an estimate; what was not measured is said to be so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rows import Row
from . import figures
from .tables import estimated, markdown, tables


def write(rows: Mapping[str, list[Row]], folder: Path) -> Path:
    """Write ``report.md`` and the figures, of the rows of each device's file, and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = ["# What was measured"]
    for device, mine in rows.items():
        parts += [f"## {device}", *figures.draw(mine, folder, device), markdown(tables(mine))]
    parts += ["## several devices, estimated", markdown([estimated()])]
    if not any(row.conditions.driver for mine in rows.values() for row in mine):
        parts.append("Not yet measured on a GPU.")
    page = folder / "report.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page
