"""Token ids of prompts and completions, for the plain trainer and for loops of one's own. Imports no package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Ids = tuple[int, ...]


def tokenize(tokenizer: Any, pairs: Iterable[Mapping[str, str]]) -> list[dict[str, list[int]]]:
    """Return rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` from texts ``prompt``, ``chosen``, ``rejected``.

    The prompt is tokenised apart, so that both completions follow the very same prompt.

    Raises:
        ValueError: if the tokenizer makes no token of a prompt.
    """
    by = dict(prompt=prompt_ids, chosen=completion_ids, rejected=completion_ids)
    return [{f"{name}_ids": [*ids_of(tokenizer, pair[name])] for name, ids_of in by.items()} for pair in pairs]


def prompt_ids(tokenizer: Any, prompt: str) -> Ids:
    """Return ids with what the tokenizer puts in front (a BOS), unless a template has done so, and nothing behind.

    An EOS that is written in the prompt stays.
    """
    bare, ids = (tuple(tokenizer(prompt, add_special_tokens=add).input_ids) for add in (False, True))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bare[:1] == (bos,):
        return bare
    if len(ids) > len(bare) and ids[-1] == eos and ids[-1 - len(bare) : -1] == bare:
        ids = ids[:-1]
    if not ids:
        raise ValueError(f"prompt: the tokenizer makes no token of {prompt!r}, wanted one or more")
    return ids


def completion_ids(tokenizer: Any, text: str) -> Ids:
    """Return ids that end with one EOS, whether the text has it or not."""
    ids, end = tuple(tokenizer(text, add_special_tokens=False).input_ids), tokenizer.eos_token_id
    return ids if ids[-1:] == (end,) else (*ids, end)
