"""Keep finished runs: JSON Lines, a file each, written whole or not at all. First comes what the run was, then what was
measured on the way, last every step's loss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from ..conditions import Conditions
from .settings import Run, Settings


class Mixed(Exception):
    """Say that results of other settings or of another checkpoint are where new ones are to go."""

    def __init__(self, path: Path, there: object, wanted: object) -> None:
        if isinstance(there, dict) and isinstance(wanted, dict):
            names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
            there, wanted = ({name: side.get(name) for name in names} for side in (there, wanted))
        super().__init__(f"{path} is of {there}, these are {wanted}: take another --out, or remove that folder")


@dataclass(frozen=True)
class Point:
    """Hold means over samples or held-out pairs, at a step of a run. KLs are in nats."""

    step: int
    examples: int  # pairs seen
    reward: float  # the lexicon's, of samples, from -1 to 1
    kl: float  # of policy and reference, the mean log-ratio of samples
    chosen_kl: float  # SeqKL(reference || policy), summed over the vocabulary
    rejected_kl: float
    accuracy: float  # of the reward with the KL, eq. (5)
    accuracy_without_kl: float  # of DPO's reward, the log-ratio alone
    entropy: float  # of a token of the samples
    distinct_1: float
    distinct_2: float
    distinct_3: float
    loss: float  # on held-out pairs

    @property
    def margin(self) -> float:
        """Return the margin as the paper's figure has it."""
        return abs(self.chosen_kl - self.rejected_kl)


@dataclass(frozen=True)
class Record:
    run: Run
    settings: dict
    checkpoint: str
    parameters: int
    conditions: Conditions
    seconds: float
    points: list[Point]
    losses: list[float]


class Store:
    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings.as_json()
        (folder / "runs").mkdir(parents=True, exist_ok=True)

    def add(self, record: Record) -> None:
        header = {name: value for name, value in asdict(record).items() if name not in ("points", "losses")}
        lines = [header, *map(asdict, record.points), {"losses": record.losses}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self._file(record.run), lambda file: file.write(text.encode()))

    def has(self, run: Run) -> bool:
        return self._file(run).exists()

    def load(self, checkpoint: str = "") -> list[Record]:
        """Return all of them. Raise `Mixed` where settings or checkpoints are not the same, or not the one named."""
        records = [_parse(path) for path in sorted((self.folder / "runs").glob("*.jsonl"))]
        for record in records:
            checkpoint = checkpoint or record.checkpoint
            if record.settings != self.settings:
                raise Mixed(self._file(record.run), record.settings, self.settings)
            if record.checkpoint != checkpoint:
                raise Mixed(self._file(record.run), f"checkpoint {record.checkpoint}", f"of checkpoint {checkpoint}")
        return records

    def _file(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.jsonl"


def _parse(path: Path) -> Record:
    header, *points, last = map(json.loads, path.read_text().splitlines())
    parts = dict(run=Run(**header.pop("run")), conditions=Conditions.parse(header.pop("conditions")))
    return Record(**header, **parts, points=[Point(**point) for point in points], losses=last["losses"])


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Leave the old file, the new one, or none, whenever it is interrupted."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as file:
            write(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
