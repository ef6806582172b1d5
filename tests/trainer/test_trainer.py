"""`TDPOTrainer`: the losses and the parameters of TDPO written plainly, whatever the trainer does around it."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import runs
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from runs import config, eager_run, llama, logged, losses, pairs, parameters, recorded, tokenizer, trainer, worst
from tdpo_trainer import metrics, reference
from tdpo_trainer.config import TDPOConfig
from tdpo_trainer.head import last_hidden
from tdpo_trainer.step import LossOptions, model_inputs, pair_loss
from tdpo_trainer.trainer import TDPOTrainer
from transformers import GPTJConfig, GPTJForCausalLM
from trl import DPOConfig

from tdpo_kernels import LMHead

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("options", [
    dict(alpha=0.7), dict(), dict(variant="tdpo1"), dict(alpha=0.7, sft_weight=0.3, length_normalized=True),
    dict(variant="tdpo1", sft_weight=0.3),
])  # fmt: skip
def test_losses_and_every_parameter_are_the_eager_implementation_s(options: dict, accumulation: int, tmp_path: Path):
    model, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    ours = trainer(
        tmp_path, copy.deepcopy(model), copy.deepcopy(reference), gradient_accumulation_steps=accumulation, **options
    )
    steps = recorded(ours, accumulation)
    ours.train()
    theirs = eager_run(model, steps, reference, **options)
    assert len(theirs) == 4
    assert losses(ours) == pytest.approx(theirs, rel=1e-6)
    assert worst(parameters(ours.model), parameters(model)) < 1e-6
    assert worst(parameters(ours.model), parameters(llama(dtype=torch.float64))) > 1e-3


def test_default_is_the_initial_policy_as_reference(tmp_path: Path):
    """Its first loss is log 2, its KL 0; and it is not the policy as it is now."""
    llama().save_pretrained(tmp_path / "model")
    ours = trainer(tmp_path, str(tmp_path / "model"))
    ours.train()
    assert losses(ours)[0] == pytest.approx(math.log(2), rel=1e-5)
    assert logged(ours, "kl/chosen")[0] == 0.0
    assert logged(ours, "kl/chosen")[-1] > 0.0


@pytest.mark.parametrize("cached", [False, True])
def test_a_model_that_was_changed_since_it_was_loaded_is_its_own_reference(cached: bool, tmp_path: Path):
    llama().save_pretrained(tmp_path / "model")
    model = type(llama()).from_pretrained(tmp_path / "model")
    model.lm_head.weight.data.mul_(1.5)
    ours = trainer(tmp_path, model, max_steps=2, reference_cache=str(tmp_path / "cache") if cached else None)
    ours.train()
    assert logged(ours, "kl/chosen")[0] == 0.0 < logged(ours, "kl/chosen")[1]


GPTJ = dict(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=64, rotary_dim=4, attn_pdrop=0.9)


@pytest.mark.parametrize("model", [lambda: llama(attention_dropout=0.9), lambda: GPTJForCausalLM(GPTJConfig(**GPTJ))])
def test_disabled_dropout_is_off_where_it_is_no_module(model, tmp_path: Path):
    """Llama's is a number that its attention has, GPT-J's one that its config has."""
    off, on = (trainer(tmp_path, model(), disable_dropout=disabled, max_steps=1) for disabled in (True, False))
    off.train(), on.train()
    assert logged(off, "kl/chosen") == [0.0] < logged(on, "kl/chosen")


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_the_uninterrupted_one(dropout: float, tmp_path: Path):
    """Also where the policy draws random numbers, which the check of the first batch must not."""

    def run(folder: str, **changes) -> TDPOTrainer:
        options = dict(optim="adamw_torch", lr_scheduler_type="linear", max_steps=6, disable_dropout=False)
        return trainer(tmp_path / folder, llama(attention_dropout=dropout), llama(1), **options, **changes)

    whole = run("whole")
    whole.train()
    run("half", save_strategy="steps", save_steps=3).train()
    resumed = run("half", save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-3"))
    assert losses(resumed) == losses(whole)
    assert logged(resumed, "num_tokens") == logged(whole, "num_tokens")
    assert worst(parameters(resumed.model), parameters(whole.model)) == 0.0


@pytest.mark.parametrize("adapter", ["new", "trained"])
def test_under_lora_the_reference_is_what_training_began_with(adapter: str, tmp_path: Path):
    """A new adapter: the model without it. A trained one: a frozen copy of it, TRL's "ref"."""
    if adapter == "trained":
        ours = trainer(tmp_path, get_peft_model(llama(dtype=torch.float64), LoraConfig(**LORA)))
    else:
        ours = trainer(tmp_path, llama(dtype=torch.float64), peft_config=LoraConfig(**LORA))
    theirs, began = (get_peft_model(llama(dtype=torch.float64), LoraConfig(**LORA)) for _ in range(2))
    for model in (theirs, began):
        set_peft_model_state_dict(model, get_peft_model_state_dict(ours.model))
    reference = began if adapter == "trained" else llama(dtype=torch.float64)
    steps = recorded(ours)
    ours.train()
    assert ours.ref_model is None
    expected = eager_run(theirs, steps, reference)
    assert losses(ours) == pytest.approx(expected, rel=1e-6)
    seen, wanted = (get_peft_model_state_dict(model) for model in (ours.model, theirs))
    assert worst(seen, wanted) < 1e-6 < worst(seen, get_peft_model_state_dict(began))


