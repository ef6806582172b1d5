"""A framework's own command line with its recipe, on what `test_frameworks` made; runs in the framework's environment.

    python frameworks.py NAME FOLDER name=value ...

The process it starts has this file too, which keeps in ``FOLDER/recorded.pt`` what the framework's trainer was given
and made of it: the weights before and after, each micro-batch, and the log.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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


def ms_swift(folder: Path, options: dict[str, str]) -> list[str]:
    with_recipe = options.pop("recipe", "yes") == "yes"
    plugins = [RECIPES / "ms_swift_plugin.py"] if with_recipe else []
    arguments: dict[str, Any] = TRAINING | dict(
        rlhf_type="dpo", model=folder / "policy", model_type="llama", template="dummy", torch_dtype="float32",
        tuner_type="full", ref_model=folder / "reference", ref_model_type="llama", dataset=folder / "messages.jsonl",
        split_dataset_ratio=0, use_hf="true", output_dir=folder / "out", beta=0.5, use_cpu="true", fp16="false",
        bf16="false", dataset_num_proc=1, dataloader_num_workers=0,
    ) | options  # fmt: skip
    if arguments["tuner_type"] == "lora":
        del arguments["ref_model"], arguments["ref_model_type"]
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    swift = [str(Path(sys.executable).parent / "swift"), "rlhf"]
    return [*swift, "--external_plugins", *map(str, plugins), __file__, *flags]


COMMANDS: dict[str, Callable[[Path, dict[str, str]], list[str]]] = {"ms-swift": ms_swift}


def main(name: str, folder: Path, *options: str) -> int:
    environment = {part[0]: part[2] for part in (option.partition("=") for option in options)}
    settings = {key: environment.pop(key) for key in list(environment) if key.startswith("TDPO_")}
    paths = [str(path) for path in (RECIPES, HERE, RECIPES.parent, RECIPES.parents[1])]
    environ = os.environ | settings | {
        "PYTHONPATH": os.pathsep.join(paths), RECORD: str(folder / "recorded.pt"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    return subprocess.run(COMMANDS[name](folder, environment), env=environ, cwd=folder).returncode


def record(to: str) -> None:
    """From now on `transformers.Trainer` writes down what it does."""
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
        torch.save(kept | {"trained": [name for name, x in self.model.named_parameters() if x.requires_grad]}, to)
        return out

    Trainer.train, Trainer.training_step = recording_train, recording_step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]))
elif RECORD in os.environ:
    record(os.environ[RECORD])
