"""From a command line, and the YAML file that it names, to options that have been checked."""

from __future__ import annotations

import argparse
import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from .config import REFUSED, TDPOConfig, expand_home
from .errors import said_in_one_line
from .lines import FIELDS

UNUSED = ("ignore_bias_buffers", "do_train", "do_eval", "do_predict")  # of TRL's and transformers' own scripts
IN_DATASETS = ("path", "name", "split", "columns", "fraction")
WANT = {  # options that are without effect unless another one is given
    "use_peft": [x.name for x in fields(ModelConfig) if x.name.startswith(("lora_", "use_rslora", "use_dora"))],
    "load_in_4bit": [x.name for x in fields(ModelConfig) if "bnb_" in x.name],
}


@dataclass
class DataArguments(ScriptArguments):
    """TRL's, and: data of several places and of other names, pairs to evaluate on, and a reference of its own."""

    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "in YAML, in place of dataset_name: a list of path, and name, split, columns, fraction"},
    )
    columns: str | None = field(
        default=None,
        metadata={"help": "the data's own names: prompt=question,chosen=good,rejected=bad; in YAML a mapping"},
    )
    chat_template_path: str | None = field(
        default=None, metadata={"help": "a Jinja file, or a model, whose chat template stands for the model's own"}
    )
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


def parse(argv: Sequence[str], command: str) -> tuple[DataArguments, TDPOConfig, ModelConfig]:
    """Return the options, as they are written. Raises ValueError for some, SystemExit for what argparse refuses."""
    parser = TrlParser((DataArguments, TDPOConfig, ModelConfig), prog=f"tdpo {command}")
    for action in parser._actions:
        if action.dest in (*REFUSED, *UNUSED):
            action.help = argparse.SUPPRESS
    _group(parser)
    argv = [part for x in argv for part in (x.split("=", 1) if x.startswith("--config=") else [x])]
    if argv[-1:] == ["--config"]:
        raise ValueError("config: got none, wanted a YAML file")
    data, args, model = parser.parse_args_and_config(args=[os.path.expanduser(x) for x in argv])
    for options in (data, model):
        expand_home(options)
    if (module := model.lora_target_modules) and isinstance(module, str) and module.isidentifier():
        model.lora_target_modules = [module]  # TRL makes a pattern of a single name, which no module matches
    args.model_init_kwargs = _loading(args, model)
    return data, args, model


def _group(parser: argparse.ArgumentParser) -> None:
    """Show the options in groups: the loss, the data, the model, then what TRL and transformers have for any run."""
    of = {x.name: "training, of transformers" for x in fields(TrainingArguments)}
    of |= {x.name: "training, of TRL" for x in fields(DPOConfig) if x.name not in of}
    of |= {x.name: "model" for x in fields(ModelConfig)} | {x.name: "data" for x in fields(DataArguments)}
    of |= dict.fromkeys(TDPOConfig.__annotations__, "the loss and what TDPO adds")
    for title in ("the loss and what TDPO adds", "data", "model", "training, of TRL", "training, of transformers"):
        group = parser.add_argument_group(title)
        group._group_actions += [x for x in parser._optionals._group_actions if of.get(x.dest) == title]
    grouped = [x for group in parser._action_groups[2:] for x in group._group_actions]
    parser._optionals._group_actions = [x for x in parser._optionals._group_actions if x not in grouped]


def check(data: DataArguments, args: TDPOConfig, model: ModelConfig, command: str) -> None:
    """Raise ValueError for options that do not go together, are without effect, or name what is not there."""
    where = data.dataset_name or data.datasets
    for name, value in (("model_name_or_path", model.model_name_or_path), ("dataset_name", where)):
        if value is None:
            raise ValueError(f"{name}: got none, wanted a path or a name on the hub")
    data.columns = columns_of("columns", data.columns)
    _check_datasets(data)
    for name, needs in (
        ("eval_dataset_config", "eval_dataset_name"), ("ref_model_revision", "ref_model_name_or_path"),
    ):  # fmt: skip
        if getattr(data, name) is not None and getattr(data, needs) is None:
            raise ValueError(f"{name}: got {getattr(data, name)!r} without {needs}, wanted both or neither")
    for switch, names in WANT.items():
        for name in names:
            if not getattr(model, switch) and (seen := getattr(model, name)) != getattr(ModelConfig(), name):
                raise ValueError(f"{name}: got {seen!r} without {switch}, wanted both or neither")
    if data.ignore_bias_buffers:
        raise ValueError("ignore_bias_buffers: got True, wanted False: torch has long since taken such buffers")
    args.loss_options().describe(args.device)
    if command == "cache" and args.reference_cache is None:
        raise ValueError("reference_cache: got none, wanted the directory to write")
    _check_evaluation(data, args)
    if command == "train":
        _find_checkpoint(args)
    name = model.model_name_or_path
    if is_adapter(name) and model.use_peft:
        raise ValueError(f"use_peft: got it with {name}, an adapter, which is trained on; wanted one of them")
    _check_model("model_name_or_path", base_of(name) if is_adapter(name) else name, args.model_init_kwargs)
    if command == "eval" and data.ref_model_name_or_path is None:
        if not is_adapter(name):
            raise ValueError("ref_model_name_or_path: got none for a whole model, wanted what its training began with")
        data.ref_model_name_or_path = base_of(name)
    if data.ref_model_name_or_path is not None:
        _check_model("ref_model_name_or_path", data.ref_model_name_or_path, loading_of_reference(data, args))


