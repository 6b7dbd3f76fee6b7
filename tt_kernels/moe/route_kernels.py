"""Inside the router's kernels: products in fp64, the choice of a tile of tokens, places in the sorted lists.

Scores of a tile lie in BLOCK_P columns, BLOCK_N (a power of two) for each group of experts: column g * BLOCK_N + n is
expert g * (E / GROUPS) + n, so that columns ascend as experts do. A tile of R tokens has the shape [R, H, C], C at most
64 and H * C = BLOCK_P: a warp loads 64 scores at a time, 16 bytes a lane, and Triton then gives it the token's next 64
(of [R, BLOCK_P] another warp has them, and the two meet at a barrier in every round of the choice).
"""

import triton
import triton.language as tl

from ..runtime.launch import INTERPRET

_INTERPRET = tl.constexpr(INTERPRET)

_TAKEN = tl.constexpr(-(2**63))  # below the key of any number

_NAN = tl.constexpr(2**63 - 1)  # above it

_NONE = tl.constexpr(2**31 - 1)


@triton.jit
def widen(x):
    """x in fp64. From 16 bits in assembly: Triton 3.6 lays the fp64 operands of a dot out by the width that they were
    loaded with, which it cannot do at 16 bits, and looks through any conversion that it understands."""
    if _INTERPRET or x.dtype.primitive_bitwidth > 16:
        return x.to(tl.float64)
    return tl.inline_asm_elementwise(
        "cvt.f64.f32 $0, $1;", "=d,f", [x.to(tl.float32)], dtype=tl.float64, is_pure=False, pack=1
    )


