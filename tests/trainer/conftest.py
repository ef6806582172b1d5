"""Trainers' tests: skipped where transformers is not installed."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
