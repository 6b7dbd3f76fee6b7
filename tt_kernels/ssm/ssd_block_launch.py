"""The kernels of `ssd_block` and `ssd_advance`: one program for each row, head and slice of its state."""

import triton
from torch import Tensor

from ..runtime.launch import architecture, run
from ..runtime.slots import Slots
from .launch import TileLaunch, arithmetic, dense, lined_up, measured, ssm_slots
from .ssd_block_kernels import _ssd_advance_kernel, _ssd_block_kernel
from .ssd_chunk_launch import chunked, contiguous_slots


def longest_block(architecture: int, itemsize: int) -> int:
    """Tokens whose pairs a program's registers hold; longer blocks go through the chunked scan. fp32 operands take
    twice the registers: 64 of them spill kilobytes."""
    return 64 if architecture >= 90 and itemsize <= 2 else 32


def ssd_block_launch(rows: int, L: int, P: int, N: int, itemsize: int, architecture: int = 90) -> TileLaunch:
    """`rows`: rows times heads. Reading the state bounds it, so at few rows its P dimension is cut in slices, until
    some 256 programs share an H200's 132 multiprocessors; above 16 tokens the products of B and C, which every slice
    repeats, take longer than the state. 64 tokens fill the registers with pairs, fp32 operands twice, and sm_80 needs
    some for pointers. They are the rows of four warps: eight would compute every product twice, and fp32 alone needs
    their registers."""
    block_t = max(16, triton.next_power_of_2(L))
    block_p = max(16, triton.next_power_of_2(P))
    while block_p > 16 and rows * triton.cdiv(P, block_p) < 256 and block_t <= 16:
        block_p //= 2
    wide, long = itemsize > 2, block_t >= 64
    full = wide or long or (architecture < 90 and block_t == 16)
    block_p = min(block_p, 32 if full else 64)
    block_n = max(16, triton.next_power_of_2(N))
    return TileLaunch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8 if wide and long else 4)


def ssd_advance_launch(rows: int, L: int, P: int, N: int, itemsize: int) -> TileLaunch:
    """As `ssd_block_launch`, but its programs share nothing but B: slices cost little. Up to 32 tokens a tile: walking
    on takes no longer than a larger product."""
    block_t = min(max(16, triton.next_power_of_2(L)), 32)
    block_p = max(16, triton.next_power_of_2(P))
    while block_p > 16 and rows * triton.cdiv(P, block_p) < 256:
        block_p //= 2
    block_p = min(block_p, 32 if itemsize > 2 else 64)
    block_n = max(16, triton.next_power_of_2(N))
    return TileLaunch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n)


def _ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None,
    state_indices: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    if longest_block(architecture(x), x.element_size()) < L:
        initial = Slots.of(None if ssm_state is None else contiguous_slots(ssm_state), state_indices)
        return chunked(x, dt, A, B, C, D, dt_bias, initial, Slots.of(None), dt_limit=(low, high))[0]
    y = x.new_empty(x.shape)
    x, B, C = (lined_up(t) for t in (x, B, C))
    state = None if ssm_state is None else lined_up(ssm_state, 2)
    default = ssd_block_launch(b * H, L, P, N, x.element_size(), architecture(x))
    launch = measured("_ssd_block_kernel", default, x, b * H, L, P, N)
    run(
        _ssd_block_kernel,
        (b * H if L else 0, triton.cdiv(P, launch.BLOCK_P)),
        *(x, dt, *dense(A), B, C, *dense(D, dt_bias)),
        *(Slots.of(state, state_indices), y),
        *(*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3]),
        *((0, 0) if state is None else state.stride()[1:3]),
        *(L, H, H // G),
        P=P,
        N=N,
        **arithmetic(x, A, B, C, dt_limit=(low, high)),
        launch=launch,
    )
    return y


def _ssd_advance(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    counts: Tensor | None,
    state_indices: Tensor | None,
    out_indices: Tensor | None,
    low: float,
    high: float,
) -> None:
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    x, B = lined_up(x), lined_up(B)
    default = ssd_advance_launch(b * H, L, P, N, x.element_size())
    launch = measured("_ssd_advance_kernel", default, x, b * H, L, P, N)
    with ssm_slots(ssm_state, state_indices, out_indices) as (before, after):
        run(
            _ssd_advance_kernel,
            (b * H, triton.cdiv(P, launch.BLOCK_P)),
            *(x, dt, *dense(A), B, *dense(dt_bias), before, after, *dense(counts)),
            *(*x.stride()[:3], *dt.stride(), *B.stride()[:3], *before.ptr.stride()[1:3]),
            *(L, H, H // G),
            P=P,
            N=N,
            **arithmetic(x, A, B, dt_limit=(low, high)),
            launch=launch,
        )
