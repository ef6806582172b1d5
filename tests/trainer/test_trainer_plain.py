"""`PlainTDPOTrainer`, without TRL: the same losses and parameters as TDPO written plainly."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import processes
import pytest
import runs
import torch
from peft import LoraConfig, get_peft_model
from runs import SETTINGS, eager_run, llama, logged, losses, mixtral, parameters, recorded, text_pairs, tokenizer, worst
from tdpo_trainer import metrics
from tdpo_trainer.plain import PlainTDPOTrainer, collate
from tdpo_trainer.step import LossOptions
from tdpo_trainer.tokens import tokenize
from tokenizers import processors
from torch import nn
from transformers import TrainingArguments

NAMES = [name for name in metrics.NAMES if name != metrics.AUX_LOSS]


def run(
    folder: Path, model: nn.Module, ref_model: nn.Module | None, aux: float | None = None, **changes
) -> PlainTDPOTrainer:
    reader, loss, args = tokenizer(), LossOptions(beta=0.5), TrainingArguments(str(folder), **(SETTINGS | changes))
    rows = tokenize(reader, text_pairs())
    more = dict(train_dataset=rows, eval_dataset=rows[:3], processing_class=reader, router_aux_loss_coef=aux)
    return PlainTDPOTrainer(model, ref_model, args, options=loss, **more)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_and_every_parameter_are_the_eager_implementation_s(accumulation: int, tmp_path: Path):
    model, reference = llama(dtype=torch.float64), llama(1, torch.float64)
    ours = run(tmp_path, copy.deepcopy(model), copy.deepcopy(reference), gradient_accumulation_steps=accumulation)
    steps = recorded(ours, accumulation)
    ours.train()
    theirs = eager_run(model, steps, reference)
    assert losses(ours) == pytest.approx(theirs, rel=1e-6)
    assert worst(parameters(ours.model), parameters(model)) < 1e-6
    assert logged(ours, "kl/margin") and logged(ours, "num_tokens")[-1] > 0


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_lora_is_trained_on_the_head_too(targets: list[str], tmp_path: Path):
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    model, reference = get_peft_model(llama(dtype=torch.float64), lora), llama(dtype=torch.float64)
    ours = run(tmp_path, copy.deepcopy(model), None)
    steps = recorded(ours)
    ours.train()
    theirs = eager_run(model, steps, reference)
    assert losses(ours) == pytest.approx(theirs, rel=1e-6)
    assert worst(parameters(ours.model), parameters(model)) < 1e-6


def test_a_mixture_of_experts_adds_its_auxiliary_loss(tmp_path: Path):
    """Multiply by the config's coefficient, 0.001 for a Mixtral, or by one that is given."""
    ours, own, without = (run(tmp_path, mixtral(), mixtral(1), aux, max_steps=1) for aux in (0.3, None, 0.0))
    steps = recorded(ours)
    ours.train(), own.train(), without.train()
    batch = {name: x for name, x in steps[0][0].items() if name != "completion_mask"}
    aux = float(mixtral()(**batch, output_router_logits=True).aux_loss.detach())
    assert logged(ours, "aux_loss") == logged(own, "aux_loss") == pytest.approx([aux], rel=1e-6)
    assert losses(ours)[0] - losses(without)[0] == pytest.approx(0.3 * aux, rel=1e-4)
    assert losses(own)[0] - losses(without)[0] == pytest.approx(0.001 * aux, rel=1e-2)
    assert worst(parameters(ours.model), parameters(without.model)) > 1e-4
    assert not logged(without, "aux_loss") and ours.evaluate()["eval_aux_loss"] > 0
    with pytest.raises(ValueError, match="^router_aux_loss_coef: got 0.3 for a llama"):
        run(tmp_path, llama(), llama(1), 0.3)


