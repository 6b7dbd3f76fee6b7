"""The scan from carried states: of a token, of blocks, of long sequences."""

import torch
from torch import Tensor

from tt_kernels.ssm.launch import StepLaunch, TileLaunch
from tt_kernels.ssm.ssd_block import ssd_advance, ssd_block
from tt_kernels.ssm.ssd_chunk import ssd_chunk
from tt_kernels.ssm.ssd_chunk_launch import ChunkScanLaunch
from tt_kernels.ssm.ssd_step import ssd_step

from .op import Op


def scan_inputs(dtype, b, L, H, P, G, N, seeded=1, placed=0):
    """Time steps from 1e-3 to 0.1 and A from -1 to -16, as Mamba-2 is initialised; a state far above the tokens.
    `placed`: rows read slots of a larger buffer."""
    wide = torch.promote_types(dtype, torch.float32)  # what a 16-bit model keeps in fp32
    step = torch.logspace(-3, -1, H, dtype=wide)
    inputs = dict(
        x=torch.randn(b, L, H, P, dtype=dtype),
        dt=torch.randn(b, L, H, dtype=dtype),
        A=-torch.linspace(1, 16, H, dtype=wide),
        B=torch.randn(b, L, G, N, dtype=dtype),
        C=torch.randn(b, L, G, N, dtype=dtype),
        D=torch.randn(H, dtype=wide),
        dt_bias=step.expm1().log(),
        ssm_state=10 * torch.randn(2 * b + 1 if placed else b, H, P, N, dtype=wide) if seeded else None,
    )
    return inputs | (dict(state_indices=places(b)[0]) if placed else {})


def places(b: int) -> tuple[Tensor, Tensor]:
    """Of 2 b + 1 slots those that rows read and those that they write: none of both."""
    slots = torch.randperm(2 * b + 1, dtype=torch.int32)
    return slots[:b], slots[b : 2 * b]


def _out(inputs: dict[str, Tensor | None], b: int, placed: int) -> dict[str, Tensor | None]:
    return inputs | dict(zip(("state_indices", "out_indices"), places(b), strict=True)) if placed else inputs


def _ssd_step_inputs(dtype, placed=0, **dims):
    inputs = _out(scan_inputs(dtype, L=1, placed=placed, **dims), dims["b"], placed)
    token = {name: t.squeeze(1) for name, t in inputs.items() if t is not None and name in ("x", "dt", "B", "C")}
    return inputs | token


def _ssd_step_cost(itemsize, b, H, P, G, N, **_):
    return 6 * b * H * P * N, 8 * b * H * P * N + b * (2 * H * P + 2 * G * N + H) * itemsize


def _ssd_advance_inputs(dtype, ragged=1, placed=0, **dims):
    inputs = _out(scan_inputs(dtype, placed=placed, **dims), dims["b"], placed)
    counts = torch.randint(0, dims["L"] + 1, (dims["b"],)) if ragged else None
    return {k: v for k, v in inputs.items() if k not in ("C", "D")} | dict(counts=counts)


def _ssd_block_cost(itemsize, b, L, H, P, G, N, seeded=1, **_):
    flops = 2 * b * L * (L * (G * N + H * P) + seeded * H * P * N)
    return flops, b * L * (2 * H * P + 2 * G * N + H) * itemsize + 4 * seeded * b * H * P * N


def _ssd_advance_cost(itemsize, b, L, H, P, G, N, **_):
    return 2 * b * L * H * P * N, b * L * (H * P + G * N + H) * itemsize + 8 * b * H * P * N


_SSD_BLOCK_CASES = (
    dict(b=2, L=5, H=4, P=3, G=2, N=5),
    dict(b=1, L=1, H=4, P=8, G=1, N=4),
    dict(b=1, L=16, H=3, P=4, G=3, N=8, seeded=0),
    dict(b=1, L=0, H=2, P=3, G=1, N=4),
    dict(b=0, L=3, H=2, P=3, G=1, N=4),
    dict(b=1, L=37, H=2, P=19, G=1, N=17),
    dict(b=1, L=70, H=1, P=4, G=1, N=8),
    dict(b=2, L=6, H=2, P=4, G=1, N=8, placed=1),
    dict(b=1, L=70, H=1, P=4, G=1, N=8, placed=1),
)
_SSD_ADVANCE_CASES = tuple({k: v for k, v in dims.items() if k != "seeded"} for dims in _SSD_BLOCK_CASES)


