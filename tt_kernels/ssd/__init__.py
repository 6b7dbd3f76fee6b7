"""Mamba-2's state-space scan from a seeded state: one token, short blocks, long sequences; with its convolution too."""

from . import block, chunk, mamba, mamba_token, step
from .block import ssd_advance, ssd_block
from .chunk import ssd_chunk
from .mamba import mamba_advance, mamba_block
from .mamba_token import mamba_step
from .step import ssd_step

OPS = (*step.OPS, *block.OPS, *chunk.OPS, *mamba.OPS, *mamba_token.OPS)

__all__ = ["OPS", "mamba_advance", "mamba_block", "mamba_step", "ssd_advance", "ssd_block", "ssd_chunk", "ssd_step"]
