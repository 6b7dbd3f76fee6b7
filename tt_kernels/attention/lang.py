"""One tile of keys and values: how attention kernels take it, online softmax in powers of two, and how it is read from
pages."""

import triton
import triton.language as tl


@triton.jit
def attend(q, k, v, m, l, o, seen, scale, MASKED: tl.constexpr):
    """One tile of keys: the running maximum m, sum l and output o of rows q [BLOCK_M, BLOCK_P], in the dtype of m.

    MASKED: keys that are not `seen`, [BLOCK_M, BLOCK_N] or [1, BLOCK_N], get a weight of 0, which a NaN among their
    values outlives."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=m.dtype) * scale  # [BLOCK_M, BLOCK_N], log2
    if MASKED:
        s = tl.where(seen, s, -float("inf"))
        new = tl.maximum(m, tl.max(s, axis=1))
        # A row that has seen nothing yet keeps -inf: nothing to rescale, and no -inf minus -inf.
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
def page_of(table_ptr, n, end, page_size, TMA: tl.constexpr):
    """The page of cached token n, where a tile lies in one page."""
    page = 0
    if TMA:
        page = tl.load(table_ptr + n // page_size, mask=n < end, other=0).to(tl.int32)
    return page


@triton.jit
def cached(
    k_desc,
    v_desc,
    k_pages_ptr,
    v_pages_ptr,
    table_ptr,
    page,
    n,
    end,
    head,
    stride_kpage,
    stride_kslot,
    stride_khead,
    stride_vpage,
    stride_vslot,
    stride_vhead,
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
        if MASKED:  # their weights are 0, but what lies there may be NaN
            v = tl.where((tokens < end)[:, None], v, tl.zeros_like(v))
    else:
        offs_p = tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[None, :]
        if MASKED:
            mask = mask & (tokens < end)[:, None]
            page = tl.load(table_ptr + tokens // page_size, mask=tokens < end, other=0)
        else:
            page = tl.load(table_ptr + tokens // page_size)
        page = tl.minimum(tl.maximum(page, 0), pages - 1).to(tl.int64)  # never outside the pool; TMA sees to that
        slot = (tokens % page_size).to(tl.int64)
        at_k = page * stride_kpage + slot * stride_kslot + head * stride_khead
        at_v = page * stride_vpage + slot * stride_vslot + head * stride_vhead
        k = tl.load(k_pages_ptr + at_k[:, None] + offs_p[None, :], mask=mask, other=0.0)
        v = tl.load(v_pages_ptr + at_v[:, None] + offs_p[None, :], mask=mask, other=0.0)
    return k, v