@triton.jit
def sigmoid64(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def columns(E, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """The experts of the columns, and which columns have one: [H, C] each."""
    C: tl.constexpr = min(BLOCK_P, 64)
    p = tl.arange(0, BLOCK_P // C)[:, None] * C + tl.arange(0, C)[None, :]
    size = E // GROUPS
    return p // BLOCK_N * size + p % BLOCK_N, (p // BLOCK_N < GROUPS) & (p % BLOCK_N < size)


@triton.jit
def ordered(x):
    """fp64 as int64 of the same order, NaN above all: what is taken can then be told from every number."""
    bits = x.to(tl.int64, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return tl.where(x != x, _NAN, bits)


@triton.jit
def best(keys, NUMBER: tl.constexpr):
    """For each of keys [R, H, C] the round that takes it when each token's largest is taken NUMBER times, or -1; of
    equal ones the first is taken. By halves: a warp finds the largest 32-bit number in one instruction."""
    H: tl.constexpr = keys.shape[1]
    C: tl.constexpr = keys.shape[2]
    p = tl.arange(0, H)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    high = (keys >> 32).to(tl.int32)
    low = ((keys & 0xFFFFFFFF) - 0x80000000).to(tl.int32)  # in the order of unsigned numbers
    taken = tl.full(keys.shape, -1, dtype=tl.int32)
    for k in range(NUMBER):
        top = high == tl.max(tl.max(high, axis=1), axis=1)[:, None, None]
        below = tl.where(top, low, -0x80000000)
        top = top & (low == tl.max(tl.max(below, axis=1), axis=1)[:, None, None])
        first = tl.min(tl.min(tl.where(top, p, _NONE), axis=1), axis=1)
        now = p == first[:, None, None]
        taken = tl.where(now, k, taken)
        high = tl.where(now, -0x80000000, high)
        low = tl.where(now, -0x80000000, low)
    return taken


@triton.jit
def within_groups(biased, GROUPS: tl.constexpr, TOPK_GROUP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Biased scores [R, H, C], -inf where there is no expert, with 0 outside the groups whose two best sum highest, but
    for what is -inf."""
    R: tl.constexpr = biased.shape[0]
    H: tl.constexpr = biased.shape[1]
    C: tl.constexpr = biased.shape[2]
    BLOCK_G: tl.constexpr = H * C // BLOCK_N
    grouped = tl.reshape(biased, (R, BLOCK_G, BLOCK_N))
    n = tl.arange(0, BLOCK_N)[None, None, :]
    broken = grouped != grouped  # a maximum would lose it
    numbers = tl.where(broken, -float("inf"), grouped)
    first, at = tl.max(numbers, axis=2, return_indices=True, return_indices_tie_break_left=True)  # [R, BLOCK_G]
    second = tl.max(tl.where(n == at[:, :, None], -float("inf"), numbers), axis=2)
    keys = tl.where(tl.max(broken.to(tl.int32), axis=2) > 0, _NAN, ordered(first + second))
    keys = tl.where(tl.arange(0, BLOCK_G)[None, :] < GROUPS, keys, _TAKEN)
    kept = best(keys[:, None, :], TOPK_GROUP) >= 0
    stays = tl.reshape(kept, (R, BLOCK_G, 1)) | (grouped == -float("inf"))
    return tl.reshape(tl.where(stays, grouped, 0.0), (R, H, C))


@triton.jit
def bias_of(bias_ptr, E, CHOICE: tl.constexpr):
    """The bias of each column: [H, C]."""
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    return tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float64)


@triton.jit
def choose(
    scores,  # [R, H, C] fp64
    bias,  # [H, C] fp64
    rows,  # [R]: the tokens
    out,  # Outputs
    T,
    E,
    CHOICE: tl.constexpr,
):
    """Choose a tile's experts and write them, their weights and their scores.

    Returns, [R, H, C] each: the pair t * K + k of a token and an expert, whether there is one, and how many of the
    tile's earlier tokens chose the same expert; [H, C]: how many did in all."""
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    biased = scores + bias[None, :, :]
    if CHOICE.GROUPS > 1:
        masked = tl.where(real[None, :, :], biased, -float("inf"))
        biased = within_groups(masked, CHOICE.GROUPS, CHOICE.TOPK_GROUP, CHOICE.BLOCK_N)
    k = best(tl.where(real[None, :, :], ordered(biased), _TAKEN), CHOICE.TOP_K)
    paired = (k >= 0) & (rows < T)[:, None, None]
    pair = rows[:, None, None] * CHOICE.TOP_K + k
    weights = scores * CHOICE.SCALE
    if CHOICE.NORM:
        total = tl.sum(tl.sum(tl.where(k >= 0, scores, 0.0), axis=1), axis=1)
        weights *= (1 / (total + 1e-20))[:, None, None]
    tl.store(out.topk_ids + pair, tl.broadcast_to(expert[None, :, :], pair.shape).to(tl.int64), mask=paired)
    tl.store(out.topk_weights + pair, weights.to(out.topk_weights.dtype.element_ty), mask=paired)
    tl.store(out.chosen + pair, scores, mask=paired)
    ones = paired.to(tl.int32)
    return pair, paired, tl.cumsum(ones, axis=0) - ones, tl.sum(ones, axis=0)


@triton.jit
def _split_product(
    x_ptr, weight_ptr, stride_x, stride_w, t, mask_t, e, mask_e, start, end, D, SLICES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """weight x^T over start <= d < end, each warp a slice of every SLICES * BLOCK_D columns: [experts, tokens] fp64.

    Experts are the rows: Hopper's fp64 tensor cores take 16 rows and 8 columns, and there may be one token."""
    d = tl.arange(0, SLICES)[:, None, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    x_ptrs = x_ptr + t.to(tl.int64)[None, :, None] * stride_x + d
    w_ptrs = weight_ptr + e.to(tl.int64)[None, :, None] * stride_w + d
    acc = tl.zeros((SLICES, e.shape[0], t.shape[0]), dtype=tl.float64)
    for offset in range(start, end, SLICES * BLOCK_D):
        mask_d = offset + d < D
        x = tl.load(x_ptrs + offset, mask=mask_t[None, :, None] & mask_d, other=0.0)
        w = tl.load(w_ptrs + offset, mask=mask_e[None, :, None] & mask_d, other=0.0)
        acc = tl.dot(widen(w), tl.permute(widen(x), (0, 2, 1)), acc, out_dtype=tl.float64)
    return tl.sum(acc, axis=0)


@triton.jit
def _sort_pairs(
    out, rank_ptr, counts_ptr, T, E, tiles, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Sorted lists from every tile's counts and every pair's rank in its tile. Past the first cache: other programs
    have only just written them."""
    e = tl.arange(0, BLOCK_E)
    tile = tl.arange(0, BLOCK_TILES)[:, None]
    mask = (tile < tiles) & (e < E)[None, :]
    counts = tl.load(counts_ptr + tile * E + e[None, :], mask=mask, other=0, cache_modifier=".cg")
    total = tl.sum(counts, axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(out.offsets + e, ends, mask=e < E)
    first = (ends - total)[None, :] + tl.cumsum(counts, axis=0) - counts  # [BLOCK_TILES, BLOCK_E]: a tile's first place
    pair = tl.arange(0, BLOCK_PAIRS)
    mask_pair = pair < T * TOP_K
    expert = tl.load(out.topk_ids + pair, mask=mask_pair, other=0, cache_modifier=".cg").to(tl.int32)
    rank = tl.load(rank_ptr + pair, mask=mask_pair, other=0, cache_modifier=".cg")
    at = tl.where(mask_pair, pair // (BLOCK_T * TOP_K) * BLOCK_E + expert, 0)
    place = tl.gather(tl.reshape(first, (BLOCK_TILES * BLOCK_E,)), at, axis=0) + rank
    tl.store(out.sorted_pairs + place, pair.to(tl.int64), mask=mask_pair)


@triton.jit
def _route_few_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [E, D]
    bias_ptr,  # [E]
    tickets_ptr,  # one for each tile and one for the tiles, 0 before and after
    partial_ptr,  # [SPLITS, T, E] fp64
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    out,  # Outputs
    stride_x,
    stride_w,
    T,
    E,
    D,
    CHOICE: tl.constexpr,  # Choice
    ONE_TILE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    tile, split, tiles = tl.program_id(0), tl.program_id(2), tl.num_programs(0)
    # The tensor cores take 8 tokens at least.
    r = tl.arange(0, BLOCK_T if BLOCK_T > 8 else 8)
    t = tile * BLOCK_T + r
    mask_t = (r < BLOCK_T) & (t < T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    depth = tl.cdiv(tl.cdiv(D, SLICES * BLOCK_D), SPLITS) * SLICES * BLOCK_D
    start, end = split * depth, min((split + 1) * depth, D)
    part = _split_product(x_ptr, weight_ptr, stride_x, stride_w, t, mask_t, e, e < E, start, end, D, SLICES, BLOCK_D)
    if SPLITS == 1:
        part = sigmoid64(part)  # here, where all programs share it
    tl.store(partial_ptr + (split * T + t)[None, :] * E + e[:, None], part, mask=mask_t[None, :] & (e < E)[:, None])
    bias = bias_of(bias_ptr, E, CHOICE)  # here: the program that comes last need not wait for it
    tl.debug_barrier()  # all of this program's stores come before its ticket
    if tl.atomic_add(tickets_ptr + tile, 1) == tl.num_programs(1) * SPLITS - 1:
        tl.store(tickets_ptr + tile, 0)
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
        mask = (rows < T)[:, None, None] & real[None, :, :]
        part_ptrs = partial_ptr + rows[:, None, None] * E + expert[None, :, :]
        scores = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        for s in tl.static_range(1, SPLITS):
            scores += tl.load(part_ptrs + s * T * E, mask=mask, other=0.0, cache_modifier=".cg")
        if SPLITS > 1:
            scores = sigmoid64(scores)
        pair, paired, rank, counts = choose(scores, bias, rows, out, T, E, CHOICE)
        if ONE_TILE:
            ends = tl.reshape(tl.cumsum(tl.reshape(counts, (CHOICE.BLOCK_P,)), axis=0), counts.shape)
            tl.store(out.offsets + expert, ends, mask=real)
            tl.store(out.sorted_pairs + (ends - counts)[None, :, :] + rank, pair.to(tl.int64), mask=paired)
        else:
            tl.store(rank_ptr + pair, rank, mask=paired)
            tl.store(counts_ptr + tile * E + expert, counts, mask=real)
            tl.debug_barrier()
            if tl.atomic_add(tickets_ptr + tiles, 1) == tiles - 1:
                tl.store(tickets_ptr + tiles, 0)
                _sort_pairs(
                    *(out, rank_ptr, counts_ptr, T, E, tiles),
                    *(CHOICE.TOP_K, BLOCK_T, CHOICE.BLOCK_P, BLOCK_TILES, BLOCK_PAIRS),
                )


@triton.jit
def _route_scores_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [E, D]
    scores_ptr,  # [T, E] fp64
    stride_x,
    stride_w,
    T,
    E,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * stride_x + d[None, :]
    w_ptrs = weight_ptr + e.to(tl.int64)[:, None] * stride_w + d[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float64)
    for offset in range(0, D, BLOCK_D):
        mask_d = (offset + d < D)[None, :]
        x = tl.load(x_ptrs + offset, mask=(rows < T)[:, None] & mask_d, other=0.0)
        w = tl.load(w_ptrs + offset, mask=(e < E)[:, None] & mask_d, other=0.0)
        acc = tl.dot(widen(x), tl.trans(widen(w)), acc, out_dtype=tl.float64)
    mask = (rows < T)[:, None] & (e < E)[None, :]
    tl.store(scores_ptr + rows.to(tl.int64)[:, None] * E + e[None, :], sigmoid64(acc), mask=mask)


@triton.jit
def _route_choose_kernel(
    scores_ptr,  # [T, E] fp64
    bias_ptr,  # [E]
    out,  # Outputs
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    T,
    E,
    CHOICE: tl.constexpr,  # Choice
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    mask = (rows < T)[:, None, None] & real[None, :, :]
    scores = tl.load(scores_ptr + rows[:, None, None] * E + expert[None, :, :], mask=mask, other=0.0)
    pair, paired, rank, counts = choose(scores, bias_of(bias_ptr, E, CHOICE), rows, out, T, E, CHOICE)
    tl.store(rank_ptr + pair, rank, mask=paired)
    tl.store(counts_ptr + tile * E + expert, counts, mask=real)


@triton.jit
def _route_scan_kernel(
    counts_ptr,  # [tiles, E]: becomes the pairs of the same expert in the tiles before
    total_ptr,  # [E]
    tiles,
    E,
    BLOCK_TILES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    before = tl.zeros((BLOCK_E,), dtype=tl.int32)
    for first in range(0, tiles, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & (e < E)[None, :]
        ptrs = counts_ptr + tile.to(tl.int64)[:, None] * E + e[None, :]
        counts = tl.load(ptrs, mask=mask, other=0)
        tl.store(ptrs, before[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        before += tl.sum(counts, axis=0)
    tl.store(total_ptr + e, before, mask=e < E)


@triton.jit
def _route_scatter_kernel(
    out,  # Outputs
    rank_ptr,  # [T, K]
    before_ptr,  # [tiles, E]
    total_ptr,  # [E]
    pairs,
    per_tile,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    total = tl.load(total_ptr + e, mask=e < E, other=0)
    ends = tl.cumsum(total, axis=0)
    if tl.program_id(0) == 0:
        tl.store(out.offsets + e, ends, mask=e < E)
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    mask = pair < pairs
    expert = tl.load(out.topk_ids + pair, mask=mask, other=0)
    rank = tl.load(rank_ptr + pair, mask=mask, other=0)
    before = tl.load(before_ptr + pair // per_tile * E + expert, mask=mask, other=0)
    place = tl.gather(ends - total, expert.to(tl.int32), axis=0) + before + rank
    tl.store(out.sorted_pairs + place, pair, mask=mask)
