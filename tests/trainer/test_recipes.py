"""Loops to copy: they train as TDPO written plainly does, in one process and, where they say so, in two."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import eager_run, llama, parameters, saved_llama, text_pairs, tokenizer, worst
from tdpo_trainer.plain import collate, tokenize
from tdpo_trainer.step import LossOptions
from torch.utils.data import DataLoader

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
OPTIONS = dict(beta=0.5, alpha=0.7, variant="tdpo2")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def batches(seen: list[list[dict]] | None = None) -> DataLoader:
    """Return batches of two pairs, in order; `seen` gets one step a batch, as `eager_run` wants them."""
    to_batch = partial(collate, pad=0, max_length=None)

    def keeping(rows):
        batch = to_batch(rows)
        if seen is not None:
            seen.append([dict(batch)])
        return batch

    return DataLoader(tokenize(tokenizer(), text_pairs(8)), 2, collate_fn=keeping)


def eager(steps: list[list[dict]]) -> tuple[list[float], dict]:
    model = llama(dtype=torch.float64)
    losses = eager_run(model, steps, llama(1, torch.float64), **OPTIONS)
    return losses, parameters(model)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_accelerate_loop_is_the_eager_implementation(accumulation: int):
    from accelerate import Accelerator

    loop = importlib.import_module("accelerate_loop")
    steps: list[list[dict]] = []
    policy, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    options = LossOptions(**OPTIONS)
    run = list(loop.train(accelerator, policy, reference, optimizer, batches(steps), options, max_norm=1e9))
    micro = [batch for step in steps for batch in step]
    steps = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
    theirs, weights = eager(steps)
    ours = [now["loss"] for now in run]
    means = [sum(ours[i : i + accumulation]) / accumulation for i in range(0, len(ours), accumulation)]
    assert means == pytest.approx(theirs, rel=1e-6) and worst(parameters(policy), weights) < 1e-6
    assert all({"kl/margin", "rewards/accuracies"} <= set(now) for now in run)


def test_the_accelerate_loop_as_a_command(tmp_path: Path):
    loop = importlib.import_module("accelerate_loop")
    model, data = saved_llama(tmp_path / "model"), tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(8)))
    loop.main(f"--model {model} --data {data} --out {tmp_path / 'out'} --batch 4 --lr 1e-2 --cpu".split())
    trained = type(llama()).from_pretrained(tmp_path / "out")
    assert worst(parameters(trained), parameters(llama())) > 1e-3


@pytest.mark.parametrize(
    "line, said",
    [("{", "not JSON"), ("{}", "field 'prompt' is missing"), ('{"prompt": []}', "field 'prompt' is an array")],
)
def test_the_accelerate_loop_names_a_bad_line(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    loop = importlib.import_module("accelerate_loop")
    model, data = saved_llama(tmp_path / "model"), tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(6)) + line)
    with pytest.raises(SystemExit, match="2"):
        loop.main(f"--model {model} --data {data} --out {tmp_path / 'out'} --cpu".split())
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"accelerate_loop.py: error: {data}, line 7: {said}")


def launched(count: int, loop: str, *options: str) -> subprocess.CompletedProcess[str]:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {count} {EXAMPLES}/{loop}".split()
    done = subprocess.run(
        [sys.executable, *launch, *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.long
def test_the_accelerate_loop_in_two_processes_trains_what_one_does(tmp_path: Path):
    model, data = saved_llama(tmp_path / "model"), tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(8)))
    weights = []
    for count, batch in ((1, 4), (2, 2)):
        options = f"--model {model} --data {data} --out {tmp_path / str(count)} --batch {batch} --lr 1e-3 --cpu"
        assert "2/2" in launched(count, "accelerate_loop.py", *options.split()).stderr
        weights.append(parameters(type(llama()).from_pretrained(tmp_path / str(count))))
    assert worst(*weights) < 1e-5 < worst(weights[0], parameters(llama()))


def losses_of_ranks(count: int, *options: str) -> list[float]:
    said = launched(count, "vocab_parallel.py", *options).stdout
    return [float(line.split("loss ")[1]) for line in said.splitlines() if line.startswith("step")]


@pytest.mark.parametrize(
    "count, options",
    [
        (2, ()),
        pytest.param(4, ("--sequence", "2"), marks=pytest.mark.long),
        pytest.param(6, ("--sequence", "1", "--vocabulary", "3"), marks=pytest.mark.long),
    ],
)
def test_the_vocabulary_parallel_loop_trains_what_one_process_does(count: int, options: tuple[str, ...]):
    assert len(alone := losses_of_ranks(1, "--vocabulary", "1")) == 5
    assert losses_of_ranks(count, *options) == pytest.approx(alone, abs=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_module_is_the_eager_implementation(tmp_path: Path):
    lightning = pytest.importorskip("lightning")
    module = importlib.import_module("lightning_module")

    class WithSGD(module.TDPOModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.policy.parameters(), lr=self.lr)

    steps: list[list[dict]] = []
    policy, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    before = copy.deepcopy(reference.state_dict())
    model = WithSGD(policy, reference, LossOptions(**OPTIONS), lr=0.05)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trainer.fit(model, batches(steps))
    theirs, weights = eager(steps)
    assert float(trainer.callback_metrics["loss"]) == pytest.approx(theirs[-1], rel=1e-6)
    assert worst(parameters(policy), weights) < 1e-6
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items())
    assert not policy.training and "kl/margin" in trainer.callback_metrics
