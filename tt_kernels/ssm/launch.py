"""What launchers of scan kernels share: arithmetic, layouts, slots of states, launch parameters."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, tuned
from ..runtime.slots import Slots


@dataclass(frozen=True, kw_only=True)
class TileLaunch(Launch):
    """Of a kernel that takes BLOCK_T tokens of one head, or a slice BLOCK_P of it, at a time."""

    BLOCK_T: int
    BLOCK_P: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None  # where ptxas would stop at fewer registers, and spill


@dataclass(frozen=True, kw_only=True)
class StepLaunch(Launch):
    """Of a kernel that takes one token of a slice BLOCK_P of a head."""

    BLOCK_P: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None  # where ptxas would stop at fewer registers, and spill


def splits(*narrow: Tensor) -> bool:
    """Whether products with these take fp32 apart into parts of their dtype: where that has the exponents of fp32."""
    return all(t.dtype == torch.bfloat16 for t in narrow)


def arithmetic(x: Tensor, A: Tensor, *narrow: Tensor, dt_limit: tuple[float, float]) -> dict[str, Any]:
    """Constants of a scan kernel. fp16 is exact in tf32, and three tf32 products hold the other factor."""
    acc = tl.float64 if compute_dtype(x.dtype, A.dtype) == torch.float64 else tl.float32
    split = acc == tl.float32 and splits(x, *narrow)
    precision = "tf32x3" if all(t.dtype.itemsize == 2 for t in (x, *narrow)) else "ieee"
    low, high = dt_limit
    high = high if math.isfinite(high) else 3.4e38
    return dict(ACC=acc, SPLIT=split, PRECISION=precision, LOW=float(low), HIGH=float(high))


def measured(kernel: str, default: TileLaunch, x: Tensor, rows: int, L: int, P: int, N: int) -> TileLaunch:
    """The launch of a kernel that takes `rows` (rows times heads) of L tokens in one tile or a few."""
    near = dict(rows=triton.next_power_of_2(rows), L=triton.next_power_of_2(L))
    return tuned(kernel, default, architecture(x), **near, P=P, N=N, itemsize=x.element_size())


def step_launch(rows: int, P: int, N: int, *, numbers: int) -> StepLaunch:
    """`rows`: rows times heads. Reading and writing the state bounds it: `numbers` a thread in flight; at few rows
    latency does (one round trip to memory): smaller slices, until an H200's 132 multiprocessors have two programs each,
    and fewer warps, which wait for each other less."""
    block_n = triton.next_power_of_2(N)
    block_p = min(triton.next_power_of_2(P), max(1, 128 * numbers // block_n))
    while block_p > 1 and rows * triton.cdiv(P, block_p) < 256:
        block_p //= 2
    warps = min(max(block_p * block_n // (32 * numbers), 1), 4)
    return StepLaunch(BLOCK_P=block_p, BLOCK_N=block_n, num_warps=warps)


def measured_step(kernel: str, default: StepLaunch, x: Tensor, rows: int, P: int, N: int) -> StepLaunch:
    return tuned(kernel, default, architecture(x), rows=triton.next_power_of_2(rows), P=P, N=N)


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As kernels read small ones: contiguous."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def lined_up(t: Tensor, dim: int | None = None) -> Tensor:
    """As kernels read it: the last dimension contiguous, and what a program takes of `dim` (64 tokens, or all P) within
    32-bit offsets of its first: those of a tile are vectors, where 64 bits would take twice the registers."""
    reach = 0 if dim is None else (64 if dim == 1 else t.shape[dim]) * t.stride(dim) + t.shape[-1]
    return t if t.stride(-1) == 1 and reach < 2**31 else t.contiguous()


@contextmanager
def ssm_slots(pool: Tensor, read: Tensor | None, out: Tensor | None) -> Iterator[tuple[Slots, Slots]]:
    """The SSM states that a launch reads and those that it writes: in place, since one program does both. A buffer that
    kernels do not take as it lies goes through a copy."""
    used = lined_up(pool, 2)
    before = Slots.of(used, read)
    yield before, before if out is None else Slots.of(used, out)
    if used is not pool:
        pool.copy_(used)
