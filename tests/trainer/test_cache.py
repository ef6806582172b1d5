"""The reference cache: the live run exactly, without its model; and nothing that is not this run's."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import TEMPLATE, config, llama, losses, pairs, parameters, saved_llama, tokenizer, trainer, worst
from safetensors.torch import load_file
from tdpo_trainer import fill, fingerprint
from tdpo_trainer.cache import CacheError, open_cache, read_meta
from tdpo_trainer.trainer import TDPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

ALONE = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)  # a pair meets the same shapes in both runs
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """About three pairs each."""
    monkeypatch.setattr(fill, "SHARD_BYTES", 3000)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("reference", ["initial policy", "another model", "lora"])
def test_it_is_exactly_the_live_run_in_fp32(reference: str, tmp_path: Path, model_folder: Path, small_shards: None):
    def run(**changes) -> TDPOTrainer:
        if reference == "lora":
            lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
            torch.manual_seed(3)
            return trainer(tmp_path / "out", llama(), peft_config=lora, **ALONE, **changes)
        other = llama(1) if reference == "another model" else None
        return trainer(tmp_path / "out", str(model_folder), other, **ALONE, **changes)

    live, cached = run(), run(reference_cache=str(tmp_path / "cache"))
    live.train(), cached.train()
    assert cached.ref_model is None
    assert len(list((tmp_path / "cache" / "train").glob("shard-*"))) > 2
    assert (tmp_path / "cache" / "train" / "head.safetensors").exists() == (reference != "lora")
    assert losses(cached) == losses(live)
    assert worst(parameters(cached.model), parameters(live.model)) == 0.0
    assert worst(parameters(cached.model), parameters(run().model)) > 1e-3


def test_whatever_the_batches_to_rounding(tmp_path: Path, model_folder: Path):
    live = trainer(tmp_path, str(model_folder))
    cached = trainer(tmp_path, str(model_folder), precompute_ref_log_probs=True, precompute_ref_batch_size=5)
    live.train(), cached.train()
    assert (tmp_path / "reference_cache" / "train" / "meta.json").exists()
    assert losses(cached) == pytest.approx(losses(live), rel=1e-5)


def test_it_is_written_without_dropout(tmp_path: Path):
    states = []
    for dropout in (0.0, 0.9):
        folder = tmp_path / str(dropout)
        trainer(tmp_path, llama(attention_dropout=dropout).train(), reference_cache=str(folder))
        states.append(torch.cat([load_file(path)["hidden"] for path in sorted(folder.rglob("shard-*"))]))
    assert torch.equal(*states)


def test_evaluation_has_caches_of_its_own(tmp_path: Path, model_folder: Path):
    def run(**changes) -> TDPOTrainer:
        return trainer(tmp_path, str(model_folder), eval_dataset={"a": pairs(4, 1), "b": pairs(3, 2)}, **changes)

    live, cached = run(), run(reference_cache=str(tmp_path / "cache"))
    ours, theirs = cached.evaluate(), live.evaluate()
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {"train", "a", "b"}
    assert ours["eval_a_loss"] == pytest.approx(theirs["eval_a_loss"], rel=1e-5)
    assert ours["eval_b_loss"] == pytest.approx(theirs["eval_b_loss"], rel=1e-5)
    fresh = cached.evaluate(pairs(3, 5))
    assert fresh["eval_loss"] == pytest.approx(live.evaluate(pairs(3, 5))["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("reference", ["initial policy", "lora"])
def test_a_policy_that_was_trained_writes_no_reference(reference: str, tmp_path: Path, model_folder: Path):
    """A model under an adapter stays the reference, whether or not this TRL refuses such a dataset."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False) if reference == "lora" else None
    ours = trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "cache"), peft_config=lora)
    unseen = ours._prepare_dataset(pairs(3, 5), tokenizer(), ours.args, "eval")
    ours.train()
    if reference == "lora":
        ours._precompute_ref_logps(unseen, "eval", 2)
        return
    with pytest.raises(CacheError, match="^eval_dataset: got one without a cache once"):
        ours._precompute_ref_logps(unseen, "eval", 2)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["train"]


def test_a_second_run_finds_it_and_runs_no_reference(tmp_path: Path, model_folder: Path, monkeypatch):
    options = dict(reference_cache=str(tmp_path / "cache"))
    trainer(tmp_path, str(model_folder), **options)
    before = files(tmp_path / "cache")
    monkeypatch.setattr(fill, "_reference", lambda *_: pytest.fail("the reference ran again"))
    trainer(tmp_path, str(model_folder), **options).train()
    assert files(tmp_path / "cache") == before


def test_size_is_said_before_anything_is_written(tmp_path: Path, model_folder: Path, capsys, monkeypatch):
    monkeypatch.setattr(fill, "write_meta", lambda *_: pytest.fail("written before the estimate"))
    monkeypatch.setattr(fill, "_free", lambda _: 10)
    with pytest.raises(CacheError, match="needs .* GB, 1e-08 GB are free there"):
        trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "cache"), disable_tqdm=False)
    said = capsys.readouterr().out
    assert "cache/train: 12 of 12 pairs to write, about 1.12e-05 GB" in said, said
    assert not (tmp_path / "cache").exists()


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


@pytest.fixture
def written(tmp_path: Path, model_folder: Path, small_shards: None) -> Path:
    trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "cache"))
    return tmp_path / "cache" / "train"


def again(written: Path, model: str | Path, **changes) -> None:
    trainer(written.parent.parent, str(model), reference_cache=str(written.parent), **changes).train()


def test_a_flipped_byte_is_refused_when_it_is_read(written: Path, model_folder: Path):
    path = written / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])["hidden"]["data_offsets"][0]
    data[8 + header + start + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="shard-00001.safetensors: pair . is not what was written; delete it"):
        again(written, model_folder, max_steps=12)


