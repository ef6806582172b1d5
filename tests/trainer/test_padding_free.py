"""Without padding a run is the padded one, to rounding; where it could not be, it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from runs import config, llama, logged, losses, pairs, parameters, text_pairs, tokenizer, trainer, worst
from tdpo_trainer import PlainTDPOTrainer
from tdpo_trainer.metrics import NAMES
from tdpo_trainer.packed import packed
from tdpo_trainer.step import LossOptions
from tdpo_trainer.tokens import tokenize
from transformers import BloomConfig, BloomForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM


def adapted(model: LlamaForCausalLM):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def with_trl(folder: Path, model, **changes):
    return trainer(folder, model, eval_dataset=pairs(5, seed=2), eval_strategy="steps", eval_steps=4, **changes)


def plain(folder: Path, model, padding_free: bool = False, **changes):
    reference = llama() if isinstance(model, LlamaForCausalLM) else None
    rows, own = tokenize(tokenizer(), text_pairs()), config(folder, **changes)
    return PlainTDPOTrainer(
        model, reference, own, options=LossOptions(beta=0.5), train_dataset=rows, eval_dataset=rows[:5],
        processing_class=tokenizer(), padding_free=padding_free,
    )  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("make", [with_trl, plain])
def test_a_run_without_padding_is_the_padded_one(make, adapter: bool, attention: str, tmp_path: Path):
    runs = []
    for free in (False, True):
        model = llama(attn_implementation=attention)
        run = make(tmp_path / str(free), adapted(model) if adapter else model, padding_free=free)
        run.train()
        run.evaluate()
        runs.append(run)
    padded, free = runs
    assert losses(free) == pytest.approx(losses(padded), abs=1e-5) and losses(free)[-1] != pytest.approx(
        0.6931, abs=1e-3
    )
    for name in [x for x in NAMES if x not in ("loss", "aux_loss")]:
        for prefix in ("", "eval_"):
            assert logged(free, prefix + name) == pytest.approx(logged(padded, prefix + name), abs=2e-4), prefix + name
    assert worst(parameters(free.model), parameters(padded.model)) < 1e-4


def test_a_cache_written_with_padding_serves_rows_without(tmp_path: Path, model_folder: Path):
    runs = [
        with_trl(tmp_path / str(x), str(model_folder), padding_free=x, reference_cache=str(tmp_path / "c"))
        for x in (False, True)
    ]
    for run in runs:
        run.train()
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), abs=1e-5)


def test_the_row_holds_tokens_alone():
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    mask = (ids != 0).long()
    row = packed(
        {"input_ids": ids, "attention_mask": mask, "completion_mask": torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])}
    )
    expected = {"input_ids": [[5, 6, 7, 8, 9]], "completion_mask": [[0, 0, 1, 0, 1]], "position_ids": [[0, 1, 2, 0, 1]],
                "cu_seqlens": [0, 3, 5]}  # fmt: skip
    assert {name: x.tolist() for name, x in row.items()} == expected


OTHERS = {
    "mamba": lambda **same: MambaForCausalLM(MambaConfig(num_hidden_layers=1, state_size=4, **same)),
    "bloom": lambda **same: BloomForCausalLM(BloomConfig(n_layer=1, n_head=2, **same)),
}


@pytest.mark.parametrize("family", OTHERS)
def test_a_model_that_does_not_keep_sequences_apart_is_refused(family: str, tmp_path: Path):
    model = OTHERS[family](vocab_size=len(tokenizer()), hidden_size=16, initializer_range=0.3)
    with pytest.raises(ValueError, match=f"^padding_free: got True for {family}.*a sequence sees the one before it"):
        trainer(tmp_path, model, padding_free=True).train()


def test_pictures_are_refused():
    with pytest.raises(ValueError, match="^padding_free: got a batch with pixel_values, wanted text alone"):
        packed({"input_ids": torch.ones(1, 1), "attention_mask": torch.ones(1, 1), "pixel_values": torch.ones(1)})
