"""Writing the reference cache: its size first, killed and taken up again, by two processes, and by two runs at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from runs import files, pairs, trainer
from tdpo_trainer import cache, fill
from tdpo_trainer.cache import CacheError, open_cache, read_meta
from tdpo_trainer.forward import Reference

HERE = Path(__file__).parent


def test_size_is_said_before_anything_is_written(tmp_path: Path, model_folder: Path, capsys, monkeypatch):
    """Without a progress bar, too."""
    monkeypatch.setattr(fill, "write_meta", lambda *_: pytest.fail("written before the estimate"))
    monkeypatch.setattr(fill, "_free", lambda _: 10)
    with pytest.raises(CacheError, match="needs .* GB, 1e-08 GB are free there"):
        trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "cache"), disable_tqdm=True)
    said = capsys.readouterr().out
    assert "cache/train: 12 of 12 pairs to write, about 1.12e-05 GB" in said, said


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
sys.path[:0] = [{here!r}]
from runs import trainer
from tdpo_trainer import cache, fill
fill.SHARD_BYTES = 3000
written, own = 0, cache.save_file
def save(tensors, path, metadata):
    global written
    own(tensors, path, metadata=metadata)
    written += "shard" in str(path)
    if written == 3:  # after its bytes, before its name
        os.kill(os.getpid(), signal.SIGKILL)
cache.save_file = save
trainer({out!r}, {model!r}, reference_cache={cache!r})
"""


def test_a_kill_midway_loses_nothing(tmp_path: Path, model_folder: Path, monkeypatch, small_shards: None):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer(tmp_path, str(model_folder), reference_cache=str(whole))
    names = dict(here=str(HERE), out=str(tmp_path), model=str(model_folder), cache=str(killed))
    done = subprocess.run([sys.executable, "-c", KILLED.format(**names)], capture_output=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    left = files(killed)
    assert sum(name.startswith("train/shard") and name.endswith(".safetensors") for name in left) == 2
    assert any(name.endswith(".tmp") for name in left)
    forwards = []
    own = fill._reference
    monkeypatch.setattr(fill, "_reference", lambda *args: forwards.append(1) or own(*args))
    trainer(tmp_path, str(model_folder), reference_cache=str(killed))
    meta = read_meta(whole / "train", json.loads((whole / "train" / "meta.json").read_text())["fingerprint"])
    assert len(forwards) == sum(-(-len(meta.rows(shard)) // 2) for shard in range(2, meta.shards))
    assert files(killed) == files(whole)


def test_a_missing_shard_is_written_again(written: Path, model_folder: Path):
    before = files(written)
    (written / "shard-00001.safetensors").unlink()
    fingerprint = json.loads((written / "meta.json").read_text())["fingerprint"]
    with pytest.raises(CacheError, match="1 of . shards are missing, the first is shard-00001"):
        open_cache(written, fingerprint)
    trainer(written.parent.parent, str(model_folder), reference_cache=str(written.parent))
    assert files(written) == before


def source(rows: int) -> fill.Source:
    """Pairs of three tokens, and states that are all one."""

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        ones = torch.ones(2 * len(rows), 3)
        return {"input_ids": ones, "completion_mask": ones}

    return fill.Source([{}] * rows, collate, lambda batch: Reference(batch["input_ids"][..., None], None), {"of": "1"})


def test_of_two_runs_that_begin_together_one_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The second used to take away the file that the first was about to name."""
    threads, publish, second = ThreadPoolExecutor(2), cache._publish, list[Future]()

    def run() -> cache.ReferenceCache:
        return fill.write_cache(tmp_path / "train", source(4), Accelerator(cpu=True), batch_size=2, quiet=True)

    def publishing(temporary: Path, path: Path) -> None:
        if not second:
            second.append(threads.submit(run))
            wait(second, timeout=1)
        publish(temporary, path)

    monkeypatch.setattr(cache, "_publish", publishing)
    caches = threads.submit(run).result(), second[0].result()
    assert all(torch.equal(states, torch.ones(2, 1)) for each in caches for states in each.pair(3))
    assert capsys.readouterr().out.count("another run writes it") == 1


@pytest.mark.parametrize(
    "long, got", [(True, "eval_dataset: got 2 pairs, each with a prompt"), (False, "eval_dataset: got no pairs")]
)
def test_an_evaluation_set_without_a_completion_is_refused(tmp_path: Path, model_folder: Path, long: bool, got: str):
    rows = pairs(2).map(lambda row: row | {"prompt": 30 * "a"}) if long else pairs(2).select([])
    with pytest.raises(ValueError, match=f"^{got}"):
        trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "c"), eval_dataset=rows, max_length=20)


def test_what_the_main_process_finds_wrong_ends_every_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fill, "broadcast_object_list", lambda said, **_: said.__setitem__(1, "the disk is too small"))
    monkeypatch.setattr(Accelerator, "is_main_process", False)
    with pytest.raises(CacheError, match="the disk is too small"):
        fill._of_main(Accelerator(cpu=True), lambda: pytest.fail("asked another process"))


TWO = """
import sys, torch
sys.path[:0] = [{here!r}]
from runs import trainer
from tdpo_trainer import fill, fingerprint
fill.SHARD_BYTES = 3000
own = fill._reference
def together(*args):  # as a sharded reference: its forward takes every process
    torch.distributed.all_reduce(torch.zeros(1))
    return own(*args)
fill._reference = together
trainer({out!r}, {model!r}, reference_cache={cache!r})
"""


@pytest.mark.long
def test_two_processes_write_the_same_cache_in_step(written: Path, tmp_path: Path, model_folder: Path):
    names = dict(here=str(HERE), out=str(tmp_path), model=str(model_folder), cache=str(tmp_path / "two"))
    (tmp_path / "two.py").write_text(TWO.format(**names))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29417"]
    done = subprocess.run(
        [*launch, str(tmp_path / "two.py")], capture_output=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr.decode()
    assert files(tmp_path / "two" / "train") == files(written)
