"""Preference pairs in JSON Lines: what is wrong with a file is said with the line and the field. Imports no package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from json.decoder import WHITESPACE
from pathlib import Path

FIELDS = ("prompt", "chosen", "rejected")
TEXT, MESSAGES = "a string", "messages (objects with a role)"
BOM = b"\xef\xbb\xbf"


class BadPair(ValueError):
    """Say what is not a preference pair, and where it stands."""


def is_by_line(path: Path) -> bool:
    """False where a file is one array, or begins with an object of several lines: also JSON, but not by line."""
    first = next((line for _, line in _lines(path)), b"").decode(errors="replace").strip()
    if first.startswith("["):
        return False
    try:
        json.JSONDecoder().raw_decode(first)
    except json.JSONDecodeError as error:
        return not first or error.pos < len(first)
    return True


def records(path: Path) -> Iterator[tuple[str, object]]:
    """The values of a file, each with where it stands (``"pairs.jsonl, line 7"``); one line is in memory at a time."""
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            yield from ((where, value) for value in _values(line.decode().rstrip("\r\n")))
        except json.JSONDecodeError as error:
            raise BadPair(f"{where}: not JSON in UTF-8: {error.msg} (column {error.colno})") from error
        except UnicodeDecodeError as error:
            raise BadPair(f"{where}: not JSON in UTF-8: {error}") from error


def check_pairs(records: Iterable[tuple[str, object]], texts: bool = False) -> int:
    """Return how many pairs there are, all as TRL takes them and alike: texts or messages, with a prompt or without.

    `texts`: only texts with a prompt will do. Raises BadPair for the first that is anything else.
    """
    count, fields, wanted = 0, FIELDS, TEXT
    for where, record in records:
        if not count and not texts and isinstance(record, dict):
            fields = FIELDS if "prompt" in record else FIELDS[1:]
            wanted = MESSAGES if isinstance(record.get("chosen"), list) else TEXT
        check_pair(where, record, fields, wanted)
        if "prompt" not in fields and "prompt" in record:
            raise BadPair(f"{where}: field 'prompt' is there, and was not in the pairs before")
        count += 1
    return count


def check_pair(where: str, record: object, fields: Sequence[str] = FIELDS, wanted: str = TEXT) -> None:
    """Raises BadPair unless `record` is an object whose `fields` are what is `wanted`, TEXT or MESSAGES."""
    if not isinstance(record, dict):
        raise BadPair(f"{where}: got {_kind(record)}, wanted an object with the fields {', '.join(fields)}")
    for name in fields:
        if name not in record:
            seen = ", ".join(record) or "none"
            raise BadPair(f"{where}: field '{name}' is missing: got {seen}, wanted {', '.join(fields)}")
        value = record[name]
        if not (isinstance(value, str) if wanted == TEXT else _is_messages(value)):
            raise BadPair(f"{where}: field '{name}' is {_kind(value)}, wanted {wanted}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without blank ones and a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _values(line: str) -> Iterator[object]:
    """One; more where files were joined and no newline lay between."""
    decoder, at = json.JSONDecoder(), WHITESPACE.match(line).end()
    while at < len(line):
        value, at = decoder.raw_decode(line, at)
        yield value
        at = WHITESPACE.match(line, at).end()


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and "role" in x for x in value)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
