"""Preference pairs as files hold them: strings are what is written, and what is wrong is said with line and field.

Imports no package. Both trainers' data and the examples' go through `check_pair`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from json.decoder import WHITESPACE
from pathlib import Path
from typing import BinaryIO, NamedTuple

FIELDS = ("prompt", "chosen", "rejected")
TEXT, MESSAGES = "a string", "messages (objects with a role and content)"
QUESTIONS = {"instruction", "question", "query", "input", "inputs", "context", "system", "problem", "request", "user"}
BOM = b"\xef\xbb\xbf"


class BadPair(ValueError):
    """Say what is not a preference pair, and where it stands."""


class Layout(NamedTuple):
    """Hold what all pairs of a file look like: TEXT or MESSAGES, and where the prompt is.

    `repeated`: beside a conversation's messages the prompt stands once more, as a string.
    """

    fields: tuple[str, ...] = FIELDS
    wanted: str = TEXT
    repeated: bool = False


TEXTS = Layout()


def format_of(path: Path) -> str:
    """Return the ending that says how a file is written, ``".jsonl"``, also where gzip has compressed it."""
    return Path(path.stem if path.suffix.lower() == ".gz" else path.name).suffix.lower()


def records(path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, object]]:
    """Yield the values of a file, each with where it stands (``"pairs.jsonl, line 7"``), a line in memory at a time.

    A JSON file that is one array, or objects of several lines, is read as a whole and its values are numbered as rows.
    `columns`: the file's names of fields, by the names that they get.
    """
    for where, value in _records(path):
        yield where, renamed(where, value, columns) if columns and isinstance(value, dict) else value


def renamed(where: str, record: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Return the record with the names of `columns`, which go before fields that have such a name already."""
    if missing := [theirs for theirs in columns.values() if theirs not in record]:
        raise BadPair(f"{where}: columns names {missing[0]!r}: got {', '.join(map(str, record)) or 'none'}")
    others = {name: value for name, value in record.items() if name not in {*columns, *columns.values()}}
    return others | {ours: record[theirs] for ours, theirs in columns.items()}


def _records(path: Path) -> Iterator[tuple[str, object]]:
    if format_of(path) == ".csv":
        yield from _rows_of_csv(path)
    elif _is_by_line(path):
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            yield from ((where, value) for value in _values(where, line))
    else:
        with _opened(path) as file:
            text = file.read().removeprefix(BOM)
        arrays = (x if isinstance(x, list) else [x] for x in _values(str(path), text))
        rows = (row for array in arrays for row in array)
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))


def check_pairs(name: str, records: Iterable[tuple[str, object]], texts: bool = False) -> Layout:
    """Return what the pairs look like: all alike, texts or messages, with a prompt or beginning with it.

    `texts`: only texts with a prompt will do. Raises BadPair for the first that is anything else.
    """
    layout, differ = None, False
    for where, record in records:
        layout = layout or layout_of(where, record, texts)
        check_pair(where, record, layout)
        differ = differ or record["chosen"] != record["rejected"]
    if layout is None:
        raise BadPair(f"{name}: got no pairs")
    if not differ:
        raise BadPair(f"{name}: chosen and rejected are the same in every pair, wanted a difference to learn")
    return layout


def layout_of(where: str, first: object, texts: bool = False) -> Layout:
    """Return what the first pair looks like, once it is one; `texts`: only texts with a prompt will do."""
    layout = TEXTS
    if isinstance(first, dict) and not texts:
        refuse_other_prompt(where, first)
        wanted = MESSAGES if isinstance(first.get("chosen"), list) else TEXT
        repeated = wanted == MESSAGES and isinstance(first.get("prompt"), str)
        layout = Layout(FIELDS if "prompt" in first and not repeated else FIELDS[1:], wanted, repeated)
    check_pair(where, first, layout)
    return layout


def check_pair(where: str, record: object, layout: Layout = TEXTS) -> None:
    """Raise BadPair unless `record` is an object whose fields are what `layout` says."""
    if not isinstance(record, dict):
        raise BadPair(f"{where}: got {_kind(record)}, wanted an object with the fields {', '.join(layout.fields)}")
    for name in layout.fields:
        if name not in record:
            seen = ", ".join(map(str, record)) or "none"
            raise BadPair(f"{where}: field '{name}' is missing: got {seen}, wanted {', '.join(layout.fields)}")
        if fault := _fault(record[name], layout.wanted):
            raise BadPair(f"{where}: field '{name}' {fault}, wanted {layout.wanted}")
    if "prompt" not in layout.fields:
        _check_start(where, record, layout.repeated)


def refuse_other_prompt(where: str, columns: Iterable[str]) -> None:
    """Raise BadPair where there is no prompt and a column of another name is likely to be it."""
    columns = list(columns)
    found = [name for name in columns if str(name).lower() in QUESTIONS]
    if "prompt" not in columns and found:
        raise BadPair(
            f"{where}: field 'prompt' is missing and '{found[0]}' would not be read: rename the column to prompt, or "
            "remove it if chosen and rejected begin with the prompt"
        )


