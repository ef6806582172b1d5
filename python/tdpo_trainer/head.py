"""Cut a Hugging Face causal LM in two, and compare the halves with the whole: one file, for no half is right alone.

The halves are what its LM head is given, and the `LMHead` that makes its logits.

The cut is made at the head itself: the model's own forward runs, with everything it does before the head (multipliers,
a BERT-like transform, image tokens, adapters, a mixture's auxiliary loss), the head is passed over, and what it would
have been given is kept. What a family does to the logits afterwards (a scale, a softcap) is read from its config, and
`check_head` compares the outcome with the model's own logits, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdpo_kernels import LMHead
from tdpo_kernels.parallel import VocabParallelHead, vocab_parallel

from .redirect import evaluating, instead, redirect, refuse_compiled

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "softcap")
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
TENSOR_PARALLEL = "tp"  # the mesh's dimension, as transformers and accelerate name it
LEAVE_OUT = ("aya_vision", "cohere2_vision", "gemma3", "mpt", "shieldgemma2")  # have such keys, and do not heed them


class UnsupportedModel(ValueError):
    """A model whose logits are not an `LMHead` of its last hidden states, or not to the bit of what it trains.

    Says which family, what was seen in it and what is wanted.
    """

    def __init__(self, model: nn.Module, seen: str, wanted: str) -> None:
        super().__init__(f"{family(model)}: {seen}; wanted {wanted}")


@dataclass(frozen=True, eq=False)
class Hidden:
    """Hold what the head of a model is given, ``last (B, L, D)``, and ``aux_loss``, a scalar, where the model makes one
    (``output_router_logits`` of a mixture of experts), not yet multiplied by its coefficient."""

    last: Tensor
    aux_loss: Tensor | None = None


def family(model: nn.Module) -> str:
    """``"gemma2 (Gemma2ForCausalLM)"``: the config's ``model_type`` and the class, without adapters around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return f"{getattr(getattr(base, 'config', None), 'model_type', None) or 'no model_type'} ({type(base).__name__})"


