"""The router at few tokens: product, choice and sorted lists in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, architecture, run, tuned
from .choice import choose, columns, sigmoid64, widen
from .tickets import SLOT, tickets

# ---- kernels ----


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
    ids_ptr, rank_ptr, counts_ptr, order_ptr, ends_ptr, T, E, tiles, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Sorted lists from every tile's counts and every pair's rank in its tile. Past the first cache: other programs
    have only just written them."""
    e = tl.arange(0, BLOCK_E)
    tile = tl.arange(0, BLOCK_TILES)[:, None]
    mask = (tile < tiles) & (e < E)[None, :]
    counts = tl.load(counts_ptr + tile * E + e[None, :], mask=mask, other=0, cache_modifier=".cg")
    total = tl.sum(counts, axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(ends_ptr + e, ends, mask=e < E)
    first = (ends - total)[None, :] + tl.cumsum(counts, axis=0) - counts  # [BLOCK_TILES, BLOCK_E]: a tile's first place
    pair = tl.arange(0, BLOCK_PAIRS)
    mask_pair = pair < T * TOP_K
    expert = tl.load(ids_ptr + pair, mask=mask_pair, other=0, cache_modifier=".cg").to(tl.int32)
    rank = tl.load(rank_ptr + pair, mask=mask_pair, other=0, cache_modifier=".cg")
    at = tl.where(mask_pair, pair // (BLOCK_T * TOP_K) * BLOCK_E + expert, 0)
    place = tl.gather(tl.reshape(first, (BLOCK_TILES * BLOCK_E,)), at, axis=0) + rank
    tl.store(order_ptr + place, pair.to(tl.int64), mask=mask_pair)


@triton.jit
def _route_few_kernel(
    x_ptr,  # [T, D]
    weight_ptr,  # [E, D]
    bias_ptr,  # [E]
    tickets_ptr,  # one for each tile and one for the tiles, 0 before and after
    partial_ptr,  # [SPLITS, T, E] fp64
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    ids_ptr,  # [T, K], as weights and chosen (the scores)
    weights_ptr,
    chosen_ptr,
    order_ptr,  # [T * K]
    ends_ptr,  # [E]
    stride_x,
    stride_w,
    T,
    E,
    D,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
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
    tl.debug_barrier()  # all of this program's stores come before its ticket
    if tl.atomic_add(tickets_ptr + tile, 1) == tl.num_programs(1) * SPLITS - 1:
        tl.store(tickets_ptr + tile, 0)
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        expert, real = columns(E, GROUPS, BLOCK_N, BLOCK_P)
        mask = (rows < T)[:, None, None] & real[None, :, :]
        part_ptrs = partial_ptr + rows[:, None, None] * E + expert[None, :, :]
        scores = tl.load(part_ptrs, mask=mask, other=0.0, cache_modifier=".cg")
        for s in tl.static_range(1, SPLITS):
            scores += tl.load(part_ptrs + s * T * E, mask=mask, other=0.0, cache_modifier=".cg")
        if SPLITS > 1:
            scores = sigmoid64(scores)
        pair, paired, rank, counts = choose(
            scores, bias_ptr, rows, ids_ptr, weights_ptr, chosen_ptr, T, E, TOP_K, GROUPS, TOPK_GROUP, NORM, SCALE,
            BLOCK_N,
        )  # fmt: skip
        if ONE_TILE:
            ends = tl.reshape(tl.cumsum(tl.reshape(counts, (BLOCK_P,)), axis=0), counts.shape)
            tl.store(ends_ptr + expert, ends, mask=real)
            tl.store(order_ptr + (ends - counts)[None, :, :] + rank, pair.to(tl.int64), mask=paired)
        else:
            tl.store(rank_ptr + pair, rank, mask=paired)
            tl.store(counts_ptr + tile * E + expert, counts, mask=real)
            tl.debug_barrier()
            if tl.atomic_add(tickets_ptr + tiles, 1) == tiles - 1:
                tl.store(tickets_ptr + tiles, 0)
                _sort_pairs(
                    ids_ptr, rank_ptr, counts_ptr, order_ptr, ends_ptr, T, E, tiles, TOP_K, BLOCK_T,
                    BLOCK_P, BLOCK_TILES, BLOCK_PAIRS,
                )  # fmt: skip


# ---- launches ----


def tile_rows(T: int, columns: int) -> int:
    """Tokens whose experts one program chooses: 2048 scores, their keys and rounds fit the registers of 8 warps."""
    return min(triton.next_power_of_2(max(T, 1)), 16, max(2048 // columns, 1))


def is_few(T: int, K: int, columns: int) -> bool:
    """One program can sort 3072 pairs, and the product of 512 tokens is worth some 10 us of the whole GPU, beside which
    one program's sorting is cheaper than two more launches. It keeps where the pairs of each tile and expert begin in
    shared memory, 128 KiB of them at most."""
    tiles = triton.cdiv(T, tile_rows(T, columns))
    fits = 4 * triton.next_power_of_2(tiles) * columns <= 128 * 1024
    return T <= 512 and T * K <= 3072 and tiles < SLOT and fits


def route_few_launch(T: int, E: int, D: int, *, columns: int) -> Launch:
    """Tiles of 16 experts, as many as a tensor core takes: wider ones read and widen x less often, but leave half of a
    GPU idle up to 256 tokens. D is split until there is a program for each multiprocessor of a large GPU, about 128,
    in 4 parts at most: who adds them reads 8 bytes for each score of each part, and beyond 4 that takes longer than the
    product saves."""
    rows = tile_rows(T, columns)
    programs = triton.cdiv(T, rows) * triton.cdiv(E, 16)
    splits = max(1, min(128 // programs, 4 if rows > 8 else 8, triton.cdiv(D, 256)))
    # A warp takes 32 columns at a time, eight warps 256: each reads whole 64-byte lines of 16-bit rows. Of more than
    # 128 experts eight warps spill a register or two of the choice, whatever its tile; four do not.
    warps = 8 if columns <= 128 else 4
    return Launch(BLOCK_T=rows, BLOCK_E=16, BLOCK_D=32, SLICES=8, SPLITS=splits, num_warps=warps, num_stages=3)


def route_few(
    x: Tensor, weight: Tensor, bias: Tensor, K: int, groups: int, kept: int, norm: bool, scale: float,
    outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """64 tokens, E=128, D=2688: 1.7 MB read, 8.3 MB from the L2 cache, 45 MFLOP of fp64: 0.4, 1.5 and 0.7 us, the last
    two at once. Launch and first reads (2 us), two tickets and K rounds of a maximum (1 us each): 7 us expected."""
    (T, D), E = x.shape, len(weight)
    ids, weights, order, ends, chosen = outputs
    block_n = triton.next_power_of_2(E // groups)
    block_p = block_n * triton.next_power_of_2(groups)
    launch = tuned(
        "_route_few_kernel",
        route_few_launch(T, E, D, columns=block_p),
        architecture(x),
        T=triton.next_power_of_2(T),
        E=E,
        D=D,
    )
    tiles = triton.cdiv(T, launch.BLOCK_T)
    partial = x.new_empty(launch.SPLITS, T, E, dtype=torch.float64)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    run(
        _route_few_kernel,
        (tiles, triton.cdiv(E, launch.BLOCK_E), launch.SPLITS),
        *(x, weight, bias, tickets(x), partial, counts, rank, ids, weights, chosen, order, ends),
        *(x.stride(0), weight.stride(0), T, E, D),
        **dict(TOP_K=K, GROUPS=groups, TOPK_GROUP=kept, NORM=norm, SCALE=scale, ONE_TILE=tiles == 1),
        **dict(BLOCK_N=block_n, BLOCK_P=block_p),
        BLOCK_TILES=triton.next_power_of_2(tiles),
        BLOCK_PAIRS=triton.next_power_of_2(T * K),
        launch=launch,
    )
