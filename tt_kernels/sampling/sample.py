"""Sampling from logits in memory, with the token's confidence; top-k and top-p."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Sampled, Sampling
from ..reference.common import compute_dtype
from ..runtime.checks import check
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, architecture, by_row, run, tuned
from ..runtime.registry import define, takes_kernel
from .lang import Store, empty_record, finish, flip, is_any_hot, merge, source_of, tile_record, write_record
from .limits_launch import limits_of, narrows
from .options import check_range, check_token, flat, specs
from .records import Rows, combine_records, new_records

UNKNOWN32 = tl.constexpr(-(2**31))  # NaN by `flip`: no score is known

UNKNOWN64 = tl.constexpr(-(2**63))


@triton.jit(do_not_specialize=["R", "first"])
def _sample_kernel(
    logits_ptr,  # [R, V]: of records first to first + R; where BY_ROW [rows, V]
    stride_logits,
    settings,  # Settings of the rows
    listed,  # Listed, or None: record n is of row n
    limits,  # Limits of the R records, or None
    store,  # Store of all records; a part is a piece here
    known_ptr,  # [N] of `flip`: the best score of each record's row so far, which other parts have found
    R,
    first,
    V,
    suppress,
    look,  # Look, or None
    bias_ptr,  # [V], or None
    softcap: tl.constexpr,  # or None
    BY_ROW: tl.constexpr,  # logits are found by row, not by record
    SHIFT: tl.constexpr,  # each row's are those of the row before
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TILES: tl.constexpr,  # of BLOCK_V tokens a part
    PAIRS: tl.constexpr,  # sums in the order of the head's own records
):
    programmatic_launch()
    part = tl.program_id(0)
    offs_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < R
    row = first + offs_t
    if listed is not None:
        count = tl.load(listed.count)
        if first + tl.program_id(1) * BLOCK_T >= count:
            return
        mask_t = mask_t & (first + offs_t < count)
        row = tl.load(listed.index + row, mask=mask_t, other=0)
    acc_dtype = store.stats.dtype.element_ty
    any_hot = is_any_hot(row, mask_t, settings)
    start = part * TILES * BLOCK_V
    record = empty_record(BLOCK_T, acc_dtype, look)
    source = source_of(row, settings, SHIFT) if BY_ROW else offs_t
    known_ptr += first + offs_t
    known = tl.full((BLOCK_T,), UNKNOWN64 if acc_dtype == tl.float64 else UNKNOWN32, dtype=known_ptr.dtype.element_ty)
    if any_hot:
        # Read by an atomic, as other programs write it meanwhile. What they have not written yet costs time, no token.
        found = tl.atomic_max(known_ptr, known, mask=mask_t, sem="relaxed")
        known = tl.where(mask_t, found, known)
    known = flip(known, acc_dtype)
    for tile in range(start, min(start + TILES * BLOCK_V, V), BLOCK_V):
        ids = tile + tl.arange(0, BLOCK_V)
        at = source.to(tl.int64)[None, :] * stride_logits + ids[:, None]
        x = tl.load(logits_ptr + at, mask=mask_t[None, :] & (ids[:, None] < V), other=0.0)  # [BLOCK_V, BLOCK_T]
        x = finish(x.to(acc_dtype), ids, V, bias_ptr, softcap)
        mine = tile_record(
            *(x, tile, any_hot, row, mask_t, settings, limits, offs_t, V, suppress, known, look),
            PAIRS=PAIRS,
            BLOCK_V=BLOCK_V,
        )
        record = merge(record, mine, look is not None)
        known = tl.where(known >= record.best, known, record.best)
    write_record(store, first + offs_t, mask_t, part, record, look is not None)
    if any_hot:
        tl.atomic_max(known_ptr, flip(record.best, known_ptr.dtype.element_ty), mask=mask_t, sem="relaxed")


# Row tiles of a launch: a grid's second axis takes no more. On the first, rows cost the kernel 12 to 60 registers.
PROGRAMS = 65535


@dataclass(frozen=True, kw_only=True)
class SampleLaunch(Launch):
    BLOCK_V: int
    BLOCK_T: int
    TILES: int
    PAIRS: int = 0
    num_warps: int = 4
    num_stages: int = 2


def sample_launch(V: int) -> SampleLaunch:
    """A part is a number of tokens that depends on nothing but V, so that a row's bits do not depend on its neighbours:
    two tiles of 2048, 32 of the published vocabulary. Narrow rows share a program."""
    block = min(2048, max(4, triton.next_power_of_2(V)))
    return SampleLaunch(BLOCK_V=block, BLOCK_T=max(1, min(64, 1024 // block)), TILES=2)


def _launch(logits: Tensor) -> SampleLaunch:
    V = logits.shape[-1]
    return tuned("_sample_kernel", sample_launch(V), architecture(logits), V=V)


def sample_parts(logits: Tensor) -> int:
    launch = _launch(logits)
    return triton.cdiv(logits.shape[-1], launch.BLOCK_V * launch.TILES)


def nothing_known(rows: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel keeps of the best score of each row, before the first."""
    integer = torch.int64 if dtype == torch.float64 else torch.int32
    return like.new_full((rows,), torch.iinfo(integer).min, dtype=integer)


