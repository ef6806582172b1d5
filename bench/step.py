"""Measure a whole training step of a model with random weights in a plain loop, and the longest context that fits.

A step is two models up to their hidden states, the loss, backward, AdamW. Only the loss differs between providers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import measure, memory
from .conditions import Conditions, Neighbours
from .problem import Problem
from .providers import PROVIDERS, Step
from .rows import Row
from .run import row
from .shapes import Shape

WHO = ("eager", "trl", "ours@512MB", "ours@0")


class Size(NamedTuple):
    V: int
    D: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    length: int  # of the sequences that are timed
    limit: int  # bytes that the longest context may take above model, gradients and optimiser
    device: str = "cpu"
    dtype: str = "float32"
    pairs: int = 2
    tied: bool = False


SIZES = {
    "tiny": Size(32000, 256, 688, 4, 4, 4, 512, 10**9),
    "smallest": Size(500, 32, 64, 1, 2, 2, 32, 2 * 10**8, device="", pairs=1),
    "qwen2.5-0.5b": Size(151936, 896, 4864, 24, 14, 2, 2048, 40 * 10**9, "cuda", "bfloat16", tied=True),
    "llama-3.2-1b": Size(128256, 2048, 8192, 16, 32, 8, 2048, 40 * 10**9, "cuda", "bfloat16", tied=True),
}
QUICK = ("smallest",)
UNIT, TRIES = 16, 6  # of the search for the longest context: tokens, and measurements
AIM, ENOUGH, LEAP = 0.97, 0.92, 8.0  # at so much of the limit, content with so much, at most so many times longer


def absent(size: str, names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Return who cannot make a step there, and why not."""
    lacks = "" if find_spec("transformers") else "transformers is not installed"
    return {name: why for name in names if (why := lacks or PROVIDERS[name].unavailable(shape_of(size), device))}


def study(
    name: str, who: list[str], rounds: int, conditions: Conditions, tick: Callable[[int], None], device: torch.device
) -> list[Row]:
    """Return a provider's step at the size's own length, and its longest context. `tick` is told of each row."""
    size, shape, missing = SIZES[name], shape_of(name), absent(name, who, device)
    same = dict(dtype=size.dtype, rounds=rounds, conditions=conditions)
    runnable = [n for n in who if n not in missing]
    rows = [row(shape, n, note=f"skipped: {why}", **same) for n, why in missing.items()]
    tick(len(missing))
    if not runnable:
        return rows
    loop, neighbours = Loop(size, device), Neighbours()
    steps = {n: loop.step(n, size.length) for n in runnable}
    samples = measure.times(steps, lambda: None, device, rounds, 1, lambda: None)
    busy = neighbours.cores()
    del loop, steps
    for n in runnable:
        seconds, peak = measure.spread(s.both for s in samples[n]), peak_of(name, n, size.length, device)
        rows.append(row(shape, n, seconds=seconds, peak_extra_bytes=peak, busy_cores=busy, **same))
        rows.append(_longest(name, n, peak, device, same))
        tick(2)
    return rows


def shape_of(name: str, length: int | None = None) -> Shape:
    size = SIZES[name]
    tokens = 2 * size.pairs * (size.length if length is None else length)
    return Shape(f"step {name}", tokens, size.V, size.D, "a whole training step", WHO, 1, pairs=size.pairs)


def context_name(name: str) -> str:
    return f"context {name}"


def _longest(name: str, provider: str, peak: int | None, device: torch.device, same: dict) -> Row:
    """Return the longest of sequences whose step was measured to stay within the limit. T is what it says."""
    size = SIZES[name]

    def peak_at(length: int) -> int:
        return peak if length == size.length else peak_of(name, provider, length, device)

    length, held = (None if peak is None else search(peak_at, size.length, size.limit)) or (0, None)
    facts = dict(limit_bytes=size.limit, peak_extra_bytes=held, note=None if length else "no context was found to fit")
    return row(replace(shape_of(name, length), name=context_name(name)), provider, **facts, **same)


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


def peak_of(size: str, provider: str, length: int, device: torch.device) -> int | None:
    """Return the peak of one step above model, gradients and optimiser state."""
    if device.type == "cuda":
        return _measure(size, provider, length, device)
    return memory.in_a_process_of_its_own("bench.step", size, provider, str(length))


def _measure(name: str, provider: str, length: int, device: torch.device) -> int:
    loop = Loop(SIZES[name], device)
    first, step = loop.step(provider, UNIT), loop.step(provider, length)
    first.backward(first.forward())  # brings in libraries, and makes the optimiser's state

    return memory.peak(lambda: step.backward(step.forward()), device)


class Loop:
    """Hold a policy, its frozen copy and an optimiser, and make steps of them by provider."""

    def __init__(self, size: Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.device = size, device
        self.policy = _model(size).to(device, getattr(torch, size.dtype))
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-5)

    def step(self, provider: str, length: int) -> Step:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(self.size.V, (2 * self.size.pairs, length + 1), generator=generator).to(self.device)
        inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()

        def forward() -> Tensor:
            hidden = self.policy.model(input_ids=inputs, use_cache=False).last_hidden_state
            with torch.no_grad():
                ref_hidden = self.reference.model(input_ids=inputs, use_cache=False).last_hidden_state
            heads = (self.policy.lm_head.weight, self.reference.lm_head.weight)
            return PROVIDERS[provider].make(Problem(hidden, heads[0], ref_hidden, heads[1], labels)).forward()

        return Step(forward, self._update)

    def _update(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients stay: they are not what is compared


def _model(size: Size) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.V, hidden_size=size.D, intermediate_size=size.intermediate, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, tie_word_embeddings=size.tied,
        max_position_embeddings=2**20, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    size_name, provider_name, sequence_length = sys.argv[1:]
    print(_measure(size_name, provider_name, int(sequence_length), torch.device("cpu")))
