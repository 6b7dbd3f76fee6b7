"""Operands of kernels: a tensor with its strides as one argument."""

from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """A tensor [rows, D] whose rows lie `stride` elements apart, and whose elements of a row lie side by side."""

    ptr: Tensor
    stride: int


def rows_of(t: Tensor | None) -> Rows | None:
    """[*, D] as an operand: a view where that is possible. None stays None."""
    if t is None:
        return None
    t = by_row(t)
    return Rows(t, t.stride(0))


def by_row(t: Tensor) -> Tensor:
    """[*, D] as rows whose elements lie side by side; a view where that is possible."""
    t = t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()
