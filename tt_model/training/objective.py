"""The two training losses: next token for a context tower, masked tokens for a denoiser.

B rows, N tokens of a row, S block size. Formulas: TwoTowerModel (arXiv 2606.26493), the paper's recipe; what goes
beyond it (`full`, `tail`, `near_masks`, `own_predictions`, `distil_loss`, `encode_and_learn`) is off unless asked for.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tt_kernels import Sampling, head_sample, linear_cross_entropy

from ..modeling.state import CleanStates, ForwardContext
from ..modeling.two_tower import TwoTowerModel


class Noisy(NamedTuple):
    """Blocks of which some tokens are masked."""

    ids: Tensor  # [B, N] int64
    masked: Tensor  # [B, N] bool
    t: Tensor  # [B, N / S] float: each block's masking probability, or masked fraction


def ar_loss(
    model: TwoTowerModel, ids: Tensor, cu_seqlens: Tensor | None = None, counted: Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood (nats) of every next token that lies in the same packed sequence.

    Args:
        ids:        [B, N] int64.
        cu_seqlens: [n + 1] int32 boundaries over the flattened B * N tokens; None: every row is one sequence.
        counted:    [B, N] bool: tokens that are to be predicted; None: all.
    Gradients reach the context tower and its head.
    """
    return next_token_loss(
        model, model.context_tower(ids, ForwardContext("clean", cu_seqlens=cu_seqlens)), ids, cu_seqlens, counted
    )


def next_token_loss(
    model: TwoTowerModel, hidden: Tensor, ids: Tensor, cu_seqlens: Tensor | None, counted: Tensor | None
) -> Tensor:
    """`ar_loss` from the hidden states [B, N, D] of the context tower."""
    has_next = torch.ones_like(ids, dtype=torch.bool)
    has_next[:, -1] = False
    if cu_seqlens is not None:
        has_next.view(-1)[cu_seqlens[1:].long() - 1] = False
    if counted is not None:
        has_next &= counted.roll(-1, dims=1)
    targets = ids.roll(-1, dims=1)
    return linear_cross_entropy(
        hidden.flatten(0, 1), model.context_lm_head.weight, targets.flatten(), has_next.flatten()
    )


