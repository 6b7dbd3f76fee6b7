"""What the kernels that sample share: settings of rows, a tile of logits folded into its rows' records, their sum.

A record says of one row and one part of the vocabulary: the largest logit m and s = sum(exp(logit - m)) for the
confidence, the best score (at a temperature above 0 with its noise), its token and that token's own logit. Records are
combined in the order of the vocabulary, so equal scores go to the lowest token and two runs are equal bit for bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..lang import gumbel_tile
from ..launch import Launch, run

# ---- kernels ----

LARGEST32 = tl.constexpr(3.4028234663852886e38)
LARGEST64 = tl.constexpr(1.7976931348623157e308)


@triton.jit
def is_any_hot(row, mask, L, temperature_ptr):
    """Whether one of the rows is above temperature 0; a row's settings are those of its sequence of L."""
    hot = tl.load(temperature_ptr + row // L, mask=mask, other=0.0) > 0
    return tl.max(hot.to(tl.int32), axis=0) > 0


@triton.jit
def empty_record(start, N: tl.constexpr, dtype: tl.constexpr):
    """m, s, best, token, raw of N rows before the first tile, which begins at token start."""
    m = tl.full((N,), float("-inf"), dtype=dtype)
    return m, tl.zeros((N,), dtype=dtype), m, tl.zeros((N,), dtype=tl.int32) + start, m


@triton.jit
def order(score, WIDE: tl.constexpr):
    """Numbers in the order of torch.max, where NaN is above inf: inf for NaN, the largest finite number for inf."""
    limited = tl.minimum(score, LARGEST64 if WIDE else LARGEST32)
    return tl.where(score == score, limited, float("inf"))


@triton.jit
def fold(
    x,  # [BLOCK_V, rows]: logits of tokens from start on, fp32 or fp64
    start,
    m,  # [rows]: the record so far, as the next four
    s,
    best,
    token,
    raw,
    any_hot,
    row,  # [rows]
    mask,  # [rows]: which of them there are
    L,
    temperature_ptr,  # of row // L, as seed, position and step
    seed_ptr,
    position_ptr,
    step_ptr,
    least_ptr,  # [rows]: what may be sampled, where NARROW
    last_ptr,
    V,
    suppress,
    NARROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    local = tl.arange(0, BLOCK_V)[:, None]
    ids = start + local
    x = tl.where((ids < V) & (ids != suppress), x, float("-inf"))
    WIDE: tl.constexpr = x.dtype == tl.float64
    if any_hot:
        # Loaded here and not before: in registers they would be in the way of the products.
        b = row // L
        temperature = tl.load(temperature_ptr + b, mask=mask, other=0.0).to(x.dtype)
        seed = tl.load(seed_ptr + b, mask=mask, other=0)
        position = tl.load(position_ptr + b, mask=mask, other=0) + row % L
        step = tl.load(step_ptr + b, mask=mask, other=0)
        hot = temperature > 0
        divisor = tl.where(hot, temperature, 1.0)[None, :] + tl.zeros_like(x)
        scaled = x / divisor if WIDE else tl.div_rn(x, divisor)
        score = scaled + gumbel_tile(seed, position, step, start, BLOCK_V, WIDE)
        if NARROW:
            least = tl.load(least_ptr, mask=mask, other=0.0)
            last = tl.load(last_ptr, mask=mask, other=0)
            out = (scaled < least[None, :]) | ((scaled == least[None, :]) & (ids > last[None, :]))
            score = tl.where(out, float("-inf"), score)
        tile_best, at = tl.max(order(tl.where(hot[None, :], score, x), WIDE), axis=0, return_indices=True)
        tile_raw = tl.sum(tl.where(local == at[None, :], x, 0.0), axis=0)
        tile_m = tl.max(x, axis=0)
    else:
        tile_best, at = tl.max(order(x, WIDE), axis=0, return_indices=True)
        tile_raw = tl.where(tile_best >= LARGEST64 if WIDE else tile_best >= LARGEST32, float("inf"), tile_best)
        tile_m = tile_raw
    m_new = tl.maximum(m, tile_m)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # -inf - -inf is no number
    # The difference first: what is rounded then is as small as the term is.
    tile_s = tl.sum(tl.exp2((x - shift[None, :]) * 1.4426950408889634), axis=0)
    s = s * tl.exp2((m - shift) * 1.4426950408889634) + tile_s
    better = tile_best > best
    best = tl.where(better, tile_best, best)
    return m_new, s, best, tl.where(better, start + at, token), tl.where(better, tile_raw, raw)


@triton.jit
def write_record(stats_ptr, token_ptr, row, mask, part, parts, plane, m, s, best, token, raw):
    """stats [4, N, parts]: m, s, best, raw; token [N, parts]; plane = N * parts."""
    at = row.to(tl.int64) * parts + part
    tl.store(stats_ptr + at, m, mask=mask)
    tl.store(stats_ptr + plane + at, s, mask=mask)
    tl.store(stats_ptr + 2 * plane + at, best, mask=mask)
    tl.store(stats_ptr + 3 * plane + at, raw, mask=mask)
    tl.store(token_ptr + at, token, mask=mask)


@triton.jit
def combine(stats_ptr, token_ptr, row, mask, parts, plane, BLOCK_S: tl.constexpr):
    """Token and confidence of rows [n] from all their records."""
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    at = row.to(tl.int64)[:, None] * parts + offs_s  # [n, BLOCK_S]
    mask = mask[:, None] & (offs_s < parts)
    m = tl.load(stats_ptr + at, mask=mask, other=float("-inf"))
    s = tl.load(stats_ptr + plane + at, mask=mask, other=0.0)
    best = tl.load(stats_ptr + 2 * plane + at, mask=mask, other=float("-inf"))
    raw = tl.load(stats_ptr + 3 * plane + at, mask=mask, other=0.0)
    token = tl.load(token_ptr + at, mask=mask, other=0)
    top = tl.max(m, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(s * tl.exp2((m - shift[:, None]) * 1.4426950408889634), axis=1)
    _, winner = tl.max(best, axis=1, return_indices=True)
    won = offs_s == winner[:, None]
    token = tl.sum(tl.where(won, token, 0), axis=1)
    raw = tl.sum(tl.where(won, raw, 0.0), axis=1)
    return token, tl.exp2((raw - top) * 1.4426950408889634) / total


@triton.jit
def _combine_kernel(
    stats_ptr,  # [4, N, parts]
    token_ptr,  # [N, parts]
    rows_ptr,  # [N]: which row of the results each record is of
    count_ptr,  # [1]: how many records there are
    out_token_ptr,  # [N]
    confidence_ptr,  # [N]
    N,
    parts,
    plane,  # N * parts
    COMPACT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    to = row
    mask = row < N
    if COMPACT:
        mask = row < tl.load(count_ptr)
        to = tl.load(rows_ptr + row, mask=mask, other=0)
    token, confidence = combine(stats_ptr, token_ptr, row, mask, parts, plane, BLOCK_S)
    tl.store(out_token_ptr + to, token.to(out_token_ptr.dtype.element_ty), mask=mask)
    tl.store(confidence_ptr + to, confidence.to(confidence_ptr.dtype.element_ty), mask=mask)


# ---- launches ----


def combine_launch(parts: int) -> Launch:
    """Some 1024 records a program: eight a thread."""
    block = triton.next_power_of_2(max(parts, 1))
    return Launch(BLOCK_R=max(1, 1024 // block), BLOCK_S=block, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Rows:
    """What is sampled: N rows by N / L settings of each kind; of them only `count` that `index` lists, where given."""

    settings: tuple[Tensor, ...]  # temperature, seed, position, step
    N: int
    L: int = 1
    index: Tensor | None = None  # [N]
    count: Tensor | None = None  # [1]: on the device, never read by the host

    @classmethod
    def of(cls, *settings: Tensor) -> "Rows":
        vectors = row_vectors(*settings)
        return cls(vectors, vectors[0].numel())


@dataclass(frozen=True)
class Records:
    stats: Tensor  # [4, N, parts]: m, s, best, raw
    tokens: Tensor  # [N, parts]

    @classmethod
    def new(cls, N: int, parts: int, like: Tensor, dtype: torch.dtype) -> "Records":
        return cls(like.new_empty(4, N, parts, dtype=dtype), like.new_empty(N, parts, dtype=torch.int32))

    @property
    def parts(self) -> int:
        return self.tokens.shape[1]

    @property
    def plane(self) -> int:
        return self.tokens.numel()


def row_vectors(*settings: Tensor) -> tuple[Tensor, ...]:
    """One setting a row, side by side in memory."""
    return tuple(t.reshape(-1).contiguous() for t in settings)


def combine_records(records: Records, rows: Rows, token: Tensor, confidence: Tensor) -> None:
    """Write tokens and confidences [N]; of listed rows only theirs."""
    launch = combine_launch(records.parts)
    run(
        _combine_kernel,
        (triton.cdiv(rows.N, launch.BLOCK_R),),
        *(records.stats, records.tokens, rows.index, rows.count, token, confidence, rows.N),
        *(records.parts, records.plane),
        COMPACT=rows.index is not None,
        launch=launch,
    )
