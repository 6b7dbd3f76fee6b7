"""What the experts' kernels share: the list of tiles, a tile's matrix product, the sum over a token's experts."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..runtime.lang import sigmoid

ABSENT = 1  # An operand that is not there. None in a NamedTuple stops Triton 3.6 at the next branch; 1 is a constexpr.


class Operands(NamedTuple):
    """What a tile's program multiplies, and where the result goes: tensors, or descriptors of a, a2, w and w2.

    Kernels take the parts one by one: Triton 3.6 cannot launch a descriptor inside a tuple."""

    a: Any  # rows of [*, K]
    w: Any  # all experts' [N, K], or [K, N] where transposed, as rows of one matrix
    w2: Any = ABSENT
    a2: Any = ABSENT
    out: Any = ABSENT
    step: Any = 0  # rows from an expert's first one to the next expert's, of w and of w2


# The host does not look at a caller's sorted_pairs and offsets: it would wait for the device. Kernels clamp what they
# read to the rows and pairs that there are, so wrong lists give wrong numbers and touch no other memory.


@triton.jit
def end_of(offsets_ptr, expert, mask, R):
    """Where an expert's rows end, as listed, within 0 to R."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + expert, mask=mask, other=0), 0), R).to(tl.int32)


@triton.jit
def pairs_of(sorted_pairs_ptr, rows, mask, R):
    """The pairs t * K + k of sorted rows, as listed, within 0 to R - 1."""
    return tl.minimum(tl.maximum(tl.load(sorted_pairs_ptr + rows, mask=mask, other=0), 0), R - 1).to(tl.int64)


