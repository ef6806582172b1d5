"""Set what every test of the laws shares: hypothesis settings, the seed, the `gpu` marker, small tiles."""

from __future__ import annotations

import os
from collections.abc import Generator

import interpreted
import pytest
import torch
from hypothesis import HealthCheck, settings
from runnable import grid, interpreting, runnable, set_tiles, takes

from tdpo_kernels import directions

if interpreting():
    interpreted.round_bf16()
    interpreted.check_addresses()
    os.environ.setdefault("TDPO_KERNELS_SELF_CHECK", "0")  # would take half of the time; its own tests turn it on
torch.set_num_threads(1)  # thousands of tiny products: threads only wait for one another

# whose `long` tests run when asked for (``-m long``)
WAIT = {"trainer", "test_parallel.py", "test_parallel_errors.py", "test_parallel_laws.py"}

settings.register_profile(
    "laws", derandomize=True, max_examples=10 if interpreting() else 25, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("laws")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("long") and not config.option.markexpr and WAIT & set(item.path.parts):
            item.add_marker(pytest.mark.skip(reason="long: -m long runs it"))
    items[:] = [item for item in items if _can_run(item)]


def _can_run(item: pytest.Item) -> bool:
    """Return whether the backend takes the dtype: there is no test of what no backend does."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    backend, dtype = params.get("backend"), params.get("dtype")
    return backend not in runnable() or not isinstance(dtype, torch.dtype) or takes(backend, dtype)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """A test whose backend does not take its inputs is skipped, in the library's own words."""
    try:
        return (yield)
    except ValueError as error:
        if str(error).startswith("backend: got 'fused', which does not run here"):
            pytest.skip(str(error))
        raise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def small_tiles():
    """Tiles so small that tiny inputs have several row blocks, many column tiles and ragged last ones. Call it for
    another size."""
    before = dict(grid.TILE)
    set_tiles(16, 64)
    yield set_tiles
    grid.TILE.update(before)


@pytest.fixture
def tiles_of_5_by_16(small_tiles) -> None:
    """Cut so small that a few rows already cross row blocks and column blocks."""
    small_tiles(5, 16)


@pytest.fixture(params=runnable())
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here, by name: a later one joins by itself."""
    return request.param


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch, tiles_of_5_by_16) -> None:
    """Cut a call's rows into several blocks or groups, the last of them short."""
    monkeypatch.setitem(directions.LEAST, "cpu", 7)
