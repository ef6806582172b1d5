"""Keeps the time, the log and the records while a worker works: a worker may crash, hang or run out of time.

The worker tells what it does in JSON lines through a pipe: ``start`` with the item, its limit and how long the log is,
``done`` with a record, ``broken`` where its device does not recover, ``left`` in the end with what there was no time
for. Everything else that it or its children print goes to the log.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from .plan import ROOT, Settings
from .store import Record, Store

MARGIN = 8.0  # seconds before the deadline at which a worker is stopped
WORKER = (sys.executable, "-m", "bench.gpu.worker")
TAIL = 3000  # characters of the log kept with a failure


class Driver:
    def __init__(self, settings: Settings, store: Store, worker: Sequence[str] = WORKER) -> None:
        self.settings, self.store, self.worker = settings, store, worker
        self.began = time.time()
        self.log = Path(settings.out) / "log.txt"
        self.log_at = 0
        self.broken = False
        self.left: list[str] = []
        self.stopped = ""
        self.failed: list[str] = []

    def run(self) -> None:
        """Worker after worker, each going on behind the item in which the last one ended."""
        while True:
            went_on, code = self._worker()
            if not went_on:
                if code:
                    self.failed.append("worker")
                    self.say(f"the worker ended with {code} between two items:\n{self._tail(self.log_at)}")
                return

    def say(self, text: str) -> None:
        print(f"[{time.time() - self.began:6.1f} s] {text}", flush=True)

    def _worker(self) -> tuple[bool, int]:
        """Whether another one is needed, and the exit status."""
        read, write = os.pipe()
        command = [*self.worker, self.settings.to_json(), str(write)]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self._environment(), stdout=log, stderr=log, pass_fds=[write],
                preexec_fn=os.setpgrp,
            )  # fmt: skip
        os.close(write)
        stopped, self.broken = "interrupted", False
        try:
            current, stopped = self._listen(read)
        finally:
            os.close(read)
            code = _end(process, patience=0.0 if stopped else 10.0)
        if current is None:
            return self.broken and not self._over(), 0 if stopped or self.broken else code
        why = stopped or f"the worker ended with {code} in the middle of it"
        status = "stopped" if stopped and self._over() else "failed"
        self._record(current["record"] | {"status": status, "message": why, "seconds": time.time() - current["at"]})
        return not self._over(), 0

    def _listen(self, pipe: int) -> tuple[Record | None, str]:
        """Until the worker is done with the pipe, or out of time: what it was at, and why it has to be stopped."""
        current, rest = None, b""
        while True:
            end = self.settings.deadline - MARGIN
            limit = end if current is None else min(end, current["at"] + current["limit"])
            if not select.select([pipe], [], [], max(limit - time.time(), 0.0))[0]:
                over = "no time was left" if self._over() else f"took longer than its limit of {current['limit']:.0f} s"
                return current, over
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                return current, ""
            *lines, rest = (rest + chunk).split(b"\n")
            for event in map(json.loads, lines):
                current = self._hear(event)
                if event["event"] == "left":  # its last word
                    return None, "done"

    def _hear(self, event: Record) -> Record | None:
        if event["event"] == "start":
            self.log_at = event["log"]
            return event | {"at": time.time()}
        if event["event"] == "left":
            self.left = event["items"]
        elif event["event"] == "broken":
            self.broken = True
        else:
            self._record(event["record"])
        return None

    def _record(self, record: Record) -> None:
        if record["status"] in ("failed", "stopped"):
            record |= {"log": self._tail(self.log_at)}
        if record["status"] == "stopped":
            self.stopped = f"{record['stage']}: {record['item']}"
        if record["status"] == "failed":
            self.failed.append(f"{record['stage']}: {record['item']}")
        self.store.add(record)
        note = f": {record['message'].splitlines()[0]}" if record.get("message") else ""
        self.say(f"{record['stage']:12}{record['item']}: {record['status']} ({record['seconds']:.1f} s){note}")

    def _tail(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")[-TAIL:]

    def _over(self) -> bool:
        return time.time() >= self.settings.deadline - MARGIN - 0.1

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env |= {"PYTHONUNBUFFERED": "1"}
        return env | ({"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if self.settings.dry else {})


def _end(process: subprocess.Popen, patience: float) -> int:
    """The exit status. What has not ended by then is ended, its children with it."""
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def guarded(work: Callable[[], None], driver: Driver) -> bool:
    """Runs `work`; False where it was interrupted or told to end, which leaves the records whole and no worker."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        work()
    except KeyboardInterrupt:
        driver.say("interrupted; the same command goes on from here")
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True