def run_backbone(model: nn.Module, **inputs: Any) -> Hidden:
    """The model's own forward on `inputs`, without its head: no logits are made.

    Its forward, not its call: within `redirect.redirect` the hooks of the model itself are already running.

    Args:
        model: a Hugging Face causal LM (text or vision-language), with or without PEFT adapters; not a wrapper (DDP,
            FSDP1, DeepSpeed): `forward.pair_outputs` goes through those.
        inputs: what its forward takes; ``labels``, ``use_cache`` and ``logits_to_keep`` are dropped.

    Raises:
        UnsupportedModel: it has no head, or does not give it one ``(B, L, D)`` for ``(B, L)`` input ids.
    """
    given: list[Tensor] = []
    layer = output_layer(model)
    width = getattr(innermost(layer), "out_features", None)
    if width is None:
        raise UnsupportedModel(model, f"its LM head is a {_kind(layer)}", "a torch.nn.Linear")

    def pass_over(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden.new_empty(*hidden.shape[:-2], 0, width)  # logits of no rows

    with instead(layer, "_compiled_call_impl", pass_over):  # what `Module.compile` sets: nothing of the layer is run
        out = model.forward(**_accepted(model, inputs))
    _check_given(model, given, inputs)
    return Hidden(given[0], getattr(out, "aux_loss", None))


def last_hidden(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, L, D)``, what the model's head is given: `run_backbone` without the auxiliary loss."""
    return run_backbone(model, **inputs).last


def lm_head(model: nn.Module) -> LMHead:
    """The map from `last_hidden` to the model's logits, with the scale and softcap of its config.

    The weight and bias are the model's own parameters (tied embeddings included), so gradients reach them.

    Raises:
        UnsupportedModel: no head, or one that is not a plain ``nn.Linear`` (quantised, adapted, hooked).
    """
    layer = innermost(output_layer(model))
    if active_lora(model, layer):
        raise UnsupportedModel(model, "a LoRA adapter is active on its LM head", "no adapter there, or head_pair()")
    return _linear_head(model, layer)


def head_pair(model: nn.Module, hidden: Tensor) -> tuple[Tensor, LMHead]:
    """Hidden states and head as `tdpo_kernels.token_stats` takes them, also with LoRA on the head.

    ``(B, L, D)`` and `lm_head`, the very tensors; with LoRA of rank r on the head ``(B, L, D + r)`` and a weight
    ``(V, D + r)``: ``W h + s B (A h) = [W, B] [h, s A h]``, which is exact in every dtype, dropout included, where a
    merged weight would round the adapter away. That costs a copy of the weight and of its gradient.

    Raises:
        UnsupportedModel: as `lm_head`, or an adapter of another kind.
    """
    layer = innermost(output_layer(model))
    names = active_lora(model, layer)
    head = _linear_head(model, layer)
    if not names:
        return hidden, head
    if isinstance(head, VocabParallelHead):
        raise UnsupportedModel(model, "LoRA is on an LM head that is split over ranks", "no adapter there")
    narrow = [layer.scaling[name] * _down(layer, name, hidden) for name in names]
    wide = [_whole(model, layer.lora_B[name].weight).to(head.weight.dtype) for name in names]
    hidden = torch.cat([hidden, *(x.to(hidden.dtype) for x in narrow)], -1)
    return hidden, replace(head, weight=torch.cat([head.weight, *wide], -1))


def base_head(model: nn.Module) -> LMHead:
    """`lm_head` as it is without adapters, whether they are active or not; raises as `lm_head` does."""
    layer = innermost(output_layer(model), adapters=False)
    if _is_lora_linear(layer) and layer.merged:
        raise UnsupportedModel(model, "an adapter is merged into its LM head", "unmerge() first")
    return _linear_head(model, layer)


def head_is_adapted(model: nn.Module) -> bool:
    """Return whether PEFT has put something on the head: then the reference has a head of its own."""
    return _is_peft(output_layer(model))


@torch.no_grad()
def check_head(model: nn.Module, inputs: Mapping[str, Any], rows: int = 4, *, wrapped: nn.Module | None = None) -> None:
    """One forward: refuse a model whose logits are not what its `LMHead` makes of its hidden states.

    Args:
        model: as `run_backbone`.
        inputs: a batch of the run. The last `rows` positions are compared (``logits_to_keep``), or the first `rows`
            tokens of its first sequence where the model always makes all its logits.
        wrapped: the model as DDP, FSDP or DeepSpeed wrap it; then every process has to call this.

    Raises:
        UnsupportedModel: naming the family, and by how much its logits differ, or that they are not finite.
        TypeError: the model is compiled as a whole.
    """
    refuse_compiled(model if wrapped is None else wrapped, model)
    seen: list[tuple[Tensor, slice | None]] = []
    layer = innermost(output_layer(model))

    def compare(**inputs: Any) -> Tensor:
        own = layer.forward

        def both(hidden: Tensor) -> Tensor:
            given, head = head_pair(model, hidden)
            seen.append((logits(given, head), head.columns if isinstance(head, VocabParallelHead) else None))
            return own(hidden)

        with instead(layer, "forward", both):
            return model.forward(**inputs).logits

    with evaluating(model):  # no dropout: a resumed run, which checks anew, goes on with the same random numbers
        few = _few(model, inputs, rows)
        theirs = redirect(model if wrapped is None else wrapped, model, compare, **few)
    if not seen:
        raise UnsupportedModel(model, "its forward does not call its LM head", "a head that is called")
    ours, columns = seen[-1]
    _compare(model, ours, theirs if columns is None else theirs[..., columns], few.get("attention_mask"))


def logits(hidden: Tensor, head: LMHead) -> Tensor:
    """``(..., V)`` as the model itself makes them: a product in its dtype, then scale and softcap. For comparisons."""
    z = F.linear(hidden, head.weight, head.bias) * head.logit_scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def output_layer(model: nn.Module) -> nn.Module:
    """The module that the model calls to make logits, as it stands in the model: under FSDP1 that is its wrapper."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if layer is None:
        raise UnsupportedModel(model, "no LM head (get_output_embeddings() gives None)", "a causal LM with one")
    return layer


def innermost(layer: nn.Module, adapters: bool = True) -> nn.Module:
    """The layer whose forward makes the logits: inside FSDP1 units and peft's ``modules_to_save``."""
    while True:
        if hasattr(layer, "_fsdp_wrapped_module"):
            layer = layer._fsdp_wrapped_module
        elif _is_peft(layer) and type(layer).__name__ == "ModulesToSaveWrapper":
            names = layer.active_adapters if adapters and not layer.disable_adapters else []
            copies = [layer.modules_to_save[name] for name in names if name in layer.modules_to_save]
            layer = copies[0] if copies else layer.original_module
        else:
            return layer


def active_lora(model: nn.Module, layer: nn.Module) -> list[str]:
    """The names of the LoRA adapters at work on `layer`, none for a plain layer; other adapters are refused."""
    if not _is_lora_linear(layer):
        return []
    if layer.disable_adapters or layer.merged:
        if layer.disable_adapters and layer.merged:
            raise UnsupportedModel(model, "its LM head has an adapter that is merged and disabled", "unmerge() first")
        return []
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant or layer.lora_bias.get(name) or layer.fan_in_fan_out:
            raise UnsupportedModel(model, f"adapter {name!r} on its LM head is a variant (DoRA, a bias)", "plain LoRA")
    return names


def _down(layer: nn.Module, name: str, hidden: Tensor) -> Tensor:
    """``A dropout(h)``, in the adapter's dtype."""
    down = layer.lora_A[name]
    return down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))


