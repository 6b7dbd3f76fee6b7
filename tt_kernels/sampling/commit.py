"""The commit rule: which masked positions of a block take their prediction."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Committed
from ..runtime.checks import check, refuse
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, run
from ..runtime.registry import define, takes_kernel
from .options import check_whole


class Rule(NamedTuple):
    """What decides how many positions of a block commit."""

    threshold: Any  # [B]
    steps_left: Any  # [B]


@triton.jit
def before(confidence_j, j, confidence_i, i):
    """Whether position j comes before i: the more confident first, NaN last, of equals the lower position. Callers pass
    a position that is not masked as NaN at a j beyond every i, which is before none."""
    nan_j, nan_i = confidence_j != confidence_j, confidence_i != confidence_i
    more = (confidence_j > confidence_i) | (nan_i & (confidence_j == confidence_j))
    return more | (((confidence_j == confidence_i) | (nan_j & nan_i)) & (j < i))


@triton.jit
def settle(
    b,
    offs_l,
    mask_l,
    block,  # [BLOCK_L], as the next four
    token,
    masked,
    confidence,
    rank,  # among the masked ones, in the order of `before`
    rule,
    out,  # Committed
    L,
):
    """Write what the rule makes of sequence b."""
    m = tl.sum(masked.to(tl.int64), axis=0)
    above = tl.sum((masked & (confidence > tl.load(rule.threshold + b).to(confidence.dtype))).to(tl.int64), axis=0)
    steps_left = tl.load(rule.steps_left + b).to(tl.int64)
    share = 1 + (m - 1) // tl.where(steps_left > 1, steps_left, 1)  # ceil(m / steps left), 1 or more; m may be 0
    count = tl.minimum(m, tl.maximum(above, share))
    committed = masked & (rank < count)
    at = b * L + offs_l
    tl.store(out.block + at, tl.where(committed, token, block), mask=mask_l)
    tl.store(out.committed + at, committed, mask=mask_l)
    tl.store(out.masked + b, m - count)


@triton.jit(do_not_specialize=["L"])
def _commit_kernel(
    block_ptr,  # [B, L], as token and confidence
    token_ptr,
    confidence_ptr,
    rule,  # Rule
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
    block = tl.load(block_ptr + b * L + offs_l, mask=mask_l, other=0)
    masked = mask_l & (block == mask_token_id)
    token = tl.load(token_ptr + b * L + offs_l, mask=masked, other=0)
    confidence = tl.load(confidence_ptr + b * L + offs_l, mask=masked, other=0.0)
    rank = tl.zeros((BLOCK_L,), dtype=tl.int32)
    for start in range(0, L, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        other = tl.load(block_ptr + b * L + j, mask=j < L, other=0)
        theirs = (j < L) & (other == mask_token_id)
        sure = tl.load(confidence_ptr + b * L + j, mask=theirs, other=float("nan"))
        j = tl.where(theirs, j, BLOCK_L)
        earlier = before(sure[None, :], j[None, :], confidence[:, None], offs_l[:, None])
        rank += tl.sum(earlier.to(tl.int32), axis=1)
    settle(b, offs_l, mask_l, block, token, masked, confidence, rank, rule, out, L)


def commit_launch(L: int) -> Launch:
    """All positions of a sequence against 32 at a time: at most 32 comparisons a thread up to 512 positions."""
    block = triton.next_power_of_2(max(L, 1))
    return Launch(BLOCK_L=block, BLOCK_J=min(block, 32), num_warps=min(max(block // 32, 1), 16))


def new_committed(block: Tensor, *_: object) -> Committed:
    """Memory for the result."""
    masked = block.new_empty(block.shape[0], dtype=torch.int64)
    return Committed(block.new_empty(block.shape), block.new_empty(block.shape, dtype=torch.bool), masked)


def _commit(
    block: Tensor, token: Tensor, confidence: Tensor, threshold: Tensor, steps_left: Tensor, mask_token_id: int
) -> Committed:
    out, (B, L) = new_committed(block), block.shape
    run(
        _commit_kernel,
        (B,),
        *(block.contiguous(), token.contiguous(), confidence.contiguous()),
        *(Rule(threshold.contiguous(), steps_left.contiguous()), out, L, mask_token_id),
        launch=commit_launch(L),
    )
    return out


_op = define(_commit, new_committed)


def commit(
    block: Tensor, token: Tensor, confidence: Tensor, *, mask_token_id: int, threshold: Tensor, steps_left: Tensor
) -> Committed:
    """Let the most confident masked positions of each row take their prediction.

    With m masked positions: min(m, max(1, how many have confidence > threshold, ceil(m / steps_left))) of them commit,
    the most confident first, infinities included and NaN last, of equals the lower position. The rest stay masked; what
    is not masked never changes.

    Args:
        block:         [B, L] int.
        token:         [B, L] int, same dtype: predictions, read where the block is masked.
        confidence:    [B, L] float, read where the block is masked.
        mask_token_id: the mask.
        threshold:     [B] float.
        steps_left:    [B] int: denoising steps that remain, this one included; below 1 counts as 1.
    Returns:
        block:     [B, L] dtype of block, in new memory.
        committed: [B, L] bool: what changed now.
        masked:    [B] int64: how many are masked still.

    Numerics: confidences are compared in their own dtype, to which the threshold is rounded. Deterministic.
    Gradients: none.
    Raises: ValueError for sizes and dtypes that disagree.
    Cost: a sort of L numbers a row.
    Source: TwoTower (2606.26493).

    Example:
        >>> block, token, sure = torch.tensor([[9, 9, 4]]), torch.tensor([[1, 2, 3]]), torch.tensor([[0.3, 0.9, 0.0]])
        >>> commit(block, token, sure, mask_token_id=9, threshold=torch.tensor([0.8]), steps_left=torch.tensor([4]))
    """
    check(
        "commit",
        5,
        block=(block, "B L", int),
        token=(token, "B L", int),
        confidence=(confidence, "B L"),
        threshold=(threshold, "B"),
        steps_left=(steps_left, "B", int),
    )
    ids = torch.iinfo(block.dtype)
    check_whole("commit", "mask_token_id", mask_token_id, ids.min, ids.max, f"an id of the block's {block.dtype}")
    if token.dtype != block.dtype:
        refuse("commit", "token", token.dtype, f"the dtype of block, {block.dtype}")
    if not takes_kernel("commit", confidence):
        return reference.commit(
            block, token, confidence, mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left
        )
    return Committed(*_op(block, token, confidence.detach(), threshold.detach(), steps_left, mask_token_id))
