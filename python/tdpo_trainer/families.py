"""Which families of transformers' causal LMs can be trained: each is built tiny, with random weights, and tried.

``python -m tdpo_trainer.families > FAMILIES.md`` writes the table; with names it tries only those. A family is *exact*
when its logits and the gradients of all its parameters are those of `head.run_backbone` and `head.head_pair`, in fp32.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from .head import UnsupportedModel, _accepted, _compare, head_pair, logits, run_backbone

LARGEST = 5_000_000  # parameters: what is larger was not made tiny
VOCABULARY = 48
EXACT = "exact"

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCABULARY),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "num_blocks", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff"), 48),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "ffn_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_target_positions"), 64),
    **dict.fromkeys(("image_size",), 16),
    **dict.fromkeys(("patch_size",), 8),
}
"""What makes a config tiny, by the names that families use."""

ON_LOGITS = dict(
    logit_scale=0.25, output_multiplier=0.5, lm_head_multiplier=2.0, logits_scaling=4.0, final_logit_softcapping=2.0,
    logits_soft_cap=2.0, output_logit_soft_cap=2.0, softcap=2.0,
)  # fmt: skip
"""What families do to their logits: their defaults are often 1 or None, which would try nothing."""

SPECIAL: dict[str, dict[str, Any]] = {}
"""What a family needs besides."""


@dataclass(frozen=True)
class Row:
    """One line of the table. ``scale`` and ``softcap`` are what the tiny model's config puts on its logits."""

    family: str
    model: str
    head: str
    verdict: str


def causal_families() -> list[str]:
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a family at a size that builds in a moment."""
    return _tiny(CONFIG_MAPPING[family], SPECIAL.get(family, {}))


def _tiny(cls: type[PreTrainedConfig], special: Mapping[str, Any]) -> PreTrainedConfig:
    known = cls().to_dict()
    sizes = {name: value for name, value in SIZES.items() if known.get(name) is not None}
    sizes |= {name: value for name, value in ON_LOGITS.items() if name in known}
    parts = {name: _tiny(part, {}) for name, part in cls.sub_configs.items() if hasattr(part, "to_dict")}
    return cls(**(sizes | parts | special))


def tiny_model(family: str) -> nn.Module:
    """In fp32 and eval mode, on random weights, biases included: zeros would hide what is left out."""
    config = tiny_config(family)
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(x.numel() for x in cls(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters are not tiny")
    torch.manual_seed(0)
    model = cls(config).float().eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.05 * torch.randn_like(x))
    return model


def tiny_inputs() -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def try_family(family: str) -> Row:
    """Builds, runs and compares. Whatever a family's code raises is its line in the table."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    try:
        model, inputs = tiny_model(family), tiny_inputs()
        _own(model, inputs)
    except Exception as error:  # as many kinds as there are families
        return Row(family, name, "", f"not built: {_first_line(error)}")
    try:
        head = _compare_with_own(model, inputs)
    except Exception as error:
        return Row(family, name, "", f"refused: {_first_line(error)}")
    return Row(family, name, head, EXACT)


def _own(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**_accepted(model, inputs)).logits


def _compare_with_own(model: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """Raises where logits or gradients differ. Returns what the head is like."""
    theirs = _own(model, inputs)
    pull = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    want = _gradients(model, theirs, pull)
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
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(logits.float(), list(parameters.values()), pull, allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(parameters.items(), grads, strict=True)
    }


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].replace("|", "/")
    return f"{type(error).__name__}: {line[:160]}"


def table(rows: Iterable[Row]) -> str:
    """Markdown, in the order of the rows: exact ones, then refused ones, then those that could not be built."""
    lines = ["| family | class | head | verdict |", "|---|---|---|---|"]
    return "\n".join(lines + [line(row) for row in rows])


def line(row: Row) -> str:
    return f"| {row.family} | {row.model} | {row.head} | {row.verdict} |"


def document(rows: list[Row]) -> str:
    exact, refused = (sum(row.verdict.startswith(x) for row in rows) for x in (EXACT, "refused"))
    rows = sorted(rows, key=lambda row: (row.verdict != EXACT, not row.verdict.startswith("refused"), row.family))
    return f"""# Families

transformers {transformers.__version__}, torch {torch.__version__.partition("+")[0]}: of {len(rows)} families of causal LMs
{exact} are exact, {refused} are refused, and {len(rows) - exact - refused} were not built at a tiny size, which says nothing
about them. Exact: logits, and the gradients of all parameters, are the model's own, in fp32, on random weights. Refused:
`UnsupportedModel` says so before training. Any model is checked in the same way on its first batch (`check_head`).

Written by `make families`.

{table(rows)}
"""


def main(names: list[str]) -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = [try_family(name) for name in names or causal_families()]
    print(table(rows) if names else document(rows), end="\n" if names else "")


if __name__ == "__main__":
    main(sys.argv[1:])
