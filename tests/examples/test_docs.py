"""Hold that the code in `docs/` runs, that links lead to files, and that figures and measured tables are up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bench.report.tables import label, size
from bench.rows import load

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINKED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "python/tdpo_trainer/README.md")]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_code_of_a_page_runs_from_top_to_bottom(page):
    blocks = BLOCK.findall(page.read_text())
    assert len(blocks) == page.read_text().count("```python")
    names: dict = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", [*PAGES, *LINKED], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r'\]\(([^)#\s]+)|(?:src|srcset)="([^"]+)"', page.read_text())
    targets = [link or picture for link, picture in targets]
    assert not [x for x in targets if "://" not in x and not (page.parent / x).exists()]


def test_every_page_is_in_the_table_of_contents():
    listed = (DOCS / "index.md").read_text().partition(":hidden:")[2].split("```")[0].split()
    assert sorted(listed) == sorted({page.stem for page in PAGES} - {"index"})


def test_figures_are_what_the_code_draws():
    spec = importlib.util.spec_from_file_location("draw", DOCS / "draw.py")
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    assert draw.drawn() == {path.name: path.read_text() for path in (DOCS / "figures").iterdir()}


def test_measured_tables_are_of_committed_rows():
    found, told = set(), set()
    for line in (DOCS / "performance.md").read_text().splitlines():
        if named := re.search(r"\(\.\./(bench/results/\S+\.jsonl)\)", line):
            found |= {_cells(row) for row in load(ROOT / named[1]) if row.ratio}
        elif re.search(r"\| [0-9a-f]{7} \|$", line):
            told.add(tuple(line.replace("\\", "").strip("| ").split(" | ")))
    assert len(told) > 9 and not told - found


def _cells(row) -> tuple[str, ...]:
    return (
        row.shape,
        row.dtype,
        label(row),
        f"{row.ratio[0]:.2f}",
        size(row.peak_extra_bytes),
        row.conditions.commit[:7],
    )
