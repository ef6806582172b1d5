"""What a run leaves on disk, how it is taken up again, and what becomes of an adapter."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from runs import TEMPLATE, config, llama, pairs, text_pairs, tokenizer, trainer
from tdpo_trainer import PlainTDPOTrainer, cli, evaluate, options, run
from tdpo_trainer.data import load_pairs, mixture
from tdpo_trainer.record import METRICS
from tdpo_trainer.step import LossOptions
from tdpo_trainer.tokens import tokenize
from transformers import AutoModelForCausalLM

LORA = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj"]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_both_trainers_leave_what_they_logged_and_curves(tmp_path: Path):
    ours = trainer(tmp_path / "a", llama(), eval_dataset=pairs(4), eval_strategy="steps", eval_steps=2)
    tokens = tokenize(ours.processing_class, pairs())
    plain = PlainTDPOTrainer(
        llama(), llama(), config(tmp_path / "b"), options=LossOptions(beta=0.5), train_dataset=tokens,
        processing_class=ours.processing_class,
    )  # fmt: skip
    for each in (ours, plain):
        each.train()
        folder = Path(each.args.output_dir)
        assert lines(folder) == each.state.log_history and len(lines(folder)) >= 4
        assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {"eval_kl/chosen", "step"} <= set(lines(tmp_path / "a")[2])


def test_rewards_without_the_kl_are_those_of_dpo():
    from tdpo_trainer.record import _with_log_ratios

    entry = {"eval_rewards/chosen": 3.0, "eval_kl/chosen": 4.0, "step": 1}
    assert _with_log_ratios(entry, 0.5)["eval_ratio/chosen"] == 1.0


@pytest.mark.parametrize("several", [False, True])
def test_completions_of_evaluation_prompts_are_a_text(several: bool, tmp_path: Path, monkeypatch):
    """Greedy ones are what `generate` makes; TRL's callback sends the same to its trackers."""
    held = pairs(4, seed=3)
    ours = trainer(
        tmp_path, llama(), eval_dataset={"a": held, "b": pairs(3)} if several else held, eval_strategy="epoch",
        num_train_epochs=2, max_steps=-1, samples=2,
    )  # fmt: skip
    ours.train()
    assert ours.processing_class.padding_side == "right"
    blocks = (tmp_path / "samples.txt").read_text().split("--- step ")[1:]
    assert [block.partition("\n")[0] for block in blocks] == ["6", "6", "12", "12"]
    prompt, said = blocks[-1].partition("\n")[2].removesuffix("\n\n").split("\n>>> ")
    assert prompt == held[1]["prompt"]
    given = ours.processing_class(prompt, return_tensors="pt")
    made = ours.model.generate(**given, do_sample=False)[0, given.input_ids.shape[1] :]
    assert said == ours.processing_class.decode(made, skip_special_tokens=True)


def test_samples_without_an_evaluation_set_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="^samples: got 2 and no evaluation dataset"):
        trainer(tmp_path, llama(), samples=2)


