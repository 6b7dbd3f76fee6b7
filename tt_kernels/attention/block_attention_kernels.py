"""The kernel of training's attention masks, forward: causal, block-causal and block-diffusion, without a mask tensor.

Noisy queries see the clean keys of the blocks before theirs, then the noisy keys of their own block. Tiles that every
row sees whole run without a mask; the tiles at the diagonal and the row's own blocks are masked by arithmetic.
"""

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch
from .lang import attend, attend_whole, tile_of


@triton.jit(do_not_specialize=["N", "window"])
def _block_attention_kernel(
    q,  # Heads [B, N, Hq, P]
    k_clean,  # Heads [B, N, Hkv, P]: of the clean sequence, as v_clean
    v_clean,
    # The same as matrices (`in_tiles`); None: no TMA. Triton 3.6 cannot launch one inside a tuple.
    k_desc,
    v_desc,
    k,  # Heads [B, N, Hkv, P]: of the noisy tokens, as v; None: causal attention among the clean tokens
    v,
    starts_ptr,  # [B, N] int32: where each token's sequence begins in its row; None: at the row's start
    o_ptr,  # [B, N, Hq, P], contiguous
    lse_ptr,  # [B, N, Hq]: log-sum-exp, natural
    N,
    Hq,
    window,  # keys that a causal query sees, up to itself; None: all
    factor,  # of the scores, times log2(e), where it is not `scale` (`log2_scale`); or None
    slope,  # of scores in the tanh of a soft cap; or None
    scale,
    P: tl.constexpr,
    R: tl.constexpr,  # query heads of a KV head
    S: tl.constexpr,  # block size
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    programmatic_launch()
    CAUSAL: tl.constexpr = k is None
    PACKED: tl.constexpr = starts_ptr is not None
    LATE: tl.constexpr = PACKED or window is not None  # rows that do not see the first keys
    # The longest rows first: the programs that start last are then short.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # offsets may exceed 2^31, of b too
    b = tl.program_id(2).to(tl.int64)
    acc = tl.float64 if q.ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q_tile = tile_of(q, b, rows, head, offs_p, N, P)  # [BLOCK_M, BLOCK_P]
    begin = tl.zeros((BLOCK_M,), dtype=tl.int32)  # of each row's sequence, or of its window
    low = 0
    if PACKED:
        begin = tl.load(starts_ptr + b * N + rows, mask=rows < N, other=0)
    if window is not None:
        begin = tl.maximum(begin, rows - window + 1)
    if LATE:
        low = tl.min(tl.where(rows < N, begin, N), axis=0) // BLOCK_N * BLOCK_N
    m = tl.full((BLOCK_M,), -float("inf"), dtype=acc)
    l = tl.zeros((BLOCK_M,), dtype=acc)
    o = tl.zeros((BLOCK_M, BLOCK_P), dtype=acc)

    # Row i sees clean keys below `limit`: up to itself, or up to where its block begins.
    limit = rows + 1 if CAUSAL else rows // S * S  # [BLOCK_M]
    least = first + 1 if CAUSAL else first // S * S  # of the first row: every row of the tile sees at least these
    most = tl.minimum(first + BLOCK_M, N)  # of the last row: no key from here on is seen or read
    if not CAUSAL:
        most = tl.maximum(most - 1, 0) // S * S
    whole = tl.minimum(least, N) // BLOCK_N * BLOCK_N
    inner = low
    if LATE:  # from where every row of the tile is in its sequence and its window
        latest = tl.max(tl.where(rows < N, begin, 0), axis=0)
        inner = tl.minimum((latest + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(whole, low))
        whole = tl.maximum(whole, inner)
    m, l, o = attend_whole(
        *(q_tile, k_clean, v_clean, k_desc, v_desc, b, head // R, inner, whole, N, P, m, l, o, factor, slope, scale),
        *(BLOCK_N, BLOCK_P),
    )
    for i in tl.range(low, inner + tl.maximum(most - whole, 0), BLOCK_N):  # the tiles on both sides of those
        n = i if i < inner else i - inner + whole
        k_tile = tile_of(k_clean, b, n + offs_n, head // R, offs_p, most, P)
        v_tile = tile_of(v_clean, b, n + offs_n, head // R, offs_p, most, P)
        seen = ((n + offs_n)[None, :] < limit[:, None]) & ((n + offs_n)[None, :] >= begin[:, None])
        m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, seen, factor, slope, scale, MASKED=True)
    if not CAUSAL:  # its own noisy block, both ways
        end = tl.minimum((first + BLOCK_M - 1) // S * S + S, N)
        for n in tl.range(first // S * S // BLOCK_N * BLOCK_N, end, BLOCK_N):
            k_tile = tile_of(k, b, n + offs_n, head // R, offs_p, N, P)
            v_tile = tile_of(v, b, n + offs_n, head // R, offs_p, N, P)
            seen = ((n + offs_n) // S)[None, :] == (rows // S)[:, None]
            seen = seen & ((n + offs_n) < N)[None, :]
            if PACKED:  # a block may be of two sequences
                of = tl.load(starts_ptr + b * N + n + offs_n, mask=n + offs_n < N, other=0)
                seen = seen & (of[None, :] == begin[:, None])
            m, l, o = attend(q_tile, k_tile, v_tile, m, l, o, seen, factor, slope, scale, MASKED=True)

    out = (b * N + rows) * Hq + head
    mask_o = (rows < N)[:, None] & (offs_p < P)[None, :]
    o = o / tl.where(rows < N, l, 1.0)[:, None]
    tl.store(o_ptr + out[:, None] * P + offs_p[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_o)
    lse = (m * scale + tl.log2(tl.where(rows < N, l, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + out, lse, mask=rows < N)
