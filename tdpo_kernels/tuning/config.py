"""What is chosen, and by what."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

KERNELS = ("fused_stats", "fused_dz", "staged_dz", "tile_stats", "tile_dz", "merge_states")
PRODUCTS = ("16bit", "tf32", "ieee")  # how operands are multiplied: bf16 or fp16, fp32 as tf32, fp32 as it is

DEPENDS_ON = {
    "fused_stats": ("staged", "one_head", "bias", "softcap", "extras", "aligned"),
    "fused_dz": ("bias", "softcap", "aligned"),
    "staged_dz": ("softcap", "columns"),
    "tile_stats": ("staged", "bias", "softcap", "extras", "columns"),
    "tile_dz": ("bias", "softcap", "columns"),
    "merge_states": ("extras",),
}


@dataclass(frozen=True)
class TileConfig:
    """A launch: R rows by C columns a program, K of the inner dimension a step.

    Args:
        tma: operands come as descriptors, not pointers.
        persistent: as many programs as the device holds at once take the tiles in turns (`fused_stats`, `fused_dz`).
        stack: bytes a thread that the compiler may spill, outside of main loops; `python -m tdpo_kernels kernels`
            fails on more.
    """

    R: int
    C: int = 1
    K: int = 1
    warps: int = 4
    stages: int = 1
    tma: bool = False
    stack: int = 0
    persistent: bool = False

    def __post_init__(self) -> None:
        for name in ("R", "C", "K", "warps"):
            value = getattr(self, name)
            if not _is_count(value) or value & (value - 1):
                raise ValueError(f"TileConfig: {name} is {value!r}, wanted a power of two")
        if self.warps > 32:
            raise ValueError(f"TileConfig: {self.warps} warps, wanted 32 at most")
        if not _is_count(self.stages) or type(self.stack) is not int or self.stack < 0:
            raise ValueError(f"TileConfig: stages {self.stages!r}, stack {self.stack!r}; wanted >= 1 and >= 0")
        for name in ("tma", "persistent"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"TileConfig: {name} is {getattr(self, name)!r}, wanted a bool")

    @property
    def options(self) -> dict[str, int | bool]:
        """As a launch takes them. Products and sums are rounded one by one: contracted, ``r - z`` of two scaled logits
        that are equal is what rounding one of them left, not 0, and Triton's default is to contract up to 3.9 only."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    def __str__(self) -> str:
        sizes = "x".join(str(size) for i, size in enumerate((self.R, self.C, self.K)) if i == 0 or size > 1)
        stages = f" s{self.stages}" if self.stages > 1 else ""
        return f"{sizes} w{self.warps}{stages}{' tma' if self.tma else ''}{' loop' if self.persistent else ''}"


@dataclass(frozen=True)
class Device:
    """What is known of a device.

    Args:
        name: as its driver says it; the name of its table.
        arch: ``"sm_90"``, ``"gfx942"``, ..., or ``"interpreter"``.
    """

    name: str
    arch: str


@dataclass(frozen=True)
class Case:
    """What a configuration depends on. How many rows there are is not in it, so that no batch is ever tuned for.

    Args:
        product: one of PRODUCTS.
        staged: `fused_stats` and `tile_stats` also stage.
        one_head: both models' weights are one tensor (`fused_stats`).
        bias, softcap: any head has one.
        extras: the sums that `extras` are made of.
        aligned: bases and row strides are multiples of 16 bytes.
        columns: the width of the tile, a power of two, where the caller sets it; else 0.
    """

    kernel: str
    product: str
    staged: bool = False
    one_head: bool = False
    bias: bool = False
    softcap: bool = False
    extras: bool = False
    aligned: bool = True
    columns: int = 0

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel {self.kernel!r}, wanted one of {', '.join(KERNELS)}")
        if self.product not in PRODUCTS:
            raise ValueError(f"product {self.product!r}, wanted one of {', '.join(PRODUCTS)}")
        for field in fields(self):
            if field.type == "bool" and type(getattr(self, field.name)) is not bool:
                raise ValueError(f"{field.name} is {getattr(self, field.name)!r}, wanted a bool")
        if type(self.columns) is not int or self.columns < 0:
            raise ValueError(f"columns is {self.columns!r}, wanted a count")

    def relevant(self) -> Case:
        """Without what its kernel does not look at."""
        kept = {name: getattr(self, name) for name in DEPENDS_ON[self.kernel]}
        matrices = self.kernel in ("fused_stats", "fused_dz")
        product = self.product if matrices or self.product == "16bit" else "ieee"
        return Case(self.kernel, product, **kept)

    def with_columns(self, widths: tuple[int, ...]) -> Case:
        """`columns` rounded up to one of the widths that its kernel has, the first of them if it is 0."""
        if "columns" not in DEPENDS_ON[self.kernel]:
            return self
        fitting = [width for width in sorted(widths) if width >= self.columns]
        if not fitting:
            raise ValueError(f"{self.kernel}: a tile of {self.columns} columns, wanted {max(widths)} at most")
        return replace(self, columns=fitting[0] if self.columns else widths[0])

    def __str__(self) -> str:
        flags = {
            "one": self.one_head,
            "staged": self.staged,
            "bias": self.bias,
            "cap": self.softcap,
            "extras": self.extras,
        }
        words = [word for word, is_set in flags.items() if is_set] + ["unaligned"] * (not self.aligned)
        return " ".join([self.kernel, self.product, *words, *([f"C={self.columns}"] if self.columns else [])])


def product_of(itemsize: int, ieee: bool) -> str:
    """How operands of `itemsize` bytes are multiplied."""
    if itemsize not in (2, 4):
        raise ValueError(f"operands of {itemsize} bytes, wanted 2 or 4")
    return "16bit" if itemsize == 2 else "ieee" if ieee else "tf32"


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1
