"""Law 4: the peak above inputs, outputs and gradients, as T grows 128 times, against the formula of the design."""

from __future__ import annotations

from tdpo_kernels import fused_tdpo_loss
from tdpo_kernels.backends import slab

from ...problem import make_problem
from ...shapes import Shape
from ..device import Device, bytes_of, lacks, runnable
from ..plan import Facts, Failed, Item, Settings, Skipped

BUDGETS = {"0": 0, "512 MiB": 512 * 2**20}


def items(device: Device, settings: Settings) -> list[Item]:
    rows = (1024, 16384, 131072) if device.is_cuda else (32, 128)
    dtype = "bfloat16" if device.is_cuda else "float16"
    return [
        Item(
            f"{backend} T={T} budget {budget}{'' if trainable else ' frozen head'}",
            lambda b=backend, t=T, n=budget, w=trainable: check(device, b, t, n, w, dtype), 20,
        )
        for T in rows
        for backend in runnable(device)
        if backend != "naive" and not lacks(device, backend, dtype)
        for budget in BUDGETS
        for trainable in (True, False)
        if trainable or budget == "0"
    ]  # fmt: skip


def check(device: Device, backend: str, T: int, budget: str, trainable: bool, dtype: str) -> Facts:
    if why := runnable(device)[backend]:
        raise Skipped(why)
    V, D = (128256, 4096) if device.is_cuda else (512, 16)

    def step(problem) -> None:
        p = problem
        options = dict(shift=False, backend=backend, memory_budget=BUDGETS[budget])
        fused_tdpo_loss(p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.labels, **options).loss.backward()

    warm, shape = (Shape("", rows, V, D, "", (), 1) for rows in (min(T, 64), T))
    step(make_problem(warm, dtype, device.torch, trainable))  # compiles, checks itself, gets the libraries' workspaces
    problem = make_problem(shape, dtype, device.torch, trainable)
    peak = device.peak(lambda: step(problem)) - bytes_of(problem.hidden.grad, problem.weight.grad)
    accumulator = 4 * D * min(T, V) if trainable else 0
    allowed = BUDGETS[budget] + slab.WORKSPACE[device.torch.type] + accumulator
    facts = {"T": T, "V": V, "D": D, "dtype": dtype, "peak": peak, "allowed": allowed, "tokens x vocabulary": T * V * 4}
    if peak > allowed:
        raise Failed(f"{peak / 2**20:.0f} MiB, {allowed / 2**20:.0f} allowed", facts)
    return facts
