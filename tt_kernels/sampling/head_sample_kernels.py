"""The kernel of the head: its logits are sampled tile by tile, or written."""

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch
from .lang import empty_record, finish, is_any_hot, merge, source_of, tile_record, write_record


@triton.jit(do_not_specialize=["R", "first"])
def _head_kernel(
    hidden_ptr,  # [rows, D]
    weight_ptr,  # [V, D], or its descriptor
    stride_hidden,
    stride_weight,
    settings,  # Settings of the rows of hidden
    listed,  # Listed, or None: record n is of row n
    store,  # Store of the records, or None: only the logits are written
    logits_ptr,  # [R, V], where store is None
    R,  # records first to first + R are made
    first,
    V,
    D,
    tiles,  # of BLOCK_V tokens a piece
    pieces,  # of the vocabulary
    suppress,
    look,  # Look, or None
    bias_ptr,  # [V], or None
    softcap: tl.constexpr,  # or None
    SHIFT: tl.constexpr,  # each row's logits are those of the hidden state before
    TMA: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB: tl.constexpr,  # rows sampled at a time
    SKIP: tl.constexpr,  # no noise where no row can win any more, of rows whose tiles a program merges
):
    programmatic_launch()
    acc_dtype = (logits_ptr if store is None else store.stats).dtype.element_ty
    count = R
    if listed is not None:
        count = min(R, tl.load(listed.count) - first)
    row_tiles = tl.cdiv(count, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    # Programs that run together take the same piece of the head, which one of them brings into the cache.
    for item in range(tl.program_id(0), row_tiles * pieces, tl.num_programs(0)):
        piece = item // row_tiles
        offs_t = (item % row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < count
        row = first + offs_t
        if listed is not None:
            row = tl.load(listed.index + row, mask=mask_t, other=0)
        begin = piece * tiles * BLOCK_V
        if store is not None:
            slot = piece % store.depth * store.parts + piece // store.depth
            any_hot = is_any_hot(row, mask_t, settings)
            record = empty_record(SUB, acc_dtype, look)
        source = source_of(row, settings, SHIFT)
        hidden = hidden_ptr + source.to(tl.int64)[:, None] * stride_hidden + offs_k[None, :]
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
            x = finish(x, offs_v, V, bias_ptr, softcap)
            if store is None:
                at = logits_ptr + offs_t.to(tl.int64)[None, :] * V + offs_v[:, None]
                tl.store(at, x, mask=mask_t[None, :] & (offs_v < V)[:, None])
            elif BLOCK_T == SUB:
                tile = tile_record(
                    *(
                        x,
                        start,
                        any_hot,
                        row,
                        mask_t,
                        settings,
                        None,
                        None,
                        V,
                        suppress,
                        record.best if SKIP else None,
                        look,
                    ),
                    PAIRS=True,
                    BLOCK_V=BLOCK_V,
                )
                record = merge(record, tile, look is not None)
            else:
                # Few columns at a time, and a record for every tile: those of all rows do not fit registers.
                groups = tl.reshape(x, (BLOCK_V, BLOCK_T // SUB, SUB))
                for group in range(BLOCK_T // SUB):
                    here = tl.arange(0, BLOCK_T // SUB)[None, :, None] == group
                    some = tl.sum(tl.where(here, groups, 0.0), axis=1)  # [BLOCK_V, SUB]
                    offs_s = (item % row_tiles) * BLOCK_T + group * SUB + tl.arange(0, SUB)
                    mask_s = offs_s < count
                    row_s = first + offs_s
                    if listed is not None:
                        row_s = tl.load(listed.index + first + offs_s, mask=mask_s, other=0)
                    tile = tile_record(
                        *(some, start, any_hot, row_s, mask_s, settings, None, None, V, suppress, None, look),
                        PAIRS=True,
                        BLOCK_V=BLOCK_V,
                    )
                    write_record(store, first + offs_s, mask_s, slot, tile, look is not None)
        if store is not None and BLOCK_T == SUB:
            write_record(store, first + offs_t, mask_t, slot, record, look is not None)
