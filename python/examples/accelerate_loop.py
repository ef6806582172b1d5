"""TDPO in a plain Accelerate loop: copy this file.

    python python/examples/accelerate_loop.py --model DIR --data pairs.jsonl
    torchrun --nproc-per-node 2 python/examples/accelerate_loop.py --model DIR --data pairs.jsonl

Or ``accelerate launch``, which starts one process on a machine without GPUs whatever it is told. Run with accelerate
1.15 on CPUs, in one process and in two (DDP).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from tdpo_trainer.data import load_pairs
from tdpo_trainer.forward import pair_outputs, reference_side
from tdpo_trainer.head import check_head
from tdpo_trainer.metrics import over_processes
from tdpo_trainer.plain import collate, tokenize
from tdpo_trainer.step import Batch, LossOptions, model_inputs, pair_loss
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer


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
    for batch in batches:
        inputs = model_inputs(batch)
        with accelerator.accumulate(wrapped), accelerator.autocast():
            theirs = reference_side(frozen, inputs, unwrapped=reference)
            out = pair_outputs(wrapped, theirs, inputs, pair_loss(batch, options), unwrapped=policy)
            accelerator.backward(out["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()
        loss = accelerator.reduce(out["loss"].detach(), "mean").item()
        yield {"loss": loss} | over_processes(out["sums"], accelerator.gather)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    # one order of the pairs, however many processes
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(gradient_accumulation_steps=options.accumulate, cpu=options.cpu, dataloader_config=order)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with accelerator.main_process_first():
        rows = tokenize(tokenizer, pairs_of(options.data))
    policy, reference = (AutoModelForCausalLM.from_pretrained(options.model) for _ in range(2))
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


def pairs_of(path: Path) -> Iterable[Mapping[str, str]]:
    """Ends with the reason, and no traceback, where they are not pairs of texts."""
    try:
        return load_pairs(str(path), texts=True)
    except ValueError as error:
        print(f"accelerate_loop.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
