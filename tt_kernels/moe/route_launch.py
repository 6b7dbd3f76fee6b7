"""The router: which experts each token goes to, and with what weight."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, multiplies_fp64, run, tuned
from .route_kernels import (
    _route_choose_kernel,
    _route_few_kernel,
    _route_halves_kernel,
    _route_scan_kernel,
    _route_scatter_kernel,
    _route_scores_kernel,
)
from .tickets import SLOT, tickets


@dataclass(frozen=True, kw_only=True)
class FewLaunch(Launch):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_D: int = 64
    SLICES: int = 8  # warps that share a product, each its columns of D
    SPLITS: int  # programs that share it
    num_warps: int = 8
    num_stages: int = 1
    maxnreg: int = 200  # registers: left to itself, ptxas of Triton 3.9 stops at 128 and spills


@dataclass(frozen=True, kw_only=True)
class ScoresLaunch(Launch):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_D: int = 32
    num_warps: int = 4
    num_stages: int = 3


@dataclass(frozen=True, kw_only=True)
class HalvesLaunch(Launch):
    BLOCK_T: int
    BLOCK_E: int
    BLOCK_D: int = 32  # the fewer, the fewer sums of tensor cores a logit's error adds up from
    SPLITS: int
    num_warps: int = 4
    num_stages: int = 4


class Outputs(NamedTuple):
    """What the registered op returns: a Routing and the chosen experts' scores, for the backward."""

    topk_ids: Tensor  # [T, K] int64
    topk_weights: Tensor  # [T, K]
    sorted_pairs: Tensor  # [T * K] int64
    offsets: Tensor  # [E] int32
    chosen: Tensor  # [T, K] fp64: sigmoids, or of a softmax the weights before scale


class Given(NamedTuple):
    """What the kernels read, and hand on to each other."""

    x: Tensor  # [T, D]
    weight: Tensor  # [E, D]
    bias: Tensor  # [E], of a softmax any
    exact: Tensor  # [SPLITS, T, E]: parts of the logits, fp64 where they are sums of that, else as they are
    rounded: Tensor  # the same in fp32
    squares: Tensor  # [SPLITS, T + E] fp32: sums of squares of x and of weight, empty where logits are fp64
    stride_x: int
    stride_w: int
    D: int


class Choice(NamedTuple):
    """How kernels choose, one tl.constexpr."""

    TOP_K: int
    GROUPS: int
    TOPK_GROUP: int
    SOFTMAX: bool
    NORM: bool
    SCALE: float
    BLOCK_N: int  # columns of a group of experts
    BLOCK_P: int  # columns of all
    BLOCK_K: int


