"""Forward of the experts: rows times up with the activation, times down, and the sum over a token's experts."""

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch, sum_of_pairs
from .lang import Operands, activate, end_of, find_tile, pairs_of, product, tall_tile

# The shared expert is more tiles of the same grids. A tile picks its operands, descriptors too, and then there is one
# loop: two would hold shared memory for both.


@triton.jit
def _pick_tile(
    i, tiles_ptr, R, sizes, n_tiles, m_tiles, SHARED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):  # fmt: skip
    """Tile i: (whether it is the shared expert's, expert or -1, first row, end of its rows, tile of N).

    The shared expert's come first: nothing to look for, and where it is the wider one they take the longest."""
    if SHARED:
        shared = i < (sizes.odd_tiles >> 1)
        if shared:
            expert, first, end = find_tile(tiles_ptr, i // m_tiles, (sizes.odd_T >> 1), True, BLOCK_T)
            n = i % m_tiles
        else:
            routed = i - (sizes.odd_tiles >> 1)
            expert, first, end = find_tile(
                tiles_ptr, routed // n_tiles, (sizes.odd_T >> 1), False, BLOCK_T, R, sizes.E, BLOCK_E
            )  # fmt: skip
            n = routed % n_tiles
    else:
        shared = False
        expert, first, end = find_tile(tiles_ptr, i // n_tiles, (sizes.odd_T >> 1), False, BLOCK_T, R, sizes.E, BLOCK_E)
        n = i % n_tiles
    return shared, expert, first, end, n


@triton.jit
def _up_tile(
    routed, shared, sorted_pairs_ptr, sizes, is_shared, expert, first, end, n, SHARED: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, SORTED: tl.constexpr, SWAP: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    D, N = sizes.D, sizes.N
    x, up, h_ptr = routed.a, routed.w, routed.out
    gate = up
    if GATED:
        gate = routed.w2
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    mask_t = rows < end
    at = rows
    if not SORTED:  # the pairs' tokens
        mask_pairs = mask_t
        if SHARED:
            mask_pairs = mask_t & (not is_shared)
        pair = pairs_of(sorted_pairs_ptr, rows, mask_pairs, (sizes.odd_T >> 1) * sizes.top_k)
        at = (pair.to(tl.int32) // sizes.top_k).to(tl.int64)
    if SHARED:
        if not SORTED:
            at = tl.where(is_shared, rows, at)
        N = tl.where(is_shared, sizes.M, N)
        if is_shared:
            x, up, h_ptr = shared.a, shared.w, shared.out
            if GATED:
                gate = shared.w2
    acc = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    zeros = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), dtype=acc)
    n0 = n * BLOCK_N
    h, g = product(
        *(zeros, zeros, x, up, gate, at, mask_t, first, expert * routed.step, n0, N, D),
        *(GATED, False, SWAP, BLOCK_N, BLOCK_K),
    )
    if GATED:
        a, _ = activate(g, ACTIVATION)
        h *= a
    else:
        h, _ = activate(h, ACTIVATION)
    if SWAP:
        h = tl.trans(h)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    to = h_ptr + rows[:, None] * N + offs_n[None, :]  # [BLOCK_T, BLOCK_N]
    tl.store(to, h.to(h_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_n < N)[None, :])


@triton.jit
def _experts_up_kernel(
    a,  # Operands: [R, D] in sorted order where SORTED, else x [T, D]
    w,  # up: each expert's [N, D], `step` rows apart; w2: gate
    w2,
    a2,
    out,  # [R, N]: h in sorted order
    step,
    shared_a,  # Operands of the shared expert: x [T, D]; None: there is none
    shared_w,  # [M, D]
    shared_w2,
    shared_a2,
    shared_out,  # [T, M]
    shared_step,
    sorted_pairs_ptr,  # [R] int64: pairs t * top_k + k
    tiles_ptr,  # the list; where BLOCK_E the offsets [E], in which a program searches for its tile
    sizes,  # Extents
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SORTED: tl.constexpr,
    SWAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    R = (sizes.odd_T >> 1) * sizes.top_k
    n_tiles, m_tiles = tl.cdiv(sizes.N, BLOCK_N), tl.cdiv(sizes.M, BLOCK_N)
    SHARED: tl.constexpr = shared_a is not None
    routed = Operands(a, w, w2, a2, out, step)
    shared = routed
    if SHARED:
        shared = Operands(shared_a, shared_w, shared_w2, shared_a2, shared_out, shared_step)
    if PERSISTENT:
        count = (sizes.odd_tiles >> 1) + tl.load(tiles_ptr).to(tl.int32) * n_tiles
        for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            is_shared, expert, first, end, n = _pick_tile(
                i, tiles_ptr, R, sizes, n_tiles, m_tiles, SHARED, BLOCK_T, BLOCK_E
            )
            _up_tile(
                *(routed, shared, sorted_pairs_ptr, sizes, is_shared, expert, first, end, n),
                *(SHARED, GATED, ACTIVATION, SORTED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K),
            )
    else:
        i = tl.program_id(0)
        is_shared, expert, first, end, n = _pick_tile(
            i, tiles_ptr, R, sizes, n_tiles, m_tiles, SHARED, BLOCK_T, BLOCK_E
        )
        if expert >= 0:
            if BLOCK_T & (BLOCK_T - 1):
                tl.static_assert(not (GATED or SORTED or SWAP))
                N = sizes.N
                if SHARED:
                    N = tl.where(is_shared, sizes.M, N)
                tall_tile(
                    *(routed, shared, sorted_pairs_ptr, is_shared, expert, first, end, n, N, sizes.D),
                    *(
                        (sizes.odd_T >> 1) * sizes.top_k,
                        sizes.top_k,
                        True,
                        SHARED,
                        ACTIVATION,
                        False,
                        BLOCK_T,
                        BLOCK_N,
                        BLOCK_K,
                    ),
                )
            else:
                _up_tile(
                    *(routed, shared, sorted_pairs_ptr, sizes, is_shared, expert, first, end, n),
                    *(SHARED, GATED, ACTIVATION, SORTED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K),
                )


@triton.jit
def _down_tile(
    routed, shared, sorted_pairs_ptr, R, sizes, is_shared, expert, first, end, d, SHARED: tl.constexpr,
    TWO: tl.constexpr, TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    D, N = sizes.D, sizes.N
    h, down, y_ptr = routed.a, routed.w, routed.out
    h2, down2 = h, down
    if TWO:
        h2, down2 = routed.a2, routed.w2
    rows = first.to(tl.int64) + tl.arange(0, BLOCK_T)
    mask_t = rows < end
    if SHARED:
        N = tl.where(is_shared, sizes.M, N)
        if is_shared:
            h, down, y_ptr = shared.a, shared.w, shared.out
            if TWO:
                h2, down2 = shared.a2, shared.w2
    acc = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    y = tl.zeros((BLOCK_N, BLOCK_T) if SWAP else (BLOCK_T, BLOCK_N), dtype=acc)
    row = expert * routed.step
    d0 = d * BLOCK_N
    y, _ = product(
        y, y, h, down, down, rows, mask_t, first, row, d0, D, N, False, TRANSPOSED, SWAP, BLOCK_N, BLOCK_K
    )  # fmt: skip
    if TWO:
        y, _ = product(
            y, y, h2, down2, down2, rows, mask_t, first, row, d0, D, N, False, TRANSPOSED, SWAP, BLOCK_N, BLOCK_K
        )
    if SWAP:
        y = tl.trans(y)
    mask_pairs = mask_t
    if SHARED:
        mask_pairs = mask_t & (not is_shared)
    at = pairs_of(sorted_pairs_ptr, rows, mask_pairs, R)
    if SHARED:
        at = tl.where(is_shared, rows, at)
    offs_d = d0 + tl.arange(0, BLOCK_N)
    to = y_ptr + at[:, None] * D + offs_d[None, :]  # [BLOCK_T, BLOCK_N], back in the tokens' order
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=mask_t[:, None] & (offs_d < D)[None, :])


@triton.jit(do_not_specialize=["R"])
def _experts_down_kernel(
    a,  # Operands: [R, N] in sorted order, as a2
    w,  # each expert's [D, N], or [N, D] where TRANSPOSED, `step` rows apart; as w2
    w2,
    a2,
    out,  # [R, D]: pair t * top_k + k in its row
    step,
    shared_a,  # Operands of the shared expert: [T, M], as shared_a2; None: there is none
    shared_w,  # [D, M] or [M, D], as shared_w2
    shared_w2,
    shared_a2,
    shared_out,  # [T, D]
    shared_step,
    sorted_pairs_ptr,
    tiles_ptr,  # the list; where BLOCK_E the offsets [E], in which a program searches for its tile
    R,
    sizes,  # Extents
    TWO: tl.constexpr,  # a2 w2 is added: the gate's part of a gradient
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    d_tiles = tl.cdiv(sizes.D, BLOCK_N)
    SHARED: tl.constexpr = shared_a is not None
    routed = Operands(a, w, w2, a2, out, step)
    shared = routed
    if SHARED:
        shared = Operands(shared_a, shared_w, shared_w2, shared_a2, shared_out, shared_step)
    if PERSISTENT:
        count = (sizes.odd_tiles >> 1) + tl.load(tiles_ptr).to(tl.int32) * d_tiles
        for i in tl.range(tl.program_id(0), count, tl.num_programs(0), flatten=True):
            is_shared, expert, first, end, d = _pick_tile(
                i, tiles_ptr, R, sizes, d_tiles, d_tiles, SHARED, BLOCK_T, BLOCK_E
            )
            _down_tile(
                *(routed, shared, sorted_pairs_ptr, R, sizes, is_shared, expert, first, end, d),
                *(SHARED, TWO, TRANSPOSED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K),
            )
    else:
        i = tl.program_id(0)
        is_shared, expert, first, end, d = _pick_tile(
            i, tiles_ptr, R, sizes, d_tiles, d_tiles, SHARED, BLOCK_T, BLOCK_E
        )
        if expert >= 0:
            if BLOCK_T & (BLOCK_T - 1):
                tl.static_assert(not (TWO or SWAP))
                N = sizes.N
                if SHARED:
                    N = tl.where(is_shared, sizes.M, N)
                tall_tile(
                    *(routed, shared, sorted_pairs_ptr, is_shared, expert, first, end, d, sizes.D, N, R, 1),
                    *(False, SHARED, None, TRANSPOSED, BLOCK_T, BLOCK_N, BLOCK_K),
                )
            else:
                _down_tile(
                    *(routed, shared, sorted_pairs_ptr, R, sizes, is_shared, expert, first, end, d),
                    *(SHARED, TWO, TRANSPOSED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K),
                )


@triton.jit
def _larger(start, end, other_start, other_end):
    return tl.maximum(start, other_start), tl.maximum(end, other_end)


@triton.jit(do_not_specialize=["R", "tiles"])
def _experts_schedule_kernel(
    offsets_ptr,  # [E]: where each expert's rows end
    tiles_ptr,  # [1 + tiles] int64: the count, then expert << 41 | rows << 32 | first row, or -1
    R,
    E,
    tiles,
    BLOCK_T: tl.constexpr,
    SPARE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Cut every expert's rows into tiles of BLOCK_T, the last of up to SPARE more; those of one expert follow each
    other."""
    programmatic_launch()
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    start, end = end_of(offsets_ptr, offs_e - 1, mask_e & (offs_e > 0), R), end_of(offsets_ptr, offs_e, mask_e, R)
    start, end = tl.associative_scan((start, end), 0, _larger)  # ends never fall, so there are at most `tiles` tiles
    count = (tl.maximum(end - start - SPARE, 1) + BLOCK_T - 1) // BLOCK_T
    count = tl.where(mask_e & (end > start), count, 0)
    last = tl.cumsum(count, 0)  # [BLOCK_E] tiles up to and with this expert
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    before = (last[None, :] <= tile[:, None]) & mask_e[None, :]  # [BLOCK_TILES, BLOCK_E]
    expert = tl.sum(before.to(tl.int32), axis=1)
    own = expert[:, None] == offs_e[None, :]
    first = tl.sum(tl.where(own, (start - (last - count) * BLOCK_T)[None, :], 0), axis=1) + tile * BLOCK_T
    until = tl.sum(tl.where(own, end[None, :], 0), axis=1)
    rows = tl.where(until - first <= BLOCK_T + SPARE, until - first, BLOCK_T).to(tl.int64)
    entry = (expert.to(tl.int64) << 41) | (rows << 32) | first.to(tl.int64)
    tl.store(tiles_ptr + 1 + tile, tl.where(expert < E, entry, -1), mask=tile < tiles)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def _experts_combine_kernel(
    pairs_ptr,  # [T * K, D]
    ids_ptr,  # [T, K]
    weights_ptr,  # [T, K], or None: 1
    shared_ptr,  # [T, D] or None
    shared_weight_ptr,  # [T], or None: 1
    y_ptr,  # [T, D]
    E,
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y_t = sum_k weights[t, k] pairs[t, k] + shared_weight_t shared_t, in the order of k. Pairs and shared_t have been
    rounded to the dtype of x, as in the reference; their sum is once more."""
    programmatic_launch()
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    acc = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    if weights_ptr is not None:
        acc = tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else acc
    if shared_weight_ptr is not None:
        acc = tl.float64 if shared_weight_ptr.dtype.element_ty == tl.float64 else acc
    y = sum_of_pairs(pairs_ptr, ids_ptr, weights_ptr, t, offs_d, E, D, K, acc)
    if shared_ptr is not None:
        shared = tl.load(shared_ptr + t * D + offs_d, mask=mask, other=0.0).to(acc)
        if shared_weight_ptr is not None:
            shared *= tl.load(shared_weight_ptr + t).to(acc)
        y += shared
    tl.store(y_ptr + t * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)
