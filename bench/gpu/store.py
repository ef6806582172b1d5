"""The records of a campaign: JSON Lines in one file, never half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .plan import FINAL

Record = dict[str, Any]  # stage, item, configuration, status, seconds, facts, and message and log of what went wrong


class Store:
    """At most one record of each item and configuration: the last."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "records.jsonl"
        self.records: dict[tuple[str, str, str], Record] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            self.note(json.loads(line))

    def note(self, record: Record) -> None:
        """Without writing it."""
        self.records.pop(_key(record), None)  # the last is to stand last
        self.records[_key(record)] = record

    def add(self, record: Record) -> None:
        """The file is replaced as a whole, so that whoever is interrupted leaves the old one or the new one."""
        self.note(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_suffix(".tmp")
        with aside.open("w") as file:
            file.writelines(json.dumps(r) + "\n" for r in self.records.values())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path)

    def find(self, stage: str, item: str, configuration: Record) -> Record | None:
        return self.records.get(_key(dict(stage=stage, item=item, configuration=configuration)))

    def has(self, stage: str, item: str, configuration: Record, again: bool) -> bool:
        """Whether it need not be done; `again`: only what went well need not."""
        record = self.find(stage, item, configuration)
        return record is not None and record["status"] in (("ok",) if again else FINAL)


def _key(record: Record) -> tuple[str, str, str]:
    return record["stage"], record["item"], json.dumps(record["configuration"], sort_keys=True)
