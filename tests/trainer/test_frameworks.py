"""Recipes for other frameworks: their own command lines train as TDPO written plainly does.

Each runs in an environment of its own, ``$TDPO_FRAMEWORKS/NAME`` (default ``.venv/NAME``): `make frameworks` makes it.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import LETTERS, eager_loss, eager_run, llama, parameters, text_pairs, tokenizer, worst
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("TDPO_FRAMEWORKS", HERE.parents[1] / ".venv"))
METRICS = {"kl/chosen", "kl/rejected", "kl/margin", "rewards/accuracies", "rewards/margins", "logps/chosen"}
pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@dataclass
class Run:
    """Hold a framework's return code and output, and what `frameworks.record` kept."""

    code: int
    output: str
    kept: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.kept["log"] if "loss" in entry]

    def steps(self, accumulation: int = 2) -> list[list[dict[str, torch.Tensor]]]:
        micro = [
            {name: x[name] for name in ("input_ids", "attention_mask")} | {"completion_mask": completions(x)}
            for x in self.kept["steps"]
        ]
        return [micro[i : i + accumulation] for i in range(0, len(micro), accumulation)]


def completions(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch["completion_mask"] if "completion_mask" in batch else (batch["labels"] != -100).long()
    assert "labels" not in batch or torch.equal(batch["labels"][mask == 1], batch["input_ids"][mask == 1])
    return mask


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A policy and another reference, as any version of transformers reads them, and pairs."""
    for name, seed in (("policy", 0), ("reference", 1)):
        model = llama(seed)
        (folder := tmp_path / name).mkdir()
        known = {name: x for name, x in model.config.to_dict().items() if isinstance(x, int | float | str)}
        known.pop("transformers_version", None)
        known |= {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "rope_theta": 10000.0}
        (folder / "config.json").write_text(json.dumps(known))
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
        words = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
        words |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(words))
    assert len(LETTERS) + 3 == known["vocab_size"]
    write(tmp_path / "pairs.jsonl", text_pairs(12))
    write(tmp_path / "messages.jsonl", [as_messages(**pair) for pair in text_pairs(12)])
    return tmp_path


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_messages(prompt: str, chosen: str, rejected: str) -> dict:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": chosen}]
    return {"messages": turns, "rejected_response": rejected}


def python_of(name: str) -> str:
    python = ENVIRONMENTS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{name} is not installed in {ENVIRONMENTS / name}: make frameworks")
    return str(python)


def run(name: str, folder: Path, **options: object) -> Run:
    command = [python_of(name), str(HERE / "frameworks.py"), name, str(folder), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    file = folder / "recorded.pt"
    return Run(done.returncode, done.stdout + done.stderr, torch.load(file) if file.exists() else {})


def eager(run: Run, reference: int, **options: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """TDPO written plainly on the same batches, from the same weights."""
    model = llama()
    assert worst(parameters(model), run.kept["before"]) == 0
    losses = eager_run(model, run.steps(), llama(reference), **options)
    return losses, parameters(model)


def eager_lora(run: Run, **options: Any) -> tuple[list[float], torch.nn.Module]:
    """The same with an adapter on the policy, which without it is its own reference."""
    before = run.kept["before"]
    down = {name: x for name, x in before.items() if ".lora_A." in name}
    targets = sorted({name.split(".")[-4] for name in down})
    rank = next(iter(down.values())).shape[0]
    model = get_peft_model(llama(), LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=targets))
    assert parameters(model).keys() == before.keys()
    model.load_state_dict(before, strict=False)
    losses = eager_run(model, run.steps(), llama(), **options)
    return losses, model


def same(ours: Run, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    assert ours.code == 0, ours.output[-4000:]
    assert ours.losses == pytest.approx(losses, rel=1e-4) and len(losses) == 3
    assert worst(ours.kept["after"], weights) < 1e-5


NAMES = ["ms-swift", "llama-factory", "axolotl"]
REFERENCES = {"ms-swift": 1, "llama-factory": 1, "axolotl": 0}  # seeds: axolotl's is the model it begins with
ADAPTER = dict(lora_rank=4, lora_alpha=8, lora_dropout=0.0)
LORA = {
    "ms-swift": dict(tuner_type="lora", val_dataset="messages.jsonl", **ADAPTER),
    "llama-factory": dict(finetuning_type="lora", eval_dataset="pairs", **ADAPTER),
    "axolotl": dict(adapter="lora", lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_target_linear=True, evaluate=True),
}
REFUSED = [
    ("ms-swift", dict(rpo_alpha=0.1), "rpo_alpha: got 0.1, wanted None"),
    ("ms-swift", dict(loss_type="hinge"), "loss_type: got 'hinge', wanted 'sigmoid'"),
    ("llama-factory", dict(pref_ftx=0.1), "pref_ftx: got 0.1, wanted 0.0"),
    ("llama-factory", dict(pref_loss="hinge"), "pref_loss: got 'hinge', wanted 'sigmoid'"),
    ("llama-factory", dict(ignore_pad_token_for_loss=False), "ignore_pad_token_for_loss: got False, wanted True"),
    ("llama-factory", dict(stage="sft"), "stage: got 'sft', wanted 'dpo'"),
    ("llama-factory", dict(use_ray=True), "use_ray: got True, wanted False"),
    ("llama-factory", dict(tdpo_alfa=0.5), "got a setting 'alfa', wanted one of alpha, variant"),
    ("axolotl", dict(dpo_label_smoothing=0.1), "label_smoothing: got 0.1, wanted 0.0"),
    ("axolotl", dict(precompute_ref_log_probs=True), "precompute_ref_log_probs: got True, wanted False"),
    ("axolotl", dict(trainer_cls=None), "trainer_cls: got None, wanted 'axolotl_tdpo_trainer.TDPOTrainer'"),
    ("axolotl", dict(plugins=[]), "plugins: wanted axolotl_tdpo.TDPOPlugin"),
    ("axolotl", dict(tdpo_alfa=0.5), "got a setting 'alfa', wanted one of alpha, variant"),
    ("ms-swift", dict(tdpo_variant="tdpo1", tdpo_alpha=0.5), "alpha: got float 0.5 with variant"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("variant", "alpha"), [("tdpo2", 0.7), ("tdpo1", None)])
def test_a_frameworks_command_trains_as_the_eager_implementation(made: Path, name: str, variant: str, alpha):
    settings = {"tdpo_variant": variant} | ({} if alpha is None else {"tdpo_alpha": alpha})
    ours = run(name, made, **settings)
    assert ours.code == 0 and f"TDPO: variant {variant}" in ours.output, ours.output[-4000:]
    same(ours, *eager(ours, REFERENCES[name], beta=0.5, alpha=alpha, variant=variant))
    assert worst(ours.kept["before"], ours.kept["after"]) > 1e-2
    assert METRICS <= set().union(*ours.kept["log"])


def test_axolotl_s_padding_free_batches_are_those_of_the_eager_implementation(made: Path):
    same(ours := run("axolotl", made, dpo_padding_free=True), *eager(ours, REFERENCES["axolotl"], beta=0.5))


@pytest.mark.parametrize("name", NAMES)
def test_with_lora_the_reference_is_the_model_without_it(made: Path, name: str):
    """One epoch, and an evaluation on the same pairs after it."""
    ours = run(name, made, **LORA[name])
    assert ours.code == 0, ours.output[-4000:]
    losses, model = eager_lora(ours)
    same(ours, losses, parameters(model))
    assert worst(ours.kept["before"], ours.kept["after"]) > 1e-3 and 0 < len(ours.kept["trained"])
    with torch.no_grad():
        evaluated = [eager_loss(model, llama(), x) for step in ours.steps() for x in step]
    last = [entry for entry in ours.kept["log"] if "eval_loss" in entry][-1]
    assert last["eval_loss"] == pytest.approx(float(sum(evaluated)) / len(evaluated), rel=1e-4)
    assert {f"eval_{metric}" for metric in METRICS} <= last.keys()


@pytest.mark.parametrize("name", NAMES)
def test_with_alpha_0_it_trains_what_the_frameworks_own_dpo_does(made: Path, name: str):
    theirs = run(name, made, recipe=False)
    assert theirs.code == 0 and "TDPO" not in theirs.output, theirs.output[-4000:]
    same(run(name, made, tdpo_alpha=0), theirs.losses, theirs.kept["after"])


@pytest.mark.parametrize("name", ["ms-swift", "llama-factory"])  # axolotl wants a GPU for each process
def test_two_processes_train_what_one_does(made: Path, name: str):
    one = run(name, made)
    two = run(name, made, processes=2, gradient_accumulation_steps=1, ddp_backend="gloo")
    assert len(one.kept["steps"]) == 2 * len(two.kept["steps"])
    assert worst(one.kept["before"], two.kept["before"]) == 0 and worst(one.kept["before"], one.kept["after"]) > 1e-2
    same(two, one.losses, one.kept["after"])


@pytest.mark.parametrize(("name", "options", "says"), REFUSED)
def test_what_cannot_be_right_is_refused_by_name(made: Path, name: str, options: dict, says: str):
    refused = run(name, made, **options)
    assert refused.code != 0 and says in refused.output and not refused.kept, refused.output[-4000:]


@pytest.mark.parametrize("option", ["padding_free", "packing", "sequence_parallel_size"])
def test_ms_swift_refuses_what_needs_a_gpu_to_be_asked_for(option: str):
    """Its command line refuses these itself on a CPU, so they are given to the plugin's check."""
    ask = f"""
from types import SimpleNamespace as of
from ms_swift_plugin import _check
args = of(loss_type=["sigmoid"], label_smoothing=0.0, rpo_alpha=None, ld_alpha=None, reference_free=None,
          ref_adapter_name=None, router_aux_loss_coef=0.0)
template = dict(padding_free=False, packing=False, sequence_parallel_size=1)
_check(args, of(**template))
template["{option}"] = 2
_check(args, of(**template))
"""
    paths = os.pathsep.join(str(HERE.parents[1] / part) for part in ("", "python", "python/recipes"))
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run([python_of("ms-swift"), "-c", ask], capture_output=True, text=True, env=environment)
    assert done.returncode and f"ValueError: {option}: got" in done.stderr, done.stderr
