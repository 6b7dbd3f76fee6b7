"""The kernels of `context_attention` and `append_attention`: split over the context, combined by log-sum-exp."""

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch
from .lang import attend, attend_whole, cached, pages_of, slots, tile_of, tokens_of


@triton.jit(do_not_specialize=["stride_table", "B", "L", "pages", "room", "fill", "max_splits", "window"])
def _context_attention_kernel(
    q,  # Heads [B, L, Hq, P]
    k,  # Heads [B, L, Hkv, P]: the block's own, as v
    v,
    k_pages,  # Pages [pages, page_size, Hkv, P], as v_pages
    v_pages,
    # The same pages as [pages * page_size, Hkv * P], in tiles [BLOCK_N, P], where TMA. They are arguments of their own:
    # Triton 3.6 cannot launch a descriptor inside a tuple.
    k_desc,
    v_desc,
    k_own_desc,  # k and v as matrices (`in_tiles`), where they are longer than a tile; or None
    v_own_desc,
    page_table_ptr,  # [B, pages of a row]
    cache_lengths_ptr,  # [B]
    counts_ptr,  # [B], or None: all L enter; where APPEND
    o_ptr,  # [B, L, Hq, P], contiguous
    lse_ptr,  # [B, L, Hq]: log-sum-exp, natural
    partial_ptr,  # [splits, B, L, Hq, P] where splits > 1
    m_ptr,  # [splits, B, L, Hq], as l: maximum and sum of a split, log2
    l_ptr,
    stride_table,
    B,
    L,
    Hkv,
    pages,
    page_size,
    room,
    fill,  # splits of a row's context that keep the GPU busy
    max_splits,
    min_tokens,  # cached tokens of a split, at least
    window,  # tokens that one sees up to itself; None: all
    factor,  # of the scores, times log2(e), where it is not `scale` (`log2_scale`); or None
    slope,  # of scores in the tanh of a soft cap; or None
    scale,
    P: tl.constexpr,
    R: tl.constexpr,  # query heads of a KV head
    APPEND: tl.constexpr,  # the block's keys and values enter the cache behind its tokens
    CAUSAL: tl.constexpr,
    IN_PAGE: tl.constexpr,  # a tile of cached tokens lies in one page
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,  # tokens that begin in a row tile, or more
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,  # keys of a tile of the block's own
):
    programmatic_launch()
    # Rows of a KV head: token after token, each with its R query heads. The row tiles of a KV head and split are
    # neighbours in the grid, so that the keys and values that one reads are in L2 for the next.
    tile = tl.program_id(0)
    if CAUSAL:  # the longest rows first: the programs that start last are then short
        tile = tl.num_programs(0) - 1 - tile
    head = (tl.program_id(1) % Hkv).to(tl.int64)  # offsets may exceed 2^31, of b and of slots too
    split = tl.program_id(1) // Hkv if SPLIT else 0
    b = tl.program_id(2).to(tl.int64)
    acc = tl.float64 if q.ptr.dtype.element_ty == tl.float64 else tl.float32
    length = tl.minimum(tl.maximum(tl.load(cache_lengths_ptr + b), 0), room).to(tl.int32)  # inside the row's pages
    start, end, span = 0, length, length
    if window is not None:  # what comes before is in no token's window; a tile still lies in one page
        start = tl.maximum(length - window + 1, 0) // 64 * 64
        span = length - start
    if SPLIT:  # by the row's own length: its splits are equal, however much room there is
        splits = tl.minimum(tl.maximum(fill, tl.cdiv(span, 16 * min_tokens)), max_splits)
        size = tl.maximum(tl.cdiv(tl.cdiv(span, splits), 64) * 64, min_tokens)
        start += split * size
        end = tl.minimum(length, start + size)
    table_ptr = page_table_ptr + b * stride_table
    offs_p = tl.arange(0, BLOCK_P)
    if APPEND:  # noqa: SIM102 (the compiler knows APPEND, but not the split)
        if split == 0:
            # The tokens whose first query row is in this tile: each is written once. Their positions start at `length`,
            # where loads of cached tiles are masked: no program uses what another writes here.
            at = (tile * BLOCK_M + R - 1) // R + tl.arange(0, BLOCK_T)
            count = L
            if counts_ptr is not None:
                count = tl.minimum(tl.load(counts_ptr + b), L)
            to = length + at
            mask = (at < (tile * BLOCK_M + BLOCK_M + R - 1) // R) & (at < count) & (to < room)
            page = tl.load(table_ptr + to // page_size, mask=mask, other=0).to(tl.int64)
            slot = (to % page_size).to(tl.int64)
            mask = mask & (page >= 0) & (page < pages)
            mask = mask[:, None] & (offs_p < P)[None, :]
            k_new = tl.load(tokens_of(k, b, at, head, offs_p), mask=mask)  # [BLOCK_T, BLOCK_P]
            v_new = tl.load(tokens_of(v, b, at, head, offs_p), mask=mask)
            tl.store(slots(k_pages, page, slot, head, offs_p), k_new, mask=mask)
            tl.store(slots(v_pages, page, slot, head, offs_p), v_new, mask=mask)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // R
    query_head = head * R + rows % R
    offs_l = tl.arange(0, BLOCK_L)
    mask_q = (token < L)[:, None] & (offs_p < P)[None, :]
    q_tile = tl.load(tokens_of(q, b, token, query_head, offs_p), mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_P]
    m = tl.full((BLOCK_M,), -float("inf"), dtype=acc)
    l = tl.zeros((BLOCK_M,), dtype=acc)
    o = tl.zeros((BLOCK_M, BLOCK_P), dtype=acc)
    low = 0
    if window is not None:  # of tokens of the block: the first that the tile's first sees, and that each of them sees
        earliest = tile * BLOCK_M // R - window + 1
        begin = tl.minimum(token, L - 1) - window + 1  # [BLOCK_M]
        latest = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // R, L - 1) - window + 1
        low = length + earliest  # of cached ones

    # The block's own keys and values, not from the cache: first, they come while the cache's pages are looked up.
    if split == 0:
        seen_by_all, last = 0, L
        if CAUSAL:
            last = tl.minimum(L, (tile * BLOCK_M + BLOCK_M - 1) // R + 1)
        if k_own_desc is not None:
            seen_by_all = L
            if CAUSAL:
                seen_by_all = tl.minimum(L, tile * BLOCK_M // R + 1)
            seen_by_all = seen_by_all // BLOCK_N * BLOCK_N
        first, stop, inner = seen_by_all, last, 0
        if window is not None:  # [first, inner) and [seen_by_all, last) are masked
            first = tl.maximum(earliest, 0) // BLOCK_L * BLOCK_L
            inner = tl.minimum(tl.cdiv(tl.maximum(latest, 0), BLOCK_L) * BLOCK_L, tl.maximum(seen_by_all, first))
            seen_by_all = tl.maximum(seen_by_all, inner)
            stop = inner + tl.maximum(last - seen_by_all, 0)
        if k_own_desc is not None:  # then BLOCK_L is BLOCK_N
            m, l, o = attend_whole(
                *(q_tile, k, v, k_own_desc, v_own_desc, b, head, inner, seen_by_all, L, P, m, l, o),
                *(factor, slope, scale, BLOCK_N, BLOCK_P),
            )
        for i in tl.range(first, stop, BLOCK_L):
            n = i
            if window is not None:
                n = i if i < inner else i - inner + seen_by_all
            own = n + offs_l
            k_tile = tile_of(k, b, own, head, offs_p, L, P)  # [BLOCK_L, BLOCK_P]
            v_tile = tile_of(v, b, own, head, offs_p, L, P)
            seen = (own < L)[None, :]
            if CAUSAL:
                seen = seen & (own[None, :] <= token[:, None])
            if window is not None:
                seen = seen & (own[None, :] >= begin[:, None])
            m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, seen, factor, slope, scale, MASKED=True)

    offs_n = tl.arange(0, BLOCK_N)
    if window is not None:
        start = tl.maximum(start, tl.maximum(low, 0) // BLOCK_N * BLOCK_N)
    full = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    # A tile's pages are looked up an iteration ahead: a look-up in the same iteration would take a stage of the
    # pipeline, and the load of the tile could not run ahead.
    page = pages_of(table_ptr, start, end, page_size, BLOCK_N, IN_PAGE)
    whole = start
    if window is not None:  # tiles in which windows begin
        whole = tl.minimum(tl.cdiv(tl.maximum(length + latest, 0), BLOCK_N) * BLOCK_N, full)
        whole = tl.maximum(whole, start)
        for n in tl.range(start, whole, BLOCK_N):
            k_tile, v_tile = cached(
                *(k_pages, v_pages, k_desc, v_desc, page, n, low, end, head, pages, page_size),
                *(P, BLOCK_N, BLOCK_P, TMA, False, True),
            )
            page = pages_of(table_ptr, n + BLOCK_N, end, page_size, BLOCK_N, IN_PAGE)
            seen = (n + offs_n)[None, :] >= (length + begin)[:, None]
            m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, seen, factor, slope, scale, MASKED=True)
    for n in tl.range(whole, full, BLOCK_N):  # all of these are seen: no mask
        k_tile, v_tile = cached(
            *(k_pages, v_pages, k_desc, v_desc, page, n, low, end, head, pages, page_size),
            *(P, BLOCK_N, BLOCK_P, TMA, False, False),
        )
        page = pages_of(table_ptr, n + BLOCK_N, end, page_size, BLOCK_N, IN_PAGE)
        m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, True, factor, slope, scale, MASKED=False)
    if full < end:
        k_tile, v_tile = cached(
            *(k_pages, v_pages, k_desc, v_desc, page, full, low, end, head, pages, page_size),
            *(P, BLOCK_N, BLOCK_P, TMA, True, window is not None),
        )
        seen = (full + offs_n < end)[None, :]
        if window is not None:
            seen = seen & ((full + offs_n)[None, :] >= (length + begin)[:, None])
        m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, seen, factor, slope, scale, MASKED=True)

    out = ((split * B + b) * L + token) * (Hkv * R) + query_head
    if SPLIT:
        tl.store(m_ptr + out, m * scale, mask=token < L)
        tl.store(l_ptr + out, l, mask=token < L)
        if (split == 0) | (start < end):
            tl.store(partial_ptr + out[:, None] * P + offs_p[None, :], o, mask=mask_q)
    else:
        o = o / l[:, None]
        tl.store(lse_ptr + out, (m * scale + tl.log2(l)) * 0.6931471805599453, mask=token < L)
        tl.store(o_ptr + out[:, None] * P + offs_p[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)


@triton.jit(do_not_specialize=["rows", "splits"])
def _combine_splits_kernel(
    partial_ptr,  # [splits, rows, P]
    m_ptr,  # [splits, rows], as l
    l_ptr,
    o_ptr,  # [rows, P]
    lse_ptr,  # [rows]
    rows,
    splits,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,  # no fewer than there are splits
    BLOCK_S: tl.constexpr,  # results of a row that are added at a time
    BLOCK_P: tl.constexpr,
):
    programmatic_launch()
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = (row < rows)[:, None]
    split = tl.arange(0, BLOCK_M).to(tl.int64)[None, :]
    offs_p = tl.arange(0, BLOCK_P)
    m = tl.load(m_ptr + split * rows + row[:, None], mask=mask_r & (split < splits), other=-float("inf"))
    l = tl.load(l_ptr + split * rows + row[:, None], mask=mask_r & (split < splits), other=0.0)  # [BLOCK_R, BLOCK_M]
    most = tl.max(m, axis=1)  # finite: split 0 has seen the token itself
    l = tl.sum(l * tl.exp2(m - most[:, None]), axis=1)
    o = tl.zeros((BLOCK_R, BLOCK_P), dtype=l.dtype)
    for first in range(0, splits, BLOCK_S):
        some = first + tl.arange(0, BLOCK_S).to(tl.int64)[None, :]
        at = some * rows + row[:, None]
        high = tl.load(m_ptr + at, mask=mask_r & (some < splits), other=-float("inf"))  # [BLOCK_R, BLOCK_S]
        # A split that starts past the row's length has written m = -inf and no partial result.
        mask = (high > -float("inf"))[:, :, None] & (offs_p < P)[None, None, :]
        part = tl.load(partial_ptr + at[:, :, None] * P + offs_p[None, None, :], mask=mask, other=0.0)
        o += tl.sum(part * tl.exp2(high - most[:, None])[:, :, None], axis=1)
    tl.store(lse_ptr + row, (most + tl.log2(l)) * 0.6931471805599453, mask=row < rows)
    o = (o / l[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + row[:, None] * P + offs_p[None, :], o, mask=mask_r & (offs_p < P)[None, :])
