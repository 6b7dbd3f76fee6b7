"""The head and the sampling from its logits in one pass over the vocabulary: the logits never reach memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import reference
from ..core import Op, check, define, takes_kernel
from ..launch import Launch, architecture, by_row, multiprocessors, run, tuned
from ..reference.common import compute_dtype
from .options import check_sampling
from .records import Records, Rows, combine_records, empty_record, is_any_hot, merge, tile_record, write_record
from .sample import ROWS, bounds, narrows, record_logits, sample_parts, sampling, scale

# ---- kernels ----


@triton.jit(do_not_specialize=["R", "first"])
def _head_kernel(
    hidden_ptr,  # [rows, D]
    weight_ptr,  # [V, D], or its descriptor
    rows_ptr,  # [N]: which row of hidden each record is of
    count_ptr,  # [1]: how many records there are
    temperature_ptr,  # [rows / L], as seed, position and step
    seed_ptr,
    position_ptr,
    step_ptr,
    stats_ptr,  # [4, N, slots]
    token_ptr,  # [N, slots]
    logits_ptr,  # [R, V]: of records first to first + R
    stride_hidden,
    stride_weight,
    R,
    first,
    L,
    V,
    D,
    tiles,  # of BLOCK_V tokens a piece
    pieces,  # of the vocabulary
    depth,  # pieces a part
    parts,
    plane,  # N * depth * parts
    suppress,
    COMPACT: tl.constexpr,
    STORE: tl.constexpr,  # the logits, and nothing else
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB: tl.constexpr,  # rows sampled at a time
):
    acc_dtype = tl.float64 if WIDE else tl.float32
    count = R
    if COMPACT:
        count = min(R, tl.load(count_ptr) - first)
    row_tiles = tl.cdiv(count, BLOCK_T)
    offs_k = tl.arange(0, BLOCK_K)
    # Programs that run together take the same piece of the head, which one of them brings into the cache.
    for item in range(tl.program_id(0), row_tiles * pieces, tl.num_programs(0)):
        piece = item // row_tiles
        slot = piece % depth * parts + piece // depth
        offs_t = (item % row_tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask_t = offs_t < count
        row = first + offs_t
        if COMPACT:
            row = tl.load(rows_ptr + row, mask=mask_t, other=0)
        any_hot = is_any_hot(row, mask_t, L, temperature_ptr)
        begin = piece * tiles * BLOCK_V
        m, s, best, token, raw = empty_record(SUB, acc_dtype)
        hidden = hidden_ptr + row.to(tl.int64)[:, None] * stride_hidden + offs_k[None, :]
        for start in range(begin, min(begin + tiles * BLOCK_V, V), BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            x = tl.zeros((BLOCK_V, BLOCK_T), dtype=acc_dtype)
            for k in range(0, D, BLOCK_K):
                mask_k = k + offs_k < D
                h = tl.load(hidden + k, mask=mask_t[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_T, BLOCK_K]
                if TMA:
                    w = weight_ptr.load([start, k])  # [BLOCK_V, BLOCK_K]
                else:
                    w_ptr = weight_ptr + offs_v.to(tl.int64)[:, None] * stride_weight + k + offs_k[None, :]
                    w = tl.load(w_ptr, mask=(offs_v < V)[:, None] & mask_k[None, :], other=0.0)
                if w.dtype != h.dtype:
                    w, h = w.to(acc_dtype), h.to(acc_dtype)
                # The head as the larger operand fills the tensor cores.
                x = tl.dot(w, h.T, x, input_precision="ieee", out_dtype=x.dtype)
            if STORE:
                at = logits_ptr + offs_t.to(tl.int64)[None, :] * V + offs_v[:, None]
                tl.store(at, x, mask=mask_t[None, :] & (offs_v < V)[:, None])
            elif BLOCK_T == SUB:
                next_m, next_s, next_best, next_token, next_raw = tile_record(
                    *(x, start, any_hot, row, mask_t, L),
                    *(temperature_ptr, seed_ptr, position_ptr, step_ptr, None, None, V, suppress),
                    NARROW=False,
                    PAIRS=True,
                    BLOCK_V=BLOCK_V,
                )
                m, s, best, token, raw = merge(m, s, best, token, raw, next_m, next_s, next_best, next_token, next_raw)
            else:
                # Few columns at a time, and a record for every tile: those of all rows do not fit registers.
                groups = tl.reshape(x, (BLOCK_V, BLOCK_T // SUB, SUB))
                for group in range(BLOCK_T // SUB):
                    here = tl.arange(0, BLOCK_T // SUB)[None, :, None] == group
                    some = tl.sum(tl.where(here, groups, 0.0), axis=1)  # [BLOCK_V, SUB]
                    record = (item % row_tiles) * BLOCK_T + group * SUB + tl.arange(0, SUB)
                    mask = record < count
                    record += first
                    row_s = record
                    if COMPACT:
                        row_s = tl.load(rows_ptr + record, mask=mask, other=0)
                    m, s, best, token, raw = tile_record(
                        *(some, start, any_hot, row_s, mask, L),
                        *(temperature_ptr, seed_ptr, position_ptr, step_ptr, None, None, V, suppress),
                        NARROW=False,
                        PAIRS=True,
                        BLOCK_V=BLOCK_V,
                    )
                    write_record(stats_ptr, token_ptr, record, mask, slot, depth * parts, plane, m, s, best, token, raw)
        if not STORE and BLOCK_T == SUB:
            write_record(
                stats_ptr, token_ptr, first + offs_t, mask_t, slot, depth * parts, plane, m, s, best, token, raw
            )


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


_op = define(
    "head_sample(Tensor hidden, Tensor weight, Tensor temperature, Tensor seed, Tensor position, Tensor step, "
    "int? top_k, float? top_p, int? suppress) -> (Tensor, Tensor)",
    _head_sample,
    _head_sample_fake,
)


def head_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict a token from a hidden state: `sample` of hidden weight^T, whose logits stay fp32 in 16-bit models.

    Args:
        hidden:      [*, D] float, after the final norm.
        weight:      [V, D] float: the head.
        temperature: [*] float, as all that follow: see `sample`.
        seed:        [*] int.
        position:    [*] int.
        step:        [*] int.
        top_k:       int or None.
        top_p:       float or None.
        suppress:    a token id or None.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 where hidden or weight is fp64).

    Products of 16-bit numbers are summed in fp32. No gradients. Deterministic; kernels sum over the vocabulary in an
    order that does not depend on how many rows there are. Raises ValueError as `sample` does.
    Cost for R rows: 2 R V D flops, (V D + R D) itemsize bytes: bound by reading the head. Source: as `sample`.
    """
    check(
        "head_sample",
        6,
        hidden=(hidden, "* D"),
        weight=(weight, "V D"),
        temperature=(temperature, "*"),
        seed=(seed, "*", int),
        position=(position, "*", int),
        step=(step, "*", int),
    )
    check_sampling("head_sample", weight.shape[0], temperature, top_k, top_p, suppress=suppress)
    if not takes_kernel("head_sample", hidden, weight):
        return reference.head_sample(
            hidden,
            weight,
            temperature=temperature,
            seed=seed,
            position=position,
            step=step,
            top_k=top_k,
            top_p=top_p,
            suppress=suppress,
        )
    hidden, weight, temperature = (t.detach() for t in (hidden, weight, temperature))
    return _op(hidden, weight, temperature, seed, position, step, top_k, top_p, suppress)


