"""What strategies make of records: how sure each prediction is, and which positions of a block commit."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Committed, Strategy, Unmasked
from ..runtime.lang import gumbel, philox, programmatic_launch
from ..runtime.launch import Launch, run
from .commit import before, commit_launch
from .lang import Look, Store, combine, sequence_of
from .records import Rows, combine_launch


class Judged(NamedTuple):
    """What a strategy knows of predictions [rows]."""

    token: Any
    confidence: Any
    score: Any  # what is held to the threshold and to the factor; None: the confidence
    entropy: Any  # None: nobody asks
    key: Any = None  # what orders the positions, where that is drawn; None: the score


class Rules(NamedTuple):
    """What decides how many positions of a block commit: pointers [B], each may be None."""

    threshold: Any
    steps_left: Any
    confidence: Any  # what orders the positions
    factor: Any
    entropy_bound: Any
    number: Any


@triton.jit
def uniform(seed, position, step, counter: tl.constexpr):
    """The reference's `uniform`, which fp32 holds."""
    word, _, _, _ = philox(seed, tl.full(position.shape, counter, dtype=tl.int32), position, step)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def drawn(score, seed, position, step, alg_temp):
    """The reference's `drawn`."""
    word, _, _, _ = philox(seed, tl.full(position.shape, -3, dtype=tl.int32), position, step)
    t = alg_temp.to(score.dtype)
    t = tl.where(t > 0, tl.minimum(t, 1e30), 0.0).to(score.dtype)
    return score + t * gumbel(word, WIDE=score.dtype == tl.float64)


