"""Trainers' tests: skipped where transformers is not installed; `long` ones run when asked for (``-m long``)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr:
        return
    for item in items:
        if "long" in item.keywords and "trainer" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="long: -m long runs it"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
