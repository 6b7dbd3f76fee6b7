"""The kernel of training's attention masks, forward: causal, block-causal and block-diffusion, never a mask in memory.

Rows of noisy queries see the clean keys of the blocks before theirs, then the noisy keys of their own block. Tiles that
are seen whole run without a mask; only the tile at the diagonal, and the row's own blocks, are masked by arithmetic.
"""

import triton
import triton.language as tl

from .lang import attend


@triton.jit
def _tile(ptr, offs_n, offs_p, stride, N, P):
    mask = (offs_n < N)[:, None] & (offs_p < P)[None, :]
    return tl.load(ptr + offs_n.to(tl.int64)[:, None] * stride + offs_p[None, :], mask=mask, other=0.0)


@triton.jit
def _block_attention_kernel(
    q_ptr,  # [B, N, Hq, P]
    k_ptr,  # [B, N, Hkv, P]: the noisy tokens', as v; not read where CAUSAL
    v_ptr,
    k_clean_ptr,  # [B, N, Hkv, P]: of the clean sequence, as v_clean
    v_clean_ptr,
    starts_ptr,  # [B, N] int32: where each token's sequence begins in its row, where PACKED
    o_ptr,  # [B, N, Hq, P], contiguous
    lse_ptr,  # [B, N, Hq]: log-sum-exp, natural
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_kcb,
    stride_kcn,
    stride_kch,
    stride_vcb,
    stride_vcn,
    stride_vch,
    N,
    Hq,
    P,
    scale,  # times log2(e)
    R: tl.constexpr,  # query heads of a KV head
    S: tl.constexpr,  # block size
    CAUSAL: tl.constexpr,  # plain causal attention among the clean keys instead
    PACKED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # The longest rows first: programs that start last are then the short ones.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)  # strides may carry them past 2^31, as b
    b = tl.program_id(2).to(tl.int64)
    acc = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + b * stride_qb + head * stride_qh, rows, offs_p, stride_qn, N, P)  # [BLOCK_M, BLOCK_P]
    k_clean_ptr += b * stride_kcb + head // R * stride_kch
    v_clean_ptr += b * stride_vcb + head // R * stride_vch
    begin = tl.zeros((BLOCK_M,), dtype=tl.int32)  # of each row's sequence
    low = 0
    if PACKED:
        begin = tl.load(starts_ptr + b * N + rows, mask=rows < N, other=0)
        low = tl.min(tl.where(rows < N, begin, N), axis=0) // BLOCK_N * BLOCK_N
    m = tl.full((BLOCK_M,), -float("inf"), dtype=acc)
    l = tl.zeros((BLOCK_M,), dtype=acc)
    o = tl.zeros((BLOCK_M, BLOCK_P), dtype=acc)

    # Row i sees clean keys below `limit`: up to itself, or up to where its block begins.
    limit = rows + 1 if CAUSAL else rows // S * S  # [BLOCK_M]
    least = first + 1 if CAUSAL else first // S * S  # of the first row: every row of the tile sees at least these
    most = tl.minimum(first + BLOCK_M, N)  # of the last row: no row of the tile sees more, nor is more read
    if not CAUSAL:
        most = tl.maximum(most - 1, 0) // S * S
    whole = tl.minimum(least, N) // BLOCK_N * BLOCK_N
    inner = low
    if PACKED:  # from where every row of the tile is in its sequence
        latest = tl.max(tl.where(rows < N, begin, 0), axis=0)
        inner = tl.minimum((latest + BLOCK_N - 1) // BLOCK_N * BLOCK_N, tl.maximum(whole, low))
        whole = tl.maximum(whole, inner)
    for n in tl.range(inner, whole, BLOCK_N):
        k = _tile(k_clean_ptr, n + offs_n, offs_p, stride_kcn, N, P)
        v = _tile(v_clean_ptr, n + offs_n, offs_p, stride_vcn, N, P)
        m, l, o = attend(q, k, v, m, l, o, True, scale, MASKED=False)
    for i in tl.range(low, inner + tl.maximum(most - whole, 0), BLOCK_N):  # what is left on both sides of those
        n = i if i < inner else i - inner + whole
        k = _tile(k_clean_ptr, n + offs_n, offs_p, stride_kcn, most, P)
        v = _tile(v_clean_ptr, n + offs_n, offs_p, stride_vcn, most, P)
        seen = ((n + offs_n)[None, :] < limit[:, None]) & ((n + offs_n)[None, :] >= begin[:, None])
        m, l, o = attend(q, k, v, m, l, o, seen, scale, MASKED=True)
    if not CAUSAL:  # its own noisy block, both ways
        k_ptr += b * stride_kb + head // R * stride_kh
        v_ptr += b * stride_vb + head // R * stride_vh
        end = tl.minimum((first + BLOCK_M - 1) // S * S + S, N)
        for n in tl.range(first // S * S // BLOCK_N * BLOCK_N, end, BLOCK_N):
            k = _tile(k_ptr, n + offs_n, offs_p, stride_kn, N, P)
            v = _tile(v_ptr, n + offs_n, offs_p, stride_vn, N, P)
            seen = ((n + offs_n) // S)[None, :] == (rows // S)[:, None]
            seen = seen & ((n + offs_n) < N)[None, :]
            if PACKED:  # a block may be of two sequences
                of = tl.load(starts_ptr + b * N + n + offs_n, mask=n + offs_n < N, other=0)
                seen = seen & (of[None, :] == begin[:, None])
            m, l, o = attend(q, k, v, m, l, o, seen, scale, MASKED=True)

    out = (b * N + rows) * Hq + head
    mask_o = (rows < N)[:, None] & (offs_p < P)[None, :]
    o = o / tl.where(rows < N, l, 1.0)[:, None]
    tl.store(o_ptr + out[:, None] * P + offs_p[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_o)
    lse = (m + tl.log2(tl.where(rows < N, l, 1.0))) * 0.6931471805599453
    tl.store(lse_ptr + out, lse, mask=rows < N)
