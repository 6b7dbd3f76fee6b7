"""Causal depthwise convolution with a carried state: the convolution, and the states that it leaves behind.

A conv state is the last K raw (not yet activated) columns of x, oldest first, zeros where there were none: [B, C, K].
"""

from . import causal, states
from .causal import causal_conv1d
from .states import conv_block_states, conv_state

OPS = (*causal.OPS, *states.OPS)

__all__ = ["OPS", "causal_conv1d", "conv_block_states", "conv_state"]
