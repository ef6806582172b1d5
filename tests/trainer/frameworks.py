"""A framework's own command line with its recipe, on what `test_frameworks` made; runs in the framework's environment.

    python frameworks.py NAME FOLDER '{"name": value, ...}'

The process it starts has this file too, which keeps in ``FOLDER/recorded.pt`` what the framework's trainer was given
and made of it: the weights before and after, each micro-batch, and the log.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECIPES = HERE.parents[1] / "python" / "recipes"
RECORD = "TDPO_TEST_RECORD"
TRAINING = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
    learning_rate=0.05, optim="sgd", lr_scheduler_type="constant", max_grad_norm=1e9, weight_decay=0.0,
    logging_steps=1, save_strategy="no", report_to="none",
)  # fmt: skip


Options = dict[str, Any]
Command = tuple[list[str], dict[str, str]]  # and its environment


def ms_swift(folder: Path, recipe: bool, settings: Options, options: Options) -> Command:
    processes = options.pop("processes", 1)
    arguments = TRAINING | dict(
        rlhf_type="dpo", model=folder / "policy", model_type="llama", template="dummy", torch_dtype="float32",
        tuner_type="full", ref_model=folder / "reference", ref_model_type="llama", dataset=folder / "messages.jsonl",
        split_dataset_ratio=0, use_hf=True, output_dir=folder / "out", beta=0.5, use_cpu=True, fp16=False, bf16=False,
        dataset_num_proc=1, dataloader_num_workers=0,
    ) | options  # fmt: skip
    if arguments["tuner_type"] == "lora":
        del arguments["ref_model"], arguments["ref_model_type"]
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    plugins = [str(RECIPES / "ms_swift_plugin.py")] if recipe else []
    command = [str(Path(sys.executable).parent / "swift"), "rlhf", "--external_plugins", *plugins, __file__, *flags]
    environment = {name.upper(): str(value) for name, value in settings.items()}
    if processes > 1:
        environment |= {"NPROC_PER_NODE": str(processes), "MASTER_PORT": str(free_port())}
    return command, environment


def llama_factory(folder: Path, recipe: bool, settings: Options, options: Options) -> Command:
    processes = options.pop("processes", 1)
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    arguments = TRAINING | dict(
        stage="dpo", do_train=True, overwrite_output_dir=True,
        finetuning_type="full", model_name_or_path=folder / "policy", template="empty",
        ref_model=folder / "reference", dataset_dir=folder, dataset="pairs", cutoff_len=64, output_dir=folder / "out",
        pref_beta=0.5, use_cpu=True, preprocessing_num_workers=1, dataloader_num_workers=0,
    ) | settings | options  # fmt: skip
    if arguments["finetuning_type"] == "lora":
        del arguments["ref_model"]
    file = written(folder / "run.yaml", arguments)
    launcher = Path(importlib.util.find_spec("llamafactory").origin).with_name("launcher.py")  # of `llamafactory-cli`
    command = recorded(RECIPES / "llama_factory_tdpo.py" if recipe else launcher, file)
    if processes > 1:
        torchrun = f"-m torch.distributed.run --no-python --nproc-per-node {processes} --master-port {free_port()}"
        command = [sys.executable, *torchrun.split(), *command]
    return command, {}


def axolotl(folder: Path, recipe: bool, settings: Options, options: Options) -> Command:
    evaluated = {"test_datasets": [texts(folder)]} if options.pop("evaluate", False) else {}
    theirs = TRAINING | dict(
        rl="dpo", rl_beta=0.5, base_model=folder / "policy", sequence_len=64, output_dir=folder / "out",
        datasets=[texts(folder)], dataset_prepared_path=folder / "prepared", bf16=False, fp16=False, tf32=False,
        optimizer="sgd", lr_scheduler="constant", micro_batch_size=2, eval_batch_size=2, dataset_num_proc=1,
        attn_implementation="eager",
    ) | settings | evaluated | options  # fmt: skip
    del theirs["optim"], theirs["report_to"], theirs["per_device_train_batch_size"]
    del theirs["per_device_eval_batch_size"], theirs["lr_scheduler_type"]
    ours = dict(plugins=["axolotl_tdpo.TDPOPlugin"], trainer_cls="axolotl_tdpo_trainer.TDPOTrainer") if recipe else {}
    command = Path(sys.executable).parent / "axolotl"
    file = written(folder / "run.yaml", ours | theirs)
    return recorded(command, "train", file, "--launcher", "python"), {"AXOLOTL_DO_NOT_TRACK": "1"}


def texts(folder: Path) -> Options:
    return dict(path=str(folder / "pairs.jsonl"), ds_type="json", split="train", type={"field_prompt": "prompt"})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def written(file: Path, arguments: Options) -> Path:
    """Write JSON, which is YAML."""
    file.write_text(json.dumps(arguments, default=str))
    return file


def recorded(script: Path, *arguments: object) -> list[str]:
    """``python script arguments``, where `record` is at work."""
    first = "import runpy, sys, frameworks; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-c", first, str(script), *map(str, arguments)]


COMMANDS = {"ms-swift": ms_swift, "llama-factory": llama_factory, "axolotl": axolotl}


def main(name: str, folder: Path, given: str) -> int:
    options = json.loads(given)
    settings = {key: options.pop(key) for key in list(options) if key.startswith("tdpo_")}
    command, environment = COMMANDS[name](folder, options.pop("recipe", True), settings, options)
    paths = [str(path) for path in (RECIPES, HERE, RECIPES.parent, RECIPES.parents[1])]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), RECORD: str(folder / "recorded.pt")}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=os.environ | environment | quiet, cwd=folder).returncode


def stand_in_for(module: str) -> None:
    """LLaMA-Factory imports torchaudio for texts too, whose wheels want the CUDA build of torch."""
    if importlib.util.find_spec(module) is None:
        sys.modules[module] = importlib.util.module_from_spec(ModuleSpec(module, None))


def record(to: str) -> None:
    """Make `transformers.Trainer` write down what it does from now on."""
    import torch
    from transformers import Trainer

    train, training_step = Trainer.train, Trainer.training_step
    steps: list[dict[str, Any]] = []

    def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
        return {name: x.detach().clone() for name, x in trainer.model.named_parameters()}

    def recording_step(self: Trainer, model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        steps.append({name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)})
        return training_step(self, model, inputs, *rest, **more)

    def recording_train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        before = weights(self)
        out = train(self, *args, **kwargs)
        if self.eval_dataset is not None:
            self.evaluate()
        kept = {"before": before, "steps": steps, "after": weights(self), "log": self.state.log_history}
        if self.args.process_index > 0:
            return out
        torch.save(kept | {"trained": [name for name, x in self.model.named_parameters() if x.requires_grad]}, to)
        return out

    Trainer.train, Trainer.training_step = recording_train, recording_step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
elif RECORD in os.environ:
    stand_in_for("torchaudio")
    record(os.environ[RECORD])
