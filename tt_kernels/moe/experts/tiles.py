"""What the experts' kernels share: the list of tiles, a tile's matrix product, the sum over a token's experts."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...lang import silu
from ...launch import Launch, run

# ---- kernels ----

# What callers list (order, ends) is not looked at by the host, which would wait for it. Places are cut to the rows and
# pairs that there are where they are read, so that a list that is wrong gives wrong numbers and nothing else.


@triton.jit
def end_of(ends_ptr, expert, mask, R):
    """Where an expert's rows end, as listed, within 0 to R."""
    return tl.minimum(tl.maximum(tl.load(ends_ptr + expert, mask=mask, other=0), 0), R).to(tl.int32)


@triton.jit
def pairs_of(order_ptr, rows, mask, R):
    """The pairs t * K + k of sorted rows, as listed, within 0 to R - 1."""
    return tl.minimum(tl.maximum(tl.load(order_ptr + rows, mask=mask, other=0), 0), R - 1).to(tl.int64)


@triton.jit
def _larger(start, end, other_start, other_end):
    return tl.maximum(start, other_start), tl.maximum(end, other_end)


@triton.jit
def _experts_schedule_kernel(
    ends_ptr,  # [E]: where each expert's rows end
    tiles_ptr,  # [1 + tiles] int64: the count, then expert << 41 | rows << 32 | first row, or -1
    R,
    E,
    tiles,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """Cut every expert's rows into tiles of BLOCK_T; tiles of one expert follow each other."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    start, end = end_of(ends_ptr, offs_e - 1, mask_e & (offs_e > 0), R), end_of(ends_ptr, offs_e, mask_e, R)
    start, end = tl.associative_scan((start, end), 0, _larger)  # ends never fall, so there are at most `tiles` tiles
    count = tl.where(mask_e, (end - start + BLOCK_T - 1) // BLOCK_T, 0)
    last = tl.cumsum(count, 0)  # [BLOCK_E] tiles up to and with this expert
    tile = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    before = (last[None, :] <= tile[:, None]) & mask_e[None, :]  # [BLOCK_TILES, BLOCK_E]
    expert = tl.sum(before.to(tl.int32), axis=1)
    own = expert[:, None] == offs_e[None, :]
    first = tl.sum(tl.where(own, (start - (last - count) * BLOCK_T)[None, :], 0), axis=1) + tile * BLOCK_T
    until = tl.sum(tl.where(own, end[None, :], 0), axis=1)
    rows = tl.minimum(until - first, BLOCK_T).to(tl.int64)
    entry = (expert.to(tl.int64) << 41) | (rows << 32) | first.to(tl.int64)
    tl.store(tiles_ptr + 1 + tile, tl.where(expert < E, entry, -1), mask=tile < tiles)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def find_tile(tiles_ptr, tile, T, DENSE: tl.constexpr, BLOCK_T: tl.constexpr):
    """(expert or -1, first row, end of its rows). DENSE: one expert sees all T rows and nothing is listed."""
    if DENSE:
        expert, first, end = tile * 0, tile * BLOCK_T, tile * 0 + T
    else:
        entry = tl.load(tiles_ptr + 1 + tile)  # one load: a program waits for it before anything else
        expert, first = (entry >> 41).to(tl.int32), entry.to(tl.int32)
        end = first + ((entry >> 32) & 511).to(tl.int32)
    return expert, first, end


# How a product runs, a tuple so that it travels as one argument.
# (A_TMA, W_TMA, TRANSPOSED, SWAP, BLOCK_T, BLOCK_N, BLOCK_K)


@triton.jit
def weight_tile(w, row, n0, k, N, K, MODE: tl.constexpr):
    """A tile of the matrix whose rows begin at `row`: [BLOCK_N, BLOCK_K] of [N, K]; [BLOCK_K, BLOCK_N] of [K, N] if
    TRANSPOSED. Outside of [N, K] it is 0 along K; along N it may be the next expert's."""
    W_TMA: tl.constexpr = MODE[1]
    TRANSPOSED: tl.constexpr = MODE[2]
    BLOCK_N: tl.constexpr = MODE[5]
    BLOCK_K: tl.constexpr = MODE[6]
    if W_TMA:
        tile = w.load([row + k, n0]) if TRANSPOSED else w.load([row + n0, k])
    else:
        offs_n, offs_k = n0 + tl.arange(0, BLOCK_N), k + tl.arange(0, BLOCK_K)
        if TRANSPOSED:
            at = w + (row + offs_k).to(tl.int64)[:, None] * N + offs_n[None, :]
            tile = tl.load(at, mask=(offs_k < K)[:, None] & (offs_n < N)[None, :], other=0.0)
        else:
            at = w + (row + offs_n).to(tl.int64)[:, None] * K + offs_k[None, :]
            tile = tl.load(at, mask=(offs_n < N)[:, None] & (offs_k < K)[None, :], other=0.0)
    return tile


@triton.jit
def dot_tile(a, w, acc, TRANSPOSED: tl.constexpr, SWAP: tl.constexpr):
    """acc + a w^T. SWAP: acc is [BLOCK_N, BLOCK_T], weights are the M operand of the tensor cores."""
    if SWAP:
        if TRANSPOSED:
            w = tl.trans(w)
        acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        if not TRANSPOSED:
            w = tl.trans(w)
        acc = tl.dot(a, w, acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def product(acc, second, a, w, w2, rows, mask_t, first, row, n0, N, K, TWO: tl.constexpr, MODE: tl.constexpr):
    """acc + a w^T, and second + a w2^T where TWO, for BLOCK_T rows of a and BLOCK_N rows of w.

    a: pointer of [*, K], read at `rows` [BLOCK_T] where mask_t; where A_TMA a descriptor, read from row `first` on.
    w, w2: pointers, or descriptors where W_TMA, of all experts' matrices; this one's begins at `row`.
    """
    A_TMA: tl.constexpr = MODE[0]
    TRANSPOSED: tl.constexpr = MODE[2]
    SWAP: tl.constexpr = MODE[3]
    BLOCK_K: tl.constexpr = MODE[6]
    for k in range(0, K, BLOCK_K):
        w_tile = weight_tile(w, row, n0, k, N, K, MODE)
        if A_TMA:
            a_tile = a.load([first, k])  # [BLOCK_T, BLOCK_K]
        else:
            offs_k = k + tl.arange(0, BLOCK_K)
            at = a + rows[:, None] * K + offs_k[None, :]
            a_tile = tl.load(at, mask=mask_t[:, None] & (offs_k < K)[None, :], other=0.0)
        acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP)
        if TWO:
            w2_tile = weight_tile(w2, row, n0, k, N, K, MODE)
            second = dot_tile(a_tile, w2_tile, second, TRANSPOSED, SWAP)
    return acc, second


@triton.jit
def activate(h, RELU2: tl.constexpr):
    if RELU2:
        h = tl.maximum(h, 0, propagate_nan=tl.PropagateNan.ALL)
        h = h * h
    else:
        h = silu(h)
    return h


@triton.jit
def _experts_combine_kernel(
    pairs_ptr,  # [T * K, D]
    ids_ptr,  # [T, K]: pairs of ids that are not 0 to E - 1 have not been written
    weights_ptr,  # [T, K], or None: 1
    shared_ptr,  # [T, D] or None
    y_ptr,  # [T, D]
    E,
    D,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y_t = sum_k weights[t, k] pairs[t, k] + shared_t, in the order of k. Pairs and shared_t have been rounded to the
    dtype of x, as in the reference; their sum is once more."""
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = offs_d < D
    acc = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    if WEIGHTED:
        acc = tl.float64 if weights_ptr.dtype.element_ty == tl.float64 else acc
    y = tl.zeros((BLOCK_D,), dtype=acc)
    for k in tl.static_range(K):  # unrolled: all K rows are on their way at once
        expert = tl.load(ids_ptr + t * K + k)
        columns = tl.where(tl.where(expert < 0, E, expert) < E, D, 0)  # that this pair has
        pair = tl.load(pairs_ptr + (t * K + k) * D + offs_d, mask=offs_d < columns, other=0.0).to(acc)
        if WEIGHTED:
            pair *= tl.load(weights_ptr + t * K + k, mask=columns > 0, other=0.0).to(acc)
        y += pair
    if SHARED:
        y += tl.load(shared_ptr + t * D + offs_d, mask=mask, other=0.0).to(acc)
    tl.store(y_ptr + t * D + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


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


def power(size: int, least: int, most: int) -> int:
    """The tile for a dimension of this size: no larger than it needs to be."""
    return min(max(triton.next_power_of_2(size), least), most)
