"""`tdpo train` and `tdpo cache`: from options to a trainer, and what it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from .config import TDPOConfig
from .data import Pairs, hold_out, load_pairs
from .trainer import TDPOTrainer


class UsageError(Exception):
    """Something wrong with the options, in the words of the person who gave them."""


@dataclass
class DataArguments(ScriptArguments):
    """TRL's, and: where the pairs to evaluate on come from, and a reference that is not the model itself."""

    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "file or hub name of pairs to evaluate on; else a split of dataset_name"}
    )
    eval_dataset_config: str | None = field(
        default=None, metadata={"help": "configuration of eval_dataset_name; dataset_config is dataset_name's"}
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "part (below 1) or number of the pairs to hold out for evaluation"}
    )
    ref_model_name_or_path: str | None = field(
        default=None, metadata={"help": "reference model, if it is not what the training starts from"}
    )
    ref_model_revision: str | None = field(
        default=None, metadata={"help": "revision of ref_model_name_or_path; model_revision is model_name_or_path's"}
    )


def train(argv: Sequence[str]) -> int:
    """Trains, and saves the model in ``output_dir``. ``--resume_from_checkpoint last``: from the last one there."""
    trainer = make_trainer(argv, "train")
    checkpoint = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint)
    trainer.save_model(trainer.args.output_dir)
    trainer.accelerator.print(f"saved in {trainer.args.output_dir}")
    trainer.accelerator.wait_for_everyone()
    return 0


def cache(argv: Sequence[str]) -> int:
    """Writes the reference cache of a run, and leaves the rest to `train`."""
    trainer = make_trainer(argv, "cache")
    trainer.accelerator.print(f"complete: {trainer.args.reference_cache}")
    trainer.accelerator.wait_for_everyone()
    return 0


def make_trainer(argv: Sequence[str], command: str) -> TDPOTrainer:
    """Raises UsageError for options that do not go together, SystemExit for unknown ones."""
    parser = TrlParser((DataArguments, TDPOConfig, ModelConfig), prog=f"tdpo {command}")
    try:
        data, args, model = parser.parse_args_and_config(args=list(argv))
        _check(data, args, model, command)
        pairs, evaluated = _datasets(data, args)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"{command}: {error}") from error
    args.model_init_kwargs = _loading(args, model)
    return TDPOTrainer(
        model=model.model_name_or_path,
        ref_model=_reference(data, args),
        args=args,
        train_dataset=pairs,
        eval_dataset=evaluated,
        peft_config=get_peft_config(model),
    )


def _check(data: DataArguments, args: TDPOConfig, model: ModelConfig, command: str) -> None:
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", data.dataset_name)):
        if value is None:
            raise ValueError(f"{name}: got none, wanted a path or a name on the hub")
    for name, needs in (
        ("eval_dataset_config", "eval_dataset_name"), ("ref_model_revision", "ref_model_name_or_path"),
    ):  # fmt: skip
        if getattr(data, name) is not None and getattr(data, needs) is None:
            raise ValueError(f"{name}: got {getattr(data, name)!r} without {needs}, wanted both or neither")
    if data.eval_dataset_name is not None and data.test_split_size is not None:
        raise ValueError("test_split_size: got it with eval_dataset_name, wanted one of them to evaluate on")
    args.loss_options().describe(args.device)
    if command == "cache" and args.reference_cache is None:
        raise ValueError("reference_cache: got none, wanted the directory to write")


def _datasets(data: DataArguments, args: TDPOConfig) -> tuple[Pairs, Pairs | None]:
    def load(name: str, split: str, config: str | None) -> Pairs:
        return load_pairs(name, split, config, data.dataset_streaming)

    pairs = load(data.dataset_name, data.dataset_train_split, data.dataset_config)
    if data.test_split_size is not None:
        return hold_out(pairs, data.test_split_size)
    if data.eval_dataset_name is not None:
        same = data.dataset_config if data.eval_dataset_name == data.dataset_name else None
        return pairs, load(data.eval_dataset_name, data.dataset_test_split, data.eval_dataset_config or same)
    if args.eval_strategy == "no":
        return pairs, None
    return pairs, load(data.dataset_name, data.dataset_test_split, data.dataset_config)


def _loading(args: TDPOConfig, model: ModelConfig) -> dict[str, object]:
    options = dict(revision=model.model_revision, attn_implementation=model.attn_implementation, dtype=model.dtype)
    trusted = getattr(args, "trust_remote_code", getattr(model, "trust_remote_code", False))
    options |= {"trust_remote_code": trusted, "quantization_config": get_quantization_config(model)}
    return {name: value for name, value in options.items() if value is not None}


def _reference(data: DataArguments, args: TDPOConfig) -> nn.Module | None:
    """Held in memory as the model is (dtype, attention, quantization), but with the revisions of its own repository."""
    if data.ref_model_name_or_path is None:
        return None
    from trl.trainer.utils import create_model_from_path

    options = {name: value for name, value in args.model_init_kwargs.items() if name != "revision"}
    if data.ref_model_revision is not None:
        options["revision"] = data.ref_model_revision
    return create_model_from_path(data.ref_model_name_or_path, **options)