@triton.jit
def search_tile(offsets_ptr, tile, R, E, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """The entry of this tile in the list, as `_experts_schedule_kernel` writes it, from where the experts' rows end."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    start, end = end_of(offsets_ptr, offs_e - 1, mask_e & (offs_e > 0), R), end_of(offsets_ptr, offs_e, mask_e, R)
    count = (tl.maximum(end - start, 0) + BLOCK_T - 1) // BLOCK_T  # [BLOCK_E]
    within = tile - (tl.cumsum(count, 0) - count)  # which of each expert's tiles it would be
    first = start + within * BLOCK_T
    rows = tl.minimum(end - first, BLOCK_T).to(tl.int64)
    entry = (offs_e.to(tl.int64) << 41) | (rows << 32) | first.to(tl.int64)
    return tl.sum(tl.where((within >= 0) & (within < count), entry + 1, 0), axis=0) - 1


@triton.jit
def find_tile(
    tiles_ptr, tile, T, DENSE: tl.constexpr, BLOCK_T: tl.constexpr, R=0, E=0, BLOCK_E: tl.constexpr = 0
):  # fmt: skip
    """(expert or -1, first row, end of its rows). DENSE: one expert sees all T rows and nothing is listed. BLOCK_E: no
    list is there either, tiles_ptr are the offsets of E experts with R rows in all."""
    if DENSE:
        expert, first, end = tile * 0, tile * BLOCK_T, tile * 0 + T
    else:
        # One load either way: a program waits for it before anything else.
        entry = search_tile(tiles_ptr, tile, R, E, BLOCK_T, BLOCK_E) if BLOCK_E else tl.load(tiles_ptr + 1 + tile)
        expert, first = (entry >> 41).to(tl.int32), entry.to(tl.int32)
        end = first + ((entry >> 32) & 511).to(tl.int32)
    return expert, first, end


@triton.jit
def weight_tile(w, row, n0, k, N, K, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the matrix whose rows begin at `row`: [BLOCK_N, BLOCK_K] of [N, K]; [BLOCK_K, BLOCK_N] of [K, N] if
    TRANSPOSED. Outside of [N, K] it is 0 along K; along N it may be the next expert's."""
    if isinstance(w, tl.tensor_descriptor):
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
def product(
    acc, second, a, w, w2, rows, mask_t, first, row, n0, N, K, TWO: tl.constexpr, TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + a w^T, and second + a w2^T where TWO, for BLOCK_T rows of a and BLOCK_N rows of w.

    a: pointer of [*, K], read at `rows` [BLOCK_T] where mask_t, or descriptor, read from row `first` on.
    w, w2: pointers or descriptors of all experts' matrices; this one's begins at `row`.
    """
    for k in range(0, K, BLOCK_K):
        w_tile = weight_tile(w, row, n0, k, N, K, TRANSPOSED, BLOCK_N, BLOCK_K)
        if isinstance(a, tl.tensor_descriptor):
            a_tile = a.load([first, k])  # [BLOCK_T, BLOCK_K]
        else:
            offs_k = k + tl.arange(0, BLOCK_K)
            at = a + rows[:, None] * K + offs_k[None, :]
            a_tile = tl.load(at, mask=mask_t[:, None] & (offs_k < K)[None, :], other=0.0)
        acc = dot_tile(a_tile, w_tile, acc, TRANSPOSED, SWAP)
        if TWO:
            w2_tile = weight_tile(w2, row, n0, k, N, K, TRANSPOSED, BLOCK_N, BLOCK_K)
            second = dot_tile(a_tile, w2_tile, second, TRANSPOSED, SWAP)
    return acc, second


# `ACTIVATIONS` of reference/moe.py, with the derivatives: where no backward asks for one it costs nothing.


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """(act(h), act'(h))"""
    if ACTIVATION == "relu2":
        h = tl.maximum(h, 0, propagate_nan=tl.PropagateNan.ALL)
        a, da = h * h, 2 * h
    elif ACTIVATION == "gelu":
        p = 0.5 + 0.5 * tl.erf(0.7071067811865476 * h)  # of a normal number below h
        a, da = h * p, p + h * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h))
    elif ACTIVATION == "gelu_pytorch_tanh":
        s = sigmoid(1.5957691216057308 * h * (1 + 0.044715 * h * h))  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        a, da = h * s, s + h * (s * (1 - s)) * (1.5957691216057308 * (1 + 0.134145 * h * h))
    else:
        tl.static_assert(ACTIVATION == "silu", "an activation without a kernel")
        s = sigmoid(h)
        a, da = h * s, s * (1 + h * (1 - s))
    return a, da


# Tall tiles: a BLOCK_T that is no power of two is 3/2 of one, groups of rows that meet each tile of weights together.
# 192 rows by 256 columns are as many sums as 8 warps can hold, and take a quarter fewer bytes from the L2 cache for
# each product than 128 by 256. An expert's last tile takes one of five heights, so that little is filled up; up to a
# sixth more than BLOCK_T, in two times half the columns, so that few rows make no tile of their own.


@triton.jit
def _rows_of_pairs(sorted_pairs_ptr, is_shared, rows, mask, R, top_k, SHARED: tl.constexpr):
    """Of sorted rows: their tokens, or, where top_k is 1, their pairs. The shared expert's rows are tokens."""
    mask_pairs = mask
    if SHARED:
        mask_pairs = mask & (not is_shared)
    at = (pairs_of(sorted_pairs_ptr, rows, mask_pairs, R).to(tl.int32) // top_k).to(tl.int64)
    if SHARED:
        at = tl.where(is_shared, rows, at)
    return at


@triton.jit
def _tall_sums(
    sums, out, sorted_pairs_ptr, is_shared, first, end, n0, N, R, START: tl.constexpr, ROWS: tl.constexpr,
    SWAP: tl.constexpr, UP: tl.constexpr, SHARED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores one group of rows: in sorted order with the activation where UP, else where their pairs are."""
    r = START + tl.arange(0, ROWS)
    mask = r < end - first
    if UP:
        sums, _ = activate(sums, ACTIVATION)
        to = (out + first.to(tl.int64) * N) + r[:, None] * N  # one address and small numbers: registers are short
    else:
        rows = first.to(tl.int64) + r
        to = out + _rows_of_pairs(sorted_pairs_ptr, is_shared, rows, mask, R, 1, SHARED)[:, None] * N
    if SWAP:
        sums = tl.trans(sums)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    tl.store(to + offs_n[None, :], sums.to(out.dtype.element_ty), mask=mask[:, None] & (offs_n < N)[None, :])


@triton.jit
def _tall_at(
    a, sorted_pairs_ptr, is_shared, first, end, K, R, top_k, UP: tl.constexpr, SHARED: tl.constexpr,
    START: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Where one group's rows begin, and which there are."""
    r = START + tl.arange(0, ROWS)
    mask = r < end - first
    if UP:
        rows = first.to(tl.int64) + r
        at = a + _rows_of_pairs(sorted_pairs_ptr, is_shared, rows, mask, R, top_k, SHARED) * K
    else:
        at = (a + first.to(tl.int64) * K) + r * K
    return at, mask


@triton.jit
def _tall_rows(
    a, w, out, sorted_pairs_ptr, is_shared, first, end, row, n0, N, K, R, top_k, UP: tl.constexpr, SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, TOP: tl.constexpr, LOW: tl.constexpr, REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """TOP rows from `first` on, LOW below them and REST below those, either maybe 0. REST are the products' N: 32 are
    too few for M."""
    given = (sorted_pairs_ptr, is_shared, first, end)
    at, mask = _tall_at(a, *given, K, R, top_k, UP, SHARED, 0, TOP)
    sums = tl.zeros((TOP, BLOCK_N), dtype=tl.float32)
    if LOW > 0:
        low_at, low_mask = _tall_at(a, *given, K, R, top_k, UP, SHARED, TOP, LOW)
        low = tl.zeros((LOW, BLOCK_N), dtype=tl.float32)
    if REST > 0:
        rest_at, rest_mask = _tall_at(a, *given, K, R, top_k, UP, SHARED, TOP + LOW, REST)
        rest = tl.zeros((BLOCK_N, REST), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        w_tile = weight_tile(w, row, n0, k, N, K, TRANSPOSED, BLOCK_N, BLOCK_K)
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = (offs_k < K)[None, :]
        a_tile = tl.load(at[:, None] + offs_k[None, :], mask=mask[:, None] & mask_k, other=0.0)
        sums = dot_tile(a_tile, w_tile, sums, TRANSPOSED, False)
        if LOW > 0:
            a_tile = tl.load(low_at[:, None] + offs_k[None, :], mask=low_mask[:, None] & mask_k, other=0.0)
            low = dot_tile(a_tile, w_tile, low, TRANSPOSED, False)
        if REST > 0:
            a_tile = tl.load(rest_at[:, None] + offs_k[None, :], mask=rest_mask[:, None] & mask_k, other=0.0)
            rest = dot_tile(a_tile, w_tile, rest, TRANSPOSED, True)
    _tall_sums(sums, out, *given, n0, N, R, 0, TOP, False, UP, SHARED, ACTIVATION, BLOCK_N)
    if LOW > 0:
        _tall_sums(low, out, *given, n0, N, R, TOP, LOW, False, UP, SHARED, ACTIVATION, BLOCK_N)
    if REST > 0:
        _tall_sums(rest, out, *given, n0, N, R, TOP + LOW, REST, True, UP, SHARED, ACTIVATION, BLOCK_N)


@triton.jit
def tall_tile(
    routed, shared, sorted_pairs_ptr, is_shared, expert, first, end, n, N, K, R, top_k, UP: tl.constexpr,
    SHARED: tl.constexpr, ACTIVATION: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of a product [*, K] by an expert's [N, K]: up with the activation, or down, back in the pairs' order.

    w2 of the operands is w again, as a descriptor of half as many columns."""
    a, w, half, out = routed.a, routed.w, routed.w2, routed.out
    if SHARED and is_shared:
        a, w, half, out = shared.a, shared.w, shared.w2, shared.out
    if SHARED:  # whose rows end with the last token
        end = tl.where(is_shared, tl.minimum(end, first + BLOCK_T), end)
    n0 = n * BLOCK_N
    LOW: tl.constexpr = BLOCK_T // 3
    HALF: tl.constexpr = BLOCK_N // 2
    given = (out, sorted_pairs_ptr, is_shared, first, end, expert * routed.step)
    more = (N, K, R, top_k)
    if (end - first > BLOCK_T) | (n0 + HALF >= N):
        for m in range(n0, tl.minimum(n0 + BLOCK_N, N), HALF):
            _tall_rows(
                a, half, *given, m, *more, UP, SHARED, ACTIVATION, TRANSPOSED, 2 * LOW, LOW, LOW // 2, HALF, BLOCK_K
            )
    elif end - first > 2 * LOW + LOW // 2:
        _tall_rows(a, w, *given, n0, *more, UP, SHARED, ACTIVATION, TRANSPOSED, 2 * LOW, LOW, 0, BLOCK_N, BLOCK_K)
    elif end - first > 2 * LOW:
        _tall_rows(a, w, *given, n0, *more, UP, SHARED, ACTIVATION, TRANSPOSED, 2 * LOW, 0, LOW // 2, BLOCK_N, BLOCK_K)
    elif end - first > LOW:
        _tall_rows(a, w, *given, n0, *more, UP, SHARED, ACTIVATION, TRANSPOSED, 2 * LOW, 0, 0, BLOCK_N, BLOCK_K)
    else:
        _tall_rows(a, w, *given, n0, *more, UP, SHARED, ACTIVATION, TRANSPOSED, LOW, 0, 0, BLOCK_N, BLOCK_K)
