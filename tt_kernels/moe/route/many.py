"""The router at many tokens: product, choice tile by tile, then a stable counting sort of the pairs by expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...launch import Launch, architecture, run, tuned
from .choice import choose, columns, sigmoid64, widen
from .few import tile_rows

# ---- kernels ----


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
    ids_ptr,  # [T, K], as weights and chosen (the scores)
    weights_ptr,
    chosen_ptr,
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    T,
    E,
    TOP_K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORM: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    expert, real = columns(E, GROUPS, BLOCK_N, BLOCK_P)
    mask = (rows < T)[:, None, None] & real[None, :, :]
    scores = tl.load(scores_ptr + rows[:, None, None] * E + expert[None, :, :], mask=mask, other=0.0)
    pair, paired, rank, counts = choose(
        scores, bias_ptr, rows, ids_ptr, weights_ptr, chosen_ptr, T, E, TOP_K, GROUPS, TOPK_GROUP, NORM, SCALE, BLOCK_N
    )
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
    ids_ptr,  # [T, K]
    rank_ptr,  # [T, K]
    before_ptr,  # [tiles, E]
    total_ptr,  # [E]
    order_ptr,  # [T * K]
    ends_ptr,  # [E]
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
        tl.store(ends_ptr + e, ends, mask=e < E)
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    mask = pair < pairs
    expert = tl.load(ids_ptr + pair, mask=mask, other=0)
    rank = tl.load(rank_ptr + pair, mask=mask, other=0)
    before = tl.load(before_ptr + pair // per_tile * E + expert, mask=mask, other=0)
    place = tl.gather(ends - total, expert.to(tl.int32), axis=0) + before + rank
    tl.store(order_ptr + place, pair, mask=mask)


# ---- launches ----


def route_scores_launch(T: int, E: int, D: int, architecture: int) -> Launch:
    """Bound by fp64 products, so first that every multiprocessor has a tile, about 128 in all; then large tiles, for x
    is read from the L2 cache once for each tile of experts and weight once for each tile of tokens: at 32 x 32 that
    takes as long as the products, at 64 x 64 half of it. From sm_100 on 32 rows: at 64, Triton 3.6 tries tensor-core
    instructions that have no fp64 form."""
    for block_t, block_e, warps in ((64, 64, 8), (32, 64, 4)) if architecture < 100 else ((32, 64, 4),):
        if triton.cdiv(T, block_t) * triton.cdiv(E, block_e) >= 128:
            return Launch(BLOCK_T=block_t, BLOCK_E=block_e, BLOCK_D=32, num_warps=warps, num_stages=3)
    return Launch(BLOCK_T=32, BLOCK_E=32, BLOCK_D=32, num_warps=4, num_stages=3)


def route_choose_launch(columns: int) -> Launch:
    """A tile as in the launch of few tokens."""
    return Launch(BLOCK_T=tile_rows(16, columns), num_warps=8, num_stages=1)


def route_many(
    x: Tensor, weight: Tensor, bias: Tensor, K: int, groups: int, kept: int, norm: bool, scale: float,
    outputs: tuple[Tensor, ...],
) -> None:  # fmt: skip
    """4096 tokens, E=128, D=2688: 23 MB read and 4 MB of scores written and read again, 2.8 GFLOP of fp64: 7 us and, at
    the 67 TFLOP/s of fp64 tensor cores, 42 us. Choice and lists are three launches, some 8 us: 50 to 60 us expected."""
    (T, D), E = x.shape, len(weight)
    ids, weights, order, ends, chosen = outputs
    block_n = triton.next_power_of_2(E // groups)
    block_p = block_n * triton.next_power_of_2(groups)
    launch = tuned(
        "_route_scores_kernel",
        route_scores_launch(T, E, D, architecture(x)),
        architecture(x),
        T=triton.next_power_of_2(T),
        E=E,
        D=D,
    )
    scores = x.new_empty(T, E, dtype=torch.float64)
    run(
        _route_scores_kernel,
        (triton.cdiv(T, launch.BLOCK_T), triton.cdiv(E, launch.BLOCK_E)),
        *(x, weight, scores, x.stride(0), weight.stride(0), T, E, D),
        launch=launch,
    )
    launch = route_choose_launch(block_p)
    tiles = triton.cdiv(T, launch.BLOCK_T)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    total = x.new_empty(E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    run(
        _route_choose_kernel,
        (tiles,),
        *(scores, bias, ids, weights, chosen, rank, counts, T, E),
        **dict(TOP_K=K, GROUPS=groups, TOPK_GROUP=kept, NORM=norm, SCALE=scale, BLOCK_N=block_n, BLOCK_P=block_p),
        launch=launch,
    )
    # 256 tiles are 4096 tokens: one pass for most prompts.
    run(
        _route_scan_kernel,
        (triton.cdiv(E, 16),),
        *(counts, total, tiles, E),
        launch=Launch(BLOCK_TILES=min(triton.next_power_of_2(tiles), 256), BLOCK_E=16, num_warps=4, num_stages=1),
    )
    run(
        _route_scatter_kernel,
        (triton.cdiv(T * K, 512),),
        *(ids, rank, counts, total, order, ends, T * K, launch.BLOCK_T * K, E),
        BLOCK_E=triton.next_power_of_2(E),
        launch=Launch(BLOCK_PAIRS=512, num_warps=4, num_stages=1),
    )
