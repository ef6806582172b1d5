"""`tdpo` with a wrong option, file, model or checkpoint: one line that says so, and no traceback but a bug's."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import tdpo_trainer
from runs import text_pairs
from tdpo_trainer import cli

EVALUATE = "--eval_strategy steps"
WRONG = [  # a command line, and what is said of it; {} is the folder of all the files
    ("--dataset_name nowhere.jsonl", "dataset_name: got nowhere.jsonl, and there is no such file"),
    ("--dataset_name {}/other.parquet", "{}/other.parquet: got columns question, answer, wanted prompt, chosen and"),
    ("--variant tdpo1", "alpha: got float 0.7 with variant='tdpo1'"),
    ("--backend fused", "backend: got 'fused', which does not run here"),
    ("--loss_type ipo", "loss_type: got ['ipo'], wanted ['sigmoid']: it is an option of DPO's loss"),
    ("--use_liger_kernel", "use_liger_kernel: got True, wanted False: Liger's kernels are of DPO's loss"),
    ("--batch_eval_metrics", "batch_eval_metrics: got True, wanted False: it is for functions of logits"),
    ("--ignore_bias_buffers", "ignore_bias_buffers: got True, wanted False"),
    ("--reference_cache c --dataset_streaming", "reference_cache: got a streaming dataset"),
    ("--eval_dataset_config x", "eval_dataset_config: got 'x' without eval_dataset_name"),
    ("--ref_model_revision x", "ref_model_revision: got 'x' without ref_model_name_or_path"),
    ("--lora_r 4", "lora_r: got 4 without use_peft"),
    ("--pairs_per_step 3", "pairs_per_step: got 3, wanted a multiple of 2"),
    # what is evaluated on
    (EVALUATE, "eval_strategy: got one dataset without splits, which is trained on, wanted test_split_size or"),
    (EVALUATE + " --dataset_name {}/saved", "eval_strategy: got one dataset without splits, which is trained on"),
    ("--eval_on_start", "eval_strategy: got one dataset without splits, which is trained on"),
    (EVALUATE + " --eval_dataset_name {}/./pairs.jsonl", "eval_dataset_name: got {}/./pairs.jsonl, which is trained"),
    (EVALUATE + " --dataset_name d --dataset_test_split train", "dataset_test_split: got train, which is trained on"),
    (EVALUATE + " --eval_dataset_name e --test_split_size 3", "test_split_size: got it with eval_dataset_name"),
    ("--test_split_size 3", "test_split_size: got 3.0 without evaluation, wanted eval_strategy"),
    ("--eval_dataset_name e", "eval_dataset_name: got e without evaluation, wanted eval_strategy"),
    ("--do_eval", "do_eval, do_predict: got True, wanted eval_strategy"),
    ("--dataset_train_split nosuch", "dataset_train_split: got 'nosuch' for {}/pairs.jsonl, which has no splits"),
    # files
    ("--config {}/broken.yaml", "while parsing a flow sequence in \"{}/broken.yaml\", line 1, column 4 expected"),
    ("--config {}/nowhere.yaml", "[Errno 2] No such file or directory: '{}/nowhere.yaml'"),
    ("--config", "config: got none, wanted a YAML file"),
    ("--config {}/twice.yaml", "dtype: got float16, and bfloat16 in model_init_kwargs, wanted one of them"),
    ("--model_name_or_path {}/nowhere", "model_name_or_path: got {}/nowhere, and there is no such folder"),
    ("--model_name_or_path no/such", "model_name_or_path: got no/such, no folder here, wanted a model: "),
    ("--model_name_or_path {}/empty", "model_name_or_path: got {}/empty, wanted a model: "),
    ("--model_name_or_path {}/adapter", "model_name_or_path: got {}/adapter, whose adapter_config.json has no"),
    ("--model_name_or_path {}/cut", "model_name_or_path: got {}/cut/model.safetensors, wanted a whole file: "),
    ("--model_name_or_path {}/mute", ""),
    ("--ref_model_name_or_path {}/nowhere", "ref_model_name_or_path: got {}/nowhere, and there is no such folder"),
    ("--ref_model_name_or_path {}/adapter", "ref_model_name_or_path: got {}/adapter, an adapter"),
    ("--output_dir {}/empty --resume_from_checkpoint last", "resume_from_checkpoint: got last, and there is no"),
    ("--resume_from_checkpoint {}/nowhere", "resume_from_checkpoint: got {}/nowhere, and there is no such folder"),
    ("--nosuch 3", "Some specified arguments are not used by the HfArgumentParser: ['--nosuch', '3']"),
]  # fmt: skip


@pytest.mark.parametrize("line, said", WRONG, ids=[line for line, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(line: str, said: str, here: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line, said = (text.replace("{}", str(here)) for text in (line, said))
    flags = line.split() if line.startswith("--config") else ["--config", str(here / "run.yaml"), *line.split()]
    status = cli.main(["train", "--output_dir", str(tmp_path), *flags])
    assert status == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tdpo: train: {said}")


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_checkpoint_that_was_cut_off_is_named(file: str, checkpoints: Path, tmp_path: Path, capsys):
    folder = shutil.copytree(checkpoints, tmp_path / "out")
    os.truncate(folder / "checkpoint-2" / file, 99)
    flags = ["--config", str(checkpoints.parent / "run.yaml"), "--output_dir", str(folder)]
    assert cli.main(["train", *flags, "--resume_from_checkpoint", "last"]) == 2
    said = f"tdpo: train: resume_from_checkpoint: {folder}/checkpoint-2 cannot be loaded, wanted a whole one; "
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)


def test_a_bug_keeps_its_traceback(here: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """So does what is said in one line, if the environment asks for it."""
    from tdpo_trainer import run

    flags = ["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path)]
    monkeypatch.setenv("TDPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="^train: loss_type"):
        cli.main([*flags, "--loss_type", "ipo"])
    monkeypatch.delenv("TDPO_TRACEBACK")
    monkeypatch.setattr(run.TDPOTrainer, "compute_loss", lambda *_, **__: {}["nosuch"])
    with pytest.raises(KeyError, match="nosuch"):
        cli.main(flags)


@pytest.mark.parametrize("command", ["train", "cache"])
@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "a", "chosen": }', "not JSON in UTF-8: Expecting value (column 27)"),
        ('{"prompt": "a"', "not JSON in UTF-8: Expecting ',' delimiter (column 15)"),
        ('{"prompt": "a", "chosen": "b"}', "field 'rejected' is missing: got prompt, chosen, wanted prompt, chosen,"),
    ],
)
def test_a_bad_line_is_named(command: str, line: str, said: str, here: Path, tmp_path: Path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*map(json.dumps, text_pairs(6)), line, *map(json.dumps, text_pairs(2))]))
    flags = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--reference_cache", str(tmp_path)]
    assert cli.main([command, *flags, "--dataset_name", str(bad)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"tdpo: {command}: {bad}, line 7: {said}")
    assert cli.main([command, *flags, "--eval_dataset_name", str(bad), *EVALUATE.split()]) == 2
    assert f"{bad}, line 7: {said}" in capsys.readouterr().err.splitlines()[-1]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delattr(tdpo_trainer, "run", raising=False)
    monkeypatch.delitem(sys.modules, "tdpo_trainer.run", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main(["train"]) == 2
    said = "tdpo: train needs trl, which is not installed: pip install '.[train]' in a clone of tdpo-kernels\n"
    assert capsys.readouterr().err == said
