"""TDPO's controlled-sentiment experiment in miniature: fine-tune, sample preference pairs, align, and look.

    python python/examples/sentiment.py                                   film reviews and a small model
    python python/examples/sentiment.py --data pairs.jsonl --model DIR    your pairs and your model

The training loop itself is `tdpo_loop.py`.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import models
import report
import reviews
import torch
from pairs import (
    Batch,
    Ids,
    Pair,
    UsageError,
    collate,
    collate_rows,
    completion_ids,
    draw,
    encode,
    prompt_ids,
    read_pairs,
    split_by_prompt,
)
from tdpo_loop import evaluate, metrics, train
from tdpo_trainer.head import UnsupportedModel, check_head
from torch import nn
from tqdm import tqdm

from tdpo_kernels import TDPOLoss
from tdpo_kernels.backends import choose

FEWEST_PAIRS = 10
REVIEWS = 6000
SAMPLES = 512  # completions drawn at once, and drawn for the mean sentiment

DETAILS = """\
data:
  --data takes a JSONL file with the string fields prompt, chosen and rejected, used as they are (apply a chat template
  beforehand; its BOS is not doubled). A tenth of the pairs, with prompts of their own, is held out. Sentiment is not
  measured then.
model:
  Without --model, a small Llama with random weights and a tokenizer of one token per word is trained first, on the
  generated reviews, or with --data on the chosen completions of the file. With --model alone, that model is fine-tuned
  on the generated reviews. With --model and --data it is taken as fine-tuned already (--sft-steps asks for more).
"""


@dataclass
class Study:
    """Hold what TDPO starts from. `probe` are prompts to sample for sentiment, none when there is no lexicon."""

    model: nn.Module
    tokenizer: object
    training: list[Pair]
    held_out: list[Pair]
    probe: list[Ids]
    longest: int  # tokens a sampled completion may have


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        run(options)
    except (UsageError, UnsupportedModel) as error:
        print(f"sentiment.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    kind = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("sentiment.py", description=__doc__, epilog=DETAILS, formatter_class=kind)
    add = parser.add_argument
    add("--data", type=Path, metavar="PAIRS.JSONL", help="your preference pairs in place of the generated reviews")
    add("--model", type=Path, metavar="DIR", help="a local Hugging Face causal-LM directory, in place of a small one")
    add("--steps", type=_count(1), default=150, help="TDPO steps (default %(default)s)")
    add("--sft-steps", type=_count(0), help="fine-tuning steps (default 300; 0 with both --data and --model)")
    add("--pairs", type=_count(FEWEST_PAIRS), help="training pairs to sample (default 1500), or to use of --data (all)")
    add("--batch", type=_count(1), default=32, help="pairs per step (default %(default)s)")
    add("--lr", type=float, help="TDPO learning rate (default 3e-4; 1e-5 with --model)")
    add("--beta", type=float, default=0.1, help="strength of the pull to the reference (default %(default)s)")
    add("--alpha", type=float, help="weight of the KL difference in tdpo2 (default 0.5); tdpo1 has none")
    add("--variant", default="tdpo2", choices=("tdpo1", "tdpo2"), help="(default %(default)s)")
    add("--backend", default="auto", help="of tdpo_kernels (default %(default)s)")
    add("--max-length", type=_count(16), default=512, help="tokens of prompt and completion (default %(default)s)")
    add("--seed", type=_count(0, 2**63 - 1), default=0, help="(default %(default)s)")
    add("--out", type=Path, default=Path("demo-out"), help="folder for the results (default %(default)s)")
    return parser.parse_args(argv)


def _count(least: int, most: float = float("inf")) -> Callable[[str], int]:
    def count(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            limit = "" if most == float("inf") else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least {least}{limit}")
        return int(text)

    return count


def run(options: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loss = dict(beta=options.beta, alpha=options.alpha, variant=options.variant, backend=options.backend)
    check(options, loss, device)
    torch.manual_seed(options.seed)
    rng = Random(options.seed)
    study = pairs_study(options, rng, device) if options.data else reviews_study(options, rng, device)

    reference = copy.deepcopy(study.model)
    before = probe(study, options.seed)
    history = align(study, reference, options, loss, rng, device)
    after = probe(study, options.seed)

    scores = (reviews.mean_sentiment(before), reviews.mean_sentiment(after)) if study.probe else None
    text = report.table(history, len(study.held_out), scores, len(study.probe))
    show(options, text, before, after, history, report.backend_line(options.backend, device))


def check(options: argparse.Namespace, loss: dict, device: torch.device) -> None:
    """Everything that can be refused before the first long phase, in the library's own words where it has them."""
    try:
        TDPOLoss(**loss)
        choose(options.backend, device)
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise UsageError(str(error)) from error
    if options.lr is not None and not 0 < options.lr < float("inf"):
        raise UsageError(f"--lr: got {options.lr}, wanted a positive number")


