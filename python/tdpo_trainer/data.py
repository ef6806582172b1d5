"""Preference pairs by the name a person gives: a file of their own, a folder, or a dataset of the hub."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import takewhile
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .lines import FIELDS, check_pairs, records, says_prompt_twice

JSON = (".jsonl", ".json")
READERS = (*JSON, ".parquet")
Pairs = Dataset | IterableDataset


def load_pairs(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False, texts: bool = False
) -> Pairs:
    """Return rows with ``chosen`` and ``rejected``, and ``prompt`` unless the other two hold it (as TRL takes them).

    All are checked: the lines of a JSONL file, streamed or not; of anything else the rows, unless they are streamed.
    Texts in JSON stay as they are written, whatever they look like: Arrow's own reader makes dates of some.

    Args:
        name: a ``.jsonl``, ``.json`` or ``.parquet`` file; a folder written by ``save_to_disk`` or holding data files;
            or the name of a dataset on the hub.
        split: of a folder or a hub dataset.
        texts: only texts will do, with a prompt; else lists of messages, too.

    Raises:
        ValueError: no such file or split, or what is not preference pairs, naming the line or row, and the field.
    """
    path = Path(name)
    if path.suffix.lower() in JSON and path.is_file():
        pairs = _load_json(path, streaming, texts)
    else:
        pairs = _load_other(name, path, split, config, streaming)
        _check_columns(pairs, name)
        if isinstance(pairs, Dataset):
            fields = [field for field in FIELDS if field in pairs.column_names]
            rows = ((f"{name}, row {number}", row) for number, row in enumerate(pairs.select_columns(fields), 1))
            _check(name, rows, texts)
    return pairs.remove_columns("prompt") if says_prompt_twice(next(iter(pairs))) else pairs


def _load_json(path: Path, streaming: bool, texts: bool) -> Pairs:
    if streaming:
        _check(str(path), records(path), texts)
        return IterableDataset.from_generator(_rows, gen_kwargs={"path": path})
    found = list(records(path))
    _check(str(path), found, texts)
    rows = [row for _, row in found]
    columns = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})


def _rows(path: Path) -> Iterator[object]:
    yield from (row for _, row in records(path))


def _check(name: str, rows: Iterable[tuple[str, object]], texts: bool) -> None:
    if not check_pairs(rows, texts):
        raise ValueError(f"{name}: got no pairs")


def _load_other(name: str, path: Path, split: str, config: str | None, streaming: bool) -> Pairs:
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise ValueError(f"dataset_name: got {name}, wanted a file ending in {', '.join(READERS)}")
        return _load(name, "parquet", data_files=str(path), split="train", streaming=streaming)
    if path.suffix.lower() in READERS:
        raise ValueError(f"dataset_name: got {name}, and there is no such file")
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _split(load_from_disk(name), split, name)
    return _split(_load(name, name, config, streaming=streaming), split, name)


def hold_out(pairs: Pairs, share: float) -> tuple[Dataset, Dataset]:
    """Return training and evaluation pairs, which have no prompt in common.

    Which prompts are held out depends on the prompts alone: the same at any seed, so that runs are compared on the same
    pairs and share a reference cache.

    Args:
        share: a part below 1, or a number of pairs; whole prompts are held out until there are as many.
    """
    if not isinstance(pairs, Dataset):
        raise ValueError("test_split_size: got it with dataset_streaming, wanted eval_dataset_name")
    if not 0 < share < len(pairs):
        raise ValueError(f"test_split_size: got {share:g}, wanted a part below 1 or fewer than {len(pairs)} pairs")
    prompts = [_prompt_of(row) for row in pairs.select_columns([x for x in FIELDS if x in pairs.column_names])]
    sizes, held, count = Counter(prompts), set[str](), 0
    wanted = max(1, round(share * len(pairs) if share < 1 else share))
    for prompt in sorted(sizes, key=lambda prompt: hashlib.sha256(prompt.encode()).digest()):
        if count < wanted and count + sizes[prompt] < len(pairs):
            held.add(prompt)
            count += sizes[prompt]
    if not held:
        raise ValueError(f"test_split_size: got {share:g} of pairs with one prompt, wanted eval_dataset_name")
    inside = [i for i, prompt in enumerate(prompts) if prompt in held]
    outside = [i for i, prompt in enumerate(prompts) if prompt not in held]
    return pairs.select(outside), pairs.select(inside)


def _prompt_of(row: dict) -> str:
    """Return the prompt, as a string; without one, what chosen and rejected begin with."""
    if "prompt" in row:
        return json.dumps(row["prompt"], sort_keys=True)
    same = takewhile(lambda both: both[0] == both[1], zip(row["chosen"], row["rejected"], strict=False))
    return json.dumps([x for x, _ in same], sort_keys=True)


def _load(name: str, *args: object, **kwargs: object) -> Pairs | DatasetDict | IterableDatasetDict:
    try:
        return load_dataset(*args, **kwargs)
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # the last where there is nothing in a file
        raise ValueError(f"{name}: cannot be read: {str(error.__cause__ or error) or 'it is empty'}") from error


def _split(data: Pairs | DatasetDict | IterableDatasetDict, split: str, name: str) -> Pairs:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(f"{name}: got splits {', '.join(data)}, wanted {split!r}")
    return data[split]


def _check_columns(pairs: Pairs, name: str) -> None:
    columns = pairs.column_names or list(next(iter(pairs), {}))
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(f"{name}: got columns {', '.join(columns)}, wanted prompt, chosen and rejected")
