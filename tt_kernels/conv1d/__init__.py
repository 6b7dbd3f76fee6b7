"""Causal depthwise convolution with a carried state: the convolution, and the states that it leaves behind.

A conv state is the last K raw (not yet activated) columns of x, oldest first, zeros where there were none: [C, K].
"""

from .causal_conv1d import causal_conv1d
from .conv_states import conv_advance, conv_block_states

__all__ = ["causal_conv1d", "conv_advance", "conv_block_states"]
