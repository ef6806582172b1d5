"""One process: the loss within the forward has the published formula's value and every gradient."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import product

import pytest
import tiny
import torch
from tdpo_trainer.forward import Reference, at_head, pair_outputs, redirect, reference_side
from tdpo_trainer.head import UnsupportedModel, check_head, head_pair, last_hidden, lm_head, run_backbone
from test_head import ADAPTERS, adapted
from torch import nn

from tdpo_kernels import fused_tdpo_loss

CLOSE = dict(rtol=1e-5, atol=1e-9)  # float64, but for the norms of transformers, which are in fp32


def loss_on(labels: torch.Tensor, **options):
    def loss(*sides) -> dict[str, torch.Tensor]:
        out = fused_tdpo_loss(*sides, labels, **options)
        return {"loss": out.loss, "chosen_kl": out.chosen_kl}

    return loss


def check_gradients(policy: nn.Module, out: dict[str, torch.Tensor], want: tuple, more: float = 0.0) -> None:
    value, gradients = want
    total = out["loss"] + more * out.get("aux_loss", 0.0)
    torch.testing.assert_close(total.detach(), value, **CLOSE)
    total.backward()
    for name, x in policy.named_parameters():
        if x.requires_grad:
            assert x.grad is not None, name
            assert gradients[name].abs().max() > 0, f"{name} is not tried"
            torch.testing.assert_close(x.grad, gradients[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        else:
            assert x.grad is None, name


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_value_and_every_gradient_are_the_published_formula_s(name: str):
    policy, reference, batch = tiny.build(name), tiny.build(name, seed=5), tiny.batch()
    inputs = tiny.inputs_of(batch)
    own = policy(**inputs)
    more = 0.25 * own.aux_loss if name == "mixtral" else 0.0
    want = tiny.published_gradients(policy, own.logits, reference(**inputs).logits, batch["labels"], more)
    side = reference_side(reference, inputs, unwrapped=reference)
    assert side.head.weight is reference.get_output_embeddings().weight, "copied, though it stays"
    out = pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    assert not out["chosen_kl"].requires_grad and out["chosen_kl"].shape == (tiny.P,)
    check_gradients(policy, out, want, 0.25)
    assert all(x.grad is None for x in reference.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    "name, adapter", [*product(["llama", "gemma2"], ["backbone", "head"]), ("llama", "copied head")]
)
def test_an_adapted_policy_is_its_own_reference(name: str, adapter: str, cached: bool):
    """Not a copied head of gemma2: peft ties the copy of a tied head to its embedding in its own way."""
    policy, batch = adapted(name=name, **ADAPTERS[adapter]), tiny.batch()
    inputs = tiny.inputs_of(batch)
    with policy.disable_adapter(), torch.no_grad():
        theirs = policy(**inputs).logits
    side = reference_side(policy, inputs, unwrapped=policy, policy_within=policy.disable_adapter)
    assert (side.head is None) == (adapter == "backbone")
    if cached:
        side = Reference(side.hidden, None)
    want = tiny.published_gradients(policy, policy(**inputs).logits, theirs, batch["labels"])
    out = pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    check_gradients(policy, out, want)


@pytest.mark.filterwarnings("ignore")
def test_a_reference_adapter_on_the_head_is_the_reference_s():
    peft = pytest.importorskip("peft")
    policy, batch = adapted(["q_proj", "lm_head"]), tiny.batch()
    policy.add_adapter("ref", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    policy.to(torch.float64)
    inputs = tiny.inputs_of(batch)
    policy.set_adapter("ref")
    theirs = policy(**inputs).logits.detach()
    side = reference_side(policy, inputs, unwrapped=policy, policy_within=nullcontext)
    policy.set_adapter("default")
    assert side.hidden.shape[-1] == 16 + 2
    want = tiny.published_gradients(policy, policy(**inputs).logits, theirs, batch["labels"])
    check_gradients(policy, pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy), want)


def test_evaluation_needs_no_gradient():
    policy, batch = tiny.build("llama"), tiny.batch()
    inputs = tiny.inputs_of(batch)
    with torch.no_grad():
        side = reference_side(policy, inputs, unwrapped=policy)
        out = pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    assert not out["loss"].requires_grad
    torch.testing.assert_close(float(out["loss"]), 0.6931471805599453)
    assert out["chosen_kl"].eq(0).all(), "policy == reference"


class Rounding(nn.Module):
    """A wrapper that casts what its module returns, as FSDP2's ``output_dtype`` does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        out = self.module(**inputs)
        return {name: x.bfloat16() for name, x in out.items()} if isinstance(out, dict) else out.bfloat16()


