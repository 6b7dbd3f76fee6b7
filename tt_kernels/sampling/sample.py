"""Sampling from logits in memory, with the token's confidence; top-k and top-p."""

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..reference.sampling import probabilities, split_temperature
from ..runtime.checks import check
from ..runtime.launch import Launch, architecture, by_row, run, tuned
from ..runtime.registry import define, takes_kernel
from .lang import empty_record, is_any_hot, merge, tile_record, write_record
from .options import check_sampling
from .records import Records, Rows, combine_records

# ---- kernels ----


@triton.jit(do_not_specialize=["R", "first"])
def _sample_kernel(
    logits_ptr,  # [R, V]: of records first to first + R
    rows_ptr,  # [N]: which row of the settings each record is of
    count_ptr,  # [1]: how many records there are
    temperature_ptr,  # [N / L], as seed, position and step
    seed_ptr,
    position_ptr,
    step_ptr,
    least_ptr,  # [R]: the least scaled logit that may be sampled
    last_ptr,  # [R]: the last token that may be, of those with that one
    stats_ptr,  # [4, N, parts]
    token_ptr,  # [N, parts]
    stride_logits,
    R,
    first,
    L,
    V,
    parts,
    plane,  # N * parts
    suppress,
    COMPACT: tl.constexpr,
    NARROW: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,  # of BLOCK_V tokens a part
):
    part = tl.program_id(0)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    record = first + offs_t
    mask_t = offs_t < R
    row = record
    if COMPACT:
        count = tl.load(count_ptr)
        if first + tl.program_id(1) * BLOCK_T >= count:
            return
        mask_t = mask_t & (record < count)
        row = tl.load(rows_ptr + record, mask=mask_t, other=0)
    acc = tl.float64 if WIDE else tl.float32
    any_hot = is_any_hot(row, mask_t, L, temperature_ptr)
    least, last = None, None
    if NARROW:
        least, last = least_ptr + offs_t, last_ptr + offs_t
    start = part * TILES * BLOCK_V
    m, s, best, token, raw = empty_record(BLOCK_T, acc)
    for tile in range(start, min(start + TILES * BLOCK_V, V), BLOCK_V):
        ids = tile + tl.arange(0, BLOCK_V)
        at = offs_t.to(tl.int64)[None, :] * stride_logits + ids[:, None]
        x = tl.load(logits_ptr + at, mask=mask_t[None, :] & (ids[:, None] < V), other=0.0).to(acc)  # [BLOCK_V, BLOCK_T]
        next_m, next_s, next_best, next_token, next_raw = tile_record(
            *(x, tile, any_hot, row, mask_t, L),
            *(temperature_ptr, seed_ptr, position_ptr, step_ptr, least, last, V, suppress),
            NARROW=NARROW,
            PAIRS=False,
            BLOCK_V=BLOCK_V,
        )
        m, s, best, token, raw = merge(m, s, best, token, raw, next_m, next_s, next_best, next_token, next_raw)
    write_record(stats_ptr, token_ptr, record, mask_t, part, parts, plane, m, s, best, token, raw)


# ---- launches ----


ROWS = 64  # of the vocabulary's width in memory at a time where top-k or top-p want whole rows: 34 MB in fp32

# Of rows a launch: a grid's second axis takes no more. On the first, rows cost the kernel 12 to 60 registers a thread.
PROGRAMS = 65535


