"""The reference cache: the live run exactly, without its model; and nothing that is not this run's."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import TEMPLATE, config, files, llama, losses, pairs, parameters, tokenizer, trainer, worst
from safetensors.torch import load_file
from tdpo_trainer import fill, fingerprint
from tdpo_trainer.cache import CacheError, read_meta
from tdpo_trainer.trainer import TDPOTrainer
from torch import nn
from trl.trainer.dpo_trainer import DataCollatorForPreference

ALONE = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2)  # a pair meets the same shapes in both runs


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
    assert [path.parent.name for path in (tmp_path / "cache").rglob("meta.json")] == ["train"]


def test_a_second_run_finds_it_and_runs_no_reference(tmp_path: Path, model_folder: Path, monkeypatch):
    options = dict(reference_cache=str(tmp_path / "cache"))
    trainer(tmp_path, str(model_folder), **options)
    before = files(tmp_path / "cache")
    monkeypatch.setattr(fill, "_reference", lambda *_: pytest.fail("the reference ran again"))
    trainer(tmp_path, str(model_folder), **options).train()
    assert files(tmp_path / "cache") == before


def again(written: Path, model: nn.Module | Path, **changes) -> None:
    model = str(model) if isinstance(model, Path) else model
    trainer(written.parent.parent, model, reference_cache=str(written.parent), **changes).train()


def flipped(path: Path, name: str = "") -> bytes:
    """Return the bytes of a safetensors file with one of them changed: of the tensor `name`, or the last."""
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + header])[name]["data_offsets"][0] if name else -4 - 8 - header
    data[8 + header + start] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    "name, change, said",
    [
        ("shard-00001.safetensors", lambda path: flipped(path, "hidden"), "pair . is not what was written; delete it"),
        ("head.safetensors", flipped, "is not what was written"),
        ("shard-00002.safetensors", lambda path: path.with_name("shard-00000.safetensors").read_bytes(), "belongs to"),
        ("shard-00000.safetensors", lambda path: path.read_bytes()[:-7], "cannot be read"),
        ("head.safetensors", lambda path: path.read_bytes()[:-7], "cannot be read"),
        ("meta.json", lambda path: path.read_bytes()[:-7], "cannot be read"),
    ],
)
def test_what_was_changed_is_refused(name: str, change, said: str, written: Path, model_folder: Path):
    (written / name).write_bytes(change(written / name))
    with pytest.raises(CacheError, match=f"{name}: {said}"):
        again(written, model_folder, max_steps=12)


class Framed(DataCollatorForPreference):
    """Return as many tokens of completions, and a token before every prompt."""

    def torch_call(self, examples: list[dict]) -> dict:
        return super().torch_call([row | {"prompt_ids": [2, *row["prompt_ids"]]} for row in examples])


def test_padding_is_not_what_a_collator_is_known_by(written: Path, model_folder: Path):
    before = files(written)
    collator = DataCollatorForPreference(0, pad_to_multiple_of=8)
    again(written, model_folder, data_collator=collator)
    assert files(written) == before


def changed(x, change):
    change(x)
    return x


@pytest.mark.parametrize(
    "part, changes",
    [
        ("collator", lambda: {"data_collator": Framed(0)}),
        ("dataset", lambda: {"train_dataset": pairs().select([1, 0, *range(2, 12)])}),
        ("truncation", lambda: {"max_length": 20}),
        ("model", lambda: {"model": changed(llama(), lambda model: model.model.norm.weight.data.add_(1e-3))}),
        ("config", lambda: {"model": llama(rms_norm_eps=0.5)}),
        ("tokenizer", lambda: {"processing_class": changed(tokenizer(), lambda reader: reader.add_tokens("<new>"))}),
        ("template", lambda: {"processing_class": tokenizer(chat_template=TEMPLATE)}),
        ("precision", lambda: {"bf16": True}),
    ],
)
def test_a_stale_cache_is_refused_with_what_changed(part: str, changes, written: Path):
    with pytest.raises(CacheError, match=f"made from another {part}: got .*, wanted .*; delete the directory"):
        again(written, **({"model": llama()} | changes()))


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
