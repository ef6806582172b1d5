"""Say who is measured, by name. `provider.py` says what a provider is."""

from __future__ import annotations

from . import eager, floor, liger, ours, partial, trl
from .provider import Provider, Step

__all__ = ["BUDGETS", "FLOOR", "PROVIDERS", "Provider", "Step"]

FLOOR = "floor"
BUDGETS = {"0": 0, "all": 2**40, "1GiB": 2**30, "4GiB": 2**32}
BUDGETS |= {f"{n}MB": n * 10**6 for n in (32, 64, 128, 192, 256, 300, 512)}
BACKENDS = {"ours": "auto", "fused": "fused", "tiled": "tiled", "naive": "naive"}
PROVIDERS: dict[str, Provider] = {
    FLOOR: floor.PROVIDER,
    "eager": eager.PROVIDER,
    "compiled": eager.COMPILED,
    "trl": trl.PROVIDER,
    "liger": liger.PROVIDER,
    "cce": partial.CCE,
    "linear_ce": partial.LINEAR_CE,
    **{f"{name}@{label}": ours.provider(backend, budget)
       for name, backend in BACKENDS.items() for label, budget in BUDGETS.items()},
}  # fmt: skip
