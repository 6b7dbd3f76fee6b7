"""One tile of tokens of one head, as every scan kernel takes it: time steps, decays, products of fp32 with 16 bits."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, tuned


def splits(*narrow: Tensor) -> bool:
    """Whether products with these take fp32 apart into parts of their dtype: where that has the exponents of fp32."""
    return all(t.dtype == torch.bfloat16 for t in narrow)


def arithmetic(x: Tensor, A: Tensor, *narrow: Tensor, dt_limit: tuple[float, float]) -> dict[str, object]:
    """Constants of a scan kernel. fp16 is exact in tf32, and three tf32 products hold the other factor."""
    acc = tl.float64 if compute_dtype(x.dtype, A.dtype) == torch.float64 else tl.float32
    split = acc == tl.float32 and splits(x, *narrow)
    precision = "tf32x3" if all(t.dtype.itemsize == 2 for t in (x, *narrow)) else "ieee"
    low, high = dt_limit
    high = high if math.isfinite(high) else 3.4e38
    return dict(ACC=acc, SPLIT=split, PRECISION=precision, LOW=float(low), HIGH=float(high))


def measured(kernel: str, default: Launch, x: Tensor, rows: int, L: int, P: int, N: int) -> Launch:
    """The launch of a kernel that takes `rows` (rows times heads) of L tokens in one tile or a few."""
    near = dict(rows=triton.next_power_of_2(rows), L=triton.next_power_of_2(L))
    return tuned(kernel, default, architecture(x), **near, P=P, N=N, itemsize=x.element_size())


def dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """As kernels read small ones: contiguous."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


def lined_up(t: Tensor | None, dim: int | None = None) -> Tensor | None:
    """As kernels read it: the last dimension contiguous, and what a program takes of `dim` (64 tokens, or all P) within
    32-bit offsets of its first: those of a tile are vectors, where 64 bits would take twice the registers."""
    if t is None:
        return None
    reach = 0 if dim is None else (64 if dim == 1 else t.shape[dim]) * t.stride(dim) + t.shape[-1]
    return t if t.stride(-1) == 1 and reach < 2**31 else t.contiguous()
