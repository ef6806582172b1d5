"""Tiny runs: a character tokenizer, a Llama of a few thousand weights, random pairs, and TDPO written plainly."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from tdpo_trainer.config import TDPOConfig
from tdpo_trainer.trainer import TDPOTrainer
from tiny import published_loss
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz ."
TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def tokenizer(**more: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, **more)


def llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=3 + len(LETTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        initializer_range=0.3, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def mixtral(seed: int = 0) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    more = dict(num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64, pad_token_id=0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=31, initializer_range=0.3, **shape, **more))


def saved_llama(folder: Path, seed: int = 0) -> Path:
    llama(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def text_pairs(count: int = 12, seed: int = 0) -> list[dict[str, str]]:
    rng = random.Random(seed)

    def words(most: int) -> str:
        return "".join(rng.choice(LETTERS[:-2]) for _ in range(rng.randint(1, most)))

    return [{"prompt": words(6), "chosen": words(9), "rejected": words(9)} for _ in range(count)]


def pairs(count: int = 12, seed: int = 0) -> Dataset:
    return Dataset.from_list(text_pairs(count, seed))


SETTINGS = dict(
    per_device_train_batch_size=2, max_steps=4, learning_rate=0.05, optim="sgd", lr_scheduler_type="constant",
    max_grad_norm=0.0, weight_decay=0.0, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
    disable_tqdm=True, seed=7,
)  # fmt: skip


def config(folder: Path, **changes) -> TDPOConfig:
    own = dict(per_device_eval_batch_size=2, gradient_checkpointing=False, beta=0.5)
    return TDPOConfig(str(folder), **(SETTINGS | own | changes))


KEPT = ("peft_config", "eval_dataset", "train_dataset", "data_collator", "processing_class")


def trainer(folder: Path, model: nn.Module, ref_model: nn.Module | None = None, **changes) -> TDPOTrainer:
    more = {name: changes.pop(name) for name in KEPT if name in changes}
    data = {"train_dataset": pairs(), "processing_class": tokenizer()} | more
    return TDPOTrainer(model, ref_model, config(folder, **changes), **data)


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((x - theirs[name]).abs().max()) for name, x in ours.items())


def eager_loss(policy, reference, batch: dict[str, Tensor], beta: float = 0.5, **options) -> Tensor:
    """Return TDPO of a batch from the whole of both distributions."""
    inputs = {name: x for name, x in batch.items() if name not in ("completion_mask", "ref_hidden")}
    with torch.no_grad():
        r = reference(**inputs).logits
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    return published_loss(policy(**inputs).logits, r, labels, beta, **options)


def eager_run(
    policy: nn.Module, batches: Iterable[list[dict]], reference: nn.Module | None = None, lr: float = 0.05, **options
) -> list[float]:
    """Take a step of SGD for each list of micro-batches, and return the losses of the steps."""
    reference = (copy.deepcopy(policy) if reference is None else reference).eval()
    optimizer = torch.optim.SGD([x for x in policy.parameters() if x.requires_grad], lr=lr)
    seen = []
    for micro in batches:
        optimizer.zero_grad()
        parts = [eager_loss(policy, reference, batch, **options) / len(micro) for batch in micro]
        for part in parts:
            part.backward()
        optimizer.step()
        seen.append(float(sum(part.detach() for part in parts)))
    return seen


def recorded(trainer, accumulation: int = 1) -> list[list[dict[str, Tensor]]]:
    """Return what is filled while `trainer` trains: the micro-batches of each step."""
    steps: list[list[dict[str, Tensor]]] = []
    name = "_compute_loss" if hasattr(trainer, "_compute_loss") else "compute_loss"
    inner = getattr(trainer, name)

    def recording(model, inputs, *args, **more):
        if trainer.model.training:
            if not steps or len(steps[-1]) == accumulation:
                steps.append([])
            steps[-1].append({name: x.clone() for name, x in inputs.items()})
        return inner(model, inputs, *args, **more)

    setattr(trainer, name, recording)
    return steps
