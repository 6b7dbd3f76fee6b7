"""The kernels of `ssd_chunk`: what each span of tokens adds to the state, then the outputs.

A tile is up to 64 tokens of one chunk, a span several tiles that one program walks with the state in registers.
"""

import triton
import triton.language as tl

from ..runtime.lang import at_slot, decay, programmatic_launch, row_count
from .lang import decays_to_end, grow, log_decays, narrow_times_wide, pair_weights, wide_times_narrow, within


@triton.jit
def tokens_of(tile, chunk_size, chunk_tiles, L, entering, BLOCK_T: tl.constexpr):
    """A tile's first token, how many it has, and how many of them enter the state, or less than none."""
    chunk = tile // chunk_tiles * chunk_size
    start = chunk + tile % chunk_tiles * BLOCK_T
    count = tl.minimum(tl.minimum(chunk + chunk_size, L) - start, BLOCK_T)
    return start, count, tl.minimum(count, entering - start)


@triton.jit(do_not_specialize=["L", "chunk_size", "chunk_tiles", "tiles"])
def _chunk_steps_kernel(
    dt_ptr,  # [b, L, H]
    A_ptr,  # [H], as dt_bias
    bias_ptr,
    counts_ptr,  # [b]; None: all L
    resets_ptr,  # [b * L]; None: no sequence starts
    steps_ptr,  # [b, H, tiles, BLOCK_T], as what follows: time steps, 0 where there is no token
    high_ptr,  # sums of log-decays from the tile's first token on, in two numbers
    low_ptr,
    seen_ptr,  # how much of the state before the tile each token sees
    kept_ptr,  # how much of it the tile's last token still has, times the step
    whole_ptr,  # [b, H, tiles]: the log-decay over the tile
    stride_dtb,
    stride_dtl,
    stride_dth,
    L,
    H,
    chunk_size,
    chunk_tiles,
    tiles,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    programmatic_launch()
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, BLOCK_T)
    mask_h = head < H
    A = tl.load(A_ptr + head, mask=mask_h, other=0.0).to(steps_ptr.dtype.element_ty)
    bias = tl.load(bias_ptr + head, mask=mask_h, other=0.0).to(steps_ptr.dtype.element_ty)
    entering = row_count(counts_ptr, b, L)
    start, count, known = tokens_of(tile, chunk_size, chunk_tiles, L, entering, BLOCK_T)
    at = dt_ptr + b * stride_dtb + head.to(tl.int64)[None, :] * stride_dth
    at += (start + t).to(tl.int64)[:, None] * stride_dtl
    at_r = resets_ptr
    at_next = resets_ptr
    if resets_ptr is not None:
        at_r = resets_ptr + (b * L + start + t)[:, None]
        at_next = at_r + 1
    is_known, inside = (t < known)[:, None] & mask_h[None, :], (t < count)[:, None]
    dt, a = log_decays(at, is_known, bias[None, :], A[None, :], at_r, inside, LOW, HIGH)  # [BLOCK_T, BLOCK_H]
    is_known, inside = (t + 1 < known)[:, None] & mask_h[None, :], (t + 1 < count)[:, None]
    _, after = log_decays(at + stride_dtl, is_known, bias[None, :], A[None, :], at_next, inside, LOW, HIGH)
    at = (b * H + head) * tiles + tile
    tl.store(whole_ptr + at, tl.sum(a, axis=0), mask=mask_h)
    out = at[None, :] * BLOCK_T + t[:, None]
    tl.store(steps_ptr + out, dt, mask=mask_h[None, :])
    # In 48 bits: differences of these are as good as sums of the terms between, whatever cancels.
    total = tl.cumsum(a.to(tl.float64), axis=0)
    high = total.to(dt.dtype)
    tl.store(high_ptr + out, high, mask=mask_h[None, :])
    tl.store(low_ptr + out, (total - high.to(tl.float64)).to(dt.dtype), mask=mask_h[None, :])
    tl.store(seen_ptr + out, decay(high), mask=mask_h[None, :])
    tl.store(kept_ptr + out, decays_to_end(after) * dt, mask=mask_h[None, :])