def test_a_command_leaves_a_card_and_a_resumed_run_says_what_is_changed(here: Path, tmp_path: Path, capsys):
    flags = ["train", "--config", str(here / "run.yaml"), "--output_dir", str(tmp_path)]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--resume_from_checkpoint", "auto"]
    assert cli.main([*flags, "--max_steps", "2"]) == 0
    assert "auto: from the beginning: there is no whole checkpoint" in capsys.readouterr().out
    first = lines(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert (
        "| alpha | 0.7 |" in card
        and "| beta | 0.5 |" in card
        and "| data | 12 pairs (" in card
        and "curves.png" in card
    )
    os.truncate(next((tmp_path / "checkpoint-2").glob("*.safetensors")), 99)
    assert cli.main([*flags, "--alpha", "0.1"]) == 0
    said = capsys.readouterr().out
    assert f"resume_from_checkpoint: auto: from {tmp_path}/checkpoint-1" in said
    assert "TDPO: the checkpoint is of a run with other settings: alpha 0.7 -> 0.1\n" in said
    steps = [entry["step"] for entry in lines(tmp_path) if "loss" in entry]
    assert steps == [1, 2, 3] and lines(tmp_path)[0] == first[0]


@pytest.mark.parametrize("fault", ["trainer_state.json", "optimizer.pt", "model.safetensors"])
def test_a_checkpoint_that_is_cut_off_is_passed_over(fault: str, checkpoints: Path, tmp_path: Path):
    folder = shutil.copytree(checkpoints, tmp_path / "c")
    assert options._last_whole(str(folder)) == str(folder / "checkpoint-2")
    os.truncate(folder / "checkpoint-2" / fault, 20)
    assert options._last_whole(str(folder)) == str(folder / "checkpoint-1")


def test_an_adapter_is_trained_on_and_merged(here: Path, tmp_path: Path, capsys):
    flags = ["train", "--config", str(here / "run.yaml"), "--max_steps", "2"]
    one, two, whole = (tmp_path / name for name in ("one", "two", "whole"))
    assert cli.main([*flags, *LORA, "--output_dir", str(one)]) == 0
    capsys.readouterr()
    assert cli.main([*flags, "--model_name_or_path", str(one), "--output_dir", str(two)]) == 0
    said = capsys.readouterr().out
    assert "{'loss': '0.6931'" in said and "'kl/chosen': '0'" in said  # the reference is the first adapter's model
    assert cli.main(["merge", str(two), str(whole)]) == 0

    def made(model: torch.nn.Module) -> list[int]:
        ids = torch.tensor([[5, 6, 7]])
        return model.generate(ids, max_new_tokens=20, do_sample=False, attention_mask=torch.ones_like(ids)).tolist()

    base, again = (AutoModelForCausalLM.from_pretrained(here / "model") for _ in range(2))
    adapted = made(PeftModel.from_pretrained(base, two))
    assert made(AutoModelForCausalLM.from_pretrained(whole)) == adapted
    ours = AutoModelForCausalLM.from_pretrained(whole).model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(ours, again.model.layers[0].self_attn.q_proj.weight)
    assert not torch.equal(
        ours, PeftModel.from_pretrained(again, one).merge_and_unload().model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("command, wanted", [
    ("merge {}/model {}/new", "adapter: got {}/model, wanted a folder with an adapter_config.json"),
    ("merge {}/adapter {}/model", "output: got {}/model, which is there already, wanted a new folder"),
    ("train --config {}/run.yaml --model_name_or_path {}/adapter --use_peft", "use_peft: got it with {}/adapter, an"),
])  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(command: str, wanted: str, here: Path, capsys):
    assert cli.main(command.replace("{}", str(here)).split()) == 2
    said = capsys.readouterr().err
    assert wanted.replace("{}", str(here)) in said and said.count("\n") == 1


# --- where data come from ---------------------------------------------------------------------------------------------


def written(path: Path, rows: list[dict]) -> Path:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.jsonl", "pairs.csv.gz", "pairs.parquet"])
def test_foreign_names_and_compressed_files(name: str, streaming: bool, tmp_path: Path):
    rows, path = text_pairs(3), tmp_path / name
    foreign = [{"question": x["prompt"], "good": x["chosen"], "rejected": x["rejected"], "prompt": "no"} for x in rows]
    if ".csv" in name:
        with gzip.open(path, "wt", newline="") as file:
            table = csv.DictWriter(file, list(foreign[0]))
            table.writeheader()
            table.writerows(foreign)
    elif name.endswith("parquet"):
        Dataset.from_list(foreign).to_parquet(path)
    else:
        written(path, foreign)
    columns = options.columns_of("columns", "prompt=question,chosen=good")
    assert list(load_pairs(str(path), streaming=streaming, columns=columns)) == rows
    with pytest.raises(ValueError, match="columns names 'bad': got "):
        load_pairs(str(path), streaming=streaming, columns={"rejected": "bad"})


def test_data_of_several_places_are_all_pairs_or_shares(here: Path, tmp_path: Path, monkeypatch):
    a, b = text_pairs(8, 1), text_pairs(6, 2)
    written(tmp_path / "a.jsonl", a)
    Dataset.from_list(b).rename_column("prompt", "q").to_parquet(tmp_path / "b.parquet")
    places = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.parquet"), "columns": {"prompt": "q"}}]
    trained = []
    monkeypatch.setattr(run, "TDPOTrainer", lambda train_dataset, **_: trained.append(train_dataset.to_list()))
    for fractions in ((None, None), (3, 1)):
        listed = [place | ({"fraction": x} if x else {}) for place, x in zip(places, fractions, strict=True)]
        text = (here / "run.yaml").read_text().replace("dataset_name:", "unused:")
        (tmp_path / "run.yaml").write_text(re.sub("unused:.*\n", "", text) + f"datasets: {json.dumps(listed)}\n")
        run.make_trainer(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path)], "train")
    assert trained[0] == a + b
    assert trained[1] == a + b[:3]  # of 8 / (3 / 4) = 10.67 in all


