"""RMS norms: plain, with modulation, gate and residual, and gated by groups of channels."""

from .gated_group_norm import gated_group_norm
from .modulated_rms_norm import Modulated, modulated_rms_norm
from .rms_norm import rms_norm

__all__ = ["Modulated", "gated_group_norm", "modulated_rms_norm", "rms_norm"]
