"""One unmasking step: sample the masked positions of a block, commit the most confident."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Committed, Sampling, Unmasked
from ..reference.common import compute_dtype
from ..runtime.checks import check
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, by_row, run
from ..runtime.registry import define, takes_kernel
from .commit import Rule, _commit, before, new_committed, settle
from .head_sample_launch import head_records
from .lang import Listed, combine
from .options import check_range, check_token, flat, specs
from .records import Rows, combine_records


@triton.jit(do_not_specialize=["N"])
def _masked_rows_kernel(
    block_ptr,  # [N]
    slot_ptr,  # [N]: how many masked positions are before each
    listed,  # Listed: the masked positions in their order, then the others
    N,
    mask_token_id,
    BLOCK: tl.constexpr,
):
    programmatic_launch()
    count = tl.zeros((), dtype=tl.int32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < N
        masked = mask & (tl.load(block_ptr + offs, mask=mask, other=0) == mask_token_id)
        slot = count + tl.cumsum(masked.to(tl.int32), axis=0) - masked.to(tl.int32)
        tl.store(slot_ptr + offs, slot, mask=mask)
        tl.store(listed.index + tl.where(masked, slot, N - 1 - (offs - slot)), offs, mask=mask)
        count += tl.sum(masked.to(tl.int32), axis=0)
    tl.store(listed.count, count)


@triton.jit(do_not_specialize=["L"])
def _finish_kernel(
    store,  # Store of the masked positions' records
    block_ptr,  # [B, L], as slot
    slot_ptr,
    rule,  # Rule
    out,  # Committed
    confidence_ptr,  # [B, L]
    L,
    mask_token_id,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    programmatic_launch()
    b = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    block = tl.load(block_ptr + b * L + offs_l, mask=mask_l, other=0)
    masked = mask_l & (block == mask_token_id)
    slot = tl.load(slot_ptr + b * L + offs_l, mask=masked, other=0)
    token, confidence = combine(store, slot, masked, BLOCK_S)
    confidence = confidence.to(confidence_ptr.dtype.element_ty)
    tl.store(confidence_ptr + b * L + offs_l, tl.where(masked, confidence, 0.0), mask=mask_l)
    sure, j = tl.where(masked, confidence, float("nan")), tl.where(masked, offs_l, BLOCK_L)
    earlier = before(sure[None, :], j[None, :], confidence[:, None], offs_l[:, None])  # [BLOCK_L, BLOCK_L]
    rank = tl.sum(earlier.to(tl.float32), axis=1).to(tl.int32)  # a sum of integers would go through local memory
    settle(b, offs_l, mask_l, block, token.to(block.dtype), masked, confidence, rank, rule, out, L)


def finish_launch(L: int, parts: int, depth: int = 1) -> Launch | None:
    """Records and commit rule of a sequence in one program: 16 records a thread. None above 8192 records or 64
    positions, and where parts have several, which take 200 registers and more to merge there: then programs of few
    rows combine the records, and the rule is a launch of its own."""
    block_l, block_s = triton.next_power_of_2(max(L, 1)), triton.next_power_of_2(max(parts, 1))
    if depth > 1 or block_l > 64 or block_l * block_s > 8192:
        return None
    return Launch(BLOCK_L=block_l, BLOCK_S=block_s, num_warps=max(4, block_l * block_s // 512))


def masked_rows_launch(N: int) -> Launch:
    """One program walks the batch, eight positions a thread a round: 1024 are 64 blocks of 16."""
    return Launch(BLOCK=min(1024, triton.next_power_of_2(max(N, 1))))


def _unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    threshold: Tensor,
    steps_left: Tensor,
    mask_token_id: int,
    *settings: Tensor | None,
) -> Unmasked:
    out = _unmask_fake(hidden, weight, block)
    (B, L), N = block.shape, block.numel()
    if not N:
        out.masked.zero_()
        return out
    block = block.contiguous()
    index, slot, count = (block.new_empty(n, dtype=torch.int32) for n in (N, N, 1))
    listed = Listed(index, count)
    run(_masked_rows_kernel, (1,), *(block, slot, listed, N, mask_token_id), launch=masked_rows_launch(N))
    rows = Rows.of(settings, L, listed)
    records = head_records(by_row(hidden), weight, rows, mask_token_id)
    launch = finish_launch(L, records.parts, records.depth)
    if launch is None:
        token = torch.empty_like(block)
        combine_records(records, rows, token, out.confidence.zero_())
        done = _commit(block, token, out.confidence, threshold, steps_left, mask_token_id)
        return out._replace(**done._asdict())
    run(
        _finish_kernel,
        (B,),
        *(records, block, slot, Rule(threshold.contiguous(), steps_left.contiguous())),
        *(Committed(out.block, out.committed, out.masked), out.confidence, L, mask_token_id),
        launch=launch,
    )
    return out


def _unmask_fake(hidden: Tensor, weight: Tensor, block: Tensor, *rest: object) -> Unmasked:
    out = new_committed(block)
    confidence = hidden.new_empty(block.shape, dtype=compute_dtype(hidden.dtype, weight.dtype))
    return Unmasked(out.block, out.committed, confidence, out.masked)


_op = define(_unmask, _unmask_fake, rest=Sampling)


def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    threshold: Tensor,
    steps_left: Tensor,
) -> Unmasked:
    """One unmasking step: `head_sample` of the masked positions with the mask token suppressed, then `commit`.

    Args:
        hidden:        [B, L, D] float, after the final norm.
        weight:        [V, D] float: the head.
        block:         [B, L] int.
        sampling:      `Sampling` of tensors [B], as in `sample`; position is that of the block's first token in its
                       sequence.
        mask_token_id: the mask, which is never predicted.
        threshold:     [B] float: confidence above which a position commits.
        steps_left:    [B] int: steps that remain, this one included.
    Returns:
        block:      [B, L] dtype of block, in new memory.
        committed:  [B, L] bool: what changed now.
        confidence: [B, L] fp32 (fp64 where hidden or weight is): of the prediction; 0 where nothing was masked.
        masked:     [B] int64: how many are masked still.

    Numerics: as `head_sample`. Deterministic.
    Gradients: none.
    Raises: ValueError as `sample` does.
    Cost: 2 M V D flops and V D itemsize bytes for M masked positions: bound by reading the head.
    Source: TwoTower (2606.26493).

    Example:
        >>> hidden, weight, block = torch.randn(1, 4, 64), torch.randn(1000, 64), torch.tensor([[7, 999, 999, 999]])
        >>> rule = dict(mask_token_id=999, threshold=torch.tensor([0.8]), steps_left=torch.tensor([3]))
        >>> unmask(hidden, weight, block, Sampling.of(1, temperature=0.7, seed=1), **rule).block
    """
    check(
        "unmask",
        9,
        hidden=(hidden, "B L D"),
        weight=(weight, "V D"),
        block=(block, "B L", int),
        threshold=(threshold, "B"),
        steps_left=(steps_left, "B", int),
        **specs("unmask", sampling, "B"),
    )
    check_range("unmask", sampling)
    check_token("unmask", "mask_token_id", mask_token_id, weight.shape[0])
    if not takes_kernel("unmask", hidden, weight):
        rule: dict[str, Any] = dict(mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left)
        return reference.unmask(hidden, weight, block, sampling, **rule)
    tensors = (hidden.detach(), weight.detach(), block, threshold.detach(), steps_left)
    return Unmasked(*_op(*tensors, mask_token_id, *flat(sampling)))
