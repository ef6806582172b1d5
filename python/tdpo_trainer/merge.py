"""`tdpo merge`: an adapter and its model become one model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from .errors import said_in_one_line
from .options import base_of, is_adapter


def merge(argv: Sequence[str]) -> int:
    """Write to a new folder the model with its adapter's weights added in, and the tokenizer.

    Raises:
        UsageError: the first folder holds no adapter, the second is not new, or the model cannot be read.
    """
    parser = argparse.ArgumentParser("tdpo merge", description=merge.__doc__.splitlines()[0])
    parser.add_argument("adapter", help="a folder that training with --use_peft has written")
    parser.add_argument("output", help="the folder to write, which is new or empty")
    parser.add_argument("--dtype", default="auto", help="in which the model is loaded and written; default: its own")
    options = parser.parse_args(argv)
    with said_in_one_line("merge"):
        _check(options.adapter, Path(options.output))
        base = base_of(options.adapter)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=options.dtype)
        merged = PeftModel.from_pretrained(model, options.adapter).merge_and_unload(safe_merge=True)
        merged.save_pretrained(options.output)
        own = (Path(options.adapter) / "tokenizer_config.json").exists()
        AutoTokenizer.from_pretrained(options.adapter if own else base).save_pretrained(options.output)
    print(f"merged in {options.output}")
    return 0


def _check(adapter: str, output: Path) -> None:
    if not is_adapter(adapter):
        raise ValueError(f"adapter: got {adapter}, wanted a folder with an adapter_config.json")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output: got {output}, which is there already, wanted a new folder")