def _check_evaluation(data: DataArguments, args: TDPOConfig) -> None:
    """Check that what is there to evaluate on is evaluated on, and is not what is trained on."""
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    for name in ("eval_dataset_name", "test_split_size"):
        if (seen := getattr(data, name)) is not None and not evaluates:
            raise ValueError(f"{name}: got {seen} without evaluation, wanted eval_strategy steps or epoch, or neither")
    if args.do_eval and not evaluates or args.do_predict:
        raise ValueError("do_eval, do_predict: got True, wanted eval_strategy steps or epoch")
    splits = (("dataset_train_split", data.dataset_name), ("dataset_test_split", data.eval_dataset_name))
    for option, name in splits:
        split, usual = getattr(data, option), getattr(ScriptArguments, option)
        if split != usual and name is not None and not _has_splits(name):
            raise ValueError(f"{option}: got {split!r} for {name}, which has no splits, wanted none")
    if not evaluates:
        return
    if data.test_split_size is not None:
        if data.eval_dataset_name is not None:
            raise ValueError("test_split_size: got it with eval_dataset_name, wanted one of them to evaluate on")
    elif data.eval_dataset_name is None and (data.datasets or not _has_splits(data.dataset_name)):
        raise ValueError(
            "eval_strategy: got one dataset without splits, which is trained on, wanted test_split_size or "
            "eval_dataset_name to evaluate on"
        )
    elif _is_trained_on(data):
        name = "dataset_test_split" if data.eval_dataset_name is None else "eval_dataset_name"
        raise ValueError(f"{name}: got {getattr(data, name)}, which is trained on, wanted other pairs to evaluate on")


def _check_datasets(data: DataArguments) -> None:
    """Check the list that stands in place of one dataset, and fill in each one's names of columns."""
    if data.datasets is None:
        return
    for option in ("dataset_name", "dataset_config"):
        if getattr(data, option) is not None:
            raise ValueError(f"{option}: got {getattr(data, option)} and datasets, wanted one of them")
    for number, each in enumerate(data.datasets, 1):
        known = isinstance(each, dict) and "path" in each and set(each) <= {*IN_DATASETS}
        if not known:
            seen = ", ".join(map(str, each)) if isinstance(each, dict) else each
            raise ValueError(
                f"datasets, number {number}: got {seen}, wanted path, and any of {', '.join(IN_DATASETS[1:])}"
            )
        each["columns"] = columns_of(f"datasets, number {number}: columns", each.get("columns")) or data.columns


def columns_of(name: str, given: str | dict[str, str] | None) -> dict[str, str] | None:
    """Return the data's names of columns by ours, as a mapping or ``"prompt=question,chosen=good"`` say them."""
    found = given
    if isinstance(given, str):
        found = dict(part.split("=", 1) for part in given.split(",") if "=" in part)
        found = found if len(found) == given.count(",") + 1 else None
    if given is not None and not (isinstance(found, dict) and found and set(found) <= set(FIELDS)):
        raise ValueError(f"{name}: got {given}, wanted names for some of {', '.join(FIELDS)}, as prompt=question")
    return found


def _has_splits(name: str) -> bool:
    """Return whether splits have names there: not in a file, nor in one dataset that `save_to_disk` wrote."""
    path = Path(name)
    return not path.is_file() and not (path / "dataset_info.json").exists()


def _is_trained_on(data: DataArguments) -> bool:
    if data.datasets:
        return any(_is_trained_on(_alone(data, each)) for each in data.datasets)
    trained, evaluated = data.dataset_name, data.eval_dataset_name or data.dataset_name
    if os.path.exists(trained) and os.path.exists(evaluated):
        trained, evaluated = os.path.realpath(trained), os.path.realpath(evaluated)
    if trained != evaluated or not _has_splits(trained):
        return trained == evaluated
    same_config = data.eval_dataset_config in (None, data.dataset_config)
    return same_config and data.dataset_train_split == data.dataset_test_split


