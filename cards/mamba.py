"""Mamba-2 from the raw projection on, convolution and scan together."""

import torch

from tt_kernels.reference import MambaState, MambaWeights
from tt_kernels.ssm.launch import StepLaunch, TileLaunch
from tt_kernels.ssm.mamba_block import mamba_advance, mamba_block
from tt_kernels.ssm.mamba_extend import mamba_extend
from tt_kernels.ssm.mamba_step import mamba_step

from .op import Op
from .ssm import PUBLISHED, places, scan_inputs


def mamba_inputs(dtype, K, biased=1, placed=0, writes=False, **dims):
    """Time steps, A and states as of `scan_inputs`; xBC and dt are views of one projection, behind a gate of H P."""
    scan, (b, L, H, P, G, N) = scan_inputs(dtype, placed=placed, **dims), (dims[name] for name in "bLHPGN")
    C = H * P + 2 * G * N
    _, xBC, dt = torch.randn(b, L, H * P + C + H, dtype=dtype).split_with_sizes([H * P, C, H], -1)
    weight = torch.randn(C, K, dtype=dtype) / K**0.5
    bias = torch.randn(C, dtype=dtype) if biased else None
    state = MambaState(torch.randn(2 * b + 1 if placed else b, C, K, dtype=dtype), scan["ssm_state"])
    if placed:
        (conv, conv_out), (ssm, ssm_out) = places(b), places(b)
        state = state._replace(conv_indices=conv, ssm_indices=ssm)
        state = state._replace(conv_out_indices=conv_out, ssm_out_indices=ssm_out) if writes else state
    return dict(xBC=xBC, dt=dt, weights=MambaWeights(weight, bias, scan["A"], scan["D"], scan["dt_bias"]), state=state)


def _mamba_block_cost(itemsize, b, L, H, P, G, N, K, **_):
    C = H * P + 2 * G * N
    flops = 2 * b * L * (L * (G * N + H * P) + H * P * N + K * C)
    return flops, (b * L * (C + H * P + H) + (b + 1) * K * C) * itemsize + 4 * b * H * P * N


def _mamba_advance_inputs(dtype, ragged=1, **dims):
    inputs = mamba_inputs(dtype, writes=True, **dims)
    counts = torch.randint(0, dims["L"] + 1, (dims["b"],)) if ragged else None
    return inputs | dict(weights=inputs["weights"]._replace(D=None), counts=counts)


def _mamba_advance_cost(itemsize, b, L, H, P, G, N, K, **_):
    C, own = H * P + 2 * G * N, H * P + G * N
    moved = (b * L * (own + H) + (2 * b + 1) * K * C) * itemsize + 8 * b * H * P * N
    return 2 * b * L * (H * P * N + K * own), moved


_MAMBA_BLOCK_CASES = (
    dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4),
    dict(b=1, L=1, H=4, P=8, G=1, N=4, K=4, biased=0),
    dict(b=1, L=16, H=3, P=4, G=3, N=8, K=3),
    dict(b=1, L=0, H=2, P=3, G=1, N=4, K=4),
    dict(b=0, L=3, H=2, P=3, G=1, N=4, K=4),
    dict(b=1, L=29, H=2, P=35, G=1, N=17, K=2),
    dict(b=1, L=37, H=2, P=4, G=1, N=8, K=4),
    dict(b=2, L=6, H=2, P=4, G=1, N=8, K=4, placed=1),
    dict(b=2, L=35, H=2, P=4, G=1, N=8, K=4, placed=1),
)


def _mamba_step_inputs(dtype, **dims):
    inputs = mamba_inputs(dtype, L=1, writes=True, **dims)
    return inputs | {name: inputs[name].squeeze(1) for name in ("xBC", "dt")}


def _mamba_step_cost(itemsize, b, H, P, G, N, K, **_):
    C = H * P + 2 * G * N
    moved = 8 * b * H * P * N + (b * (C + H * P + H) + (2 * b + 1) * K * C) * itemsize
    return b * (6 * H * P * N + 2 * K * C), moved


_PUBLISHED = PUBLISHED | dict(K=4)
_MAMBA_GRADS = (
    *("xBC", "dt", "weights.conv_weight", "weights.conv_bias", "weights.A", "weights.D", "weights.dt_bias"),
    *("state.conv", "state.ssm"),
)


def _mamba_extend_inputs(dtype, ragged=1, **dims):
    counts = torch.randint(0, dims["L"] + 1, (dims["b"],)) if ragged else None
    return mamba_inputs(dtype, writes=True, **dims) | dict(counts=counts)


def _mamba_extend_cost(itemsize, b, L, H, P, G, N, K, **_):
    """The state read and written once; pairs of tokens in tiles of 64."""
    C = H * P + 2 * G * N
    flops = 2 * b * L * (min(L, 64) * (G * N + H * P) + 2 * H * P * N + K * C)
    return flops, (b * L * (C + H * P + H) + (2 * b + 1) * K * C) * itemsize + 8 * b * H * P * N


def _tiles(*heads: int) -> tuple[TileLaunch, ...]:
    """With so many of a head's channels a program; those with fewer tokens than the block give wrong results and drop
    out."""
    rows = ((16, 4), (16, 8), (32, 8))
    return tuple(TileLaunch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128, num_warps=warps) for t, warps in rows for p in heads)


