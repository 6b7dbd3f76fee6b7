"""Mamba-2 from the raw projection on, convolution and scan together; made of the parts of `conv1d` and `ssd`."""

from . import block, step
from .block import mamba_advance, mamba_block
from .step import mamba_step

OPS = (*block.OPS, *step.OPS)

__all__ = ["OPS", "mamba_advance", "mamba_block", "mamba_step"]
