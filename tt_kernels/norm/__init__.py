"""RMS norms: plain, with modulation, gate and residual, and gated by groups of channels."""

from . import gated_group, modulated, rms
from .gated_group import gated_group_norm
from .modulated import modulated_rms_norm
from .rms import rms_norm

OPS = (*rms.OPS, *modulated.OPS, *gated_group.OPS)

__all__ = ["OPS", "gated_group_norm", "modulated_rms_norm", "rms_norm"]
