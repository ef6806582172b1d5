"""Trainers' tests, skipped where transformers is not installed; and the files of somebody who runs `tdpo`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]

OPTIONS = """
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


@pytest.fixture(scope="session")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, pairs and a run's options, and with some of each that are not as they should be."""
    from datasets import Dataset
    from runs import saved_llama, text_pairs

    folder = tmp_path_factory.mktemp("cli")
    model = saved_llama(folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, text_pairs())) + "\n")
    options = f"model_name_or_path: {model}\ndataset_name: {folder / 'pairs.jsonl'}\n{OPTIONS}"
    (folder / "run.yaml").write_text(options)
    (folder / "broken.yaml").write_text("a: [1\nb: 2")
    (folder / "twice.yaml").write_text(f"{options}dtype: float16\nmodel_init_kwargs:\n  dtype: bfloat16\n")
    os.truncate(shutil.copytree(model, folder / "cut") / "model.safetensors", 999)
    for path in shutil.copytree(model, folder / "mute").glob("tokenizer*"):
        path.unlink()
    for name in ("adapter", "empty"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    Dataset.from_list([{"question": "a", "answer": "b"}]).to_parquet(folder / "other.parquet")
    Dataset.from_list(text_pairs()).save_to_disk(folder / "saved")
    return folder


@pytest.fixture(scope="session")
def checkpoints(here: Path) -> Path:
    """The folder of a run that was ended after two of its three steps, each of them saved."""
    from tdpo_trainer import cli

    flags = ["--config", str(here / "run.yaml"), "--output_dir", str(here / "ended"), "--max_steps", "2"]
    assert cli.main(["train", *flags, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    return here / "ended"


@pytest.fixture(scope="session")
def model_folder(here: Path) -> Path:
    return here / "model"


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """About three pairs each."""
    from tdpo_trainer import fill

    monkeypatch.setattr(fill, "SHARD_BYTES", 3000)


@pytest.fixture
def written(tmp_path: Path, model_folder: Path, small_shards: None) -> Path:
    """A reference cache."""
    from runs import trainer

    trainer(tmp_path, str(model_folder), reference_cache=str(tmp_path / "cache"))
    return tmp_path / "cache" / "train"
