"""The only writer of ``tdpo_kernels/tuning/tables/<device>.json``: what was measured, where the numbers are from.

Rows replace those of the same case and size; the others stay. `bench.gpu` measures.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tdpo_kernels import tuning
from tdpo_kernels.tuning.config import Device
from tdpo_kernels.tuning.table import TABLES, Measured, Table, Winner, parse, table_of, table_path


def write(
    device: Device, configs: Iterable[Measured] = (), winners: Iterable[Winner] = (), folder: Path = TABLES
) -> Path:
    """Into the device's table in `folder`, which is made if need be. What is written is read back first."""
    old = table_of(device, folder) or Table(device.name, device.arch)
    by_case = {(row.case, row.D): row for row in (*old.configs, *configs)}
    by_size = {(row.itemsize, row.D, row.V): row for row in (*old.winners, *winners)}
    ordered = sorted(by_case.values(), key=lambda row: (str(row.case), row.D))
    table = Table(device.name, device.arch, (*ordered,), tuple(by_size[key] for key in sorted(by_size)))
    path = table_path(device, folder)
    parse(table.to_json(), str(path))
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(table.to_json())
    aside.replace(path)
    tuning.forget()
    return path