def _alone(data: DataArguments, each: dict[str, Any]) -> DataArguments:
    return replace(
        data, datasets=None, dataset_name=each["path"], dataset_config=each.get("name"),
        dataset_train_split=each.get("split", "train"),
    )  # fmt: skip


def _loading(args: TDPOConfig, model: ModelConfig) -> dict[str, Any]:
    """Return what `from_pretrained` is called with: ``model_init_kwargs``, and the options that stand for some."""
    given, usual = dict(args.model_init_kwargs or {}), _of_options(args, ModelConfig())
    options = _of_options(args, model)
    if "torch_dtype" in given:
        given["dtype"] = given.pop("torch_dtype")
    for name, value in given.items():
        if name in options and str(options[name]) not in (str(value), str(usual.get(name))):
            raise ValueError(f"{name}: got {options[name]}, and {value} in model_init_kwargs, wanted one of them")
    return options | given


def _of_options(args: TDPOConfig, model: ModelConfig) -> dict[str, Any]:
    options = dict(revision=model.model_revision, attn_implementation=model.attn_implementation, dtype=model.dtype)
    trusted = getattr(args, "trust_remote_code", getattr(model, "trust_remote_code", False))
    options |= {"trust_remote_code": trusted, "quantization_config": get_quantization_config(model)}
    return {name: value for name, value in options.items() if value is not None}


def _check_model(option: str, name: str, loading: dict[str, Any]) -> None:
    """Check, before data are read, that there is a model of this name, and that its files have their whole length."""
    folder = Path(name)
    if is_adapter(name):
        raise ValueError(
            f"{option}: got {name}, an adapter, wanted a whole model: `tdpo merge {name} FOLDER` makes one"
        )
    if not folder.exists() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"{option}: got {name}, and there is no such folder")
    where = {key: loading[key] for key in ("revision", "trust_remote_code") if key in loading}
    with said_in_one_line(f"{option}: got {name}, {'' if folder.exists() else 'no folder here, '}wanted a model"):
        AutoConfig.from_pretrained(name, **where)
    for path in sorted(folder.glob("*.safetensors")):
        with said_in_one_line(f"{option}: got {path}, wanted a whole file"), safe_open(path, framework="pt"):
            pass


def is_adapter(name: str) -> bool:
    """Return whether a folder holds a PEFT adapter without its model."""
    return (Path(name) / "adapter_config.json").exists() and not (Path(name) / "config.json").exists()


def base_of(adapter: str) -> str:
    """Return the model that an adapter is for. Raises ValueError where its config names none."""
    path = Path(adapter) / "adapter_config.json"
    if base := json.loads(path.read_text()).get("base_model_name_or_path"):
        return base
    raise ValueError(f"model_name_or_path: got {adapter}, whose adapter_config.json has no base_model_name_or_path")


def loading_of_reference(data: DataArguments, args: TDPOConfig) -> dict[str, Any]:
    """Return how the reference is loaded: as the model is, but with the revision of its own repository."""
    options = {name: value for name, value in args.model_init_kwargs.items() if name != "revision"}
    return options if data.ref_model_revision is None else options | {"revision": data.ref_model_revision}


def _find_checkpoint(args: TDPOConfig) -> None:
    """Put a folder in the place of ``last``, the last checkpoint, and ``auto``, the last whole one if there is any."""
    wanted = args.resume_from_checkpoint
    if wanted == "auto":
        args.resume_from_checkpoint = _last_whole(args.output_dir)
        if args.process_index == 0:
            where = args.resume_from_checkpoint or "the beginning: there is no whole checkpoint"
            print(f"resume_from_checkpoint: auto: from {where}", flush=True)
    elif wanted in ("last", True):
        there = os.path.isdir(args.output_dir)
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir) if there else None
        if args.resume_from_checkpoint is None:
            raise ValueError(f"resume_from_checkpoint: got last, and there is no checkpoint in {args.output_dir}")
    elif wanted and not os.path.isdir(wanted):
        raise ValueError(f"resume_from_checkpoint: got {wanted}, and there is no such folder, wanted one, last or auto")


def _last_whole(folder: str) -> str | None:
    """Return the checkpoint of the latest step that was written to its end."""
    found = [path for path in Path(folder).glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    latest_first = sorted(found, key=lambda path: -int(path.name.partition("-")[2]))
    return next((str(path) for path in latest_first if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether files that are cut off, or missing because a save was, show that a checkpoint is not whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # the last file of a save
        for path in checkpoint.rglob("*.safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(path) for path in checkpoint.rglob("*.pt"))
