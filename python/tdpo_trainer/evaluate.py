"""`tdpo eval`: a trained model on held-out pairs, each counted once, with intervals over the pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import TrainingArguments

from .metrics import OVER_PAIRS
from .parallelism import copies_of_a_batch, pairs_that_count
from .record import Record
from .run import make_trainer
from .trainer import TDPOTrainer

Z = NormalDist().inv_cdf(0.975)  # of a 95 % interval
FILE = "eval.json"
ROWS = {  # what the table calls each
    "loss": "loss", "accuracy": "reward accuracy", "accuracy_without_kl": "reward accuracy, without the KL",
    "margin": "reward margin", "margin_without_kl": "reward margin, without the KL",
    "kl_chosen": "KL of chosen completions, nats", "kl_rejected": "KL of rejected completions, nats",
    "logp_chosen": "log-probability of chosen completions", "logp_rejected": "log-probability of rejected completions",
}  # fmt: skip


class Estimate(NamedTuple):
    """Hold a mean over pairs and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


class Evaluator(TDPOTrainer):
    """Keep what each pair of an evaluation adds to the means, of all processes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pairs: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def _record(self, sums: Tensor) -> None:
        copies = copies_of_a_batch(getattr(self.accelerator, "parallelism_config", None), self.model)
        counted = pairs_that_count(self.accelerator, len(sums), copies)
        counts = torch.arange(len(sums), device=sums.device) < counted
        values = self.accelerator.gather(torch.cat([sums[..., 0], counts[:, None].to(sums)], 1)).cpu()
        values = values.view(-1, copies, len(sums), values.shape[-1])[:, 0].flatten(0, 1)
        self.pairs.append(values[values[:, -1] > 0])


def evaluate(argv: Sequence[str]) -> int:
    """Print a table of means over the pairs, and write it as JSON where an ``output_dir`` is given."""
    trainer = make_trainer(argv, "eval", Evaluator)
    trainer.remove_callback(Record)
    trainer.evaluate()
    values = torch.cat(trainer.pairs)
    if not trainer.accelerator.is_main_process:
        return 0
    found = estimates(values, trainer.args.beta)
    print(f"\n{table(found, len(values))}")
    if trainer.args.output_dir != TrainingArguments().output_dir:
        path = Path(trainer.args.output_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"pairs": len(values)} | {name: x._asdict() for name, x in found.items()}, indent=1))
        print(f"\nsaved in {path}")
    return 0


def estimates(values: Tensor, beta: float) -> dict[str, Estimate]:
    """Return the means of `ROWS` over pairs, given the sums ``(P, ...)`` of `metrics.pair_sums`.

    Rewards without the KL are DPO's. Intervals are mean +- 1.96 standard errors; those of accuracies are Wilson's.
    """
    of = dict(zip(OVER_PAIRS, values.double().unbind(1), strict=False))
    margin = of["rewards/margins"]
    without = margin - beta * of["kl/margin"]
    means = dict(
        loss=of["loss"], margin=margin, margin_without_kl=without, kl_chosen=of["kl/chosen"],
        kl_rejected=of["kl/rejected"], logp_chosen=of["logps/chosen"], logp_rejected=of["logps/rejected"],
    )  # fmt: skip
    found = {name: _normal(x) for name, x in means.items()}
    found |= {"accuracy": _wilson(margin > 0), "accuracy_without_kl": _wilson(without > 0)}
    return {name: found[name] for name in ROWS}


def _normal(x: Tensor) -> Estimate:
    mean, error = x.mean().item(), (x.std() / math.sqrt(len(x))).item() if len(x) > 1 else math.inf
    return Estimate(mean, mean - Z * error, mean + Z * error)


def _wilson(right: Tensor) -> Estimate:
    n, p = len(right), right.double().mean().item()
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Estimate(p, *((centre + sign * half) / (1 + Z * Z / n) for sign in (-1, 1)))


def table(found: Mapping[str, Estimate], pairs: int) -> str:
    lines = [f"{f'{pairs:,} pairs':<42}{'mean':>10}   95 % interval"]
    for name, x in found.items():
        shown = [f"{value:.1%}" if name.startswith("accuracy") else f"{value:.4f}" for value in x]
        lines.append(f"{ROWS[name]:<42}{shown[0]:>10}   {shown[1]} to {shown[2]}")
    return "\n".join(lines)
