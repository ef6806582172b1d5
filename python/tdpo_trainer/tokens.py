"""Token ids of texts, for both trainers and the examples: what a tokenizer adds is there once, in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from .lines import check_pair

Ids = list[int]
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


def added_by(tokenizer: Any) -> tuple[Ids, Ids]:
    """Return the ids that the tokenizer itself puts in front of a text and behind it (a BOS, an EOS)."""
    full, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    at = next(i for i in range(len(full) + 1) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


def once(row: Mapping[str, Ids], front: Ids, back: Ids) -> dict[str, Ids]:
    """Return a tokenised pair without what the tokenizer put in front of a text that has it, or behind the text's EOS.

    `front`, `back`: as of `added_by`.
    """
    return {"prompt_ids": _once(row["prompt_ids"], front), **{name: _without(row[name], back) for name in COLUMNS[1:]}}


def pair_ids(tokenizer: Any, prompt: str, *completions: str) -> list[Ids]:
    """Return ids of a prompt, and of each completion with its EOS, tokenised together.

    As in TRL, completions begin where prompt and any of the whole texts no longer agree, so where a token lies across
    the boundary it is the completion's. Nothing is added that the texts have, and the prompt ends as it is written.
    """
    return _ids(tokenizer, *added_by(tokenizer), prompt, *completions)


def tokenize(
    tokenizer: Any, pairs: Iterable[Mapping[str, str]], max_length: int | None = None
) -> list[dict[str, Ids]]:  # fmt: skip
    """Return rows of token ids from rows of text under ``prompt``, ``chosen``, ``rejected``; completions end with EOS.

    They are the ids that TRL makes. Pairs whose prompt fills `max_length` are left out, and counted in a printed line.
    """
    front, back = added_by(tokenizer)
    rows = []
    for number, pair in enumerate(pairs, 1):
        check_pair(f"row {number}", pair)
        ids = _ids(tokenizer, front, back, *(pair[name] for name in ("prompt", "chosen", "rejected")))
        rows.append(dict(zip(COLUMNS, ids, strict=True)))
    kept = [row for row in rows if max_length is None or len(row["prompt_ids"]) < max_length]
    say_left_out("pairs", len(rows), len(kept), max_length)
    return kept


def say_left_out(name: str, before: int, after: int, max_length: int | None) -> None:
    """Print how many pairs were left out because their prompt leaves no room; raise where that is all."""
    if before and not after:
        raise ValueError(
            f"{name}: got {before} pairs, each with a prompt that fills max_length={max_length}, wanted shorter ones"
        )
    if after < before:
        print(f"{name}: {before - after} of {before} left out, their prompt fills max_length={max_length}", flush=True)


def _ids(tokenizer: Any, front: Ids, back: Ids, prompt: str, *completions: str) -> list[Ids]:
    if tokenizer.eos_token is None:
        raise ValueError(f"tokenizer: got {type(tokenizer).__name__} without an EOS token, wanted one to end texts")
    end = tokenizer.eos_token
    alone = _without(tokenizer(prompt).input_ids, back)
    wholes = [tokenizer(prompt + text.removesuffix(end) + end).input_ids for text in completions]
    at = min((_agreeing(alone, whole) for whole in wholes), default=len(alone))
    return [_once(alone[:at], front), *(_without(whole[at:], back) for whole in wholes)]


def _once(prompt: Ids, front: Ids) -> Ids:
    return prompt[len(front) :] if prompt[: 2 * len(front)] == front * 2 else prompt


def _agreeing(first: Ids, second: Ids) -> int:
    return sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))


def _without(ids: Ids, back: Ids) -> Ids:
    return ids[: -len(back)] if back and ids[-len(back) :] == back else ids
