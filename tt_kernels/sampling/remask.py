"""Remasking: committed positions of a block that change again."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference import Remasked, Remasking, Sampling
from ..runtime.checks import check, refuse
from ..runtime.lang import programmatic_launch
from ..runtime.launch import run
from ..runtime.registry import define, takes_kernel
from .commit import before, commit_launch
from .options import check_whole, flat
from .strategies import uniform

KINDS = dict(edit=float, verify=float, most=int, sigma=float, shared=bool)  # of `Remasking`'s fields


class Known(NamedTuple):
    """Pointers [B, L] to what is known of positions; each may be None."""

    may_change: Any
    token: Any  # predicted
    confidence: Any  # its probability
    own: Any  # probability of the token that is there


class Noise(NamedTuple):
    """Pointers [B] to what the noise is keyed on; position is that of a block's first token."""

    seed: Any
    position: Any
    step: Any


@triton.jit(do_not_specialize=["L"])
def _remask_kernel(
    block_ptr,  # [B, L]
    known,  # Known
    rules,  # Remasking of pointers [B]
    noise,  # Noise
    out,  # Remasked
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
    filled = mask_l & (block != mask_token_id)
    free = filled
    if known.may_change is not None:
        free = free & (tl.load(known.may_change + at, mask=mask_l, other=0) != 0)
    new, again = block, filled & (L < 0)
    if rules.edit is not None:
        token = tl.load(known.token + at, mask=free, other=0)
        sure = tl.load(known.confidence + at, mask=free, other=0.0)
        better = free & (token != block) & (sure > tl.load(rules.edit + b).to(sure.dtype))
        new = tl.where(better, token, block)
        free = free & (better == 0)
    if known.own is not None:
        own = tl.load(known.own + at, mask=filled, other=0.0)
    if rules.verify is not None:
        least = tl.load(rules.verify + b).to(own.dtype)
        doubted = free & (own < least)
        if rules.most is not None:
            rank = tl.zeros((BLOCK_L,), dtype=tl.int32)
            for start in range(0, L, BLOCK_J):
                j = start + tl.arange(0, BLOCK_J)
                there = b * L + j
                other = tl.load(block_ptr + there, mask=j < L, other=0)
                theirs = (j < L) & (other != mask_token_id)
                if known.may_change is not None:
                    theirs = theirs & (tl.load(known.may_change + there, mask=j < L, other=0) != 0)
                if rules.edit is not None:
                    found = tl.load(known.token + there, mask=theirs, other=0)
                    surely = tl.load(known.confidence + there, mask=theirs, other=0.0)
                    surely_better = surely > tl.load(rules.edit + b).to(surely.dtype)
                    theirs = theirs & ((found == other) | (surely_better == 0))
                probable = tl.load(known.own + there, mask=theirs, other=0.0)
                theirs = theirs & (probable < least)
                place = tl.where(theirs, j, BLOCK_L)
                doubt = tl.where(theirs, -probable, float("nan"))
                earlier = before(doubt[None, :], place[None, :], -own[:, None], offs_l[:, None])  # [BLOCK_L, BLOCK_J]
                rank += tl.sum(earlier.to(tl.int32), axis=1)
            most = tl.load(rules.most + b)
            doubted = doubted & ((most < 0) | (rank < most))
        again = again | doubted
    if rules.sigma is not None:
        chance = uniform(
            *(tl.load(noise.seed + b), tl.load(noise.position + b) + offs_l),
            *(tl.load(noise.step + b) + tl.zeros_like(offs_l), -2),
        ).to(tl.float64)
        sigma = tl.load(rules.sigma + b).to(tl.float64)
        if rules.shared is not None:
            terms = tl.where(filled, tl.exp(-own.to(tl.float64)), 0.0)
            total = tl.sum(terms, axis=0)
            share = tl.where(total > 0, terms / tl.where(total > 0, total, 1.0), 0.0)  # none where a term is NaN
            share = tl.where(tl.load(rules.shared + b) != 0, share, 1.0)
            again = again | (free & (chance < sigma * share))
        else:
            again = again | (free & (chance < sigma))
    new = tl.where(again, mask_token_id, new)
    tl.store(out.block + at, new, mask=mask_l)
    tl.store(out.changed + at, new != block, mask=mask_l)
    tl.store(out.masked + b, tl.sum((mask_l & (new == mask_token_id)).to(tl.int64), axis=0))


def _remask(
    block: Tensor,
    mask_token_id: int,
    may_change: Tensor | None,
    token: Tensor | None,
    confidence: Tensor | None,
    own: Tensor | None,
    seed: Tensor | None,
    position: Tensor | None,
    step: Tensor | None,
    edit: Tensor | None,
    verify: Tensor | None,
    most: Tensor | None,
    sigma: Tensor | None,
    shared: Tensor | None,
) -> Remasked:
    out, (B, L) = _remask_fake(block), block.shape
    known, noise = (
        kind(*(None if t is None else t.contiguous() for t in tensors))
        for kind, tensors in ((Known, (may_change, token, confidence, own)), (Noise, (seed, position, step)))
    )
    rules = Remasking(edit, verify, most, sigma, shared).contiguous()
    run(
        _remask_kernel,
        (B,),
        *(block.contiguous(), known, rules, noise, out, L, mask_token_id),
        launch=commit_launch(L),
    )
    return out


def _remask_fake(block: Tensor, *_: object) -> Remasked:
    masked = block.new_empty(block.shape[0], dtype=torch.int64)
    return Remasked(block.new_empty(block.shape), block.new_empty(block.shape, dtype=torch.bool), masked)


_op = define(_remask, _remask_fake)


def _needed(remasking: Remasking) -> dict[str, str]:
    """Which arguments the rules want, and the rule that wants each."""
    wants = dict(edit=("token", "confidence"), verify=("own",), most=("own",), sigma=("sampling",), shared=("own",))
    return {name: rule for rule, names in wants.items() if getattr(remasking, rule) is not None for name in names}


def remask(
    block: Tensor,
    remasking: Remasking,
    *,
    mask_token_id: int,
    may_change: Tensor | None = None,
    token: Tensor | None = None,
    confidence: Tensor | None = None,
    own: Tensor | None = None,
    sampling: Sampling | None = None,
) -> Remasked:
    """Let committed positions of a block change again: for models that were trained to mend what they wrote.

    `edit` replaces a token by one that is predicted with more than that probability, as LLaDA2.1 does; `verify` masks
    the tokens that have become improbable, at most so many, as WINO does with what its shadow block says; `sigma` masks
    at random, as ReMDM does, whose schedules `Remasking.remdm` has. The rules of a row are tried in this order, and a
    position takes part in one of them. Positions that hold the mask stay as they are. To be called beside `unmask`.

    Args:
        block:         [B, L] int.
        remasking:     `Remasking` of tensors [B].
        mask_token_id: the mask.
        may_change:    [B, L] bool: positions that may change; None: all that are not masked. A prompt's, and those that
                       were committed in this step, do not.
        token:         [B, L] int, same dtype as block: predictions; for edit.
        confidence:    [B, L] float: their probabilities; for edit.
        own:           [B, L] float: probability of the token that is there: now, for verify; when it was committed, for
                       ReMDM's conf. Read where nothing is masked.
        sampling:      `Sampling` of tensors [B], of which seed, position and step key the noise; for sigma.
    Returns:
        block:   [B, L] dtype of block, in new memory.
        changed: [B, L] bool: what is masked again or has another token.
        masked:  [B] int64: how many positions are masked.

    Numerics: probabilities are compared in their own dtype, to which edit and verify are rounded; sigma in fp64 with
    numbers of 23 bits. NaN changes nothing. Deterministic.
    Gradients: none.
    Raises: ValueError for sizes and dtypes that disagree, and where what a rule needs is None.
    Cost: with `most` a sort of L numbers a row.
    Source: ReMDM (2503.00307); LLaDA2.1 (2602.08676); WINO (2507.18578).

    Example:
        >>> block, own = torch.tensor([[5, 6, 9]]), torch.tensor([[0.9, 0.2, 0.0]])
        >>> remask(block, Remasking(verify=torch.tensor([0.5])), mask_token_id=9, own=own).block
    """
    if not isinstance(remasking, Remasking):
        refuse("remask", "remasking", remasking, "a Remasking")
    if sampling is not None and not isinstance(sampling, Sampling):
        refuse("remask", "sampling", sampling, "a Sampling or None")
    check(
        "remask",
        1,
        block=(block, "B L", int),
        may_change=(may_change, "B L", bool),
        token=(token, "B L", int),
        confidence=(confidence, "B L"),
        own=(own, "B L"),
        **{name: (getattr(sampling, name), "B", int) for name in Noise._fields if sampling is not None},
        **{f"remasking.{name}": (getattr(remasking, name), "B", kind) for name, kind in KINDS.items()},
    )
    given = dict(token=token, confidence=confidence, own=own, sampling=sampling)
    for name, rule in _needed(remasking).items():
        if given[name] is None:
            refuse("remask", name, None, f"what {rule} is decided by")
    ids = torch.iinfo(block.dtype)
    check_whole("remask", "mask_token_id", mask_token_id, ids.min, ids.max, f"an id of the block's {block.dtype}")
    if token is not None and token.dtype != block.dtype:
        refuse("remask", "token", token.dtype, f"the dtype of block, {block.dtype}")
    floats = [t for t in (confidence, own) if t is not None]
    if not takes_kernel("remask", floats[0] if floats else block, *floats):
        options: dict[str, Any] = dict(mask_token_id=mask_token_id, may_change=may_change)
        return reference.remask(block, remasking, **options, **given)  # type: ignore[arg-type]
    noise = [None] * 3 if sampling is None else [sampling.seed, sampling.position, sampling.step]
    known = [None if t is None else t.detach() for t in (may_change, token, confidence, own)]
    return Remasked(*_op(block, mask_token_id, *known, *noise, *flat(remasking)))
