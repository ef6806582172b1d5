"""The smallest shape and who runs it, a ceiling that nobody measured, and a made-up row."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import rows
from bench import run as running
from bench.conditions import conditions
from bench.measure import Ceiling
from bench.shapes import SHAPES

CPU, CEILING = torch.device("cpu"), Ceiling(1e12, 1e10)
TINY = replace(SHAPES["tiny"], calls=1)


def run_tiny(names: list[str], shape=TINY, rounds: int = 1) -> list[rows.Row]:
    return running.run(shape, "float32", names, rounds, conditions(), CEILING, lambda n: None, CPU)


def made_up(**facts) -> rows.Row:
    facts = {"provider": "ours", "budget_bytes": 0, "shape": "tiny", "conditions": conditions()} | facts
    return rows.Row(T=32, V=500, D=32, dtype="float32", rounds=3, **facts)
