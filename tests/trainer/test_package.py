"""The trainers by the package's own name, and the plain one with nothing but what it needs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import llama, text_pairs, tokenizer


def test_the_plain_trainer_is_had_without_trl():
    code = "import sys; sys.modules['trl'] = None; from tdpo_trainer import PlainTDPOTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_plain_trainer_keeps_its_columns_without_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tdpo_trainer.plain import PlainTDPOTrainer
    from tdpo_trainer.tokens import tokenize

    monkeypatch.chdir(tmp_path)
    rows = tokenize(tokenizer(), text_pairs())
    trainer = PlainTDPOTrainer(llama(), llama(1), train_dataset=rows, processing_class=tokenizer())
    assert "completion_mask" in next(iter(trainer.get_train_dataloader()))
    assert not trainer.args.remove_unused_columns
    with pytest.raises(ValueError, match="^eval_dataset: got rows of prompt, chosen, rejected; wanted prompt_ids"):
        PlainTDPOTrainer(llama(), llama(1), eval_dataset={"a": text_pairs()}, processing_class=tokenizer())


def test_the_oldest_versions_of_the_matrix_are_the_lower_bounds():
    """And no bound is one that `make matrix` does not run."""
    root = Path(__file__).parents[2]
    bounds = dict(re.findall(r'"([a-z-]+)>=([0-9.]+)', (root / "pyproject.toml").read_text()))
    pins = re.findall(r"^([a-z-]+)==([0-9.]+)$", (root / "tests/matrix/oldest.txt").read_text(), re.MULTILINE)
    assert bounds and bounds.keys() == dict(pins).keys()
    assert all(f"{pin}.".startswith(f"{bounds[name]}.") for name, pin in pins)
