"""The benchmark's command: it runs, saves its rows, and goes on where it ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_bench import CEILING, CPU, TINY, made_up

from bench import __main__ as command
from bench import measure, memory, rows
from bench import run as running
from bench.conditions import conditions
from bench.report import tables


def test_rows_come_back_as_they_went(tmp_path):
    out = tmp_path / "rows.jsonl"
    row = made_up(seconds=(1.0, 0.5, 2.0), ceiling=(1.0, 2.0), note="x", drift=0.5)
    rows.append(out, [row])
    rows.append(out, [row])
    assert rows.load(out) == [row, row]
    assert row.conditions.commit and row.conditions.memory_bytes


def test_committed_rows_are_readable_and_a_file_is_of_one_device_and_none_breaks_law_7():
    compared = 0
    for path in rows.FOLDER.glob("*.jsonl"):
        old = rows.load(path)
        assert {rows.file_of(row.conditions.device) for row in old} == {path} and not any(row.red for row in old)
        assert not tables.cliffs(old)
        compared += len(tables.beside_twins(old))
    assert compared, "no layout was measured beside its twin"


def test_only_what_was_measured_together_is_shown_together():
    early, late = (replace(conditions(), date=f"2026-11-2{day}T00:00:00Z") for day in (1, 2))
    first = [made_up(conditions=early, budget_bytes=b) for b in (0, 1)]
    again, other = made_up(conditions=late, budget_bytes=1), made_up(conditions=early, shape="small")
    assert rows.together([*first, other, again]) == [again, other]


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes for memory, no large products for ceilings: both have tests of their own."""
    monkeypatch.setattr(memory, "peak_extra", lambda *_: 10**6)
    monkeypatch.setattr(measure, "ceiling", lambda *_: CEILING)


QUICK = ["--shapes", "tiny", "--dtypes", "float32", "--rounds", "2"]


def test_quick_measures_saves_and_resumes(swift, tmp_path, capsys, monkeypatch):
    out, places = tmp_path / "rows.jsonl", iter([False, False, True])
    real, where = running.run, replace(conditions(), dirty=False)
    done = []
    monkeypatch.setattr(command, "run", lambda *a: done.append(a[0].name) or real(*a))
    monkeypatch.setattr(command, "conditions", lambda device: replace(where, commit="b" if next(places) else "a"))
    for _ in range(3):
        assert command.main([*QUICK, "--resume", "--providers", "eager,ours", "--out", str(out)]) == 0
    assert done == ["tiny", "tiny"]  # the second time there was nothing left; another commit is measured anew
    found = rows.load(out)
    assert [r.provider for r in found[:4]] == ["floor", "eager", "ours", "ours"] and len(found) == 8
    assert all(r.seconds and r.forward and r.backward and r.ceiling and not r.red for r in found)
    assert "eager" in capsys.readouterr().out


def test_a_changed_checkout_is_measured_again(tmp_path):
    where = replace(conditions(), dirty=False)
    job = command.Job(TINY, "float32", ["ours@0"], 1)
    rows.append(tmp_path / "rows.jsonl", [made_up(conditions=where)])
    assert command._left([job], tmp_path / "rows.jsonl", where) == []
    for elsewhere in (replace(where, dirty=True), replace(where, commit="c"), replace(where, torch="0")):
        assert command._left([job], tmp_path / "rows.jsonl", elsewhere) == [job]


def test_keys_of_a_plan_are_those_of_its_rows(swift):
    """Or `--resume` would never find anything done."""
    line = "--quick --rounds 1 --dtypes float32 --providers eager,liger"
    options = command.parser().parse_args(line.split())
    for job in command._plan(options):
        found = running.run(*job, conditions(), None, lambda n: None, CPU)
        assert {row.key for row in found} == job.keys and len(found) == len(job.names), job


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--shapes", "nope"], "--shapes: unknown nope, wanted some of anchor"),
        (["--providers", "nope"], "--providers: unknown nope"),
        (["--rounds", "0"], "--rounds: invalid choice: 0"),
        (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
        (["--shapes", "cpu-152k", "--providers", "trl"], "nothing to measure"),
    ],
)
def test_unknown_names_are_named(arguments, wanted, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(arguments)
    assert exit.value.code == 2
    assert wanted in capsys.readouterr().err