def reviews_study(options: argparse.Namespace, rng: Random, device: torch.device) -> Study:
    """A model fine-tuned on generated reviews, and pairs of its own samples. Held-out prompts are new to all phases."""
    texts, seen, unseen = reviews.corpus(rng, REVIEWS)
    print(f"{len(texts)} reviews, {len(set(texts))} distinct, on {len(seen)} prompts; {len(unseen)} prompts held out")
    model, tokenizer = get_model(options, (prompt + text for prompt, text in texts), device)
    rows = [(prompt_ids(tokenizer, prompt), completion_ids(tokenizer, text)) for prompt, text in texts]
    check_head(model, collate_rows(rows[:1], models.pad_id(tokenizer), device).inputs)
    fine_tune(model, tokenizer, rows, options, 300, rng)

    seen, unseen = ([prompt_ids(tokenizer, prompt) for prompt in some] for some in (seen, unseen))
    longest = max(len(completion) for _, completion in rows) + 4
    count = options.pairs or 1500
    study = Study(model, tokenizer, [], [], rng.sample(unseen, min(SAMPLES, count, len(unseen))), longest)
    held = max(count // 4, FEWEST_PAIRS)
    study.training = list(tqdm(sample_pairs(study, seen, count, rng), "sampling pairs", count))
    study.held_out = list(tqdm(sample_pairs(study, unseen, held, rng), "held-out pairs", held))
    return study


def pairs_study(options: argparse.Namespace, rng: Random, device: torch.device) -> Study:
    """The pairs of a file, and the model given for them, or a small one fine-tuned on what was chosen."""
    pairs = read_pairs(options.data, options.pairs)
    prompts = {pair.prompt for pair in pairs}
    if len(pairs) < FEWEST_PAIRS or len(prompts) < 2:
        wanted = f"wanted at least {FEWEST_PAIRS} pairs and 2 prompts, for some are held out"
        raise UsageError(f"{options.data}: got {len(pairs)} pairs on {len(prompts)} prompts, {wanted}")
    training, held_out = split_by_prompt(pairs, rng)
    print(f"{len(pairs)} pairs on {len(prompts)} prompts, {len(held_out)} pairs held out")
    texts = (f"{pair.prompt}{text}" for pair in training for text in (pair.chosen, pair.rejected))
    model, tokenizer = get_model(options, texts, device)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(options.max_length, limit or options.max_length)
    study = Study(model, tokenizer, encode(tokenizer, training, room), encode(tokenizer, held_out, room), [], room)
    check_head(model, collate(study.training[:1], models.pad_id(tokenizer), device).inputs)
    rows = [(pair.prompt, pair.chosen) for pair in study.training]
    fine_tune(model, tokenizer, rows, options, 0 if options.model else 300, rng)
    return study


def get_model(options: argparse.Namespace, texts: Iterator[str], device: torch.device):
    if options.model:
        model, tokenizer = models.load(options.model)
    else:
        torch.set_num_threads(1)  # to wake a second one costs more than its half of products this small
        tokenizer = models.small_tokenizer(texts)
        model = models.small_model(tokenizer, options.max_length)
    print(f"{type(model).__name__}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}, on {device}")
    return model.to(device), tokenizer


def fine_tune(
    model: nn.Module, tokenizer, rows: Sequence[tuple[Ids, Ids]], options: argparse.Namespace, default: int, rng: Random
) -> None:
    steps = default if options.sft_steps is None else options.sft_steps
    if not steps:
        return
    pad = models.pad_id(tokenizer)
    batches = (collate_rows(some, pad, model.device) for some in draw(rows, 2 * options.batch, steps, rng))
    bar = tqdm(models.fine_tune(model, batches, steps, lr=2e-5 if options.model else 3e-3), "fine-tuning", steps)
    for loss in bar:
        bar.set_postfix(loss=f"{loss:.3f}")


def sample_pairs(study: Study, prompts: Sequence[Ids], count: int, rng: Random) -> Iterator[Pair]:
    """`count` pairs: two samples per prompt, ranked by sentiment; ties say nothing and are dropped."""
    found, drawn, limit = 0, 0, 20 * count + 2 * SAMPLES
    while found < count:
        if drawn >= limit:
            seen = f"{found} of {drawn} sampled pairs differ in sentiment, wanted {count}"
            raise UsageError(f"{seen}: the fine-tuned model does not write reviews yet, raise --sft-steps")
        some = rng.choices(prompts, k=min(SAMPLES // 2, 2 * count))
        drawn += len(some)
        both = models.sample(study.model, study.tokenizer, [*some, *some], study.longest)
        ranked = rank(study.tokenizer, some, both[: len(some)], both[len(some) :])[: count - found]
        found += len(ranked)
        yield from ranked


def rank(tokenizer, prompts: Sequence[Ids], first: Sequence, second: Sequence) -> list[Pair]:
    pairs = []
    for prompt, one, other in zip(prompts, first, second, strict=True):
        a, b = (reviews.sentiment(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (one, other))
        if a != b:
            pairs.append(Pair(prompt, *((one, other) if a > b else (other, one))))
    return pairs


def probe(study: Study, seed: int) -> list[str]:
    """Fresh samples on held-out prompts, with the same random numbers before and after."""
    if not study.probe:
        return []
    torch.manual_seed(seed)
    print(f"sampling {len(study.probe)} reviews to measure their sentiment")
    out = models.sample(study.model, study.tokenizer, study.probe, study.longest)
    return [study.tokenizer.decode(ids, skip_special_tokens=True) for ids in out]


def align(
    study: Study, reference: nn.Module, options: argparse.Namespace, loss: dict, rng: Random, device: torch.device
) -> report.History:
    """TDPO, with a look at the held-out pairs ten times on the way."""
    pad, history = models.pad_id(study.tokenizer), report.History()
    lr = options.lr or (1e-5 if options.model else 3e-4)

    def held_out() -> Iterator[Batch]:
        for start in range(0, len(study.held_out), options.batch):
            yield collate(study.held_out[start : start + options.batch], pad, device)

    history.held_out.append((0, evaluate(study.model, reference, held_out(), **loss)))
    batches = (collate(some, pad, device) for some in draw(study.training, options.batch, options.steps, rng))
    bar = tqdm(train(study.model, reference, batches, lr=lr, **loss), options.variant.upper(), options.steps)
    for step, out in enumerate(bar, 1):
        now = metrics([out])
        history.training.append((step, now))
        bar.set_postfix(loss=f"{now.loss:.3f}", accuracy=f"{now.accuracy:.0%}")
        if step % max(options.steps // 10, 1) == 0 or step == options.steps:
            history.held_out.append((step, evaluate(study.model, reference, held_out(), **loss)))
    return history


def show(
    options: argparse.Namespace, text: str, before: list[str], after: list[str], history: report.History, backend: str
) -> None:
    for name, samples in (("before", before), ("after", after)):
        for sample in samples[:3]:
            print(f"  {name:>6}: ... {sample.strip()}")
    figure = options.out / "curves.png"
    alpha = "" if options.variant == "tdpo1" else f", alpha {0.5 if options.alpha is None else options.alpha:g}"
    report.plot(history, figure, f"{options.variant.upper()}, beta {options.beta:g}{alpha}")
    (options.out / "table.txt").write_text(f"{text}\n\n{backend}\n", encoding="utf-8")
    print(f"\n{text}\n\n{backend}\ncurves: {figure}")


if __name__ == "__main__":
    sys.exit(main())
