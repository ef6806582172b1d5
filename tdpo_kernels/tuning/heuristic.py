"""Configurations per architecture, found by compiling: the largest tiles of both models' logits that fit in registers.

A program reads ``(1 / R + 1 / C)`` of an operand element per product, so a larger tile needs less of the L2 cache; what
limits it are two accumulators and the epilogue's rows in 255 registers a thread (128 with 16 warps). What `fused_stats`
stages takes about twice the registers of its statistics, so on sm_90 a staged tile has half the rows. What still spills
does so after the main loop; `stack` is the most that any case of a rule needs under Triton 3.6 to 3.9. Nothing here was
timed.

The statistics have the same bits whatever is staged, so with and without it `fused_stats` has one C (a part of the
vocabulary), one K (the order along D), and warps that share a row alike (the order of its sums): on sm_90 8 rows a warp
for C = 128, with 16 warps over 128 rows or 8 over 64, and 16 rows a warp for C = 64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import Case, TileConfig

INTERPRETER = "interpreter"
WIDEST = 8192
LOOP_STACK = 32  # bytes more that are spilled, outside of main loops, where programs take tiles in turns
_ROW_STACK = {1024: 8, 4096: 8, WIDEST: 280}  # 16 warps leave 128 registers a thread
_ROW_ELEMENTS = 4096  # of a tile in a program of a row kernel, where it is not wider than that


@dataclass(frozen=True)
class Rule:
    """Of a matrix kernel. None is any value; K is of 16-bit operands and halves for fp32."""

    kernel: str
    config: TileConfig
    ieee: bool | None = None
    staged: bool | None = None
    one_head: bool | None = None
    plain: bool | None = None  # no bias, softcap or extras, and aligned

    def fits(self, case: Case) -> bool:
        plain = case.aligned and not (case.bias or case.softcap or case.extras)
        asked = (
            (self.ieee, case.product == "ieee"),
            (self.staged, case.staged),
            (self.one_head, case.one_head),
            (self.plain, plain),
        )
        return self.kernel == case.kernel and all(want is None or want == is_ for want, is_ in asked)


def _rules(kernel: str, *rules: tuple[dict, TileConfig]) -> tuple[Rule, ...]:
    return tuple(Rule(kernel, config, **when) for when, config in rules)


def _ieee_rules(tma: bool) -> tuple[Rule, ...]:
    """fp32 as it is, without tensor cores."""
    stats, dz = TileConfig(64, 64, 32, 8, 2, tma, stack=40), TileConfig(64, 128, 32, 8, 2, tma, stack=8)
    return Rule("fused_stats", stats, ieee=True), Rule("fused_dz", dz, ieee=True)


RULES: dict[str, tuple[Rule, ...]] = {  # the first that fits
    "sm_80": (
        *_ieee_rules(tma=False),
        *_rules(
            "fused_stats",
            (dict(plain=True, one_head=False), TileConfig(64, 128, 32, 8, 3, stack=160)),
            ({}, TileConfig(64, 64, 32, 8, 3, stack=224)),
        ),
        *_rules("fused_dz", ({}, TileConfig(128, 128, 32, 8, 3, stack=136))),
    ),
    "sm_90": (  # 64 rows at least, or there is no wgmma
        *_ieee_rules(tma=True),
        *_rules(
            "fused_stats",
            (dict(plain=True, staged=True), TileConfig(64, 128, 64, 8, 4, True, stack=256)),
            (dict(plain=True), TileConfig(128, 128, 64, 16, 3, True)),
            (dict(staged=True), TileConfig(64, 64, 64, 4, 4, True, stack=272)),
            ({}, TileConfig(128, 64, 64, 8, 4, True)),
        ),
        *_rules(
            "fused_dz",
            (dict(plain=True), TileConfig(128, 128, 64, 8, 3, True)),
            ({}, TileConfig(64, 128, 64, 8, 4, True)),
        ),
    ),
    "sm_100": (  # accumulators are in tensor memory; with 16 warps there is no tcgen05
        *_ieee_rules(tma=True),
        *_rules("fused_stats", ({}, TileConfig(128, 64, 64, 8, 4, True, stack=320))),
        *_rules(
            "fused_dz",
            (dict(plain=True), TileConfig(128, 128, 64, 8, 3, True, stack=16)),
            ({}, TileConfig(64, 128, 64, 8, 4, True)),
        ),
    ),
    "gfx942": (  # 4 warps of 64 lanes can have 512 registers a thread, 8 have 256
        *_rules(
            "fused_stats",
            (dict(plain=True, staged=False), TileConfig(128, 128, 32, 8, 2, stack=32)),
            ({}, TileConfig(64, 128, 32, 4, 2)),
        ),
        *_rules("fused_dz", ({}, TileConfig(128, 128, 32, 8, 2, stack=20))),
    ),
}


def heuristic(case: Case, arch: str) -> TileConfig:
    """Raises ValueError where there is none for `arch`."""
    case, family = case.with_columns(widths(case.kernel)), family_of(arch)
    if case.kernel == "merge_states":
        return TileConfig(32, warps=1)
    if arch == INTERPRETER:
        return TileConfig(32, case.columns or 128, 64)
    if case.columns:
        return _row_kernel(case, lanes=64 if family == "gfx942" else 32)
    rule = next(rule for rule in RULES[family] if rule.fits(case))
    config = rule.config if case.aligned else _by_pointers(rule.config)
    return config if case.product == "16bit" else replace(config, K=config.K // 2)


def in_turns(config: TileConfig, arch: str) -> tuple[TileConfig, ...]:
    """The same, persistent. No rule is: whether that gains more than the loop costs was not measured. None on AMD,
    where the loop spills 200 bytes and more a thread."""
    return (replace(config, persistent=True, stack=config.stack + LOOP_STACK),) if arch.startswith("sm_") else ()


def _by_pointers(config: TileConfig) -> TileConfig:
    """For operands that are not aligned: no descriptors, and no copies that run ahead of the products."""
    return replace(config, K=min(config.K, 32), stages=2, tma=False)


def keeps_bits(case: Case, config: TileConfig, arch: str) -> bool:
    """Whether `config` has the heuristic's C, K and rows per warp: then the parts of the vocabulary, and the order in
    which a row of a part is summed, are the same whatever is chosen for the same call with and without staging."""
    if case.kernel not in ("fused_stats", "tile_stats"):
        return True
    own = heuristic(case, arch)
    return (config.C, config.K, config.R / config.warps) == (own.C, own.K, own.R / own.warps)


def family_of(arch: str) -> str:
    """The architecture whose configurations `arch` is given: its own, or the one that it is most like."""
    if arch in RULES or arch == INTERPRETER:
        return arch
    if arch.startswith("gfx9"):
        return "gfx942"
    number = int(arch[3:]) if arch.startswith("sm_") and arch[3:].isdecimal() else 0
    if 80 <= number < 90 or 120 <= number < 130:  # mma.sync, and 99 KiB of shared memory where the number is not 80
        return "sm_80"
    if 100 <= number < 120:
        return "sm_100"
    raise ValueError(f"no configuration for {arch!r}: there are some for {', '.join(RULES)}; pass one explicitly")


def widths(kernel: str) -> tuple[int, ...]:
    """Tile widths of the kernels whose caller cuts the tile; the first is what they have if nothing is said."""
    wide = (4096, 1024, 2048, WIDEST)
    return {"staged_dz": (128, 64, 256, 512, 1024), "tile_stats": wide, "tile_dz": wide}.get(kernel, ())


def _row_kernel(case: Case, lanes: int) -> TileConfig:
    """16 elements a thread in 32 lanes."""
    R = min(max(_ROW_ELEMENTS // case.columns, 1), 16)
    stack = 0 if case.kernel == "staged_dz" else _ROW_STACK.get(case.columns, 0)
    return TileConfig(R, case.columns, warps=max(R * case.columns // (16 * lanes), 1), stack=stack)