def _linear_head(model: nn.Module, layer: nn.Module) -> LMHead:
    """Return the head of an ``nn.Linear``, and of nothing else. A wrapper's weight is its base layer's alone.

    One that a plan for tensor parallelism splits has a forward of its own, which gathers the logits. It is not called.
    """
    linear = layer.base_layer if _is_lora_linear(layer) else layer
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise UnsupportedModel(model, f"its LM head is a {_kind(linear)}", "a torch.nn.Linear: merge or leave it out")
    if hasattr(linear, "_hf_hook"):
        raise UnsupportedModel(model, "its LM head is hooked (offloaded or dispatched)", "the model on one device")
    head = LMHead(linear.weight, linear.bias)
    if model.config.model_type not in LEAVE_OUT:
        config = model.config.get_text_config(decoder=True)
        head = replace(head, logit_scale=_scale(config), softcap=_first(config, SOFTCAPS))
    if is_tensor_parallel(linear.weight):
        return vocab_parallel(head)
    _whole(model, linear.weight)
    return head


def is_tensor_parallel(weight: Tensor) -> bool:
    """Return whether rows stay split over ranks, by a plan for tensor parallelism. FSDP's are gathered."""
    return getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) == (TENSOR_PARALLEL,)


def _whole(model: nn.Module, weight: Tensor) -> Tensor:
    """Refused where it is a shard: a gathered copy would get a wrong gradient."""
    if weight.dim() != 2 or not weight.numel() or hasattr(weight, "full_tensor"):
        seen = f"a weight of its LM head is sharded, a {type(weight).__name__} of shape {tuple(weight.shape)}"
        raise UnsupportedModel(model, seen, "one that is gathered: forward.at_head, and no adapter there")
    return weight


def _is_lora_linear(layer: nn.Module) -> bool:
    if not _is_peft(layer):
        return False
    from peft.tuners import lora

    return type(layer) is lora.Linear


def _is_peft(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("peft.")


def _kind(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def _scale(config: Any) -> float:
    """The product of what the family multiplies its logits by."""
    scale = float(_first(config, SCALES) or 1.0)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None or config.model_type == "minicpm3":  # which divides the hidden states, before the head
        return scale
    return scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling  # Granite divides


def _first(config: Any, keys: tuple[str, ...]) -> float | None:
    return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)


def _accepted(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Without what asks for a loss or for fewer logits, and with no cache where the model can be told so."""
    kept = {name: x for name, x in inputs.items() if name not in ("labels", "use_cache", "logits_to_keep")}
    return kept | ({"use_cache": False} if "use_cache" in _parameters(model) else {})


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(type(base).forward).parameters


def _few(model: nn.Module, inputs: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Inputs that make few logits."""
    inputs = _accepted(model, inputs)
    if "logits_to_keep" in _parameters(model):
        return inputs | {"logits_to_keep": rows}
    if not set(inputs) <= {"input_ids", "attention_mask", "use_cache"}:
        return inputs
    ids = inputs["input_ids"][:1]
    mask = inputs.get("attention_mask", torch.ones_like(ids))[:1].bool()
    ids = ids[mask][None, :rows]
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _check_given(model: nn.Module, given: list[Tensor], inputs: Mapping[str, Any]) -> None:
    if len(given) != 1:
        raise UnsupportedModel(model, f"its forward calls its LM head {len(given)} times", "once")
    ids = inputs.get("input_ids")
    if given[0].dim() != 3 or ids is not None and given[0].shape[:2] != ids.shape:
        ids = "" if ids is None else f" for input_ids {tuple(ids.shape)}"
        raise UnsupportedModel(model, f"its LM head is given {tuple(given[0].shape)}{ids}", "(B, L, D) for (B, L)")


def _compare(model: nn.Module, ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> None:
    """Compare up to rounding in the model's dtype, but for padding, whose rows may be nan."""
    if ours.shape != theirs.shape:
        shapes = f"its logits are {tuple(theirs.shape)}, its LM head makes {tuple(ours.shape)}"
        raise UnsupportedModel(model, shapes, "the same")
    tolerance = max(1e-4, 4 * torch.finfo(ours.dtype).eps)
    tokens = None if mask is None else mask[:, -theirs.shape[1] :].bool()
    if tokens is not None and tokens.shape == theirs.shape[:2] and tokens.any():
        ours, theirs = ours[tokens], theirs[tokens]
    if theirs.isnan().any() or theirs.isposinf().any():
        seen = f"its logits are not finite on the first batch, in {str(theirs.dtype).removeprefix('torch.')}"
        raise UnsupportedModel(model, seen, "sound weights, and bfloat16 or float32 where float16 overflows")
    ours, theirs = ours.float(), theirs.float()
    apart = torch.where(ours == theirs, 0.0, ours - theirs)  # ruled out in both is equal
    worst, size = float(apart.abs().max()), float(theirs[theirs.isfinite()].abs().max())
    if not worst <= tolerance * size:
        seen = f"its logits are not its LM head of its last hidden states: off by {worst:.3g}"
        raise UnsupportedModel(model, seen, f"at most {tolerance:.1g} of the largest, {size:.3g}")
