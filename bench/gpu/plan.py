"""What a campaign consists of: stages, and in each of them items that are done, recorded and repeated one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("env", "verify", "tests", "sanitizer", "determinism", "memory", "tune", "bench", "profile")
AFTER_TUNING = ("verify", "tests", "sanitizer", "determinism", "memory", "bench", "profile")  # depend on the tables
WITH = {  # what else than its own module a stage consists of
    "tests": ("tests/**/*.py",),
    "sanitizer": ("bench/gpu/tiny.py",),
    "tune": ("bench/gpu/candidates.py",),
    "bench": ("bench/gpu/contenders.py",),
    "profile": ("bench/gpu/contenders.py",),
}
FINAL = ("ok", "failed", "skipped")  # not repeated; an item that ran out of time, "stopped", is
Facts = dict[str, Any]


class Skipped(Exception):
    """The item cannot be done here; the message says why."""


class Failed(Exception):
    """The item was done, and what it found is wrong. The facts are kept."""

    def __init__(self, message: str, facts: Facts | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


@dataclass(frozen=True)
class Item:
    """One thing to do. `seconds` is a guess: not begun with less left. Above `limit` it is stopped."""

    name: str
    run: Callable[[], Facts]
    seconds: float = 10.0
    limit: float = 180.0


@dataclass(frozen=True)
class Settings:
    """One run of the campaign. Stages in the order in which they are done."""

    out: str
    stages: tuple[str, ...]
    dry: bool
    deadline: float  # as time.time() counts
    commit: str
    dirty: bool
    source: str  # digest of the library as it was when the run began
    only: str = ""  # items whose name contains it
    again: bool = False  # what failed or was skipped is done again

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        data = json.loads(text)
        return Settings(**data | {"stages": tuple(data["stages"])})


def digest(*patterns: str) -> str:
    """Of the files of the checkout that match: names and content."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def source() -> str:
    """What results belong to where there is no version control to ask."""
    return digest("tdpo_kernels/**/*.py")


def configuration(stage: str, settings: Settings, device: Facts, chosen: str) -> Facts:
    """What a result depends on: it is repeated when any of this changes. `chosen`: the tables' configurations."""
    files = [f"bench/gpu/stages/{stage}.py", *WITH.get(stage, ())]
    facts = {"source": settings.source, "stage": digest(*files), "dry": settings.dry, **device}
    return facts | ({"tables": hashlib.sha256(chosen.encode()).hexdigest()[:12]} if stage in AFTER_TUNING else {})