@triton.jit(do_not_specialize=["N"])
def _judge_kernel(
    store,  # Store of the records
    listed,  # Listed
    settings,  # Settings of the rows
    confidence_ptr,  # [B], of Rules
    alg_temp_ptr,  # [B], or None
    out,  # Judged
    N,
    LOOKED: tl.constexpr,  # whether records have what strategies look at
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    programmatic_launch()
    record = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = record < tl.load(listed.count)
    row = tl.load(listed.index + record, mask=mask, other=0)
    if LOOKED:
        token, confidence, margin, entropy = combine(store, record, mask, True, BLOCK_S)
    else:
        token, confidence = combine(store, record, mask, False, BLOCK_S)
    tl.store(out.token + row, token.to(out.token.dtype.element_ty), mask=mask)
    tl.store(out.confidence + row, confidence.to(out.confidence.dtype.element_ty), mask=mask)
    score = confidence
    if out.score is not None or out.key is not None:
        b, place = sequence_of(row, settings)
        seed = tl.load(settings.seed + b, mask=mask, other=0)
        position = tl.load(settings.position + b, mask=mask, other=0) + place
        step = tl.load(settings.step + b, mask=mask, other=0)
    if out.score is not None:
        kind = tl.load(confidence_ptr + b, mask=mask, other=0)
        chance = uniform(seed, position, step, -1).to(confidence.dtype)
        score = tl.where(kind == 1, margin, tl.where(kind == 2, -entropy, tl.where(kind == 3, chance, confidence)))
        tl.store(out.score + row, score, mask=mask)
    if out.key is not None:
        alg_temp = tl.load(alg_temp_ptr + b, mask=mask, other=0.0)
        tl.store(out.key + row, drawn(score, seed, position, step, alg_temp), mask=mask)
    if out.entropy is not None:
        tl.store(out.entropy + row, entropy, mask=mask)


@triton.jit
def entropy_units(entropy):
    """The reference's, whose sums have no order."""
    limited = tl.minimum(tl.maximum(tl.where(entropy == entropy, entropy, 1024.0), 0.0), 1024.0)
    return (limited * 4294967296.0).to(tl.int64)


@triton.jit
def beginning(passes, masked, rank, m):
    """How many positions of the order come before the first that does not pass."""
    return tl.min(tl.where(masked & (passes == 0), rank.to(tl.int64), m), axis=0)


@triton.jit
def longest(masked, score, rank, spread, rules, b, m):
    """How many positions the rule that lets most commit."""
    count = tl.minimum(m, 1)
    if rules.threshold is not None:
        threshold = tl.load(rules.threshold + b).to(score.dtype)
        count = tl.maximum(count, beginning(score > threshold, masked, rank, m))
    if rules.steps_left is not None:
        left = tl.load(rules.steps_left + b).to(tl.int64)
        count = tl.maximum(count, 1 + (m - 1) // tl.where(left > 1, left, 1))  # ceil(m / steps left); m may be 0
    if rules.factor is not None:
        share = tl.load(rules.factor + b).to(score.dtype) + tl.zeros_like(score)
        n = (rank + 2).to(score.dtype)
        least = 1 - (share / n if score.dtype == tl.float64 else tl.div_rn(share, n))
        count = tl.maximum(count, beginning((rank == 0) | (score >= least), masked, rank, m))  # below 0 the first
    if rules.entropy_bound is not None:
        bound = tl.load(rules.entropy_bound + b).to(tl.float64)
        bound = tl.minimum(tl.maximum(tl.where(bound == bound, bound, -1.0), -1.0), 1073741824.0)
        units = tl.floor(bound * 4294967296.0).to(tl.int64)
        count = tl.maximum(count, beginning(spread <= units, masked, rank, m))
    if rules.number is not None:
        number = tl.load(rules.number + b).to(tl.int64)
        count = tl.where(number >= 0, number, count)
    return tl.minimum(count, m)


@triton.jit(do_not_specialize=["L"])
def _decide_kernel(
    block_ptr,  # [B, L]
    judged,  # Judged [B * L], of masked positions
    rules,  # Rules
    out,  # Committed
    L,
    mask_token_id,
    BLOCK_L: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    programmatic_launch()
    b = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    at = b * L + offs_l
    block = tl.load(block_ptr + at, mask=mask_l, other=0)
    masked = mask_l & (block == mask_token_id)
    token = tl.load(judged.token + at, mask=masked, other=0)
    score_ptr = judged.confidence if judged.score is None else judged.score
    key_ptr = score_ptr if judged.key is None else judged.key
    score = tl.load(score_ptr + at, mask=masked, other=0.0)
    key, in_order = score, False
    if judged.key is not None:
        key = tl.load(key_ptr + at, mask=masked, other=0.0)
    if rules.confidence is not None:
        in_order = tl.load(rules.confidence + b) == 4
        key = tl.where(in_order, 0.0, key)
    rank = tl.zeros((BLOCK_L,), dtype=tl.int32)
    total, most, spread = rank.to(tl.int64), rank.to(tl.int64), rank.to(tl.int64)
    for start in range(0, L, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(block_ptr + b * L + j, mask=j < L, other=0)
        theirs = (j < L) & (other == mask_token_id)
        sure = tl.load(key_ptr + b * L + j, mask=theirs, other=float("nan"))
        sure = tl.where(theirs & in_order, 0.0, sure)
        place = tl.where(theirs, j, BLOCK_L)
        earlier = before(sure[None, :], place[None, :], key[:, None], offs_l[:, None])  # [BLOCK_L, BLOCK_J]
        rank += tl.sum(earlier.to(tl.int32), axis=1)
        if judged.entropy is not None:
            units = entropy_units(tl.load(judged.entropy + b * L + j, mask=theirs, other=0.0))
            before_it = tl.where(earlier, units[None, :], 0)
            total += tl.sum(before_it, axis=1)
            most = tl.maximum(most, tl.max(before_it, axis=1))
    if judged.entropy is not None:
        own = entropy_units(tl.load(judged.entropy + at, mask=masked, other=0.0))
        spread = total + own - tl.maximum(most, own)
    m = tl.sum(masked.to(tl.int64), axis=0)
    count = longest(masked, score, rank, spread, rules, b, m)
    committed = masked & (rank < count)
    tl.store(out.block + at, tl.where(committed, token, block), mask=mask_l)
    tl.store(out.committed + at, committed, mask=mask_l)
    tl.store(out.masked + b, m - count)


def look_of(strategy: Strategy, block: Tensor) -> Look | None:
    """What records are to have for a strategy; None: what the chosen token alone needs."""
    if strategy.confidence is None and strategy.tempered is None and strategy.entropy_bound is None:
        return None
    return Look(block.new_zeros(len(block), dtype=torch.bool) if strategy.tempered is None else strategy.tempered)


def decide_launch(L: int) -> Launch:
    """As `commit_launch`, with half the comparisons a thread: each has an entropy of 64 bits. ptxas, left to itself,
    may spill two numbers at 96 registers: it is told how many there are."""
    options = commit_launch(L).options
    warps = min(2 * options["num_warps"], 16)
    return Launch(**options | dict(num_warps=warps, maxnreg=min(255, 2048 // warps)))


def judge(records: Store, rows: Rows, strategy: Strategy, confidence: Tensor, like: Tensor) -> Judged:
    """What is known of the listed rows, from their records; nothing is written of the others."""
    asked = (strategy.confidence, strategy.entropy_bound, strategy.alg_temp)
    judged = Judged(
        torch.empty_like(like), confidence, *(None if t is None else torch.empty_like(confidence) for t in asked)
    )
    launch = combine_launch(records.parts, records.depth)
    run(
        _judge_kernel,
        (triton.cdiv(rows.N, launch.BLOCK_R),),
        *(records, rows.listed, rows.settings, strategy.confidence, strategy.alg_temp, judged, rows.N),
        LOOKED=rows.look is not None,
        maxnreg=255,  # for another program ptxas may spill two numbers
        launch=launch,
    )
    return judged


def decide(block: Tensor, judged: Judged, rules: Rules, mask_token_id: int, out: Committed) -> None:
    """Write what the rules make of predictions [B, L]."""
    B, L = block.shape
    run(_decide_kernel, (B,), *(block, judged, rules, out, L, mask_token_id), launch=decide_launch(L))


def unmasked(
    records: Store,
    rows: Rows,
    block: Tensor,
    threshold: Tensor | None,
    steps_left: Tensor | None,
    strategy: Strategy,
    mask_token_id: int,
    out: Unmasked,
) -> Unmasked:
    """Write what a strategy makes of a block's records."""
    judged = judge(records, rows, strategy, out.confidence.zero_(), block)
    threshold, steps_left = (None if t is None else t.contiguous() for t in (threshold, steps_left))
    rules = Rules(threshold, steps_left, *strategy[:4])
    decide(block, judged, rules, mask_token_id, Committed(out.block, out.committed, out.masked))
    return out
