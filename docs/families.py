"""Try which families of transformers' causal LMs can be trained: each is built tiny, with random weights.

``make families`` writes docs/families.md; with names, ``python docs/families.py NAMES`` tries those alone. A
family is *exact* when its logits and the gradients of all its parameters are those of `head.run_backbone` and
`head.head_pair`, in fp32.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tdpo_trainer.head import UnsupportedModel, _accepted, _compare, head_pair, logits, run_backbone
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

LARGEST = 20_000_000  # parameters: what is larger was not made tiny
VOCABULARY = 48
EXACT = "exact"

SIZES: dict[str, Any] = {
    name: size
    for size, names in (
        (VOCABULARY, "vocab_size text_vocab_size vocab_size_per_layer_input pronunciation_vocab_size"),
        (1, "pad_token_id bos_token_id eos_token_id decoder_start_token_id n_group topk_group n_shared_experts"),
        (32, "hidden_size d_model n_embd dim embedding_size emb_dim embed_dim"),
        (32, "out_hidden_size output_channels projection_dim encoder_hidden_size"),
        (2, "num_hidden_layers n_layer n_layers num_layers depth decoder_layers"),
        (2, "encoder_layers num_blocks num_encoder_layers num_decoder_layers"),
        (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads num_decoder_attention_heads"),
        (4, "encoder_attention_heads num_encoder_attention_heads num_key_value_heads num_kv_heads"),
        (4, "swa_num_key_value_heads num_experts num_local_experts n_routed_experts moe_num_experts ffn_num_experts"),
        (48, "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dim_ff"),
        (48, "ffn_hidden_size mlp_dim expert_ffn_hidden_size feed_forward_size"),
        (8, "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim attention_head_dim global_head_dim"),
        (8, "hidden_size_per_layer_input laurel_rank attention_head_size patch_size"),
        (16, "q_lora_rank kv_lora_rank moe_intermediate_size shared_expert_intermediate_size image_size"),
        (2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k"),
        (64, "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions"),
        (0, "num_kv_shared_layers"),
    )
    for name in names.split()
}
"""Settings that make a config tiny, by the names that families use."""

ON_LOGITS = dict(
    logit_scale=0.25, output_multiplier=0.5, lm_head_multiplier=2.0, logits_scaling=4.0, final_logit_softcapping=2.0,
    logits_soft_cap=2.0, output_logit_soft_cap=2.0, softcap=2.0,
)  # fmt: skip
"""Settings of what families do to their logits, whose defaults are often 1 or None and would try nothing."""

ROPE = dict(rope_type="default", rope_theta=1e4)
SECTIONS = dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 2]))
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8),
    "codegen": dict(rotary_dim=4),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=ROPE, sliding_attention=ROPE)),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, **HYBRID),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "longcat_flash": dict(zero_expert_num=2),
    "mamba2": dict(head_dim=16, num_heads=4, n_groups=1),
    "reformer": dict(is_decoder=True, axial_pos_embds=False, attn_layers=["local", "local"], local_attn_chunk_length=4),
    "roc_bert": dict(pronunciation_embed_dim=16, shape_embed_dim=16, shape_vocab_size=VOCABULARY),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text"), SECTIONS),
    **dict.fromkeys(("glm4v_moe_text", "paddleocr_vl_text"), SECTIONS),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), HYBRID),
    "xlstm": dict(num_heads=4, hidden_size=64),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid", "hybrid"], num_hidden_layers=3),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}
"""Settings that a family needs besides."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``head``: bias, tied, and what the tiny model's config puts on its logits."""

    family: str
    model: str
    head: str
    verdict: str