OPS = (
    Op(
        fn=mamba_block,
        when="A denoiser's pass: convolution and scan of a block in one launch, states untouched.",
        inputs=mamba_inputs,
        cases=_MAMBA_BLOCK_CASES,
        shapes=(
            *(dict(b=1, L=L, **_PUBLISHED) for L in (16, 1, 32, 64)),
            *(dict(b=64, L=L, **_PUBLISHED) for L in (1, 16, 32, 64)),
            dict(b=1, L=16, **_PUBLISHED, placed=1),
        ),
        grows=dict(b=64, L=64),
        outputs=("y",),
        grads=_MAMBA_GRADS,
        cost=_mamba_block_cost,
        kernels=("_mamba_block_kernel", "_causal_conv1d_kernel", "_ssd_block_kernel"),
        candidates=dict(_mamba_block_kernel=_tiles(16, 32, 64)),
    ),
    Op(
        fn=mamba_advance,
        when="After a denoiser has finished a block, where its outputs are not needed.",
        inputs=_mamba_advance_inputs,
        cases=(*_MAMBA_BLOCK_CASES, dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4, ragged=0)),
        shapes=(
            dict(b=1, L=16, **_PUBLISHED, ragged=0),
            dict(b=1, L=16, **_PUBLISHED, ragged=1),
            dict(b=1, L=1, **_PUBLISHED, ragged=0),
            *(dict(b=b, L=L, **_PUBLISHED, ragged=1) for b, L in ((1, 32), (1, 64), (64, 16), (64, 64))),
            dict(b=1, L=16, **_PUBLISHED, placed=1),
        ),
        grows=dict(b=64, L=64),
        outputs=(),
        writes=("state.conv", "state.ssm"),
        cost=_mamba_advance_cost,
        kernels=("_mamba_advance_kernel", "_causal_conv1d_kernel", "_ssd_advance_kernel", "_conv_advance_kernel"),
        candidates=dict(_mamba_advance_kernel=_tiles(16, 32)),
    ),
    Op(
        fn=mamba_step,
        when="Decoding: convolution and scan of a token a row in one launch.",
        inputs=_mamba_step_inputs,
        cases=(
            dict(b=2, H=4, P=3, G=2, N=5, K=4),
            dict(b=1, H=3, P=8, G=3, N=4, K=3, biased=0),
            dict(b=0, H=2, P=3, G=1, N=4, K=4),
            dict(b=2, H=2, P=4, G=1, N=8, K=4, placed=1),
        ),
        shapes=(dict(b=1, **_PUBLISHED), dict(b=64, **_PUBLISHED), dict(b=64, **_PUBLISHED, placed=1)),
        grows=dict(b=64),
        outputs=("y",),
        writes=("state.conv", "state.ssm"),
        cost=_mamba_step_cost,
        kernels=("_mamba_step_kernel",),
        candidates=dict(
            _mamba_step_kernel=tuple(
                StepLaunch(BLOCK_P=p, BLOCK_N=128, num_warps=warps)
                for p, warps in ((8, 2), (8, 4), (16, 4), (32, 4), (64, 8))
            )
        ),
    ),
    Op(
        fn=mamba_extend,
        when="Prefill, commit passes and decoding alike: it picks the form by the number of tokens.",
        inputs=_mamba_extend_inputs,
        cases=(
            dict(b=2, L=5, H=4, P=3, G=2, N=5, K=4),
            dict(b=2, L=1, H=4, P=3, G=2, N=5, K=4, ragged=0, placed=1),
            dict(b=2, L=1, H=2, P=4, G=1, N=8, K=4, placed=1),
            dict(b=2, L=6, H=2, P=4, G=1, N=8, K=4, placed=1),
            dict(b=1, L=16, H=3, P=4, G=3, N=8, K=3, biased=0),
            dict(b=1, L=29, H=2, P=35, G=1, N=17, K=2),
            dict(b=1, L=0, H=2, P=3, G=1, N=4, K=4, placed=1),
            dict(b=2, L=35, H=2, P=4, G=1, N=8, K=4, placed=1),
            dict(b=2, L=70, H=2, P=4, G=1, N=8, K=4),
            dict(b=2, L=67, H=2, P=4, G=1, N=8, K=3, biased=0, ragged=0, placed=1),
            dict(b=0, L=3, H=2, P=3, G=1, N=4, K=4),
        ),
        shapes=(
            *(dict(b=1, L=L, **_PUBLISHED, ragged=0) for L in (16, 1, 2048)),
            *(dict(b=b, L=L, **_PUBLISHED, ragged=1) for b, L in ((1, 16), (1, 32), (32, 16), (32, 64))),
            dict(b=1, L=16, **_PUBLISHED, placed=1),
        ),
        grows=dict(b=64, L=64),
        outputs=("y",),
        writes=("state.conv", "state.ssm"),
        cost=_mamba_extend_cost,
        kernels=(
            *("_mamba_step_kernel", "_mamba_block_kernel", "_causal_conv1d_kernel", "_ssd_block_kernel"),
            *("_ssd_advance_kernel", "_chunk_steps_kernel", "_chunk_states_kernel", "_chunk_scan_kernel"),
        ),
    ),
)
