"""Attention: a block against cached context, and the masks of training."""

from .block_attention import block_diffusion_attention, causal_attention
from .context_attention import AttentionWithLSE, append_attention, context_attention

__all__ = ["AttentionWithLSE", "append_attention", "block_diffusion_attention", "causal_attention", "context_attention"]
