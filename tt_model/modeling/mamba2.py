"""The Mamba-2 mixer.

B batch, L tokens, D hidden, H heads of size P, G groups, N state size, I = H * P inner, C conv channels.
"""

import torch
from torch import Tensor, nn

from tt_kernels import (
    MambaState,
    MambaWeights,
    causal_conv1d,
    conv_block_states,
    gated_group_norm,
    mamba_block,
    mamba_extend,
    ssd_chunk,
)

from ..config import TwoTowerConfig
from .state import ForwardContext, Projected
from .wide import Wide


class Mamba2(Wide):
    """in_proj -> causal conv + SiLU -> selective scan -> gated group norm -> out_proj."""

    def __init__(self, config: TwoTowerConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, H, inner, C = config.hidden_size, config.mamba_num_heads, config.d_inner, config.conv_dim
        GN = config.n_groups * config.ssm_state_size
        self.projected, self.convolved = [inner, C, H], [inner, GN, GN]
        self.in_proj = nn.Linear(D, inner + C + H, bias=config.use_bias)
        self.conv1d = nn.Conv1d(C, C, config.conv_kernel, groups=C, bias=config.use_conv_bias)
        self.dt_bias = self.parameter(H)
        self.A_log = self.parameter(H)
        self.D = self.parameter(H)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, D, bias=config.use_bias)

    def forward(self, h_BLD: Tensor, ctx: ForwardContext) -> Tensor:
        c = self.config
        z_BLI, xBC_BLC, dt_BLH = self.in_proj(h_BLD).split_with_sizes(self.projected, -1)
        weights = MambaWeights(self.conv1d.weight.squeeze(1), self.conv1d.bias, -self.A_log.exp(), self.D, self.dt_bias)
        block = Projected(xBC_BLC, dt_BLH, weights, c.time_step_limit)
        if ctx.kind == "clean":
            y = self._whole_sequences(block, ctx)
        elif ctx.kind == "extend":
            y = mamba_extend(*block[:3], ctx.cache.mamba(self.layer), ctx.counts, dt_limit=c.time_step_limit)
        else:
            state = ctx.clean.mamba[self.layer] if ctx.kind == "noisy" else ctx.cache.mamba(self.layer)
            y = mamba_block(*block[:3], state, dt_limit=c.time_step_limit)
            if ctx.pending is not None:
                ctx.pending.mamba[self.layer] = block
        y = gated_group_norm(y.flatten(2), z_BLI, self.norm.weight, groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y)

    def _whole_sequences(self, block: Projected, ctx: ForwardContext) -> Tensor:
        """y [B, L, H, P] of sequences from zero states; keeps the states before blocks where `ctx.clean` wants them."""
        c, (xBC, dt, w, dt_limit) = self.config, block
        columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, cu_seqlens=ctx.cu_seqlens)
        x, B, C = columns.split_with_sizes(self.convolved, -1)
        b, L = columns.shape[:2]  # view: unflatten is Python and takes five times as long
        x = x.view(b, L, c.mamba_num_heads, -1)
        B, C = (t.view(b, L, c.n_groups, -1) for t in (B, C))
        size = None if ctx.clean is None else ctx.clean.block_size
        y, _, before = ssd_chunk(
            x, dt, w.A, B, C, w.D, w.dt_bias, cu_seqlens=ctx.cu_seqlens, chunk_size=size, dt_limit=dt_limit
        )
        if ctx.clean is not None:
            conv = conv_block_states(xBC, block_size=size, kernel_size=c.conv_kernel, cu_seqlens=ctx.cu_seqlens)
            ctx.clean.mamba[self.layer] = MambaState(conv.flatten(0, 1), before.flatten(0, 1))
        return y
