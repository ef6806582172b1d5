"""Ranks of a process group agree before any of them raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch


class Peers:
    """Agreement between the ranks of the default process group, so that none raises while another waits for it.

    No collective: ranks need not check the same things, nor at all, and a collective that some do not join hangs.
    Instead each rank counts itself, in the store that the group was made with, into its n-th check and out of it again.
    On the way out it waits for those that are in, who wait for nobody while there, and for the others at most
    GRACE seconds, and that once: ranks that have not come then may have nothing to check. So every wait is bounded.
    A rank that finds a fault leaves it in the store first; whoever checks then or later finds it there, and raises too.
    """

    PREFIX = "tdpo_kernels/selfcheck"
    GRACE = 10.0
    PATIENCE = 60.0  # with ranks that are in a check
    lock = threading.Lock()
    known: tuple[Any, int, bool] = (None, 0, False)  # the store, checks so far, whether some rank did not come

    def __init__(self, store: Any, n: int, alone: bool) -> None:
        self.store, self.n, self.alone = store, n, alone

    @classmethod
    def enter(cls) -> Peers:
        store = _store()
        with cls.lock:
            known, n, alone = cls.known
            n, alone = (n + 1, alone) if store is known else (1, False)
            cls.known = store, n, alone
        peers = cls(store, n, alone)
        try:
            peers._count("entered", 1)
        except RuntimeError:  # the store is gone, and its owner with it
            peers.store = None
        return peers

    def leave(self, fault: str) -> str:
        """The fault that any rank found, or nothing."""
        if self.store is None:
            return ""
        try:
            if fault:
                self.store.set(f"{self.PREFIX}/fault", f"rank {torch.distributed.get_rank()}: {fault}")
            self._count("judged", 1)
            if not self.alone:
                self._await_everyone()
            wait(lambda: self._count("judged") >= self._count("entered"), self.PATIENCE)
            found = self.store.get(f"{self.PREFIX}/fault").decode() if self._has_fault() else ""
            self._count("read", 1)
            if found:  # the store may end with this process
                wait(lambda: self._count("read") >= self._count("entered"), self.PATIENCE)
            return found
        except RuntimeError:  # the store is gone, and its owner with it
            return ""

    def _await_everyone(self) -> None:
        world = torch.distributed.get_world_size()
        if not wait(lambda: self._count("entered") >= world or self._has_fault(), self.GRACE):
            type(self).known = self.store, self.n, True

    def _has_fault(self) -> bool:
        return self.store.check([f"{self.PREFIX}/fault"])

    def _count(self, what: str, more: int = 0) -> int:
        return 0 if self.store is None else self.store.add(f"{self.PREFIX}/{self.n}/{what}", more)


def _store() -> Any:
    """None where there is nobody to agree with, or no way to."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return get() if get else None


def wait(reached: Callable[[], bool], seconds: float) -> bool:
    end, pause = time.monotonic() + seconds, 0.001
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    return True
