"""The two training losses: next token for a context tower, masked tokens for a denoiser.

B rows, N tokens of a row, S block size. Formulas: TwoTowerModel (arXiv 2606.26493), the paper's recipe.
"""

import torch
from torch import Tensor

from tt_kernels import linear_cross_entropy

from ..modeling.state import ForwardContext
from ..modeling.two_tower import TwoTowerModel


def ar_loss(model: TwoTowerModel, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood (nats) of every next token that lies in the same packed sequence.

    Args:
        ids:        [B, N] int64.
        cu_seqlens: [n + 1] int32 boundaries over the flattened B * N tokens; None: every row is one sequence.
    Gradients reach the context tower and its head.
    """
    hidden = model.context_tower(ids, ForwardContext("clean", cu_seqlens=cu_seqlens))
    has_next = torch.ones_like(ids, dtype=torch.bool)
    has_next[:, -1] = False
    if cu_seqlens is not None:
        has_next.view(-1)[cu_seqlens[1:].long() - 1] = False
    targets = ids.roll(-1, dims=1)
    return linear_cross_entropy(
        hidden.flatten(0, 1), model.context_lm_head.weight, targets.flatten(), has_next.flatten()
    )


def mask_blocks(
    clean: Tensor, block_size: int, mask_token_id: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw t ~ U(0, 1] for every block and mask each of its tokens with probability t.

    Args:
        clean: [B, N] int64, N a multiple of block_size.
        generator: a CPU generator, so that the draw is the same on every device.
    Returns:
        noisy [B, N], masked [B, N] bool, t [B, N / S] fp32.
    """
    B, N = clean.shape
    t = 1 - torch.rand(B, N // block_size, generator=generator)
    masked = torch.rand(B, N, generator=generator) < t.repeat_interleave(block_size, dim=1)
    masked = masked.to(clean.device)
    return clean.masked_fill(masked, mask_token_id), masked, t.to(clean.device)


def denoiser_loss(
    model: TwoTowerModel, clean: Tensor, noisy: Tensor, masked: Tensor, t: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Mean negative log-likelihood (nats) over the masked positions; no 1 / t weight.

    The context tower runs once over `clean` without gradient; all noisy blocks go through the denoiser in one pass.

    Args:
        clean, noisy: [B, N] int64; masked: [B, N] bool; t: [B, N / S], from `mask_blocks`.
        cu_seqlens:   [n + 1] int32, multiples of the block size; None: every row is one sequence.
    Gradients reach the denoiser tower, its head and the time modules.
    """
    context = model.encode_clean(clean, clean.shape[1] // t.shape[1], cu_seqlens)
    hidden = model.denoise_all(context, noisy, t, output="hidden")
    return linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, clean.flatten(), masked.flatten())
