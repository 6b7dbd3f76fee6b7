"""How `mamba_block` and `mamba_advance` are launched: convolution and scan in one kernel for few rows, else apart.
`mamba_extend` takes the first, with the states, by a rule of its own."""

import triton
from torch import Tensor

from ..conv1d.causal_conv1d import _causal_conv1d
from ..conv1d.conv_states import _conv_advance, conv_slots
from ..reference.mamba import split_columns
from ..runtime.launch import run
from ..runtime.slots import NO_STATES, Slots
from .launch import TileLaunch, arithmetic, dense, lined_up, measured, ssm_slots
from .mamba_block_kernels import _mamba_advance_kernel, _mamba_block_kernel
from .ssd_block_launch import _ssd_advance, _ssd_block


def in_one_launch(rows: int, L: int) -> bool:
    """`rows`: rows times heads. One launch convolves B and C again for every head, by the compiled code some 6000
    instructions of a warp a head and 16 tokens, which grow with the rows; several cost a launch and a round trip to
    memory, which do not. Four rows of 64 heads and 16 tokens go in one launch, more in several. Above 32 tokens the
    convolution's columns do not fit into registers beside the pairs of tokens."""
    return L <= 32 and rows * triton.cdiv(L, 16) <= 256


def in_one_wave(rows: int, L: int, tf32: bool = False) -> bool:
    """As `in_one_launch`, of `mamba_extend`: where the kernel writes the states too it takes 200 registers and more, so
    that a program of eight warps is alone on its multiprocessor, of which an H200 has 132. By the compiled code two
    waves take longer than three launches. Above 16 tokens it spills on sm_100 under Triton 3.6, and with products in
    parts of `tf32`, as of fp16, everywhere. Where there is no token only this kernel copies the states."""
    return L == 0 or (rows <= 128 and L <= 16 and not tf32)


def mamba_block_launch(rows: int, L: int, P: int, N: int) -> TileLaunch:
    """Latency bounds it: one round trip to memory (everything is asked for before anything is waited for), three to L1
    for the taps to the left, some thirty barriers. Every slice of P repeats the convolution of B and C, so there are no
    more of them than give each of an H200's 132 multiprocessors a program: two of 32 for one row of 64 heads; above 16
    tokens one of 64. Eight warps: with four a thread holds twice as many numbers, and the compiler takes twice the
    barriers."""
    block_p = min(max(16, triton.next_power_of_2(P)), 64)
    if rows * triton.cdiv(P, block_p) < 128 and L <= 16:
        block_p = min(block_p, 32)
    block_t, block_n = max(16, triton.next_power_of_2(L)), max(16, triton.next_power_of_2(N))
    alone = 255 if block_t == 16 and block_p == 32 else None  # a program has its multiprocessor for itself
    return TileLaunch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8, maxnreg=alone)


def mamba_advance_launch(P: int, N: int) -> TileLaunch:
    """As `mamba_block_launch`: a round trip to memory to know how many tokens, then one for all else. 16 tokens a tile:
    registers hold no more beside the state; 17 to 32 tokens are two, the second read while the first is worked on."""
    block_p, block_n = min(max(16, triton.next_power_of_2(P)), 32), max(16, triton.next_power_of_2(N))
    return TileLaunch(BLOCK_T=16, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8)


def groups(xBC: Tensor, ssm: Tensor) -> int:
    H, P, N = ssm.shape[1:]
    return (xBC.shape[-1] - H * P) // (2 * N)


def _convolved(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, conv: Tensor, conv_indices: Tensor | None, ssm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return split_columns(_causal_conv1d(xBC, weight, bias, conv, conv_indices), ssm)


def _mamba_block(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv: Tensor,
    ssm: Tensor,
    conv_indices: Tensor | None,
    ssm_indices: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    if not in_one_launch(xBC.shape[0] * ssm.shape[1], xBC.shape[1]):
        x, B, C = _convolved(xBC, conv_weight, conv_bias, conv, conv_indices, ssm)
        return _ssd_block(x, dt, A, B, C, D, dt_bias, ssm, ssm_indices, low, high)
    columns, before = Slots.of(conv, conv_indices), Slots.of(lined_up(ssm, 2), ssm_indices)
    return joined(xBC, dt, conv_weight, conv_bias, A, D, dt_bias, columns, before, dt_limit=(low, high))


def joined(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    columns: Slots,
    before: Slots,
    after_columns: Slots = NO_STATES,
    after: Slots = NO_STATES,
    counts: Tensor | None = None,
    *,
    dt_limit: tuple[float, float],
) -> Tensor:
    """y in one launch, and where `after_columns` and `after` have slots the states after the first counts[b] tokens."""
    (b, L), (H, P, N), K = xBC.shape[:2], before.ptr.shape[1:], conv_weight.shape[1]
    G, xBC, y = groups(xBC, before.ptr), lined_up(xBC), xBC.new_empty(b, L, H, P)
    launch = measured("_mamba_block_kernel", mamba_block_launch(b * H, L, P, N), xBC, b * H, L, P, N)
    run(
        _mamba_block_kernel,
        (b * H if L or after.ptr is not None else 0, triton.cdiv(P, launch.BLOCK_P)),
        *(xBC, dt, *dense(conv_weight, conv_bias, A, D, dt_bias)),
        *(columns, after_columns, before, after, *dense(counts), y),
        *(*xBC.stride()[:2], *dt.stride(), *columns.ptr.stride()[1:], *before.ptr.stride()[1:3]),
        *(L, H, H // G, G),
        P=P,
        N=N,
        K=K,
        **arithmetic(xBC, A, dt_limit=dt_limit),
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return y


def _mamba_advance(
    xBC: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    dt_bias: Tensor,
    conv: Tensor,
    ssm: Tensor,
    conv_indices: Tensor | None,
    ssm_indices: Tensor | None,
    conv_out_indices: Tensor | None,
    ssm_out_indices: Tensor | None,
    counts: Tensor | None,
    low: float,
    high: float,
) -> None:
    (b, L), (H, P, N), G, K = xBC.shape[:2], ssm.shape[1:], groups(xBC, ssm), conv_weight.shape[1]
    if not in_one_launch(b * H, L):
        x, B, _ = _convolved(xBC, conv_weight, conv_bias, conv, conv_indices, ssm)
        _ssd_advance(x, dt, A, B, dt_bias, ssm, counts, ssm_indices, ssm_out_indices, low, high)
        _conv_advance(xBC, conv, counts, conv_indices, conv_out_indices)
        return
    xBC = lined_up(xBC)
    launch = measured("_mamba_advance_kernel", mamba_advance_launch(P, N), xBC, b * H, L, P, N)
    with (
        conv_slots(conv, b, conv_indices, conv_out_indices) as (columns, after_columns),
        ssm_slots(ssm, ssm_indices, ssm_out_indices) as (before, after),
    ):
        run(
            _mamba_advance_kernel,
            (b * H, triton.cdiv(P, launch.BLOCK_P)),
            *(xBC, dt, *dense(conv_weight, conv_bias, A, dt_bias)),
            *(columns, after_columns, before, after, *dense(counts)),
            *(*xBC.stride()[:2], *dt.stride(), *columns.ptr.stride()[1:], *before.ptr.stride()[1:3]),
            *(L, H, H // G, G),
            P=P,
            N=N,
            K=K,
            **arithmetic(xBC, A, dt_limit=(low, high)),
            BLOCK_K=triton.next_power_of_2(K),
            launch=launch,
        )
