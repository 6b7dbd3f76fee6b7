"""Remasking: committed positions of a block that change again, for models whose committed tokens may."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import can_look, full_precision, of_rows
from .sampling import Sampling
from .unmasking import REMASK, uniform


class Remasking(NamedTuple):
    """What makes committed positions change again: a number a row. None: no row has that rule."""

    # [B] float: a position whose prediction is another token than its own, of more probability than this, takes it; 1
    # and above: none.
    edit: Tensor | None = None
    # [B] float: a position whose own token is less probable than this is masked again; 0 and below: none.
    verify: Tensor | None = None
    # [B] int: so many at most by `verify`, the least probable first, of equals the lower; below 0, or None: no limit.
    most: Tensor | None = None
    # [B] float: every position is masked again with this probability.
    sigma: Tensor | None = None
    # [B] bool: sigma times the softmax of minus their own tokens' probabilities, instead.
    shared: Tensor | None = None

    @classmethod
    def remdm(cls, alpha_t: Tensor, alpha_s: Tensor, eta: Tensor | float = 1.0, *, kind: str = "cap") -> "Remasking":
        """ReMDM's, of the share alpha of tokens that are not masked before a step (t) and after it (s), both [B]:
        kind "cap", "rescale" or "conf", which eta, a number or [B], bounds, scales and scales. ValueError for another
        kind, for other sizes, and for what is not from 0 to 1."""
        if kind not in ("cap", "rescale", "conf"):
            raise ValueError(f"Remasking: kind is {kind!r}, expected cap, rescale or conf")
        if not isinstance(alpha_t, Tensor) or alpha_t.dim() != 1:
            shown = list(alpha_t.shape) if isinstance(alpha_t, Tensor) else repr(alpha_t)
            raise ValueError(f"Remasking: alpha_t is {shown}, expected a tensor [B]")
        eta = of_rows("Remasking: eta", eta, len(alpha_t), torch.float64, alpha_t.device)
        for name, t in (("alpha_t", alpha_t), ("alpha_s", alpha_s), ("eta", eta)):
            if not isinstance(t, Tensor) or t.shape != alpha_t.shape:
                shown = list(t.shape) if isinstance(t, Tensor) else repr(t)
                raise ValueError(f"Remasking: {name} is {shown}, expected a tensor of alpha_t's [B={len(alpha_t)}]")
            if can_look(t) and not bool(((t >= 0) & (t <= 1)).all()):
                raise ValueError(f"Remasking: {name} is {t.tolist()}, expected numbers from 0 to 1")
        largest = torch.where(alpha_t > 0, (1 - alpha_s) / alpha_t, math.inf).clamp(max=1)
        sigma = (torch.minimum(eta.to(largest), largest) if kind == "cap" else eta * largest).to(largest)
        return cls(sigma=sigma, shared=torch.ones_like(sigma, dtype=torch.bool) if kind == "conf" else None)

    def contiguous(self) -> "Remasking":
        return Remasking(*(None if t is None else t.contiguous() for t in self))


class Remasked(NamedTuple):
    """A block after a step of remasking."""

    block: Tensor  # [B, L] dtype of the block that came in, in new memory
    changed: Tensor  # [B, L] bool: what is masked again or has another token
    masked: Tensor  # [B] int64: how many positions are masked


@full_precision
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
    free = block != mask_token_id
    if may_change is not None:
        free = free & may_change
    new, again = block, torch.zeros_like(free)
    if remasking.edit is not None:
        assert token is not None and confidence is not None
        better = free & (token != block) & (confidence > remasking.edit.to(confidence).unsqueeze(-1))
        new = torch.where(better, token, block)
        free = free & ~better
    if remasking.verify is not None:
        assert own is not None
        doubted = free & (own < remasking.verify.to(own).unsqueeze(-1))
        if remasking.most is not None:
            order = own.masked_fill(~doubted, math.inf).argsort(dim=-1, stable=True)
            rank = torch.empty_like(order).scatter(-1, order, torch.arange(block.shape[-1]).to(order).expand_as(order))
            most = remasking.most.long().unsqueeze(-1)
            doubted = doubted & ((most < 0) | (rank < most))
        again = again | doubted
    if remasking.sigma is not None:
        assert sampling is not None
        places = torch.arange(block.shape[-1], device=block.device)
        seed, step = (t.unsqueeze(-1).expand(block.shape) for t in (sampling.seed, sampling.step))
        chance = uniform(seed, sampling.position.unsqueeze(-1) + places, step, REMASK)
        sigma = remasking.sigma.double().unsqueeze(-1)
        if remasking.shared is not None:
            assert own is not None
            share = (-own.double()).masked_fill(block == mask_token_id, -math.inf).softmax(-1).nan_to_num(0)
            sigma = torch.where(remasking.shared.unsqueeze(-1), sigma * share, sigma)
        again = again | (free & (chance < sigma))
    new = new.masked_fill(again, mask_token_id)
    return Remasked(new, new != block, (new == mask_token_id).sum(-1))