@pytest.mark.parametrize("own", ["model", "adapter"])
def test_the_reference_has_no_dropout(own: str, tmp_path: Path):
    """Nor where the policy has it, and where it is an argument of a function."""
    noisy = llama(attention_dropout=0.9).train()
    if own == "model":
        ours = trainer(tmp_path, llama(), noisy, max_steps=1)
        ours.train()
        assert logged(ours, "kl/chosen") == [0.0] and noisy.training
        return
    ours = trainer(tmp_path, noisy, peft_config=LoraConfig(**LORA), disable_dropout=False)
    batch = next(iter(ours.get_train_dataloader()))
    layer = ours.model.train().get_base_model().model.layers[0].eval()
    seen = reference.from_adapter(ours.model, ours.model, batch).hidden
    with ours.model.disable_adapter(), torch.no_grad():
        assert ours.model.training and not layer.training and ours.model.get_base_model().model.layers[1].training
        torch.testing.assert_close(seen, last_hidden(ours.model.eval(), **model_inputs(batch)))


def test_gradient_checkpointing_changes_nothing(tmp_path: Path):
    plain, checkpointed = (trainer(tmp_path, llama(), llama(1), gradient_checkpointing=on) for on in (False, True))
    plain.train(), checkpointed.train()
    assert losses(plain) == losses(checkpointed)
    assert worst(parameters(plain.model), parameters(checkpointed.model)) == 0.0


@pytest.mark.skipif("router_aux_loss_coef" not in TDPOConfig.__dataclass_fields__, reason="this TRL has none for DPO")
def test_a_mixture_of_experts_adds_its_auxiliary_loss(tmp_path: Path):
    ours = trainer(tmp_path, runs.mixtral(), runs.mixtral(1), router_aux_loss_coef=0.3, max_steps=1)
    without = trainer(tmp_path, runs.mixtral(), runs.mixtral(1), router_aux_loss_coef=0.0, max_steps=1)
    steps = recorded(ours)
    ours.train(), without.train()
    batch = {name: x for name, x in steps[0][0].items() if name != "completion_mask"}
    aux = float(runs.mixtral()(**batch, output_router_logits=True).aux_loss.detach())
    assert logged(ours, "aux_loss") == pytest.approx([aux], rel=1e-6)
    assert losses(ours)[0] - losses(without)[0] == pytest.approx(0.3 * aux, rel=1e-4)
    assert worst(parameters(ours.model), parameters(without.model)) > 1e-4


@pytest.mark.parametrize("loading", ["mixed", "pure"])
def test_bf16_is_near_fp32(loading: str, tmp_path: Path):
    """Autocast, and weights in bf16; with the cache too, whose states are then bf16 where the live ones are."""
    dtype = torch.bfloat16 if loading == "pure" else torch.float32
    exact = trainer(tmp_path, llama(), llama(1))
    options = dict(bf16=loading == "mixed", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    live = trainer(tmp_path, llama(dtype=dtype), llama(1, dtype), **options)
    cached = trainer(tmp_path, llama(dtype=dtype), llama(1, dtype), reference_cache=str(tmp_path / "cache"), **options)
    exact.train(), live.train(), cached.train()
    assert losses(live)[0] == pytest.approx(losses(exact)[0], rel=0.02)
    assert losses(live) != losses(exact)
    assert losses(cached) == losses(live)


def test_synchronised_reference_follows_the_policy(tmp_path: Path):
    ours = trainer(
        tmp_path, llama(), llama(1), sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.0, max_steps=2
    )
    ours.train()
    assert worst(parameters(ours.ref_model), parameters(ours.model)) == 0.0


NAMES = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "num_tokens", "kl/chosen", "kl/rejected",
    "kl/margin",
}  # fmt: skip


