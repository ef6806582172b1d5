"""Preference pairs: read from JSONL, turned into token ids, split by prompt, collated into batches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from tdpo_trainer.lines import FIELDS, BadPair, check_pair, records
from tdpo_trainer.tokens import pair_ids
from torch import Tensor

IGNORED = -100
Ids = tuple[int, ...]
T = TypeVar("T")


class UsageError(Exception):
    """Something the person who called the script can mend; shown without a traceback."""


@dataclass(frozen=True)
class TextPair:
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Pair:
    """Token ids. The completions carry their end-of-sequence token, unless they were cut short."""

    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass(frozen=True, eq=False)
class Batch:
    """``(rows, L)`` each, padded on the right. For pairs: the P chosen rows first, then their rejected partners."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Return what the model's own forward takes."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


def read_pairs(path: Path, at_most: int | None = None) -> list[TextPair]:
    """The pairs of a JSONL file. Whatever is wrong with it is reported with the line it is on."""
    try:
        return [_text_pair(where, record) for where, record in records(path)][:at_most]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except BadPair as error:
        raise UsageError(str(error)) from error


def _text_pair(where: str, record: object) -> TextPair:
    check_pair(where, record)
    for name in FIELDS:
        if not record[name].strip():
            raise UsageError(f"{where}: field '{name}' is empty, wanted some text")
    return TextPair(*(record[name] for name in FIELDS))


def split_by_prompt(
    pairs: Sequence[TextPair], rng: Random, share: float = 0.1
) -> tuple[list[TextPair], list[TextPair]]:
    """Training and held-out pairs that have no prompt in common, else the held-out accuracy would flatter.

    A prompt that would hold out more than half of the pairs stays in training; of two prompts, one never does.
    """
    sizes = Counter(pair.prompt for pair in pairs)
    names = sorted(sizes)
    rng.shuffle(names)
    wanted, held, count = max(1, round(share * len(pairs))), set[str](), 0
    for name in reversed(names):
        if count < wanted and 2 * (count + sizes[name]) <= len(pairs):
            held.add(name)
            count += sizes[name]
    return [pair for pair in pairs if pair.prompt not in held], [pair for pair in pairs if pair.prompt in held]


def prompt_ids(tokenizer, prompt: str) -> Ids:
    """Return ids with whatever the tokenizer puts in front (a BOS), once, and without what it may put behind."""
    return tuple(pair_ids(tokenizer, prompt)[0])


def completion_ids(tokenizer, text: str) -> Ids:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return tuple(ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id])


def encode(tokenizer, pairs: Sequence[TextPair], max_length: int) -> list[Pair]:
    """Return token ids as both trainers make them (`tdpo_trainer.tokens`).

    Past `max_length` the prompt keeps its end, at most half of the room, and the completion its beginning.
    """
    encoded, cut = [], 0
    for pair in pairs:
        prompt, chosen, rejected = map(tuple, pair_ids(tokenizer, pair.prompt, pair.chosen, pair.rejected))
        if not prompt:
            raise UsageError(f"the tokenizer makes no token of the prompt {pair.prompt!r}")
        if len(prompt) + max(len(chosen), len(rejected)) > max_length:
            cut += 1
            prompt = prompt[-(max_length // 2) :]
            chosen, rejected = (ids[: max_length - len(prompt)] for ids in (chosen, rejected))
        encoded.append(Pair(prompt, chosen, rejected))
    if cut:
        print(f"warning: {cut} of {len(pairs)} pairs were cut to {max_length} tokens (--max-length)", file=sys.stderr)
    return encoded


def collate(pairs: Sequence[Pair], pad: int, device: torch.device) -> Batch:
    """The layout `fused_tdpo_loss` wants: chosen rows, then rejected rows, prompts and padding ignored."""
    rows = [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]
    return collate_rows(rows, pad, device)


def collate_rows(rows: Sequence[tuple[Ids, Ids]], pad: int, device: torch.device) -> Batch:
    """Rows of (prompt, completion). Lengths make the mask, so a pad token that is also the EOS does no harm."""
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    input_ids = torch.full((len(rows), length), pad)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORED)
    for row, (prompt, completion) in enumerate(rows):
        end = len(prompt) + len(completion)
        input_ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
        mask[row, :end] = 1
    return Batch(input_ids.to(device), mask.to(device), labels.to(device))


def draw(items: Sequence[T], size: int, steps: int, rng: Random) -> Iterator[list[T]]:
    """`steps` lists of at most `size` items, epoch after epoch, each epoch in a new order."""
    queue: list[T] = []
    for _ in range(steps):
        if len(queue) < min(size, len(items)):
            queue = rng.sample(list(items), len(items))
        batch, queue = queue[:size], queue[size:]
        yield batch
