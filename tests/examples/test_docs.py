"""Hold that the code in `docs/` runs, that links lead to files, and that figures and measured tables are up to date."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report.tables import label, size
from bench.rows import load

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"walk-through"}  # pages whose commands run, too
LINKED = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "python/tdpo_trainer/README.md")]


@pytest.mark.parametrize(
    "page", [x for x in PAGES if "```python" in x.read_text() and x.stem not in SHELL], ids=lambda page: page.stem
)
def test_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = [(kind, code) for kind, code in BLOCK.findall(page.read_text()) if kind == "python" or page.stem in SHELL]
    assert sum(kind == "python" for kind, _ in blocks) == page.read_text().count("```python")
    names: dict = {}
    for number, (kind, code) in enumerate(blocks, 1):
        if kind == "sh":
            subprocess.run(["bash", "-euc", code], check=True, timeout=240)
        else:
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.timeout(600)
def test_the_walk_through_ends_with_a_better_model(tmp_path, monkeypatch):
    test_code_of_a_page_runs_from_top_to_bottom(DOCS / "walk-through.md", tmp_path, monkeypatch)
    adapter, merged = (json.loads((tmp_path / name / "eval.json").read_text()) for name in ("out", "merged"))
    assert adapter["loss"]["high"] < 0.6931 and adapter["accuracy"]["low"] > 0.5
    assert all(
        merged[name]["mean"] == pytest.approx(x["mean"], abs=1e-4) for name, x in adapter.items() if name != "pairs"
    )
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {"curves.png", "samples.txt", "data_report.json", "README.md"} <= {
        x.name for x in (tmp_path / "out").iterdir()
    }
    assert logged[0]["loss"] < 0.6932


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
