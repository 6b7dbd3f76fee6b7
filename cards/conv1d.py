"""The convolution: every channel with its own taps, then SiLU."""

import torch

from tt_kernels.conv1d.causal_conv1d import CausalConv1dLaunch, causal_conv1d
from tt_kernels.conv1d.conv_states import conv_advance, conv_block_states

from .op import Op


def _conv(dtype, B, L, C, K, seeded=1, packed=0, placed=0):
    return dict(
        x=torch.randn(B, L, C, dtype=dtype),
        weight=torch.randn(C, K, dtype=dtype),
        bias=torch.randn(C, dtype=dtype) if seeded else None,
        conv_state=torch.randn(B + 2 * placed, C, K, dtype=dtype) if seeded else None,
        state_indices=torch.randperm(B + 2, dtype=torch.int32)[:B] if placed else None,
        cu_seqlens=torch.tensor([0, L // 3, B * L]) if packed else None,
    )


def _advance_inputs(dtype, B, L, C, K, ragged=1, placed=0):
    counts = torch.randint(0, L + 1, (B,)) if ragged else None
    state = torch.randn(2 * B if placed else B, C, K, dtype=dtype)
    slots = torch.randperm(2 * B, dtype=torch.int32).split(B) if placed else (None, None)
    x = torch.randn(B, L, C, dtype=dtype)
    return dict(x=x, conv_state=state, counts=counts, state_indices=slots[0], out_indices=slots[1])


def _block_states_inputs(dtype, B, N, C, K, S, packed=0):
    cu_seqlens = torch.tensor([0, S, B * N]) if packed else None
    return dict(x=torch.randn(B, N, C, dtype=dtype), block_size=S, kernel_size=K, cu_seqlens=cu_seqlens)


_CHANNELS = dict(C=6144, K=4)

OPS = (
    Op(
        fn=causal_conv1d,
        when="The short convolution before a scan, of whole sequences, packed ones, or a block behind a state.",
        inputs=_conv,
        cases=(
            dict(B=2, L=5, C=6, K=4),
            dict(B=1, L=1, C=29, K=4),
            dict(B=2, L=7, C=3, K=2, seeded=0),
            dict(B=1, L=12, C=3, K=4, seeded=0, packed=1),
            dict(B=2, L=0, C=3, K=4),
            dict(B=2, L=40, C=70, K=3),
            dict(B=2, L=36, C=5, K=4, seeded=0, packed=1),
            dict(B=0, L=2, C=3, K=4),
            dict(B=2, L=5, C=6, K=4, placed=1),
        ),
        shapes=(
            *(dict(B=B, L=L, **_CHANNELS) for B, L in ((1, 1), (64, 1), (1, 16), (64, 16), (1, 64), (1, 8192))),
            dict(B=1, L=4096, **_CHANNELS, seeded=0),
            dict(B=1, L=8192, **_CHANNELS, seeded=0, packed=1),
        ),
        grows=dict(B=1024, L=64),
        outputs=("y",),
        grads=("x", "weight", "bias", "conv_state"),
        kernels=("_causal_conv1d_kernel",),
        candidates=dict(
            _causal_conv1d_kernel=tuple(
                CausalConv1dLaunch(BLOCK_L=rows, BLOCK_C=channels, num_warps=warps)
                for rows, channels, warps in (
                    (1, 256, 1),
                    (4, 256, 2),
                    (16, 64, 2),
                    (16, 128, 4),
                    (32, 128, 4),
                    (64, 128, 8),
                )
            )
        ),
        cost=lambda itemsize, B, L, C, K, **_: (2 * K * B * L * C, (2 * B * L * C + C * K) * itemsize),
    ),
    Op(
        fn=conv_advance,
        when="Beside `causal_conv1d`, when tokens are accepted. With the scan's state too: `mamba_advance`.",
        inputs=_advance_inputs,
        cases=(
            dict(B=3, L=5, C=6, K=4),
            dict(B=2, L=2, C=29, K=4, ragged=0),
            dict(B=2, L=0, C=3, K=4),
            dict(B=2, L=3, C=5, K=4, placed=1),
        ),
        shapes=(
            dict(B=1, L=16, **_CHANNELS),
            dict(B=1, L=1, **_CHANNELS, ragged=0),
            dict(B=64, L=16, **_CHANNELS),
            dict(B=1, L=4096, **_CHANNELS, ragged=0),
            dict(B=64, L=16, **_CHANNELS, placed=1),
        ),
        outputs=(),
        writes=("conv_state",),
        kernels=("_conv_advance_kernel",),
        cost=lambda itemsize, B, L, C, K, **_: (0, 2 * B * C * K * itemsize),
    ),
    Op(
        fn=conv_block_states,
        when="In block-diffusion training, for the convolution of every noisy block.",
        inputs=_block_states_inputs,
        cases=(
            dict(B=2, N=12, C=5, K=4, S=4),
            dict(B=1, N=7, C=3, K=4, S=2),
            dict(B=1, N=16, C=3, K=4, S=4, packed=1),
            dict(B=1, N=0, C=3, K=4, S=4),
        ),
        shapes=(dict(B=1, N=4096, **_CHANNELS, S=16), dict(B=1, N=8192, **_CHANNELS, S=16, packed=1)),
        outputs=("states",),
        grads=("x",),
        kernels=("_conv_block_states_kernel",),
        cost=lambda itemsize, B, N, C, K, S, **_: (0, 2 * B * -(-N // S) * C * K * itemsize),
    ),
)
