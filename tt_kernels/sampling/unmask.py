"""One unmasking step: sample the masked positions of a block, commit the most confident."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Committed, Sampling, Strategy, Unmasked
from ..reference.common import compute_dtype
from ..runtime.checks import check
from ..runtime.lang import programmatic_launch
from ..runtime.launch import Launch, by_row, run
from ..runtime.registry import define, takes_kernel
from .commit import Rule, _commit, before, new_committed, settle
from .head_sample_launch import head_records
from .lang import Listed, combine
from .options import cap_of, check_flag, check_range, check_token, flat, specs, strategy_specs
from .records import Rows, combine_records
from .strategies import look_of, unmasked


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
    token, confidence = combine(store, slot, masked, False, BLOCK_S)
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


def masked_rows(block: Tensor, mask_token_id: int) -> tuple[Listed, Tensor]:
    """The masked positions of a block, and how many are before each."""
    N = block.numel()
    index, slot, count = (block.new_empty(n, dtype=torch.int32) for n in (N, N, 1))
    listed = Listed(index, count)
    run(_masked_rows_kernel, (1,), *(block, slot, listed, N, mask_token_id), launch=masked_rows_launch(N))
    return listed, slot


def _unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    threshold: Tensor,
    steps_left: Tensor,
    mask_token_id: int,
    *settings: Tensor | None,
) -> Unmasked:
    out, L = _unmask_fake(hidden, weight, block), block.shape[1]
    if not block.numel():
        out.masked.zero_()
        return out
    block = block.contiguous()
    listed, slot = masked_rows(block, mask_token_id)
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
        (len(block),),
        *(records, block, slot, Rule(threshold.contiguous(), steps_left.contiguous())),
        *(Committed(out.block, out.committed, out.masked), out.confidence, L, mask_token_id),
        launch=launch,
    )
    return out


def new_unmasked(block: Tensor, dtype: torch.dtype) -> Unmasked:
    """Memory for the result."""
    out = new_committed(block)
    return Unmasked(out.block, out.committed, block.new_empty(block.shape, dtype=dtype), out.masked)


def _unmask_fake(hidden: Tensor, weight: Tensor, block: Tensor, *rest: object) -> Unmasked:
    return new_unmasked(block, compute_dtype(hidden.dtype, weight.dtype))


_op = define(_unmask, _unmask_fake, rest=Sampling)


def _unmask_by(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    threshold: Tensor | None,
    steps_left: Tensor | None,
    mask_token_id: int,
    bias: Tensor | None,
    softcap: float | None,
    shift: bool,
    confidence: Tensor | None,
    factor: Tensor | None,
    entropy_bound: Tensor | None,
    number: Tensor | None,
    tempered: Tensor | None,
    alg_temp: Tensor | None,
    *settings: Tensor | None,
) -> Unmasked:
    """`_unmask` by a strategy, of another head or of the states before."""
    out = _unmask_fake(hidden, weight, block)
    if not block.numel():
        out.masked.zero_()
        return out
    block = block.contiguous()
    strategy = Strategy(confidence, factor, entropy_bound, number, tempered, alg_temp).contiguous()
    rows = Rows.of(
        settings, block.shape[1], masked_rows(block, mask_token_id)[0], look_of(strategy, block), shift=shift
    )
    bias = None if bias is None else bias.contiguous()
    records = head_records(by_row(hidden), weight, rows, mask_token_id, bias, softcap)
    return unmasked(records, rows, block, threshold, steps_left, strategy, mask_token_id, out)


def _unmask_by_fake(hidden: Tensor, weight: Tensor, block: Tensor, *rest: object) -> Unmasked:
    return _unmask_fake(hidden, weight, block)


_op_by = define(_unmask_by, _unmask_by_fake, rest=Sampling)


def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    threshold: Tensor | None = None,
    steps_left: Tensor | None = None,
    strategy: Strategy | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: bool = False,
) -> Unmasked:
    """One unmasking step: `head_sample` of the masked positions with the mask token suppressed, then the commit rule.

    By threshold and steps_left that of `commit`. A `Strategy` has the other rules of masked diffusion models, of each
    row its own: positions stand in the order of their confidence, or in one that is drawn by it, and the longest
    beginning that one of the rules allows commits, at least one position, or exactly `number`. docs/decoding.md has
    them by their names.

    Args:
        hidden:        [B, L, D] float, after the final norm.
        weight:        [V, D] float: the head.
        block:         [B, L] int.
        sampling:      `Sampling` of tensors [B], as in `sample`; position is that of the block's first token in its
                       sequence.
        mask_token_id: the mask, which is never predicted.
        threshold:     [B] float: while confidence is above, positions commit. inf: no such rule in that row; None:
                       in none.
        steps_left:    [B] int: steps that remain, this one included: ceil(masked / steps left) commit. L and above:
                       one, as without the rule; None: no such rule in any row.
        strategy:      `Strategy` of tensors [B]. None: the confidence is the prediction's probability at temperature 1,
                       and there are no other rules.
        bias:          [V] float that is added to the logits; -inf: such a token is never predicted, as the mask, while
                       another may be.
        softcap:       logits are cap tanh(logits / cap), from 1e-30 to 1e30; the bias comes before.
        shift:         whether hidden state i predicts token i + 1, and the first one token 0 too: right of a whole
                       sequence. Of a block alone, pass the states from the token before it on, and no shift.
    Returns:
        block:      [B, L] dtype of block, in new memory.
        committed:  [B, L] bool: what changed now.
        confidence: [B, L] fp32 (fp64 where hidden or weight is): probability of the prediction, whichever confidence
                    orders: at temperature 1, or where `tempered` in the distribution that it was drawn from; 0 where
                    nothing was masked. `confidence.log()` is its log-probability: -inf where the probability is too
                    small for the dtype, below 1e-37 in fp32.
        masked:     [B] int64: how many are masked still.

    Numerics: as `head_sample`. Entropies are added as whole numbers of 2^-32. With a strategy that looks at more than
    the chosen token, a confidence may differ in its last bits from what it is without. Deterministic.
    Gradients: none.
    Raises: ValueError as `sample` does, and for a confidence that there is not.
    Cost: 2 M V D flops and V D itemsize bytes for M masked positions: bound by reading the head. Strategies read it
    once, too, and sort nothing of the vocabulary; their entropy and margin take a dozen operations a logit. Logits of
    B L rows are in memory, in parts, where there are more than 64 or top_k or top_p is given, as in `head_sample`.
    Source: TwoTower (2606.26493); LLaDA (2502.09992), Dream (2508.15487), Fast-dLLM (2505.22618), EB-Sampler
    (2505.24857).

    Example:
        >>> hidden, weight, block = torch.randn(1, 4, 64), torch.randn(1000, 64), torch.tensor([[7, 999, 999, 999]])
        >>> rule = dict(mask_token_id=999, threshold=torch.tensor([0.8]), steps_left=torch.tensor([3]))
        >>> unmask(hidden, weight, block, Sampling.of(1, temperature=0.7, seed=1), **rule).block
        >>> unmask(hidden, weight, block, Sampling.of(1), mask_token_id=999, strategy=Strategy.of(1, factor=1.0)).block
    """
    check(
        "unmask",
        7,
        hidden=(hidden, "B L D"),
        weight=(weight, "V D"),
        block=(block, "B L", int),
        **specs("unmask", sampling, "B"),
        threshold=(threshold, "B"),
        steps_left=(steps_left, "B", int),
        bias=(bias, "V"),
        **strategy_specs("unmask", strategy, "B"),
    )
    check_range("unmask", sampling)
    check_token("unmask", "mask_token_id", mask_token_id, weight.shape[0])
    softcap = cap_of("unmask", softcap)
    check_flag("unmask", "shift", shift)
    if not takes_kernel("unmask", hidden, weight, bias):
        rule: dict[str, Any] = dict(mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left)
        more: dict[str, Any] = dict(strategy=strategy, bias=bias, softcap=softcap, shift=shift)
        return reference.unmask(hidden, weight, block, sampling, **rule, **more)
    hidden, weight = hidden.detach(), weight.detach()
    plain = strategy is None and bias is None and softcap is None and not shift
    if plain and threshold is not None and steps_left is not None:
        return Unmasked(*_op(hidden, weight, block, threshold.detach(), steps_left, mask_token_id, *flat(sampling)))
    head = (None if bias is None else bias.detach(), softcap, shift)
    rules = flat(strategy or Strategy())
    return Unmasked(
        *_op_by(hidden, weight, block, threshold, steps_left, mask_token_id, *head, *rules, *flat(sampling))
    )
