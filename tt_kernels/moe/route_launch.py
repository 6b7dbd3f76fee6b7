"""The router: which experts each token goes to, and with what weight."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from .route_kernels import (
    _route_choose_kernel,
    _route_few_kernel,
    _route_scan_kernel,
    _route_scatter_kernel,
    _route_scores_kernel,
)
from .tickets import SLOT, tickets


@dataclass(frozen=True, kw_only=True)
class FewLaunch(Launch):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_D: int = 32
    SLICES: int = 8  # warps that share a product, each its columns of D
    SPLITS: int  # programs that share it
    num_warps: int = 8
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class ScoresLaunch(Launch):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_D: int = 32
    num_warps: int = 4
    num_stages: int = 3


class Outputs(NamedTuple):
    """What the registered op returns: a Routing and the chosen experts' scores, for the backward."""

    topk_ids: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K]
    sorted_pairs: Tensor  # [T * K] int64
    offsets: Tensor  # [E] int32
    chosen: Tensor  # [T, K] fp64


class Choice(NamedTuple):
    """How kernels choose, one tl.constexpr."""

    TOP_K: int
    GROUPS: int
    TOPK_GROUP: int
    NORM: bool
    SCALE: float
    BLOCK_N: int  # columns of a group of experts
    BLOCK_P: int  # columns of all


def _route_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, K: int, groups: int, kept: int, norm: bool, scale: float
) -> Outputs:
    out = _route_fwd_fake(x, weight, bias, K, groups, kept, norm, scale)
    T, E = len(x), len(weight)
    if not T:
        out.offsets.zero_()
        return out
    block_n = triton.next_power_of_2(E // groups)
    choice = Choice(K, groups, kept, norm, scale, block_n, block_n * triton.next_power_of_2(groups))
    launcher = route_few if is_few(T, K, choice.BLOCK_P) else route_many
    x, weight = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (x, weight))
    launcher(x, weight, bias.contiguous(), choice, out)
    return out


def _route_fwd_fake(x, weight, bias, K, groups, kept, norm, scale):
    T, E = x.shape[0], weight.shape[0]
    return Outputs(
        topk_ids=x.new_empty(T, K, dtype=torch.int64),
        topk_weights=x.new_empty(T, K, dtype=compute_dtype(x.dtype)),
        sorted_pairs=x.new_empty(T * K, dtype=torch.int64),
        offsets=x.new_empty(E, dtype=torch.int32),
        chosen=x.new_empty(T, K, dtype=torch.float64),
    )


