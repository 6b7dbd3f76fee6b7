"""Operands of kernels: a tensor with its strides as one argument."""

from typing import NamedTuple

from torch import Tensor


def odd(size: int) -> int:
    """2 size + 1, for a size in a tuple that changes from call to call; kernels shift it. `do_not_specialize` does not
    reach into tuples, and for 1 and for multiples of 16 Triton would compile kernels of their own."""
    return 2 * size + 1


class Rows(NamedTuple):
    """A tensor [rows, D] whose rows lie `stride` elements apart, and whose elements of a row lie side by side."""

    ptr: Tensor
    stride: int


class Parts(NamedTuple):
    """A branch as the pairs of a token and an expert that it is the weighted sum of: `sum_of_pairs` in lang.py."""

    pairs: Tensor  # [T * K, D]
    ids: Tensor  # [T, K]
    weights: Tensor  # [T, K]
    experts: int


def _rows(t: Tensor) -> Rows:
    if t.dim() != 2:
        t = t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)
    row, one = t.stride()
    if one != 1 and t.shape[1] != 1:
        t = t.contiguous()
        row = t.stride(0)
    return Rows(t, row)


def rows_of(t: Tensor | None) -> Rows | None:
    """[*, D] as an operand: a view where that is possible. None stays None."""
    return None if t is None else _rows(t)


def by_row(t: Tensor) -> Tensor:
    """[*, D] as rows whose elements lie side by side; a view where that is possible."""
    return _rows(t).ptr
