"""Build tiny models from configs, a batch of pairs, and TDPO as published, in plain torch, for tests of trainers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
)

V, P, L = 37, 4, 7
SIZES = dict(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WITHOUT_HEAD_DIM = {name: size for name, size in SIZES.items() if name != "head_dim"}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "cohere": lambda: CohereConfig(**WITHOUT_HEAD_DIM, logit_scale=0.25),
    "granite": lambda: GraniteConfig(**WITHOUT_HEAD_DIM, logits_scaling=4.0),
    "phi": lambda: PhiConfig(**WITHOUT_HEAD_DIM),  # a bias on its head
    "mixtral": lambda: MixtralConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=2, output_router_logits=True, experts_implementation="eager"
    ),
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def batch(pairs: int = P, seed: int = 1) -> dict[str, Tensor]:
    """Chosen rows, then rejected; lengths and prompts differ, padding on the right."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (2 * pairs, L), generator=g)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(2 * pairs):
        end, prompt = L - row % 3, 1 + row % 2
        mask[row, end:] = 0
        labels[row, end:] = labels[row, :prompt] = -100
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def share(whole: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The rank's pairs: its chosen rows, then their rejected partners."""
    size = len(whole["labels"]) // 2 // world
    mine = torch.arange(rank * size, (rank + 1) * size)
    rows = torch.cat([mine, mine + len(whole["labels"]) // 2])
    return {name: x[rows] for name, x in whole.items()}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def published_loss(
    z: Tensor, r: Tensor, labels: Tensor, beta: float = 0.1, alpha: float | None = None, variant: str = "tdpo2",
    sft_weight: float = 0.0, length_normalized: bool = False,
) -> Tensor:  # fmt: skip
    """Return TDPO of whole ``(2P, L, V)`` logits, as in the paper's repository, and the two terms beside it."""
    z, r, labels = z[:, :-1].double(), r[:, :-1].double(), labels[:, 1:]
    counts = labels != -100
    log_p, log_q = F.log_softmax(z, -1), F.log_softmax(r, -1)
    pick = labels.masked_fill(~counts, 0)[..., None]
    lengths = counts.sum(-1)
    each = 1 / lengths if length_normalized else torch.ones_like(lengths)
    margin = ((log_p - log_q).gather(-1, pick)[..., 0] * counts).sum(-1) * each
    kl = ((log_q.exp() * (log_q - log_p)).sum(-1) * counts).sum(-1) * each
    nll = -((log_p.gather(-1, pick)[..., 0] * counts).sum(-1) / lengths).chunk(2)[0]
    (chosen, rejected), (kl_chosen, kl_rejected) = margin.chunk(2), kl.chunk(2)
    alpha = 0.5 if alpha is None else alpha
    d = kl_rejected - kl_chosen if variant == "tdpo1" else alpha * (kl_rejected - kl_chosen.detach())
    return (-F.logsigmoid(beta * (chosen - rejected - d)) + sft_weight * nll).mean()


def published_gradients(policy: nn.Module, z: Tensor, r: Tensor, labels: Tensor, more: Tensor | float = 0.0):
    """The loss, and the gradient of every parameter that requires one, by name."""
    loss = published_loss(z, r.detach(), labels) + more
    named = {name: x for name, x in policy.named_parameters() if x.requires_grad}
    return loss.detach(), dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
