"""What attention kernels share: their operands, online softmax over one tile of keys, and loads from a paged cache."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Heads(NamedTuple):
    """A tensor [B, L, H, P] whose elements of a head lie side by side."""

    ptr: Tensor
    stride_b: int
    stride_l: int
    stride_h: int


class Pages(NamedTuple):
    """A pool [pages, page_size, H, P] whose elements of a head lie side by side."""

    ptr: Tensor
    stride_page: int
    stride_slot: int
    stride_h: int


def side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def heads(t: Tensor) -> Heads:
    t = side_by_side(t)
    return Heads(t, *t.stride()[:3])


@triton.jit
def attend(q, k, v, m, l, o, seen, scale, MASKED: tl.constexpr):
    """One tile of keys: the running maximum m, sum l and output o of rows q [BLOCK_M, BLOCK_P], in the dtype of m.

    MASKED: keys that are not `seen`, [BLOCK_M, BLOCK_N] or [1, BLOCK_N], get a weight of 0. NaN times 0 is NaN: the
    caller clears values that are not to be seen."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=m.dtype) * scale  # [BLOCK_M, BLOCK_N], log2
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has seen no key yet has new = -inf; subtracting it would give NaN.
        shift = tl.where(new == -float("inf"), 0.0, new)
    else:
        new = tl.maximum(m, tl.max(s, axis=1))
        shift = new
    p = tl.exp2(s - shift[:, None])
    kept = tl.exp2(m - shift)
    l = l * kept + tl.sum(p, axis=1)
    o = tl.dot(p.to(v.dtype), v, o * kept[:, None], input_precision="ieee", out_dtype=m.dtype)
    return new, l, o


@triton.jit
def tokens_of(x, b, token, head, offs_p):
    """Pointers to tokens of row b of an operand `Heads`: [tokens, P]."""
    at = b * x.stride_b + token.to(tl.int64) * x.stride_l + head * x.stride_h
    return x.ptr + at[:, None] + offs_p[None, :]


@triton.jit
def slots(pages, page, slot, head, offs_p):
    """Pointers to slots of an operand `Pages`: [tokens, P]."""
    at = page * pages.stride_page + slot * pages.stride_slot + head * pages.stride_h
    return pages.ptr + at[:, None] + offs_p[None, :]


@triton.jit
def page_of(table_ptr, n, end, page_size, TMA: tl.constexpr):
    """The page of cached token n, where a tile lies in one page."""
    page = 0
    if TMA:
        page = tl.load(table_ptr + n // page_size, mask=n < end, other=0).to(tl.int32)
    return page


@triton.jit
def cached(
    k_pages,  # Pages, as v_pages; read where not TMA
    v_pages,
    k_desc,  # read where TMA
    v_desc,
    table_ptr,
    page,
    n,
    end,
    head,
    pages,
    page_size,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys and values of cached tokens n and on: [BLOCK_N, BLOCK_P]; MASKED: values are 0 from `end` on."""
    tokens = n + tl.arange(0, BLOCK_N)
    if TMA:
        at = page * page_size + n % page_size
        k = k_desc.load([at, head.to(tl.int32) * P])
        v = v_desc.load([at, head.to(tl.int32) * P])
        if MASKED:  # slots past the end may hold NaN, which a weight of 0 does not remove
            v = tl.where((tokens < end)[:, None], v, tl.zeros_like(v))
    else:
        offs_p = tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[None, :]
        if MASKED:
            mask = mask & (tokens < end)[:, None]
            page = tl.load(table_ptr + tokens // page_size, mask=tokens < end, other=0)
        else:
            page = tl.load(table_ptr + tokens // page_size)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)  # inside the pool, as TMA does by itself
        slot = (tokens % page_size).to(tl.int64)
        k = tl.load(slots(k_pages, page, slot, head, offs_p), mask=mask, other=0.0)  # [BLOCK_N, BLOCK_P]
        v = tl.load(slots(v_pages, page, slot, head, offs_p), mask=mask, other=0.0)
    return k, v
