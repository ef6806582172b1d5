"""The scaling estimate against arithmetic by hand."""

from __future__ import annotations

import pytest

from bench.scaling import LAYOUTS, Cluster, estimate, gathered, summed

PLAIN = Cluster(node=4, flops=1e12, node_bytes=100.0, net_bytes=10.0, node_hop=0.5, net_hop=2.0)


def test_a_sum_within_a_node_then_between_nodes_in_shares():
    assert summed(800.0, 4, 1, PLAIN) == 2 * (600 / 100 + 2 * 0.5)
    assert summed(800.0, 8, 1, PLAIN) == 2 * (600 / 100 + 2 * 0.5) + 2 * (100 / 10 + 1 * 2.0)
    assert summed(800.0, 2, 4, PLAIN) == 2 * (400 / 10 + 1 * 2.0)  # one rank a node
    assert summed(800.0, 1, 1, PLAIN) == gathered(800.0, 1, 1, PLAIN) == 0
    assert gathered(30.0, 8, 1, PLAIN) == 30 / 10 + 2.0 + 180 / 100 + 2 * 0.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_step_of_the_bytes_that_the_library_moves(layout):
    """32 and 4 D bytes a token, as `tests/test_parallel.py` counts them."""
    V, D, ranks, tokens = 128256, 4096, 64, 2**19
    data, sequence, v = layout.sizes(ranks)
    assert data * sequence * v == ranks
    found, cluster = estimate(layout, ranks, tokens), Cluster()
    assert found.products == pytest.approx(12 * tokens * V * D / ranks / cluster.flops)
    T = tokens * v / ranks
    moved = ((v - 1) * 32 * T + 2 * (v - 1) / v * 4 * D * T) / cluster.node_bytes
    hops = 0 if v == 1 else 3 * 3 * cluster.node_hop
    assert found.vocabulary == pytest.approx(moved + hops)
    assert found.held == 3 * 2 * V * D // v
    assert (found.sequence > 0) == layout.sequence
