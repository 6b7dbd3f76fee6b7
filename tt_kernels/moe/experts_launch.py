"""Launches of the experts: their tiles, and rows times up with the activation, times down, summed by token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.moe import PlainWeights
from ..runtime.launch import L, Launch, architecture, multiprocessors, run, tuned
from ..runtime.structs import odd
from .experts_kernels import _experts_down_kernel, _experts_schedule_kernel, _experts_up_kernel
from .lang import ABSENT, Operands
from .operands import one_by_one, operands


@dataclass(frozen=True)
class Sizes:
    """`rows` rows, K long, sorted by `experts` experts of [N, K]; two: a gate beside up, or a second product."""

    rows: int
    experts: int
    N: int
    K: int
    itemsize: int = 2
    architecture: int = 90
    two: bool = False
    tma: bool = True  # can load tiles of the weights

    @staticmethod
    def of(x: Tensor, *, rows: int, experts: int, N: int, K: int, two: bool, tma: bool = True) -> "Sizes":
        return Sizes(rows, experts, N, K, x.element_size(), architecture(x), two, tma)


@dataclass(frozen=True, kw_only=True)
class ProductLaunch(Launch):
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    SWAP: int  # weights are the M operand of the tensor cores
    PERSISTENT: int  # programs a multiprocessor that walk the tiles; 0: a program a tile
    num_warps: int = 4
    num_stages: int = 3

    @property
    def tall(self) -> bool:
        """Whether its tiles are of two groups of rows (lang.py)."""
        return spare(self.BLOCK_T) > 0


@dataclass(frozen=True, kw_only=True)
class UpLaunch(ProductLaunch):
    SORTED: int  # rows are gathered into sorted order first


@dataclass(frozen=True, kw_only=True)
class HiddenLaunch(Launch):
    BLOCK_T: int
    BLOCK_N: int
    BLOCK_K: int
    SORTED: int
    num_warps: int = 4
    num_stages: int = 3
    maxnreg: int | None = None  # where ptxas would stop at fewer registers, and spill


@dataclass(frozen=True, kw_only=True)
class WeightsLaunch(Launch):
    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_R: int
    num_warps: int = 4
    num_stages: int = 3


def measured(kernel: str, launch: L, s: Sizes, **more: int) -> L:
    """The measured launch for these sizes, else this one. Rows count by powers of two, and by their tile of `_TILES`:
    sizes of one power of two may need different ones."""
    rows = triton.next_power_of_2(s.rows)
    key = dict(rows=rows, tile=row_of(s)[0], experts=s.experts, N=s.N, K=s.K, two=int(s.two), itemsize=s.itemsize)
    return tuned(kernel, launch, s.architecture, **key, **more)


def tile(size: int, most: int) -> int:
    """The tile of a dimension: a power of two, no larger than it needs to be, 16 at least for the tensor cores."""
    return min(max(triton.next_power_of_2(size), 16), most)


# (BLOCK_T, BLOCK_N, BLOCK_K, warps, stages). Each tile of an expert reads all of its weights from the L2 cache, so
# nearly every expert should need only one. Of a mean number of rows an even choice gives one expert in ten more than
# mean + 1.3 sqrt(mean): the first row with room for those is taken. A larger tile only computes more padding.
_TILES = (
    (16, 64, 128, 4, 5),  # mean 11: reading weights is all: 64 are wgmma's M; two programs keep 160 KB on their way
    (32, 128, 64, 4, 4),  # mean 25: rows are loaded often enough to count: more weights a tile; still two programs
    (64, 128, 64, 4, 4),  # mean 54: the same for more rows
    (128, 256, 64, 8, 3),  # more: bound by operations and the L2 cache: the fewest bytes loaded for each operation
)


def row_of(s: Sizes) -> tuple[int, int, int, int, int]:
    """Of `_TILES`, for an even choice of experts."""
    mean = s.rows / s.experts
    return next((row for row in _TILES if mean + 1.3 * mean**0.5 <= row[0]), _TILES[-1])


def product_launch(s: Sizes) -> UpLaunch:
    """By `_TILES`, a program a tile; for many rows tall ones (lang.py) in 16 bits on Hopper, four stages of 56 KB, but
    where a gate or pointers to weights need the registers. The persistent form, for which rows are gathered first so
    that TMA loads them too, is there to be measured: it hides a tile's beginning and end, and pays with the gather and
    with programs that are dealt their tiles in advance. sm_80 has 163 KiB of shared memory for what Hopper keeps in
    227, and pointers in registers: half the tile, fewer stages. A gate or second product takes a second weight tile a
    stage and a second accumulator. Elements of 4 bytes are multiplied without tensor cores, by threads that hold 16 of
    K of both operands in registers: 64 by 64 tiles, of which those of rows by weights spill."""
    old = s.architecture < 90
    t, n, k, warps, stages = row_of(s)
    many = t == 128
    if many and s.tma and not (s.two or old) and s.itemsize == 2 and n <= s.N and s.rows > t:
        t, stages = 192, 4
    n = max(n >> (s.two + old), 64)
    if old:
        stages = min(stages, 3)
    if s.two and not many:
        k, stages = 64, 4
    if s.two and many and old:
        k = 32  # 64 spill
    if s.itemsize > 2:
        t, n, k, warps, stages = min(t, 64), 64, 16, 4 if t == 16 else 8, 3
    return UpLaunch(
        BLOCK_T=tile(s.rows, t),
        BLOCK_N=tile(s.N, n),
        BLOCK_K=tile(s.K, k),
        SWAP=int(not many or s.itemsize > 2),
        PERSISTENT=0,
        SORTED=0,
        num_warps=warps,
        num_stages=stages,
    )


def up_launch(s: Sizes) -> UpLaunch:
    return measured("_experts_up_kernel", product_launch(s), s)


def down_launch(s: Sizes, transposed: bool = False) -> ProductLaunch:
    """As up's without SORTED, since rows are sorted here. Transposed weights come by TMA where K is whole tiles, so
    tiles are 64 of K: 1856 = 29 * 64."""
    options = {name: value for name, value in product_launch(s).options.items() if name != "SORTED"}
    if transposed and options["BLOCK_K"] > 64:
        options |= dict(BLOCK_K=64, num_stages=2 * options["num_stages"])
    return measured("_experts_down_kernel", ProductLaunch(**options), s, transposed=int(transposed))


def hidden_launch(s: Sizes, activation: str = "relu2") -> HiddenLaunch:
    """Two accumulators of tokens by N (three with a gate): 128 by 128 in 8 warps, 64 wide with a gate. Where `_TILES`
    has 64 rows or fewer, 64: the smallest tile whose rows, the M operand, are wgmma. A tile has two loops, so no
    persistent form; three stages leave room for two programs. Rows are gathered once: two tensors by pointer would take
    70 registers more. sm_80 has no TMA, and takes 8 warps and 64 of N for what it holds in registers; with a gate half
    of them each way and 32 of K, as 64 spill under Triton 3.6, and a stage more; there the polynomials of erf spill two
    numbers too, where ptxas stops at 128 registers. Elements of 4 bytes as in
    `product_launch`."""
    few, old = row_of(s)[0] < 128, s.architecture < 90
    crowded, wide = s.two and old, s.itemsize > 2
    t = 64 if few or crowded else 128
    n, k = (64, 16) if wide else (32 if crowded else 64 if s.two or old else 128, 32 if crowded else 64)
    launch = HiddenLaunch(
        BLOCK_T=tile(s.rows, 64) if wide or (t == 64 and s.N < 64) else t,
        BLOCK_N=tile(s.N, n),
        BLOCK_K=k if wide else tile(s.K, k),
        SORTED=int(s.N >= 64 and not old),
        num_warps=4 if few and not (old or wide) else 8,
        num_stages=4 if crowded and not wide else 3,
        maxnreg=168 if crowded and activation == "gelu" else None,
    )
    return measured("_experts_bwd_hidden_kernel", launch, s)


def weights_launch(s: Sizes) -> WeightsLaunch:
    """128 by 128 of a gradient a program, 64 rows of an expert at a time: 32 KB a stage in 16 bits. Two programs share
    a multiprocessor: one multiplies while the other stores. From 320 rows an expert on 128 by 256 and a program for
    itself: multiplying takes longer than storing then, and a quarter less comes from the L2 cache. Of elements of
    4 bytes 16, as in `product_launch`."""
    wide = s.rows >= 320 * s.experts and s.architecture >= 90 and s.itemsize == 2 and min(s.N, s.K) > 128
    launch = WeightsLaunch(
        BLOCK_P=tile(s.N, 128),
        BLOCK_Q=tile(s.K, 256 if wide else 128),
        BLOCK_R=tile(s.rows, 64 if s.itemsize == 2 else 16),
        num_warps=8 if min(s.N, s.K) > 64 else 4,
    )
    return measured("_experts_bwd_weights_kernel", launch, s)


def heights(block: int) -> tuple[int, ...]:
    """The rows that a tile computes, the fewest that hold those it has: of a tall one as `tall_tile` chooses."""
    low = block // 3
    return (low, 2 * low, block - low // 2, block, block + spare(block)) if spare(block) else (block,)


def spare(block: int) -> int:
    """Rows that an expert's last tile may have beyond `block`."""
    return block // 6 if block & (block - 1) else 0


