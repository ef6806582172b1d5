"""What the paper shows (Zeng et al. 2024, arXiv 2404.11999, the IMDb experiment, GPT-2 Large), and the orderings in it.

Read by eye from the published figure: good for an order, not for a comparison of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

SOURCE = "arXiv 2404.11999, the IMDb figure, GPT-2 Large, read by eye"
KL = 2.5  # at which rewards were read
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
    """Of each quantity every method with the next lower one; what reads the same says nothing."""
    read = [Ordering(quantity, *pair) for quantity, values in READ.items() for pair in _steps(values)]
    return read + [Ordering(*said) for said in SAID]


def _steps(values: dict[str, float]) -> Iterator[tuple[str, str]]:
    levels = sorted(set(values.values()), reverse=True)
    groups = [[method for method, value in values.items() if value == level] for level in levels]
    for upper, lower in zip(groups, groups[1:], strict=False):
        yield from ((more, less) for more in upper for less in lower)
