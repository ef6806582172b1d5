"""Preference pairs from files: what TRL takes is taken, and what it would fail on is said, with the line or row."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from tdpo_trainer.data import hold_out, load_pairs
from tdpo_trainer.lines import check_pairs, records

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ASKED, SAID, TOLD = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))
CALL = {"role": "assistant", "tool_calls": []}
CHAT = {"prompt": [TOLD, ASKED], "chosen": [SAID], "rejected": [CALL]}
BLOCKS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
IMPLICIT = {"chosen": "a b", "rejected": "a c"}
IN_BOTH = {"prompt": "a", "chosen": [TOLD, ASKED, SAID], "rejected": [TOLD, ASKED, CALL]}
TWICE = json.dumps(PAIR)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()
    yield
    enable_progress_bars()


def without_prompt(pair: dict) -> dict:
    return {name: value for name, value in pair.items() if name != "prompt"}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "pair",
    [
        PAIR, {"chosen": "a b", "rejected": "a c"}, CHAT, CHAT | {"prompt": [BLOCKS]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, CALL]}, PAIR | {"prompt": "", "rejected": ""},
        PAIR | {"score": float("nan"), "images": [], "tools": None},
    ],
    ids=["texts", "implicit", "chat", "blocks", "implicit_chat", "empty", "more_columns"],
)  # fmt: skip
def test_every_format_of_trl_is_taken(pair: dict, streaming: bool, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(pair)}\n{json.dumps(pair)}\n")
    assert len(list(load_pairs(str(path), streaming=streaming))) == 2


@pytest.mark.parametrize(
    "text",
    [
        f"[{TWICE}, {TWICE}]", json.dumps([PAIR, PAIR], indent=1),
        json.dumps(PAIR, indent=1) + "\n" + json.dumps(PAIR, indent=1), f"\ufeff{TWICE}\n\n  \n{TWICE}",
        f"{TWICE}\r\n{TWICE}\r\n", f"{TWICE}\r{TWICE}", f"{TWICE}{TWICE}\n",
    ],
    ids=["array", "lines_of_an_array", "objects_of_lines", "blank_lines", "crlf", "cr", "joined_files"],
)  # fmt: skip
def test_every_layout_of_json_is_taken(text: str, tmp_path: Path):
    path = tmp_path / "pairs.json"
    path.write_bytes(text.encode())
    assert load_pairs(str(path)).to_list() == [PAIR, PAIR]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "first, second, said",
    [
        (PAIR, without_prompt(PAIR), "field 'prompt' is missing"),
        (IMPLICIT, IMPLICIT | {"prompt": "a"}, "field 'prompt' is there, and was not in the pairs before"),
        (PAIR, PAIR | {"chosen": 7}, "field 'chosen' is a number, wanted a string"),
        (PAIR, PAIR | {"rejected": None}, "field 'rejected' is null, wanted a string"),
        (PAIR, PAIR | {"chosen": [SAID]}, "field 'chosen' is an array, wanted a string"),
        (CHAT, CHAT | {"chosen": "b"}, "field 'chosen' is a string, wanted messages (objects with a role, and content"),
        (CHAT, CHAT | {"chosen": [{"role": "assistant"}]}, "field 'chosen' is an array, wanted messages"),
        (IN_BOTH, IN_BOTH | {"prompt": "b"}, "field 'prompt' is a text with which chosen and rejected do not begin"),
        (CHAT, CHAT | {"chosen": []}, "field 'chosen' is an array, wanted messages"),
        (CHAT, CHAT | {"chosen": [{"from": "gpt", "value": "b"}]}, "field 'chosen' is an array, wanted messages"),
        (CHAT, PAIR, "field 'prompt' is a string, wanted messages"),
        (IMPLICIT, {"chosen": "b", "rejected": "c"}, "chosen and rejected have no common start"),
        (without_prompt(IN_BOTH), {"chosen": [TOLD, SAID], "rejected": [ASKED, SAID]}, "chosen and rejected have no"),
        (PAIR, None, "got null, wanted an object with the fields prompt, chosen, rejected"),
    ],
)
def test_a_line_that_is_not_like_the_first_is_named(first, second, said: str, streaming: bool, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(first)}\n\n{json.dumps(second)}\n")
    with pytest.raises(ValueError) as caught:
        load_pairs(str(path), streaming=streaming)
    assert str(caught.value).startswith(f"{path}, line 3: {said}")


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.json", "folder"])
def test_a_row_of_another_file_is_named(name: str, tmp_path: Path):
    rows = Dataset.from_list([PAIR, PAIR, PAIR | {"rejected": None}])
    path = tmp_path / name
    if name == "pairs.json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        rows.to_parquet(path) if path.suffix else rows.save_to_disk(path)
    with pytest.raises(ValueError, match=r"row 3: field 'rejected' is null, wanted a string") as caught:
        load_pairs(str(path))
    assert str(caught.value).startswith(f"{path}, row 3: ")


@pytest.mark.parametrize("pair, said", [(without_prompt(PAIR), "'prompt' is missing"), (CHAT, "'prompt' is an array")])
def test_only_texts_where_only_texts_will_do(pair: dict, said: str, tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    Dataset.from_list([pair]).to_parquet(tmp_path / "pairs.parquet")
    for name, where in (("pairs.jsonl", "line 1"), ("pairs.parquet", "row 1")):
        with pytest.raises(ValueError, match=f"{name}, {where}: field {said}"):
            load_pairs(str(tmp_path / name), texts=True)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "got no pairs"), (" \n", "got no pairs"), ("[]", "got no pairs"), (f"[{TWICE}, oh", "not JSON in UTF-8"),
        (TWICE.replace('"b"', '"b", "chosen": "d"'), "specified twice"), ("{'prompt'", "line 1: not JSON in UTF-8"),
        (json.dumps(PAIR | {"chosen": "c"}), "chosen and rejected are equal in all 1 pairs"),
        (json.dumps(without_prompt(PAIR) | {"instruction": "a"}), "there is 'instruction'; wanted it renamed"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_the_file(text: str, said: str, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_pairs(str(path))
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


LOOKS = ("2021-03-04", "2020-01-02T03:04:05", "12:30:00", "7", "1e5", "true", "null", "NaN", "-inf")


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_texts_stay_as_they_are_written_whatever_they_look_like(layout: str, streaming: bool, tmp_path: Path):
    texts = [{"prompt": x, "chosen": x, "rejected": f"{x} "} for x in LOOKS]
    chats = [{name: [{"role": "user", "content": x}] for name, x in pair.items()} for pair in texts]
    for rows in (texts, chats):
        path = tmp_path / f"{layout}.json"
        path.write_text(json.dumps(rows) if layout == "array" else "\n".join(map(json.dumps, rows)))
        assert list(load_pairs(str(path), streaming=streaming)) == rows


def test_a_file_of_dates_is_refused_rather_than_trained_on(tmp_path: Path):
    rows = [{"role": "user", "content": datetime(2021, 3, 4, n)} for n in (0, 1)]
    Dataset.from_list([{"prompt": rows[:1], "chosen": rows[:1], "rejected": rows[1:]}]).save_to_disk(tmp_path / "pairs")
    with pytest.raises(ValueError, match="row 1: field 'prompt' is an array, wanted messages .* content that is text"):
        load_pairs(str(tmp_path / "pairs"))


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_prompt_that_is_in_both_conversations_is_said_once(streaming: bool, tmp_path: Path):
    """UltraFeedback's layout."""
    (tmp_path / "pairs.jsonl").write_text(json.dumps(IN_BOTH))
    (row,) = load_pairs(str(tmp_path / "pairs.jsonl"), streaming=streaming)
    assert "prompt" not in row and row["chosen"][1]["content"] == "a"


