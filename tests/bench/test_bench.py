"""The benchmark works: it runs, it refuses to time wrong gradients, and it can report what it saved."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tqdm")

from bench import __main__ as command  # noqa: E402
from bench import gate, report, rows  # noqa: E402
from bench import run as running  # noqa: E402
from bench.conditions import conditions  # noqa: E402
from bench.providers import PROVIDERS  # noqa: E402
from bench.providers.eager import Eager  # noqa: E402
from bench.shapes import SHAPES  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TINY = SHAPES["tiny"]


class SlightlyWrong(Eager):
    """Right loss, right hidden gradient, and a weight gradient that no eye would catch."""

    name = "wrong"

    def make(self, problem):
        step = super().make(problem)

        def wrong():
            loss = step()
            problem.weight.grad.mul_(1.001)
            return loss

        return wrong


class Raises(Eager):
    def make(self, problem):
        raise RuntimeError("planted")


def test_quick_prints_the_table_and_saves_nothing(tmp_path):
    out = tmp_path / "rows.jsonl"
    arguments = [sys.executable, "-m", "bench", "--quick", "--no-save", "--out", str(out), "--rounds", "2"]
    child = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert all(name in child.stdout for name in TINY.contenders), child.stdout
    assert "RED" not in child.stdout
    assert not out.exists()


@pytest.mark.parametrize("name", ["eager", "ours@all", "ours@0"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gate_lets_the_right_ones_through(name, dtype):
    assert gate.check(PROVIDERS[name], TINY, dtype).complaint is None


def test_gate_goes_red_on_planted_wrong_gradients(monkeypatch):
    verdict = gate.check(SlightlyWrong(), TINY, "float32")
    assert verdict.error == pytest.approx(1e-3, rel=0.01)
    assert "weight" in verdict.complaint
    monkeypatch.setitem(PROVIDERS, "eager", SlightlyWrong())
    floor, wrong = running.run(TINY, "float32", ["floor", "eager"], 1, conditions(), lambda n: None)
    assert floor.seconds is not None and wrong.seconds is None and wrong.red
    assert "RED weight is off" in report.tables([floor, wrong])


def test_gate_goes_red_on_an_exception():
    assert gate.check(Raises(), TINY, "float32").complaint == "RuntimeError: planted"


def test_report_shows_the_latest_row_of_each(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    measured = (0.5, 0.4, 0.6), (7.25, 7.0, 7.5), 2 * 10**9, 1e-7
    row = rows.Row("tiny", 32, 500, 32, "float32", "ours", 0, 3, conditions(), *measured)
    rows.append(out, [row])
    rows.append(out, [replace(row, ratio=(1.25, 1.2, 1.3)), replace(row, budget_bytes=1, busy_cores=1.5)])
    assert rows.load(out)[0] == row
    assert command.main(["report", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| ours@0 " in shown and "| 1.25 (1.20-1.30)" in shown and "2.00 GB" in shown
    assert shown.count("7.25") == 1 and "ours@1" in shown  # only the other budget keeps the older ratio
    assert "other processes kept 1.5 cores busy" in shown
    assert row.conditions.torch in shown and row.conditions.date[:10] in shown


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--shapes", "nope"], "--shapes: unknown nope, wanted some of cpu-152k"),
        (["--providers", "nope"], "--providers: unknown nope"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--shapes", "long-1k", "--providers", "eager"], "nothing to measure"),
    ],
)
def test_unknown_names_are_named(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err
