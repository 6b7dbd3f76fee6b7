"""The Mamba-2 mixer.

B batch, L tokens, D hidden, H heads of size P, G groups, N state size, I = H * P inner, C conv channels.
"""

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
from .constants import Constant
from .linear import Linear
from .norm import Norm
from .state import ForwardContext, Projected
from .wide import Wide


def decay_rates(A_log: Tensor) -> Tensor:
    return -A_log.exp()


class Mamba2(Wide):
    """in_proj -> causal conv + SiLU -> selective scan -> gated group norm -> out_proj."""

    def __init__(self, config: TwoTowerConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        D, H, inner, C = config.hidden_size, config.mamba_num_heads, config.d_inner, config.conv_dim
        GN = config.n_groups * config.ssm_state_size
        self.projected, self.convolved = [inner, C, H], [inner, GN, GN]
        self.in_proj = Linear(D, inner + C + H, bias=config.use_bias)
        self.conv1d = nn.Conv1d(C, C, config.conv_kernel, groups=C, bias=config.use_conv_bias)
        self.dt_bias = self.parameter(H)
        self.A_log = self.parameter(H)
        self.D = self.parameter(H)
        self.A = Constant(decay_rates)
        self.norm = Norm(inner)
        self.out_proj = Linear(inner, D, bias=config.use_bias)

    def forward(self, h_BLD: Tensor, ctx: ForwardContext) -> Tensor:
        c = self.config
        z_BLI, xBC_BLC, dt_BLH = self.in_proj(h_BLD).split_with_sizes(self.projected, -1)
        weights = MambaWeights(
            self.conv1d.weight.squeeze(1), self.conv1d.bias, self.A(self.A_log), self.D, self.dt_bias
        )
        if (cache := ctx.cache) is not None:
            state = cache.mamba(self.layer)
            if ctx.kind == "extend":
                y = mamba_extend(xBC_BLC, dt_BLH, weights, state, ctx.counts, dt_limit=c.time_step_limit)
            else:
                y = mamba_block(xBC_BLC, dt_BLH, weights, state, dt_limit=c.time_step_limit)
            if ctx.pending is not None:
                ctx.pending.mamba[self.layer] = Projected(xBC_BLC, dt_BLH, weights, c.time_step_limit)
        elif ctx.clean is not None:
            y = mamba_block(xBC_BLC, dt_BLH, weights, ctx.clean.mamba[self.layer], dt_limit=c.time_step_limit)
        else:
            y = self._whole_sequences(xBC_BLC, dt_BLH, weights, ctx)
        y = gated_group_norm(y.flatten(2), z_BLI, self.norm.weight, groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y)

    def _whole_sequences(self, xBC_BLC: Tensor, dt_BLH: Tensor, w: MambaWeights, ctx: ForwardContext) -> Tensor:
        """y [B, L, H, P] of sequences from zero states; keeps the states before blocks where `ctx.keep` wants them."""
        c, keep, cu_seqlens = self.config, ctx.keep, ctx.cu_seqlens
        columns = causal_conv1d(xBC_BLC, w.conv_weight, w.conv_bias, cu_seqlens=cu_seqlens)
        x, B, C = columns.split_with_sizes(self.convolved, -1)
        b, L = columns.shape[:2]  # view: unflatten is Python and takes five times as long
        x = x.view(b, L, c.mamba_num_heads, -1)
        B, C = (t.view(b, L, c.n_groups, -1) for t in (B, C))
        size, limit = None if keep is None else keep.block_size, c.time_step_limit
        y, _, before = ssd_chunk(
            x, dt_BLH, w.A, B, C, self.D, w.dt_bias, cu_seqlens=cu_seqlens, chunk_size=size, dt_limit=limit
        )
        if keep is not None:
            conv = conv_block_states(
                xBC_BLC, block_size=keep.block_size, kernel_size=c.conv_kernel, cu_seqlens=cu_seqlens
            )
            keep.mamba[self.layer] = MambaState(conv.flatten(0, 1), before.flatten(0, 1))
        return y
