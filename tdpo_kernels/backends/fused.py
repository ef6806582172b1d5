"""Triton kernels that make both models' logits in registers: no tile ever reaches memory, but dz's."""

from __future__ import annotations

from torch import Tensor

from ..types import Forward, Gradients, Inputs, Needs
from . import kernel_walk, launch
from .dlogits import Kind
from .kernel_walk import Call
from .launch import STATE, Launch, Operands, Traits
from .slab import Grid, Operand, Side, copied_bytes, cut


def forward(inputs: Inputs, needs: Needs) -> Forward:
    return kernel_walk.forward(_Fused(), inputs, needs)


def backward(
    inputs: Inputs,
    needs: Needs,
    saved: tuple[Tensor | None, ...],
    g_logp_T: Tensor | None,
    g_kl_T: Tensor | None,
    g_label_T: Tensor | None = None,
) -> Gradients:
    return kernel_walk.backward(_Fused(), inputs, needs, saved, g_logp_T, g_kl_T, g_label_T)


class _Fused:
    def cut(self, inputs: Inputs, sides: tuple[Side, Side], traits: Traits) -> tuple[Grid, int]:
        """dz, copies of operands and the states of a row block share the workspace."""
        per_row, per_col = copied_bytes(inputs, widen=False)
        part = traits.config("fused_stats").C
        per_row += 4 * STATE * -(-inputs.policy.head.weight.shape[0] // part)
        per_row += sum(_unpacked_bytes(side.hidden) for side in sides)
        per_col += sum(_unpacked_bytes(side.weight) for side in sides)
        return cut(inputs, sides[0].operand_dtype.itemsize, per_row, per_col, multiple=part), part

    def ranges(self, call: Call, columns: list[slice]) -> list[slice]:
        """All in one go, unless their weights need a copy, which goes block by block."""
        if not columns or any(x.needs_copy() or _unpacked_bytes(x) for x in (side.weight for side in call.sides)):
            return columns
        return [slice(columns[0].start, columns[-1].stop)]

    def states(self, call: Call, rows: slice, cols: slice, states: Tensor, planes: Tensor | None) -> Launch:
        return launch.fused_stats(call.traits, *_operands(call, rows, cols), call.labels(rows, cols), states, planes)

    def dz(
        self, call: Call, rows: slice, cols: slice, kind: Kind, values_R: Tensor, coefficients_R: Tensor, out: Tensor
    ) -> Launch:
        """The kernel sees for itself, row block by row block, which products its rows need."""
        operands, labels_R = _operands(call, rows, cols), call.labels(rows, cols)
        return launch.fused_dz(call.traits, *operands, labels_R, values_R, coefficients_R, out)


def _unpacked_bytes(x: Operand) -> int:
    """Of a row whose elements are not neighbours, as kernels want them: it is copied."""
    return 0 if x.needs_copy() or x.source.stride(1) == 1 else x.source.shape[1] * x.source.itemsize


def _packed(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _operands(call: Call, rows: slice, cols: slice) -> tuple[Operands, Operands]:
    policy, reference = (
        Operands(
            _packed(side.hidden.block(rows, side.model.dtype)),
            _packed(side.weight.block(cols, side.model.dtype)),
            side.model.head,
            launch.bias_block(side, cols),
        )
        for side in call.sides
    )
    return policy, reference
