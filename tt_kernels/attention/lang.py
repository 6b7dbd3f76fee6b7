"""What attention kernels share: their operands, online softmax over one tile of keys, and loads from a paged cache."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime.lang import tanh
from ..runtime.launch import by_tma


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


def log2_scale(scale: float, softcap: float | None = None) -> tuple[float | None, float | None, float]:
    """factor, slope and scale, as kernels take them: the scale of the scores, times log2(e), is `scale` where it can be
    folded into exponents (`weigh`), as those of models can; where it is 0, negative or above 1 it is `factor`. Capped
    scores are softcap tanh(slope q k), whose softcap, times log2(e), is folded likewise."""
    log2e = 1.4426950408889634
    if softcap is not None:
        return None, scale / softcap, softcap * log2e
    log2 = scale * log2e
    return (None, None, log2) if 1e-30 < scale <= 1 else (log2, None, 1.0)


def in_tiles(
    k: Tensor, v: Tensor, block_n: int, block_p: int, architecture: int
) -> tuple[TensorDescriptor, TensorDescriptor] | tuple[None, None]:
    """Keys and values [B, N, H, P] as matrices [B * N, H * P] for TMA, in tiles [block_n, P]; None, None where the GPU
    has none, the tokens of all rows do not have one stride, strides are no multiples of 16 bytes, or coordinates would
    need more than 32 bits."""
    found = []
    for t in (k, v):
        B, N, H, P = t.shape
        strides = (t.stride(0) if B > 1 else N * t.stride(1), t.stride(2) if H > 1 else P, t.stride(3))
        plain = strides == (N * t.stride(1), P, 1) and t.stride(1) >= H * P
        if not plain or t.element_size() != 2 or block_p != P or B * N >= 2**31:
            return None, None
        rows = t.as_strided((B * N, H * P), (t.stride(1), 1))
        if not by_tma(rows, architecture):
            return None, None
        found.append(TensorDescriptor.from_tensor(rows, [block_n, P]))
    return found[0], found[1]


@triton.jit
def scores(q, k, factor, slope, acc: tl.constexpr):
    """Products of rows with keys, times `factor` unless None, or capped, tanh of `slope` times them, unless None:
    [BLOCK_M, BLOCK_N]."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=acc)
    if factor is not None:
        s = s * factor
    if slope is not None:
        s = tanh(s * slope)
    return s


@triton.jit
def weigh(s, m, l, seen, scale, MASKED: tl.constexpr):
    """The running maximum m (not scaled) and sum l of rows after a tile of scores, the tile's weights, and what is kept
    of earlier results. scale: above 0, times log2(e).

    s * scale - shift is one instruction and rounded once: of a row's largest score it is the error of `shift`, 2^-24 of
    it. That cancels, but for scores above 2^30 its power of two would not be finite, unless the scale is 1.

    MASKED: keys that are not `seen`, [BLOCK_M, BLOCK_N] or [1, BLOCK_N], get a weight of 0. NaN times 0 is NaN: the
    caller clears values that are not to be seen."""
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, axis=1))
    shift = new * scale
    if MASKED:  # a row that has seen no key yet has new = -inf; subtracting it would give NaN
        shift = tl.where(new == -float("inf"), 0.0, shift)
    p = tl.exp2(s * scale - shift[:, None])
    kept = tl.exp2(m * scale - shift)
    l = l * kept + tl.sum(p, axis=1)
    return new, l, p, kept


@triton.jit
def add_values(p, v, o, kept):
    """The output of rows [BLOCK_M, BLOCK_P] with a tile of values."""
    return tl.dot(p.to(v.dtype), v, o * kept[:, None], input_precision="ieee", out_dtype=o.dtype)


@triton.jit
def attend(q, k, v, m, l, o, seen, factor, slope, scale, MASKED: tl.constexpr):
    """One tile of keys and values: m and l of rows q as `weigh` has them, and their output o."""
    m, l, p, kept = weigh(scores(q, k, factor, slope, m.dtype), m, l, seen, scale, MASKED)
    return m, l, add_values(p, v, o, kept)


@triton.jit
def tokens_of(x, b, token, head, offs_p):
    """Pointers to tokens of row b of an operand `Heads`: [tokens, P]."""
    at = b * x.stride_b + token.to(tl.int64) * x.stride_l + head * x.stride_h
    return x.ptr + at[:, None] + offs_p[None, :]