@triton.jit(do_not_specialize=["L", "chunk_size", "chunk_tiles", "tiles", "spans", "span_tiles"])
def _chunk_states_kernel(
    x_ptr,  # [b, L, H, P]
    B_ptr,  # [b, L, G, N]
    kept_ptr,  # [b, H, tiles, BLOCK_T]
    whole_ptr,  # [b, H, tiles]
    counts_ptr,  # [b]; None: all L
    added_ptr,  # [b, spans, H, P, N]: what a span adds to the state, for all but the last
    passed_ptr,  # [b, spans, H]: how much it leaves of what was there
    stride_xb,
    stride_xl: tl.constexpr,  # rows of a tile are constants apart, as those of B and C
    stride_xh,
    stride_Bb,
    stride_Bl: tl.constexpr,
    stride_Bg,
    L,
    H,
    R,  # heads of a group
    chunk_size,
    chunk_tiles,
    tiles,
    spans,
    span_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    programmatic_launch()
    # Heads lie side by side: those of a group find its B in L2.
    head = tl.program_id(0) % H
    span = tl.program_id(0) // H % spans
    b = (tl.program_id(0) // H // spans).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    mask_p, mask_n = within(offs_p, P, BLOCK_P), offs_n < N
    entering = row_count(counts_ptr, b, L)
    t = tl.arange(0, BLOCK_T)
    offs_x = t[:, None] * stride_xl + offs_p[None, :]  # [BLOCK_T, BLOCK_P], from the tile's first token
    offs_B = t[:, None] * stride_Bl + offs_n[None, :]  # [BLOCK_T, BLOCK_N]
    at_x = x_ptr + b * stride_xb + head.to(tl.int64) * stride_xh
    at_B = B_ptr + b * stride_Bb + (head // R).to(tl.int64) * stride_Bg
    row_tiles = (b * H + head) * tiles
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=ACC)
    total = tl.sum(tl.zeros((BLOCK_T,), dtype=ACC), axis=0)
    first = span * span_tiles
    for tile in tl.range(first, tl.minimum(first + span_tiles, tiles), num_stages=STAGES, disable_licm=True):
        start, _, known = tokens_of(tile, chunk_size, chunk_tiles, L, entering, BLOCK_T)
        row = start.to(tl.int64)
        mask_t = (t < known)[:, None]
        x = tl.load(at_x + row * stride_xl + offs_x, mask=mask_t & mask_p[None, :], other=0.0)
        B = tl.load(at_B + row * stride_Bl + offs_B, mask=mask_t & mask_n[None, :], other=0.0)
        at_t = (row_tiles + tile) * BLOCK_T + t
        log = tl.load(whole_ptr + row_tiles + tile)
        total += log
        state = grow(state * decay(log), B, x, tl.load(kept_ptr + at_t), SPLIT, PRECISION)
    out = (b * spans + span) * H + head
    if tl.program_id(1) == 0:
        tl.store(passed_ptr + out, decay(total))
    out = added_ptr + (out * P + offs_p)[None, :] * N + offs_n[:, None]
    tl.store(out, state, mask=mask_p[None, :] & mask_n[:, None])


@triton.jit(do_not_specialize=["L", "chunk_size", "chunk_tiles", "tiles", "spans", "span_tiles"])
def _chunk_scan_kernel(
    x_ptr,  # [b, L, H, P]
    B_ptr,  # [b, L, G, N], as C
    C_ptr,
    D_ptr,  # [H]
    steps_ptr,  # [b, H, tiles, BLOCK_T], as high, low, seen and kept
    high_ptr,
    low_ptr,
    seen_ptr,
    kept_ptr,
    whole_ptr,  # [b, H, tiles]
    initial,  # Slots of [H, P, N], contiguous; none: zeros
    added_ptr,  # [b, spans - 1, H, P, N]: what the spans before add to it; None: there is one span
    passed_ptr,  # [b, spans - 1, H]: how much of it they leave
    counts_ptr,  # [b]; None: all L
    resets_ptr,  # [b * L]; None: no sequence starts
    y_ptr,  # [b, L, H, P], contiguous
    before_ptr,  # [b, chunks, H, P, N]; None: not wanted
    final,  # Slots of [H, P, N], contiguous, which other spans do not read; none: not wanted
    stride_xb,
    stride_xl: tl.constexpr,  # rows of a tile are constants apart, as those of B and C
    stride_xh,
    stride_Bb,
    stride_Bl: tl.constexpr,
    stride_Bg,
    stride_Cb,
    stride_Cl: tl.constexpr,
    stride_Cg,
    L,
    H,
    R,  # heads of a group
    chunk_size,
    chunk_tiles,
    tiles,
    spans,
    span_tiles,
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_U: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    programmatic_launch()
    head = tl.program_id(0) % H
    span = tl.program_id(0) // H % spans
    b = (tl.program_id(0) // H // spans).to(tl.int64)
    group = (head // R).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    mask_p, mask_n = within(offs_p, P, BLOCK_P), offs_n < N
    mask_s = mask_p[None, :] & mask_n[:, None]
    offs_s = offs_p[None, :] * N + offs_n[:, None]  # [BLOCK_N, BLOCK_P]
    D = tl.load(D_ptr + head).to(ACC)
    entering = row_count(counts_ptr, b, L)
    t = tl.arange(0, BLOCK_T)
    u = tl.arange(0, BLOCK_U)
    offs_y = t[:, None] * (H * P) + offs_p[None, :]  # [BLOCK_T, BLOCK_P], from the tile's first token
    offs_C = t[:, None] * stride_Cl + offs_n[None, :]  # [BLOCK_T, BLOCK_N]
    offs_x = u[:, None] * stride_xl + offs_p[None, :]  # [BLOCK_U, BLOCK_P]
    offs_B = u[:, None] * stride_Bl + offs_n[None, :]  # [BLOCK_U, BLOCK_N]
    at_x = x_ptr + b * stride_xb + head.to(tl.int64) * stride_xh
    at_y = y_ptr + (b * L * H + head) * P
    at_B = B_ptr + b * stride_Bb + group * stride_Bg
    at_C = C_ptr + b * stride_Cb + group * stride_Cg
    row_tiles = (b * H + head) * tiles
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=ACC)
    if initial.ptr is not None:
        state = tl.load(at_slot(initial, b) + head.to(tl.int64) * P * N + offs_s, mask=mask_s, other=0.0).to(ACC)
    if added_ptr is not None:
        for i in tl.range(0, span):  # a few, which many programs find in L2: sooner than a kernel of its own
            at = (b * (spans - 1) + i) * H + head
            added = tl.load(added_ptr + at * P * N + offs_s, mask=mask_s, other=0.0)
            state = state * tl.load(passed_ptr + at) + added
    if before_ptr is not None:  # noqa: SIM102 (known to the compiler, what follows is not)
        if span == 0:  # starts from a state or anew; other chunks' are written by who walks up to them
            tl.store(before_ptr + (b * (tiles // chunk_tiles) * H + head) * P * N + offs_s, state, mask=mask_s)
    first = span * span_tiles
    for tile in tl.range(first, tl.minimum(first + span_tiles, tiles), num_stages=STAGES, disable_licm=True):
        # Of x, dt and B, tokens that do not enter are not read.
        start, count, known = tokens_of(tile, chunk_size, chunk_tiles, L, entering, BLOCK_T)
        row = start.to(tl.int64)
        mask_y = (t < count)[:, None]
        C = tl.load(at_C + row * stride_Cl + offs_C, mask=mask_y & mask_n[None, :], other=0.0)
        at_t = (row_tiles + tile) * BLOCK_T
        y = tl.zeros((BLOCK_T, BLOCK_P), dtype=ACC)
        y = narrow_times_wide(C, state, y, 2, SPLIT, PRECISION) * tl.load(seen_ptr + at_t + t)[:, None]
        high, low = tl.load(high_ptr + at_t + t)[:, None], tl.load(low_ptr + at_t + t)[:, None]
        state *= decay(tl.load(whole_ptr + row_tiles + tile))
        for part in tl.static_range(0, BLOCK_T, BLOCK_U):  # of the tokens that are seen: registers hold no more
            mask_u = (part + u < known)[:, None]
            at_u = at_t + part + u
            x = tl.load(at_x + (row + part) * stride_xl + offs_x, mask=mask_u & mask_p[None, :], other=0.0)
            B = tl.load(at_B + (row + part) * stride_Bl + offs_B, mask=mask_u & mask_n[None, :], other=0.0)
            log = (high - tl.load(high_ptr + at_u)[None, :]) + (low - tl.load(low_ptr + at_u)[None, :])
            dt = tl.load(steps_ptr + at_u)[None, :]
            weights = pair_weights(C, B, dt, log, D, start, part, SPLIT, PRECISION)
            y = wide_times_narrow(weights, x, y, 2, SPLIT, PRECISION)  # [BLOCK_T, BLOCK_P]
            state = grow(state, B, x, tl.load(kept_ptr + at_u), SPLIT, PRECISION)
        tl.store(at_y + row * (H * P) + offs_y, y.to(y_ptr.dtype.element_ty), mask=mask_y & mask_p[None, :])
        if before_ptr is not None:  # noqa: SIM102 (known to the compiler, what follows is not)
            if ((tile + 1) % chunk_tiles == 0) & (tile + 1 < tiles):
                chunk, shown = tile // chunk_tiles, state
                if resets_ptr is not None:  # zeros where a sequence starts
                    following = b * L + (chunk + 1) * chunk_size
                    shown = tl.where(tl.load(resets_ptr + following) != 0, 0.0, state)
                at = (b * (tiles // chunk_tiles) + chunk + 1) * H + head
                tl.store(before_ptr + at * P * N + offs_s, shown, mask=mask_s)
    if final.ptr is not None:  # noqa: SIM102 (known to the compiler, what follows is not)
        if span == spans - 1:
            tl.store(at_slot(final, b) + head.to(tl.int64) * P * N + offs_s, state, mask=mask_s)
