"""Estimate, not measure, a TDPO loss with its backward on 8 to 4,096 ranks, from counted flops and bytes.

W ranks are data x v, each with 8,192 tokens. Each group of v ranks shares a vocabulary, and so has T = 8,192 v tokens:

    products    6 of 2 T (V / v) D flops: both models' logits, twice as nothing is kept, dh and dW
    vocabulary  forward gathers 8 fp32 numbers a token from each rank, backward sums dh in fp32: 4 D bytes a token
    gradient    of this rank's rows of the head in bf16, summed within nodes, then each rank its share between them

Nothing overlaps, which is pessimistic. The models' own layers are left out, with what they exchange.
"""

from __future__ import annotations

from math import ceil, log2

from .shapes import MODELS

MODEL, TOKENS = "llama-3.1-8b", 2**13
RANKS, VOCABULARY = (8, 64, 512, 4096), (1, 8)
NODE = 8  # ranks. Rates are the data sheets' of an H100, times what is assumed to be reached of them
FLOPS = 0.6 * 989e12  # bf16, dense
WITHIN = 0.8 * 450e9, 3e-6  # a node, NVLink 4: bytes a second and direction, and seconds a message takes at least
BETWEEN = 0.8 * 50e9, 10e-6  # nodes: 400 Gb/s InfiniBand for each rank


def estimate(ranks: int, v: int) -> dict[str, float]:
    """Return the seconds of a step by what they are spent on."""
    V, D, *_ = MODELS[MODEL]
    T, share, data = TOKENS * v, V // v * D, ranks // v
    inside = NODE // v  # ranks of a node that hold the same rows of the head
    return {
        "products": 6 * 2 * T * share / FLOPS,
        "vocabulary": ring(4 * 8 * T * v, v, *WITHIN) + 2 * ring(4 * D * T, v, *WITHIN),
        "gradient": 2 * (ring(2 * share, inside, *WITHIN) + ring(2 * share / inside, data // inside, *BETWEEN)),
    }


def ring(size: float, ranks: int, rate: float, hop: float) -> float:
    """Return the seconds in which each of a ring's ranks hands on all of `size` but its own share."""
    return (ranks - 1) / ranks * size / rate + ceil(log2(ranks)) * hop
