"""Tile sizes of the experts' products: pure functions of sizes, with their reasons."""

from dataclasses import dataclass

import triton
from torch import Tensor

from ...launch import Launch, architecture, multiprocessors, tuned


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
    multiprocessors: int = 132

    @staticmethod
    def of(x: Tensor, *, rows: int, experts: int, N: int, K: int, two: bool) -> "Sizes":
        return Sizes(rows, experts, N, K, x.element_size(), architecture(x), two, multiprocessors(x))

    @property
    def key(self) -> dict[str, int]:
        """What a measured launch is kept under: rows by powers of two."""
        rows = triton.next_power_of_2(self.rows)
        return dict(rows=rows, experts=self.experts, N=self.N, K=self.K, two=int(self.two), itemsize=self.itemsize)


def tile(size: int, most: int) -> int:
    """The tile of a dimension: a power of two, no larger than it needs to be, 16 at least for the tensor cores."""
    return min(max(triton.next_power_of_2(size), 16), most)


def product_launch(s: Sizes) -> Launch:
    """Tiles by the rows of an expert if the choice were even.

    Below some 18 rows (16 tokens of an expert in a tile) reading weights is all: weights are the M operand of wgmma
    (64 of them, 16 rows; the other way round 16 rows would be mma.sync), 128 elements of K in a stage are 16 KB, and
    five stages in two programs an SM keep 160 KB on their way. Up to 40 rows 32 of them, up to 120 64: there the rows
    are loaded often enough to count, so 128 weights a tile, and 64 elements of K to keep two programs. From 120 rows
    on it is a plain product, bound by operations, where 128 by 256 tiles load the fewest bytes for each: persistent,
    rows gathered once into sorted order, so that TMA loads them too. sm_80 has 163 KiB of shared memory for what
    Hopper keeps in 227, and pointers in registers: with a gate two stages, and many rows half a tile each way, or it
    spills. Elements of 4 bytes are multiplied without tensor cores, by threads that hold 16 of K of both operands in
    registers beside their results: 64 by 64 tiles.
    """
    mean = s.rows / s.experts
    old = s.architecture < 90
    if mean < 18:
        t, n, k, warps, stages = 16, 64, 128, 4, 5
    elif mean < 120:
        t, n, k, warps, stages = (32 if mean < 40 else 64), 64 if old or s.two else 128, 64, 4, 4
    else:
        n = 64 if s.two and old else 128 if s.two or old else 256
        t, k, warps, stages = 128, 32 if s.two and old else 64, 8, 3
    if s.two and mean < 120:  # two weight tiles a stage
        k, stages = 64, 4
    if old:
        stages = min(stages, 2 if s.two and mean < 120 else 3)
    if s.itemsize > 2:
        t, n, k, warps, stages = min(t, 64), 64, 16, 4 if mean < 18 else 8, 3
    persistent = int(mean >= 120 and not old)
    return Launch(
        BLOCK_T=tile(s.rows, t),
        BLOCK_N=tile(s.N, n),
        BLOCK_K=tile(s.K, k),
        SWAP=int(mean < 120),
        PERSISTENT=persistent,
        SORTED=persistent,
        num_warps=warps,
        num_stages=stages,
    )


def launch_programs(launch: Launch, tiles: int, s: Sizes) -> int:
    """A program a tile, or PERSISTENT of them a multiprocessor."""
    return min(tiles, launch.PERSISTENT * s.multiprocessors) if launch.PERSISTENT else tiles


def up_launch(s: Sizes) -> Launch:
    return tuned("_experts_up_kernel", product_launch(s), s.architecture, **s.key)


def down_launch(s: Sizes, transposed: bool = False) -> Launch:
    """As up's; SORTED means nothing here, rows are. Transposed weights come by TMA where K is whole tiles: 1856 is 29
    of 64."""
    options = {k: v for k, v in product_launch(s).options.items() if k != "SORTED"}
    if transposed and options["BLOCK_K"] > 64:
        options |= dict(BLOCK_K=64, num_stages=2 * options["num_stages"])
    return tuned("_experts_down_kernel", Launch(**options), s.architecture, **s.key, transposed=int(transposed))


