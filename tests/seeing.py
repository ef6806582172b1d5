"""See what a call does in torch, operation by operation; what the library's own operators do inside themselves, too."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul", "mv", "addmv", "dot", "linalg_vecdot"}
PRODUCTS |= {"_linear_pointwise"}  # oneDNN's


class Seeing(TorchDispatchMode):
    """Calls `note` with every operation's overload, arguments and results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "tdpo_kernels":  # an operator's own are out of a mode's sight: it is run with the mode on
            with self:
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.note(func, args, [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, Tensor)])
        return out

    def note(self, func: Any, args: tuple, results: list[Tensor]) -> None:
        raise NotImplementedError


class Products(Seeing):
    """Counts matrix products, and adds up their flops, 2 m n k."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.flops = 0

    def note(self, func: Any, args: tuple, results: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name not in PRODUCTS:
            return
        self.count += 1
        a, b = (args[0], args[1].t()) if name == "_linear_pointwise" else args[:2] if name == "mm" else args[1:3]
        assert name in ("mm", "addmm", "addmm_", "_linear_pointwise"), f"the flops of {name} are not known here"
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]


class Ledger(Seeing):
    """Notes every storage made under it: the largest, and the most bytes that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.largest = self.most_elements = 0

    def note(self, func: Any, args: tuple, results: list[Tensor]) -> None:
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in results:
            storage = x.untyped_storage()
            if storage._cdata not in known and storage.nbytes():
                self._add(x, storage)

    def _add(self, x: Tensor, storage: Any) -> None:
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.largest = max(self.largest, storage.nbytes())
        self.most_elements = max(self.most_elements, storage.nbytes() // x.element_size())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
