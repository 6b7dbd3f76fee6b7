"""States in slots of a buffer, as kernels take them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import refuse
from .structs import odd


class Slots(NamedTuple):
    """An operand of kernels: a buffer of states [slots, ...] and the slot of it that each row takes.

    Kernels ask for `state.ptr is not None`: Triton 3.6 cannot compare a tuple that holds a None."""

    ptr: Any  # a tensor; None: no states
    indices: Tensor | None  # [rows]; None: row b has slot b
    odd_slots: int  # `odd`
    stride: int  # from slot to slot

    @staticmethod
    def of(pool: Tensor | None, indices: Tensor | None = None) -> Slots:
        if pool is None:
            return Slots(None, None, odd(1), 0)
        return Slots(pool, None if indices is None else indices.contiguous(), odd(pool.shape[0]), pool.stride(0))


NO_STATES = Slots.of(None)


def check_room(op: str, name: str, pool: Tensor | None, rows: int, indices: Tensor | None) -> None:
    """Refuse a buffer with fewer slots than rows, or with none where indices say which slot a row has."""
    if pool is None or torch.compiler.is_compiling():
        return
    if pool.shape[0] < (rows if indices is None else min(rows, 1)):
        refuse(op, name, list(pool.shape), f"a slot for each of {rows} rows")


def copy_to_slots(pool: Tensor, new: Tensor, indices: Tensor | None) -> None:
    """Write what a launch wrote beside: new [rows, ...]."""
    if indices is None:
        pool[: len(new)].copy_(new)
    elif len(new):
        pool.index_copy_(0, indices.long().clamp(0, pool.shape[0] - 1), new)


def empty_beside(pool: Tensor, rows: int) -> Tensor:
    """Memory for `rows` states with the strides that a slot of the buffer has, which is dense."""
    strides = math.prod(pool.shape[1:]), *pool.stride()[1:]
    return torch.empty_strided((rows, *pool.shape[1:]), strides, dtype=pool.dtype, device=pool.device)