@pytest.mark.parametrize(
    "fractions, why", [([1.0, None], "wanted a positive one for each or none"), ([1, 1], "wanted all alike")]
)
def test_a_mixture_that_is_none_is_refused(fractions: list, why: str):
    messages = [{name: [{"role": "user", "content": "a"}] for name in ("prompt", "chosen", "rejected")}]
    with pytest.raises(ValueError, match=f"^datasets: got .*{why}"):
        mixture([Dataset.from_list(text_pairs(2)), Dataset.from_list(messages)], fractions)


@pytest.mark.parametrize("as_model", [False, True])
def test_a_chat_template_of_another_place(as_model: bool, here: Path, tmp_path: Path, monkeypatch):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE)
    if as_model:
        path = tmp_path / "other"
        tokenizer(chat_template=TEMPLATE).save_pretrained(path)
    taken = []
    monkeypatch.setattr(run, "TDPOTrainer", lambda processing_class, **_: taken.append(processing_class.chat_template))
    run.make_trainer(
        ["--config", str(here / "run.yaml"), "--output_dir", str(tmp_path), "--chat_template_path", str(path)], "train"
    )
    assert taken == [TEMPLATE]


# --- what the pairs are, and what a model makes of held-out ones ------------------------------------------------------


def test_the_report_is_of_the_pairs_that_are_trained_on(here: Path, tmp_path: Path, capsys):
    pair = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
    odd = [dict(rejected="cd"), dict(chosen=""), dict(chosen=9 * "f"), dict(prompt=8 * "a")]
    odd = [pair, pair, *(pair | changed for changed in odd)]
    flags = ["--config", str(here / "run.yaml"), "--dataset_name", str(written(tmp_path / "odd.jsonl", odd))]
    flags += ["--max_length", "8", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["data", *flags]) == 0
    told = capsys.readouterr().out
    assert cli.main(["train", *flags, "--pairs_per_step", "2"]) == 0
    ran = capsys.readouterr().out
    facts = json.loads((tmp_path / "out" / "data_report.json").read_text())
    loss = facts.pop("loss")
    assert facts == {
        "pairs": 5, "prompts": 1, "dropped": 1, "truncated": 1, "duplicate": 1, "identical": 1, "empty": 1,
        "completion_tokens": {"p50": 2, "p95": 10, "max": 10}, "longest_sequence": 8,
    }  # fmt: skip
    assert loss == "a batch of 2 pairs of 2 x 8 tokens: all logits are kept: 4 products" and f"loss: {loss}" in told
    table = told[told.index("        5  pairs") :].strip()
    assert table in ran and "1  repeat another pair  <--" in table and table.count("<--") == 5


def eager_pair(policy: torch.nn.Module, reference: torch.nn.Module, row: dict) -> tuple[list, list, list]:
    """Return log-ratios, KLs and log-probabilities of the chosen and of the rejected completion."""
    ratios, kls, logps = [], [], []
    for name in ("chosen_ids", "rejected_ids"):
        ids = torch.tensor([row["prompt_ids"] + row[name]])
        log_p, log_q = (m.double()(ids).logits[0, :-1].log_softmax(-1) for m in (policy, reference))
        at, label = slice(len(row["prompt_ids"]) - 1, None), ids[0, 1:, None]
        logps.append(log_p.gather(1, label)[at].sum())
        ratios.append(logps[-1] - log_q.gather(1, label)[at].sum())
        kls.append((log_q.exp() * (log_q - log_p)).sum(-1)[at].sum())
    return ratios, kls, logps


