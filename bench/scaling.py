"""Estimate, not measure, one TDPO loss with its backward on 8 to 4,096 ranks, from counted flops and bytes.

W ranks are data x sequence x vocabulary. Each group of v ranks that share a vocabulary has T tokens, and each of its
ranks V / v columns:

    products    6 of 2 T (V / v) D flops: both models' logits, twice as nothing is kept, dh and dW
    vocabulary  forward gathers `SENT` fp32 numbers a token from each rank, backward sums dh in fp32: 4 D bytes a token
    sequence    one sum of 48 P + 8 bytes before the sigmoid, over the ranks that share P pairs
    gradient    of this rank's rows of the head in bf16, summed over all ranks that hold the same rows

What is assumed is a `Cluster`. Nothing overlaps, which is pessimistic: a trainer sums gradients while others are made.
The models' own layers are left out, with what they exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .shapes import MODELS

RANKS = tuple(2**n for n in range(3, 13))
MODEL = "llama-3.1-8b"
PAIR_TOKENS = 2 * 4096
TOKENS = 2**22  # a step of all ranks, where more ranks share the work
TOKENS_EACH = 2**13  # a rank's, where the work grows with the ranks
PRODUCTS = 6
SENT = 8  # numbers a row of each rank's state: six of its part of the vocabulary, and the label's two logits
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Cluster:
    """Eight H100 or H200 a node; rates are those of the data sheets times what is assumed to be reached of them."""

    node: int = 8
    flops: float = 0.6 * 989e12  # bf16, dense
    node_bytes: float = 0.8 * 450e9  # a second and direction: NVLink 4, 900 GB/s both ways
    net_bytes: float = 0.8 * 50e9  # a second and direction: 400 Gb/s InfiniBand for each GPU
    node_hop: float = 3e-6  # seconds a message takes at least
    net_hop: float = 10e-6


@dataclass(frozen=True)
class Layout:
    """How the ranks are used. A vocabulary's ranks are neighbours, then a sequence's, then those of the data."""

    name: str
    sequence: bool
    vocabulary: int

    def sizes(self, ranks: int) -> tuple[int, int, int]:
        """Return how many ranks share data, a sequence and a vocabulary."""
        rest = ranks // self.vocabulary
        return (1, rest, self.vocabulary) if self.sequence else (rest, 1, self.vocabulary)


LAYOUTS = (
    Layout("data", False, 1),
    Layout("vocabulary 8 x data", False, 8),
    Layout("vocabulary 8 x sequence", True, 8),
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step by what they are spent on, and the bytes of heads and of the head's gradient on a rank."""

    products: float
    vocabulary: float
    sequence: float
    gradient: float
    held: int

    @property
    def efficiency(self) -> float:
        """Return the share of a step that products alone would take."""
        return self.products / (self.products + self.vocabulary + self.sequence + self.gradient)


def estimate(layout: Layout, ranks: int, tokens: int, cluster: Cluster | None = None, model: str = MODEL) -> Estimate:
    """Estimate a step over so many tokens of all ranks together."""
    c, (V, D, *_) = cluster or Cluster(), MODELS[model]
    data, sequence, v = layout.sizes(ranks)
    T, rows = tokens / (data * sequence), V / v
    pairs = max(tokens / data / PAIR_TOKENS, 1)
    return Estimate(
        products=PRODUCTS * 2 * T * rows * D / c.flops,
        vocabulary=gathered(FP32 * SENT * T, v, 1, c) + summed(FP32 * D * T, v, 1, c),
        sequence=summed(48 * pairs + 8, sequence, v, c),
        gradient=summed(BF16 * rows * D, data * sequence, v, c),
        held=round(3 * BF16 * rows * D),
    )


def summed(size: float, ranks: int, stride: int, c: Cluster) -> float:
    """Return an all-reduce's seconds over ranks `stride` apart: within nodes, then each rank its share between them."""
    inside, nodes = _nodes(ranks, stride, c)
    return 2 * (_part(size, inside, c.node_bytes, c.node_hop) + _part(size / inside, nodes, c.net_bytes, c.net_hop))


def gathered(each: float, ranks: int, stride: int, c: Cluster) -> float:
    """Return an all-gather's seconds: between nodes, each rank over its own card, then within them."""
    inside, nodes = _nodes(ranks, stride, c)
    whole = each * nodes
    return _part(whole, nodes, c.net_bytes, c.net_hop) + _part(whole * inside, inside, c.node_bytes, c.node_hop)


def _nodes(ranks: int, stride: int, c: Cluster) -> tuple[int, int]:
    """Return how many ranks of a group a node has, and on how many nodes they are."""
    inside = max(min(ranks, c.node // stride), 1)
    return inside, ranks // inside


def _part(size: float, ranks: int, rate: float, hop: float) -> float:
    """Return the seconds in which each of a ring's ranks hands on all of `size` but its own share."""
    return (ranks - 1) / ranks * size / rate + math.ceil(math.log2(ranks)) * hop
