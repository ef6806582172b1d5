"""Preference pairs by the name a person gives: a file of their own, a folder, or a dataset of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Json,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowInvalid

from .lines import (
    FIELDS,
    MESSAGES,
    TEXT,
    Layout,
    check_pairs,
    format_of,
    held_out,
    layout_of,
    prompt_apart,
    records,
    refuse_other_prompt,
    renamed,
)
from .tokens import added_by, once, say_left_out

FILES = (".jsonl", ".json", ".csv", ".parquet")
OTHERS = ("image", "images", "tools", "chat_template_kwargs")  # what else TRL reads
Pairs = Dataset | IterableDataset


def load_pairs(
    name: str, split: str = "train", config: str | None = None, streaming: bool = False, texts: bool = False,
    columns: Mapping[str, str] | None = None,
) -> Pairs:  # fmt: skip
    """Return rows of ``prompt``, ``chosen`` and ``rejected``, texts or messages, as they are written.

    A prompt that only the other two hold is parted from them, as TRL does. Pairs are checked: all of a JSON or CSV
    file, streamed or not; of anything else the rows, unless they are streamed: then the first.

    Args:
        name: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, the first three also compressed, ``.jsonl.gz``; a
            folder written by ``save_to_disk`` or holding data files; or the name of a dataset on the hub.
        split: of a folder or a hub dataset.
        texts: only texts will do, with a prompt; else lists of messages, too.
        columns: the data's own names of ``prompt``, ``chosen`` and ``rejected``, where they are others.

    Raises:
        ValueError: no such file or split, or what is not preference pairs, naming the line or row, and the field.
    """
    path = Path(name)
    if path.is_file() and format_of(path) not in FILES:
        raise ValueError(f"dataset_name: got {name}, wanted a file ending in {', '.join(FILES)}")
    if format_of(path) in FILES and not path.is_file():
        raise ValueError(f"dataset_name: got {name}, and there is no such file")
    if path.is_file() and format_of(path) != ".parquet":
        return _from_records(path, streaming, texts, columns)
    if path.is_file():
        pairs = _load(name, load_dataset, "parquet", data_files=str(path), split="train", streaming=streaming)
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        pairs = _split(load_from_disk(name), split, name)
    else:
        pairs = _split(_load(name, load_dataset, name, config, streaming=streaming), split, name)
    if columns:
        first = dict.fromkeys(pairs.column_names or next(iter(pairs), {}))
        pairs = pairs.select_columns([x for x in first if x in columns.values() or x not in columns])
        renamed(name, first, columns)
        pairs = pairs.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs != ours})
    layout = _check(pairs, name, texts)
    return _with_prompt(pairs, layout)


def mixture(parts: Sequence[Pairs], fractions: Sequence[float | None]) -> Pairs:
    """Return pairs of several places one after the other.

    fractions: each part's share of all, as TRL has it: they are normalised to a sum of 1, and as many first pairs of
        each are taken as its share allows without taking any twice. All None: all pairs of all.

    Raises:
        ValueError: some have a fraction and some not, or the parts are streams with fractions, or not alike.
    """
    given = [x for x in fractions if x is not None]
    if given and (len(given) < len(fractions) or min(given) <= 0):
        raise ValueError(f"datasets: got fractions {list(fractions)}, wanted a positive one for each or none")
    if given and not all(isinstance(part, Dataset) for part in parts):
        raise ValueError("datasets: got fractions with dataset_streaming, wanted one of them")
    parts = [part.select_columns([x for x in part.column_names if x in (*FIELDS, *OTHERS)]) for part in parts]
    try:
        parts = [part if part.features == parts[0].features else part.cast(parts[0].features) for part in parts]
    except (ValueError, TypeError, ArrowInvalid) as error:
        raise ValueError("datasets: got texts and messages, or other columns beside them, wanted all alike") from error
    if given:
        total = min(len(part) * sum(given) / share for part, share in zip(parts, given, strict=True))
        takes = [round(total * share / sum(given)) for share in given]
        parts = [part.select(range(take)) for part, take in zip(parts, takes, strict=True)]
    return concatenate_datasets(list(parts))


def hold_out(pairs: Pairs, share: float) -> tuple[Dataset, Dataset]:
    """Return training and evaluation pairs that share no prompt, the same ones whatever the seed.

    `share`: a part below 1, or a number of pairs; fewer are held out where prompts have several.
    """
    if not isinstance(pairs, Dataset):
        raise ValueError("test_split_size: got it with dataset_streaming, wanted eval_dataset_name")
    if not 0 < share < len(pairs):
        raise ValueError(f"test_split_size: got {share:g}, wanted a part below 1 or fewer than {len(pairs)} pairs")
    wanted = max(1, round(share * len(pairs)) if share < 1 else int(share))
    held = held_out(pairs["prompt"][:], wanted)
    if not held or len(held) == len(pairs):
        raise ValueError(f"test_split_size: got {share:g} of pairs of a single prompt, wanted prompts for both parts")
    return pairs.select([i for i in range(len(pairs)) if i not in held]), pairs.select(sorted(held))


def prepared(prepare: Callable[..., Pairs], pairs: Pairs, processing_class: object, args: object, name: str) -> Pairs:
    """Return token ids by TRL's own `prepare`, without a BOS or EOS twice, and say what it dropped.

    Raises:
        ValueError: what would end in a traceback (pairs of another form, no chat template), or no pair left.
    """
    layout = _check(pairs, f"{name}_dataset", False)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if layout.wanted == MESSAGES and not getattr(processing_class, "chat_template", None):
        raise ValueError(f"{name}_dataset: got messages, and the tokenizer has no chat_template, wanted one or texts")
    if layout.wanted == TEXT and getattr(tokenizer, "eos_token", None) is None:
        raise ValueError(f"{name}_dataset: got texts, and the tokenizer has no eos_token to end them with, wanted one")
    made = prepare(_with_prompt(pairs, layout), processing_class, args, name)
    if isinstance(made, Dataset):
        made = _with_room(made, args) if len(made) == len(pairs) else made  # older versions of TRL drop none
        say_left_out(f"{name}_dataset", len(pairs), len(made), args.max_length)
    front, back = added_by(tokenizer)
    if layout.wanted == MESSAGES or not (front or back):
        return made
    return made.map(once, fn_kwargs={"front": front, "back": back})


def _with_room(made: Dataset, args: Any) -> Dataset:
    """Return the pairs whose prompt leaves room for a completion, where sequences lose their end."""
    if args.max_length is None or args.truncation_mode != "keep_start":
        return made
    column = made.with_format("arrow", columns=["prompt_ids"])
    lengths = np.concatenate([x["prompt_ids"].combine_chunks().value_lengths().to_numpy() for x in column.iter(1024)])
    return made if (lengths < args.max_length).all() else made.select(np.flatnonzero(lengths < args.max_length))


def _from_records(path: Path, streaming: bool, texts: bool, columns: Mapping[str, str] | None) -> Pairs:
    """Return rows whose types are those of the file: nothing guesses that a string is a date."""
    others: set[str] = set()

    def seen() -> Iterator[tuple[str, object]]:
        for where, record in records(path, columns):
            others.update(set(OTHERS) & set(record) if isinstance(record, dict) else ())
            yield where, record

    layout = check_pairs(str(path), seen(), texts)
    kind = Value("string") if layout.wanted == TEXT else List(Json())
    features = Features(dict.fromkeys(FIELDS, kind) | {name: Json() for name in sorted(others)})
    arguments = {"path": str(path.resolve()), "layout": tuple(layout), "others": tuple(sorted(others))}
    arguments["columns"] = tuple((columns or {}).items())
    if streaming:
        return IterableDataset.from_generator(_rows, features=features, gen_kwargs=arguments)
    written = path.stat()  # a changed file is another one to the cache of `datasets`
    arguments["written"] = (written.st_mtime_ns, written.st_size)
    return _load(str(path), Dataset.from_generator, _rows, features=features, gen_kwargs=arguments)


def _rows(
    path: str, layout: tuple, others: tuple[str, ...], columns: tuple, written: tuple[int, int] | None = None
) -> Iterator[dict]:
    for _, record in records(Path(path), dict(columns)):
        row = {name: record[name] for name in FIELDS} if "prompt" in layout[0] else prompt_apart(record)
        yield row | {name: record.get(name, {} if name == "chat_template_kwargs" else None) for name in others}


def _load(name: str, load: Callable[..., Pairs], *args: object, **kwargs: object) -> Pairs:
    try:
        return load(*args, **kwargs)
    except (DatasetGenerationError, ValueError, StopIteration) as error:  # the last where there is nothing in a file
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"{name}: cannot be read: {reason or 'it is empty'}") from error


def _split(data: Pairs | DatasetDict | IterableDatasetDict, split: str, name: str) -> Pairs:
    if not isinstance(data, dict):
        return data
    if split not in data:
        raise ValueError(f"{name}: got splits {', '.join(data)}, wanted {split!r}")
    return data[split]


def _with_prompt(pairs: Pairs, layout: Layout) -> Pairs:
    if "prompt" in layout.fields:
        return pairs
    return (pairs.remove_columns("prompt") if layout.repeated else pairs).map(prompt_apart)


def _check(pairs: Pairs, name: str, texts: bool) -> Layout:
    """Return what all rows look like; of a stream, what the first does."""
    first = next(iter(pairs), None)
    columns = pairs.column_names or list(first or ())
    if not {"chosen", "rejected"} <= set(columns):
        raise ValueError(f"{name}: got columns {', '.join(columns)}, wanted prompt, chosen and rejected")
    refuse_other_prompt(name, columns)
    if not isinstance(pairs, Dataset):
        return layout_of(f"{name}, row 1", first, texts)
    rows = pairs.select_columns([field for field in FIELDS if field in columns])
    return check_pairs(name, ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1)), texts)
