"""The GPU campaign, without a GPU: it goes through the motions, goes on where it ended, survives its workers, and a dry
run's numbers go nowhere."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tdpo_kernels.tuning")

from bench import tune  # noqa: E402
from bench.gpu import __main__ as command  # noqa: E402
from bench.gpu import collect, summary, tables, worker  # noqa: E402
from bench.gpu.candidates import candidates  # noqa: E402
from bench.gpu.device import open_device  # noqa: E402
from bench.gpu.driver import Driver, guarded  # noqa: E402
from bench.gpu.plan import STAGES, Failed, Item, Settings, digest  # noqa: E402
from bench.gpu.store import Store  # noqa: E402
from tdpo_kernels.tuning.config import Case, Device, TileConfig  # noqa: E402
from tdpo_kernels.tuning.heuristic import heuristic, keeps_bits  # noqa: E402
from tdpo_kernels.tuning.table import Measured, Winner, table_of  # noqa: E402

COMMITTED = ("bench/results/**/*.*", "tdpo_kernels/tuning/tables/*.*")
SETTINGS = Settings("", STAGES, True, 0.0, "c0ffee", False, "50urce")
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}
H200 = Device("NVIDIA H200", "sm_90")


# --- a dry run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two stages of a dry run, and what was committed before it."""
    out, before = tmp_path_factory.mktemp("campaign"), digest(*COMMITTED)
    assert run(out) == 0
    return out, before


def run(out: Path) -> int:
    stages = ["--stages", "memory,sanitizer", "--only", "T=32 budget 0 frozen"]
    return command.main(["--out", str(out), "--dry", "--minutes", "3", *stages])


def test_dry_run_records_and_goes_nowhere_else(dry):
    out, before = dry
    records = Store(out).records.values()
    assert {r["item"] for r in records} >= {"tiled T=32 budget 0 frozen head"}
    assert all(r["configuration"]["dry"] and r["status"] == "ok" for r in records)
    assert all(0 < r["facts"]["peak"] <= r["facts"]["allowed"] for r in records)
    text = (out / "dry-summary.md").read_text()
    assert text.startswith("DRY RUN") and "tiled T=32" in text
    assert digest(*COMMITTED) == before


def test_what_is_there_is_not_repeated(dry, capsys):
    out, _ = dry
    before = (out / "records.jsonl").read_text()
    assert run(out) == 0
    assert (out / "records.jsonl").read_text() == before
    assert ": ok (" not in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no CUDA device; --dry goes"):
        open_device(dry=False)


def test_unknown_stages_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--out", str(tmp_path), "--stages", "env,nope"])
    assert exit.value.code == 2 and "unknown nope, wanted some of env," in capsys.readouterr().err


def test_products_that_a_device_lacks_are_said_before_anything_leans_on_them(monkeypatch):
    """A CPU has none into fp32, and `products.py` makes none there; were it to, that fails."""
    env, device = importlib.import_module("bench.gpu.stages.env"), open_device(dry=True)
    facts = env.products(device)
    assert facts["products.py"] == "widens operands to fp32"
    assert facts["torch.bfloat16 products into fp32"].startswith("NotImplementedError: Could not run 'aten::mm.dtype")
    monkeypatch.setattr(env, "operand_dtype", lambda compute, *_: compute)
    with pytest.raises(Failed, match="torch.bfloat16: NotImplementedError"):
        env.products(device)
    mm = lambda a, b, *, out_dtype, out=None: (a @ b).to(out_dtype) if out is None else out.copy_(a @ b)  # noqa: E731
    monkeypatch.setattr(torch, "mm", mm)
    with pytest.raises(Failed, match="off by .*rounded to 16 bits"):
        env.products(device)
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: mm(a.float(), b.float(), **more))
    assert env.products(device)["torch.float16 products into fp32"] == "ok"


# --- workers that fail ------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from bench.gpu.store import Store
from pathlib import Path
settings, pipe = json.loads(sys.argv[1]), int(sys.argv[2])
store = Store(Path(settings["out"]))
tell = lambda **event: os.write(pipe, (json.dumps(event) + "\\n").encode())
print("worker", flush=True)
for name in ("good", "dies", "hangs", "broken", "last"):
    record = dict(stage="s", item=name, configuration={{}}, facts={{}}, seconds=0.0)
    if store.has("s", name, {{}}, False):
        continue
    tell(event="start", record=record, limit=0.5, log=os.fstat(1).st_size)
    print("begins", name, flush=True)
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    tell(event="done", record=record | dict(status="ok"))
    if name == "broken":
        tell(event="broken")
        os._exit(1)
