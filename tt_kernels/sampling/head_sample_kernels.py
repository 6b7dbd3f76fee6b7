"""The head and the sampling from its logits in one pass over the vocabulary: the logits never reach memory."""

import triton
import triton.language as tl

from .lang import empty_record, is_any_hot, merge, tile_record, write_record


@triton.jit(do_not_specialize=["R", "first"])
def _head_kernel(
    hidden_ptr,  # [rows, D]
    weight_ptr,  # [V, D], or its descriptor
    rows_ptr,  # [N]: which row of hidden each record is of
    count_ptr,  # [1]: how many records there are
    temperature_ptr,  # [rows / L], as seed, position and step
    seed_ptr,
    position_ptr,
    step_ptr,
    stats_ptr,  # [4, N, slots]
    token_ptr,  # [N, slots]
    logits_ptr,  # [R, V]: of records first to first + R
    stride_hidden,
    stride_weight,
    R,
    first,
    L,
    V,
    D,
    tiles,  # of BLOCK_V tokens a piece
    pieces,  # of the vocabulary
    depth,  # pieces a part
    parts,
    plane,  # N * depth * parts
    suppress,
    COMPACT: tl.constexpr,
    STORE: tl.constexpr,  # the logits, and nothing else
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB: tl.constexpr,  # rows sampled at a time
):
    acc_dtype = tl.float64 if WIDE else tl.float32
    count = R
    if COMPACT:
        count = min(R, tl.load(count_ptr) - first)
    row_tiles = tl.cdiv(count, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    # Programs that run together take the same piece of the head, which one of them brings into the cache.
    for item in range(tl.program_id(0), row_tiles * pieces, tl.num_programs(0)):
        piece = item // row_tiles
        slot = piece % depth * parts + piece // depth
        offs_t = (item % row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < count
        row = first + offs_t
        if COMPACT:
            row = tl.load(rows_ptr + row, mask=mask_t, other=0)
        any_hot = is_any_hot(row, mask_t, L, temperature_ptr)
        begin = piece * tiles * BLOCK_V
        m, s, best, token, raw = empty_record(SUB, acc_dtype)
        hidden = hidden_ptr + row.to(tl.int64)[:, None] * stride_hidden + offs_k[None, :]
        for start in range(begin, min(begin + tiles * BLOCK_V, V), BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            x = tl.zeros((BLOCK_V, BLOCK_T), dtype=acc_dtype)
            for k in range(0, D, BLOCK_K):
                mask_k = k + offs_k < D
                h = tl.load(hidden + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
                if TMA:
                    w = weight_ptr.load([start, k])  # [BLOCK_V, BLOCK_K]
                else:
                    w_ptr = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_weight + k + offs_k[None, :]
                    w = tl.load(w_ptr, mask=(offs_v < V)[:, None] & mask_k[None, :], other=0.0)
                if w.dtype != h.dtype:
                    w, h = w.to(acc_dtype), h.to(acc_dtype)
                # The head as the larger operand fills the tensor cores.
                x = tl.dot(w, h.T, x, input_precision="ieee", out_dtype=x.dtype)
            if STORE:
                at = logits_ptr + offs_t.to(tl.int64)[None, :] * V + offs_v[:, None]
                tl.store(at, x, mask=mask_t[None, :] & (offs_v < V)[:, None])
            elif BLOCK_T == SUB:
                next_m, next_s, next_best, next_token, next_raw = tile_record(
                    *(x, start, any_hot, row, mask_t, L),
                    *(temperature_ptr, seed_ptr, position_ptr, step_ptr, None, None, V, suppress),
                    NARROW=False,
                    PAIRS=True,
                    BLOCK_V=BLOCK_V,
                )
                m, s, best, token, raw = merge(m, s, best, token, raw, next_m, next_s, next_best, next_token, next_raw)
            else:
                # Few columns at a time, and a record for every tile: those of all rows do not fit registers.
                groups = tl.reshape(x, (BLOCK_V, BLOCK_T // SUB, SUB))
                for group in range(BLOCK_T // SUB):
                    here = tl.arange(0, BLOCK_T // SUB)[None, :, None] == group
                    some = tl.sum(tl.where(here, groups, 0.0), axis=1)  # [BLOCK_V, SUB]
                    record = (item % row_tiles) * BLOCK_T + group * SUB + tl.arange(0, SUB)
                    mask = record < count
                    record += first
                    row_s = record
                    if COMPACT:
                        row_s = tl.load(rows_ptr + record, mask=mask, other=0)
                    m, s, best, token, raw = tile_record(
                        *(some, start, any_hot, row_s, mask, L),
                        *(temperature_ptr, seed_ptr, position_ptr, step_ptr, None, None, V, suppress),
                        NARROW=False,
                        PAIRS=True,
                        BLOCK_V=BLOCK_V,
                    )
                    write_record(stats_ptr, token_ptr, record, mask, slot, depth * parts, plane, m, s, best, token, raw)
        if not STORE and BLOCK_T == SUB:
            write_record(
                stats_ptr, token_ptr, first + offs_t, mask_t, slot, depth * parts, plane, m, s, best, token, raw
            )