def test_what_is_logged(tmp_path: Path):
    """Against the logits themselves; rewards include the KL."""
    model, reference = llama(), llama(1)
    ours = trainer(tmp_path, copy.deepcopy(model), reference, max_steps=1, per_device_train_batch_size=12)
    steps = recorded(ours)
    ours.train()
    assert ours.state.log_history[0].keys() >= NAMES
    (batch,) = steps[0]
    mask, labels = batch["completion_mask"][:, 1:], batch["input_ids"][:, 1:]
    ids = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits, ref_logp = model(**ids).logits[:, :-1], reference(**ids).logits[:, :-1].log_softmax(-1)
    logp = logits.log_softmax(-1)
    picked, ref_picked = (x.gather(-1, labels[..., None])[..., 0] * mask for x in (logp, ref_logp))
    kl = ((ref_logp.exp() * (ref_logp - logp)).sum(-1) * mask).sum(-1)
    rewards = 0.5 * ((picked - ref_picked).sum(-1) + kl)
    entropy, (chosen, rejected) = -(logp.exp() * logp).sum(-1), mask.bool().chunk(2)
    right = (logits.argmax(-1) == labels).float().chunk(2)[0]
    expected = {
        "rewards/chosen": rewards.chunk(2)[0].mean(), "rewards/rejected": rewards.chunk(2)[1].mean(),
        "rewards/margins": (rewards.chunk(2)[0] - rewards.chunk(2)[1]).mean(),
        "rewards/accuracies": (rewards.chunk(2)[0] > rewards.chunk(2)[1]).float().mean(),
        "logps/chosen": picked.sum(-1).chunk(2)[0].mean(), "logps/rejected": picked.sum(-1).chunk(2)[1].mean(),
        "kl/chosen": kl.chunk(2)[0].mean(), "kl/rejected": kl.chunk(2)[1].mean(),
        "kl/margin": (kl.chunk(2)[0] - kl.chunk(2)[1]).mean(),
        "entropy": entropy[mask.bool()].mean(), "mean_token_accuracy": right[chosen].mean(),
        "logits/chosen": logits.chunk(2)[0][chosen].mean(), "logits/rejected": logits.chunk(2)[1][rejected].mean(),
        "num_tokens": batch["attention_mask"].sum(),
    }  # fmt: skip
    assert set(expected) == NAMES and expected["mean_token_accuracy"] > 0
    seen = ours.state.log_history[0]
    assert {name: seen[name] for name in NAMES} == pytest.approx({k: float(x) for k, x in expected.items()}, rel=1e-4)


def test_the_first_token_has_no_predictor_and_is_not_counted():
    """Take a batch without prompts."""
    hidden, ref_hidden, weight, everything = *torch.randn(2, 4, 5, 6), torch.randn(9, 6), torch.ones(4, 5)
    batch = {"input_ids": torch.randint(9, (4, 5)), "attention_mask": everything, "completion_mask": everything}
    sums = pair_loss(batch, LossOptions())(hidden, LMHead(weight), ref_hidden, LMHead(weight))["sums"]
    counts = dict(zip(metrics.NAMES, sums.sum(0)[:, 1].tolist(), strict=True))
    assert counts["entropy"] == 16 and counts["mean_token_accuracy"] == counts["logits/rejected"] == 8
    assert counts["kl/margin"] == 2


def test_what_is_logged_does_not_depend_on_how_pairs_are_batched(tmp_path: Path):
    """Pairs and tokens of an interval are counted alike, in evaluation and over accumulated micro-batches."""
    evaluated, trained = [], []
    for size in (1, 4, 5):
        ours = trainer(tmp_path, llama(), llama(1), eval_dataset=pairs(9, seed=1), per_device_eval_batch_size=size)
        ours.evaluate()
        evaluated.append(ours.state.log_history[-1])
    for size in (1, 2, 4):
        options = dict(per_device_train_batch_size=size, pairs_per_step=4, max_steps=1)
        ours = trainer(tmp_path, llama(), llama(1), **options)
        ours.train()
        trained.append(ours.state.log_history[0])
    for seen, prefix in ((evaluated, "eval_"), (trained, "")):
        first, *others = ({name: x[prefix + name] for name in NAMES} for x in seen)
        assert all(other == pytest.approx(first, rel=1e-4) for other in others)


