"""State-space models: Mamba-2's scan from a carried state (ssd_*), and scan and convolution together (mamba_*)."""

from ..reference.mamba import MambaState, MambaWeights
from ..reference.ssd import SSDChunk
from .mamba_block import mamba_advance, mamba_block
from .mamba_extend import mamba_extend
from .mamba_step import mamba_step
from .ssd_block import ssd_advance, ssd_block
from .ssd_chunk import ssd_chunk
from .ssd_step import ssd_step

__all__ = [
    "MambaState",
    "MambaWeights",
    "SSDChunk",
    "mamba_advance",
    "mamba_block",
    "mamba_extend",
    "mamba_step",
    "ssd_advance",
    "ssd_block",
    "ssd_chunk",
    "ssd_step",
]
