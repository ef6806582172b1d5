"""The scaling estimate against arithmetic by hand."""

from __future__ import annotations

import pytest

from bench.scaling import FLOPS, estimate, ring


def test_a_step_of_the_bytes_that_the_library_moves():
    """32 and 4 D bytes a token, as `tests/test_parallel.py` counts them."""
    V, D, T = 128256, 4096, 8 * 8192
    assert ring(800.0, 4, 100.0, 0.5) == 600 / 100 + 2 * 0.5 and ring(800.0, 1, 100.0, 0.5) == 0
    split, whole = estimate(64, 8), estimate(64, 1)
    assert split["products"] == pytest.approx(whole["products"]) == pytest.approx(12 * 8192 * V * D / FLOPS)
    assert split["vocabulary"] == pytest.approx((7 * 32 * T + 2 * 7 / 8 * 4 * D * T) / 360e9 + 9 * 3e-6)
    assert split["gradient"] == pytest.approx(2 * (7 / 8 * 2 * V / 8 * D / 40e9 + 3 * 10e-6))
    assert whole["vocabulary"] == 0 and estimate(8, 8)["gradient"] == 0
