"""Loops to copy: they train as TDPO written plainly does, in one process and, where they say so, in two."""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import eager_run, llama, parameters, text_pairs, tokenizer, worst
from tdpo_trainer.plain import collate
from tdpo_trainer.step import LossOptions
from tdpo_trainer.tokens import tokenize
from torch.utils.data import DataLoader

EXAMPLES = Path(__file__).resolve().parents[2] / "python" / "examples"
OPTIONS = dict(beta=0.5, alpha=0.7, variant="tdpo2")


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def batches(seen: list[list[dict]]) -> DataLoader:
    """Return four batches of two pairs, in order, which `seen` gets, too."""
    to_batch = partial(collate, pad=0, max_length=None)

    def keeping(rows):
        batch = to_batch(rows)
        seen.append(dict(batch))
        return batch

    return DataLoader(tokenize(tokenizer(), text_pairs(8)), 2, collate_fn=keeping)


def eager(micro: list[dict], accumulation: int) -> tuple[list[float], dict]:
    model = llama(dtype=torch.float64)
    steps = [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]
    losses = eager_run(model, steps, llama(1, torch.float64), **OPTIONS)
    return losses, parameters(model)


ACCUMULATED = pytest.mark.parametrize("accumulation", [1, 2, 3])  # with the last, one batch is left for the last step


@ACCUMULATED
def test_the_accelerate_loop_is_the_eager_implementation(accumulation: int):
    from accelerate import Accelerator

    loop = importlib.import_module("accelerate_loop")
    micro: list[dict] = []
    policy, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, cpu=True)
    options = LossOptions(**OPTIONS)
    run = list(loop.train(accelerator, policy, reference, optimizer, batches(micro), options, max_norm=1e9))
    theirs, weights = eager(micro, accumulation)
    ours = [now["loss"] for now in run]
    means = [statistics.mean(ours[i : i + accumulation]) for i in range(0, len(ours), accumulation)]
    assert means == pytest.approx(theirs, rel=1e-6) and worst(parameters(policy), weights) < 1e-6
    assert all({"kl/margin", "rewards/accuracies"} <= set(now) for now in run)


def test_the_accelerate_loop_trains_every_weight_of_a_bf16_checkpoint(here: Path, tmp_path: Path):
    """At a rate whose steps are lost in bfloat16."""
    loop = importlib.import_module("accelerate_loop")
    before = llama(dtype=torch.bfloat16)
    before.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    options = f"--model {tmp_path / 'model'} --data {here / 'pairs.jsonl'} --out {tmp_path / 'out'} --lr 1e-5 --cpu"
    loop.main(options.split())
    trained = parameters(type(before).from_pretrained(tmp_path / "out", dtype=torch.float32))
    moved = [float((trained[name] != x).float().mean()) for name, x in before.named_parameters()]
    assert statistics.mean(moved) > 0.9, moved


@pytest.mark.parametrize(
    "model, line, said",
    [
        ("model", "{", "--data: {}, line 7: not JSON"),
        ("model", '{"prompt": []}', "--data: {}, line 7: field 'prompt' is an array"),
        ("empty", "", "--model [^ ]*/empty: "),
    ],
)
def test_the_accelerate_loop_names_what_is_wrong(model: str, line: str, said: str, here: Path, tmp_path: Path):
    loop = importlib.import_module("accelerate_loop")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(6)) + line)
    with pytest.raises(SystemExit, match=f"^accelerate_loop.py: error: {said.replace('{}', str(data))}"):
        loop.main(f"--model {here / model} --data {data} --out {tmp_path / 'out'} --cpu".split())


def launched(count: int, loop: str, *options: str, logs: Path | None = None) -> subprocess.CompletedProcess[str]:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {count}".split()
    launch += [] if logs is None else ["--log-dir", str(logs), "--redirects", "3"]
    return subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / loop), *options], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.long
