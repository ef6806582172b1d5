"""The GPU campaign, without a GPU: it goes on where it was cut off, survives its processes, and keeps what is red."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, make_dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_bench import CEILING, made_up, run_tiny

from bench import rows
from bench.gpu import __main__ as command
from bench.gpu import campaign, stages, summary
from bench.gpu.campaign import Finding, Item, Notes, Settings, supervise
from bench.problem import Step
from bench.providers import PROVIDERS, eager

ROOT = Path(__file__).resolve().parents[2]


def settings(out: Path, seconds: float = 60.0, **changes) -> Settings:
    return Settings(out, True, time.time() + seconds, ("s",), **changes)


def run(out: Path, monkeypatch, work: dict, seconds: float = 60.0, limit: float = 30.0) -> dict[str, dict]:
    """Do the named pieces of work as the items of one stage, and return the last note of each."""
    items = [Item(name, do, 0.0, limit=limit, stage="s", ours=name != "theirs") for name, do in work.items()]
    monkeypatch.setattr(Settings, "plan", lambda self: items)
    supervise(settings(out, seconds))
    return {key[1]: note for key, note in Notes(settings(out)).items()}


def counted(path: Path, name: str):
    def work() -> dict:
        with path.open("a") as file:
            file.write(f"{name}\n")
        return {"n": 1}

    return work


def test_a_process_that_dies_or_hangs_costs_one_item(tmp_path, monkeypatch, capfd):
    def fails():
        raise Finding("failed", "off", {"error": 1.0})

    work = {"good": dict, "dies": partial(os._exit, 7), "hangs": lambda: time.sleep(60), "fails": fails, "last": dict}
    found = run(tmp_path, monkeypatch, work, limit=1.0)
    assert [note["status"] for note in found.values()] == ["ok", "failed", "failed", "failed", "ok"]
    assert "its process ended" in found["hangs"]["message"] and found["fails"]["facts"] == {"error": 1.0}
    assert "* s, fails: failed: off" in capfd.readouterr().out and "Timeout" in (tmp_path / "log.txt").read_text()


def test_the_deadline_is_kept_and_the_same_command_goes_on(tmp_path, monkeypatch, capfd):
    log, began = tmp_path / "done", time.time()
    work = {"first": counted(log, "first"), "long": lambda: time.sleep(60), "later": counted(log, "later")}
    found = run(tmp_path, monkeypatch, work, seconds=6.0)
    assert time.time() - began < 20 and found["long"]["status"] == "stopped" and "later" not in found
    told = capfd.readouterr().out
    assert "| first" in told.split("**s**")[0] or "first: ok" in told  # known before it was cut off
    assert "left for the same command: 2 items, from 'long' on" in told
    found = run(tmp_path, monkeypatch, work | {"long": counted(log, "long")})
    assert [note["status"] for note in found.values()] == ["ok"] * 3
    assert log.read_text().split() == ["first", "long", "later"]


def test_no_table_invalidates_what_does_not_depend_on_it(tmp_path, monkeypatch):
    log, table = tmp_path / "done", tmp_path / "table.json"
    work = {"ours": counted(log, "ours"), "theirs": counted(log, "theirs")}
    run(tmp_path, monkeypatch, work)
    table.write_text("{}")
    monkeypatch.setenv("TDPO_KERNELS_TUNING", str(table))
    run(tmp_path, monkeypatch, work)
    assert log.read_text().split() == ["ours", "theirs", "ours"]


def test_the_plan_says_seconds_and_counts_compiling(tmp_path, monkeypatch):
    report = tmp_path / "offline.txt"
    line = "{}  fused_stats 16bit  128x128x64 w8 s3 tma  128  0  98328  0  8  8  12  {}\n"
    of = ("sm_90", "3.0"), ("sm_90", "0.0"), ("sm_90", "1.0"), ("sm_80", "9.0")
    report.write_text("".join(line.format(*words) for words in of))
    monkeypatch.setattr(campaign, "OFFLINE", report)
    text = campaign._plan([Item("a", dict, 10.0, 5, stage="s")], settings(tmp_path))
    cells = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert cells == ["s", "1", "20", "10", "0.3"]


def test_the_seconds_of_a_kernel_are_those_of_the_committed_report():
    """A summary that cannot be read would make them 1.0."""
    assert campaign.OFFLINE.exists() and campaign.compile_seconds() != 1.0


def test_nine_minutes_reach_the_second_head(tmp_path):
    items = Settings(tmp_path, False, 0.0, command.DEFAULT).plan()
    before = items[: next(i for i, item in enumerate(items) if item.name.startswith("0.5b"))]
    assert sum(item.takes for item in before) < 9 * 60 and len({(i.stage, i.name) for i in items}) == len(items)
    assert [item.name.split(", ")[-1] for item in before if item.name.startswith("8b")][:2] == ["tiled@0", "fused@0"]
    assert sum("compiled" in item.name for item in items) == 2


def test_a_red_gate_does_not_erase_a_time(tmp_path, monkeypatch):
    def make(problem):
        right = eager.PROVIDER.make(problem)
        return Step(right.forward, lambda loss: (right.backward(loss), problem.weight.grad.mul_(1.1)))

    monkeypatch.setitem(PROVIDERS, "eager", replace(eager.PROVIDER, make=make))
    monkeypatch.setattr(stages, "ceiling", lambda *_: CEILING)
    shape = stages._shapes(settings(tmp_path))[0]
    with pytest.raises(Finding, match="weight is off") as finding:
        stages._measure(settings(tmp_path), shape, "eager")
    floor, mine = rows.load(tmp_path / "dry-rows.jsonl")
    assert finding.value.status == "red" and mine.red and mine.seconds and not floor.red
    note = dict(key=("headline", "x", "y"), status="red", message="off", facts=finding.value.facts, seconds=1.0)
    assert "RED weight is off" in summary.stage("headline", [note])


def test_one_compilation_serves_gate_memory_and_clock(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: made.append(f) or f)
    eager._compiled.cache_clear()
    _, row = run_tiny(["floor", "compiled"])
    eager._compiled.cache_clear()
    assert row.seconds and len(made) == 1


def test_rows_are_collected_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "FOLDER", tmp_path / "results")
    rows.append(tmp_path / "rows.jsonl", [made_up(), made_up(shape="8b")])
    for _ in range(2):
        assert command.main(["--out", str(tmp_path), "--collect"]) == 0
    assert len(rows.load(rows.file_of(made_up().conditions.device))) == 2


def test_a_dry_run_from_a_carried_folder(tmp_path):
    out, arguments = tmp_path / "out", ["--dry", "--stages", "env", "offsets", "--only", "tiled"]
    python = [sys.executable, "-m", "bench.gpu"]
    (tmp_path / "carried").mkdir()
    for more in (["--out", str(tmp_path / "carried")], ["--out", str(out), "--carried", str(tmp_path / "carried")]):
        done = subprocess.run([*python, *arguments, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "tiled, all kept: ok" not in done.stdout and "nothing is left" in done.stdout
    assert (out / "summary.md").read_text().startswith("DRY RUN") and not (out / "rows.jsonl").exists()


FIELDS = ["R", *((name, int, value) for name, value in dict(C=128, K=64, warps=8, stages=3, registers=0).items())]
Config = make_dataclass("Config", FIELDS, frozen=True)
CASE, DEVICE = SimpleNamespace(kernel="fused_stats"), SimpleNamespace(name="NVIDIA H200", arch="sm_90")


@pytest.fixture
def tune(monkeypatch):
    """The tuner on a library whose results depend on the configuration that its kernel is given."""
    module = pytest.importorskip("bench.gpu.tune")

    def evaluate(*_):
        config = module.tuning.choose(CASE, DEVICE, 64)
        if config.R == 32:
            raise RuntimeError("out of resources")
        return [torch.full((3,), 2.0 if config.R == 64 else 1.0)]

    monkeypatch.setattr(module.tuning, "choose", lambda *_: Config(128))
    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "cotangents", lambda inputs: None)
    return module


def test_candidates_that_fail_or_are_wrong_are_left_out(tune):
    every = [Config(R) for R in (128, 64, 32, 256)]
    with tune.choosing() as asked:
        wanted = tune.outcome("fused_stats", None, ())
        found = tune.faults("fused_stats", every, (), wanted)
    assert asked["fused_stats"][2] == Config(128)
    assert list(found.values()) == ["", "results are off by 1.0e+00", "RuntimeError: out of resources", ""]


def test_a_candidate_that_was_not_used_was_not_measured(tune):
    with tune.choosing(), pytest.raises(Finding, match="without asking"):
        tune.outcome("fused_dz", Config(64), ())


def test_candidates_keep_what_bits_depend_on(tune):
    found = tune.candidates(CASE, Config(128))
    assert found[0] == Config(128) and {c.K for c in found} == {64} and {c.stages for c in found} == {3, 4, 5, 6}


def test_one_thread_parses_at_a_time(tune, monkeypatch):
    ASTSource = pytest.importorskip("triton.compiler").ASTSource
    inside, most = [], []

    def parse(self):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    monkeypatch.setattr(ASTSource, "make_ir", parse)
    monkeypatch.setattr(sys, "version_info", (3, 12))
    with tune.one_parser():
        threads = [threading.Thread(target=ASTSource.make_ir, args=(None,)) for _ in range(4)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert most == [1] * 4 and ASTSource.make_ir is parse


def test_the_result_is_one_json_that_the_library_takes(tune, tmp_path):
    timed = made_up(shape="8b, forward + backward", seconds=(0.09,) * 3, provider="tiled")
    rows.append(tmp_path / "rows.jsonl", [timed, replace(timed, provider="fused", seconds=(0.1,) * 3)])
    for ms in (5.0, 4.0):
        row = {"case": {"kernel": "fused_stats"}, "D": 64, "config": asdict(Config(128)), "ms": ms}
        tune.write(settings(tmp_path), {"device": "NVIDIA H200", "arch": "sm_90"}, row)
    table = json.loads((tmp_path / "tuning.json").read_text())
    assert table["device"] == "NVIDIA H200" and [x["ms"] for x in table["configs"]] == [4.0]
    assert table["winners"] == [{"itemsize": 4, "D": 32, "V": 500, "ms": {"tiled": 90.0, "fused": 100.0}}]
