"""Preference pairs by the name a person gives: a file of their own, a folder, or a dataset of the hub."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .lines import FIELDS, check_pairs, is_by_line, records

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
Pairs = Dataset | IterableDataset


def load_pairs(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False, texts: bool = False
) -> Pairs:
    """Rows with ``chosen`` and ``rejected``, and ``prompt`` unless the other two hold it (as TRL takes them).

    All are checked: the lines of a JSONL file, streamed or not; of anything else the rows, unless they are streamed.

    Args:
        name: a ``.jsonl``, ``.json`` or ``.parquet`` file; a folder written by ``save_to_disk`` or holding data files;
            or the name of a dataset on the hub.
        split: of a folder or a hub dataset.
        texts: only texts will do, with a prompt; else lists of messages, too.

    Raises:
        ValueError: no such file or split, or what is not preference pairs, naming the line or row, and the field.
    """
    path = Path(name)
    reader = READERS.get(path.suffix.lower())
    by_line = reader == "json" and path.is_file() and is_by_line(path)
    if by_line and not check_pairs(records(path), texts):
        raise ValueError(f"{name}: got no pairs")
    if path.is_file():
        if reader is None:
            raise ValueError(f"dataset_name: got {name}, wanted a file ending in {', '.join(READERS)}")
        pairs = _load(name, reader, data_files=str(path), split="train", streaming=streaming)
    elif reader is not None:
        raise ValueError(f"dataset_name: got {name}, and there is no such file")
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        pairs = _split(load_from_disk(name), split, name)
    else:
        pairs = _split(_load(name, name, config, streaming=streaming), split, name)
    _check_columns(pairs, name)
    if not by_line and isinstance(pairs, Dataset):
        _check_rows(pairs, name, texts)
    return pairs


def hold_out(pairs: Pairs, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and evaluation pairs; `share` a part below 1, or a number of pairs."""
    if not isinstance(pairs, Dataset):
        raise ValueError("test_split_size: got it with dataset_streaming, wanted eval_dataset_name")
    if not 0 < share < len(pairs):
        raise ValueError(f"test_split_size: got {share:g}, wanted a part below 1 or fewer than {len(pairs)} pairs")
    parts = pairs.train_test_split(test_size=share if share < 1 else int(share), seed=seed)
    return parts["train"], parts["test"]


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


def _check_rows(pairs: Dataset, name: str, texts: bool) -> None:
    fields = [field for field in FIELDS if field in pairs.column_names]
    rows = ((f"{name}, row {number}", row) for number, row in enumerate(pairs.select_columns(fields), 1))
    if not check_pairs(rows, texts):
        raise ValueError(f"{name}: got no pairs")
