"""The process that does the work: ``python -m bench.gpu.worker SETTINGS FD``, started by `driver.py`.

After an error that its device does not recover from it exits, and another one goes on behind that item.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from . import tables
from .device import Device, open_device
from .plan import Facts, Failed, Item, Settings, Skipped, configuration
from .store import Record, Store

ITSELF = "the stage itself"


class Worker:
    def __init__(self, settings: Settings, pipe: int, device: Device) -> None:
        self.settings, self.pipe, self.device = settings, pipe, device
        self.store = Store(Path(settings.out))

    def run(self) -> None:
        left: list[str] = []
        tables.install(self.settings)
        for stage in self.settings.stages:
            try:
                left += self._stage(stage)
            except Exception as error:  # in what is around its items
                self._tell(event="done", record=self._blank(stage, ITSELF) | _outcome(error) | {"seconds": 0.0})
        self._tell(event="left", items=left)

    def _stage(self, stage: str) -> list[str]:
        """What there was no time for."""
        module = importlib.import_module(f".stages.{stage}", __package__)
        items = [i for i in module.items(self.device, self.settings) if self.settings.only in i.name]
        left = [f"{stage}: {item.name}" for item in items if not self._item(stage, item)]
        if hasattr(module, "finish"):
            module.finish(self.device, self.settings, self._records(stage, items))
        if self.store.find(stage, ITSELF, self._configuration(stage)):
            self._tell(event="done", record=self._blank(stage, ITSELF) | {"status": "ok", "seconds": 0.0})
        return left

    def _blank(self, stage: str, item: str) -> Record:
        return dict(
            stage=stage, item=item, configuration=self._configuration(stage), commit=self.settings.commit,
            dirty=self.settings.dirty, date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), facts={},
        )  # fmt: skip

    def _configuration(self, stage: str) -> Facts:
        return configuration(stage, self.settings, self.device.facts(), tables.chosen())

    def _records(self, stage: str, items: list[Item]) -> list[Record]:
        """What is known of the items of a stage, whoever did them."""
        facts = self._configuration(stage)
        found = [self.store.find(stage, item.name, facts) for item in items]
        return [record for record in found if record is not None and record["status"] == "ok"]

    def _item(self, stage: str, item: Item) -> bool:
        """False if there was no time for it."""
        record = self._blank(stage, item.name)
        if self.store.has(stage, item.name, record["configuration"], self.settings.again):
            return True
        guess = min(item.seconds, 5.0) if self.settings.dry else item.seconds
        if time.time() + guess > self.settings.deadline:
            return False
        self._tell(event="start", record=record, limit=item.limit, log=os.fstat(1).st_size)
        began, outcome = time.time(), {}
        try:
            outcome = {"status": "ok", "facts": item.run()}
        except Exception as error:
            outcome = _outcome(error)
        broken = self._clean()
        record |= outcome | {"seconds": time.time() - began}
        self.store.note(record)
        self._tell(event="done", record=record)
        if broken:
            print(f"{stage}: {item.name}: {broken}", file=sys.stderr)
            self._tell(event="broken")
            os._exit(1)
        return True

    def _clean(self) -> str:
        """Gives memory back for the next item; why that was not possible, or nothing."""
        try:
            self.device.clean()
        except Exception as error:
            return f"the device does not recover: {error}"
        return ""

    def _tell(self, **event: object) -> None:
        text = json.dumps(event, default=str) + "\n"
        for at in range(0, len(text), 1 << 15):
            os.write(self.pipe, text[at : at + (1 << 15)].encode())


def _outcome(error: Exception) -> Facts:
    if isinstance(error, Skipped):
        return {"status": "skipped", "message": str(error)}
    if isinstance(error, Failed):
        return {"status": "failed", "message": str(error), "facts": error.facts}
    traceback.print_exc()
    return {"status": "failed", "message": f"{type(error).__name__}: {error}"}


def main() -> int:
    settings, pipe = Settings.from_json(sys.argv[1]), int(sys.argv[2])
    try:
        device = open_device(settings.dry)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    Worker(settings, pipe, device).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