tell(event="left", items=["s: later"])
"""


def drive(tmp_path: Path, seconds: float, script: str = WORKER) -> tuple[Driver, dict[str, dict]]:
    path = tmp_path / "worker.py"
    path.write_text(script.format(root=str(Path(command.ROOT))))
    settings = replace(SETTINGS, out=str(tmp_path), deadline=time.time() + seconds)
    driver = Driver(settings, Store(tmp_path), [sys.executable, str(path)])
    driver.run()
    return driver, {r["item"]: r for r in Store(tmp_path).records.values()}


def test_a_worker_that_dies_or_hangs_costs_one_item(tmp_path):
    driver, found = drive(tmp_path, 60.0)
    status = {name: r["status"] for name, r in found.items()}
    assert status == {"good": "ok", "dies": "failed", "hangs": "failed", "broken": "ok", "last": "ok"}
    assert "ended with -6 in the middle" in found["dies"]["message"] and "begins dies" in found["dies"]["log"]
    assert "limit of 0 s" in found["hangs"]["message"] and "begins good" not in found["hangs"]["log"]
    assert driver.failed == ["s: dies", "s: hangs"] and driver.left == ["s: later"]
    assert (tmp_path / "log.txt").read_text().count("worker\n") == 4


def test_time_that_runs_out_stops_what_is_under_way_and_does_not_fail_it(tmp_path):
    driver, found = drive(tmp_path, 8.0 + 1.0, WORKER.replace("limit=0.5", "limit=50").replace("os.abort()", "pass"))
    assert found["hangs"]["status"] == "stopped" and "last" not in found
    assert driver.failed == []


def test_a_worker_that_cannot_begin_is_a_failure(tmp_path):
    driver, found = drive(tmp_path, 60.0, "raise SystemExit(3)")
    assert driver.failed == ["worker"] and not found


def test_a_term_signal_ends_the_worker_too(tmp_path):
    settings = replace(SETTINGS, out=str(tmp_path), deadline=time.time() + 60)
    script = tmp_path / "worker.py"
    script.write_text("import os, signal, time\nprint(os.getpid(), flush=True)\n"
                      "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)")  # fmt: skip
    driver = Driver(settings, Store(tmp_path), [sys.executable, str(script)])
    assert not guarded(driver.run, driver)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log.txt").read_text()), 0)


@pytest.mark.parametrize("broken", ["import", "items", "finish"])
def test_a_stage_that_fails_around_its_items_does_not_take_the_next_ones_with_it(broken, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("planted")

    good = SimpleNamespace(items=lambda *_: [Item("fine", dict)])
    bad = SimpleNamespace(items=fail if broken == "items" else good.items, finish=fail)
    modules = {".stages.tune": bad, ".stages.bench": good}
    if broken == "import":
        del modules[".stages.tune"]
    monkeypatch.setattr(worker.importlib, "import_module", lambda name, _: modules[name])
    settings = replace(SETTINGS, out=str(tmp_path), stages=("tune", "bench"), deadline=time.time() + 60)
    device = SimpleNamespace(facts=lambda: {"device": "x"}, clean=lambda: None)
    told = []
    monkeypatch.setattr(worker.Worker, "_tell", lambda self, **event: told.append(event))
    worker.Worker(settings, 0, device).run()
    done = {(e["record"]["stage"], e["record"]["item"]): e["record"]["status"] for e in told if e["event"] == "done"}
    assert done[("tune", worker.ITSELF)] == "failed" and done[("bench", "fine")] == "ok"
    assert told[-1] == {"event": "left", "items": []}


# --- records ----------------------------------------------------------------------------------------------------------


def record(item: str, status: str = "ok", dry: bool = False, **facts) -> dict:
    where = {"dry": dry, "source": "50urce", "device": "NVIDIA H200"}
    return dict(stage="bench", item=item, configuration=where, status=status, facts=facts, seconds=1.0, message="")


def test_the_last_record_of_an_item_stands_and_failures_are_repeated_on_demand(tmp_path):
    store, where = Store(tmp_path), record("a")["configuration"]
    for status in ("ok", "stopped", "failed"):
        store.add(record("a", status))
        assert store.has("bench", "a", where, again=False) == (status != "stopped")
        assert store.has("bench", "a", where, again=True) == (status == "ok")
    assert [r["status"] for r in Store(tmp_path).records.values()] == ["failed"]
    assert not store.has("bench", "a", where | {"source": "other"}, again=False)
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]


def row(provider: str, commit: str = "c0ffee") -> dict:
    return dict(
        shape="8b, forward", T=8, V=9, D=4, provider=provider, budget_bytes=None, ratio=(1.0, 1.0, 1.0),
        seconds=(0.5, 0.5, 0.5), peak_extra_bytes=None, error=None, red=False, note=None,
        conditions=dict(commit=commit),
    )  # fmt: skip


def test_rows_are_collected_once_and_dry_ones_never(tmp_path):
    store, results = Store(tmp_path), tmp_path / "results"
    store.add(record("dry, forward", dry=True, rows=[row("dry")]))
    store.add(record("8b, forward", rows=[row("gemm"), row("fused", "source-50urce")]))
    assert collect.rows(store, "", results) == {results / "nvidia-h200.jsonl": 2}
    assert collect.rows(store, "abc", results) == {}
    lines = [json.loads(line) for line in (results / "nvidia-h200.jsonl").read_text().splitlines()]
    assert [line["provider"] for line in lines] == ["gemm", "fused"]


def test_rows_measured_without_git_get_the_commit_of_the_same_source_only(tmp_path, monkeypatch):
    for source, commit in (("50urce", "abc"), ("other", "source-50urce")):
        monkeypatch.setattr(collect, "source", lambda source=source: source)
        store, results = Store(tmp_path), tmp_path / source
        store.note(record("8b, forward", rows=[row("fused", "source-50urce")]))
        (path,) = collect.rows(store, "abc", results)
        assert json.loads(path.read_text())["conditions"]["commit"] == commit


def test_the_summary_names_what_failed_and_shows_the_rows(tmp_path):
    store = Store(tmp_path)
    store.note(record("8b, forward", rows=[row("gemm")]))
    store.note(record("small, forward", "failed") | {"message": "fused: off\nmore"})
    store.note(record("old") | {"configuration": record("old")["configuration"] | {"source": "older"}})
    text = summary.summary(store, False, "50urce")
    assert "* bench, small, forward: failed: fused: off\n" in text + "\n" and "| gemm" in text
    assert "1 records are of other sources" in text and "DRY" not in text


# --- tuning -----------------------------------------------------------------------------------------------------------


def measured(ms: float, D: int = 4096, R: int = 128) -> Measured:
    case, second = Case("fused_stats", "16bit"), (TileConfig(64, 64, 64), ms + 1)
    return Measured(case, D, TileConfig(R, 128, 64), ms, second, "2026-11-30", VERSIONS)


def test_tables_are_written_merged_and_read_back(tmp_path):
    winner = Winner(2, 4096, 128256, {"fused": 2.0, "tiled": 1.0}, "2026-11-30", VERSIONS)
    tune.write(H200, [measured(5.0), measured(6.0, D=896)], folder=tmp_path)
    path = tune.write(H200, [measured(4.0, R=64)], [winner], folder=tmp_path)
    table = table_of(H200, tmp_path)
    assert path.name == "nvidia-h200.json" and [(x.D, x.ms) for x in table.configs] == [(896, 6.0), (4096, 4.0)]
    assert table.config(Case("fused_stats", "16bit"), 4096).R == 64 and table.backend(2, 4096, 128256) == "tiled"
    with pytest.raises(ValueError, match="runner-up"):
        tune.write(H200, [replace(measured(4.0), runner_up=(TileConfig(64), 3.0))], folder=tmp_path)
    assert table_of(H200, tmp_path) == table and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_tables_of_a_dry_run_stay_in_its_folder(tmp_path):
    before, settings = digest(*COMMITTED), replace(SETTINGS, out=str(tmp_path))
    tune.write(Device("interpreter", "interpreter"), [measured(5.0)], folder=tables.folder(settings))
    assert tables.install(settings) == [] and digest(*COMMITTED) == before


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch):
    """The stage, and a backend whose results depend on the configuration that its kernel is given."""
    module = pytest.importorskip("bench.gpu.stages.tune")
    launch = pytest.importorskip("tdpo_kernels.backends.launch")

    def forward(inputs, needs):
        config = launch.choose("fused_stats", H200, 2, width=64, explicit=TileConfig(128, 128, 64))
        if config.R == 32:
            raise RuntimeError("out of resources")
        x = torch.full((3,), 2.0 if config.R == 64 else 1.0)
        return SimpleNamespace(logp_T=x, ref_logp_T=x, kl_T=x)

    monkeypatch.setitem(module.BACKENDS, "fake", SimpleNamespace(forward=forward))
    return module


def test_candidates_that_fail_or_are_wrong_are_left_out(stage):
    target, cpu = stage.Target("fused_stats", "fake"), SimpleNamespace(is_cuda=False)
    every = [TileConfig(R, 128, 64) for R in (128, 64, 32, 256)]
    with stage.Chooser() as chooser:
        wanted = stage._outcome(target, None)
        sound, dropped = stage._sound(cpu, chooser, target, None, wanted, every)
    assert sound == [every[0], every[3]]
    assert dropped == {str(every[1]): "results are off by 1.0e+00", str(every[2]): "RuntimeError: out of resources"}
    assert chooser.asked["fused_stats"] == Case("fused_stats", "16bit")


@pytest.mark.parametrize("kernel", ["fused_stats", "fused_dz", "tile_stats", "staged_dz"])
def test_candidates_are_what_a_launch_would_use(kernel: str):
    case = Case(kernel, "16bit", columns=0 if kernel.startswith("fused") else 1024)
    found = candidates(case, H200)
    assert found[0] == heuristic(case, H200.arch) and len(found) == len(set(found)) > 2
    assert all(keeps_bits(case, config, H200.arch) for config in found)


def test_a_candidate_that_was_not_used_was_not_measured(stage):
    with stage.Chooser() as chooser, pytest.raises(Failed, match="without asking"):
        with chooser.force("fused_dz", TileConfig(64, 64, 64)):
            stage._outcome(stage.Target("fused_stats", "fake"), None)