# ---- card ----


def head_inputs(dtype: torch.dtype, R: int, D: int, V: int, hot: int = 1, narrow: int = 0) -> dict[str, object]:
    weight = 3 * D**-0.5 * torch.randn(V, D, dtype=dtype)
    return dict(hidden=torch.randn(R, D, dtype=dtype), weight=weight, **sampling(R, V, hot, narrow))


CANDIDATES = tuple(  # all of one BLOCK_V: it orders a row's sums, whichever launch its number of rows is given
    Launch(BLOCK_V=128, BLOCK_T=t, BLOCK_K=k, num_warps=warps, num_stages=stages)
    for t, k, warps, stages in (
        (16, 128, 4, 4),
        (16, 64, 4, 6),
        (32, 128, 4, 4),
        (64, 64, 4, 5),
        (64, 64, 8, 5),
        (64, 128, 8, 4),
        (128, 64, 8, 4),
        (128, 64, 8, 6),
    )
)

OPS = (
    Op(
        fn=head_sample,
        reference=reference.head_sample,
        inputs=head_inputs,
        cases=(
            dict(R=6, D=16, V=37),
            dict(R=4, D=6, V=11, hot=0),
            dict(R=6, D=8, V=29, narrow=1),
            dict(R=2, D=40, V=1100),
            dict(R=20, D=3, V=1100),
            dict(R=130, D=3, V=5),
            dict(R=66, D=4, V=9, narrow=2),
            dict(R=0, D=4, V=5),
        ),
        shapes=(
            dict(R=1, D=2688, V=131072, hot=0),
            dict(R=16, D=2688, V=131072),
            dict(R=32, D=2688, V=131072),
            dict(R=64, D=2688, V=131072),
            dict(R=128, D=2688, V=131072),
            dict(R=512, D=2688, V=131072),
            dict(R=16, D=2688, V=131072, narrow=1),
        ),
        grows=dict(R=512),
        outputs=("token", "confidence"),
        kernels=("_head_kernel", "_sample_kernel", "_combine_kernel"),
        tensor_cores={"_head_kernel": "BLOCK_V"},
        candidates=dict(_head_kernel=CANDIDATES),
        cost=lambda itemsize, R, D, V, hot=1, narrow=0: (2 * R * V * D, (V * D + R * D) * itemsize),
    ),
)
