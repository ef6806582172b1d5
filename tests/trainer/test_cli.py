"""`tdpo`: from a person's own file to a trained model, in one command; the same under two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from runs import text_pairs, worst
from safetensors.torch import load_file
from tdpo_trainer import cli
from transformers import AutoModelForCausalLM


def losses_of(said: str) -> list[float]:
    lines = [line for line in said.splitlines() if line.startswith("{'loss'")]
    return [float(line.split("'loss': '")[1].split("'")[0]) for line in lines]


def test_from_a_yaml_file_to_a_trained_model(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status = cli.main(["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--alpha", "0.3"])
    said = capsys.readouterr().out
    assert status == 0
    assert said.startswith("TDPO: variant tdpo2, alpha 0.3, beta 0.5, backend tiled (asked for: auto; available:")
    assert re.search(r"\nTDPO: a batch of 2 pairs of 2 x [\d,]+ tokens: all logits are kept: 4 products\n", said)
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


def test_what_is_one_repository_s_is_not_another_s(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Revisions and configurations; how a model is held in memory is for both."""
    import trl.trainer.utils
    from tdpo_trainer import options, run

    seen = {}
    monkeypatch.setattr(options, "_check_model", lambda *_: None)
    monkeypatch.setattr(run, "load_pairs", lambda name, split, config, *_, **__: seen.update({name: config}) or [name])
    monkeypatch.setattr(trl.trainer.utils, "create_model_from_path", lambda name, **kwargs: seen.update({name: kwargs}))
    monkeypatch.setattr(run, "TDPOTrainer", lambda **kwargs: seen.update({kwargs["model"]: dict(kwargs)}))
    base = ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--model_name_or_path", "m"]
    base += ["--model_revision", "v2", "--dtype", "bfloat16", "--dataset_name", "d", "--dataset_config", "c"]
    base += ["--ref_model_name_or_path", "r", "--eval_dataset_name", "e", "--eval_strategy", "steps"]
    run.make_trainer(base, "train")
    assert seen["m"]["args"].model_init_kwargs["revision"] == "v2" and seen["d"] == "c" and seen["e"] is None
    assert "revision" not in seen["r"] and seen["r"]["dtype"] == "bfloat16"
    run.make_trainer([*base, "--ref_model_revision", "v3", "--eval_dataset_config", "x"], "train")
    assert seen["r"]["revision"] == "v3" and seen["e"] == "x"
    run.make_trainer([*base, "--eval_dataset_name", "d"], "train")
    assert seen["d"] == "c", "the same repository"


def test_a_run_is_resumed_from_its_last_checkpoint(here: Path, checkpoints: Path, tmp_path: Path, capsys):
    shutil.copytree(checkpoints, tmp_path / "ended")
    runs = []
    for name, more in (("whole", []), ("ended", ["--resume_from_checkpoint", "last"])):
        assert cli.main(["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path / name), *more]) == 0
        runs.append(losses_of(capsys.readouterr().out))
    assert runs[0][2:] == runs[1]
    assert worst(*(load_file(tmp_path / name / "model.safetensors") for name in ("ended", "whole"))) == 0.0


def test_help_lists_the_options_that_work(capsys: pytest.CaptureFixture[str]):
    from tdpo_trainer.config import REFUSED

    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out.split()
    assert {"--variant", "--alpha", "--backend", "--reference_cache", "--lora_r"} <= {*said}
    assert not {f"--{name}" for name in REFUSED} & {*said}


def test_a_leading_tilde_is_the_home_directory(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the file and on the command line, where a shell leaves it within an option's ``=``."""
    from tdpo_trainer.options import parse

    monkeypatch.setenv("HOME", str(here))
    options = {"model_name_or_path": "~/model", "dataset_name": "~/pairs.jsonl", "reference_cache": "~/cache"}
    (here / "home.yaml").write_text(json.dumps(options | {"use_cpu": True}))
    flags = ["--config=~/home.yaml", "--output_dir=~/out", "--eval_dataset_name", "~/e"]
    data, args, model = parse(flags, "train")
    seen = [model.model_name_or_path, data.dataset_name, args.reference_cache, args.output_dir, data.eval_dataset_name]
    assert seen == [f"{here}/{name}" for name in ("model", "pairs.jsonl", "cache", "out", "e")]


def test_model_init_kwargs_are_merged(here: Path, tmp_path: Path):
    from tdpo_trainer.options import parse

    given = {"torch_dtype": "bfloat16", "use_safetensors": True}
    options = {"attn_implementation": "eager", "model_init_kwargs": given}
    (tmp_path / "run.yaml").write_text(json.dumps(options | {"use_cpu": True, "output_dir": str(tmp_path)}))
    loading = parse(["--config", str(tmp_path / "run.yaml")], "train")[1].model_init_kwargs
    wanted = {"dtype": "bfloat16", "attn_implementation": "eager", "use_safetensors": True, "revision": "main"}
    assert loading.items() >= wanted.items() and "torch_dtype" not in loading


@pytest.mark.parametrize("more, said", [([], True), (["--use_peft", "--lora_target_modules", "q_proj"], False)])
def test_weights_in_16_bits_are_warned_of(more: list[str], said: bool, here: Path, tmp_path: Path, capsys):
    """An adapter's are in 32, whatever the model's."""
    flags = f"--config {here / 'run.yaml'} --output_dir {tmp_path} --dtype bfloat16 --max_steps 1".split()
    assert cli.main(["train", *flags, *more]) == 0
    assert ("tdpo: warning: weights are trained in bfloat16" in capsys.readouterr().err) == said


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    groups = re.split(r"\n(?=[a-z][^\n]*:\n)", capsys.readouterr().out)[-6:]
    first = ["-h", "--beta", "--dataset_name", "--model_name_or_path", "--disable_dropout", "--output_dir"]
    for group, option in zip(groups, first, strict=True):
        assert option in re.findall(r"^  (--?[a-z_]+)", group, re.MULTILINE), group[:300]
    assert "--alpha" in groups[1] and "--columns" in groups[2] and "--lora_r" in groups[3]


def test_unknown_commands_and_help(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fly"]) == 2
    assert "wanted train, data, eval, cache, merge, verify, bench or env" in capsys.readouterr().err
    assert cli.main([]) == cli.main(["--help"]) == 0
    assert "usage: tdpo train" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("tdpo-kernels ")


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
