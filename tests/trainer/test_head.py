"""Heads and hidden states of Hugging Face models: exact, or refused by name."""

from __future__ import annotations

import pytest
import tiny
import torch
from tdpo_trainer import head as h
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_logits_are_the_head_of_the_hidden_states(name: str):
    model, inputs = tiny.build(name), tiny.inputs_of(tiny.batch())
    hidden = h.run_backbone(model, **inputs, labels=inputs["input_ids"])
    assert hidden.last.shape == (2 * tiny.P, tiny.L, 16)
    out = model(**inputs)
    torch.testing.assert_close(h.logits(hidden.last, h.lm_head(model)), out.logits, rtol=1e-6, atol=1e-6)
    assert (hidden.aux_loss is None) == (name != "mixtral")
    if name == "mixtral":
        torch.testing.assert_close(hidden.aux_loss, out.aux_loss)
    h.check_head(model, inputs)


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny.build("llama"), tiny.inputs_of(tiny.batch())
    monkeypatch.setattr(model.lm_head, "forward", lambda x: pytest.fail("the head was run"))
    assert h.last_hidden(model, **inputs).shape == (2 * tiny.P, tiny.L, 16)


def test_the_model_is_as_before_also_after_an_error():
    model = tiny.build("llama")
    before = dict(vars(model.lm_head)), dict(vars(model))
    h.check_head(model, tiny.inputs_of(tiny.batch()))
    with pytest.raises(IndexError):
        h.run_backbone(model, input_ids=torch.full((2, 3), 10_000))
    assert (dict(vars(model.lm_head)), dict(vars(model))) == before


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_what_a_family_does_to_its_logits_is_not_left_out(name: str, monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny.build(name, dtype=torch.float32), tiny.inputs_of(tiny.batch())
    monkeypatch.setattr(h, "SOFTCAPS", ())
    monkeypatch.setattr(h, "_scale", lambda config: 1.0)
    with pytest.raises(h.UnsupportedModel, match=rf"^{name} \(\w+ForCausalLM\): its logits are not its LM head of"):
        h.check_head(model, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_head_sees_half_a_percent(dtype: torch.dtype):
    """Allow a part of the largest logit in fp32; 16-bit models round their own logits more than that."""
    model, inputs = tiny.build("llama", dtype=dtype), tiny.inputs_of(tiny.batch())
    h.check_head(model, inputs)
    forward, factor = model.forward, 1.005 if dtype is torch.float32 else 1.1
    model.forward = lambda **inputs: _times(forward(**inputs), factor)
    with pytest.raises(h.UnsupportedModel, match="off by"):
        h.check_head(model, inputs)


@pytest.mark.parametrize("weight, refused", [(float("nan"), True), (3e38, True), (float("-inf"), False)])
def test_logits_that_are_not_finite_are_not_the_head_s_fault(weight: float, refused: bool):
    """But -inf in a bias rules a token out, and padding may be anything."""
    model, inputs = tiny.build("phi", dtype=torch.float32), tiny.inputs_of(tiny.batch())
    model.lm_head.bias.data[5] = weight
    if weight == 3e38:
        model.lm_head.weight.data[5] = weight
    if not refused:
        return h.check_head(model, inputs)
    with pytest.raises(h.UnsupportedModel, match=r"^phi \(\w+\): its logits are not finite on the first batch"):
        h.check_head(model, inputs)


def _times(out, factor: float):
    out.logits = factor * out.logits
    return out


class SubclassedLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_refused():
    """Quantised layers are subclasses of nn.Linear too."""
    model = tiny.build("llama", dtype=torch.float32)
    model.set_output_embeddings(SubclassedLinear(16, tiny.V, bias=False))
    with pytest.raises(h.UnsupportedModel, match=r"^llama \(LlamaForCausalLM\): its LM head is a .*SubclassedLinear"):
        h.check_head(model, tiny.inputs_of(tiny.batch()))


def test_a_model_without_a_head_is_refused():
    model = tiny.build("llama").model
    with pytest.raises(h.UnsupportedModel, match=r"^llama \(LlamaModel\): no LM head"):
        h.run_backbone(model, **tiny.inputs_of(tiny.batch()))


def test_a_dispatched_head_is_refused():
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny.build("llama")
    hooks.add_hook_to_module(model.lm_head, hooks.ModelHook())
    with pytest.raises(h.UnsupportedModel, match="its LM head is hooked"):
        h.lm_head(model)


def test_a_head_that_is_called_twice_or_not_at_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    model, inputs = tiny.build("llama"), tiny.inputs_of(tiny.batch())
    monkeypatch.setattr(model, "forward", lambda **inputs: [model.lm_head(torch.zeros(2, 3, 16)) for _ in range(2)])
    with pytest.raises(h.UnsupportedModel, match="calls its LM head 2 times; wanted once"):
        h.run_backbone(model, **inputs)
    monkeypatch.setattr(model, "forward", lambda **inputs: model.model(**inputs))
    with pytest.raises(h.UnsupportedModel, match="calls its LM head 0 times"):
        h.run_backbone(model, **inputs)


def test_hidden_states_that_do_not_fit_the_ids_are_refused(monkeypatch: pytest.MonkeyPatch):
    """Virtual tokens of prompt tuning, image tokens that the model itself inserts."""
    model, inputs = tiny.build("llama"), tiny.inputs_of(tiny.batch())
    monkeypatch.setattr(model, "forward", lambda **inputs: model.lm_head(torch.zeros(8, 9, 16)))
    with pytest.raises(h.UnsupportedModel, match=r"given \(8, 9, 16\) for input_ids \(8, 7\)"):
        h.run_backbone(model, **inputs)


ADAPTERS = {
    "backbone": dict(targets=["q_proj", "v_proj"]),
    "head": dict(targets=["q_proj", "lm_head"]),
    "copied head": dict(targets=["q_proj"], modules_to_save=["lm_head"]),
}


def adapted(targets: list[str], name: str = "llama", dtype: torch.dtype = torch.float64, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options)
    model = peft.get_peft_model(tiny.build(name, dtype=dtype), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(0.1 * torch.randn_like(x))
    return model


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head"], ["q_proj", "lm_head"]])
def test_lora_is_in_the_logits_and_gone_when_disabled(name: str, targets: list[str]):
    model, inputs = adapted(targets, name), tiny.inputs_of(tiny.batch())
    own = model(**inputs).logits
    hidden, head = h.head_pair(model, h.last_hidden(model, **inputs))
    torch.testing.assert_close(h.logits(hidden, head), own, rtol=1e-6, atol=1e-6)
    h.check_head(model, inputs)
    with model.disable_adapter():
        base = model(**inputs).logits
        hidden, head = h.head_pair(model, h.last_hidden(model, **inputs))
        assert hidden.shape[-1] == 16 and not torch.allclose(base, own)
        torch.testing.assert_close(h.logits(hidden, head), base, rtol=1e-6, atol=1e-6)


def test_lora_on_the_head_is_not_overlooked_before_it_has_learned_anything():
    """TRL #4612. The hidden states are widened; `lm_head` alone would leave the adapter out, and says so."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(r=3, target_modules=["lm_head"]))
    hidden, head = h.head_pair(model, torch.zeros(2, 3, 16, dtype=torch.float64))
    assert hidden.shape == (2, 3, 19) and head.weight.shape == (tiny.V, 19) and h.head_is_adapted(model)
    with pytest.raises(h.UnsupportedModel, match=r"^llama \(LlamaForCausalLM\): a LoRA adapter is active on its LM"):
        h.lm_head(model)
    merged = model.merge_and_unload()
    assert h.lm_head(merged).weight.shape == (tiny.V, 16) and not h.head_is_adapted(merged)


def test_lora_on_a_16_bit_head_is_not_rounded_away():
    """An update far below the weight's last bit: merged in bf16 it would be gone."""
    model = adapted(["lm_head"], dtype=torch.bfloat16)
    layer = h.innermost(h.output_layer(model))
    with torch.no_grad():
        layer.base_layer.weight.fill_(1.0)
        layer.lora_A["default"].weight.fill_(2.0**-5)
        layer.lora_B["default"].weight.fill_(2.0**-6)
    hidden, head = h.head_pair(model, torch.ones(1, 1, 16, dtype=torch.bfloat16))
    z = h.logits(hidden.float(), h.LMHead(head.weight.float()))
    torch.testing.assert_close(z, torch.full_like(z, 16 + 16 * 3 * 2 * 2.0**-11))


def test_a_trained_copy_of_the_head_is_found():
    model, inputs = adapted(["q_proj"], modules_to_save=["lm_head"]), tiny.inputs_of(tiny.batch())
    head = h.lm_head(model)
    assert head.weight.requires_grad and h.head_is_adapted(model)
    h.check_head(model, inputs)
    with model.disable_adapter():
        assert not torch.equal(h.lm_head(model).weight, head.weight)
        h.check_head(model, inputs)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(bias="lora_only", lora_bias=True)])
def test_variants_of_lora_on_the_head_are_refused(options: dict):
    options.pop("bias", None)
    with pytest.raises(h.UnsupportedModel, match="'default' on its LM head is a variant"):
        h.head_pair(adapted(["lm_head"], **options), torch.zeros(2, 3, 16, dtype=torch.float64))


def test_other_adapters_on_the_head_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny.build("llama"), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(h.UnsupportedModel, match="its LM head is a peft.tuners.ia3"):
        h.lm_head(model)
