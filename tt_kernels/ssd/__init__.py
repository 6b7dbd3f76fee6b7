"""Mamba-2's state-space scan from a seeded state: one token, short blocks, long sequences."""

from . import block, chunk, step
from .block import ssd_advance, ssd_block
from .chunk import ssd_chunk
from .step import ssd_step

OPS = (*step.OPS, *block.OPS, *chunk.OPS)

__all__ = ["OPS", "ssd_advance", "ssd_block", "ssd_chunk", "ssd_step"]