def mask_blocks(
    clean: Tensor,
    block_size: int,
    mask_token_id: int,
    generator: torch.Generator,
    *,
    full: float = 0.0,
    tail: float = 0.0,
) -> Noisy:
    """Draw t ~ U(0, 1] for every block and mask each of its tokens with probability t.

    Args:
        clean: [B, N] int64, N a multiple of block_size.
        generator: a CPU generator, so that the draw is the same on every device.
        full: share of blocks whose t is 1, drawn apart.
        tail: share of blocks masked from one of their tokens on, any of them as often, drawn apart from all others;
            their t is the masked fraction.
    """
    B, N = clean.shape
    S = block_size
    t = 1 - torch.rand(B, N // S, generator=generator)
    if full:
        t = t.masked_fill(torch.rand(t.shape, generator=generator) < full, 1.0)
    masked = torch.rand(B, N, generator=generator) < t.repeat_interleave(S, dim=1)
    if tail:
        chosen = torch.rand(t.shape, generator=generator) < tail
        first = torch.randint(S, t.shape, generator=generator)
        t = torch.where(chosen, 1 - first / S, t)
        tails = (torch.arange(S) >= first.unsqueeze(-1)).flatten(1)
        masked = torch.where(chosen.repeat_interleave(S, dim=1), tails, masked)
    masked = masked.to(clean.device)
    return Noisy(clean.masked_fill(masked, mask_token_id), masked, t.to(clean.device))


def near_masks(
    masked: Tensor, block_size: int, half: float, generator: torch.Generator, counted: Tensor | None = None
) -> Tensor:
    """Draw which masked positions' losses count: one with n masked before it in its block with probability
    2^(-n / half). Generation goes on from a block's first masks; those behind have most of the loss.

    Args:
        masked:  [B, N] bool; counted: [B, N] bool, positions that may count; None: all.
        half:    above 0, in tokens.
        generator: a CPU generator.
    Returns bool [B, N].
    """
    before = masked.view(-1, block_size).cumsum(-1) - 1
    share = torch.exp2(before.clamp(min=0) / -half).view_as(masked)
    near = masked & (torch.rand(masked.shape, generator=generator).to(masked.device) < share)
    return near if counted is None else near & counted


def encode_and_learn(model: TwoTowerModel, clean: Tensor, block_size: int, cu_seqlens: Tensor | None) -> CleanStates:
    """`encode_clean` with gradients: the denoiser's loss reaches the context tower by all that it hands over."""
    states = CleanStates(block_size, cu_seqlens)
    states.hidden = model.context_tower(clean, ForwardContext("clean", keep=states, cu_seqlens=cu_seqlens))
    return states


@torch.no_grad()
def own_predictions(
    model: TwoTowerModel, context: CleanStates, noisy: Noisy, share: float, generator: torch.Generator
) -> Noisy:
    """Put the denoiser's own predictions in place of masks, in a share of the blocks: a part of each drawn evenly, the
    surest first, as generation would have them there, right or wrong. t becomes the fraction that is masked still."""
    hidden = model.denoise_all(context, noisy.ids, noisy.t, output="hidden")
    rows, S, mask = hidden.flatten(0, 1), context.block_size, model.config.mask_token_id
    token, confidence = head_sample(
        rows, model.lm_head.weight, Sampling.of(len(rows), device=rows.device), suppress=mask
    )
    masked, (token, confidence) = noisy.masked.view(-1, S), (x.view(-1, S) for x in (token, confidence))
    blocks = len(masked)
    chosen, part = (torch.rand(blocks, generator=generator).to(rows.device) for _ in range(2))
    count = (part * masked.sum(-1) * (chosen < share)).long()  # of a block: fewer than are masked
    rank = confidence.masked_fill(~masked, -1).argsort(-1, descending=True).argsort(-1)
    taken = masked & (rank < count.unsqueeze(1))
    left = masked & ~taken
    t = torch.where(count > 0, left.float().mean(-1), noisy.t.flatten())
    ids = torch.where(taken, token, noisy.ids.view(-1, S))
    return Noisy(ids.view_as(noisy.ids), left.view_as(noisy.masked), t.view_as(noisy.t))


def denoiser_loss(
    model: TwoTowerModel,
    clean: Tensor,
    noisy: Noisy,
    cu_seqlens: Tensor | None = None,
    counted: Tensor | None = None,
    *,
    context: CleanStates | None = None,
    distil: float = 0.0,
) -> Tensor:
    """Mean negative log-likelihood (nats) over the masked positions; no 1 / t weight.

    The context tower runs once over `clean` without gradient; all noisy blocks go through the denoiser in one pass.

    Args:
        clean:      [B, N] int64; noisy: from `mask_blocks`.
        cu_seqlens: [n + 1] int32, multiples of the block size; None: every row is one sequence.
        counted:    [B, N] bool: positions whose loss counts where they are masked; None: all.
        context:    what `encode_clean` or `encode_and_learn` gave for `clean`, where that is known.
        distil:     the loss is (1 - distil) of this and distil of `distil_loss`.
    Gradients reach the denoiser tower, its head and the time modules.
    """
    if context is None:
        context = model.encode_clean(clean, clean.shape[1] // noisy.t.shape[1], cu_seqlens)
    hidden = model.denoise_all(context, noisy.ids, noisy.t, output="hidden").flatten(0, 1)
    masked = (noisy.masked if counted is None else noisy.masked & counted).flatten()
    loss = linear_cross_entropy(hidden, model.lm_head.weight, clean.flatten(), masked)
    return torch.lerp(loss, distil_loss(model, context, hidden, masked).to(loss), distil) if distil else loss


def distil_loss(model: TwoTowerModel, context: CleanStates, hidden: Tensor, masked: Tensor) -> Tensor:
    """Mean divergence (nats) from the context tower's distribution to the denoiser's, over masked positions [B * N]
    that follow a token of their sequence. The context tower has read every token before. Takes memory for the logits
    of these positions, twice."""
    assert context.hidden is not None
    follows = torch.ones_like(context.hidden[..., 0], dtype=torch.bool)
    follows[:, 0] = False
    follows = follows.flatten()
    if context.cu_seqlens is not None:
        follows[context.cu_seqlens[:-1].long()] = False
    places = (masked & follows).nonzero().squeeze(1)
    with torch.no_grad():
        wanted = model.context_lm_head(context.hidden.flatten(0, 1)[places - 1])
        wanted[:, model.config.mask_token_id] = -torch.inf  # which the denoiser never writes
        wanted = wanted.float().softmax(-1)
    found = model.lm_head(hidden[places]).float().log_softmax(-1)
    apart = torch.xlogy(wanted, wanted) - wanted * found
    return apart.sum() / max(1, len(places))
