"""One unmasking step: sample the masked positions of a block, commit the most confident."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.checks import check
from ..runtime.launch import Launch, by_row, run
from ..runtime.registry import define, takes_kernel
from .commit import before, settle, write_commit
from .head_sample_launch import head_records
from .lang import combine
from .options import check_sampling
from .records import Rows, combine_records, row_vectors

# ---- kernels ----


@triton.jit
def _masked_rows_kernel(
    block_ptr,  # [N]
    rows_ptr,  # [N]: the masked positions in their order, then the others
    slot_ptr,  # [N]: how many masked ones are before each
    count_ptr,  # [1]: masked positions
    N,
    mask_token_id,
    BLOCK: tl.constexpr,
):
    count = tl.zeros((), dtype=tl.int32)
    for start in range(0, N, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < N
        masked = mask & (tl.load(block_ptr + offs, mask=mask, other=0) == mask_token_id)
        slot = count + tl.cumsum(masked.to(tl.int32), axis=0) - masked.to(tl.int32)
        tl.store(slot_ptr + offs, slot, mask=mask)
        tl.store(rows_ptr + tl.where(masked, slot, N - 1 - (offs - slot)), offs, mask=mask)
        count += tl.sum(masked.to(tl.int32), axis=0)
    tl.store(count_ptr, count)


@triton.jit
def _finish_kernel(
    stats_ptr,  # [4, N, parts]: of masked positions
    tokens_ptr,  # [N, parts]
    block_ptr,  # [B, L], as slot
    slot_ptr,
    threshold_ptr,  # [B], as steps_left
    steps_left_ptr,
    out_ptr,  # [B, L], as committed and confidence
    committed_ptr,
    confidence_ptr,
    left_ptr,  # [B]
    L,
    parts,
    plane,  # N * parts
    mask_token_id,
    BLOCK_L: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    block = tl.load(block_ptr + b * L + offs_l, mask=mask_l, other=0)
    masked = mask_l & (block == mask_token_id)
    slot = tl.load(slot_ptr + b * L + offs_l, mask=masked, other=0)
    token, confidence = combine(stats_ptr, tokens_ptr, slot, masked, parts, 1, parts, plane, BLOCK_S)
    confidence = confidence.to(confidence_ptr.dtype.element_ty)
    tl.store(confidence_ptr + b * L + offs_l, tl.where(masked, confidence, 0.0), mask=mask_l)
    sure, j = tl.where(masked, confidence, float("nan")), tl.where(masked, offs_l, BLOCK_L)
    earlier = before(sure[None, :], j[None, :], confidence[:, None], offs_l[:, None])  # [BLOCK_L, BLOCK_L]
    rank = tl.sum(earlier.to(tl.float32), axis=1).to(tl.int32)  # as integers bits are counted through local memory
    settle(
        *(b, offs_l, mask_l, block, token.to(block.dtype), masked, confidence, rank, threshold_ptr, steps_left_ptr),
        *(out_ptr, committed_ptr, left_ptr, L),
    )


# ---- launches ----


def finish_launch(L: int, parts: int, depth: int = 1) -> Launch | None:
    """Records and commit rule of a sequence in one program: 16 records a thread. None above 8192 records or 64
    positions, and where parts have several, which take 200 registers and more to merge there: then programs of few
    rows combine the records, and the rule is a launch of its own."""
    block_l, block_s = triton.next_power_of_2(max(L, 1)), triton.next_power_of_2(max(parts, 1))
    if depth > 1 or block_l > 64 or block_l * block_s > 8192:
        return None
    return Launch(BLOCK_L=block_l, BLOCK_S=block_s, num_warps=max(4, block_l * block_s // 512), num_stages=1)


def masked_rows_launch(N: int) -> Launch:
    """One program walks the batch, eight positions a thread a round: 1024 are 64 blocks of 16."""
    return Launch(BLOCK=min(1024, triton.next_power_of_2(max(N, 1))), num_warps=4, num_stages=1)


def _masked_rows(block: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    N = block.numel()
    index, slot, count = (block.new_empty(n, dtype=torch.int32) for n in (N, N, 1))
    run(
        _masked_rows_kernel,
        (1,),
        *(block, index, slot, count, N, mask_token_id),
        launch=masked_rows_launch(N),
    )
    return index, slot, count


def _unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    threshold: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    steps_left: Tensor,
    mask_token_id: int,
    top_k: int | None,
    top_p: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, committed, confidence, left = _unmask_fake(hidden, weight, block)
    B, L = block.shape
    if not block.numel():
        return out, committed, confidence, left.zero_()
    block = block.contiguous()
    index, slot, count = _masked_rows(block, mask_token_id)
    rows = Rows(row_vectors(temperature, seed, position, step), B * L, L, index, count)
    records = head_records(by_row(hidden), weight, rows, top_k, top_p, mask_token_id)
    _, depth, parts, _ = records.sizes
    launch = finish_launch(L, parts, depth)
    if launch is None:
        token = torch.empty_like(block)
        combine_records(records, rows, token, confidence.zero_())
        write_commit(block, token, confidence, threshold, steps_left, mask_token_id, out, committed, left)
        return out, committed, confidence, left
    run(
        _finish_kernel,
        (B,),
        *(records.stats, records.tokens, block, slot, threshold.contiguous(), steps_left.contiguous()),
        *(out, committed, confidence, left, L, *records.sizes[2:], mask_token_id),
        launch=launch,
    )
    return out, committed, confidence, left


# ---- op ----


def _unmask_fake(hidden, weight, block, *settings):
    committed = block.new_empty(block.shape, dtype=torch.bool)
    confidence = hidden.new_empty(block.shape, dtype=compute_dtype(hidden.dtype, weight.dtype))
    return block.new_empty(block.shape), committed, confidence, block.new_empty(block.shape[0], dtype=torch.int64)


_op = define(
    "unmask(Tensor hidden, Tensor weight, Tensor block, Tensor threshold, Tensor temperature, Tensor seed, "
    "Tensor position, Tensor step, Tensor steps_left, int mask_token_id, int? top_k, float? top_p) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _unmask,
    _unmask_fake,
)


def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    *,
    mask_token_id: int,
    threshold: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    steps_left: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One unmasking step: `head_sample` of the masked positions with the mask token suppressed, then `commit`.

    Args:
        hidden:        [B, L, D] float, after the final norm.
        weight:        [V, D] float: the head.
        block:         [B, L] int.
        mask_token_id: the mask, which is never predicted.
        threshold:     [B] float: confidence above which a position commits.
        temperature:   [B] float, as in `sample`.
        seed:          [B] int, any 64 bits.
        position:      [B] int: of the block's first token in its sequence.
        step:          [B] int: the denoising step, from 0.
        steps_left:    [B] int: steps that remain, this one included.
        top_k, top_p:  as in `sample`.
    Returns:
        block:      [B, L] dtype of block, in new memory.
        committed:  [B, L] bool: what changed now.
        confidence: [B, L] fp32 (fp64 where hidden or weight is): of the prediction; 0 where nothing was masked.
        masked:     [B] int64: how many are masked still.

    Computes as `head_sample` does. No gradients. Deterministic. Raises ValueError as `sample` does. Cost for M masked
    positions: 2 M V D flops, V D itemsize bytes: bound by reading the head. Source: TwoTower (2606.26493).
    """
    check(
        "unmask",
        9,
        hidden=(hidden, "B L D"),
        weight=(weight, "V D"),
        block=(block, "B L", int),
        threshold=(threshold, "B"),
        temperature=(temperature, "B"),
        seed=(seed, "B", int),
        position=(position, "B", int),
        step=(step, "B", int),
        steps_left=(steps_left, "B", int),
    )
    check_sampling("unmask", weight.shape[0], temperature, top_k, top_p, mask_token_id=mask_token_id)
    if not takes_kernel("unmask", hidden, weight):
        return reference.unmask(
            hidden,
            weight,
            block,
            mask_token_id=mask_token_id,
            threshold=threshold,
            temperature=temperature,
            seed=seed,
            position=position,
            step=step,
            steps_left=steps_left,
            top_k=top_k,
            top_p=top_p,
        )
    hidden, weight, threshold, temperature = (t.detach() for t in (hidden, weight, threshold, temperature))
    return _op(
        hidden, weight, block, threshold, temperature, seed, position, step, steps_left, mask_token_id, top_k, top_p
    )
