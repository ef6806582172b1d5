"""`tdpo train` and `tdpo cache`: from options to a trainer, and what it is for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, TrainerCallback
from trl import get_peft_config

from .config import TDPOConfig
from .data import Pairs, hold_out, load_pairs, mixture
from .errors import OF_OPTIONS, UsageError, one_line, said_in_one_line
from .options import DataArguments, base_of, check, is_adapter, loading_of_reference, parse
from .trainer import TDPOTrainer


def train(argv: Sequence[str]) -> int:
    """Train, and save the model in ``output_dir``."""
    trainer = make_trainer(argv, "train")
    _warn_of_rounded_weights(trainer)
    _train(trainer)
    trainer.save_model(trainer.args.output_dir)
    trainer.create_model_card()
    trainer.accelerator.print(f"saved in {trainer.args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    return 0


def cache(argv: Sequence[str]) -> int:
    """Write the reference cache of a run, and leave the rest to `train`."""
    trainer = make_trainer(argv, "cache")
    trainer.accelerator.print(f"complete: {trainer.args.reference_cache}")
    trainer.accelerator.wait_for_everyone()
    return 0


def make_trainer(argv: Sequence[str], command: str, kind: type[TDPOTrainer] | None = None) -> TDPOTrainer:
    """Raises UsageError for options, files and models that are not as they should be, SystemExit for bad values."""
    with said_in_one_line(command, (*OF_OPTIONS, TypeError)):
        data, args, model = parse(argv, command)
        check(data, args, model, command)
        pairs, evaluated = datasets(data, args)
        if command == "eval":  # on what a run with these options would evaluate on, else on all
            pairs = evaluated = pairs if evaluated is None else evaluated
    with said_in_one_line(command):
        reference = _reference(data, args)
        policy, tokenizer = _policy(model.model_name_or_path, args)
        if data.chat_template_path is not None:
            tokenizer = tokenizer or AutoProcessor.from_pretrained(model.model_name_or_path)
            tokenizer.chat_template = _chat_template(data.chat_template_path)
        return (kind or TDPOTrainer)(
            model=policy,
            ref_model=reference,
            args=args,
            train_dataset=pairs,
            eval_dataset=evaluated,
            processing_class=tokenizer,
            peft_config=get_peft_config(model),
        )


def _policy(name: str, args: TDPOConfig) -> tuple[str | nn.Module, object | None]:
    """Return a model's name, which TRL loads with its tokenizer; or a model with its adapter, and the tokenizer."""
    if not is_adapter(name):
        return name, None
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    loading, args.model_init_kwargs = args.model_init_kwargs, None  # TRL warns of them beside a model
    base = base_of(name)
    policy = PeftModel.from_pretrained(create_model_from_path(base, **loading), name, is_trainable=True)
    own = (Path(name) / "tokenizer_config.json").exists()
    return policy, AutoTokenizer.from_pretrained(name if own else base)


def _chat_template(path: str) -> str:
    if Path(path).is_file():
        return Path(path).read_text()
    template = AutoTokenizer.from_pretrained(path).chat_template
    if not template:
        raise ValueError(f"chat_template_path: got {path}, whose tokenizer has none, wanted one, or a Jinja file")
    return template


def datasets(data: DataArguments, args: TDPOConfig) -> tuple[Pairs, Pairs | None]:
    """Return the pairs to train on, and those to evaluate on if the run does."""

    def load(name: str, split: str, config: str | None, columns: dict[str, str] | None = data.columns) -> Pairs:
        return load_pairs(name, split, config, data.dataset_streaming, columns=columns)

    if data.datasets:
        parts = [load(x["path"], x.get("split", "train"), x.get("name"), x["columns"]) for x in data.datasets]
        pairs = mixture(parts, [x.get("fraction") for x in data.datasets])
    else:
        pairs = load(data.dataset_name, data.dataset_train_split, data.dataset_config)
    if data.test_split_size is not None:
        return hold_out(pairs, data.test_split_size)
    if data.eval_dataset_name is not None:
        same = data.dataset_config if data.eval_dataset_name == data.dataset_name else None
        return pairs, load(data.eval_dataset_name, data.dataset_test_split, data.eval_dataset_config or same)
    if args.eval_strategy == "no" and not args.eval_on_start:
        return pairs, None
    return pairs, load(data.dataset_name, data.dataset_test_split, data.dataset_config)


def _reference(data: DataArguments, args: TDPOConfig) -> nn.Module | None:
    if data.ref_model_name_or_path is None:
        return None
    from trl.trainer.utils import create_model_from_path

    return create_model_from_path(data.ref_model_name_or_path, **loading_of_reference(data, args))


class _Begun(TrainerCallback):
    """Know whether a step has begun: what fails before is the checkpoint."""

    yet = False

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.yet = True


def _train(trainer: TDPOTrainer) -> None:
    """Train, from the checkpoint that is asked for. One that was cut off fails in as many ways as it has files."""
    checkpoint, begun = trainer.args.resume_from_checkpoint, _Begun()
    trainer.add_callback(begun)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except Exception as error:
        if not checkpoint or begun.yet or isinstance(error, UsageError):
            raise
        raise UsageError(
            f"train: resume_from_checkpoint: {checkpoint} cannot be loaded, wanted a whole one; delete it, and `last` "
            f"is the one before: {one_line(error)}"
        ) from error


def _warn_of_rounded_weights(trainer: TDPOTrainer) -> None:
    """Say it where weights are trained in 16 bits, unless FSDP or DeepSpeed keeps a copy in 32."""
    wrappers = (DistributedType.FSDP, DistributedType.DEEPSPEED)
    accelerator = trainer.accelerator
    if accelerator.distributed_type in wrappers and accelerator.mixed_precision != "no":
        return
    rounded = {x.dtype for x in trainer.model.parameters() if x.requires_grad} & {torch.bfloat16, torch.float16}
    if rounded and accelerator.is_main_process:
        name = str(rounded.pop()).removeprefix("torch.")
        print(
            f"tdpo: warning: weights are trained in {name}, where small steps round to nothing (learning_rate "
            f"{trainer.args.learning_rate:g}); wanted dtype float32, and --bf16 for the products",
            file=sys.stderr,
        )
