"""The demo of `python/examples`: end to end at a tiny size, and what it says to people with data of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import wraps
from pathlib import Path

import pytest
import torch

for needed in ("transformers", "tqdm", "matplotlib"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "python" / "examples"
GOOD = {"prompt": "the plot", "chosen": "was warm .", "rejected": "was dull ."}


@pytest.fixture(scope="module")
def demo():
    """The script as a module: an interpreter for each test would take most of the time."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import sentiment

        yield sentiment
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture
def call(demo, tmp_path, capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        status = demo.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def write(tmp_path):
    def write(*lines: object) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


def some_pairs(count: int) -> list[dict[str, str]]:
    places = "attic barn cellar den".split()
    prompts = [f"the {places[i % 4]} of house {i // 2}" for i in range(count)]
    return [{"prompt": x, "chosen": " was warm .", "rejected": " was cold and dull ."} for x in prompts]


@pytest.fixture(scope="module")
def model_directory(demo, tmp_path_factory) -> Path:
    """A GPT-2, to have a family that shares neither names nor head with the demo's own model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    directory = tmp_path_factory.mktemp("model")
    tokenizer = demo.models.small_tokenizer(" ".join(pair.values()) for pair in some_pairs(40))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_whole_experiment_runs_and_repeats_itself(tmp_path, call):
    tiny = "--steps 3 --sft-steps 12 --pairs 10 --batch 4 --seed 3".split()
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(EXAMPLES / "sentiment.py"), *tiny, "--out", str(tmp_path / "first")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = ("reward accuracy", "SeqKL chosen", "SeqKL rejected", "mean sentiment", "before", "after")
    assert all(words in done.stdout for words in (*said, "The loss was computed by backend "))
    assert (tmp_path / "first" / "curves.png").read_bytes().startswith(b"\x89PNG")

    status, _, _ = call(*tiny)
    assert status == 0
    tables = [(tmp_path / name / "table.txt").read_text() for name in ("first", "out")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        (GOOD | {"chosen": 7}, "field 'chosen' is a number, wanted a string"),
        (GOOD | {"prompt": None}, "field 'prompt' is null, wanted a string"),
        (GOOD | {"rejected": " "}, "field 'rejected' is empty"),
        ([GOOD], "got an array, wanted an object with the fields prompt, chosen, rejected"),
        ("{'prompt': 'a'}", "not JSON"),
    ],
)
def test_a_bad_line_is_named(call, write, line, says):
    path = write(GOOD, "", line)
    status, _, error = call("--data", path)
    assert status == 2
    assert f"{path}, line 3: " in error and says in error and "Traceback" not in error


def test_bad_bytes_are_a_bad_line(call, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff\xfe"}\n')
    status, _, error = call("--data", path)
    assert status == 2 and f"{path}, line 2: not JSON in UTF-8" in error


@pytest.mark.parametrize(
    ("pairs", "says"), [(some_pairs(9), "got 9 pairs"), ([GOOD] * 20, "got 20 pairs on 1 prompts"), ([], "got 0 pairs")]
)
def test_too_few_pairs(call, write, pairs, says):
    status, _, error = call("--data", write(*pairs))
    assert status == 2 and says in error and "wanted at least 10 pairs and 2 prompts" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--variant tdpo1 --alpha 0.5", "alpha"),
        ("--beta -1", "beta"),
        ("--backend abacus", "abacus"),
        ("--lr 0", "--lr"),
        ("--beta 1e400", "beta: got float inf"),
        ("--data /no/such/pairs.jsonl", "/no/such/pairs.jsonl: cannot be read"),
        ("--model /no/such/model", "--model /no/such/model: not a directory of a Hugging Face model"),
    ],
)
def test_refused_before_any_training(call, arguments, says):
    status, _, error = call(*arguments.split())
    assert status == 2 and says in error
    assert "fine-tuning" not in error and "Traceback" not in error


@pytest.mark.parametrize("arguments", ["--seed 18446744073709551616", "--seed -1", "--steps 0", "--pairs 9"])
def test_an_option_out_of_range_is_named(call, arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        call(*arguments.split())
    assert exit.value.code == 2 and f"argument {arguments.split()[0]}: got" in capsys.readouterr().err


def test_a_model_that_does_not_load(call, write, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, _, error = call("--data", write(*some_pairs(40)), "--model", tmp_path)
    assert status == 2 and f"--model {tmp_path}: does not load as a causal LM" in error


def test_own_data_and_own_model(call, write, model_directory, tmp_path):
    data = write(*some_pairs(40))
    status, out, _ = call("--data", data, "--model", model_directory, "--steps", 3, "--batch", 4, "--lr", 1e-2)
    assert status == 0
    assert "GPT2LMHeadModel" in out and "4 held-out pairs" in out and "sentiment" not in out
    assert (tmp_path / "out" / "curves.png").stat().st_size > 0


def test_own_data_and_the_small_model(call, write):
    status, out, _ = call("--data", write(*some_pairs(40)), "--steps", 2, "--sft-steps", 2, "--batch", 4)
    assert status == 0 and "LlamaForCausalLM" in out and "reward accuracy" in out


def test_long_pairs_are_cut_with_a_warning(call, write):
    long = some_pairs(40)
    long[7]["chosen"] = "warm " * 50
    arguments = "--steps 1 --sft-steps 1 --batch 4 --max-length 16".split()
    status, _, error = call("--data", write(*long), *arguments)
    assert status == 0 and "pairs were cut to 16 tokens" in error


def test_a_head_that_is_not_the_models_own_is_refused(call, write, model_directory, monkeypatch):
    from transformers import GPT2LMHeadModel

    forward = GPT2LMHeadModel.forward

    @wraps(forward)
    def scaled(*args, **inputs):
        out = forward(*args, **inputs)
        out.logits = 1.5 * out.logits
        return out

    monkeypatch.setattr(GPT2LMHeadModel, "forward", scaled)
    status, _, error = call("--data", write(*some_pairs(40)), "--model", model_directory, "--steps", 1)
    assert status == 2 and "gpt2 (GPT2LMHeadModel): its logits are not its LM head" in error


def test_the_backend_is_said_in_a_sentence(demo):
    cpu = torch.device("cpu")
    said = demo.report.backend_line("naive", cpu)
    assert said.startswith("The loss was computed by backend naive, asked for by name: keeps [T, V] logits")
    assert said.endswith(", on cpu.") and "available" not in said
    said = demo.report.backend_line("tiled", cpu)
    assert ": library GEMMs make logits in cache-sized tiles, " in said and said.endswith(" reduce them, on cpu.")
    assert "the leanest that runs here: " in demo.report.backend_line("auto", cpu)


@pytest.mark.parametrize(
    "sizes", [[1, 40], [40, 1], [1, 1], [2, 1, 1], [30, 30], [10, 1, 1, 1], [1] * 20, [100, 100, 3]]
)
def test_some_are_held_out_and_most_are_left_whatever_the_prompts(demo, sizes):
    from pairs import TextPair

    pairs = [TextPair(f"prompt {i}", "a", "b") for i, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        training, held_out = demo.split_by_prompt(pairs, demo.Random(seed))
        assert held_out and len(training) >= len(held_out) and len(training) + len(held_out) == len(pairs)
        assert not {pair.prompt for pair in training} & {pair.prompt for pair in held_out}


@pytest.mark.parametrize("steps", [1, 2, 3, 9, 10, 11, 20, 300])
def test_fine_tuning_s_rate_rises_then_falls_for_any_number_of_steps(demo, steps):
    rates = [demo.models.rate(step, steps) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and max(rates) == 1
    top = rates.index(1)
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top <= steps / 10 and (steps < 20 or rates[-1] < 0.01)


def test_chosen_rows_come_first_and_only_completions_are_labelled(demo):
    batch = demo.collate([demo.Pair((5, 6), (7, 1), (8,)), demo.Pair((5,), (9,), (2, 3, 1))], 0, torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 1], [5, 9, 0, 0], [5, 6, 8, 0], [5, 2, 3, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, -100, 7, 1], [-100, 9, -100, -100], [-100, -100, 8, -100], [-100, 2, 3, 1]]
