"""Make a whole training step of a model with random weights in a plain loop, and search the longest context that fits.

A step is two models up to their hidden states, the loss, backward, AdamW. Only the loss differs between providers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .problem import Problem, Step, make_problem
from .shapes import Shape

UNIT, TRIES = 16, 6  # of the search for the longest context: tokens, and measurements
AIM, ENOUGH, LEAP = 0.97, 0.92, 8.0  # at so much of the limit, content with so much, at most so many times longer


class Training:
    """Stand in for a `Problem` whose steps are whole ones: a policy, its frozen copy and an optimiser."""

    def __init__(self, shape: Shape, dtype: str, device: torch.device | str) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = dict(vocab_size=shape.V, hidden_size=shape.D, max_position_embeddings=2**20)
        config = LlamaConfig(**sizes, **shape.model, bos_token_id=None, eos_token_id=None)
        self.policy = LlamaForCausalLM(config).to(device, getattr(torch, dtype))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        if not shape.trainable:
            inject_adapter_in_model(LoraConfig(r=16, target_modules=["q_proj", "v_proj"]), self.policy)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)
        sequences, length = 2 * shape.pairs, shape.T // (2 * shape.pairs)
        self.tokens = torch.randint(shape.V, (sequences, length + 1)).to(device)
        self.device = self.tokens.device
        self._update(self.policy(self.tokens[:, :UNIT]).logits.logsumexp(-1).mean())  # makes the optimiser's state

    def step(self, make: Callable[[Problem], Step]) -> Step:
        """Return a step with a provider's loss."""
        inputs, labels = self.tokens[:, :-1], self.tokens[:, 1:].contiguous()

        def forward() -> Tensor:
            hidden = self.policy.model(input_ids=inputs, use_cache=False).last_hidden_state
            with torch.no_grad():
                ref_hidden = self.reference.model(input_ids=inputs, use_cache=False).last_hidden_state
            heads = (self.policy.lm_head.weight, self.reference.lm_head.weight)
            return make(Problem(hidden, heads[0], ref_hidden, heads[1], labels)).forward()

        return Step(forward, self._update)

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay: they are not what is compared

    def clear(self) -> None:
        """Leave the gradients: the update sets them to zero."""

    def gradients(self) -> dict[str, Tensor]:
        """Return none, for they were there before the step."""
        return {}


def setup(shape: Shape, dtype: str, device: torch.device | str) -> Problem | Training:
    """Return what steps of the shape are made of."""
    return (Training if shape.model else make_problem)(shape, dtype, device)


def longest(shape: Shape, peak: Callable[[Shape], int]) -> dict:
    """Return the longest context whose step was measured to stay within the limit, as facts of a row."""
    sequences = 2 * shape.pairs
    found = search(lambda length: peak(replace(shape, T=sequences * length)), shape.T // sequences, shape.limit)
    length, held = found or (0, None)
    note = None if found else "no context was found to fit"
    return {"T": sequences * length, "limit_bytes": shape.limit, "peak_extra_bytes": held, "note": note}


def search(peak_of: Callable[[int], int], length: int, limit: int) -> tuple[int, int] | None:
    """Return the longest length tried whose measured peak is within the limit, and that peak.

    Memory grows by about as much for each token, so one measurement tells where the next should be.
    """
    best, tried = None, set()
    while length >= UNIT and length not in tried and len(tried) < TRIES:
        tried.add(length)
        held = peak_of(length)
        if held <= limit:
            best = max(best or (0, 0), (length, held))
        if ENOUGH * limit <= held <= limit:
            break
        length = int(length * min(AIM * limit / max(held, 1), LEAP)) // UNIT * UNIT
    return best