@torch.no_grad()
def test_an_evaluation_is_exact_over_pairs(here: Path, tmp_path: Path, capsys):
    """Against logits in float64, pair by pair, whatever the batch size and the number of processes."""
    held, policy, reference = text_pairs(5, seed=9), llama(1), llama(0)
    policy.save_pretrained(tmp_path / "policy")
    tokenizer().save_pretrained(tmp_path / "policy")
    flags = ["eval", "--config", str(here / "run.yaml"), "--dataset_name", str(written(tmp_path / "held.jsonl", held))]
    flags += ["--model_name_or_path", str(tmp_path / "policy"), "--ref_model_name_or_path", str(here / "model")]
    found = []
    for size in ("1", "3"):
        out = tmp_path / size
        assert cli.main([*flags, "--output_dir", str(out), "--per_device_eval_batch_size", size]) == 0
        found.append(json.loads((out / "eval.json").read_text()))
        assert not (out / METRICS).exists()
    said, launch = capsys.readouterr().out, "-m torch.distributed.run --standalone --nproc-per-node 2 -m tdpo_trainer"
    more = ["--output_dir", str(tmp_path / "two"), "--per_device_eval_batch_size", "2"]
    subprocess.run(
        [sys.executable, *launch.split(), *flags, *more], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    found.append(json.loads((tmp_path / "two" / "eval.json").read_text()))
    beta, alpha, rows = 0.5, 0.7, []
    for row in tokenize(tokenizer(), held):
        m, k, logps = eager_pair(policy, reference, row)
        margin = beta * (m[0] + k[0] - m[1] - k[1])
        loss = -torch.nn.functional.logsigmoid(beta * (m[0] - m[1] - alpha * (k[1] - k[0])))
        rows.append(torch.stack([loss, margin > 0, m[0] > m[1], margin, beta * (m[0] - m[1]), *k, *logps]))
    want = torch.stack(rows)
    assert all(x["pairs"] == 5 for x in found) and "5 pairs" in said
    names = [name for name in found[0] if name != "pairs"]
    for name, x in zip(names, want.unbind(1), strict=True):
        for each in found:
            assert each[name]["mean"] == pytest.approx(x.mean().item(), rel=1e-4, abs=1e-5), name
        low, high = found[0][name]["low"], found[0][name]["high"]
        assert low <= found[0][name]["mean"] <= high
        if not name.startswith("accuracy"):
            assert high - low == pytest.approx(2 * 1.959964 * (x.std() / 5**0.5).item(), rel=1e-4)


def test_wilson_s_interval():
    """Of 1 in 10, by the formula's two roots of (p - x)^2 = z^2 x (1 - x) / n."""
    ends = evaluate._wilson(torch.tensor([True] + 9 * [False]))[1:]
    for x in ends:
        assert (0.1 - x) ** 2 == pytest.approx(1.959964**2 * x * (1 - x) / 10, rel=1e-5)
    assert 0 < ends[0] < 0.1 < ends[1] < 1


def test_an_adapter_is_evaluated_against_its_model(here: Path, tmp_path: Path, capsys):
    flags, out = ["--config", str(here / "run.yaml")], tmp_path / "o"
    assert cli.main(["train", *flags, *LORA, "--output_dir", str(tmp_path / "a")]) == 0
    assert cli.main(["eval", *flags, "--model_name_or_path", str(tmp_path / "a"), "--output_dir", str(out)]) == 0
    found = json.loads((out / "eval.json").read_text())
    assert 0 < found["kl_chosen"]["mean"] and found["loss"]["mean"] < 0.6931
    more = ["--eval_strategy", "steps", "--test_split_size", "3", "--ref_model_name_or_path", str(here / "model")]
    assert cli.main(["eval", *flags, *more]) == 0 and "\n3 pairs" in capsys.readouterr().out
    assert cli.main(["eval", *flags]) == 2
    assert "ref_model_name_or_path: got none for a whole model, wanted what" in capsys.readouterr().err
