"""Attention: a block against cached context, and the masks of training."""

from . import block_diffusion, context
from .block_diffusion import block_diffusion_attention, causal_attention
from .context import append_attention, context_attention

OPS = (*context.OPS, *block_diffusion.OPS)

__all__ = ["OPS", "append_attention", "block_diffusion_attention", "causal_attention", "context_attention"]
