"""The reference's last hidden states on disk: with its head they are its whole next-token distribution.

A cache is a directory: ``meta.json`` (what it was made from, and of what shape it is), ``head.safetensors`` (absent
where the policy's own frozen head serves), and shards of `examples_per_shard` pairs each. A shard holds the states that
predict completion tokens, chosen then rejected, pair after pair, and a checksum of each pair, compared when it is read.
Files appear under their names whole or not at all, so writing can be killed and taken up again.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import UsageError
from .kernels import LMHead

FORMAT = 1
Pair = tuple[Tensor, Tensor]  # chosen (n, E), rejected (m, E)


class CacheError(UsageError):
    """A reference cache that is corrupt, incomplete, or not this run's; the message says which, and what to do."""


@dataclass(frozen=True)
class CacheMeta:
    """``fingerprint``: what the states depend on, by name, each a digest or a readable value.
    ``head``: its ``logit_scale`` and ``softcap``, or None where no head is stored."""

    fingerprint: dict[str, str]
    examples: int
    examples_per_shard: int
    hidden_size: int
    dtype: str
    head: dict[str, float | None] | None
    format: int = FORMAT

    @property
    def shards(self) -> int:
        return -(-self.examples // self.examples_per_shard)

    @property
    def digest(self) -> str:
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def rows(self, shard: int) -> range:
        start = shard * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.examples))


@dataclass(frozen=True)
class ReferenceCache:
    """A complete cache. Holds no file open, so that it goes to data loader workers as it is."""

    directory: Path
    meta: CacheMeta

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta.dtype)

    def pair(self, row: int) -> Pair:
        """The states ``(n, E)`` that predict the chosen tokens of pair `row`, and those of its rejected ones.

        Raises:
            CacheError: where what is read is not what was written.
        """
        shard, j = divmod(row, self.meta.examples_per_shard)
        path = shard_path(self.directory, shard)
        handle, offsets, checksums = _open(str(path), *_identity(path))
        start, middle, end = offsets[2 * j : 2 * j + 3].tolist()
        states = handle.get_slice("hidden")[start:end]
        if _checksum(states) != int(checksums[j]):
            raise CacheError(f"{path}: pair {row} is not what was written; {_REWRITE}")
        return states[: middle - start], states[middle - start :]

    def head(self) -> LMHead | None:
        """On the CPU; None where the cache was made for a policy whose own head serves."""
        if self.meta.head is None:
            return None
        path = self.directory / "head.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                written = json.loads((file.metadata() or {})["checksums"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CacheError(f"{path}: cannot be read: {error}; {_REWRITE}") from error
        if written != {name: _checksum(x) for name, x in tensors.items()}:
            raise CacheError(f"{path}: is not what was written; {_REWRITE}")
        return LMHead(tensors["weight"], tensors.get("bias"), **self.meta.head)


_REWRITE = "delete it, and it is written again"


def open_cache(directory: Path, fingerprint: dict[str, str]) -> ReferenceCache:
    """The complete cache in `directory`, if it was made from what `fingerprint` says.

    Raises:
        CacheError: where it is not, with the reason.
    """
    meta = read_meta(directory, fingerprint)
    if missing := missing_shards(directory, meta):
        raise CacheError(
            f"{directory}: {len(missing)} of {meta.shards} shards are missing, the first is "
            f"{shard_path(directory, missing[0]).name}; processes on several machines need one shared directory"
        )
    return ReferenceCache(directory, meta)


def read_meta(directory: Path, fingerprint: dict[str, str]) -> CacheMeta:
    path = directory / "meta.json"
    try:
        fields = json.loads(path.read_text())
        if fields.get("format") != FORMAT:
            raise CacheError(f"{directory}: of format {fields.get('format')}, wanted {FORMAT}; delete the directory")
        meta = CacheMeta(**fields)
    except (OSError, AttributeError, TypeError, json.JSONDecodeError) as error:
        raise CacheError(f"{path}: cannot be read: {error}; delete the directory, and it is written again") from error
    for name in {**fingerprint, **meta.fingerprint}:  # in the caller's order: what changed, before what follows from it
        seen, wanted = meta.fingerprint.get(name), fingerprint.get(name)
        if seen != wanted:
            raise CacheError(
                f"{directory}: made from another {name}: got {seen}, wanted {wanted}; delete the directory, or give "
                "this run another reference_cache"
            )
    return meta