@triton.jit
def tile_of(x, b, offs_n, head, offs_p, N, P):
    """Tokens below N of an operand `Heads`: [tokens, P]."""
    mask = (offs_n < N)[:, None] & (offs_p < P)[None, :]
    return tl.load(tokens_of(x, b, offs_n, head, offs_p), mask=mask, other=0.0)


@triton.jit
def _whole(x, desc, b, n, head, N, P, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """Tokens n and on of `Heads`, all below N: [BLOCK_N, BLOCK_P]."""
    if desc is None:
        offs_p = tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[None, :]
        return tl.load(tokens_of(x, b, n + tl.arange(0, BLOCK_N), head, offs_p), mask=mask, other=0.0)
    else:
        return desc.load([b.to(tl.int32) * N + n, head.to(tl.int32) * P])


@triton.jit
def attend_whole(
    q,
    k,  # Heads, as v
    v,
    k_desc,  # the same for TMA, as v_desc; or None
    v_desc,
    b,
    head,
    start,
    end,
    N,
    P,
    m,
    l,
    o,
    factor,
    slope,
    scale,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """`attend` for tokens start to end, all seen, in whole tiles.

    The values of a tile are multiplied while the weights of the next are computed: o is a tile behind m and l. The
    weights are carried in the dtype of m: operands in 16 bits would go through shared memory."""
    if start < end:
        k_tile = _whole(k, k_desc, b, start, head, N, P, BLOCK_N, BLOCK_P)
        s = scores(q, k_tile, factor, slope, m.dtype)  # [BLOCK_M, BLOCK_N]
        m, l, p, kept = weigh(s, m, l, True, scale, MASKED=False)
        for n in tl.range(start + BLOCK_N, end, BLOCK_N):
            k_tile = _whole(k, k_desc, b, n, head, N, P, BLOCK_N, BLOCK_P)  # [BLOCK_N, BLOCK_P]
            v_tile = _whole(v, v_desc, b, n - BLOCK_N, head, N, P, BLOCK_N, BLOCK_P)
            s = scores(q, k_tile, factor, slope, m.dtype)
            o = add_values(p, v_tile, o, kept)
            m, l, p, kept = weigh(s, m, l, True, scale, MASKED=False)
        o = add_values(p, _whole(v, v_desc, b, end - BLOCK_N, head, N, P, BLOCK_N, BLOCK_P), o, kept)
    return m, l, o


@triton.jit
def slots(pages, page, slot, head, offs_p):
    """Pointers to slots of an operand `Pages`: [tokens, P]."""
    at = page * pages.stride_page + slot * pages.stride_slot + head * pages.stride_h
    return pages.ptr + at[:, None] + offs_p[None, :]


@triton.jit
def pages_of(table_ptr, n, end, page_size, BLOCK_N: tl.constexpr, IN_PAGE: tl.constexpr):
    """The pages of cached tokens n and on, below `end`: [BLOCK_N]; IN_PAGE: the one that they lie in."""
    if IN_PAGE:
        page = tl.load(table_ptr + n // page_size, mask=n < end, other=0).to(tl.int32)
    else:
        tokens = n + tl.arange(0, BLOCK_N)
        page = tl.load(table_ptr + tokens // page_size, mask=tokens < end, other=0).to(tl.int32)
    return page


@triton.jit
def cached(
    k_pages,  # Pages, as v_pages; read where not TMA
    v_pages,
    k_desc,  # read where TMA
    v_desc,
    page,  # of `pages_of`
    n,
    low,  # the first token that is seen, where LATE; what TMA brings of a page before it is the row's own
    end,
    head,
    pages,
    page_size,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
    LATE: tl.constexpr,
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
        if LATE:
            mask = mask & (tokens >= low)[:, None]
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)  # inside the pool, as TMA does by itself
        slot = (tokens % page_size).to(tl.int64)
        k = tl.load(slots(k_pages, page, slot, head, offs_p), mask=mask, other=0.0)  # [BLOCK_N, BLOCK_P]
        v = tl.load(slots(v_pages, page, slot, head, offs_p), mask=mask, other=0.0)
    return k, v
