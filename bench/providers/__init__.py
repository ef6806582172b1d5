"""Who is measured, by name. Each has a file of its own; `provider.py` says what one is."""

from __future__ import annotations

from . import cce, compiled, eager, floor, liger, linear_ce, ours, trl
from .provider import Provider, Step

__all__ = ["FLOOR", "PROVIDERS", "Provider", "Step"]

FLOOR = "floor"
BUDGETS = {"0": 0, "all": ours.EVERYTHING} | {f"{n}MB": n * ours.MB for n in (32, 64, 128, 192, 256, 300, 512)}
BACKENDS = {"ours": "auto", "fused": "fused", "tiled": "tiled", "naive": "naive"}
PROVIDERS: dict[str, Provider] = {
    FLOOR: floor.PROVIDER,
    "eager": eager.PROVIDER,
    "compiled": compiled.PROVIDER,
    "trl": trl.PROVIDER,
    "liger": liger.PROVIDER,
    "cce": cce.PROVIDER,
    "linear_ce": linear_ce.PROVIDER,
    **{f"{name}@{label}": ours.provider(backend, budget)
       for name, backend in BACKENDS.items() for label, budget in BUDGETS.items()},
}  # fmt: skip
