"""Two gloo processes that share one model by its own plan for tensor parallelism, against one that has it whole."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import test_trainer_plain
import tiny
import torch
import torch.distributed as dist
from accelerate.utils import ParallelismConfig
from processes import run
from tdpo_trainer.forward import pair_outputs, reference_side
from tdpo_trainer.head import UnsupportedModel, check_head, lm_head
from tdpo_trainer.parallelism import check_parallelism, pairs_that_count
from test_forward import loss_on
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

from tdpo_kernels.parallel import VocabParallelHead

DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")


def split(folder: Path, rank: int, world: int, dtype: torch.dtype) -> nn.Module:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT="1"
    )
    plan = DistributedConfig(tp_size=world, tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=plan, dtype=dtype, attn_implementation="eager"
    )


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def gradients(rank: int, folder: Path) -> None:
    for name in ("llama", "llama tied", "gemma2"):
        policy, reference, batch = tiny.build(name), tiny.build(name, seed=5), tiny.batch()
        own, theirs = policy(**tiny.inputs_of(batch)), reference(**tiny.inputs_of(batch))
        want, grads = tiny.published_gradients(policy, own.logits, theirs.logits, batch["labels"])
        ours, others = (split(folder / f"{name} {seed}", rank, 2, torch.float64).eval() for seed in (0, 5))
        assert isinstance(lm_head(ours), VocabParallelHead) and len(lm_head(ours).weight) < tiny.V
        inputs = tiny.inputs_of(batch)
        for model in (ours, others):
            check_head(model, inputs)
        side = reference_side(others, inputs, unwrapped=others)
        assert side.head.weight.data_ptr() == others.lm_head.weight.to_local().data_ptr(), "a copy of the head"
        loss = pair_outputs(ours, side, inputs, loss_on(batch["labels"]), unwrapped=ours)["loss"]
        loss.backward()
        assert abs(loss - want) < 1e-6, name
        for key, x in ours.named_parameters():
            error = float((whole(x.grad) - grads[key]).norm() / grads[key].norm())
            assert error < 1e-6, f"{name}: the gradient of {key} is off by {error:.2g} of its norm"
        ours.config.logit_scale = 2.0  # which the model does not heed
        with pytest.raises(UnsupportedModel, match="off by"):
            check_head(ours, inputs)


def test_gradients_of_a_model_split_by_its_own_plan(tmp_path: Path):
    for name in ("llama", "llama tied", "gemma2"):
        for seed in (0, 5):
            tiny.build(name, seed=seed).save_pretrained(tmp_path / f"{name} {seed}")
    run(gradients, tmp_path)


def training(rank: int, folder: Path, want: list[float], tokens: list[int], parameters: dict[str, Tensor]) -> None:
    ParallelismConfig._validate_accelerator = lambda *_: None  # it wants GPUs; nothing after it does
    model, reference = (split(folder / "model", rank, 2, torch.float32) for _ in range(2))
    with pytest.raises(ValueError, match="^ref_model: got None for a model that is split over processes"):
        runs.trainer(folder, model)
    trainer = runs.trainer(folder / f"out{rank}", model, reference, pairs_per_step=4)
    trainer.train()
    torch.testing.assert_close(torch.tensor(runs.losses(trainer)), torch.tensor(want), rtol=2e-4, atol=2e-5)
    assert runs.logged(trainer, "num_tokens") == tokens
    for name, x in model.named_parameters():
        torch.testing.assert_close(whole(x.detach()), parameters[name], rtol=0, atol=1e-4)


def counted(trainer: Trainer) -> tuple[float, float]:
    """A mean over pairs and a count of tokens, which both processes have."""
    return runs.logged(trainer, "kl/margin")[-1], runs.logged(trainer, "num_tokens")[-1]


def training_without_trl(rank: int, folder: Path, want: tuple[float, float]) -> None:
    ParallelismConfig._validate_accelerator = lambda *_: None
    trainer = test_trainer_plain.run(folder, *(split(folder / "model", rank, 2, torch.float32) for _ in range(2)))
    trainer.train()
    assert counted(trainer) == pytest.approx(want, rel=1e-3, abs=1e-6)


@pytest.fixture
def models(tmp_path: Path) -> list[nn.Module]:
    """Two of the one in ``tmp_path / "model"``."""
    config = runs.llama().config
    config.num_key_value_heads = 2  # one for each process
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return [AutoModelForCausalLM.from_pretrained(tmp_path / "model") for _ in range(2)]


def test_a_run_of_the_trainer_is_that_of_one_process(models: list[nn.Module], tmp_path: Path):
    alone = runs.trainer(tmp_path / "alone", *models, pairs_per_step=4)
    alone.train()
    run(training, tmp_path, runs.losses(alone), runs.logged(alone, "num_tokens"), runs.parameters(models[0]))


def test_a_run_without_trl_is_that_of_one_process(models: list[nn.Module], tmp_path: Path):
    alone = test_trainer_plain.run(tmp_path / "alone", *models)
    alone.train()
    run(training_without_trl, tmp_path, counted(alone))


@pytest.mark.parametrize("copies, counted", [(1, [2, 2, 1, 0]), (2, [2, 2, 2, 2])])
def test_repeated_pairs_of_the_last_batch_do_not_count(copies: int, counted: list[int]):
    """Four processes with two pairs each; five pairs are left, and in groups of two, that share theirs, four are."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=5)
    ranks = [SimpleNamespace(gradient_state=state, process_index=rank) for rank in range(4)]
    assert [pairs_that_count(rank, 2, copies) for rank in ranks] == counted
    state.remainder = 3
    assert [pairs_that_count(rank, 2, 2) for rank in ranks] == [2, 2, 1, 1]
    state.end_of_dataloader = False
    assert [pairs_that_count(rank, 2, copies) for rank in ranks] == [2, 2, 2, 2]


@pytest.mark.parametrize("size", ["cp_size", "sp_size"])
def test_sequences_that_are_split_are_refused_by_name(size: str):
    with pytest.raises(ValueError, match=f"^parallelism_config.{size}: got 2, wanted 1"):
        check_parallelism(ParallelismConfig(**{size: 2}), runs.llama())


@pytest.mark.parametrize("run_of", [runs.trainer, test_trainer_plain.run])
def test_layers_that_are_split_are_refused_by_name(run_of, tmp_path: Path):
    model = runs.llama()
    model.config.distributed_config = SimpleNamespace(pp_size=2, to_dict=dict)
    with pytest.raises(ValueError, match="^distributed_config.pp_size: got 2, wanted 1"):
        run_of(tmp_path, model, runs.llama())