def sample_launch(V: int) -> Launch:
    """A part is a number of tokens that depends on nothing but V, so that a row's bits do not depend on its neighbours:
    two tiles of 2048, 32 of the published vocabulary. Narrow rows share a program."""
    block = min(2048, max(4, triton.next_power_of_2(V)))
    return Launch(BLOCK_V=block, BLOCK_T=max(1, min(64, 1024 // block)), TILES=2, num_warps=4, num_stages=2)


def _launch(logits: Tensor) -> Launch:
    V = logits.shape[-1]
    return tuned("_sample_kernel", sample_launch(V), architecture(logits), V=V)


def sample_parts(logits: Tensor) -> int:
    launch = _launch(logits)
    return triton.cdiv(logits.shape[-1], launch.BLOCK_V * launch.TILES)


def bounds(scaled: Tensor, unit: Tensor, top_k: int | None, top_p: float | None) -> tuple[Tensor, Tensor]:
    """What of scaled logits [R, V] may be sampled: the least of them, and the last token of those equal to it."""
    R, V = scaled.shape
    least, last = scaled.new_full((R,), -math.inf), torch.full((R,), V, device=scaled.device)
    if top_k is not None and top_k < V:
        least = scaled.topk(top_k, dim=-1).values[:, -1].contiguous()
        scaled = scaled.masked_fill(scaled < least.unsqueeze(-1), -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
        late = F.pad(probabilities(ordered, unit).cumsum(-1), (1, -1)) > top_p  # the probability of all better ones
        end = (V - 1 - late.sum(-1, keepdim=True)).clamp(min=0)
        lowest, end = ordered.gather(-1, end).squeeze(-1), index.gather(-1, end).squeeze(-1)
        looser = lowest < least  # than top-k
        least, last = torch.where(looser, least, lowest), torch.where(looser, last, end)
    return least, last


def narrows(V: int, top_k: int | None, top_p: float | None) -> bool:
    return (top_k is not None and top_k < V) or (top_p is not None and top_p < 1)


def scale(logits: Tensor, temperature: Tensor, suppress: int | None) -> tuple[Tensor, Tensor]:
    """What rows above temperature 0 are sampled from, and its unit; division rounds as it does in the kernel."""
    divisor, unit = split_temperature(temperature, logits.dtype)
    scaled = logits / divisor.unsqueeze(-1)
    if suppress is not None:
        scaled[:, suppress] = -math.inf
    return scaled, unit


def record_logits(
    logits: Tensor,
    rows: Rows,
    records: Records,
    suppress: int | None,
    limits: tuple[Tensor, Tensor] | None = None,
    first: int = 0,
) -> None:
    """Write records first to first + R from their logits [R, V]."""
    R, V = logits.shape
    launch = _launch(logits)
    most = PROGRAMS * launch.BLOCK_T
    for begin in range(0, R, most):
        some = logits[begin : begin + most]
        least, last = (None, None) if limits is None else (t[begin : begin + most] for t in limits)
        run(
            _sample_kernel,
            (records.parts, triton.cdiv(len(some), launch.BLOCK_T)),
            *(some, rows.index, rows.count, *rows.settings, least, last, records.stats, records.tokens),
            *(logits.stride(0), len(some), first + begin, rows.L, V, records.parts, records.tokens.numel()),
            -1 if suppress is None else suppress,
            COMPACT=rows.index is not None,
            NARROW=limits is not None,
            WIDE=records.stats.dtype == torch.float64,
            launch=launch,
        )


def _sample(
    logits: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None,
    top_p: float | None,
    suppress: int | None,
) -> tuple[Tensor, Tensor]:
    token, confidence = _sample_fake(logits, temperature, seed, position, step, top_k, top_p, suppress)
    logits = by_row(logits)
    R, V = logits.shape
    rows = Rows.of(temperature, seed, position, step)
    records = Records.new(R, sample_parts(logits), logits, confidence.dtype)
    if not narrows(V, top_k, top_p):
        record_logits(logits, rows, records, suppress)
    else:
        for first in range(0, R, ROWS):
            some = logits[first : first + ROWS]
            scaled = scale(some.to(confidence.dtype), rows.settings[0][first : first + ROWS], suppress)
            record_logits(some, rows, records, suppress, bounds(*scaled, top_k, top_p), first)
    combine_records(records, rows, token, confidence)
    return token, confidence


# ---- op ----


def _sample_fake(logits, temperature, seed, position, step, top_k, top_p, suppress):
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


_op = define(
    "sample(Tensor logits, Tensor temperature, Tensor seed, Tensor position, Tensor step, int? top_k, float? top_p, "
    "int? suppress) -> (Tensor, Tensor)",
    _sample,
    _sample_fake,
)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Predict a token from logits, with its confidence.

    At temperature 0 the argmax; above it the argmax of logits / temperature + Gumbel noise, which is a sample of
    softmax(logits / temperature). Of equal scores the lowest id wins. The confidence is the token's probability at
    temperature 1, under all tokens but the suppressed one.

    Tokens of logit -inf, suppressed ones and those outside top-k and top-p are never drawn, at no temperature; an
    infinite one draws evenly among the rest. NaN counts as larger than inf and both as above all temperatures: the
    first NaN of a row, else its first inf, is the token. Where all are -inf it is the lowest id that is not suppressed.
    The confidence of all three is NaN. Ids are always below V.

    Args:
        logits:      [*, V] float.
        temperature: [*] float, 0 or more and inf, one for each row of logits, as are the next three. Below 0 and NaN:
                     refused on a CPU; as 0 on a GPU, which is not waited for, and in graphs.
        seed:        [*] int, any 64 bits.
        position:    [*] int, the token's position in its sequence, of which the lower 32 bits count.
        step:        [*] int, the denoising step, as position.
        top_k:       sample among the k best (and all that equal the k-th), or None.
        top_p:       sample among the best whose probabilities at this temperature, summed from the best down and after
                     top_k, first exceed p, or None. Neither touches rows of temperature 0.
        suppress:    a token id that counts as -inf, or None; not the only one.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 for fp64 logits).

    Computes in the dtype of the confidence, where a temperature above 0 counts as at least its least normal number
    (1e-38 in fp32). No gradients. Deterministic. Raises ValueError for sizes that disagree and options out of
    their range. Cost for R rows: R V itemsize bytes; with noise 40 R V operations.
    Source: TwoTower (2606.26493); Gumbel-max as in Maddison et al. (1411.0030).
    """
    check(
        "sample",
        5,
        logits=(logits, "* V"),
        temperature=(temperature, "*"),
        seed=(seed, "*", int),
        position=(position, "*", int),
        step=(step, "*", int),
    )
    check_sampling("sample", logits.shape[-1], temperature, top_k, top_p, suppress=suppress)
    if not takes_kernel("sample", logits):
        return reference.sample(
            logits,
            temperature=temperature,
            seed=seed,
            position=position,
            step=step,
            top_k=top_k,
            top_p=top_p,
            suppress=suppress,
        )
    return _op(logits.detach(), temperature.detach(), seed, position, step, top_k, top_p, suppress)
