"""Inside the router's kernels: products, the choice (route_choice.py), the sorted lists."""

import triton
import triton.language as tl

from ..runtime.lang import programmatic_launch
from ..runtime.launch import INTERPRET
from .route_choice import bias_of, choose, columns

_INTERPRET = tl.constexpr(INTERPRET)

_LONG = tl.constexpr(2.0**40)  # the square of 2^20: of longer rows no bound of errors is known

_TINY = tl.constexpr(2.0**-24)  # what squares, parts and products below the smallest numbers add up to in shorter ones


@triton.jit
def widen(x):
    """x in fp64. From 16 bits in assembly: Triton 3.6 lays the fp64 operands of a dot out by the width that they were
    loaded with, which it cannot do at 16 bits, and looks through any conversion that it understands."""
    if _INTERPRET or x.dtype.primitive_bitwidth > 16:
        return x.to(tl.float64)
    return tl.inline_asm_elementwise(
        "cvt.f64.f32 $0, $1;", "=d,f", [x.to(tl.float32)], dtype=tl.float64, is_pure=False, pack=1
    )


@triton.jit
def leading(x):
    """The first 8 bits of fp32 numbers: the rest is cut off."""
    return (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def halved(x):
    """As bf16, in which x has a place. The interpreter, whose products of bf16 are wrong, keeps fp32."""
    return x if _INTERPRET else x.to(tl.bfloat16)


@triton.jit
def sum_of_slices(acc, M: tl.constexpr, N: tl.constexpr):
    """[M, N] from [SLICES, M, N], each warp's a slice. By pairs: a sum over the first axis takes a barrier for each
    number that a thread holds."""
    acc = tl.permute(acc, (1, 2, 0))
    if acc.shape[2] == 8:
        a, b = tl.split(tl.reshape(acc, (M, N, 4, 2)))
        acc = a + b
    if acc.shape[2] == 4:
        a, b = tl.split(tl.reshape(acc, (M, N, 2, 2)))
        acc = a + b
    a, b = tl.split(acc)
    return a + b


@triton.jit
def _split_product(
    given, t, mask_t, e, mask_e, start, end, SLICES: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """weight x^T over start <= d < end, each warp a slice of every SLICES * BLOCK_D columns: [experts, tokens] fp64.

    Experts are the rows: Hopper's fp64 tensor cores take 16 rows and 8 columns, and there may be one token."""
    d = tl.arange(0, SLICES)[:, None, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]
    x_ptrs = given.x + t.to(tl.int64)[None, :, None] * given.stride_x + d
    w_ptrs = given.weight + e.to(tl.int64)[None, :, None] * given.stride_w + d
    acc = tl.zeros((SLICES, e.shape[0], t.shape[0]), dtype=tl.float64)
    for offset in range(start, end, SLICES * BLOCK_D):
        mask_d = offset + d < given.D
        x = tl.load(x_ptrs + offset, mask=mask_t[None, :, None] & mask_d, other=0.0)
        w = tl.load(w_ptrs + offset, mask=mask_e[None, :, None] & mask_d, other=0.0)
        acc = tl.dot(widen(w), tl.permute(widen(x), (0, 2, 1)), acc, out_dtype=tl.float64)
    return sum_of_slices(acc, e.shape[0], t.shape[0])


@triton.jit
def _sort_pairs(
    out, rank_ptr, counts_ptr, T, E, tiles, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_TILES: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """Sorted lists from every tile's counts and every pair's rank in its tile. Past the first cache: other programs
    have only just written them."""
    e = tl.arange(0, BLOCK_E)
    tile = tl.arange(0, BLOCK_TILES)[:, None]
    mask = (tile < tiles) & (e < E)[None, :]
    counts = tl.load(counts_ptr + tile * E + e[None, :], mask=mask, other=0, cache_modifier=".cg")
    total = tl.sum(counts, axis=0)
    ends = tl.cumsum(total, axis=0)
    tl.store(out.offsets + e, ends, mask=e < E)
    first = (ends - total)[None, :] + tl.cumsum(counts, axis=0) - counts  # [BLOCK_TILES, BLOCK_E]: a tile's first place
    pair = tl.arange(0, BLOCK_PAIRS)
    mask_pair = pair < T * TOP_K
    expert = tl.load(out.topk_ids + pair, mask=mask_pair, other=0, cache_modifier=".cg").to(tl.int32)
    rank = tl.load(rank_ptr + pair, mask=mask_pair, other=0, cache_modifier=".cg")
    at = tl.where(mask_pair, pair // (BLOCK_T * TOP_K) * BLOCK_E + expert, 0)
    place = tl.gather(tl.reshape(first, (BLOCK_TILES * BLOCK_E,)), at, axis=0) + rank
    tl.store(out.sorted_pairs + place, pair.to(tl.int64), mask=mask_pair)


@triton.jit
def ones(bits):
    """How many of the lowest 16 bits are set."""
    bits -= (bits >> 1) & 0x5555
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def at_columns(values, column):
    """[R, BLOCK_K] from values [H, C]."""
    flat = tl.reshape(values, (values.shape[0] * values.shape[1],))
    return tl.reshape(tl.gather(flat, tl.reshape(column, (column.shape[0] * column.shape[1],)), axis=0), column.shape)


@triton.jit
def before(bits, R: tl.constexpr):
    """Of each row's bits [R, BLOCK_K] those of the tokens before it."""
    return ones(bits & ((1 << tl.arange(0, R)) - 1)[:, None])


@triton.jit
def _list_pairs(
    pair, paired, column, bits, tile, tiles, rows, tickets_ptr, rank_ptr, counts_ptr, out, T, E, CHOICE: tl.constexpr,
    LISTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    """What `choose` returned, into the sorted lists. LISTS: this tile is all (2), the last tile's program makes them
    (1), other launches do (0)."""
    expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
    counts = ones(bits)
    if LISTS == 2:
        ends = tl.reshape(tl.cumsum(tl.reshape(counts, (CHOICE.BLOCK_P,)), axis=0), counts.shape)
        tl.store(out.offsets + expert, ends, mask=real)
        found = at_columns((ends - counts) << 16 | bits, column)
        tl.store(out.sorted_pairs + (found >> 16) + before(found, BLOCK_T), pair.to(tl.int64), mask=paired)
    else:
        tl.store(rank_ptr + pair, before(at_columns(bits, column), BLOCK_T), mask=paired)
        tl.store(counts_ptr + tile * E + expert, counts, mask=real)
    if LISTS == 1:
        tl.debug_barrier()  # all of this program's stores come before its ticket
        if tl.atomic_add(tickets_ptr + tiles, 1) == tiles - 1:
            tl.store(tickets_ptr + tiles, 0)
            _sort_pairs(
                *(out, rank_ptr, counts_ptr, T, E, tiles),
                *(CHOICE.TOP_K, BLOCK_T, CHOICE.BLOCK_P, BLOCK_TILES, BLOCK_PAIRS),
            )


@triton.jit(do_not_specialize=["T"])
def _route_few_kernel(
    given,  # Given: its parts of logits [SPLITS, T, E] are written here
    tickets_ptr,  # one for each tile and one for the tiles, 0 before and after
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    out,  # Outputs
    T,
    E,
    CHOICE: tl.constexpr,  # Choice
    LISTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SLICES: tl.constexpr,
    SPLITS: tl.constexpr,
):
    programmatic_launch()
    tile, split, tiles, D = tl.program_id(0), tl.program_id(2), tl.num_programs(0), given.D
    # The tensor cores take 8 tokens at least.
    r = tl.arange(0, BLOCK_T if BLOCK_T > 8 else 8)
    t = tile * BLOCK_T + r
    mask_t = (r < BLOCK_T) & (t < T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    depth = tl.cdiv(tl.cdiv(D, SLICES * BLOCK_D), SPLITS) * SLICES * BLOCK_D
    start, end = split * depth, min((split + 1) * depth, D)
    part = _split_product(given, t, mask_t, e, e < E, start, end, SLICES, BLOCK_D)
    at = (split * T + t)[None, :] * E + e[:, None]
    mask = mask_t[None, :] & (e < E)[:, None]
    tl.store(given.exact + at, part, mask=mask)
    tl.store(given.rounded + at, part.to(tl.float32), mask=mask)
    bias = bias_of(given.bias, E, CHOICE)  # here: the program that comes last need not wait for it
    tl.debug_barrier()  # all of this program's stores come before its ticket
    if tl.atomic_add(tickets_ptr + tile, 1) == tl.num_programs(1) * SPLITS - 1:
        tl.store(tickets_ptr + tile, 0)
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        error = tl.zeros((BLOCK_T,), dtype=tl.float32)
        pair, paired, column, bits = choose(given, error, bias, tile, rows, out, T, E, CHOICE, SPLITS, 0)
        _list_pairs(
            *(pair, paired, column, bits, tile, tiles, rows, tickets_ptr, rank_ptr, counts_ptr, out, T, E, CHOICE),
            *(LISTS, BLOCK_T, BLOCK_TILES, BLOCK_PAIRS),
        )


@triton.jit(do_not_specialize=["T"])
def _route_scores_kernel(
    given,  # Given: its parts of logits [SPLITS, T, E] are written here
    T,
    E,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    programmatic_launch()
    D = given.D
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    x_ptrs = given.x + rows.to(tl.int64)[:, None] * given.stride_x + d[None, :]
    w_ptrs = given.weight + e.to(tl.int64)[:, None] * given.stride_w + d[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.float64)
    for offset in range(0, D, BLOCK_D):
        mask_d = (offset + d < D)[None, :]
        x = tl.load(x_ptrs + offset, mask=(rows < T)[:, None] & mask_d, other=0.0)
        w = tl.load(w_ptrs + offset, mask=(e < E)[:, None] & mask_d, other=0.0)
        acc = tl.dot(widen(x), tl.trans(widen(w)), acc, out_dtype=tl.float64)
    mask = (rows < T)[:, None] & (e < E)[None, :]
    at = rows.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(given.exact + at, acc, mask=mask)
    tl.store(given.rounded + at, acc.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["T"])
def _route_halves_kernel(
    given,  # Given: its parts of logits [SPLITS, T, E] and its squares are written here
    T,
    E,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """x of 16 bits: weight is a sum of three parts of 8 bits, of its sign, whose products with x are exact. BLOCK_D of
    them are summed by tensor cores at a time: `error_of_halves` says how far off that is."""
    programmatic_launch()
    D, split = given.D, tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    x_ptrs = given.x + rows.to(tl.int64)[:, None] * given.stride_x + d[None, :]
    w_ptrs = given.weight + e.to(tl.int64)[:, None] * given.stride_w + d[None, :]
    depth = tl.cdiv(tl.cdiv(D, BLOCK_D), SPLITS) * BLOCK_D
    total = tl.zeros((BLOCK_E, BLOCK_T), dtype=tl.float32)
    of_x = tl.zeros((BLOCK_T,), dtype=tl.float32)  # sums of squares
    of_w = tl.zeros((BLOCK_E,), dtype=tl.float32)
    for offset in range(split * depth, min((split + 1) * depth, D), BLOCK_D):
        mask_d = (offset + d < D)[None, :]
        x = tl.load(x_ptrs + offset, mask=(rows < T)[:, None] & mask_d, other=0.0)
        w = tl.load(w_ptrs + offset, mask=(e < E)[:, None] & mask_d, other=0.0).to(tl.float32)
        high = leading(w)
        rest = w - high
        middle = leading(rest)
        halves = tl.trans(halved(x))
        acc = tl.dot(halved(rest - middle), halves)
        acc = tl.dot(halved(middle), halves, acc)
        total += tl.dot(halved(high), halves, acc)
        wide = x.to(tl.float32)
        of_x += tl.sum(wide * wide, axis=1)
        of_w += tl.sum(w * w, axis=1)
    mask = (rows < T)[None, :] & (e < E)[:, None]
    tl.store(given.rounded + (split * T + rows).to(tl.int64)[None, :] * E + e[:, None], total, mask=mask)
    squares_ptr = given.squares + split * (T + E)
    tl.store(squares_ptr + rows, of_x, mask=rows < tl.where(tl.program_id(1) == 0, T, 0))
    tl.store(squares_ptr + T + e, of_w, mask=e < tl.where(tl.program_id(0) == 0, E, 0))


@triton.jit(do_not_specialize=["T"])
def _route_choose_kernel(
    given,  # Given
    tickets_ptr,  # one for the tiles at [tiles], 0 before and after
    rank_ptr,  # [T, K]: how many pairs of the tile with the same expert come before
    counts_ptr,  # [tiles, E]: pairs of a tile by expert
    out,  # Outputs
    T,
    E,
    CHOICE: tl.constexpr,  # Choice
    SPLITS: tl.constexpr,
    ERROR: tl.constexpr,  # of logits in fp32, over the product of the rows' lengths; 0: they are in fp64 too
    LISTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    programmatic_launch()
    tile = tl.program_id(0)
    rows = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    error = tl.zeros((BLOCK_T,), dtype=tl.float32)
    if ERROR > 0:
        expert, real = columns(E, CHOICE.GROUPS, CHOICE.BLOCK_N, CHOICE.BLOCK_P)
        of_w = tl.zeros(expert.shape, dtype=tl.float32)
        for s in tl.static_range(SPLITS):
            error += tl.load(given.squares + s * (T + E) + rows, mask=rows < T, other=0.0)
            of_w += tl.load(given.squares + s * (T + E) + T + expert, mask=real, other=0.0)
        most = tl.max(tl.max(of_w, axis=1), axis=0)
        bound = ERROR * tl.sqrt(error) * tl.sqrt(most) + _TINY
        error = tl.where(tl.maximum(error, most) < _LONG, bound, float("inf"))
    bias = bias_of(given.bias, E, CHOICE)
    pair, paired, column, bits = choose(given, error, bias, tile, rows, out, T, E, CHOICE, SPLITS, ERROR > 0)
    _list_pairs(
        *(pair, paired, column, bits, tile, tl.num_programs(0), rows, tickets_ptr, rank_ptr, counts_ptr, out, T, E),
        *(CHOICE, LISTS, BLOCK_T, BLOCK_TILES, BLOCK_PAIRS),
    )


@triton.jit(do_not_specialize=["tiles"])
def _route_scan_kernel(
    counts_ptr,  # [tiles, E]: becomes the pairs of the same expert in the tiles before
    total_ptr,  # [E]
    tiles,
    E,
    BLOCK_TILES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    programmatic_launch()
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


@triton.jit(do_not_specialize=["pairs"])
def _route_scatter_kernel(
    out,  # Outputs
    rank_ptr,  # [T, K]
    before_ptr,  # [tiles, E]
    total_ptr,  # [E]
    pairs,
    per_tile,
    E,
    BLOCK_E: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    programmatic_launch()
    e = tl.arange(0, BLOCK_E)
    total = tl.load(total_ptr + e, mask=e < E, other=0)
    ends = tl.cumsum(total, axis=0)
    if tl.program_id(0) == 0:
        tl.store(out.offsets + e, ends, mask=e < E)
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    mask = pair < pairs
    expert = tl.load(out.topk_ids + pair, mask=mask, other=0)
    rank = tl.load(rank_ptr + pair, mask=mask, other=0)
    before = tl.load(before_ptr + pair // per_tile * E + expert, mask=mask, other=0)
    place = tl.gather(ends - total, expert.to(tl.int32), axis=0) + before + rank
    tl.store(out.sorted_pairs + place, pair, mask=mask)