def test_values_are_exact_where_a_wrapper_rounds_them():
    policy, reference, batch = tiny.build("llama"), tiny.build("llama", seed=5), tiny.batch()
    inputs = tiny.inputs_of(batch)
    want = tiny.published_gradients(policy, policy(**inputs).logits, reference(**inputs).logits, batch["labels"])
    side = reference_side(Rounding(reference), inputs, unwrapped=reference)
    out = pair_outputs(Rounding(policy), side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    assert out["chosen_kl"].dtype == torch.float64
    check_gradients(policy, out, want)


def test_autocast_of_the_forward_is_kept():
    """accelerate puts it on the model's instance."""
    policy, inputs = tiny.build("llama", dtype=torch.float32), tiny.inputs_of(tiny.batch())
    policy.forward = torch.autocast("cpu", torch.bfloat16)(policy.forward)
    seen = redirect(policy, policy, lambda **inputs: policy.forward(**inputs).logits, **inputs)
    assert seen.dtype == torch.bfloat16 and "forward" in vars(policy)


def test_a_trained_head_is_not_its_own_reference():
    policy, batch = tiny.build("llama"), tiny.batch()
    inputs = tiny.inputs_of(batch)
    side = reference_side(policy, inputs, unwrapped=policy, policy_within=nullcontext)
    said = r"^reference.head: got None for llama \(LlamaForCausalLM\), whose own LM head"
    with pytest.raises(ValueError, match=said):
        pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)


def test_hooks_of_the_head_run_once_around_the_loss():
    policy, batch = tiny.build("llama"), tiny.batch()
    inputs, seen = tiny.inputs_of(batch), []
    policy.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    policy.lm_head.register_forward_hook(lambda module, args, out: seen.append(sorted(out)))
    side = Reference(last_hidden(policy, **inputs).detach(), lm_head(policy))
    pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    assert seen == [(2 * tiny.P, tiny.L, 16), ["loss"]]


def test_redirect_gives_the_forward_back_also_after_an_error():
    policy, inputs = tiny.build("llama"), tiny.inputs_of(tiny.batch())
    with pytest.raises(ZeroDivisionError):
        redirect(policy, policy, lambda **inputs: 1 / 0, **inputs)
    assert "forward" not in vars(policy)
    assert policy(**inputs).logits.shape == (2 * tiny.P, tiny.L, tiny.V)


def test_wrappers_that_do_not_call_the_model_are_refused():
    policy, other = tiny.build("llama"), tiny.build("llama")
    inputs = tiny.inputs_of(tiny.batch())
    with pytest.raises(RuntimeError, match="calling the LlamaForCausalLM did not call the LlamaForCausalLM"):
        redirect(other, policy, lambda **inputs: None, **inputs)
    with pytest.raises(TypeError, match="got a DataParallel"):
        redirect(nn.DataParallel(policy), policy, lambda **inputs: None, **inputs)


COMPILED = {
    "Module.compile": lambda model: model.compile(backend="eager") or model,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")) or model,
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_compiled_as_a_whole_is_refused_and_one_of_compiled_parts_is_not(how: str):
    policy, batch = COMPILED[how](tiny.build("llama")), tiny.batch()
    inputs, refused = tiny.inputs_of(batch), pytest.raises(TypeError, match="^model: got a .* compiled as a whole")
    side = Reference(torch.zeros(2 * tiny.P, tiny.L, 16, dtype=torch.float64), lm_head(tiny.build("llama")))
    with refused:
        check_head(policy, inputs)
    with refused:
        reference_side(policy, inputs, unwrapped=policy)
    with refused:
        pair_outputs(policy, side, inputs, loss_on(batch["labels"]), unwrapped=policy)
    parts = tiny.build("llama")
    parts.model.compile(backend="eager")
    pair_outputs(parts, side, inputs, loss_on(batch["labels"]), unwrapped=parts)


def test_at_head_gives_what_the_head_is_given():
    policy, inputs = tiny.build("gemma2"), tiny.inputs_of(tiny.batch())
    hidden = run_backbone(policy, **inputs).last
    given, head = at_head(policy, hidden, lambda *pair: pair)
    assert given is hidden and head.weight is policy.lm_head.weight and head.softcap == 2.0


def test_a_head_sharded_outside_of_a_forward_is_refused():
    policy = tiny.build("llama")
    policy.lm_head.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    with pytest.raises(UnsupportedModel, match="a weight of its LM head is sharded, a Parameter of shape"):
        head_pair(policy, torch.zeros(1, 1, 16))