def _ssd_chunk_inputs(dtype, Q, packed=0, ragged=0, placed=0, **dims):
    b, L = dims["b"], dims["L"]
    cu_seqlens = torch.tensor([0, L // 3, L // 2, b * L]) if packed else None
    counts = torch.randint(0, L + 1, (b,)) if ragged else None
    inputs = _out(scan_inputs(dtype, placed=placed, **dims), b, placed)
    return dict(**inputs, counts=counts, chunk_size=Q or None, cu_seqlens=cu_seqlens)


def _ssd_chunk_cost(itemsize, b, L, H, P, G, N, Q, **_):
    flops = 2 * b * L * ((Q or 64) * (G * N + H * P) + 2 * H * P * N)
    states = 2 + -(-L // Q) if Q else 2
    return flops, b * L * (2 * H * P + 2 * G * N + H) * itemsize + 4 * b * states * H * P * N


_SCAN_GRADS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "ssm_state")
PUBLISHED = dict(H=64, P=64, G=8, N=128)
# Those with fewer tokens than the block give wrong results and drop out.
_TILES = tuple(TileLaunch(BLOCK_T=t, BLOCK_P=p, BLOCK_N=128) for t in (16, 32) for p in (16, 32, 64))


OPS = (
    Op(
        fn=ssd_step,
        when="Decoding, a token a row, where the convolution is yours. With it: `mamba_step`.",
        inputs=_ssd_step_inputs,
        cases=(
            dict(b=2, H=4, P=3, G=2, N=5),
            dict(b=1, H=3, P=8, G=1, N=4),
            dict(b=0, H=2, P=3, G=1, N=4),
            dict(b=2, H=2, P=4, G=1, N=8, placed=1),
        ),
        shapes=(dict(b=1, **PUBLISHED), dict(b=64, **PUBLISHED), dict(b=64, **PUBLISHED, placed=1)),
        grows=dict(b=64),
        outputs=("y",),
        writes=("ssm_state",),
        cost=_ssd_step_cost,
        kernels=("_ssd_step_kernel",),
        candidates=dict(
            _ssd_step_kernel=tuple(
                StepLaunch(BLOCK_P=p, BLOCK_N=128, num_warps=warps)
                for p, warps in ((4, 1), (8, 2), (16, 4), (32, 4), (64, 8))
            )
        ),
    ),
    Op(
        fn=ssd_block,
        when="A few tokens (up to 64) behind a state that must not change, such as a denoiser's block.",
        inputs=scan_inputs,
        cases=_SSD_BLOCK_CASES,
        shapes=tuple(dict(b=b, L=L, **PUBLISHED) for b, L in ((1, 16), (1, 1), (1, 64), (64, 16), (1, 32), (64, 64))),
        grows=dict(b=64, L=64),
        outputs=("y",),
        grads=_SCAN_GRADS,
        cost=_ssd_block_cost,
        kernels=("_ssd_block_kernel",),
        candidates=dict(_ssd_block_kernel=_TILES),
    ),
    Op(
        fn=ssd_advance,
        when="When tokens of a block are accepted: the state moves, no output is made.",
        inputs=_ssd_advance_inputs,
        cases=(*_SSD_ADVANCE_CASES, dict(b=2, L=5, H=4, P=3, G=2, N=5, ragged=0)),
        shapes=tuple(
            dict(b=b, L=L, **PUBLISHED, ragged=ragged)
            for b, L, ragged in ((1, 16, 0), (1, 1, 0), (1, 64, 1), (64, 16, 1), (1, 32, 1), (64, 64, 1))
        ),
        grows=dict(b=64, L=64),
        outputs=(),
        writes=("ssm_state",),
        cost=_ssd_advance_cost,
        kernels=("_ssd_advance_kernel",),
        candidates=dict(_ssd_advance_kernel=_TILES),
    ),
    Op(
        fn=ssd_chunk,
        when="Prefill and training: long sequences, packed or ragged, in time linear in their length.",
        inputs=_ssd_chunk_inputs,
        cases=(
            dict(b=2, L=7, H=4, P=3, G=2, N=5, Q=4),
            dict(b=1, L=33, H=2, P=4, G=1, N=8, Q=8, seeded=0, packed=1),
            dict(b=2, L=7, H=2, P=4, G=2, N=8, Q=64, seeded=0),
            dict(b=1, L=0, H=2, P=3, G=1, N=4, Q=4),
            dict(b=0, L=5, H=2, P=3, G=1, N=4, Q=4),
            dict(b=2, L=100, H=2, P=17, G=1, N=8, Q=64, ragged=1),
            dict(b=1, L=90, H=2, P=4, G=1, N=8, Q=20, seeded=0, packed=1),
            dict(b=2, L=100, H=2, P=4, G=1, N=8, Q=0, ragged=1),
            dict(b=1, L=150, H=1, P=4, G=1, N=8, Q=70),
            dict(b=2, L=20, H=1, P=4, G=1, N=8, Q=8, placed=1),
            dict(b=1, L=400, H=1, P=4, G=1, N=8, Q=0, placed=1),
        ),
        shapes=(
            *(dict(b=1, L=L, **PUBLISHED, Q=Q) for L in (4096, 8192) for Q in (64, 0)),
            dict(b=1, L=2048, **PUBLISHED, Q=0),
            dict(b=1, L=2048, **PUBLISHED, Q=0, placed=1),
            dict(b=1, L=8192, **PUBLISHED, Q=16, seeded=0),
            dict(b=1, L=8192, **PUBLISHED, Q=16, seeded=0, packed=1),
            dict(b=1, L=100, **PUBLISHED, Q=0),
            dict(b=64, L=128, **PUBLISHED, Q=0, ragged=1),
        ),
        grows=dict(b=64, L=1024),
        outputs=("y", "final_state", "chunk_states"),
        writes=("ssm_state",),
        grads=_SCAN_GRADS,
        cost=_ssd_chunk_cost,
        kernels=("_chunk_steps_kernel", "_chunk_states_kernel", "_chunk_scan_kernel"),
        candidates=dict(
            _chunk_scan_kernel=tuple(
                ChunkScanLaunch(BLOCK_T=t, BLOCK_U=u, BLOCK_P=p, BLOCK_N=128, STAGES=stages)
                for t, u, p, stages in (
                    *((64, 32, 64, 1), (64, 16, 64, 2), (64, 32, 32, 1), (16, 16, 32, 1), (16, 16, 32, 2)),
                )
            )
        ),
        tensor_cores={"_chunk_states_kernel": "BLOCK_N", "_chunk_scan_kernel": "BLOCK_T"},
    ),
)
