"""Say which runs there are, and what the paper has (Zeng et al. 2024, arXiv 2404.11999: IMDb, GPT-2 Large).

Nothing of the runs was chosen by what came out: sizes by time, the rest from the demo. The paper's values were read by
eye from the published figure, which is good for an order, not for a comparison of numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise

ALPHAS = (0.1, 0.3, 0.5, 0.7)
METHODS: dict[str, dict] = {
    "DPO": dict(variant="tdpo2", alpha=0.0),
    "TDPO1": dict(variant="tdpo1", alpha=None),
    **{f"TDPO2 {alpha}": dict(variant="tdpo2", alpha=alpha) for alpha in ALPHAS},
}
COMPARED = "TDPO2 0.5"  # whose run is repeated for parity
RATED = ("TDPO1", "TDPO2 0.5")  # whose runs are repeated at other learning rates
RATES = (0.1, 10.0)  # times the learning rate of all others
PUBLISHED = "published"


@dataclass(frozen=True)
class Settings:
    """Hold what a result depends on. Results of different settings never meet."""

    scale: str
    width: int  # of the model
    layers: int
    reviews: int  # for fine-tuning
    sft_steps: int
    pairs: int  # for each seed
    held_out: int  # pairs, the same for all
    samples: int  # completions drawn at each look
    steps: int
    looks: int  # at which a run is measured, besides the start; denser in the beginning
    seeds: tuple[int, ...] = (0, 1, 2)
    batch: int = 32  # pairs; twice as many reviews in fine-tuning
    sft_lr: float = 3e-3
    lr: float = 3e-4
    beta: float = 0.1

    @property
    def measured_at(self) -> list[int]:
        return sorted({round(self.steps * (i / self.looks) ** 2) for i in range(self.looks + 1)})

    def as_json(self) -> dict:
        return asdict(self) | {"seeds": list(self.seeds)}


SCALES = {
    "quick": Settings("quick", 32, 1, 200, 40, 64, 32, 32, 4, 2, seeds=(0, 1)),
    "small": Settings("small", 96, 2, 6000, 300, 6400, 512, 1024, 600, 15),
    "large": Settings("large", 512, 8, 60000, 2000, 64000, 4096, 4096, 6000, 30, sft_lr=3e-4, lr=3e-5),
}


@dataclass(frozen=True)
class Run:
    """Name a run. `loss` is a backend, or the published formula. Runs for parity are not measured on the way."""

    part: str  # "frontier", "parity" or "rate"
    method: str
    seed: int
    lr: float
    loss: str = "auto"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        ending = {"frontier": "", "parity": f"-{self.loss}-{self.dtype}", "rate": f"-lr{self.lr:.0e}"}[self.part]
        return f"{self.part}-{self.method.lower().replace(' ', '-')}-seed{self.seed}{ending}"


def plan(settings: Settings, backends: Iterable[str]) -> list[Run]:
    """Return the runs seed by seed, so that what is interrupted has every method.

    Parity is in fp32 for all losses, and in float64, where rounding is out of the way, for those that take it.
    """
    first, lr = settings.seeds[0], settings.lr
    runs = [Run("frontier", method, seed, lr) for seed in settings.seeds for method in METHODS]
    losses = [(loss, dtype) for dtype in ("float32", "float64") for loss in (PUBLISHED, *backends)]
    runs += [Run("parity", COMPARED, first, lr, loss, dtype) for loss, dtype in losses
             if not (loss == "fused" and dtype == "float64")]  # fmt: skip
    return runs + [Run("rate", method, first, rate * lr) for rate in RATES for method in RATED]


SOURCE = "arXiv 2404.11999, the IMDb figure, GPT-2 Large, read by eye"
KL = 2.5  # at which the paper's rewards were read
CHOSEN = {"TDPO1": 50, "DPO": 23, "TDPO2 0.1": 18, "TDPO2 0.3": 10.5, "TDPO2 0.5": 6.5, "TDPO2 0.7": 4}
REJECTED = {"DPO": 44, "TDPO2 0.1": 36, "TDPO1": 29, "TDPO2 0.3": 25, "TDPO2 0.5": 17, "TDPO2 0.7": 9}
MARGIN = {method: abs(CHOSEN[method] - REJECTED[method]) for method in CHOSEN}
REWARD = {"TDPO2 0.7": 0.97, "TDPO2 0.5": 0.96, "DPO": 0.86}
READ = {"chosen_kl": CHOSEN, "rejected_kl": REJECTED, "margin": MARGIN, "reward_at_kl": REWARD}
SAID = (("reward_at_kl", "TDPO2 0.5", "TDPO1"), ("reward_at_kl", "TDPO1", "DPO"))  # by the figure's caption
NAMES = {
    "chosen_kl": "SeqKL chosen", "rejected_kl": "SeqKL rejected", "margin": "absolute margin of SeqKL",
    "reward_at_kl": f"reward at KL {KL:g}",
}  # fmt: skip


@dataclass(frozen=True)
class Ordering:
    """The paper has more of `quantity` with one method than with another; without figures where it is only said."""

    quantity: str
    more: str
    less: str

    @property
    def figures(self) -> str:
        read = READ[self.quantity]
        return f"{read[self.more]:g} > {read[self.less]:g}" if {self.more, self.less} <= set(read) else "in words"


def orderings() -> list[Ordering]:
    """Return, of each quantity, every method with the next lower one; what reads the same says nothing."""
    found = []
    for quantity, values in READ.items():
        levels = sorted(set(values.values()), reverse=True)
        groups = [[method for method, value in values.items() if value == level] for level in levels]
        found += [Ordering(quantity, a, b) for upper, lower in pairwise(groups) for a in upper for b in lower]
    return found + [Ordering(*said) for said in SAID]
