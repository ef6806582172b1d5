"""Law 3 where a GPU can break it: the same bits every time, on any stream, in any thread, replayed from a graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpo_kernels import token_stats

from ..device import Device, lacks, runnable
from ..plan import Facts, Failed, Item, Settings, Skipped

TIMES = 5
NAMES = ("logp", "ref_logp", "kl", "dh", "dW")


@dataclass(frozen=True, eq=False)
class Call:
    """One call and its backward, with independent cotangents, that reads nothing back to the host."""

    backend: str
    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor
    g: Tensor  # (2, T)
    budget: int

    def __call__(self) -> list[Tensor]:
        out = token_stats(
            self.hidden, self.weight, self.ref_hidden, self.ref_weight, self.labels,
            shift=False, ignore_index=None, backend=self.backend, memory_budget=self.budget,
        )  # fmt: skip
        parts = [self.hidden, self.weight]
        grads = torch.autograd.grad([out.logp, out.kl], parts, [g.to(out.kl.dtype) for g in self.g])
        return [out.logp.detach(), out.ref_logp, out.kl.detach(), *grads]


def items(device: Device, settings: Settings) -> list[Item]:
    dtypes = ("float32",) if settings.dry else ("bfloat16", "float32")
    return [
        Item(f"{backend} {dtype}: {kind}", lambda b=backend, d=dtype, k=kind: check(device, b, d, k), 15)
        for backend in runnable(device)
        if backend != "naive"
        for dtype in dtypes
        if not lacks(device, backend, dtype)
        for kind in KINDS
    ]


def check(device: Device, backend: str, dtype: str, kind: str) -> Facts:
    if why := runnable(device)[backend]:
        raise Skipped(why)
    call = make_call(device, backend, dtype)
    wanted, runs = call(), KINDS[kind](device, call)
    for i, found in enumerate(runs):
        if bad := differing(found, wanted):
            raise Failed(f"run {i}: other bits in {bad}")
    return {"runs": len(runs)}


def make_call(device: Device, backend: str, dtype: str, where: torch.device | None = None) -> Call:
    """Half of it is staged."""
    where = where or device.torch
    T, V, D = (1000, 20011, 256) if device.is_cuda else (40, 300, 32)
    generator = torch.Generator(device.torch).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device.torch) * scale).to(where, getattr(torch, dtype))

    labels = torch.randint(V, (T,), generator=generator, device=device.torch).to(where)
    leaves = normal(T, D).requires_grad_(), normal(V, D, scale=D**-0.5).requires_grad_()
    rest = normal(T, D), normal(V, D, scale=D**-0.5), labels, normal(2, T)
    return Call(backend, *leaves, *rest, T * V * leaves[0].element_size())


def differing(found: list[Tensor], wanted: list[Tensor]) -> str:
    pairs = zip(NAMES, found, wanted, strict=True)
    return ", ".join(name for name, x, y in pairs if not torch.equal(bits(x), bits(y)))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8).cpu()


def again(device: Device, call: Call) -> list[list[Tensor]]:
    return [call() for _ in range(TIMES)]


def thread(device: Device, call: Call) -> list[list[Tensor]]:
    """Forward and backward in a thread that knows nothing of this one; on CUDA autograd's own is a third."""
    found: list[list[Tensor]] = []
    worker = threading.Thread(target=lambda: found.append(call()))
    worker.start()
    worker.join()
    if not found:
        raise Failed("the thread ended with an error, see the log")
    return found


def stream(device: Device, call: Call) -> list[list[Tensor]]:
    _wants_cuda(device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        found = [call() for _ in range(TIMES)]
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return found


def graph(device: Device, call: Call) -> list[list[Tensor]]:
    """Captured after warm-up; replayed on the same inputs, on others, and on the first ones again."""
    _wants_cuda(device)
    stream(device, call)  # warm-up, on a stream that is not the default one
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = call()

    def replay() -> list[Tensor]:
        for x in out:
            x.fill_(float("nan"))
        captured.replay()
        torch.cuda.synchronize()
        return [x.clone() for x in out]

    first = replay()
    with torch.no_grad():
        before = call.hidden.clone()
        call.hidden.copy_(call.hidden.flip(0))
    other = replay()
    if bad := differing(other, call()):
        raise Failed(f"replayed on other inputs: other bits in {bad}")
    with torch.no_grad():
        call.hidden.copy_(before)
    return [first, replay()]


def other_device(device: Device, call: Call) -> list[list[Tensor]]:
    """Tensors on the second device while the first is the current one."""
    _wants_cuda(device)
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one device")
    dtype = str(call.hidden.dtype).removeprefix("torch.")
    return [make_call(device, call.backend, dtype, torch.device("cuda", 1))()]


def _wants_cuda(device: Device) -> None:
    if not device.is_cuda:
        raise Skipped("needs CUDA")


KINDS: dict[str, Callable[[Device, Call], list[list[Tensor]]]] = {
    f"{TIMES} times": again,
    "another thread": thread,
    "side stream": stream,
    "graph replay": graph,
    "other device": other_device,
}