@pytest.mark.parametrize("kind", ["text", "implicit", "chat"])
@pytest.mark.parametrize("share", [0.25, 10])
def test_what_is_held_out_shares_no_prompt_with_training(kind: str, share: float):
    """The same pairs in any order, four answers a prompt."""

    def row(prompt: int, answer: int) -> dict:
        start = f"q {prompt} " if kind == "implicit" else ""
        asked = {"text": f"q {prompt} ", "chat": [ASKED | {"content": f"q {prompt} "}]}.get(kind)
        said = {name: f"{start}{name} {answer}" for name in ("chosen", "rejected")}
        return {"id": prompt, **({} if asked is None else {"prompt": asked}), **said}

    pairs = Dataset.from_list([row(prompt, answer) for prompt in range(10) for answer in range(4)])
    training, held = hold_out(pairs, share)
    assert not {*training["id"]} & {*held["id"]} and len(training) + len(held) == 40 and len(held) == 12
    assert sorted(hold_out(pairs.select(range(39, -1, -1)), share)[1]["id"]) == sorted(held["id"])
    with pytest.raises(ValueError, match="pairs with one prompt"):
        hold_out(pairs.select([0, 1]), 1)


def test_a_file_is_read_line_by_line(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{TWICE}\n{TWICE}\noh\n")
    found = records(path)
    assert next(found) == (f"{path}, line 1", PAIR)
    assert check_pairs([next(found)]) == 1
