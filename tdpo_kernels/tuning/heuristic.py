"""Configurations per architecture, found by compiling: the largest tiles of both models' logits that fit in registers.

A program reads ``(1 / R + 1 / C)`` of an operand element per product, so a larger tile needs less of the L2 cache; what
limits it are two accumulators and the epilogue's rows in 255 registers a thread. Nothing here was timed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .config import Case, TileConfig

INTERPRETER = "interpreter"
WIDEST = 8192
WIDEST_STACK = 128  # 16 warps leave 128 registers a thread
_ROW_ELEMENTS = 4096  # of a tile in a program of a row kernel, where it is not wider than that


@dataclass(frozen=True)
class Rule:
    """Of a matrix kernel. None is any value; K is of 16-bit operands and halves for fp32."""

    kernel: str
    config: TileConfig
    ieee: bool = False
    aligned: bool = True
    staged: bool | None = None
    one_head: bool | None = None
    plain: bool | None = None  # no bias, softcap or extras

    def fits(self, case: Case) -> bool:
        plain = not (case.bias or case.softcap or case.extras)
        wanted = ((self.staged, case.staged), (self.one_head, case.one_head), (self.plain, plain))
        return (
            self.kernel == case.kernel
            and self.ieee == (case.product == "ieee")
            and self.aligned == case.aligned
            and all(want is None or want == is_ for want, is_ in wanted)
        )


def _rules(kernel: str, *rules: tuple[dict, TileConfig]) -> tuple[Rule, ...]:
    return tuple(Rule(kernel, config, **when) for when, config in rules)


def _warpgroup_rules(stats: TileConfig) -> tuple[Rule, ...]:
    """Of sm_90 and sm_100: 64 rows at least, or there is no wgmma. `stats` is for what keeps nothing and is plain."""
    return _rules(
        "fused_stats",
        (dict(ieee=True), TileConfig(32, 128, 16, 8, 2, True)),
        (dict(staged=True, plain=True), TileConfig(64, 128, 64, 8, 4, True)),
        (dict(staged=True), TileConfig(64, 64, 64, 8, 4, True)),
        (dict(plain=True), stats),
        ({}, TileConfig(64, 128, 64, 8, 4, True, stack=128)),
        (dict(ieee=True, aligned=False), TileConfig(32, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(64, 64, 32, 8, 2)),
    ) + _rules(
        "fused_dz",
        (dict(ieee=True), TileConfig(64, 128, 16, 8, 2, True)),
        (dict(plain=True), TileConfig(128, 128, 64, 8, 3, True, stack=16)),
        ({}, TileConfig(64, 128, 64, 8, 4, True)),
        (dict(ieee=True, aligned=False), TileConfig(64, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(64, 128, 32, 8, 2)),
    )


RULES: dict[str, tuple[Rule, ...]] = {  # the first that fits
    "sm_80": _rules(
        "fused_stats",
        (dict(ieee=True), TileConfig(32, 128, 16, 8, 2)),
        (dict(staged=True, plain=True, one_head=False), TileConfig(64, 128, 32, 8, 3, stack=128)),
        (dict(staged=True), TileConfig(64, 64, 32, 8, 3)),
        (dict(one_head=True, plain=True), TileConfig(128, 128, 32, 8, 3, stack=128)),
        (dict(plain=True), TileConfig(64, 128, 32, 8, 3, stack=128)),
        ({}, TileConfig(64, 64, 32, 8, 3)),
        (dict(ieee=True, aligned=False), TileConfig(32, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(32, 128, 32, 8, 2)),
    )
    + _rules(
        "fused_dz",
        (dict(ieee=True), TileConfig(64, 128, 16, 8, 2)),
        ({}, TileConfig(128, 128, 32, 8, 3, stack=88)),
        (dict(ieee=True, aligned=False), TileConfig(64, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(64, 128, 32, 8, 2)),
    ),
    "sm_90": _warpgroup_rules(TileConfig(128, 128, 64, 8, 3, True, stack=128)),
    "sm_100": _warpgroup_rules(TileConfig(64, 128, 64, 8, 4, True)),
    "gfx942": _rules(
        "fused_stats",
        (dict(ieee=True), TileConfig(64, 128, 16, 8, 2, stack=128)),
        (dict(staged=True, plain=False), TileConfig(64, 64, 32, 8, 2, stack=32)),
        ({}, TileConfig(64, 128, 32, 8, 2, stack=128)),
        (dict(ieee=True, aligned=False), TileConfig(32, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(32, 128, 32, 8, 2)),
    )
    + _rules(
        "fused_dz",
        (dict(ieee=True), TileConfig(128, 128, 16, 8, 2, stack=16)),
        ({}, TileConfig(128, 128, 32, 8, 2)),
        (dict(ieee=True, aligned=False), TileConfig(64, 128, 16, 8, 2)),
        (dict(aligned=False), TileConfig(64, 128, 32, 8, 2)),
    ),
}


def heuristic(case: Case, arch: str) -> TileConfig:
    """Raises ValueError where there is none for `arch`."""
    case, family = case.with_columns(widths(case.kernel)), family_of(arch)
    if case.kernel == "merge_states":
        return TileConfig(128, warps=4)
    if arch == INTERPRETER:
        return TileConfig(32, case.columns or 128, 64)
    if case.columns:
        return _row_kernel(case, lanes=64 if family == "gfx942" else 32)
    rule = next(rule for rule in RULES[family] if rule.fits(case))
    halved = case.product == "tf32"
    return replace(rule.config, K=rule.config.K // 2) if halved else rule.config


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
    stack = WIDEST_STACK if case.kernel == "tile_stats" and case.staged and case.columns == WIDEST else 0
    return TileConfig(R, case.columns, warps=max(R * case.columns // (16 * lanes), 1), stack=stack)
