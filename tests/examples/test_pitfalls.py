"""Hold that the code in `docs/pitfalls.md` runs, and that its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pitfalls.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_code_of_the_page_runs_from_top_to_bottom():
    assert len(BLOCKS) == TEXT.count("```python") == 7
    names: dict = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", TEXT))))
def test_links_lead_to_files(target):
    assert (PAGE.parent / target).exists()
