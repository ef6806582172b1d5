"""`tdpo`: from a person's own file to a trained model, in one command; the same under two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tdpo_trainer
from datasets import Dataset
from runs import saved_llama, text_pairs, worst
from safetensors.torch import load_file
from tdpo_trainer import cli
from tdpo_trainer.data import hold_out
from transformers import AutoModelForCausalLM

COMMON = """
per_device_train_batch_size: 2
pairs_per_step: 4
max_steps: 3
learning_rate: 5.0e-2
optim: sgd
lr_scheduler_type: constant
logging_steps: 1
save_strategy: "no"
report_to: none
use_cpu: true
disable_tqdm: true
gradient_checkpointing: false
beta: 0.5
alpha: 0.7
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    saved_llama(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, text_pairs())) + "\n")
    (folder / "run.yaml").write_text(
        f"model_name_or_path: {folder / 'model'}\ndataset_name: {folder / 'pairs.jsonl'}\n{COMMON}"
    )
    return folder


def losses_of(said: str) -> list[float]:
    lines = [line for line in said.splitlines() if line.startswith("{'loss'")]
    return [float(line.split("'loss': '")[1].split("'")[0]) for line in lines]


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.delattr(tdpo_trainer, "run", raising=False)
    monkeypatch.delitem(sys.modules, "tdpo_trainer.run", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    assert cli.main(["train"]) == 2
    said = "tdpo: train needs trl, which is not installed: pip install '.[train]' in a clone of tdpo-kernels\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("share, held", [(0.25, 3), (5.0, 5)])
def test_pairs_that_are_held_out_are_not_trained_on(share: float, held: int):
    rows = Dataset.from_list([{"prompt": str(n), "chosen": "a", "rejected": "b"} for n in range(12)])
    trained, kept = hold_out(rows, share)
    assert len(kept) == held and {*trained["prompt"]} | {*kept["prompt"]} == {*rows["prompt"]}
    assert not {*trained["prompt"]} & {*kept["prompt"]}


def test_from_a_yaml_file_to_a_trained_model(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status = cli.main(["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--alpha", "0.3"])
    said = capsys.readouterr().out
    assert status == 0
    assert said.startswith("TDPO: variant tdpo2, alpha 0.3, beta 0.5, backend tiled (asked for: auto; available:")
    assert len(losses_of(said)) == 3
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(here / "model")
    assert (ours.lm_head.weight - before.lm_head.weight).abs().max() > 0


def test_a_parquet_file_held_out_pairs_lora_and_a_backend(here: Path, tmp_path: Path, capsys):
    Dataset.from_list(text_pairs()).to_parquet(tmp_path / "pairs.parquet")
    flags = ["--dataset_name", str(tmp_path / "pairs.parquet"), "--test_split_size", "0.25", "--eval_strategy", "steps"]
    flags += ["--eval_steps", "3", "--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--backend", "naive"]
    flags += ["--output_dir", str(tmp_path / "out"), "--config", str(here / "run.yaml")]
    assert cli.main(["train", *flags]) == 0
    said = capsys.readouterr().out
    assert "backend naive (asked for: naive; available" in said and "'eval_kl/chosen'" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_cache_then_train(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    flags = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *flags]) == 0
    live = losses_of(capsys.readouterr().out)
    flags += ["--reference_cache", str(tmp_path / "cache")]
    assert cli.main(["cache", *flags]) == 0
    assert f"complete: {tmp_path / 'cache'}" in capsys.readouterr().out
    from tdpo_trainer import fill

    monkeypatch.setattr(fill, "_reference", lambda *_: pytest.fail("the reference ran again"))
    assert cli.main(["train", *flags]) == 0
    assert losses_of(capsys.readouterr().out) == live


def test_a_stale_cache_ends_with_its_reason(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--reference_cache", f"{tmp_path}/c"]
    assert cli.main(["cache", *flags]) == 0
    assert cli.main(["train", *flags, "--max_length", "20"]) == 2
    assert "made from another truncation: got max_length=1024" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dataset_name", "nowhere.jsonl"], "dataset_name: got nowhere.jsonl, and there is no such file"),
        (["--variant", "tdpo1"], "alpha: got float 0.7 with variant='tdpo1'"),
        (["--backend", "fused"], "backend: got 'fused', which does not run here"),
        (["--loss_type", "ipo"], "loss_type: got ['ipo'], wanted ['sigmoid']"),
        (["--reference_cache", "c", "--dataset_streaming"], "reference_cache: got a streaming dataset"),
        (["--eval_dataset_name", "e", "--test_split_size", "3"], "test_split_size: got it with eval_dataset_name"),
        (["--eval_dataset_config", "x"], "eval_dataset_config: got 'x' without eval_dataset_name"),
        (["--ref_model_revision", "x"], "ref_model_revision: got 'x' without ref_model_name_or_path"),
        (["--pairs_per_step", "3"], "pairs_per_step: got 3, wanted a multiple of 2"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(flags: list[str], said: str, here: Path, tmp_path: Path, capsys):
    status = cli.main(["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), *flags])
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_what_is_one_repository_s_is_not_another_s(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Revisions and configurations; how a model is held in memory is for both."""
    import trl.trainer.utils
    from tdpo_trainer import run

    seen = {}
    monkeypatch.setattr(run, "load_pairs", lambda name, split, config, streaming: seen.update({name: config}) or [name])
    monkeypatch.setattr(trl.trainer.utils, "create_model_from_path", lambda name, **kwargs: seen.update({name: kwargs}))
    monkeypatch.setattr(run, "TDPOTrainer", lambda **kwargs: seen.update({kwargs["model"]: dict(kwargs)}))
    base = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--model_name_or_path", "m"]
    base += ["--model_revision", "v2", "--dtype", "bfloat16", "--dataset_name", "d", "--dataset_config", "c"]
    base += ["--ref_model_name_or_path", "r", "--eval_dataset_name", "e"]
    run.make_trainer(base, "train")
    assert seen["m"]["args"].model_init_kwargs["revision"] == "v2" and seen["d"] == "c" and seen["e"] is None
    assert "revision" not in seen["r"] and seen["r"]["dtype"] == "bfloat16"
    run.make_trainer([*base, "--ref_model_revision", "v3", "--eval_dataset_config", "x"], "train")
    assert seen["r"]["revision"] == "v3" and seen["e"] == "x"
    run.make_trainer([*base, "--eval_dataset_name", "d"], "train")
    assert seen["d"] == "c", "the same repository"


def test_other_columns_are_refused(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Dataset.from_list([{"question": "a", "answer": "b"}]).to_parquet(tmp_path / "other.parquet")
    flags = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path)]
    assert cli.main(["train", *flags, "--dataset_name", str(tmp_path / "other.parquet")]) == 2
    assert "got columns question, answer, wanted prompt, chosen and rejected" in capsys.readouterr().err


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
    assert cli.main([command, *flags, "--eval_dataset_name", str(bad)]) == 2
    assert f"{bad}, line 7: {said}" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_is_resumed_from_its_last_checkpoint(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def run(name: str, *more: str) -> list[float]:
        flags = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path / name)]
        assert cli.main(["train", *flags, "--save_strategy", "steps", "--save_steps", "1", *more]) == 0
        return losses_of(capsys.readouterr().out)

    whole = run("whole")
    run("cut", "--max_steps", "2")
    assert run("cut", "--resume_from_checkpoint", "last") == whole[2:]
    assert worst(*(load_file(tmp_path / name / "model.safetensors") for name in ("cut", "whole"))) == 0.0


def test_help_lists_the_options(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("--variant", "--alpha", "--backend", "--reference_cache", "--lora_r"))


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fly"]) == 2
    assert "wanted train, cache, verify, bench or env" in capsys.readouterr().err
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "usage: tdpo train" in capsys.readouterr().out


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip


def test_env_lists_what_trains():
    done = module("tdpo_trainer", "env")
    assert done.returncode == 0, done.stderr
    assert "auto     tiled" in done.stdout and "trl" in done.stdout.partition("training:")[2]


LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([], id="all"),
        pytest.param(LORA, id="lora", marks=pytest.mark.long),
        pytest.param(["--reference_cache", "{}/cache"], id="cache", marks=pytest.mark.long),
        pytest.param(["--gradient_checkpointing", "true"], id="checkpointing", marks=pytest.mark.long),
    ],
)
def test_the_same_command_under_two_processes_gives_the_same_losses(more: list[str], here: Path, tmp_path: Path):
    more = [flag.format(tmp_path) for flag in more]
    flags = ["train", "--config", str(here / "run.yaml"), *more, "--output_dir"]
    one = module("tdpo_trainer", *flags, str(tmp_path / "one"))
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29418", "-m"]
    two = module(*launch, "tdpo_trainer", *flags, str(tmp_path / "two"))
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert two.stdout.count("TDPO: variant") == 1
    assert len(losses_of(one.stdout)) == 3
    assert losses_of(two.stdout) == pytest.approx(losses_of(one.stdout), rel=1e-3)  # printed with 4 digits
    name = "adapter_model.safetensors" if more == LORA else "model.safetensors"
    assert worst(*(load_file(tmp_path / run / name) for run in ("two", "one"))) < 1e-6
