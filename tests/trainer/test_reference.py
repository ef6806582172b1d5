"""A PEFT policy as its own reference: only where that is, and stays, what training begins with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from runs import llama, logged, trainer
from tdpo_trainer.adapters import names_of_adapters
from tdpo_trainer.reference import adapter_of_reference, check_own_reference
from test_trainer_plain import run

PLAIN = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def adapted(**options) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(llama(attention_bias=True), LoraConfig(**PLAIN | options))


def with_copy(policy: PeftModel) -> PeftModel:
    """Its adapter copied into one named "ref"."""
    policy.add_adapter("ref", LoraConfig(**PLAIN))
    set_peft_model_state_dict(policy, get_peft_model_state_dict(policy), adapter_name="ref")
    return policy


@pytest.mark.parametrize("how", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga", "kasa_config"])
def test_adapters_that_change_the_weights_under_them_are_refused(how: str):
    policy = adapted()
    setattr(policy.peft_config["default"], *(("init_lora_weights", how) if how != "kasa_config" else (how, {})))
    with pytest.raises(ValueError, match=f"{how}.* of adapter 'default': it changes .* wanted a ref_model"):
        check_own_reference(policy)


@pytest.mark.parametrize("how", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_beginnings_are_not(how: bool | str):
    policy = adapted()
    policy.peft_config["default"].init_lora_weights = how
    check_own_reference(policy)


@pytest.mark.parametrize("how", ["pissa", "olora"])
@pytest.mark.parametrize("made", ["by the trainer", "before"])
def test_the_trainer_refuses_them(how: str, made: str, tmp_path: Path):
    """Before it takes the reference's states, and before TRL puts a second such adapter on the first."""
    options = dict(reference_cache=str(tmp_path / "cache")) if made == "by the trainer" else {}
    model = adapted(init_lora_weights=how) if made == "before" else llama()
    if made == "by the trainer":
        options["peft_config"] = LoraConfig(**PLAIN, init_lora_weights=how)
    with pytest.raises(ValueError, match=f"^init_lora_weights='{how}' of adapter 'default'"):
        trainer(tmp_path, model, **options)
    assert not (tmp_path / "cache").exists()


def test_the_ways_out_are_the_initial_model(tmp_path: Path):
    for reference in (llama(attention_bias=True), None):
        policy = adapted(init_lora_weights="pissa")
        assert not torch.equal(policy.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight,
                               llama(attention_bias=True).model.layers[0].self_attn.q_proj.weight)  # fmt: skip
        ours = run(tmp_path, policy if reference else with_copy(policy), reference, max_steps=1)
        ours.train()
        assert logged(ours, "kl/chosen")[0] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("trained", ["bias", "norm"])
def test_weights_trained_beside_the_adapter_are_refused(trained: str, tmp_path: Path):
    policy = adapted(bias="lora_only" if trained == "bias" else "none")
    if trained == "norm":
        policy.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=f"^model: .*{trained}.* is trained beside the adapter"):
        run(tmp_path, policy, None)
    with pytest.raises(ValueError, match=f"^model: .*{trained}.* is trained beside the adapter"):
        trainer(tmp_path, policy)
    run(tmp_path, policy, llama(attention_bias=True))


@pytest.mark.parametrize("run_of", [run, trainer])
def test_an_adapter_that_was_loaded_frozen_is_refused(run_of, tmp_path: Path):
    adapted().save_pretrained(tmp_path / "adapter")
    for reference in (None, llama(attention_bias=True)):
        policy = PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "adapter")
        with pytest.raises(ValueError, match="^model: got nothing to train.*is_trainable=True"):
            run_of(tmp_path, policy, reference)


@pytest.mark.parametrize("own", ["ref", "no adapter"])
def test_the_reference_leaves_what_is_trained_as_it_was(own: str):
    policy = with_copy(adapted()) if own == "ref" else adapted()
    for name, x in policy.named_parameters():
        x.requires_grad_("lora_B" in name and "default" in name or name.endswith("norm.weight"))
    before = {name: x.requires_grad for name, x in policy.named_parameters()}
    with pytest.raises(ZeroDivisionError), adapter_of_reference(policy):
        assert not any(x.requires_grad for name, x in policy.named_parameters() if "default" in name)
        raise ZeroDivisionError
    assert {name: x.requires_grad for name, x in policy.named_parameters()} == before


def test_copies_of_modules_are_the_adapter_s():
    check_own_reference(adapted(modules_to_save=["lm_head"], use_dora=True))
    check_own_reference(adapted(trainable_token_indices=[1, 2]))


def test_adapters_that_leave_the_reference_open_are_refused():
    policy = adapted()
    policy.add_adapter("other", LoraConfig(**PLAIN))
    policy.base_model.set_adapter(["default", "other"])
    check_own_reference(policy)
    with_copy(policy).base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="^model: got the active adapters default, other beside 'ref', wanted one"):
        check_own_reference(policy)
    policy.set_adapter("ref")
    with pytest.raises(ValueError, match="^model: got an adapter in training named 'ref'"):
        check_own_reference(policy)


@pytest.mark.parametrize("name", ["default", "model", "layers", "weight"])
def test_names_of_adapters_are_no_others(name: str):
    """Whatever the adapter is called."""
    policy = adapted(modules_to_save=["lm_head"], use_dora=True)
    want = {x.replace(".default", f".{name}") for x, _ in policy.named_parameters() if ".default" in x}
    named = get_peft_model(llama(attention_bias=True), copy.deepcopy(policy.peft_config["default"]), adapter_name=name)
    assert names_of_adapters(named) == want and len(want) == 13
    assert names_of_adapters(named, but=name) == names_of_adapters(llama()) == set()
