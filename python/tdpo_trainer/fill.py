"""Writing a reference cache: every process its own shards, going on where a killed run ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from filelock import FileLock, Timeout
from tqdm import tqdm

from .cache import (
    CacheError,
    CacheMeta,
    Pair,
    ReferenceCache,
    missing_shards,
    open_cache,
    read_meta,
    remove_unfinished,
    write_meta,
    write_shard,
)
from .forward import Reference
from .kernels import LMHead
from .step import Batch

SHARD_BYTES = 256 * 2**20  # about: it is also what a kill can cost


@dataclass(frozen=True)
class Source:
    """Hold what a cache is made of.

    dataset: rows of ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.
    collate: rows to a batch of ``2P`` sequences, on the CPU.
    reference: the reference's side of a batch on the accelerator's device; its head is stored if it has one.
    fingerprint: what the states depend on, by name.
    """

    dataset: Dataset
    collate: Callable[[list[dict]], Batch]
    reference: Callable[[Batch], Reference]
    fingerprint: dict[str, str]


def write_cache(
    directory: Path,
    source: Source,
    accelerator: Accelerator,
    *,
    batch_size: int,
    quiet: bool = False,
) -> ReferenceCache:
    """Return the complete cache of `source` in `directory`, written where it is not. Every process calls this.

    Args:
        batch_size: pairs per forward of the reference.
        quiet: no progress bar.

    Raises:
        CacheError: what is there is corrupt, or was not made from this source; or the disk is too small.
    """
    if not len(source.dataset):
        raise CacheError(f"{directory.name} dataset: got no pairs, wanted at least one")
    if not _of_main(accelerator, lambda: _is_complete(directory, source)):
        with _alone(directory, accelerator):
            _write(directory, source, accelerator, batch_size, quiet)
    return open_cache(directory, source.fingerprint)


def _is_complete(directory: Path, source: Source) -> bool:
    return (directory / "meta.json").exists() and not missing_shards(
        directory, read_meta(directory, source.fingerprint)
    )


@contextmanager
def _alone(directory: Path, accelerator: Accelerator) -> Iterator[None]:
    """Let one run at a time write into `directory`: another waits, and goes on with what it finds there afterwards."""
    lock, waits = FileLock(directory / ".lock"), False

    def taken() -> bool:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        return True

    while not _of_main(accelerator, taken):  # asked again and again, for a wait within a collective call times out
        if not waits:
            accelerator.print(f"{directory}: another run writes it; this one waits until that has ended", flush=True)
        waits = True
        sleep(1)
    try:
        yield
    finally:
        lock.release()


def _write(directory: Path, source: Source, accelerator: Accelerator, batch_size: int, quiet: bool) -> None:
    device, world = accelerator.device, accelerator.num_processes
    _begin(directory, source, accelerator)
    meta = read_meta(directory, source.fingerprint)
    missing = missing_shards(directory, meta)
    accelerator.wait_for_everyone()  # what is missing is the same for all: nobody has written yet
    parts = [missing[rank::world] for rank in range(world)]
    mine = parts[accelerator.process_index]
    total = sum(len(meta.rows(shard)) for shard in mine)
    hidden = quiet or not accelerator.is_main_process
    with tqdm(total=total, desc=f"reference, {directory.name}", unit="pair", disable=hidden) as bar:
        for shard in mine:
            pairs = []
            for batch in _batches(source, meta.rows(shard), batch_size):
                pairs += _states(source, batch, device)
                bar.update(len(batch["input_ids"]) // 2)
            write_shard(directory, meta, shard, pairs)
    calls = [_calls(meta, part, batch_size) for part in parts]
    for _ in range(max(calls) - calls[accelerator.process_index]):
        _reference(source, source.collate([source.dataset[0]]), device)  # a sharded one needs all processes each time
    accelerator.wait_for_everyone()


def _begin(directory: Path, source: Source, accelerator: Accelerator) -> None:
    """Write the plan of a new cache, or tidy what is left of one; say its size before anything is written."""
    new = _of_main(accelerator, lambda: not (directory / "meta.json").exists())
    meta, head = _plan(source, accelerator.device) if new else (read_meta(directory, source.fingerprint), None)

    def begin() -> None:
        left = missing_shards(directory, meta)
        rows = [row for shard in left for row in meta.rows(shard)]
        size = _tokens(source, rows) * meta.hidden_size * _itemsize(meta) + _bytes(head)
        if rows:
            print(f"{directory}: {len(rows)} of {meta.examples} pairs to write, about {size / 1e9:.3g} GB", flush=True)
        if (free := _free(directory)) < size:
            raise CacheError(f"{directory}: needs {size / 1e9:.3g} GB, {free / 1e9:.3g} GB are free there")
        remove_unfinished(directory)
        if new:
            write_meta(directory, meta, head)

    _of_main(accelerator, begin)


def _of_main(accelerator: Accelerator, ask: Callable[[], Any]) -> Any:
    """Return what `ask` returns to the main process. Its CacheError or OSError is raised in every process."""
    said: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            said[0] = ask()
        except (CacheError, OSError) as error:
            said[1] = str(error)
    broadcast_object_list(said, from_process=0)
    if said[1] is not None:
        raise CacheError(said[1])
    return said[0]


def _calls(meta: CacheMeta, shards: list[int], batch_size: int) -> int:
    return sum(-(-len(meta.rows(shard)) // batch_size) for shard in shards)


def _plan(source: Source, device: torch.device) -> tuple[CacheMeta, LMHead | None]:
    """One pair is tried, for its states' size and dtype."""
    theirs = _reference(source, source.collate([source.dataset[0]]), device)
    width, dtype = theirs.hidden.shape[-1], str(theirs.hidden.dtype).removeprefix("torch.")
    examples = len(source.dataset)
    per_pair = max(1, _tokens(source, range(examples)) * width * theirs.hidden.itemsize // examples)
    head = theirs.head
    scales = None if head is None else {"logit_scale": head.logit_scale, "softcap": head.softcap}
    per_shard = max(1, min(examples, SHARD_BYTES // per_pair))
    return CacheMeta(source.fingerprint, examples, per_shard, width, dtype, scales), head


def _batches(source: Source, rows: range, size: int) -> Iterator[Batch]:
    for start in range(rows.start, rows.stop, size):
        yield source.collate([source.dataset[i] for i in range(start, min(start + size, rows.stop))])


@torch.no_grad()
def _reference(source: Source, batch: Batch, device: torch.device) -> Reference:
    return source.reference({name: x.to(device) for name, x in batch.items()})


def _states(source: Source, batch: Batch, device: torch.device) -> list[Pair]:
    """The states that predict completion tokens, pair by pair, on the CPU."""
    hidden = _reference(source, batch, device).hidden
    predicting = batch["completion_mask"][:, 1:].bool()
    rows = [states[:-1][mask].cpu() for states, mask in zip(hidden, predicting.to(device), strict=True)]
    half = len(rows) // 2
    return list(zip(rows[:half], rows[half:], strict=True))


def _tokens(source: Source, rows: range | list[int]) -> int:
    """Completion tokens of these rows, as collated, 64 rows at a time."""
    rows = list(rows)
    parts = (source.collate([source.dataset[i] for i in rows[k : k + 64]]) for k in range(0, len(rows), 64))
    return sum(int(batch["completion_mask"][:, 1:].sum()) for batch in parts)


def _bytes(head: LMHead | None) -> int:
    tensors = () if head is None else (head.weight, head.bias)
    return sum(x.numel() * x.itemsize for x in tensors if x is not None)


def _itemsize(meta: CacheMeta) -> int:
    return getattr(torch, meta.dtype).itemsize


def _free(directory: Path) -> int:
    there = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