def test_no_process_of_the_accelerate_loop_shows_a_traceback(here: Path, tmp_path: Path):
    options = ("--model", str(here / "model"), "--data", str(here / "other.parquet"), "--cpu")
    assert launched(2, "accelerate_loop.py", *options, logs=tmp_path).returncode
    said = [path.read_text() for path in sorted(tmp_path.rglob("stderr.log"))]
    assert len(said) == 2 and "accelerate_loop.py: error: --data" in said[0] + said[1]
    assert not any("Traceback" in each for each in said), said


@pytest.mark.long
def test_the_accelerate_loop_in_two_processes_trains_what_one_does(here: Path, tmp_path: Path):
    model, data = here / "model", tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in text_pairs(8)))
    weights = []
    for count, batch in ((1, 4), (2, 2)):
        options = f"--model {model} --data {data} --out {tmp_path / str(count)} --batch {batch} --lr 1e-3 --cpu"
        done = launched(count, "accelerate_loop.py", *options.split())
        assert "2/2" in done.stderr, done.stderr
        weights.append(parameters(type(llama()).from_pretrained(tmp_path / str(count))))
    assert worst(*weights) < 1e-5 < worst(weights[0], parameters(llama()))


def losses_of_ranks(count: int, *options: str) -> list[float]:
    done = launched(count, "vocab_parallel.py", *options)
    assert done.returncode == 0, done.stderr
    return [float(line.split("loss ")[1]) for line in done.stdout.splitlines() if line.startswith("step")]


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
@ACCUMULATED
def test_the_lightning_module_is_the_eager_implementation(accumulation: int, tmp_path: Path):
    lightning = pytest.importorskip("lightning")
    module = importlib.import_module("lightning_module")

    class WithSGD(module.TDPOModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.policy.parameters(), lr=self.lr)

    micro: list[dict] = []
    policy, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    before = copy.deepcopy(reference.state_dict())
    model = WithSGD(policy, reference, LossOptions(**OPTIONS), lr=0.05)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, precision="64-true", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=str(tmp_path),
        accumulate_grad_batches=accumulation,
    )  # fmt: skip
    trainer.fit(model, batches(micro))
    theirs, weights = eager(micro, accumulation)
    if len(micro) % accumulation == 1 or accumulation == 1:  # what is logged last is the last batch's
        assert float(trainer.callback_metrics["loss"]) == pytest.approx(theirs[-1], rel=1e-6)
    assert worst(parameters(policy), weights) < 1e-6
    assert all(torch.equal(x, before[name]) for name, x in reference.state_dict().items())
    assert not policy.training and "kl/margin" in trainer.callback_metrics


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint_holds_the_policy_alone(tmp_path: Path):
    """And a validation before training is that of equal models: KL 0, loss log 2."""
    lightning = pytest.importorskip("lightning")
    module = importlib.import_module("lightning_module")
    quiet = dict(
        accelerator="cpu", devices=1, precision="64-true", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=str(tmp_path),
    )  # fmt: skip
    trained, other, base = (llama(dtype=torch.float64) for _ in range(3))
    make = partial(module.TDPOModule, options=LossOptions(**OPTIONS), lr=0.01)
    model, trainer = make(trained, base), lightning.Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    (before,) = trainer.validate(model, batches([]), verbose=False)
    assert before["val_loss"] == pytest.approx(math.log(2)) and before["val_kl/chosen"] == 0
    trainer.fit(model, batches([]), batches([]))
    assert 0 < float(trainer.callback_metrics["val_kl/chosen"])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=False)["state_dict"]
    assert state and all(name.startswith("policy.") for name in state)
    again = make(other, copy.deepcopy(base))
    (after,) = lightning.Trainer(**quiet).validate(
        again, batches([]), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False
    )
    assert after["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert worst(parameters(other), parameters(trained)) == 0.0


@pytest.mark.parametrize("name", ["sentiment.py", "accelerate_loop.py", "vocab_parallel.py"])
def test_an_example_says_what_it_takes(name: str):
    done = subprocess.run([sys.executable, str(EXAMPLES / name), "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "usage:" in done.stdout and "options:" in done.stdout
