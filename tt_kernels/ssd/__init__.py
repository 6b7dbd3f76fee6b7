"""Mamba-2's state-space scan from a seeded state: short blocks and long sequences."""

from . import block, chunk
from .block import ssd_advance, ssd_block
from .chunk import ssd_chunk

OPS = (*block.OPS, *chunk.OPS)

__all__ = ["OPS", "ssd_advance", "ssd_block", "ssd_chunk"]
