"""Write what the model answers to some evaluation prompts as training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import LogCompletionsCallback

SAMPLES = "samples.txt"


class Samples(LogCompletionsCallback):
    """TRL's callback, and the same completions as plain text in `SAMPLES`, at each evaluation.

    Args:
        trainer: with an evaluation dataset; of several, the first one's prompts are taken.
        count: the number of prompts, from the dataset's beginning.
        generation_config: as `transformers` has it; None: the model's own.

    Raises:
        ValueError: the trainer has no evaluation dataset whose prompts can be looked up.
    """

    def __init__(self, trainer: Trainer, count: int, generation_config: Any = None) -> None:
        pairs = trainer.eval_dataset
        pairs = next(iter(pairs.values()), None) if isinstance(pairs, dict) else pairs
        if not isinstance(pairs, Dataset):
            raise ValueError(f"samples: got {count} and no evaluation dataset with a length, wanted one, or 0")
        super().__init__(trainer, generation_config, freq=1)
        self.eval_dataset = pairs.select(range(min(count, len(pairs))))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Do nothing: completions belong to evaluations."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tokenizer, known = kwargs["processing_class"], len(self.table)
        side = tokenizer.padding_side
        super().on_step_end(args, state, control, **kwargs)
        tokenizer.padding_side = side
        if state.is_world_process_zero:
            with open(Path(args.output_dir) / SAMPLES, "a") as file:
                file.writelines(
                    f"--- step {step}\n{prompt}\n>>> {said}\n\n" for step, prompt, said in self.table[known:]
                )
