"""Forward of the experts: rows times up with the activation, times down, and the sum over a token's experts."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..runtime.checks import refuse
from ..runtime.launch import Launch, architecture, multiprocessors, run, tuned
from .experts_kernels import _experts_combine_kernel, _experts_down_kernel, _experts_schedule_kernel, _experts_up_kernel


def power(size: int, least: int, most: int) -> int:
    """The tile for a dimension of this size: no larger than it needs to be."""
    return min(max(triton.next_power_of_2(size), least), most)


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


def most_tiles(rows: int, experts: int, block: int) -> int:
    """Tiles that `rows` rows over `experts` experts can need at most: as many experts as can be hit have a row, and
    what is left fills whole tiles. A grid that is safe without knowing the choice."""
    hit = min(experts, rows)
    return hit + (rows - hit) // block


class Tiles:
    """The lists of tiles of one call, one for each BLOCK_T that its kernels ask for."""

    def __init__(self, ends: Tensor, rows: int):
        self.ends, self.rows, self.lists = ends, rows, {}

    def __call__(self, block: int) -> tuple[Tensor, int]:
        """[1 + tiles] int64 and how many tiles there can be."""
        E = len(self.ends)
        tiles = most_tiles(self.rows, E, block)
        if block not in self.lists:
            listed = self.ends.new_empty(1 + tiles, dtype=torch.int64)
            launch = Launch(BLOCK_T=block, BLOCK_E=triton.next_power_of_2(E), BLOCK_TILES=32, num_warps=4, num_stages=1)
            grid = (triton.cdiv(tiles, launch.BLOCK_TILES),)
            run(_experts_schedule_kernel, grid, self.ends, listed, self.rows, E, tiles, launch=launch)
            self.lists[block] = listed
        return self.lists[block], tiles


def combine(pairs: Tensor, ids: Tensor, weights: Tensor | None, shared: Tensor | None, y: Tensor, E: int) -> Tensor:
    """(K + 1) T D itemsize bytes read, T D written: at 16 tokens 0.7 MB."""
    T, D = y.shape
    # Eight elements a thread: 16-byte loads; several programs a token while tokens are few.
    block = min(triton.next_power_of_2(D), 1024)
    launch = Launch(BLOCK_D=block, num_warps=max(block // 256, 1), num_stages=1)
    run(
        _experts_combine_kernel,
        (T, triton.cdiv(D, block)),
        *(pairs, ids, weights, shared, y, E, D),
        K=ids.shape[1],
        WEIGHTED=weights is not None,
        SHARED=shared is not None,
        launch=launch,
    )
    return y


def by_tma(t: Tensor, architecture: int) -> bool:
    """Whether TMA can load tiles of this matrix: it needs 16-byte multiples, and Hopper."""
    aligned = t.stride(0) * t.element_size() % 16 == 0 and t.stride(1) == 1 and t.data_ptr() % 16 == 0
    return architecture >= 90 and aligned and t.numel() > 0


def operand(t: Tensor | None, tma: bool, *block: int) -> Tensor | TensorDescriptor | None:
    return TensorDescriptor.from_tensor(t, list(block)) if tma and t is not None else t


def stacked(weights: Tensor | None) -> Tensor | None:
    """[E, N, D] or [N, D] as the rows of one matrix."""
    return None if weights is None else weights.contiguous().flatten(0, -2)


def gathered(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """The tokens of the pairs, a row each, in sorted order."""
    return x.index_select(0, (order // top_k).clamp(0, len(x) - 1))


def rows_up(
    x: Tensor,
    order: Tensor,
    tiles: Tiles,
    up: Tensor,
    gate: Tensor | None,
    shared_up: Tensor | None,
    shared_gate: Tensor | None,
    top_k: int,
    activation: str,
) -> tuple[Tensor, Tensor | None]:
    """h [R, N] in sorted order and shared h [T, M]: activation(x up^T), with a gate activation(x gate^T) (x up^T).

    Reads the N D elements of every expert that is hit, and again through L2 for each further tile of its rows; 2 R N D
    flops. At 16 tokens 68.6 of 128 experts of 1856 by 2688 in bf16, 684 MB, and the shared expert's 20 MB: 164 us at
    4.3 TB/s. From 120 rows an expert on rows are gathered first: 2 R D elements more, 5 % at 4096 tokens.
    """
    (T, D), (E, N), R = x.shape, up.shape[:2], len(order)
    sizes = Sizes.of(x, rows=R, experts=E, N=N, K=D, two=gate is not None)
    launch = up_launch(sizes)
    M = 0 if shared_up is None else len(shared_up)
    h, shared_h = x.new_empty(R, N), x.new_empty(T, M) if M else None
    listed, most = tiles(launch.BLOCK_T)
    n_tiles, m_tiles = triton.cdiv(N, launch.BLOCK_N), triton.cdiv(M, launch.BLOCK_N)
    shared_tiles = triton.cdiv(T, launch.BLOCK_T) * m_tiles
    rows = gathered(x, order, top_k) if launch.SORTED else x
    matrices = [stacked(w) for w in (up, gate, shared_up, shared_gate)]
    w_tma = all(by_tma(w, sizes.architecture) for w in matrices if w is not None)
    a_tma = bool(launch.SORTED) and by_tma(rows, sizes.architecture) and by_tma(x, sizes.architecture)
    up, gate, shared_up, shared_gate = (operand(w, w_tma, launch.BLOCK_N, launch.BLOCK_K) for w in matrices)
    rows, x = (operand(t, a_tma, launch.BLOCK_T, launch.BLOCK_K) for t in (rows, x))
    run(
        _experts_up_kernel,
        (launch_programs(launch, shared_tiles + most * n_tiles, sizes),),
        *(rows, up, gate, h, x, shared_up, shared_gate, shared_h, order, listed),
        *(T, top_k, D, N, M, shared_tiles),
        SHARED=M > 0,
        GATED=gate is not None,
        RELU2=activation == "relu2",
        A_TMA=a_tma,
        W_TMA=w_tma,
        launch=launch,
    )
    return h, shared_h


def rows_down(
    h: Tensor,
    h2: Tensor | None,
    order: Tensor,
    tiles: Tiles,
    down: Tensor,
    down2: Tensor | None,
    shared_h: Tensor | None,
    shared_h2: Tensor | None,
    shared_down: Tensor | None,
    shared_down2: Tensor | None,
    D: int,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y [R, D], every pair in its own row, and shared y [T, D]: h down^T; h down + h2 down2 where transposed.

    Reads weights as `rows_up` does, and 2 R N D flops, twice that with h2. 164 us at 16 tokens.

    In the persistent form, from 2560 tokens on, the shared expert is a launch of its own. In one grid its K of another
    length would keep the loops over tiles and over K from becoming one, which hides a tile's beginning and end. As two
    experts of width N = M / 2 it would fit in, and leave two rows a token to the sum instead of one: at 4096 tokens
    22 MB more, written and read again, 10 us. Alone it is 82 GFLOP, 352 tiles of 46 us: three rounds of 132 programs
    where 2.67 would do, 15 us, and four short launches, of 950 us in all. What is left to win is about 1 %."""
    R, N = h.shape
    sizes = Sizes.of(h, rows=R, experts=len(down), N=D, K=N, two=h2 is not None)
    launch = down_launch(sizes, transposed)
    shared_y = None
    if launch.PERSISTENT and shared_h is not None:
        each, every = torch.arange(len(shared_h), device=h.device), order.new_full((1,), len(shared_h)).int()
        one, one2 = shared_down[None], None if shared_down2 is None else shared_down2[None]
        alone = Tiles(every, len(each))
        shared_y, _ = rows_down(
            shared_h, shared_h2, each, alone, one, one2, None, None, None, None, D, transposed=transposed
        )
        shared_h = shared_h2 = shared_down = shared_down2 = None
    T, M = (0, 0) if shared_h is None else shared_h.shape
    y = h.new_empty(R, D)
    if M:
        shared_y = h.new_empty(T, D)
    listed, most = tiles(launch.BLOCK_T)
    d_tiles = triton.cdiv(D, launch.BLOCK_N)
    shared_tiles = triton.cdiv(T, launch.BLOCK_T) * d_tiles
    rows, matrices = (h, h2, shared_h, shared_h2), [stacked(w) for w in (down, down2, shared_down, shared_down2)]
    whole = not transposed or (N % launch.BLOCK_K == 0 and M % launch.BLOCK_K == 0)  # else a tile runs into the next
    w_tma = whole and all(by_tma(w, sizes.architecture) for w in matrices if w is not None)
    a_tma = all(by_tma(t, sizes.architecture) for t in rows if t is not None)
    h, h2, shared_h, shared_h2 = (operand(t, a_tma, launch.BLOCK_T, launch.BLOCK_K) for t in rows)
    block = (launch.BLOCK_K, launch.BLOCK_N) if transposed else (launch.BLOCK_N, launch.BLOCK_K)
    down, down2, shared_down, shared_down2 = (operand(w, w_tma, *block) for w in matrices)
    run(
        _experts_down_kernel,
        (launch_programs(launch, shared_tiles + most * d_tiles, sizes),),
        *(h, h2, down, down2, y, shared_h, shared_h2, shared_down, shared_down2, shared_y, order, listed),
        *(T, R, N, D, M, shared_tiles),
        SHARED=M > 0,
        TWO=h2 is not None,
        TRANSPOSED=transposed,
        A_TMA=a_tma,
        W_TMA=w_tma,
        launch=launch,
    )
    return y, shared_y


def experts_fwd(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    shared_up: Tensor | None,
    shared_down: Tensor | None,
    shared_gate: Tensor | None,
    order: Tensor,
    ends: Tensor,
    activation: str,
) -> Tensor:
    if len(order) != ids.numel():  # callers that are trusted, and graphs, have not been checked
        refuse("experts", "order", list(order.shape), f"T*K={ids.numel()} pairs")
    if len(ends) != len(up):
        refuse("experts", "ends", list(ends.shape), f"E={len(up)} of them")
    x, order, top_k, D = x.contiguous(), order.contiguous(), weights.shape[1], x.shape[1]
    tiles = Tiles(ends.contiguous(), len(order))
    h, shared_h = rows_up(x, order, tiles, up, gate, shared_up, shared_gate, top_k, activation)
    pairs, shared_y = rows_down(h, None, order, tiles, down, None, shared_h, None, shared_down, None, D)
    return combine(pairs, ids.contiguous(), weights.contiguous(), shared_y, x.new_empty(x.shape), len(up))
