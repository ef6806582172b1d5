"""What every test of the laws shares: hypothesis settings, the seed, the `gpu` marker, small tiles."""

from __future__ import annotations

import os
from collections.abc import Generator

import interpreted
import pytest
import torch
from hypothesis import HealthCheck, settings
from runnable import backend_params, interpreting

from tdpo_kernels.backends import selfcheck, slab
from tdpo_kernels.backends.products import SIXTEEN_BIT

if interpreting():
    interpreted.round_bf16()
    os.environ.setdefault(selfcheck.SWITCH, "0")  # checks would take half of the time; their own tests turn them on
torch.set_num_threads(1)  # thousands of tiny products: threads only wait for one another

WAIT = {"trainer", "test_parallel.py", "test_parallel_laws.py"}  # whose `long` tests run when asked for (``-m long``)

ONE_TILE = "one_tile"

settings.register_profile(
    "laws",
    derandomize=True,
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("laws")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped, saying so, without one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if "long" in item.keywords and not config.option.markexpr and WAIT & set(item.path.parts):
            item.add_marker(pytest.mark.skip(reason="long: -m long runs it"))
    walked = [item for item in items if _in_one_tile(item) and _is_walked(item)]
    config.hook.pytest_deselected(items=walked)
    items[:] = [item for item in items if not (_in_one_tile(item) and _is_walked(item))]


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
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Tiles so small that tiny inputs have several row blocks, many column tiles and ragged last ones. Call it for
    another size.
    """

    def set_(rows: int = 16, cols: int = 64) -> None:
        if not _in_one_tile(request.node):
            for device in slab.TILE:
                monkeypatch.setitem(slab.TILE, device, (rows, cols))

    set_()
    return set_


@pytest.fixture(params=[*backend_params(), ONE_TILE])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend there is, by name: a later one joins by itself; and `tiled` with its own tiles, which hold a small
    case whole, whatever `small_tiles` says."""
    return "tiled" if _in_one_tile(request.node) else request.param


def _is_walked(item: pytest.Item) -> bool:
    """Kernels, and 16 bits, have no way of their own for one tile."""
    return interpreting() or item.callspec.params.get("dtype") in SIXTEEN_BIT


def _in_one_tile(item: pytest.Item) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("backend") == ONE_TILE