def hidden_launch(s: Sizes) -> Launch:
    """Two accumulators of tokens by N (three with a gate): 128 by 128 in 8 warps, 64 wide with a gate. Few rows an
    expert take the smallest tile whose rows, the M operand, are wgmma: 64. Two loops a tile, so no persistent form;
    three stages leave room for two programs. Rows are gathered once: two tensors by pointer would take 70 registers
    more. sm_80 has no TMA, and takes 8 warps and 64 of N for what it holds in registers; with a gate half of
    them each way, two stages, and 32 of K, as 64 spill under Triton 3.6. Elements of 4 bytes as in `product_launch`."""
    few, old = s.rows / s.experts < 96, s.architecture < 90
    if s.itemsize > 2:
        launch = Launch(
            BLOCK_T=tile(s.rows, 64),
            BLOCK_N=tile(s.N, 64),
            BLOCK_K=16,
            SORTED=int(s.N >= 64 and not old),
            num_warps=8,
            num_stages=3,
        )
        return tuned("_experts_bwd_hidden_kernel", launch, s.architecture, **s.key)
    launch = Launch(
        BLOCK_T=(64 if s.N >= 64 else tile(s.rows, 64)) if few or (s.two and old) else 128,
        BLOCK_N=tile(s.N, 32 if s.two and old else 64 if s.two or old else 128),
        BLOCK_K=tile(s.K, 32 if s.two and old else 64),
        SORTED=int(s.N >= 64 and not old),
        num_warps=4 if few and not old else 8,
        num_stages=2 if s.two and old else 3,
    )
    return tuned("_experts_bwd_hidden_kernel", launch, s.architecture, **s.key)


def weights_launch(s: Sizes) -> Launch:
    """128 by 128 of a gradient a program, 64 rows of an expert at a time: 32 KB a stage in 16 bits. Of elements of
    4 bytes 16, as in `product_launch`."""
    launch = Launch(
        BLOCK_P=tile(s.N, 128),
        BLOCK_Q=tile(s.K, 128),
        BLOCK_R=tile(s.rows, 64 if s.itemsize == 2 else 16),
        num_warps=8 if min(s.N, s.K) > 64 else 4,
        num_stages=3,
    )
    return tuned("_experts_bwd_weights_kernel", launch, s.architecture, **s.key)


# Worth measuring: (BLOCK_T, BLOCK_N, BLOCK_K, warps, stages, SWAP, PERSISTENT, SORTED).
_PRODUCTS = (
    *((16, 64, k, 4, stages, 1, 0, 0) for k, stages in ((128, 5), (128, 4), (128, 3), (64, 10), (64, 7), (256, 3))),
    *((16, 128, k, 4, stages, 1, 0, 0) for k, stages in ((128, 5), (64, 6), (64, 5))),
    *((16, 64, 128, 4, 5, 1, 2, 0), (16, 128, 64, 4, 5, 1, 2, 0), (16, 128, 128, 4, 5, 1, 1, 0)),
    *((32, 64, 128, 4, 4, 1, 0, 0), (32, 128, 64, 4, 5, 1, 0, 0), (32, 128, 64, 4, 4, 1, 0, 0)),
    *((32, 128, 128, 8, 5, 1, 0, 0), (32, 128, 64, 4, 5, 1, 2, 0), (64, 64, 128, 4, 3, 1, 0, 0)),
    *((64, 128, 64, 4, 4, 1, 0, 0), (64, 128, 64, 4, 3, 1, 0, 0), (64, 256, 64, 8, 5, 1, 0, 0)),
    *((64, 128, 64, 4, 4, 1, 2, 1), (64, 256, 64, 8, 4, 0, 1, 1), (64, 256, 64, 8, 5, 1, 1, 1)),
    *((128, 128, 64, 8, 4, 0, 1, 1), (128, 256, 64, 8, 3, 0, 1, 1), (128, 128, 64, 8, 3, 0, 0, 1)),
    *((128, 128, 64, 8, 4, 0, 1, 0), (128, 256, 64, 8, 3, 0, 0, 0), (128, 128, 64, 8, 3, 0, 0, 0)),
)


def product_candidates(*, up: bool) -> tuple[Launch, ...]:
    """Of the down kernel SORTED is no parameter."""
    names = ("BLOCK_T", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages", "SWAP", "PERSISTENT", "SORTED")
    found = (Launch(**dict(zip(names, row, strict=True))) for row in _PRODUCTS)
    if not up:
        found = (Launch(**{k: v for k, v in c.options.items() if k != "SORTED"}) for c in found)
    return tuple(dict.fromkeys(found))


CANDIDATES = {
    "_experts_up_kernel": product_candidates(up=True),
    "_experts_down_kernel": product_candidates(up=False),
    "_experts_bwd_hidden_kernel": tuple(
        Launch(BLOCK_T=t, BLOCK_N=n, BLOCK_K=64, SORTED=1, num_warps=t // 16 if n == 128 else 8, num_stages=stages)
        for t, n, stages in ((64, 128, 3), (64, 128, 4), (64, 256, 3), (128, 128, 3), (128, 128, 4))
    ),
    "_experts_bwd_weights_kernel": tuple(
        Launch(BLOCK_P=p, BLOCK_Q=q, BLOCK_R=r, num_warps=8, num_stages=stages)
        for p, q, r, stages in ((128, 128, 64, 3), (128, 128, 64, 4), (128, 128, 32, 4), (128, 256, 64, 3))
    ),
}
