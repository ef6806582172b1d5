"""Say what a run's pairs are, from the token ids it trains on: how many, how long, and what is odd about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from .fingerprint import COLUMNS
from .kernels import explain_way


def report(made: Dataset, given: int, max_length: int | None, eos: int | None) -> dict[str, Any]:
    """Return the facts, by the names that `record.REPORT` has.

    Args:
        made: rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
        given: the number of pairs before those were dropped whose prompt fills `max_length`.
        eos: the token that ends a completion; one of nothing else is empty.
    """
    pairs, prompts, odd, lengths, longest = set(), set(), Counter(), [], 0
    for row in made.select_columns(list(COLUMNS)):
        pair = prompt, *completions = [tuple(row[name]) for name in COLUMNS]
        pairs.add(tuple(pair))
        prompts.add(prompt)
        odd["identical"] += completions[0] == completions[1]
        odd["empty"] += any(x in ((), (eos,)) for x in completions)
        totals = [len(prompt) + len(x) for x in completions]
        odd["truncated"] += max_length is not None and max(totals) > max_length
        lengths += map(len, completions)
        longest = max(longest, *totals)
    p50, p95, largest = (int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 95, 100))
    return {
        "pairs": len(made), "prompts": len(prompts), "dropped": given - len(made), "truncated": odd["truncated"],
        "duplicate": len(made) - len(pairs), "identical": odd["identical"], "empty": odd["empty"],
        "completion_tokens": {"p50": p50, "p95": p95, "max": largest},
        "longest_sequence": min(longest, max_length or longest),
    }  # fmt: skip


def with_loss(facts: Mapping[str, Any], args: Any, config: Any, dtype: torch.dtype, trained: bool) -> dict[str, Any]:
    """Return the facts, and which way the loss of a batch of the longest sequences goes."""
    pairs, config = args.per_device_train_batch_size, config.get_text_config()
    said = explain_way(
        2 * pairs * facts["longest_sequence"], pairs, config.vocab_size, config.hidden_size, dtype, trained=trained,
        memory_budget=args.memory_budget, device=args.device,
    )  # fmt: skip
    return {**facts, "loss": said}


def table(facts: Mapping[str, Any]) -> str:
    """Return the facts as lines, those that ask for a look marked."""
    words = {
        "pairs": "pairs", "prompts": "different prompts", "dropped": "dropped: the prompt fills max_length",
        "truncated": "longer than max_length, cut off", "duplicate": "repeat another pair",
        "identical": "chosen and rejected are the same", "empty": "with an empty completion",
    }  # fmt: skip
    odd = ("dropped", "truncated", "duplicate", "identical", "empty")
    lines = [f"{facts[name]:>9,}  {said}{'  <--' * (name in odd and facts[name] > 0)}" for name, said in words.items()]
    tokens = facts["completion_tokens"]
    most = f"95 %: {tokens['p95']:,}, at most {tokens['max']:,}"
    lines.append(f"{tokens['p50']:>9,}  tokens in a completion, median; {most}")
    return "\n".join([*lines, *([f"loss: {facts['loss']}"] if "loss" in facts else [])])


def data(argv: Sequence[str]) -> int:
    """Print the report of a run's pairs: its tokenizer and options, without its model."""
    from transformers import AutoConfig, AutoProcessor
    from trl import DPOTrainer

    from .data import prepared
    from .errors import OF_OPTIONS, said_in_one_line
    from .options import base_of, check, is_adapter, parse
    from .run import datasets

    argv = [*argv] if not argv or argv[0].startswith("-") else ["--dataset_name", *argv]
    with said_in_one_line("data", (*OF_OPTIONS, TypeError)):
        options, args, model = parse(argv, "data")
        check(options, args, model, "data")
        name = model.model_name_or_path
        base = base_of(name) if is_adapter(name) else name
        pairs, _ = datasets(options, args)
        if not isinstance(pairs, Dataset):
            raise ValueError("dataset_streaming: got it, wanted all pairs to be counted")
        reader = AutoProcessor.from_pretrained(base)
        holder = SimpleNamespace(_tokenizer=getattr(reader, "tokenizer", reader), _is_vlm=False)  # of some versions
        made = prepared(lambda *rest: DPOTrainer._prepare_dataset(holder, *rest), pairs, reader, args, "train")
        facts = report(made, len(pairs), args.max_length, holder._tokenizer.eos_token_id)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
        trained = not (model.use_peft or is_adapter(name))
        print(table(with_loss(facts, args, AutoConfig.from_pretrained(base), dtype, trained)))
    return 0
