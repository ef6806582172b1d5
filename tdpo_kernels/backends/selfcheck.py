from __future__ import annotations

SWITCH = "TDPO_KERNELS_SELF_CHECK"


class Check:
    def __init__(self, inputs, grid): ...
    def seen(self, launch): ...
    def forward(self, part):
        return part

    def dz(self, launch, rows, cols, row_R, out):
        return out