def test_what_is_logged_does_not_depend_on_how_pairs_are_batched(tmp_path: Path):
    evaluated = [run(tmp_path, llama(), llama(1), per_device_eval_batch_size=size).evaluate for size in (1, 2, 3)]
    first, *others = ({name: seen[f"eval_{name}"] for name in NAMES} for seen in (x() for x in evaluated))
    assert all(other == pytest.approx(first, rel=1e-4) for other in others)
    trained = []
    for size in (1, 4):
        options = dict(per_device_train_batch_size=size, gradient_accumulation_steps=4 // size, max_steps=1)
        ours = run(tmp_path, llama(), llama(1), **options)
        ours.train()
        trained.append({name: ours.state.log_history[0][name] for name in NAMES})
    assert trained[1] == pytest.approx(trained[0], rel=1e-4)
    ours.predict(ours.train_dataset)
    assert ours.evaluate()["eval_kl/chosen"] == pytest.approx(ours.evaluate()["eval_kl/chosen"], rel=1e-6)


def with_trl(folder: Path, model: nn.Module, ref_model: nn.Module | None, **changes) -> runs.TDPOTrainer:
    return runs.trainer(folder, model, ref_model, eval_dataset=runs.pairs().select(range(3)), **changes)


def evaluated(rank: int, folder: Path, want: list[dict[str, float]]) -> None:
    """Take three pairs, so that the last batch of two processes repeats one."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for run_of, one in zip((run, with_trl), want, strict=True):
        seen = run_of(folder / str(rank), llama(), llama(1), per_device_eval_batch_size=2).evaluate()
        assert {name: seen[f"eval_{name}"] for name in NAMES} == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("run_of", [run, with_trl])
def test_evaluation_sets_are_logged_under_their_own_names(run_of, tmp_path: Path):
    """And the best model may be that of one of them."""
    options = dict(eval_strategy="steps", eval_steps=2, metric_for_best_model="eval_few_kl/margin")
    ours = run_of(tmp_path, llama(), llama(1), max_steps=2, **options)
    ours.eval_dataset = {"few": ours.eval_dataset, "many": ours.train_dataset}
    ours.train()
    names = set().union(*ours.state.log_history)
    assert {"eval_few_rewards/margins", "eval_many_rewards/margins"} <= names and "eval_rewards/margins" not in names
    assert [ours.state.best_metric] == logged(ours, "eval_few_kl/margin") != logged(ours, "eval_many_kl/margin")
    assert ours.predict(ours.train_dataset).metrics["test_kl/margin"] == logged(ours, "eval_many_kl/margin")[0]


def test_processes_evaluate_as_one_does(tmp_path: Path):
    alone = [run_of(tmp_path, llama(), llama(1)).evaluate() for run_of in (run, with_trl)]
    processes.run(evaluated, tmp_path, [{name: seen[f"eval_{name}"] for name in NAMES} for seen in alone])


def test_what_is_wrong_is_said(tmp_path: Path):
    model = llama()
    with pytest.raises(ValueError, match="ref_model: got the model itself"):
        run(tmp_path, model, model)
    with pytest.raises(ValueError, match="ref_model: got None"):
        run(tmp_path, model, None)
    with pytest.raises(ValueError, match="beta"):
        LossOptions(beta=-1.0)


@pytest.mark.parametrize("name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"])
def test_functions_that_would_not_be_called_are_refused_by_name(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"^{name}: got a .* of logits, wanted None"):
        PlainTDPOTrainer(llama(), llama(1), processing_class=tokenizer(), **{name: print})


def test_smoothed_labels_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="^label_smoothing_factor: got 0.1, wanted 0.0"):
        run(tmp_path, llama(), llama(1), label_smoothing_factor=0.1)


@pytest.mark.parametrize("run_of", [run, runs.trainer])
def test_batches_are_not_cut_up_by_rows(run_of, tmp_path: Path):
    """The first half of the rows are chosen, the second rejected: accelerate would give each half to a process."""
    with pytest.raises(ValueError, match="^accelerator_config.dispatch_batches: got True, wanted False"):
        run_of(tmp_path, llama(), llama(1), accelerator_config={"dispatch_batches": True})
    assert run_of(tmp_path, llama(), llama(1)).accelerator.dispatch_batches is False


@pytest.mark.parametrize("run_of", [run, runs.trainer])
def test_a_compiled_model_is_refused_as_such(run_of, tmp_path: Path):
    with pytest.raises(ValueError, match="^torch_compile: got True, wanted False"):
        run_of(tmp_path, llama(), llama(1), torch_compile=True)
    inside = llama()
    inside.forward = torch.compile(inside.forward)
    for models in ((torch.compile(llama()), llama(1)), (llama(), torch.compile(llama(1))), (inside, llama(1))):
        with pytest.raises(TypeError, match="^model: got a .* compiled as a whole"):
            run_of(tmp_path, *models)


def test_completions_end_and_prompts_do_not():
    """Hold whether or not the tokenizer ends every text."""
    reader, want = tokenizer(), {"prompt_ids": [3, 4], "chosen_ids": [5, 1], "rejected_ids": [6, 3, 1]}
    text = {"prompt": "ab", "chosen": "c", "rejected": "da"}
    assert tokenize(reader, [text]) == [want]
    ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    reader.backend_tokenizer.post_processor = ends
    assert reader("ab").input_ids == [3, 4, 1]
    assert tokenize(reader, [text]) == [want]


def test_rows_are_padded_and_cut_on_the_right():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 1], "rejected_ids": [8, 9, 9, 1]}]
    batch = collate(rows, pad=0, max_length=5)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 1, 0], [5, 6, 8, 9, 9]]
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


def test_pairs_without_room_for_a_completion_are_refused():
    rows = tokenize(tokenizer(), text_pairs())
    filled = sum(len(row["prompt_ids"]) >= 4 for row in rows)
    assert 0 < filled < len(rows)
    with pytest.raises(ValueError, match=f"^train_dataset: got {filled} of {len(rows)} pairs with a prompt that fills"):
        PlainTDPOTrainer(llama(), llama(1), train_dataset=rows, processing_class=tokenizer(), max_length=4)