def tile_rows(T: int, columns: int) -> int:
    """Tokens whose experts one program chooses: 2048 scores, their keys and rounds fit the registers of 8 warps."""
    return min(triton.next_power_of_2(max(T, 1)), 16, max(2048 // columns, 1))


def is_few(T: int, K: int, columns: int) -> bool:
    """One program can sort 3072 pairs, and up to 512 tokens its sorting is cheaper than two more launches. It keeps
    where the pairs of each tile and expert begin in shared memory, 128 KiB of them at most."""
    tiles = triton.cdiv(T, tile_rows(T, columns))
    fits = 4 * triton.next_power_of_2(tiles) * columns <= 128 * 1024
    return T <= 512 and T * K <= 3072 and tiles < SLOT and fits


def route_few_launch(T: int, E: int, D: int, *, columns: int) -> FewLaunch:
    """Tiles of 16 experts, as many as a tensor core takes: wider ones read and widen x less often, but leave half of a
    GPU idle up to 256 tokens. D is split until there is a program for each multiprocessor of a large GPU, about 128,
    in 4 parts at most: the program that adds them reads 8 bytes for each score of each part, and beyond 4 that takes
    longer than the product saves."""
    rows = tile_rows(T, columns)
    programs = triton.cdiv(T, rows) * triton.cdiv(E, 16)
    splits = max(1, min(128 // programs, 4 if rows > 8 else 8, triton.cdiv(D, 256)))
    # A warp takes 32 columns at a time, eight warps 256: each reads whole 64-byte lines of 16-bit rows. Of more than
    # 128 experts eight warps spill a register or two of the choice, whatever its tile; four do not.
    warps = 8 if columns <= 128 else 4
    return FewLaunch(BLOCK_T=rows, BLOCK_E=16, SPLITS=splits, num_warps=warps)


def route_few(x: Tensor, weight: Tensor, bias: Tensor, choice: Choice, out: Outputs) -> None:
    """64 tokens, E=128, D=2688: 1.7 MB read, 8.3 MB from the L2 cache, 45 MFLOP of fp64. Latency bounds it: a
    launch, the first reads, two tickets, and K rounds of a maximum."""
    (T, D), E, K = x.shape, len(weight), choice.TOP_K
    default = route_few_launch(T, E, D, columns=choice.BLOCK_P)
    launch = tuned("_route_few_kernel", default, architecture(x), T=triton.next_power_of_2(T), E=E, D=D)
    tiles = triton.cdiv(T, launch.BLOCK_T)
    partial = x.new_empty(launch.SPLITS, T, E, dtype=torch.float64)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    run(
        _route_few_kernel,
        (tiles, triton.cdiv(E, launch.BLOCK_E), launch.SPLITS),
        *(x, weight, bias, tickets(x), partial, counts, rank, out, x.stride(0), weight.stride(0), T, E, D),
        CHOICE=choice,
        ONE_TILE=tiles == 1,
        BLOCK_TILES=triton.next_power_of_2(tiles),
        BLOCK_PAIRS=triton.next_power_of_2(T * K),
        launch=launch,
    )


def route_scores_launch(T: int, E: int, D: int, architecture: int) -> ScoresLaunch:
    """Bound by fp64 products, so first that every multiprocessor has a tile, about 128 in all; then large tiles, for x
    is read from the L2 cache once for each tile of experts and weight once for each tile of tokens: at 32 x 32 that
    takes as long as the products, at 64 x 64 half of it. From sm_100 on 32 rows: at 64, Triton 3.6 tries tensor-core
    instructions that have no fp64 form."""
    for block_t, block_e, warps in ((64, 64, 8), (32, 64, 4)) if architecture < 100 else ((32, 64, 4),):
        if triton.cdiv(T, block_t) * triton.cdiv(E, block_e) >= 128:
            return ScoresLaunch(BLOCK_T=block_t, BLOCK_E=block_e, num_warps=warps)
    return ScoresLaunch(BLOCK_T=32, BLOCK_E=32)


def route_many(x: Tensor, weight: Tensor, bias: Tensor, choice: Choice, out: Outputs) -> None:
    """4096 tokens, E=128, D=2688: 23 MB read and 4 MB of scores written and read again, 2.8 GFLOP of fp64,
    which bound it (67 TFLOP/s of fp64 tensor cores on an H200). Choice and lists are three launches."""
    (T, D), E, K = x.shape, len(weight), choice.TOP_K
    default = route_scores_launch(T, E, D, architecture(x))
    launch = tuned("_route_scores_kernel", default, architecture(x), T=triton.next_power_of_2(T), E=E, D=D)
    scores = x.new_empty(T, E, dtype=torch.float64)
    run(
        _route_scores_kernel,
        (triton.cdiv(T, launch.BLOCK_T), triton.cdiv(E, launch.BLOCK_E)),
        *(x, weight, scores, x.stride(0), weight.stride(0), T, E, D),
        launch=launch,
    )
    choose = Launch(BLOCK_T=tile_rows(16, choice.BLOCK_P), num_warps=8)  # a tile as in the launch of few tokens
    tiles = triton.cdiv(T, choose.BLOCK_T)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    total = x.new_empty(E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    run(
        _route_choose_kernel,
        (tiles,),
        *(scores, bias, out, rank, counts, T, E),
        CHOICE=choice,
        launch=choose,
    )
    # 256 tiles are 4096 tokens: one pass for most prompts.
    run(
        _route_scan_kernel,
        (triton.cdiv(E, 16),),
        *(counts, total, tiles, E),
        launch=Launch(BLOCK_TILES=min(triton.next_power_of_2(tiles), 256), BLOCK_E=16),
    )
    run(
        _route_scatter_kernel,
        (triton.cdiv(T * K, 512),),
        *(out, rank, counts, total, T * K, choose.BLOCK_T * K, E),
        BLOCK_E=triton.next_power_of_2(E),
        launch=Launch(BLOCK_PAIRS=512),
    )
