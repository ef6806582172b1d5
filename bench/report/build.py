"""Write the report. Every number comes from a row unless called an estimate; what was not measured is said to be so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rows import Row
from . import figures, scaling
from .tables import markdown, tables


def write(rows: Mapping[str, list[Row]], folder: Path) -> list[Path]:
    """Write ``report.md`` and the figures, of the rows of each device's file, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [(device, figures.draw(mine, folder, device), tables(mine)) for device, mine in rows.items()]
    sections.append(("several devices, estimated", [scaling.draw(folder)], [scaling.table()]))
    parts = ["# What was measured"]
    for title, drawn, found in sections:
        parts += [f"## {title}", *(figure.markdown() for figure in drawn), markdown(found)]
    if not any(row.conditions.driver for mine in rows.values() for row in mine):
        parts.append("Not yet measured on a GPU.")
    text = folder / "report.md"
    text.write_text("\n\n".join(parts) + "\n")
    return [text, *(path for _, drawn, _ in sections for figure in drawn for path in (figure.light, figure.dark))]