def most_tiles(rows: int, experts: int, block: int) -> int:
    """Tiles that `rows` rows over `experts` experts can need at most: as many experts as can be hit have a row, and
    what is left fills whole tiles. A grid that is safe without knowing the choice."""
    hit = min(experts, rows)
    return hit + (rows - hit) // block


class Pairs:
    """The sorted pairs of one call and their lists of tiles, one for each BLOCK_T that its kernels ask for."""

    def __init__(self, order: Tensor, offsets: Tensor):
        self.order, self.offsets = order, offsets
        self.lists: dict[int, Tensor] = {}

    def tiles(self, block: int) -> tuple[Tensor, int]:
        """[1 + tiles] int64 and how many tiles there can be."""
        rows, E = len(self.order), len(self.offsets)
        tiles = most_tiles(rows, E, block)
        if block not in self.lists:
            listed = self.lists[block] = self.offsets.new_empty(1 + tiles, dtype=torch.int64)
            # Two tiles by one warp: it waits for no other, and its sums over the experts are short.
            block_e = triton.next_power_of_2(E)
            tiling = dict(BLOCK_T=block, SPARE=spare(block), BLOCK_E=block_e, BLOCK_TILES=2)
            launch = Launch(**tiling, num_warps=1 if block_e <= 256 else 4)
            grid = (triton.cdiv(tiles, launch.BLOCK_TILES),)
            run(_experts_schedule_kernel, grid, self.offsets, listed, rows, E, tiles, launch=launch)
        return self.lists[block], tiles

    def tiles_of(self, launch: ProductLaunch) -> tuple[Tensor, int, int]:
        """The list, or the offsets to search; how many tiles there can be; BLOCK_E of a search. The list is a launch,
        a search 0.3 us of each program, in which another loads where two share a multiprocessor."""
        E, block = len(self.offsets), launch.BLOCK_T
        if launch.PERSISTENT or block >= 128:
            return *self.tiles(block), 0
        return self.offsets, most_tiles(len(self.order), E, block), triton.next_power_of_2(E)

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens of the pairs, a row each, in sorted order."""
        return x.index_select(0, (self.order // (len(self.order) // len(x))).clamp(0, len(x) - 1))


class Extents(NamedTuple):
    """Sizes that both product kernels take."""

    odd_T: int  # `odd`, as odd_tiles, those of the shared expert
    top_k: int
    D: int
    N: int
    M: int  # width of the shared expert, 0 without
    odd_tiles: int
    E: int


def programs(launch: ProductLaunch, tiles: int, x: Tensor) -> tuple[int]:
    """The grid: a program a tile, or PERSISTENT of them a multiprocessor."""
    return (min(tiles, launch.PERSISTENT * multiprocessors(x)) if launch.PERSISTENT else tiles,)


def rows_up(
    x: Tensor, pairs: Pairs, weights: PlainWeights, shared: PlainWeights | None, activation: str
) -> tuple[Tensor, Tensor | None]:
    """h [R, N] in sorted order and shared h [T, M]: activation(x up^T), with a gate activation(x gate^T) (x up^T).

    Reads the N D elements of every expert that is hit, and again through L2 for each further tile of its rows; 2 R N D
    flops. At 16 tokens 68.6 of 128 experts of 1856 by 2688 in bf16, 684 MB, and the shared expert's 20 MB. Where SORTED
    rows are gathered first: 2 R D elements more.
    """
    (T, D), (E, N), R = x.shape, weights.up.shape[:2], len(pairs.order)
    two, tma = weights.gate is not None, D * x.element_size() % 16 == 0
    sizes = Sizes.of(x, rows=R, experts=E, N=N, K=D, two=two, tma=tma)
    launch = up_launch(sizes)
    M = 0 if shared is None else len(shared.up)
    h, shared_h = x.new_empty(R, N), None if shared is None else x.new_empty(T, M)
    listed, most, block_e = pairs.tiles_of(launch)
    shared_tiles = triton.cdiv(T, launch.BLOCK_T) * triton.cdiv(M, launch.BLOCK_N)
    rows = pairs.tokens(x) if launch.SORTED else x
    both = (
        operands(rows, weights.up, weights.gate)._replace(out=h),
        None if shared is None else operands(x, shared.up, shared.gate)._replace(out=shared_h),
    )
    row_block, block = (launch.BLOCK_T, launch.BLOCK_K), (launch.BLOCK_N, launch.BLOCK_K)
    half = (launch.BLOCK_N // 2, launch.BLOCK_K) if launch.tall else None
    run(
        _experts_up_kernel,
        programs(launch, shared_tiles + most * triton.cdiv(N, launch.BLOCK_N), x),
        *one_by_one(both, sizes.architecture, row_block if launch.SORTED else None, block, half),
        *(pairs.order, listed, Extents(odd(T), R // T, D, N, M, odd(shared_tiles), E)),
        BLOCK_E=block_e,
        GATED=weights.gate is not None,
        ACTIVATION=activation,
        launch=launch,
    )
    return h, shared_h


def rows_down(
    routed: Operands, shared: Operands | None, pairs: Pairs, D: int, *, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y [R, D], every pair in its own row, and shared y [T, D]: a w^T, or a w + a2 w2 where transposed.

    Reads weights as `rows_up` does, and 2 R N D flops, twice that with a2.

    In the persistent form the shared expert is a launch of its own: in one grid its K of another length would keep the
    loops over tiles and over K from becoming one, which hides a tile's beginning and end.
    """
    R, N = routed.a.shape
    two = routed.a2 is not ABSENT
    widths = [N] if shared is None else [N, shared.a.shape[1]]
    aligned = all(n * routed.a.element_size() % 16 == 0 for n in ([D] if transposed else widths))
    tma = aligned and (not transposed or all(n % 64 == 0 for n in widths))
    sizes = Sizes.of(routed.a, rows=R, experts=len(pairs.offsets), N=D, K=N, two=two, tma=tma)
    launch = down_launch(sizes, transposed)
    y, shared_y = routed.a.new_empty(R, D), None
    if shared is not None and launch.PERSISTENT:
        each = torch.arange(len(shared.a), device=y.device)
        alone = Pairs(each, pairs.offsets.new_full((1,), len(each)))
        shared_y, _ = rows_down(shared, None, alone, D, transposed=transposed)
        shared = None
    elif shared is not None:
        shared_y = y.new_empty(len(shared.a), D)
        shared = shared._replace(out=shared_y)
    T, M = (0, 0) if shared is None else shared.a.shape
    listed, most, block_e = pairs.tiles_of(launch)
    d_tiles = triton.cdiv(D, launch.BLOCK_N)
    shared_tiles = triton.cdiv(T, launch.BLOCK_T) * d_tiles
    whole = not transposed or (N % launch.BLOCK_K == 0 and M % launch.BLOCK_K == 0)  # else a tile runs into the next
    block, half = (
        (launch.BLOCK_K, n) if transposed else (n, launch.BLOCK_K) for n in (launch.BLOCK_N, launch.BLOCK_N // 2)
    )
    row_block = None if launch.tall else (launch.BLOCK_T, launch.BLOCK_K)
    both = (routed._replace(out=y), shared)
    run(
        _experts_down_kernel,
        programs(launch, shared_tiles + most * d_tiles, y),
        *one_by_one(both, sizes.architecture, row_block, block if whole else None, half if launch.tall else None),
        *(pairs.order, listed, R, Extents(odd(T), 1, D, N, M, odd(shared_tiles), len(pairs.offsets))),
        BLOCK_E=block_e,
        TWO=two,
        TRANSPOSED=transposed,
        launch=launch,
    )
    return y, shared_y


def by_owner(matrices: Sequence[Tensor | None]) -> tuple[PlainWeights, PlainWeights | None]:
    """The routed experts' weights and the shared one's from the registered ops' flat list."""
    up, down, gate, shared_up, shared_down, shared_gate = matrices
    assert up is not None and down is not None
    if shared_up is None or shared_down is None:
        return PlainWeights(up, down, gate), None
    return PlainWeights(up, down, gate), PlainWeights(shared_up, shared_down, shared_gate)
