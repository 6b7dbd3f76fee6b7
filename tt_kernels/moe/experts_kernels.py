"""Forward of the experts: rows times up with the activation, times down, and the sum over a token's experts."""

import triton
import triton.language as tl

from .lang import activate, end_of, find_tile, pairs_of, product

# The shared expert is more tiles of the same grids. A tile picks its operands, descriptors too, and then there is one
# loop: two would hold shared memory for both.


@triton.jit
def _pick_tile(i, tiles_ptr, shared_tiles, T, n_tiles, m_tiles, SHARED: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tile i: (whether it is the shared expert's, expert or -1, first row, end of its rows, tile of N).

    The shared expert's come first: no list to wait for, and where it is the wider one they take the longest."""
    if SHARED:
        shared = i < shared_tiles
        if shared:
            expert, first, end = find_tile(tiles_ptr, i // m_tiles, T, True, BLOCK_T)
            n = i % m_tiles
        else:
            expert, first, end = find_tile(tiles_ptr, (i - shared_tiles) // n_tiles, T, False, BLOCK_T)
            n = (i - shared_tiles) % n_tiles
    else:
        shared = False
        expert, first, end = find_tile(tiles_ptr, i // n_tiles, T, False, BLOCK_T)
        n = i % n_tiles
    return shared, expert, first, end, n


@triton.jit
def _up_tile(
    x,
    up,
    gate,
    h_ptr,
    shared_x,
    shared_up,
    shared_gate,
    shared_h_ptr,
    order_ptr,
    tile,
    sizes,
    SORTED: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    RELU2: tl.constexpr,
    MODE: tl.constexpr,
):
    shared, expert, first, end, n = tile
    R, top_k, D, N, M = sizes
    SWAP: tl.constexpr = MODE[3]
    BLOCK_T: tl.constexpr = MODE[4]
    BLOCK_N: tl.constexpr = MODE[5]
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    mask_t = rows < end
    at = rows
    if not SORTED:  # the pairs' tokens
        pair = pairs_of(order_ptr, rows, mask_t & (not shared) if SHARED else mask_t, R)
        at = (pair.to(tl.int32) // top_k).to(tl.int64)
    if SHARED:
        if not SORTED:
            at = tl.where(shared, rows, at)
        N = tl.where(shared, M, N)
        if shared:
            x = shared_x
            up = shared_up
            h_ptr = shared_h_ptr
            if GATED:
                gate = shared_gate
    acc = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    zeros = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), dtype=acc)
    n0 = n * BLOCK_N
    h, g = product(zeros, zeros, x, up, gate, at, mask_t, first, expert * N, n0, N, D, GATED, MODE)
    if GATED:
        h *= activate(g, RELU2)
    else:
        h = activate(h, RELU2)
    if SWAP:
        h = tl.trans(h)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    to = h_ptr + rows[:, None] * N + offs_n[None, :]  # [BLOCK_T, BLOCK_N]
    tl.store(to, h.to(h_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_n < N)[None, :])


@triton.jit
def _experts_up_kernel(
    x,  # [T, D] pointer; where A_TMA a descriptor of [R, D], rows in sorted order
    up,  # [E * N, D], pointer or descriptor, as gate
    gate,
    h_ptr,  # [R, N] in sorted order
    shared_x,  # [T, D], pointer or descriptor
    shared_up,  # [M, D], as shared_gate
    shared_gate,
    shared_h_ptr,  # [T, M]
    order_ptr,  # [R] int64: pairs t * top_k + k
    tiles_ptr,
    T,
    top_k,
    D,
    N,
    M,
    shared_tiles,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    RELU2: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    SORTED: tl.constexpr,  # x is gathered: a row a pair
    SWAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    MODE: tl.constexpr = (A_TMA, W_TMA, False, SWAP, BLOCK_T, BLOCK_N, BLOCK_K)
    n_tiles = tl.cdiv(N, BLOCK_N)
    m_tiles = tl.cdiv(M, BLOCK_N)
    sizes = (T * top_k, top_k, D, N, M)
    if PERSISTENT:
        count = shared_tiles + tl.load(tiles_ptr).to(tl.int32) * n_tiles
        for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            tile = _pick_tile(i, tiles_ptr, shared_tiles, T, n_tiles, m_tiles, SHARED, BLOCK_T)
            _up_tile(
                *(x, up, gate, h_ptr, shared_x, shared_up, shared_gate, shared_h_ptr, order_ptr, tile, sizes),
                *(SORTED, SHARED, GATED, RELU2, MODE),
            )
    else:
        tile = _pick_tile(tl.program_id(0), tiles_ptr, shared_tiles, T, n_tiles, m_tiles, SHARED, BLOCK_T)
        if tile[1] >= 0:
            _up_tile(
                *(x, up, gate, h_ptr, shared_x, shared_up, shared_gate, shared_h_ptr, order_ptr, tile, sizes),
                *(SORTED, SHARED, GATED, RELU2, MODE),
            )


@triton.jit
def _down_tile(
    h,
    h2,
    down,
    down2,
    y_ptr,
    shared_h,
    shared_h2,
    shared_down,
    shared_down2,
    shared_y_ptr,
    order_ptr,
    tile,
    sizes,
    SHARED: tl.constexpr,
    TWO: tl.constexpr,
    MODE: tl.constexpr,
):
    shared, expert, first, end, d = tile
    R, N, D, M = sizes
    TRANSPOSED: tl.constexpr = MODE[2]
    SWAP: tl.constexpr = MODE[3]
    BLOCK_T: tl.constexpr = MODE[4]
    BLOCK_D: tl.constexpr = MODE[5]
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    mask_t = rows < end
    if SHARED:
        N = tl.where(shared, M, N)
        if shared:
            h = shared_h
            down = shared_down
            y_ptr = shared_y_ptr
            if TWO:
                h2 = shared_h2
                down2 = shared_down2
    acc = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    y = tl.zeros((BLOCK_D, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_D), dtype=acc)
    row = expert * (N if TRANSPOSED else D)
    d0 = d * BLOCK_D
    y, _ = product(y, y, h, down, down, rows, mask_t, first, row, d0, D, N, False, MODE)
    if TWO:
        y, _ = product(y, y, h2, down2, down2, rows, mask_t, first, row, d0, D, N, False, MODE)
    if SWAP:
        y = tl.trans(y)
    at = pairs_of(order_ptr, rows, mask_t & (not shared) if SHARED else mask_t, R)
    if SHARED:
        at = tl.where(shared, rows, at)
    offs_d = d0 + tl.arange(0, BLOCK_D)
    to = y_ptr + at[:, None] * D + offs_d[None, :]  # [BLOCK_T, BLOCK_D], back in the tokens' order
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_d < D)[None, :])


@triton.jit
def _experts_down_kernel(
    h,  # [R, N] in sorted order: pointer, or descriptor where A_TMA; as h2
    h2,
    down,  # [E * D, N], pointer or descriptor, as down2; [E * N, D] where TRANSPOSED
    down2,
    y_ptr,  # [R, D]: pair t * top_k + k in its row
    shared_h,  # [T, M], as shared_h2
    shared_h2,
    shared_down,  # [D, M], as shared_down2; [M, D] where TRANSPOSED
    shared_down2,
    shared_y_ptr,  # [T, D]
    order_ptr,
    tiles_ptr,
    T,
    R,
    N,
    D,
    M,
    shared_tiles,
    SHARED: tl.constexpr,
    TWO: tl.constexpr,  # h2 down2 is added: the gate's part of a gradient
    TRANSPOSED: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    SWAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    MODE: tl.constexpr = (A_TMA, W_TMA, TRANSPOSED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K)
    d_tiles = tl.cdiv(D, BLOCK_N)
    sizes = (R, N, D, M)
    if PERSISTENT:
        count = shared_tiles + tl.load(tiles_ptr).to(tl.int32) * d_tiles
        for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            tile = _pick_tile(i, tiles_ptr, shared_tiles, T, d_tiles, d_tiles, SHARED, BLOCK_T)
            _down_tile(
                *(h, h2, down, down2, y_ptr, shared_h, shared_h2, shared_down, shared_down2, shared_y_ptr),
                *(order_ptr, tile, sizes, SHARED, TWO, MODE),
            )
    else:
        tile = _pick_tile(tl.program_id(0), tiles_ptr, shared_tiles, T, d_tiles, d_tiles, SHARED, BLOCK_T)
        if tile[1] >= 0:
            _down_tile(
                *(h, h2, down, down2, y_ptr, shared_h, shared_h2, shared_down, shared_down2, shared_y_ptr),
                *(order_ptr, tile, sizes, SHARED, TWO, MODE),
            )


@triton.jit
def _larger(start, end, other_start, other_end):
    return tl.maximum(start, other_start), tl.maximum(end, other_end)


@triton.jit
def _experts_schedule_kernel(
    ends_ptr,  # [E]: where each expert's rows end
    tiles_ptr,  # [1 + tiles] int64: the count, then expert << 41 | rows << 32 | first row, or -1
    R,
    E,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Cut every expert's rows into tiles of BLOCK_T; tiles of one expert follow each other."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    start, end = end_of(ends_ptr, offs_e - 1, mask_e & (offs_e > 0), R), end_of(ends_ptr, offs_e, mask_e, R)
    start, end = tl.associative_scan((start, end), 0, _larger)  # ends never fall, so there are at most `tiles` tiles
    count = tl.where(mask_e, (end - start + BLOCK_T - 1) // BLOCK_T, 0)
    last = tl.cumsum(count, 0)  # [BLOCK_E] tiles up to and with this expert
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    before = (last[None, :] <= tile[:, None]) & mask_e[None, :]  # [BLOCK_TILES, BLOCK_E]
    expert = tl.sum(before.to(tl.int32), axis=1)
    own = expert[:, None] == offs_e[None, :]
    first = tl.sum(tl.where(own, (start - (last - count) * BLOCK_T)[None, :], 0), axis=1) + tile * BLOCK_T
    until = tl.sum(tl.where(own, end[None, :], 0), axis=1)
    rows = tl.minimum(until - first, BLOCK_T).to(tl.int64)
    entry = (expert.to(tl.int64) << 41) | (rows << 32) | first.to(tl.int64)
    tl.store(tiles_ptr + 1 + tile, tl.where(expert < E, entry, -1), mask=tile < tiles)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _experts_combine_kernel(
    pairs_ptr,  # [T * K, D]
    ids_ptr,  # [T, K]: pairs of ids that are not 0 to E - 1 have not been written
    weights_ptr,  # [T, K], or None: 1
    shared_ptr,  # [T, D] or None
    y_ptr,  # [T, D]
    E,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y_t = sum_k weights[t, k] pairs[t, k] + shared_t, in the order of k. Pairs and shared_t have been rounded to the
    dtype of x, as in the reference; their sum is once more."""
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    acc = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    if WEIGHTED:
        acc = tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else acc
    y = tl.zeros((BLOCK_D,), dtype=acc)
    for k in tl.static_range(K):  # unrolled: all K rows are on their way at once
        expert = tl.load(ids_ptr + t * K + k)
        columns = tl.where(tl.where(expert < 0, E, expert) < E, D, 0)  # that this pair has
        pair = tl.load(pairs_ptr + (t * K + k) * D + offs_d, mask=offs_d < columns, other=0.0).to(acc)
        if WEIGHTED:
            pair *= tl.load(weights_ptr + t * K + k, mask=columns > 0, other=0.0).to(acc)
        y += pair
    if SHARED:
        y += tl.load(shared_ptr + t * D + offs_d, mask=mask, other=0.0).to(acc)
    tl.store(y_ptr + t * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)
