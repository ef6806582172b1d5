"""TDPO in a plain Accelerate loop: copy this file.

    python python/examples/accelerate_loop.py --model DIR --data pairs.jsonl
    torchrun --nproc-per-node 2 python/examples/accelerate_loop.py --model DIR --data pairs.jsonl

Or ``accelerate launch``, which starts one process on a machine without GPUs whatever it is told. Run with accelerate
1.15 on CPUs, in one process and in two (DDP). Weights are trained in fp32 whatever the checkpoint has, because AdamW's
steps round to nothing in bfloat16; ``ACCELERATE_MIXED_PRECISION=bf16`` makes the products in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tdpo_trainer.data import load_pairs
from tdpo_trainer.errors import UsageError, said_in_one_line
from tdpo_trainer.forward import pair_outputs, reference_side
from tdpo_trainer.head import check_head
from tdpo_trainer.metrics import over_processes
from tdpo_trainer.plain import collate
from tdpo_trainer.step import Batch, LossOptions, model_inputs, pair_loss
from tdpo_trainer.tokens import tokenize
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def train(
    accelerator: Accelerator,
    policy: nn.Module,
    reference: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: DataLoader,
    options: LossOptions,
    *,
    max_norm: float = 1.0,
) -> Iterator[dict[str, float]]:
    """Trains `policy`; yields the loss and what `tdpo_trainer.metrics` names, over all processes, for each batch.

    The forward is the wrapper's (`pair_outputs`), so that DDP's and FSDP's gradient hooks are armed. Dropout stays off.
    """
    wrapped, optimizer, batches = accelerator.prepare(policy.eval(), optimizer, batches)
    frozen = accelerator.prepare_model(reference.eval().requires_grad_(False), evaluation_mode=True)
    count, together = len(batches), accelerator.gradient_accumulation_steps
    for index, batch in enumerate(batches):
        inputs = model_inputs(batch)
        in_step = min(together, count - index // together * together)  # fewer in the last step
        with accelerator.accumulate(wrapped), accelerator.autocast():
            theirs = reference_side(frozen, inputs, unwrapped=reference)
            out = pair_outputs(wrapped, theirs, inputs, pair_loss(batch, options), unwrapped=policy)
            accelerator.backward(out["loss"] * (together / in_step))  # backward divides by `together`
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss = accelerator.reduce(out["loss"].detach(), "mean").item()
        yield {"loss": loss} | over_processes(out["sums"], accelerator.gather)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the loop. Each process says in one line, without a traceback, what is wrong with the model or the data."""
    options = parse(argv)
    # one order of the pairs, however many processes
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, cpu=options.cpu, dataloader_config=order)
    try:
        tokenizer, policy, reference, rows = load(options)
    except UsageError as error:
        raise SystemExit(f"accelerate_loop.py: error: {error}") from None
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    to_batch = partial(collate, pad=pad, max_length=options.max_length)
    batches = DataLoader(rows, options.batch, shuffle=True, collate_fn=to_batch)
    loss = LossOptions(beta=options.beta, alpha=options.alpha, variant=options.variant)
    first: Batch = to_batch(rows[:1])
    for model in (policy, reference):
        check_head(model, model_inputs(first))
    accelerator.print(loss.describe(accelerator.device))

    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, weight_decay=0.0)
    steps = train(accelerator, policy, reference, optimizer, batches, loss)
    each = -(-len(batches) // accelerator.num_processes)
    bar = tqdm(steps, "TDPO", each, disable=not accelerator.is_main_process)
    for now in bar:
        bar.set_postfix(loss=f"{now['loss']:.4f}", accuracy=f"{now['rewards/accuracies']:.0%}")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        policy.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


def load(options: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, nn.Module, nn.Module, list]:
    """Return the tokenizer, the policy, its reference, and pairs as token ids. No process waits for another here."""
    with said_in_one_line("--data"):
        pairs = load_pairs(str(options.data), texts=True)
    with said_in_one_line(f"--model {options.model}"):
        policy, reference = (AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32) for _ in range(2))
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    return tokenizer, policy, reference, tokenize(tokenizer, pairs)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a local causal-LM directory: the policy and its reference")
    add("--data", type=Path, required=True, help="JSONL or Parquet with prompt, chosen and rejected")
    add("--out", type=Path, default=Path("out"), help="where the policy is saved (default %(default)s)")
    add("--batch", type=int, default=4, help="pairs per batch and process (default %(default)s)")
    add("--accumulate", type=int, default=1, help="batches per step (default %(default)s)")
    add("--lr", type=float, default=1e-6, help="(default %(default)s)")
    add("--beta", type=float, default=0.1, help="(default %(default)s)")
    add("--alpha", type=float, help="of tdpo2 (default 0.5); 0 is DPO")
    add("--variant", choices=("tdpo1", "tdpo2"), default="tdpo2", help="(default %(default)s)")
    add("--max-length", type=int, default=1024, help="tokens of prompt and completion (default %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the pairs (default %(default)s)")
    add("--cpu", action="store_true", help="on CPUs, though there is an accelerator")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
