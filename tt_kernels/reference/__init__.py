"""The mathematics of every op in plain PyTorch: any device, any float dtype (fp64 included), differentiable.

This folder is the specification. A public op of the same name and signature checks its arguments and calls the
function here, or a kernel that must agree with it. Shapes: B rows, L tokens of a row, T tokens in all, D hidden,
H heads (G groups of them), P head size, N state size, C channels, K taps or chosen experts, E experts, V vocabulary.
"""

from .attention import (
    AttentionWithLSE,
    append_attention,
    block_diffusion_attention,
    causal_attention,
    context_attention,
)
from .conv1d import causal_conv1d, conv_advance, conv_block_states
from .loss import linear_cross_entropy
from .mamba import MambaState, MambaWeights, mamba_advance, mamba_block, mamba_extend, mamba_step
from .moe import ExpertWeights, Matrix, Routing, experts, experts_norm, route
from .norm import Modulated, gated_group_norm, modulated_rms_norm, rms_norm
from .remasking import Remasked, Remasking, remask
from .sampling import Sampled, Sampling, gumbel_noise, head_sample, sample
from .ssd import SSDChunk, ssd_advance, ssd_block, ssd_chunk, ssd_step
from .unmasking import Committed, Strategy, Unmasked, commit, unmask, unmask_logits

__all__ = [
    "AttentionWithLSE",
    "Committed",
    "ExpertWeights",
    "MambaState",
    "MambaWeights",
    "Matrix",
    "Modulated",
    "Remasked",
    "Remasking",
    "Routing",
    "SSDChunk",
    "Sampled",
    "Sampling",
    "Strategy",
    "Unmasked",
    "append_attention",
    "block_diffusion_attention",
    "causal_attention",
    "causal_conv1d",
    "commit",
    "context_attention",
    "conv_advance",
    "conv_block_states",
    "experts",
    "experts_norm",
    "gated_group_norm",
    "gumbel_noise",
    "head_sample",
    "linear_cross_entropy",
    "mamba_advance",
    "mamba_block",
    "mamba_extend",
    "mamba_step",
    "modulated_rms_norm",
    "remask",
    "rms_norm",
    "route",
    "sample",
    "ssd_advance",
    "ssd_block",
    "ssd_chunk",
    "ssd_step",
    "unmask",
    "unmask_logits",
]
