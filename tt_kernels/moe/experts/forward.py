"""Forward of the experts: rows times up with the activation, times down, and the sum over a token's experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core import refuse
from ...launch import run
from .launches import Sizes, down_launch, launch_programs, up_launch
from .tiles import Tiles, activate, by_tma, combine, find_tile, operand, pairs_of, product, stacked

# ---- kernels ----

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


# ---- launches ----


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
