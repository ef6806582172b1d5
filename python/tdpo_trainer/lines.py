"""Preference pairs in JSON Lines: what is wrong with a file is said with the line and the field. Imports no package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from json.decoder import WHITESPACE
from pathlib import Path

FIELDS = ("prompt", "chosen", "rejected")
TEXT, MESSAGES = "a string", "messages (objects with a role, and content that is text or blocks)"
PROMPTS = ("instruction", "question", "query", "input")  # what others call it
BOM = b"\xef\xbb\xbf"


class BadPair(ValueError):
    """Say what is not a preference pair, and where it stands."""


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the values of a JSON file, each with where it stands (``"pairs.jsonl, line 7"``), as they are written.

    By line, one line is in memory at a time; an array, or objects of several lines, are read whole.
    """
    if not _is_by_line(path):
        whole = _decoded(path, path.read_bytes().removeprefix(BOM))
        values = whole[0] if len(whole) == 1 and isinstance(whole[0], list) else whole
        yield from ((f"{path}, row {number}", value) for number, value in enumerate(values, 1))
        return
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        yield from ((where, value) for value in _decoded(where, line.rstrip(b"\r\n")))


def check_pairs(records: Iterable[tuple[str, object]], texts: bool = False) -> int:
    """Return how many pairs there are, all as TRL takes them and alike: texts or messages, with a prompt or without.

    A text as prompt and messages that begin with it are taken, too (as UltraFeedback has them).

    Args:
        texts: only texts with a prompt will do.

    Raises:
        BadPair: for the first that is anything else, and where chosen and rejected are equal in all pairs.
    """
    count, equal, fields, wanted, said = 0, 0, FIELDS, (TEXT, TEXT), False
    for where, record in records:
        if not count and not texts and isinstance(record, dict):
            fields, said = FIELDS if "prompt" in record else FIELDS[1:], says_prompt_twice(record)
            answers = MESSAGES if isinstance(record.get("chosen"), list) else TEXT
            wanted = TEXT if said else answers, answers
            _refuse_a_prompt_by_another_name(where, record)
        check_pair(where, record, fields, wanted)
        if "prompt" not in fields and "prompt" in record:
            raise BadPair(f"{where}: field 'prompt' is there, and was not in the pairs before")
        if said and not says_prompt_twice(record):
            raise BadPair(f"{where}: field 'prompt' is a text with which chosen and rejected do not begin; wanted that")
        if (said or "prompt" not in fields) and record["chosen"][:1] != record["rejected"][:1]:
            raise BadPair(f"{where}: chosen and rejected have no common start, which would be the prompt")
        count, equal = count + 1, equal + (record["chosen"] == record["rejected"])
    if count and equal == count:
        raise BadPair(f"{where}: chosen and rejected are equal in all {count} pairs, of which nothing is learned")
    return count


def says_prompt_twice(record: Mapping[str, object]) -> bool:
    """Return whether the prompt is a text, and the first message of a user in chosen and rejected as well."""
    prompt, answers = record.get("prompt"), (record.get("chosen"), record.get("rejected"))
    if not isinstance(prompt, str) or not all(map(_is_messages, answers)):
        return False
    asked = (next((x.get("content") for x in answer if x["role"] == "user"), None) for answer in answers)
    return all(x == prompt for x in asked)


def check_pair(
    where: str, record: object, fields: Sequence[str] = FIELDS, wanted: tuple[str, str] = (TEXT, TEXT)
) -> None:
    """Raise BadPair unless `record` is an object whose prompt and answers are what is `wanted`, TEXT or MESSAGES."""
    if not isinstance(record, dict):
        raise BadPair(f"{where}: got {_kind(record)}, wanted an object with the fields {', '.join(fields)}")
    for name in fields:
        if name not in record:
            seen = ", ".join(record) or "none"
            raise BadPair(f"{where}: field '{name}' is missing: got {seen}, wanted {', '.join(fields)}")
        value, kind = record[name], wanted[name != "prompt"]
        if not (isinstance(value, str) if kind == TEXT else _is_messages(value)):
            raise BadPair(f"{where}: field '{name}' is {_kind(value)}, wanted {kind}")


def _refuse_a_prompt_by_another_name(where: str, record: Mapping[str, object]) -> None:
    """Raise BadPair where there is no prompt but a field that is one by another name, which would be dropped."""
    other = next((name for name in PROMPTS if name in record), None)
    if other and "prompt" not in record:
        raise BadPair(f"{where}: field 'prompt' is missing, and there is '{other}'; wanted it renamed to prompt")


def _is_by_line(path: Path) -> bool:
    """Return False where a file is one array, or begins with an object of several lines."""
    first = next((line for _, line in _lines(path)), b"").decode(errors="replace").strip()
    if first.startswith("["):
        return False
    try:
        json.JSONDecoder().raw_decode(first)
    except json.JSONDecodeError as error:
        return not first or error.pos < len(first)
    return True


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered from 1, without blank ones and a byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                yield number, line


def _decoded(where: object, text: bytes) -> list[object]:
    """Return the values: one, or more where files were joined and no newline lay between."""
    decoder, found = json.JSONDecoder(object_pairs_hook=_object), []
    try:
        line = text.decode()
        at = WHITESPACE.match(line).end()
        while at < len(line):
            value, at = decoder.raw_decode(line, at)
            at = WHITESPACE.match(line, at).end()
            found.append(value)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in line.strip() else ""
        raise BadPair(f"{where}: not JSON in UTF-8: {error.msg} ({place}column {error.colno})") from error
    except ValueError as error:
        raise BadPair(f"{where}: not JSON in UTF-8: {error}") from error
    return found


def _object(items: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(items)
    if len(made) < len(items):
        name = next(name for i, (name, _) in enumerate(items) if name in dict(items[:i]))
        raise ValueError(f"field '{name}' is specified twice")
    return made


def _is_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(x: object) -> bool:
    """Return whether x has a role and says something: a text, blocks, or calls of tools."""
    if not isinstance(x, dict) or "role" not in x:
        return False
    content = x.get("content")
    return isinstance(content, (str, list)) or (content is None and x.get("tool_calls") is not None)


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
