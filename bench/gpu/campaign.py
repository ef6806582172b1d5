"""Keep the campaign's time and notes: a plan with seconds, a deadline, and a note of each item as it ends.

The work is done in a forked process. When that dies or hangs, the item is noted as failed and the next process goes on
behind it. Nothing of CUDA may be touched before the fork.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from tdpo_kernels.backends import availability

from ..report.tables import Table, markdown
from . import summary

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = ROOT / "bench" / "results" / "compiled.txt"
MODULES = dict.fromkeys(("env", "verify", "headline", "profile"), "stages") | {"tune": "tune"}  # others: kernels
NO_DEVICE = 2  # an exit status
Facts = dict[str, Any]


class Finding(Exception):
    """End an item as "skipped", "failed" or "red", which is timed and wrong, for a reason. The facts are kept."""

    def __init__(self, status: str, reason: str, facts: Facts | None = None) -> None:
        super().__init__(reason)
        self.status, self.facts = status, facts or {}


@dataclass(frozen=True)
class Item:
    """One thing to do. It is not begun with less time left than it is thought to take, and ended at its limit."""

    name: str
    run: Callable[[], Facts]
    seconds: float  # a guess, without compiling
    compiles: int = 0  # kernels, at first use
    backend: str = ""  # skipped where that one does not run
    limit: float = 120.0
    ours: bool = True  # depends on this library and its tables; what does not is never measured again for them
    stage: str = ""

    @property
    def takes(self) -> float:
        return self.seconds + self.compiles * compile_seconds()


@dataclass(frozen=True)
class Settings:
    out: Path
    dry: bool
    deadline: float  # as time.time() counts
    stages: tuple[str, ...]
    only: str = ""
    commit: str = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @cached_property
    def source(self) -> str:
        """Return the digest of the library and of the tables in use."""
        paths = [path for path in sorted((ROOT / "tdpo_kernels").rglob("*")) if path.suffix in (".py", ".json")]
        paths += [Path(name) for name in [os.environ.get("TDPO_KERNELS_TUNING")] if name]
        return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:12]

    def plan(self) -> list[Item]:
        found = []
        for stage in self.stages:
            module = importlib.import_module(f"bench.gpu.{MODULES.get(stage, 'kernels')}")
            found += [replace(item, stage=stage) for item in getattr(module, stage)(self) if self.only in item.name]
        return found


class Notes(dict[tuple, Facts]):
    """The notes of a campaign, JSON Lines that are only appended to. Of each item the last one counts."""

    def __init__(self, settings: Settings) -> None:
        self.path, self.settings = settings.out / "notes.jsonl", settings
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self |= {tuple(note["key"]): note for line in lines if line.endswith("}") for note in [json.loads(line)]}

    def add(self, item: Item, status: str, began: float, message: str = "", facts: Facts | None = None) -> Facts:
        note = dict(key=self.key(item), status=status, seconds=time.time() - began, message=message, facts=facts or {})
        self[note["key"]] = note
        with self.path.open("a") as file:
            file.write(json.dumps(note, default=str) + "\n")
        return note

    def key(self, item: Item) -> tuple[str, str, str]:
        """Return what a note is of: another library, or a dry run, does not pass for this one."""
        of = ("dry " if self.settings.dry else "") + (self.settings.source if item.ours else "anything")
        return item.stage, item.name, of

    def of(self, items: list[Item]) -> list[Facts]:
        return [self[key] for item in items if (key := self.key(item)) in self]

    def left(self, items: list[Item], *statuses: str) -> list[Item]:
        """Return the items with one of the statuses, by default those that are still to be done."""
        wanted = statuses or ("", "begun", "stopped")
        return [item for item in items if self.get(self.key(item), {"status": ""})["status"] in wanted]


def supervise(settings: Settings) -> int:
    """Print the plan, and start one process after another until all is done or the time is over."""
    items = settings.plan()
    todo = Notes(settings).left(items)
    print(_plan(todo, settings), flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    (settings.out / "log.txt").write_text("")
    before = len(todo) + 1  # a process that gets nothing done is the last
    while 0 < len(todo) < before and time.time() < settings.deadline:
        child = multiprocessing.get_context("fork").Process(target=_work, args=(settings,))
        child.start()
        try:
            child.join(settings.deadline - time.time())
        finally:
            child.kill()
            child.join()
            _note_ended(Notes(settings), items)
        before, todo = len(todo), Notes(settings).left(items) if child.exitcode not in (0, NO_DEVICE) else []
    return _conclude(settings, items)


def _note_ended(notes: Notes, items: list[Item]) -> None:
    """Note the item in the middle of which a process ended: as stopped if the time was over, else as failed."""
    over = time.time() >= notes.settings.deadline - 1
    for item in notes.left(items, "begun"):
        why = "no time was left" if over else f"its process ended, after {item.limit:.0f} s at the latest: see log.txt"
        notes.add(item, "stopped" if over else "failed", time.time(), why)


def _conclude(settings: Settings, items: list[Item]) -> int:
    notes = Notes(settings)
    found, left = notes.of(items), notes.left(items)
    (settings.out / "summary.md").write_text(summary.text(found, settings.dry))
    print(f"\n{summary.counts(found)}\n{settings.out / 'summary.md'} has every table")
    print(f"left for the same command: {len(left)} items, from {left[0].name!r} on" if left else "nothing is left")
    return int(any(note["status"] in ("failed", "red") for note in found) or not found)


def _plan(items: list[Item], settings: Settings) -> str:
    """Return the seconds of each stage, and when it ends."""
    cells, at = [], 0.0
    for stage in settings.stages:
        mine = [(item.takes, item.seconds) for item in items if item.stage == stage]
        takes, seconds = map(sum, zip(*mine, strict=True)) if mine else (0.0, 0.0)
        at += takes
        cells.append((stage, str(len(mine)), f"{takes:.0f}", f"{takes - seconds:.0f}", f"{at / 60:.1f}"))
    minutes = (settings.deadline - time.time()) / 60
    note = f"{minutes:.1f} minutes are left. A kernel is said to compile in {compile_seconds():.1f} s."
    return markdown([Table("plan", ("stage", "items", "seconds", "compiling", "ends at minute"), cells, [note])])


def compile_seconds() -> float:
    """Return the mean seconds of a kernel in the report of what kernels compile to; 0.0 there was a cache's."""
    found = re.findall(r"^sm_90 .* (\d+\.\d+)$", OFFLINE.read_text() if OFFLINE.exists() else "", re.MULTILINE)
    return mean([float(seconds) for seconds in found if float(seconds)] or [1.0])