def write_meta(directory: Path, meta: CacheMeta, head: LMHead | None) -> None:
    """The head first: a directory with ``meta.json`` has all but its shards."""
    directory.mkdir(parents=True, exist_ok=True)
    if head is not None:
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        checksums = json.dumps({name: _checksum(x) for name, x in tensors.items()})
        _save(directory / "head.safetensors", tensors, {"checksums": checksums})
    path = directory / "meta.json"
    temporary = _temporary(path)
    temporary.write_text(json.dumps(asdict(meta), indent=1))
    _publish(temporary, path)


def shard_path(directory: Path, shard: int) -> Path:
    return directory / f"shard-{shard:05d}.safetensors"


def write_shard(directory: Path, meta: CacheMeta, shard: int, pairs: Sequence[Pair]) -> None:
    lengths = torch.tensor([0, *(len(states) for pair in pairs for states in pair)])
    tensors = {
        "hidden": torch.cat([states for pair in pairs for states in pair]).contiguous(),
        "offsets": lengths.cumsum(0),
        "checksums": torch.tensor([_checksum(torch.cat(pair)) for pair in pairs]),
    }
    _save(shard_path(directory, shard), tensors, {"of": _belonging(meta, shard)})


def missing_shards(directory: Path, meta: CacheMeta) -> list[int]:
    """Raises CacheError where one that is there is corrupt, or another cache's."""
    paths = [shard_path(directory, k) for k in range(meta.shards)]
    for k, path in enumerate(paths):
        if path.exists() and (fault := _fault(path, meta, k)):
            raise CacheError(f"{path}: {fault}; {_REWRITE}")
    return [k for k, path in enumerate(paths) if not path.exists()]


def _fault(path: Path, meta: CacheMeta, shard: int) -> str:
    """Return what is wrong with a shard, short of its states' bytes, or ""."""
    try:
        with safe_open(path, framework="pt") as file:
            written, shape = file.metadata() or {}, file.get_slice("hidden").get_shape()
            offsets, count = file.get_tensor("offsets"), file.get_slice("checksums").get_shape()[0]
    except (SafetensorError, OSError) as error:
        return f"cannot be read: {error}"
    if written.get("of") != _belonging(meta, shard):
        return "belongs to another cache"
    pairs = len(meta.rows(shard))
    sound = count == pairs and offsets.shape == (2 * pairs + 1,) and bool((offsets.diff() >= 0).all())
    if not sound or shape != [int(offsets[-1]), meta.hidden_size] or int(offsets[0]) != 0:
        return f"holds states of shape {shape} for {count} pairs, wanted (N, {meta.hidden_size}) for {pairs}"
    return ""


def _belonging(meta: CacheMeta, shard: int) -> str:
    """One entry of metadata: safetensors writes several in any order, and shards should be equal to the byte."""
    return f"{meta.digest} {shard}"


def _identity(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise CacheError(f"{path}: is gone: {error.strerror}") from error
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=64)
def _open(path: str, modified: int, size: int) -> tuple[safe_open, Tensor, Tensor]:
    """Mapped, not read; in each process by itself. Few at a time: a cache may have more shards than may be open."""
    try:
        handle = safe_open(path, framework="pt")
        return handle, handle.get_tensor("offsets"), handle.get_tensor("checksums")
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: cannot be read: {error}; {_REWRITE}") from error


def _checksum(x: Tensor) -> int:
    return zlib.crc32(x.contiguous().view(-1).view(torch.uint8).numpy())


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    temporary = _temporary(path)
    save_file(tensors, temporary, metadata=metadata)
    _publish(temporary, path)


def remove_unfinished(directory: Path) -> None:
    """Remove what a killed writer left behind. The run that may write calls this before its processes do."""
    for path in directory.glob("*.tmp"):
        path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def _publish(temporary: Path, path: Path) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
