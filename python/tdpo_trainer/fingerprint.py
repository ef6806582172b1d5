"""Digest what a reference cache depends on, part by part, so that a stale one is refused with what changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .adapters import names_of_adapters
from .cache import CacheError

PROBED = 32  # pairs, about
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
OF_LOADING = frozenset(
    {
        "_name_or_path", "architectures", "base_model_name_or_path", "dtype", "inference_mode", "peft_version",
        "revision", "torch_dtype", "transformers_version", "use_cache",
    }
)  # fmt: skip


def of_dataset(dataset: Dataset) -> str:
    """Digest the token ids of a dataset's pairs, in order, however the dataset was made."""
    digest = blake2b(digest_size=16)
    for table in dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(1024):
        for name in COLUMNS:
            column = table.column(name).combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(column.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()


def of_layout(collate: Callable[[list[dict]], Mapping[str, Tensor]], dataset: Dataset) -> str:
    """Digest what the collator makes of some pairs and of the longest: tokens, masks, and what else it adds.

    Padding on the right does not count, for no state depends on it.
    """
    count = len(dataset)
    rows = sorted({*range(0, count, -(-count // PROBED)), count - 1, _longest(dataset)} if count else ())
    digest = blake2b(digest_size=16)
    for row in rows:
        batch = collate([dataset[row]])
        there = batch["attention_mask"].bool()
        width = int(there.any(0).nonzero().max()) + 1 if there.any() else 0
        for name, x in sorted(batch.items()):
            x = x.masked_fill(~there, 0) if name == "input_ids" else x
            x = x[:, :width] if x.shape[:2] == there.shape else x
            digest.update(f"{name} {x.dtype} {tuple(x.shape)} {x.tolist()}".encode())
    return digest.hexdigest()


def _longest(dataset: Dataset) -> int:
    tables = dataset.select_columns(list(COLUMNS)).with_format("arrow").iter(1024)
    columns = ([table.column(name).combine_chunks().value_lengths() for name in COLUMNS] for table in tables)
    lengths = [sum(map(np.asarray, three)) for three in columns]
    return int(np.concatenate(lengths).argmax())


def of_model(model: nn.Module) -> str:
    """Digest the weights that the reference computes with: a PEFT model's without adapters, but for one named "ref"."""
    digest = blake2b(digest_size=16)
    for name, x in _weights(model):
        if x.is_meta or hasattr(x, "ds_id") or hasattr(x, "full_tensor"):
            raise CacheError(
                "reference_cache: the model's weights are sharded or absent where they are fingerprinted; wanted them "
                "whole when the trainer is made (zero3_init_flag: false), or no reference_cache"
            )
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    left_out = names_of_adapters(model, but="ref")
    every = [*model.named_parameters(), *model.named_buffers()]
    return ((name, x) for name, x in sorted(every, key=lambda item: item[0]) if name not in left_out)


def of_config(model: nn.Module) -> str:
    """Digest what weights do not say: the class, the configuration, and the scaling of a "ref" adapter."""
    base = model.get_base_model() if is_peft_model(model) else model
    adapter = getattr(model, "peft_config", {}).get("ref")
    parts = [type(base).__name__, _lasting(base.config.to_dict()), _lasting(adapter.to_dict()) if adapter else None]
    return of_strings([json.dumps(parts, sort_keys=True, default=_plain)])


def _lasting(config: Any) -> Any:
    """Without where it was loaded from and by what, at every depth."""
    if not isinstance(config, dict):
        return config
    return {name: _lasting(x) for name, x in config.items() if name not in OF_LOADING}


def _plain(x: object) -> Any:
    return sorted(map(str, x)) if isinstance(x, set) else str(x)


def of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest a vocabulary, its special tokens, and, for a fast tokenizer, all it does to a text."""
    parts = [
        type(tokenizer).__name__,
        sorted(tokenizer.get_vocab().items()),
        sorted(map(str, tokenizer.all_special_tokens)),
    ]
    if getattr(tokenizer, "is_fast", False):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        parts.append({name: part for name, part in state.items() if name not in ("padding", "truncation")})
    return of_strings([json.dumps(parts, sort_keys=True, default=str)])


def of_strings(texts: Iterable[str | None]) -> str:
    digest = blake2b(digest_size=16)
    for text in texts:
        digest.update(repr(text).encode())
    return digest.hexdigest()