def _route_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, K: int, scores: str, groups: int, kept: int, norm: bool,
    scale: float,
) -> Outputs:  # fmt: skip
    out = _route_fwd_fake(x, weight, bias, K, scores, groups, kept, norm, scale)
    T, E = len(x), len(weight)
    if not T:
        out.offsets.zero_()
        return out
    block_n = triton.next_power_of_2(E // groups)
    block_p = block_n * triton.next_power_of_2(groups)
    choice = Choice(K, groups, kept, scores == "softmax", norm, scale, block_n, block_p, triton.next_power_of_2(K))
    x, weight = (t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in (x, weight))
    few = is_few(T, K, block_p)
    by_halves = takes_halves(x.dtype, weight.dtype, few, multiplies_fp64(x))
    launcher = route_few if few and not by_halves else route_many
    launcher(x, weight, weight if bias is None else bias.contiguous(), choice, out, by_halves)
    return out


def _route_fwd_fake(x, weight, bias, K, scores, groups, kept, norm, scale):
    T, E = x.shape[0], weight.shape[0]
    return Outputs(
        topk_ids=x.new_empty(T, K, dtype=torch.int64),
        topk_weights=x.new_empty(T, K, dtype=compute_dtype(x.dtype)),
        sorted_pairs=x.new_empty(T * K, dtype=torch.int64),
        offsets=x.new_empty(E, dtype=torch.int32),
        chosen=x.new_empty(T, K, dtype=torch.float64),
    )


def _given(x: Tensor, weight: Tensor, bias: Tensor, splits: int, by_halves: bool) -> Given:
    (T, D), E = x.shape, len(weight)
    rounded = x.new_empty(splits, T, E, dtype=torch.float32)
    exact = rounded if by_halves else x.new_empty(splits, T, E, dtype=torch.float64)
    squares = x.new_empty(splits if by_halves else 0, T + E, dtype=torch.float32)
    return Given(x, weight, bias, exact, rounded, squares, x.stride(0), weight.stride(0), D)


def takes_halves(x: torch.dtype, weight: torch.dtype, few: bool, fp64: bool) -> bool:
    """Whether products go by three of bf16: exact only for x of as many bits. Few tokens have their choice in the
    launch of the products, which takes as long with fp64 where tensor cores take it: no error, and no doubt. Tokens of
    other dtypes take fp64 everywhere, at the rate that there is."""
    return x == torch.bfloat16 and weight != torch.float64 and not (few and fp64)


def tile_rows(T: int, columns: int) -> int:
    """Tokens whose experts one program chooses: 16 if 2048 scores are enough for them, eight to a thread of 8 warps."""
    return min(8 if T <= 8 else 16, max(2048 // columns, 1))


def is_few(T: int, K: int, columns: int) -> bool:
    """One program can sort 3072 pairs, and up to 512 tokens its sorting is cheaper than two more launches. It keeps
    where the pairs of each tile and expert begin in shared memory, 128 KiB of them at most."""
    tiles = triton.cdiv(T, tile_rows(T, columns))
    fits = 4 * triton.next_power_of_2(tiles) * columns <= 128 * 1024
    return T <= 512 and T * K <= 3072 and tiles < SLOT and fits


def _listing(T: int, K: int, columns: int, rows: int) -> dict[str, int]:
    """How the sorted lists come about, for the kernels that choose."""
    tiles = triton.cdiv(T, rows)
    if not is_few(T, K, columns):
        return dict(LISTS=0, BLOCK_TILES=1, BLOCK_PAIRS=1)
    if tiles == 1:
        return dict(LISTS=2, BLOCK_TILES=1, BLOCK_PAIRS=1)
    return dict(LISTS=1, BLOCK_TILES=triton.next_power_of_2(tiles), BLOCK_PAIRS=triton.next_power_of_2(T * K))


def route_few_launch(T: int, E: int, D: int, *, columns: int, wide: bool = True) -> FewLaunch:
    """Tiles of 16 experts, as many as a tensor core takes: wider ones read and widen x less often, but leave half of a
    GPU idle up to 256 tokens. D is split until there are two programs for each multiprocessor of a large GPU, about
    256, in 8 parts at most: the program that adds them reads 4 bytes for each score of each part. Few counts of parts,
    as each is a kernel of its own, and none that leaves programs without columns: 2688 are 6 times 512, 6 parts. Who
    has 512 columns or less loads them all at once; who has more takes half as many at a time. wide: weight has more
    than 16 bits; from those Triton widens it by more registers, 220 where they are loaded at once."""
    rows = tile_rows(T, columns)
    programs = triton.cdiv(T, rows) * triton.cdiv(E, 16)
    turns = max(triton.cdiv(D, 512), 1)
    most = next(splits for splits in (8, 6, 4, 2, 1) if splits == 1 or splits * programs <= 256)
    splits = triton.cdiv(turns, triton.cdiv(turns, most))
    once = dict(BLOCK_D=64, num_stages=1, maxnreg=200 if wide else 240)
    # Two programs a multiprocessor. The choice of more than 128 experts spills with so few registers.
    loop = dict(BLOCK_D=32, num_stages=3, maxnreg=128 if columns <= 128 else 200)
    return FewLaunch(BLOCK_T=rows, BLOCK_E=16, SPLITS=splits, **(once if splits == turns else loop))


def route_few(x: Tensor, weight: Tensor, bias: Tensor, choice: Choice, out: Outputs, _: bool) -> None:
    """16 tokens, E=128, D=2688: 1.5 MB read, 45 MFLOP of fp64. Latency bounds it: a launch, the first reads, a ticket,
    and K rounds of a maximum."""
    (T, D), E, K = x.shape, len(weight), choice.TOP_K
    default = route_few_launch(T, E, D, columns=choice.BLOCK_P, wide=weight.element_size() > 2)
    launch = tuned("_route_few_kernel", default, architecture(x), T=triton.next_power_of_2(T), E=E, D=D)
    tiles = triton.cdiv(T, launch.BLOCK_T)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    run(
        _route_few_kernel,
        (tiles, triton.cdiv(E, launch.BLOCK_E), launch.SPLITS),
        *(_given(x, weight, bias, launch.SPLITS, False), tickets(x), counts, rank, out, T, E),
        CHOICE=choice,
        **_listing(T, K, choice.BLOCK_P, launch.BLOCK_T),
        launch=launch,
    )


def route_scores_launch(T: int, E: int, D: int, architecture: int) -> ScoresLaunch:
    """Bound by fp64 products, so first that every multiprocessor has a tile, about 128 in all; then large tiles, for x
    is read from the L2 cache once for each tile of experts and weight once for each tile of tokens: at 32 x 32 that
    takes as long as the products, at 64 x 64 half of it. With fewer than 200 tiles of 64 x 64 some multiprocessors
    would have two and others one: 32 x 64 spread more evenly. Small tiles take 64 of D at a time: half as many turns,
    each of which waits for its conversions. From sm_100 on 32 rows, 32 of D: at 64 rows Triton 3.6 tries tensor-core
    instructions that have no fp64 form, and without such instructions a turn's products take longer than its waits."""
    of = lambda block_t, block_e: triton.cdiv(T, block_t) * triton.cdiv(E, block_e)
    if architecture >= 100:
        return ScoresLaunch(BLOCK_T=32, BLOCK_E=64 if of(32, 64) >= 128 else 32)
    if of(64, 64) >= 200:
        return ScoresLaunch(BLOCK_T=64, BLOCK_E=64, num_warps=8)
    if of(32, 64) >= 128:
        return ScoresLaunch(BLOCK_T=32, BLOCK_E=64, BLOCK_D=64, num_warps=8)
    return ScoresLaunch(BLOCK_T=32, BLOCK_E=32, BLOCK_D=64)


def route_halves_launch(T: int, E: int, D: int) -> HalvesLaunch:
    """Experts are the rows of the products: their parts are made in registers, and Hopper's tensor cores take only the
    rows from there, 64 of them; up to 64 tokens programs are too few, and two warps of 16 rows each take 32. As many
    parts of D, 8 at most, as leave three programs a multiprocessor: a turn's splitting hides another's products."""
    block_e = min(32 if T <= 64 else 64, max(triton.next_power_of_2(E), 16))
    block_t = 16 if T <= 128 else 32 if T <= 1024 else 64
    programs = triton.cdiv(T, block_t) * triton.cdiv(E, block_e)
    turns = max(triton.cdiv(D, 32), 1)
    most = next(splits for splits in (8, 4, 3, 2, 1) if splits == 1 or splits * programs <= 3 * 132)
    splits = triton.cdiv(turns, triton.cdiv(turns, most))
    return HalvesLaunch(BLOCK_T=block_t, BLOCK_E=block_e, SPLITS=splits, num_warps=block_e // 16)


def error_of_halves(D: int, splits: int, block_d: int) -> float:
    """What a part of a logit by `_route_halves_kernel` is off by at most, over the product of the lengths of its rows.

    Tensor cores add 16 products and a sum, on sm_80 twice 8. Each term is cut off below 2^-23 of the largest, and so is
    the sum; none is larger than A, the sum of |x weight| over the BLOCK_D of a tile: 20 * 2^-23 A for 16 products at
    most (Fasi, Higham, Mikaitis, Pranesh 2021, as of those that keep no further bit). The two small parts of weight
    come first, with sums of A / 128: they and all errors of errors are 2 %. Adding a tile's sum to those before rounds
    by 2^-24 of their A together. The A of all tiles add up to the product of the lengths at most, and those come from
    sums of squares, off by 2^-24 for every square."""
    turns = triton.cdiv(triton.cdiv(D, block_d), splits)
    return (1.02 * 20 * block_d / 16 + turns / 2) * 2**-23 * (1 + D * 2**-22)


def route_many(x: Tensor, weight: Tensor, bias: Tensor, choice: Choice, out: Outputs, by_halves: bool) -> None:
    """4096 tokens, E=128, D=2688: 23 MB read and 6 MB of logits written and read again, 2.8 GFLOP of fp64 or 8.5 of
    bf16. Choice and lists are three launches, up to 512 tokens one."""
    (T, D), E, K = x.shape, len(weight), choice.TOP_K
    key = dict(T=triton.next_power_of_2(T), E=E, D=D)
    error, splits = 0.0, 1
    if by_halves:
        launch = tuned("_route_halves_kernel", route_halves_launch(T, E, D), architecture(x), **key)
        splits, error = launch.SPLITS, error_of_halves(D, launch.SPLITS, launch.BLOCK_D)
        given = _given(x, weight, bias, splits, True)
        grid = (triton.cdiv(T, launch.BLOCK_T), triton.cdiv(E, launch.BLOCK_E), splits)
        run(_route_halves_kernel, grid, given, T, E, launch=launch)
    else:
        scores = tuned("_route_scores_kernel", route_scores_launch(T, E, D, architecture(x)), architecture(x), **key)
        given = _given(x, weight, bias, 1, False)
        grid = (triton.cdiv(T, scores.BLOCK_T), triton.cdiv(E, scores.BLOCK_E), 1)
        run(_route_scores_kernel, grid, given, T, E, launch=scores)
    # Two programs a multiprocessor where there are many; a tile that is sorted is as in the launch of few tokens, where
    # ptxas would stop at 128 registers and spill.
    if is_few(T, K, choice.BLOCK_P):
        choose = Launch(BLOCK_T=tile_rows(T, choice.BLOCK_P), num_warps=8, maxnreg=168)
    else:
        choose = Launch(BLOCK_T=min(8, max(1024 // choice.BLOCK_P, 1)), num_warps=8, maxnreg=128)
    tiles = triton.cdiv(T, choose.BLOCK_T)
    counts = x.new_empty(tiles, E, dtype=torch.int32)
    rank = x.new_empty(T, K, dtype=torch.int32)
    listing = _listing(T, K, choice.BLOCK_P, choose.BLOCK_T)
    run(
        _route_choose_kernel,
        (tiles,),
        *(given, tickets(x) if listing["LISTS"] == 1 else rank, rank, counts, out, T, E),
        **dict(CHOICE=choice, SPLITS=splits, ERROR=error, **listing),
        launch=choose,
    )
    if listing["LISTS"]:
        return
    total = x.new_empty(E, dtype=torch.int32)
    # 256 tiles are 2048 tokens: one pass for most prompts.
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
