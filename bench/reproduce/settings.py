"""Methods, sizes, and which runs there are. Nothing here was chosen by what came out: sizes by time, the rest from the
demo."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

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
    """What a result depends on. Results of different settings never meet."""

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
    """`loss` is a backend of `tdpo_kernels`, or the published formula. Runs for parity are not measured on the way."""

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
    """Seed by seed, so that an interrupted campaign has every method. Parity: in fp32 all losses, and in float64, where
    rounding is out of the way, those that take it."""
    first, lr = settings.seeds[0], settings.lr
    runs = [Run("frontier", method, seed, lr) for seed in settings.seeds for method in METHODS]
    losses = [(loss, dtype) for dtype in ("float32", "float64") for loss in (PUBLISHED, *backends)]
    runs += [Run("parity", COMPARED, first, lr, loss, dtype) for loss, dtype in losses
             if not (loss == "fused" and dtype == "float64")]  # fmt: skip
    return runs + [Run("rate", method, first, rate * lr) for rate in RATES for method in RATED]
