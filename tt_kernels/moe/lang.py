"""What the experts' kernels share: the list of tiles, a tile's matrix product, the sum over a token's experts."""

import triton
import triton.language as tl

from ..runtime.lang import silu

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