def prompt_apart(record: Mapping[str, object]) -> dict[str, object]:
    """Return the pair with the common start of both completions as its prompt, as TRL parts them."""
    chosen, rejected = record["chosen"], record["rejected"]
    at = _common(chosen, rejected)
    at -= chosen[at - 1] == " "
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def held_out(prompts: Sequence[object], wanted: int) -> set[int]:
    """Return the indices of about `wanted` pairs (never more but for a single prompt's), whole prompts at a time.

    Which prompts depends on their text alone. One that only continues another counts as the same: the next turn of a
    dialogue, or an implicit prompt whose completions happen to begin alike. Of a single prompt, none is held out.
    """
    keys = [
        x if isinstance(x, str) else "".join(json.dumps(y, sort_keys=True, default=str) for y in x) for x in prompts
    ]
    roots: dict[str, str] = {}
    for key in sorted(set(keys)):
        last = next(reversed(roots.values()), None)
        roots[key] = last if last and key.startswith(last) and not key[len(last)].isalnum() else key
    sizes = Counter(roots[key] for key in keys)
    order = sorted(sizes, key=lambda root: hashlib.sha256(root.encode(errors="surrogatepass")).digest())
    held, count = set[str](), 0
    for root in order:
        if count + sizes[root] <= wanted:
            held.add(root)
            count += sizes[root]
    if not held and len(order) > 1:
        held.add(min(order, key=sizes.__getitem__))
    return {i for i, key in enumerate(keys) if roots[key] in held}


def _check_start(where: str, record: Mapping[str, object], repeated: bool) -> None:
    chosen, prompt = record["chosen"], record.get("prompt")
    start = chosen[: _common(chosen, record["rejected"])]
    if not repeated and "prompt" in record:
        raise BadPair(f"{where}: field 'prompt' is there, and was not in the pairs before")
    if not (start.strip() if isinstance(start, str) else start):
        raise BadPair(f"{where}: chosen and rejected do not begin alike, wanted the prompt in both or a field of it")
    if repeated and not any(_same(message.get("content"), prompt) for message in start):
        raise BadPair(
            f"{where}: field 'prompt' is {_kind(prompt)} that is not in the messages chosen and rejected begin with, "
            f"wanted them to begin with it, or {MESSAGES} in all three"
        )


def _same(content: object, prompt: object) -> bool:
    return isinstance(content, str) and isinstance(prompt, str) and content.strip() == prompt.strip()


def _common(chosen: Sequence, rejected: Sequence) -> int:
    """Return how many elements both begin with, and leave at least one to each."""
    same = sum(1 for _ in takewhile(lambda both: _said(both[0]) == _said(both[1]), zip(chosen, rejected, strict=False)))
    return max(0, min(same, len(chosen) - 1, len(rejected) - 1))


def _said(part: object) -> object:
    """Return a message without the keys that Arrow adds where other messages have them."""
    return {name: x for name, x in part.items() if x is not None} if isinstance(part, dict) else part


def _is_by_line(path: Path) -> bool:
    """Return False where a file is one array, or begins with an object of several lines: also JSON, but not by line."""
    first = next((line for _, line in _lines(path)), b"").decode(errors="replace").strip()
    if first.startswith("["):
        return False
    try:
        json.JSONDecoder().raw_decode(first)
    except json.JSONDecodeError as error:
        return not first or error.pos < len(first)
    return True


def _opened(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without blank ones and a byte order mark."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _values(where: str, text: bytes) -> Iterator[object]:
    """One; more where files were joined and no newline lay between."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    try:
        line = text.decode().rstrip("\r\n")
        at = WHITESPACE.match(line).end()
        while at < len(line):
            value, at = decoder.raw_decode(line, at)
            yield value
            at = WHITESPACE.match(line, at).end()
    except json.JSONDecodeError as error:
        raise BadPair(f"{where}: not JSON in UTF-8: {error.msg} (column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise BadPair(f"{where}: not JSON in UTF-8: {error}") from error
    except KeyError as error:
        raise BadPair(f"{where}: field {error} is specified twice") from error


def _object(members: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(members)
    if len(made) < len(members):
        raise KeyError(Counter(name for name, _ in members).most_common(1)[0][0])
    return made


def _rows_of_csv(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise BadPair(f"{where}: got more or fewer values than columns ({len(reader.fieldnames or ())})")
                yield where, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise BadPair(f"{path}: not CSV in UTF-8: {error}") from error


def _fault(value: object, wanted: str) -> str | None:
    """Return what keeps a field from being what is wanted, None where it is."""
    if wanted == TEXT or not isinstance(value, list):
        return None if wanted == TEXT and isinstance(value, str) else f"is {_kind(value)}"
    faults = (f"has {said} message {number}" for number, x in enumerate(value, 1) if (said := _fault_of_message(x)))
    return next(faults, None) if value else "is an empty array"


def _fault_of_message(message: object) -> str | None:
    if not isinstance(message, dict):
        return f"{_kind(message)} as"
    if not isinstance(message.get("role"), str):
        return "no role in"
    content = message.get("content")
    if content is None:
        return None if message.get("tool_calls") else "no content in"
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    odd = [text for text in texts if text is not None and not isinstance(text, str)]
    return f"{_kind(odd[0])} as content of" if odd else None


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
