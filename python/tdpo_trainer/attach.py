"""A reference cache in the training data: each row says which pair of which cache is its, the collator fetches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset
from torch import Tensor

from .cache import CacheError, ReferenceCache
from .step import Batch

COLUMNS = ("ref_cache", "ref_row")


def attach(dataset: Dataset, cache: ReferenceCache) -> Dataset:
    """Return the dataset with the columns that `CachedCollator` looks for."""
    name, rows = COLUMNS
    dataset = dataset.add_column(name, [str(cache.directory)] * len(dataset))
    return dataset.add_column(rows, list(range(len(dataset))))


def is_attached(dataset: Dataset) -> bool:
    return set(COLUMNS) <= set(dataset.column_names)


@dataclass
class CachedCollator:
    """`collate`, and ``ref_hidden (2P, L, E)`` for rows that were attached to one of `caches`."""

    collate: Callable[[list[dict]], Batch]
    caches: dict[str, ReferenceCache] = field(default_factory=dict)

    def __call__(self, examples: list[dict]) -> Batch:
        places = [tuple(example.get(name) for name in COLUMNS) for example in examples]
        plain = [{name: x for name, x in example.items() if name not in COLUMNS} for example in examples]
        batch = self.collate(plain)
        if all(place == (None, None) for place in places):
            return batch
        pairs = [self.caches[name].pair(row) for name, row in places]
        states = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        return {**batch, "ref_hidden": placed(states, batch["completion_mask"])}


def placed(states: list[Tensor], completion_mask: Tensor) -> Tensor:
    """``(2P, L, E)``: states back where they predict from, zero elsewhere.

    Raises:
        CacheError: their number is not the number of completion tokens.
    """
    hidden = states[0].new_zeros(*completion_mask.shape, states[0].shape[-1])
    for row, (mine, mask) in enumerate(zip(states, completion_mask[:, 1:].bool(), strict=True)):
        if len(mine) != int(mask.sum()):
            raise CacheError(f"a pair has {len(mine)} states for {int(mask.sum())} completion tokens; delete the cache")
        hidden[row, :-1][mask] = mine
    return hidden