def test_corrupt_files_are_refused(written: Path, model_folder: Path):
    for name in ("shard-00000.safetensors", "head.safetensors", "meta.json"):
        path = written / name
        data = path.read_bytes()
        path.write_bytes(data[:-7])
        with pytest.raises(CacheError, match=f"{name}: cannot be read"):
            again(written, model_folder)
        path.write_bytes(data)


def test_a_flipped_byte_of_the_head_is_refused(written: Path, model_folder: Path):
    path = written / "head.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match="head.safetensors: is not what was written"):
        again(written, model_folder)


def test_a_shard_of_another_cache_is_refused(written: Path, model_folder: Path):
    shutil.copy(written / "shard-00000.safetensors", written / "shard-00002.safetensors")
    with pytest.raises(CacheError, match="shard-00002.safetensors: belongs to another cache"):
        again(written, model_folder)


class Framed(DataCollatorForPreference):
    """Return as many tokens of completions, and a token before every prompt."""

    def torch_call(self, examples: list[dict]) -> dict:
        return super().torch_call([row | {"prompt_ids": [2, *row["prompt_ids"]]} for row in examples])


def test_padding_is_not_what_a_collator_is_known_by(written: Path, model_folder: Path):
    before = files(written)
    collator = DataCollatorForPreference(0, pad_to_multiple_of=8)
    again(written, model_folder, data_collator=collator)
    assert files(written) == before


@pytest.mark.parametrize(
    "part", ["collator", "dataset", "truncation", "model", "config", "tokenizer", "template", "precision"]
)
def test_a_stale_cache_is_refused_with_what_changed(part: str, written: Path, model_folder: Path, tmp_path: Path):
    changes, more, model, reader = {"reference_cache": str(written.parent)}, {}, llama(), tokenizer()
    data = pairs()
    if part == "collator":
        more["data_collator"] = Framed(0)
    if part == "dataset":
        data = pairs().select([1, 0, *range(2, 12)])
    if part == "truncation":
        changes["max_length"] = 20
    if part == "model":
        with torch.no_grad():
            model.model.norm.weight[3] += 1e-3
    if part == "config":
        model = llama(rms_norm_eps=0.5)
    if part == "tokenizer":
        reader.add_tokens("<new>")
    if part == "template":
        reader.chat_template = TEMPLATE
    if part == "precision":
        changes["bf16"] = True
    with pytest.raises(CacheError, match=f"made from another {part}: got .*, wanted .*; delete the directory"):
        TDPOTrainer(model, None, config(tmp_path, **changes), processing_class=reader, train_dataset=data, **more)


def test_a_cache_that_says_less_or_more_than_is_asked_is_refused(written: Path):
    """One of an older version, or a newer."""
    knows = json.loads((written / "meta.json").read_text())["fingerprint"]
    assert read_meta(written, knows).examples == 12
    with pytest.raises(CacheError, match="made from another weather: got None, wanted fine"):
        read_meta(written, knows | {"weather": "fine"})
    with pytest.raises(CacheError, match="made from another template: got .*, wanted None"):
        read_meta(written, {name: x for name, x in knows.items() if name != "template"})


def test_a_reference_adapter_of_another_scaling_is_another_reference(tmp_path: Path):
    """Its weights are the same."""

    def run(alpha: int) -> None:
        torch.manual_seed(3)
        lora = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        trainer(tmp_path, get_peft_model(llama(), lora), reference_cache=str(tmp_path / "cache"))

    run(8), run(8)
    with pytest.raises(CacheError, match="made from another config"):
        run(16)


@pytest.mark.parametrize("name", ["default", "model", "layers", "weight"])
def test_weights_under_an_adapter_count_and_its_own_do_not(name: str):
    """Whatever the adapter is called."""
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    policy = get_peft_model(llama(), lora, adapter_name=name)
    before, seen = fingerprint.of_model(policy), set()
    for key, x in policy.named_parameters():
        own = x.detach().clone()
        x.data.add_(1)
        assert (fingerprint.of_model(policy) == before) == x.requires_grad, key
        x.data.copy_(own)
        seen.add(x.requires_grad)
    assert seen == {True, False}


def test_a_missing_shard_is_written_again(written: Path, model_folder: Path):
    before = files(written)
    (written / "shard-00001.safetensors").unlink()
    fingerprint = json.loads((written / "meta.json").read_text())["fingerprint"]
    with pytest.raises(CacheError, match="1 of . shards are missing, the first is shard-00001"):
        open_cache(written, fingerprint)
    again(written, model_folder)
    assert files(written) == before


def test_streaming_and_a_synchronised_reference_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="sync_ref_model: got True with reference_cache"):
        config(tmp_path, reference_cache=str(tmp_path), sync_ref_model=True)
    with pytest.raises(ValueError, match="reference_cache: got a streaming dataset"):
        trainer(tmp_path, llama(), reference_cache=str(tmp_path), train_dataset=pairs().to_iterable_dataset())


def test_workers_read_it_too(tmp_path: Path, model_folder: Path):
    options = dict(reference_cache=str(tmp_path / "cache"), **ALONE)
    alone = trainer(tmp_path, str(model_folder), **options)
    workers = trainer(tmp_path, str(model_folder), dataloader_num_workers=1, **options)
    alone.train(), workers.train()
    assert losses(workers) == losses(alone)


def test_another_model_s_cache_needs_no_reference_in_memory(tmp_path: Path, model_folder: Path):
    reference = llama(1)
    ours = trainer(tmp_path, copy.deepcopy(llama()), reference, reference_cache=str(tmp_path / "cache"))
    assert ours.ref_model is None
    assert torch.equal(ours._ref_head.weight, reference.lm_head.weight)


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