def record_logits(
    logits: Tensor,
    rows: Rows,
    records: Store,
    suppress: int | None,
    first: int = 0,
    launch: SampleLaunch | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Write records first to first + R from their logits [R, V]; where rows.by_row, of all listed rows from [rows, V].
    A bias and a soft cap, which limits know nothing of, are for rows that nothing narrows: `finished_records` has them
    beside limits."""
    R, V = logits.shape
    launch = launch or _launch(logits)
    known = nothing_known(rows.N, logits, records.stats.dtype)
    most = PROGRAMS * launch.BLOCK_T
    for begin in range(0, R, most):
        count, limits, start = min(most, R - begin), None, first + begin
        some = logits if rows.by_row else logits[begin : begin + count]
        if narrows(rows.sampling):
            limits = limits_of(some, rows, records.stats.dtype, suppress, start, count)
        run(
            _sample_kernel,
            (records.parts, triton.cdiv(count, launch.BLOCK_T)),
            *(some, logits.stride(0), rows.settings, rows.listed, limits, records, known),
            *(count, start, V, -1 if suppress is None else suppress, rows.look, bias, softcap),
            BY_ROW=rows.by_row,
            SHIFT=rows.shift,
            launch=launch,
            # With limits ptxas may spill a number or two to fit a third program.
            **({} if limits is None else dict(maxnreg=255)),
        )


def _sample(logits: Tensor, suppress: int | None, *settings: Tensor | None) -> tuple[Tensor, Tensor]:
    token, confidence = _sample_fake(logits, suppress)
    logits, rows = by_row(logits), Rows.of(settings)
    records = new_records(rows, sample_parts(logits), logits, confidence.dtype)
    record_logits(logits, rows, records, suppress)
    combine_records(records, rows, token, confidence)
    return token, confidence


def _sample_fake(logits: Tensor, suppress: int | None, *_: object) -> tuple[Tensor, Tensor]:
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=compute_dtype(logits.dtype))


_op = define(_sample, _sample_fake, rest=Sampling)


def sample(logits: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Sampled:
    """Predict a token from logits, with its confidence.

    At temperature 0 the argmax; above it the argmax of logits / temperature + Gumbel noise, which is a sample of
    softmax(logits / temperature). Of equal scores the lowest id wins. The confidence is the token's probability at
    temperature 1, under all tokens but the suppressed one.

    Every row has settings of its own, and its result depends on no other row. top_k comes before top_p: that one sums
    the probabilities, at the row's temperature, of what top_k leaves, from the best logit down and of equals from the
    lowest id up, and keeps tokens until the sum first exceeds p. Neither touches rows of temperature 0. Where both are
    None, no row is narrowed and no work is done for it; a confidence may then differ in its last bits from that under
    limits which let everything pass.

    Tokens of logit -inf, suppressed ones and those outside top_k and top_p are never drawn, at no temperature; an
    infinite one draws evenly among the rest. NaN counts as larger than inf and both as above all temperatures: the
    first NaN of a row, else its first inf, is the token. Where all are -inf it is the lowest id that is not suppressed.
    The confidence of all three is NaN. Ids are always below V.

    Args:
        logits:   [*, V] float.
        sampling: `Sampling` of tensors [*], one number for each row of logits: temperature (0 or more, and inf), seed,
                  position, step, and top_k and top_p or None.
        suppress: a token id that counts as -inf, or None; not the only one.
    Returns:
        token:      [*] int64.
        confidence: [*] fp32 (fp64 for fp64 logits).

    Numerics: in the dtype of the confidence, where a temperature above 0 counts as at least its least normal number
    (1e-38 in fp32). What top_p sums are whole numbers: probabilities over the best one, each off by 1.4e-7 of itself
    and 2^-40 at most. So what is left is the same whatever the order of sums, on every device. Deterministic.
    Gradients: none.
    Raises: ValueError for sizes that disagree and for options out of their range. Settings are looked at on a CPU
    alone: on a GPU, which is not waited for, and in graphs a temperature below 0 or NaN counts as 0, a top_k below 0 as
    no limit, a top_p of 0 or less keeps the best token and a NaN is no limit.
    Cost: R V itemsize bytes for R rows; with noise 40 R V operations. With top_k or top_p a program finds a row's cut:
    it reads the row twice where top_k is up to 512 (256 on sm_80) or few tokens have weight, else three times, once
    with 50 operations on whole numbers a token and sums of what is above seven logits, and a part of it again for every
    eighth. No row is sorted; of tiles that are left out wholly there is no noise.
    Source: TwoTower (2606.26493); Gumbel-max as in Maddison et al. (1411.0030).

    Example:
        >>> logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 9.0]])
        >>> token, confidence = sample(logits, Sampling.of(2, temperature=0.7, top_p=0.9, seed=1))
    """
    check("sample", 5, logits=(logits, "* V"), **specs("sample", sampling, "*"))
    check_range("sample", sampling)
    if suppress is not None:
        check_token("sample", "suppress", suppress, logits.shape[-1])
    if not takes_kernel("sample", logits):
        return reference.sample(logits, sampling, suppress=suppress)
    return Sampled(*_op(logits.detach(), suppress, *flat(sampling)))
