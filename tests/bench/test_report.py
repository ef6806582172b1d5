"""The benchmark's tables, figures and report."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_bench import made_up

from bench import __main__ as command
from bench import rows
from bench.conditions import conditions
from bench.report import tables as tabled
from bench.shapes import SHAPES


def test_the_table_says_who_does_less_and_who_was_disturbed():
    shown = tabled.markdown(tabled.tables([made_up(partial=True, busy_cores=1.5, peak_extra_bytes=2 * 10**9)]))
    assert "ours@0 *" in shown and "no KL" in shown and "kept 1.5 cores busy" in shown and "2.00 GB" in shown
    assert conditions().torch in shown and conditions().commit in shown


@pytest.fixture
def measured() -> list[rows.Row]:
    same = dict(V=8016, D=256, dtype="float32", conditions=conditions())
    growing = [
        rows.Row(f"rows-{T}", T, provider=name, budget_bytes=budget, rounds=3, seconds=(T / 1e4,) * 3,
                 ratio=(1.5, 1.4, 1.6), peak_extra_bytes=T * 1000, error=1e-7, **same)
        for T in (256, 1024)
        for name, budget in (("eager", None), ("ours", 0))
    ]  # fmt: skip
    wall = rows.Row("rows-131072", 131072, provider="eager", budget_bytes=None, rounds=1, **same,
                    note="out of memory: needs 25 GB")  # fmt: skip
    return [*growing, wall, made_up(shape="drift-1e-02", drift=0.0123, kl_error=4.5e-6, error=6.7e-5)]


def test_the_report_says_what_was_measured_and_what_was_not(measured, tmp_path):
    pytest.importorskip("matplotlib")
    out, to = tmp_path / "cpu.jsonl", tmp_path / "report"
    rows.append(out, measured)
    assert command.main(["report", "--out", str(out), "--to", str(to)]) == 0
    text, names = (to / "report.md").read_text(), {path.name for path in to.glob("*.png")}
    figures = ("cpu-rows", "cpu-drift")
    assert names == {f"{name}-{theme}.png" for name in figures for theme in ("light", "dark")}
    assert "**estimated, not measured: llama-3.1-8b's head" in text and all(name in text for name in names)
    assert "Not yet measured on a GPU." in text and "out of memory: needs 25 GB" in text
    assert all(number in text for number in ("4.5e-06", "6.7e-05", "1.50 (1.40-1.60)", "102.40"))
    rows.append(out, [made_up(conditions=replace(conditions(), driver="CUDA 13.0"))])
    command.main(["report", "--out", str(out), "--to", str(to)])
    assert "Not yet measured" not in (to / "report.md").read_text()


@pytest.mark.parametrize("slower, provider, red", [(2.5, "ours", False), (3.5, "ours", True), (3.5, "eager", False)])
def test_a_layout_stands_beside_its_contiguous_twin_and_breaks_law_7_beyond_3_x(slower, provider, red, tmp_path):
    pytest.importorskip("matplotlib")
    twin = made_up(shape="strided-2048/contiguous", seconds=(0.1,) * 3, ratio=(1.0,) * 3, provider=provider)
    other = replace(twin, shape="strided-2048/transposed", seconds=(0.1 * slower,) * 3)
    shown = tabled.markdown(tabled.tables([twin, other]))
    assert shown.count("**") == 2 and f"| {slower:.2f} " in shown and ("RED" in shown) == red
    rows.append(tmp_path / "rows.jsonl", [twin, other])
    assert command.main(["report", "--out", str(tmp_path / "rows.jsonl"), "--to", str(tmp_path)]) == red


def test_every_provider_has_a_colour():
    pytest.importorskip("matplotlib")
    from bench.report.figures import COLOURS

    assert {name.split("@")[0] for s in SHAPES.values() for name in s.contenders} <= set(COLOURS)
