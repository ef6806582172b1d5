"""Preference pairs from files: what TRL takes is taken, and what it would fail on is said, with the line or row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from tdpo_trainer.data import hold_out, load_pairs, prepared
from tdpo_trainer.lines import TEXT, check_pairs, records
from tdpo_trainer.tokens import tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ASKED, SAID, TOLD = ({"role": role, "content": "a"} for role in ("user", "assistant", "system"))
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
CHAT = {"prompt": [TOLD, ASKED], "chosen": [SAID], "rejected": [CALL]}
BLOCKS = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}
TWICE = json.dumps(PAIR)


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    disable_progress_bars()
    yield
    enable_progress_bars()


def without_prompt(pair: dict) -> dict:
    return {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    "pair",
    [
        PAIR, without_prompt(PAIR), CHAT, CHAT | {"prompt": [BLOCKS]},
        {"chosen": [ASKED, SAID], "rejected": [ASKED, CALL]}, PAIR | {"prompt": "", "rejected": ""},
        PAIR | {"score": float("nan"), "images": [], "tools": None, "made": "2021-03-04"},
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
        (without_prompt(PAIR), PAIR, "field 'prompt' is there, and was not in the pairs before"),
        (PAIR, PAIR | {"chosen": 7}, "field 'chosen' is a number, wanted a string"),
        (PAIR, PAIR | {"rejected": None}, "field 'rejected' is null, wanted a string"),
        (PAIR, PAIR | {"chosen": [SAID]}, "field 'chosen' is an array, wanted a string"),
        (CHAT, CHAT | {"chosen": "b"}, "field 'chosen' is a string, wanted messages (objects with a role and content)"),
        (CHAT, CHAT | {"chosen": []}, "field 'chosen' is an empty array, wanted messages"),
        (CHAT, CHAT | {"chosen": [{"from": "gpt", "value": "b"}]}, "field 'chosen' has no role in message 1, wanted"),
        (CHAT, PAIR, "field 'prompt' is a string, wanted messages"),
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
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_with_the_file(text: str, said: str, tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_pairs(str(path))
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


def test_a_file_is_read_line_by_line(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{TWICE}\n{TWICE}\noh\n")
    found = records(path)
    assert next(found) == (f"{path}, line 1", PAIR)
    assert check_pairs(str(path), [next(found)]).wanted == TEXT


ODD = ("2021-03-04", "12:30:00", "2021-03-04T12:30:00Z", "1e3", "007", "true", "null", "NaN")


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_a_string_stays_as_it_is_written(kind: str, streaming: bool, tmp_path: Path):
    for odd in ODD:
        said = [{"role": "assistant", "content": odd}]
        for pair in (dict(prompt=odd, chosen=odd, rejected="b"), dict(prompt=said, chosen=said, rejected=[SAID])):
            path = tmp_path / f"pairs{len(list(tmp_path.iterdir()))}.{kind}"
            if kind == "parquet":
                Dataset.from_list([pair]).to_parquet(path)
            elif kind != "csv":
                path.write_text(json.dumps(pair if kind == "jsonl" else [pair]))
            elif isinstance(pair["prompt"], str):
                with path.open("w") as file:
                    csv.writer(file).writerows([pair, pair.values()])
            if path.exists():
                assert list(load_pairs(str(path), streaming=streaming)) == [pair]


@pytest.mark.parametrize(
    "pair, said",
    [
        ({"instruction": "q", "chosen": "ab", "rejected": "ac"}, "'instruction' would not be read: rename the column"),
        ({"chosen": "b", "rejected": "c"}, "do not begin alike"),
        ({"chosen": [ASKED], "rejected": [ASKED]}, "do not begin alike"),
        (PAIR | {"rejected": "b"}, "the same in every pair"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, "no content in message 1"),
        ({"prompt": "z", "chosen": [ASKED, SAID], "rejected": [ASKED, CALL]}, "'prompt' is a string that is not in"),
    ],
)
def test_what_would_train_on_something_else_is_refused(pair: dict, said: str, tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    Dataset.from_list([pair]).to_parquet(tmp_path / "pairs.parquet")
    for name in ("pairs.jsonl", "pairs.parquet"):
        with pytest.raises(ValueError, match=said):
            load_pairs(str(tmp_path / name))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_a_prompt_within_the_conversations_is_taken_from_them(name: str, tmp_path: Path):
    pair = {"prompt": "a", "chosen": [ASKED, SAID], "rejected": [ASKED, TOLD]}
    path = tmp_path / name
    path.write_text(json.dumps(pair)) if name == "pairs.jsonl" else Dataset.from_list([pair]).to_parquet(path)
    assert load_pairs(str(path)).to_list() == [{"prompt": [ASKED], "chosen": [SAID], "rejected": [TOLD]}]


def test_whole_prompts_are_held_out():
    rows = [{"prompt": f"question {n % 10}", "chosen": str(n), "rejected": "b"} for n in range(40)]
    for share in (0.2, 8.0):
        trained, kept = hold_out(Dataset.from_list(rows), share)
        assert len(kept) == 8 and len(trained) == 32 and not {*trained["prompt"]} & {*kept["prompt"]}
        again = hold_out(Dataset.from_list(rows[::-1]), share)[1]
        assert {*again["prompt"]} == {*kept["prompt"]}
    with pytest.raises(ValueError, match="of a single prompt"):
        hold_out(Dataset.from_list([PAIR, PAIR]), 0.5)


def reader(kind: str, adds: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer of characters that puts `adds` around a text; sentencepiece's begins a text with a space."""
    letters = {x: i for i, x in enumerate(["<pad>", "<s>", "</s>", "<unk>", "\u2581", *"abcdefgh", "bc"])}
    made = Tokenizer(models.BPE(letters, [("b", "c")], unk_token="<unk>"))
    if kind == "sentencepiece":
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if adds != "$A":
        made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[("<s>", 1), ("</s>", 2)])
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
@pytest.mark.parametrize("adds", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("prompt", ["a", "a</s>", "<s>a", "ab"])
@pytest.mark.parametrize("chosen", ["d", "d</s>", "cd"])
def test_both_trainers_make_the_same_ids_and_add_nothing_twice(kind, adds, prompt, chosen, tmp_path: Path):
    tokenizer, pair = reader(kind, adds), {"prompt": prompt, "chosen": chosen, "rejected": "e"}
    (ours,) = tokenize(tokenizer, [pair])
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False)
    prepare = DPOTrainer._prepare_dataset.__get__(trainer)
    theirs = prepared(prepare, Dataset.from_list([pair]), tokenizer, args, "train")[0]
    assert ours == {name: theirs[name] for name in ours}
    whole = ours["prompt_ids"] + ours["chosen_ids"]
    assert whole.count(1) == ("<s>" in adds or "<s>" in prompt) and whole.count(2) == 1 + ("</s>" in prompt)


def test_pairs_without_room_are_counted_and_none_left_is_one_line(capsys: pytest.CaptureFixture[str]):
    tokenizer, rows = reader("bpe", "$A"), Dataset.from_list([PAIR, PAIR | {"prompt": "adadad"}])
    args = SimpleNamespace(dataset_num_proc=None, max_length=4, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False)
    prepare = DPOTrainer._prepare_dataset.__get__(trainer)
    assert len(prepared(prepare, rows, tokenizer, args, "train")) == len(tokenize(tokenizer, rows, 4)) == 1
    assert capsys.readouterr().out.count("1 of 2 left out, their prompt fills max_length=4") == 2
    with pytest.raises(ValueError, match="^eval_dataset: got 1 pairs, each with a prompt that fills max_length=4"):
        prepared(prepare, rows.select([1]), tokenizer, args, "eval")
    with pytest.raises(ValueError, match="no chat_template"):
        prepared(prepare, Dataset.from_list([CHAT]), tokenizer, args, "train")
