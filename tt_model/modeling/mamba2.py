"""The Mamba-2 mixer. B batch, L tokens, D hidden, H heads of size P, G groups, N state size, C conv channels."""

import torch
from torch import Tensor, nn

from tt_kernels import (
    MambaState,
    MambaWeights,
    causal_conv1d,
    conv_advance,
    conv_block_states,
    gated_group_norm,
    mamba_advance,
    mamba_block,
    mamba_step,
    ssd_chunk,
)

from ..config import TwoTowerConfig
from .wide import Wide

SHORT = 64  # tokens that the block form takes; longer stretches go through the chunked scan


class Mamba2(Wide):
    """in_proj -> causal conv + SiLU -> selective scan -> gated group norm -> out_proj."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
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

    def project(self, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z [B, L, H * P], raw xBC [B, L, C] and raw dt [B, L, H]."""
        return self.in_proj(h_BLD).split_with_sizes(self.projected, -1)

    def conv_parameters(self) -> tuple[Tensor, Tensor | None]:
        return self.conv1d.weight.squeeze(1), self.conv1d.bias

    def convolve(self, xBC_BLC: Tensor, state_BCK: Tensor | None, cu_seqlens: Tensor | None = None):
        """Convolved and activated x [B, L, H, P], B and C [B, L, G, N]."""
        c = self.config
        xBC = causal_conv1d(xBC_BLC, *self.conv_parameters(), state_BCK, cu_seqlens=cu_seqlens)
        x, B, C = xBC.split_with_sizes(self.convolved, -1)
        b, L = xBC.shape[:2]  # view: unflatten is Python and takes five times as long
        return x.view(b, L, c.mamba_num_heads, -1), B.view(b, L, c.n_groups, -1), C.view(b, L, c.n_groups, -1)

    def out(self, y_BLHP: Tensor, z_BLI: Tensor) -> Tensor:
        c = self.config
        y = gated_group_norm(y_BLHP.flatten(2), z_BLI, self.norm.weight, groups=c.n_groups, eps=c.layer_norm_epsilon)
        return self.out_proj(y)

    def scan_parameters(self) -> tuple[Tensor, Tensor]:
        return -self.A_log.exp(), self.D

    def forward(self, h_BLD: Tensor, conv: Tensor, ssm: Tensor, counts: Tensor | None = None, *, advance: bool = False):
        """L tokens from seeded states.

        Returns the output [B, L, D], what `advance` needs to replay them, and the states after the first counts[b]
        tokens of each row (all, if None) where `advance` is set.
        """
        z, xBC, dt = self.project(h_BLD)
        A, D = self.scan_parameters()
        limit, weights = self.config.time_step_limit, MambaWeights(*self.conv_parameters(), A, D, self.dt_bias)
        projected, states = (xBC, dt, A), None
        if h_BLD.shape[1] == 1 and advance and counts is None:  # autoregressive decoding
            states = conv.clone(), ssm.clone()
            y = mamba_step(xBC.squeeze(1), dt.squeeze(1), weights, MambaState(*states), dt_limit=limit).unsqueeze(1)
        elif h_BLD.shape[1] <= SHORT:
            y = mamba_block(xBC, dt, weights, MambaState(conv, ssm), dt_limit=limit)
            if advance:
                states = self.advance(*projected, conv, ssm, counts)
        else:
            x, B, C = self.convolve(xBC, conv)
            states = conv.clone(), ssm.clone()
            seeds = (self.dt_bias, states[1])
            y = ssd_chunk(x, dt, A, B, C, D, *seeds, counts=counts, chunk_size=None, dt_limit=limit).y
            conv_advance(xBC, states[0], counts)
        return self.out(y, z), projected, states

    def advance(self, xBC, dt, A, conv: Tensor, ssm: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Conv and SSM state after the first counts[b] of the tokens that `forward` was given."""
        weights, states = MambaWeights(*self.conv_parameters(), A, None, self.dt_bias), (conv.clone(), ssm.clone())
        mamba_advance(xBC, dt, weights, MambaState(*states), counts, dt_limit=self.config.time_step_limit)
        return states

    def encode(self, h_BND: Tensor, cu_seqlens: Tensor | None, block_size: int | None):
        """Whole sequences from zero state: the output and, with a block size, the states before each block:
        conv [B, N / S, C, K] and SSM [B, N / S, H, P, N]."""
        z, xBC, dt = self.project(h_BND)
        x, B, C = self.convolve(xBC, None, cu_seqlens)
        limit, packed = self.config.time_step_limit, dict(cu_seqlens=cu_seqlens)
        A, D = self.scan_parameters()
        y, _, before = ssd_chunk(x, dt, A, B, C, D, self.dt_bias, chunk_size=block_size, dt_limit=limit, **packed)
        states = None
        if block_size is not None:
            kernel = self.config.conv_kernel
            states = conv_block_states(xBC, block_size=block_size, kernel_size=kernel, **packed), before
        return self.out(y, z), states
