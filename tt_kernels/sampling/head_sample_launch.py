"""The head and the sampling from its logits in one pass over the vocabulary: the logits never reach memory."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, by_row, multiprocessors, run, tuned
from .head_sample_kernels import _head_kernel
from .records import Records, Rows, combine_records
from .sample import ROWS, bounds, narrows, record_logits, sample_parts, scale

# ---- launches ----


SUB = 16  # the fewest rows that tensor cores take; more would not fit registers beside the products


def rows_sampled(launch: Launch, architecture: int) -> int:
    """Rows sampled at a time. On sm_100, where all products of 128 rows come into registers at once, 16 would spill."""
    return SUB // 2 if launch.BLOCK_T == 128 and architecture >= 100 else SUB


def head_launch(R: int, V: int, D: int, itemsize: int, architecture: int) -> Launch:
    """Up to some 180 rows the head's bytes are all that counts. Up to 64 two programs share a multiprocessor, 100 KB of
    stages each: one loads while the other samples. More rows make wider tiles, so that the head goes from the cache to
    the multiprocessors once; at 128 one program's products and sampling take the registers, and deeper stages the
    memory. 32-bit products run on no tensor core: small tiles that fit registers."""
    block_v, block_t, block_k, warps, stages = 128, 16, 128, 4, 3
    if R > 16:
        block_t, block_k, stages = 32, 64, 5
    if R > 32 or (R > 16 and architecture < 90):
        block_t, stages = 64, 4
    if R > 64 and architecture >= 90:
        block_t, warps, stages = 128, 8, 5
    if architecture < 90 and R <= 16:
        block_k, stages = 64, 6
    if architecture >= 100 or (architecture < 90 and R > 16):  # a tile takes more registers: spread it over more warps
        warps = 8
    if itemsize > 2:
        block_v, block_t, block_k, warps, stages = 64, 16, 32, 4, 3
    return Launch(
        BLOCK_V=min(block_v, max(16, triton.next_power_of_2(V))),
        BLOCK_T=block_t,
        BLOCK_K=min(block_k, max(16, triton.next_power_of_2(D))),
        num_warps=warps,
        num_stages=stages,
    )


def _launch(R: int, hidden: Tensor, weight: Tensor) -> Launch:
    V, D = weight.shape
    itemsize = max(hidden.itemsize, weight.itemsize)
    rows = 16 if R <= 16 else 32 if R <= 32 else 64 if R <= 64 else 128
    default = head_launch(R, V, D, itemsize, architecture(hidden))
    return tuned("_head_kernel", default, architecture(hidden), R=rows, V=V, D=D, itemsize=itemsize)


def head_pieces(launch: Launch, V: int, multiprocessors: int) -> tuple[int, int, int]:
    """Pieces of the vocabulary, tiles of BLOCK_V a piece, pieces a part. Parts are two a multiprocessor at most and the
    same however many rows there are, so that a row's sums have one order: up to 16 rows a piece is a part, whose tiles
    a program merges; of more rows a piece is a tile, and whoever combines the records merges a part's first."""
    count = triton.cdiv(V, launch.BLOCK_V)
    tiles = max(1, triton.cdiv(count, 2 * multiprocessors))
    return (triton.cdiv(count, tiles), tiles, 1) if launch.BLOCK_T == SUB else (count, 1, tiles)


def _takes_tma(weight: Tensor) -> bool:
    """A row of the head must begin at a multiple of 16 bytes."""
    row = weight.stride(0) * weight.itemsize
    return architecture(weight) >= 90 and weight.shape[1] > 0 and row % 16 == 0 and weight.data_ptr() % 16 == 0


def _run_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    suppress: int | None,
    launch: Launch,
    *,
    records: Records | None = None,
    logits: Tensor | None = None,
    first: int = 0,
) -> None:
    """Write all records, or the logits [R, V] of records first to first + R."""
    V, D = weight.shape
    pieces, tiles, depth = head_pieces(launch, V, multiprocessors(hidden))
    R = rows.N if logits is None else len(logits)
    tma = _takes_tma(weight)
    run(
        _head_kernel,
        (min(triton.cdiv(R, launch.BLOCK_T) * pieces, 2 * multiprocessors(hidden)),),
        hidden,
        TensorDescriptor.from_tensor(weight, [launch.BLOCK_V, launch.BLOCK_K]) if tma else weight,
        *(rows.index, rows.count, *rows.settings),
        *((None, None) if records is None else (records.stats, records.tokens)),
        *(logits, hidden.stride(0), weight.stride(0), R, first, rows.L, V, D, tiles, pieces, depth),
        *((0, 0) if records is None else records.sizes[2:]),
        -1 if suppress is None else suppress,
        COMPACT=rows.index is not None,
        STORE=logits is not None,
        TMA=tma,
        SUB=rows_sampled(launch, architecture(weight)),
        WIDE=torch.float64 in (hidden.dtype, weight.dtype),
        launch=launch,
    )


def head_records(
    hidden: Tensor, weight: Tensor, rows: Rows, top_k: int | None, top_p: float | None, suppress: int | None
) -> Records:
    """Records of all rows of hidden [N, D], or of those listed. Top-k and top-p want whole rows of logits in memory:
    ROWS at a time, of all N rows, for how many are listed only the device knows."""
    weight = by_row(weight)
    V, dtype = len(weight), compute_dtype(hidden.dtype, weight.dtype)
    if not narrows(V, top_k, top_p):
        launch = _launch(rows.N, hidden, weight)
        pieces, _, depth = head_pieces(launch, V, multiprocessors(hidden))
        records = Records.new(rows.N, pieces, hidden, dtype, depth)
        _run_head(hidden, weight, rows, suppress, launch, records=records)
        return records
    logits = hidden.new_empty(min(ROWS, rows.N), V, dtype=dtype)
    launch = _launch(len(logits), hidden, weight)
    temperature = rows.settings[0]
    if rows.index is not None:
        temperature = temperature[rows.index // rows.L]
    records = Records.new(rows.N, sample_parts(logits), hidden, dtype)
    for first in range(0, rows.N, ROWS):
        some = logits[: rows.N - first]
        _run_head(hidden, weight, rows, suppress, launch, logits=some, first=first)
        scaled = scale(some, temperature[first : first + ROWS], suppress)
        record_logits(some, rows, records, suppress, bounds(*scaled, top_k, top_p), first)
    return records


def _head_sample(
    hidden: Tensor,
    weight: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None,
    top_p: float | None,
    suppress: int | None,
) -> tuple[Tensor, Tensor]:
    token, confidence = _head_sample_fake(hidden, weight, temperature, seed, position, step, top_k, top_p, suppress)
    rows = Rows.of(temperature, seed, position, step)
    if rows.N:
        combine_records(head_records(by_row(hidden), weight, rows, top_k, top_p, suppress), rows, token, confidence)
    return token, confidence


# ---- op ----


def _head_sample_fake(hidden, weight, temperature, seed, position, step, top_k, top_p, suppress):
    shape, dtype = hidden.shape[:-1], compute_dtype(hidden.dtype, weight.dtype)
    return hidden.new_empty(shape, dtype=torch.int64), hidden.new_empty(shape, dtype=dtype)
