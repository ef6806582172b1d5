"""What a configuration could reach at most: an estimate from counted bytes and flops, not a measurement.

It leaves out the epilogue, latency, launches and the last wave; it is for ranking tiles before anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Case, TileConfig


@dataclass(frozen=True)
class Machine:
    name: str
    units: int
    flops: dict[str, float]  # by product, a second
    memory: float  # bytes a second
    cache: float  # bytes a second out of L2
    cache_size: float  # bytes
    registers: int = 65536  # a unit
    shared: int = 228 * 1024  # a unit; each block takes 1 KiB more than it asks for
    threads: int = 2048


# Rates without sparsity and memory as NVIDIA's data sheet of the H200 has them. L2: an assumption, 5.5 TB/s is about
# what was published for the smaller H100 PCIe, and figures up to 12 are in circulation.
H200 = Machine("H200", 132, {"16bit": 989e12, "tf32": 494e12, "ieee": 67e12}, 4.8e12, 5.5e12, 50 * 2**20)


@dataclass(frozen=True)
class Shape:
    T: int
    D: int
    V: int


SHAPES = (Shape(8192, 4096, 128256), Shape(8192, 896, 151936))


@dataclass(frozen=True)
class Estimate:
    """Seconds that each resource alone would take, and programs a unit holds at once."""

    compute: float
    cache: float
    memory: float
    programs: int

    @property
    def seconds(self) -> float:
        return max(self.compute, self.cache, self.memory)

    @property
    def bound(self) -> str:
        return max(("compute", "cache", "memory"), key=lambda name: getattr(self, name))


def estimate(
    case: Case, config: TileConfig, registers: int, shared: int, shape: Shape, machine: Machine = H200
) -> Estimate:
    """Of `fused_stats` or `fused_dz`, both products made, over the whole vocabulary."""
    T, D, V = shape.T, shape.D, shape.V
    itemsize = 2 if case.product == "16bit" else 4
    programs = occupancy(config, registers, shared, machine)
    blocks = -(-T // config.R)
    live = max(1, min(machine.units * programs, blocks))  # row blocks at work at the same columns
    heads = 1 if case.one_head else 2
    operands = (2 * T * D * (V / config.C) + heads * V * D * (T / config.R)) * itemsize
    written = T * V * itemsize * (2 + case.softcap) if case.staged else T * V * itemsize * (case.kernel == "fused_dz")
    abreast = max(1.0, machine.units * programs / blocks) * config.C  # columns at work at the same time
    hidden = 2 * T * D * itemsize
    passes = 1 if hidden <= machine.cache_size else max(1.0, V / abreast)
    main = hidden * passes + heads * V * D * itemsize * max(1, -(-blocks // live)) + written
    return Estimate(
        4 * T * V * D / machine.flops[case.product],
        (operands + written) / machine.cache,
        main / machine.memory,
        programs,
    )


def occupancy(config: TileConfig, registers: int, shared: int, machine: Machine = H200) -> int:
    """Programs a unit holds at once."""
    threads = 32 * config.warps
    by_registers = machine.registers // (-(-registers // 8) * 8 * threads)
    return max(1, min(by_registers, machine.shared // (shared + 1024), machine.threads // threads))