def _work(settings: Settings) -> None:
    """Do what is left, in order, and print the table of each stage behind it."""
    log = (settings.out / "log.txt").open("ab")
    os.dup2(log.fileno(), sys.stderr.fileno())
    if not settings.dry and not torch.cuda.is_available():
        print("no CUDA device; --dry goes through the motions on a CPU", flush=True)
        os._exit(NO_DEVICE)
    notes, items = Notes(settings), settings.plan()
    gc.freeze()  # what was imported is never garbage, and looking through it behind each item takes long
    for stage in settings.stages:
        mine = [item for item in items if item.stage == stage]
        if todo := notes.left(mine):
            for item in todo:
                _perform(item, settings, notes)
            print(f"\n{summary.stage(stage, notes.of(mine))}\n", flush=True)
    os._exit(0)


def _perform(item: Item, settings: Settings, notes: Notes) -> None:
    began = time.time()
    left = settings.deadline - began
    if left < (0.1 if settings.dry else item.takes):
        return
    notes.add(item, "begun", began)
    faulthandler.dump_traceback_later(min(item.limit, left), exit=True)
    try:
        told = availability(settings.device).get(item.backend, "available")
        runs = told.startswith("available")
        note = notes.add(item, *(("ok", began, "", item.run()) if runs else ("skipped", began, told)))
    except Finding as finding:
        note = notes.add(item, finding.status, began, str(finding), finding.facts)
    except Exception as error:
        traceback.print_exc()
        note = notes.add(item, "failed", began, f"{type(error).__name__}: {error}".splitlines()[0][:300])
    faulthandler.cancel_dump_traceback_later()
    print(f"{item.stage:12}{item.name}: {note['status']} ({note['seconds']:.1f} s) {note['message']}", flush=True)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # raises where the device does not recover: the next process goes on
        torch.cuda.empty_cache()
