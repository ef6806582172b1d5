"""The report. Every number comes from a row, unless called an estimate; what was not measured is said not to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..rows import Row
from . import figures, page, scaling
from .tables import Table, markdown, tables

ESTIMATED = "several devices, estimated"
NO_GPU = "Not yet measured on a GPU."


def write(rows: Mapping[str, list[Row]], folder: Path) -> list[Path]:
    """``report.md``, ``report.html`` and the figures, of the rows of each device's file. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for device, measured in rows.items():
        drawn = figures.draw(measured, folder, device)
        sections.append((device, drawn, tables(measured)))
    sections.append((ESTIMATED, [scaling.draw(folder)], [scaling.table()]))
    gpu = any(row.conditions.driver for measured in rows.values() for row in measured)
    missing = [] if gpu else [NO_GPU]
    text, html = folder / "report.md", folder / "report.html"
    text.write_text(_markdown(sections, missing))
    html.write_text(page.html(sections, missing))
    drawn = [figure for _, every, _ in sections for figure in every]
    return [text, html, *(path for figure in drawn for path in (figure.light, figure.dark))]


def _markdown(sections: list[tuple[str, list[figures.Figure], list[Table]]], missing: list[str]) -> str:
    parts = ["# What was measured"]
    for device, drawn, found in sections:
        parts += [f"## {device}", *(figure.markdown() for figure in drawn), markdown(found)]
    return "\n\n".join([*parts, *missing]) + "\n"