def _tiny(cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Return the config of a family at a size that builds in a moment."""
    default = cls()
    known = default.to_dict()
    sizes = {name: value for name, value in (SIZES | ON_LOGITS).items() if name in known}
    whole = {name: getattr(default, name, None) for name in cls.sub_configs}
    parts = {name: _tiny(type(part)) for name, part in whole.items() if isinstance(part, PreTrainedConfig)}
    return cls(**(sizes | parts | SPECIAL.get(cls.model_type, {})))


def tiny_model(family: str, auto: Any = AutoModelForCausalLM) -> nn.Module:
    """Return a model in fp32 and eval mode with random weights and biases, for zeros would hide what is left out."""
    config = _tiny(CONFIG_MAPPING[family])
    with torch.device("meta"):
        size = sum(x.numel() for x in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.05 * torch.randn_like(x))
    return model


def tiny_inputs() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def try_family(family: str, auto: Any = AutoModelForCausalLM) -> Row:
    """Builds, runs and compares. Whatever a family's code raises is its line in the table."""
    name = family
    try:
        model, inputs = tiny_model(family, auto), tiny_inputs()
        name = type(model).__name__
        own = model(**_accepted(model, inputs)).logits
        pull = torch.randn(own.shape, generator=torch.Generator().manual_seed(2))
        gradients = _gradients(model, own, pull)
    except Exception as error:  # as many kinds as there are families
        return Row(family, name, "", f"not built: {_first_line(error)}")
    try:
        head = _compare_with_own(model, inputs, own.detach(), gradients, pull)
    except Exception as error:
        return Row(family, name, "", f"refused: {_first_line(error)}")
    return Row(family, name, head, EXACT)


def _compare_with_own(
    model: nn.Module, inputs: Mapping[str, Tensor], theirs: Tensor, want: Mapping[str, Tensor], pull: Tensor
) -> str:
    """Raises where logits or gradients differ. Returns what the head is like."""
    hidden, head = head_pair(model, run_backbone(model, **inputs).last)
    ours = logits(hidden, head)
    _compare(model, ours, theirs)
    for name, x in _gradients(model, ours, pull).items():
        if not torch.allclose(x, want[name], rtol=1e-3, atol=1e-5 * float(want[name].abs().max()) + 1e-12):
            raise UnsupportedModel(model, f"the gradient of {name} is not its own", "its own")
    parts = ["bias"] if head.bias is not None else []
    parts += ["tied"] if head.weight is model.get_input_embeddings().weight else []
    parts += [f"scale {head.logit_scale:.4g}"] if head.logit_scale != 1 else []
    parts += [f"softcap {head.softcap:.4g}"] if head.softcap is not None else []
    return ", ".join(parts)


def _gradients(model: nn.Module, logits: Tensor, pull: Tensor) -> dict[str, Tensor]:
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    grads = torch.autograd.grad(logits.float(), list(parameters.values()), pull, allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(parameters.items(), grads, strict=True)
    }


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {line[:160]}"


def line(row: Row) -> str:
    return f"| {row.family} | {row.model} | {row.head} | {row.verdict} |"


def table(rows: Iterable[Row]) -> str:
    """Markdown: exact families, then refused ones, then those that could not be built."""
    rows = sorted(rows, key=lambda row: (row.verdict != EXACT, not row.verdict.startswith("refused"), row.family))
    return "\n".join(["| family | class | head | verdict |", "|---|---|---|---|", *map(line, rows)])


def section(title: str, rows: list[Row]) -> str:
    exact, refused = (sum(row.verdict.startswith(verdict) for row in rows) for verdict in (EXACT, "refused"))
    counts = f"{exact} of {len(rows)} are exact, {refused} refused, {len(rows) - exact - refused} not built."
    return f"## {title}\n\n{counts}\n\n{table(rows)}\n"


def document(causal: list[Row], vision: list[Row]) -> str:
    return f"""# Families

Written by `make families`, with transformers {transformers.__version__}. Every family is built tiny, in fp32, with
random weights and biases, and with a scale or a softcap on its logits where its config has one.

* exact: logits, and the gradients of all parameters, are the model's own.
* refused: they are not, or the model is of another kind; `UnsupportedModel` says so before training.
* not built: no tiny model could be made of its config, or its own forward or backward failed on text alone. That says
  nothing about the family.

Any model, of whatever family, is compared with its own logits on its first batch (`check_head`).

{section("Causal LMs", causal)}
{section("Vision-language models, on text", vision)}"""


def main(names: list[str]) -> None:
    """Prints the rows of the causal LMs in `names`, or the whole document."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if names:
        print(table(map(try_family, names)))
        return
    causal = [try_family(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    vision = [try_family(name, AutoModelForImageTextToText) for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]
    print(document(causal, vision), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
