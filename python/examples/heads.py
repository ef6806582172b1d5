"""Where a Hugging Face causal LM is cut in two: a backbone that ends in hidden states, a head that makes logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pairs import Batch, UsageError
from torch import Tensor, nn

from tdpo_kernels import LMHead


def last_hidden(model: nn.Module, batch: Batch) -> Tensor:
    """``(rows, L, D)``, what the model's own head would be given."""
    out = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return out.last_hidden_state


def lm_head(model: nn.Module) -> LMHead:
    """The output embedding, with the softcap (Gemma 2) or scale (Cohere, Granite) its family puts on the logits.

    Exactly an ``nn.Linear``: a wrapper shows its base layer's weight as its own, and what it adds would be left out.
    """
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise UsageError(f"its LM head is a {kind}, wanted a torch.nn.Linear: merge an adapter, or leave the head out")
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return LMHead(head.weight, getattr(head, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def check_head(model: nn.Module, batch: Batch, tolerance: float = 1e-3) -> None:
    """Refuse a model whose logits are not ``lm_head(last_hidden)``: it would train on the wrong numbers."""
    name = type(model).__name__
    model.eval()
    row = Batch(*(x[:1, : int(batch.attention_mask[0].sum())] for x in vars(batch).values()))
    try:
        hidden, head = last_hidden(model, row), lm_head(model)
        ours = _logits(hidden, head)
    except (AttributeError, RuntimeError, TypeError, UsageError) as error:
        raise UsageError(f"{name}: no backbone and linear LM head to be found: {error}") from error
    theirs = model(input_ids=row.input_ids, attention_mask=row.attention_mask, use_cache=False).logits.float()
    worst, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    if not worst <= tolerance * max(size, 1.0):
        seen = f"off by {worst:.3g}, wanted at most {tolerance:g} of the largest logit, {size:.3g}"
        raise UsageError(f"{name}: its logits are not its LM head times its last hidden state: {seen}")


def _logits(hidden: Tensor, head: LMHead) -> Tensor:
    z = head.logit_scale * F.linear(hidden, head.weight, head.bias).float()
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