def test_what_predict_has_seen_is_not_logged_with_an_evaluation(tmp_path: Path):
    ours = trainer(tmp_path, llama(), llama(1), eval_dataset=pairs(3, seed=1))
    ours.evaluate()
    ours.predict(ours.train_dataset)
    ours.evaluate()
    before, after = logged(ours, "eval_kl/chosen")
    assert after == pytest.approx(before, rel=1e-6)


def test_evaluation_logs_the_same_names(tmp_path: Path):
    ours = trainer(tmp_path, llama(), llama(1), eval_dataset=pairs(5, seed=1))
    metrics = ours.evaluate()
    assert metrics["eval_loss"] > 0 and ours.model.training is False
    assert ours.state.log_history[-1].keys() >= {f"eval_{name}" for name in NAMES}
    assert logged(ours, "eval_num_tokens") == [0], "of training, as in TRL"
    assert len(ours.predict(ours.eval_dataset)) == 3  # no logits, no crash


def test_conversations_and_a_shared_prompt_left_out(tmp_path: Path):
    """TRL's other formats: messages through the chat template, and a prompt that is the common beginning."""
    chat = tokenizer()
    chat.chat_template = runs.TEMPLATE
    question = {"role": "user", "content": "ab c"}
    answers = [[question, {"role": "assistant", "content": text}] for text in ("yes.", "no way")]
    data = Dataset.from_list([{"chosen": answers[0], "rejected": answers[1]}] * 4)
    ours = TDPOTrainer(llama(), llama(1), config(tmp_path), processing_class=chat, train_dataset=data)
    steps = recorded(ours)
    ours.train()
    batch = steps[0][0]
    assert chat.decode(batch["input_ids"][0][batch["completion_mask"][0].bool()]).endswith("y e s . </s>")


def test_a_trl_that_does_not_call_the_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from trl import DPOTrainer

    monkeypatch.setattr(DPOTrainer, "compute_loss", lambda self, model, inputs, *_: model(**inputs).logits.sum())
    ours = trainer(tmp_path, llama(), llama(1))
    with pytest.raises(RuntimeError, match="_compute_loss"):
        ours.compute_loss(ours.model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})


@pytest.mark.parametrize(
    "option, value",
    [
        ("loss_type", "ipo"), ("loss_type", ["sigmoid", "sft"]), ("label_smoothing", 0.1), ("ld_alpha", 0.5),
        ("label_smoothing_factor", 0.1),
        ("use_weighting", True), ("f_divergence_type", "js_divergence"), ("use_liger_kernel", True),
        ("variant", "tdpo3"), ("beta", 0.0), ("alpha", -1.0), ("backend", "fast"), ("memory_budget", -1),
        ("pairs_per_step", 3),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused_by_name(option: str, value: object, tmp_path: Path):
    with pytest.raises((ValueError, TypeError), match=option):
        config(tmp_path, **{option: value})


def test_alpha_with_tdpo1_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="alpha"):
        config(tmp_path, variant="tdpo1", alpha=0.5)


def test_other_configs_and_metrics_of_logits_are_refused(tmp_path: Path):
    with pytest.raises(TypeError, match="args: got a DPOConfig, wanted a TDPOConfig"):
        TDPOTrainer(llama(), llama(1), DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=pairs())
    with pytest.raises(ValueError, match="compute_metrics"):
        TDPOTrainer(llama(), llama(1), config(tmp_path), train_dataset=pairs(), compute_metrics=lambda _: {})


def test_the_first_line_says_what_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trainer(tmp_path, llama(), llama(1), alpha=0.25, backend="naive")
    said = capsys.readouterr().out
    assert "TDPO: variant tdpo2, alpha 0.25, beta 0.5, backend naive (asked for: naive; available: keeps" in said


def test_pairs_per_step_counts_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert config(tmp_path, pairs_per_step=8).gradient_accumulation_steps == 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        config(tmp_path, pairs_per_step=8, gradient_accumulation_steps=3)


def test_config_on_a_cpu_trains_in_fp32(tmp_path: Path):
    assert TDPOConfig(str(tmp_path), use_cpu=True).bf16 is False
