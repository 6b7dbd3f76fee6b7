"""The kernels of `ssd_block` and `ssd_advance`: one program for each row, head and slice of its state."""

import triton
import triton.language as tl
from torch import Tensor

from ..core import define
from ..lang import row_length
from ..launch import Launch, architecture, run
from ..reference.common import compute_dtype
from .scan import _ssd_chunk
from .tile import arithmetic, block_outputs, dense, grow, lined_up, log_decays, measured, placed, replayed

# ---- kernels ----


@triton.jit
def _ssd_block_kernel(
    x_ptr,  # [b, L, H, P]
    dt_ptr,  # [b, L, H]
    A_ptr,  # [H], as D and dt_bias
    B_ptr,  # [b, L, G, N], as C
    C_ptr,
    D_ptr,
    bias_ptr,
    state_ptr,  # [b, H, P, N]; None: zeros
    y_ptr,  # [b, L, H, P], contiguous
    stride_xb,
    stride_xl,
    stride_xh,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_Cb,
    stride_Cl,
    stride_Cg,
    stride_sb,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_t, mask_p, mask_n = t < L, offs_p < P, offs_n < N
    row = t.to(tl.int64)

    A = tl.load(A_ptr + head).to(ACC)
    bias = tl.load(bias_ptr + head).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + row * stride_dtl + head * stride_dth
    dt, a = log_decays(at_dt, mask_t, bias, A, None, mask_t, LOW, HIGH)
    at_B = B_ptr + b * stride_Bb + group * stride_Bg
    at_C = C_ptr + b * stride_Cb + group * stride_Cg
    B = tl.load(at_B + row[:, None] * stride_Bl + offs_n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)
    C = tl.load(at_C + row[:, None] * stride_Cl + offs_n[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)
    at_x = x_ptr + b * stride_xb + head * stride_xh
    mask_x = mask_t[:, None] & mask_p[None, :]
    x = tl.load(at_x + row[:, None] * stride_xl + offs_p[None, :], mask=mask_x, other=0.0)  # [BLOCK_T, BLOCK_P]
    state = None
    if state_ptr is not None:
        at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
        state = tl.trans(tl.load(at_s, mask=mask_p[:, None] & mask_n[None, :], other=0.0).to(ACC))  # [BLOCK_N, BLOCK_P]
    D = tl.load(D_ptr + head).to(ACC)
    y = block_outputs(x, B, C, D, dt, a, state, SPLIT, PRECISION, ACC, BLOCK_T, BLOCK_P)
    out = y_ptr + ((b * L + row) * H + head)[:, None] * P + offs_p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)


@triton.jit
def _ssd_advance_kernel(
    x_ptr,  # [b, L, H, P]
    dt_ptr,  # [b, L, H]
    A_ptr,  # [H], as dt_bias
    B_ptr,  # [b, L, G, N]
    bias_ptr,
    state_ptr,  # [b, H, P, N]; None: zeros
    lengths_ptr,  # [b]; None: all L
    new_ptr,  # [b, H, P, N], contiguous
    stride_xb,
    stride_xl,
    stride_xh,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_Bb,
    stride_Bl,
    stride_Bg,
    stride_sb,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    P: tl.constexpr,
    N: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[None, :] & mask_n[:, None]
    A = tl.load(A_ptr + head).to(ACC)
    bias = tl.load(bias_ptr + head).to(ACC)
    length = row_length(lengths_ptr, b, L)
    state = tl.zeros((BLOCK_N, BLOCK_P), dtype=ACC)
    if state_ptr is not None:
        at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[None, :] * stride_sp + offs_n[:, None]
        state = tl.load(at_s, mask=mask_s, other=0.0).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + head * stride_dth
    for start in tl.range(0, length, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        mask_t = t < length  # what lies past the length is not read
        row = t.to(tl.int64)
        left, weight = replayed(at_dt, stride_dtl, start, length, bias, A, LOW, HIGH, BLOCK_T)
        at_x = x_ptr + b * stride_xb + row[:, None] * stride_xl + head * stride_xh + offs_p[None, :]
        x = tl.load(at_x, mask=mask_t[:, None] & mask_p[None, :], other=0.0)  # [BLOCK_T, BLOCK_P]
        at_B = B_ptr + b * stride_Bb + row[:, None] * stride_Bl + group * stride_Bg + offs_n[None, :]
        B = tl.load(at_B, mask=mask_t[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        state = grow(state * left, B, x, weight, SPLIT, PRECISION)
    out = new_ptr + ((b * H + head) * P + offs_p)[None, :] * N + offs_n[:, None]
    tl.store(out, state, mask=mask_s)


# ---- launches ----


def longest_block(architecture: int, itemsize: int) -> int:
    """Tokens whose pairs a program's registers hold; longer blocks go through the chunked scan. fp32 operands take
    twice the registers: 64 of them spill kilobytes."""
    return 64 if architecture >= 90 and itemsize <= 2 else 32


def ssd_block_launch(rows: int, L: int, P: int, N: int, itemsize: int, architecture: int = 90) -> Launch:
    """`rows`: rows times heads. Reading the state bounds it, so at few rows its P dimension is cut in slices, until
    some 256 programs share an H200's 132 multiprocessors; above 16 tokens the products of B and C, which every slice
    repeats, take longer than the state. 64 tokens fill the registers with pairs, fp32 operands twice, and sm_80 needs
    some for pointers."""
    block_t = max(16, triton.next_power_of_2(L))
    block_p = max(16, triton.next_power_of_2(P))
    while block_p > 16 and rows * triton.cdiv(P, block_p) < 256 and block_t <= 16:
        block_p //= 2
    full = itemsize > 2 or block_t >= 64 or (architecture < 90 and block_t == 16)
    block_p = min(block_p, 32 if full else 64)
    block_n = max(16, triton.next_power_of_2(N))
    return Launch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8 if block_t >= 64 else 4, num_stages=1)


def ssd_advance_launch(rows: int, L: int, P: int, N: int, itemsize: int) -> Launch:
    """As `ssd_block_launch`, but its programs share nothing but B: slices cost little. Up to 32 tokens a tile: walking
    on takes no longer than a larger product."""
    block_t = min(max(16, triton.next_power_of_2(L)), 32)
    block_p = max(16, triton.next_power_of_2(P))
    while block_p > 16 and rows * triton.cdiv(P, block_p) < 256:
        block_p //= 2
    block_p = min(block_p, 32 if itemsize > 2 else 64)
    block_n = max(16, triton.next_power_of_2(N))
    return Launch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=4, num_stages=1)


def _ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    if longest_block(architecture(x), x.element_size()) < L:
        return _ssd_chunk(x, dt, A, B, C, D, dt_bias, state, None, None, None, low, high)[0]
    y = x.new_empty(x.shape)
    x, B, C, state = *(lined_up(t) for t in (x, B, C)), lined_up(state, 2)
    default = ssd_block_launch(b * H, L, P, N, x.element_size(), architecture(x))
    launch = measured("_ssd_block_kernel", default, x, b * H, L, P, N)
    run(
        _ssd_block_kernel,
        (b * H if L else 0, triton.cdiv(P, launch.BLOCK_P)),
        *(x, dt, *dense(A), B, C, *dense(D, dt_bias), state, y),
        *(*x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3]),
        *((0, 0, 0) if state is None else state.stride()[:3]),
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
    state: Tensor | None,
    lengths: Tensor | None,
    low: float,
    high: float,
) -> Tensor:
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    new = _ssd_advance_fake(x, dt, A, B)
    x, B, state = lined_up(x), lined_up(B), lined_up(state, 2)
    default = ssd_advance_launch(b * H, L, P, N, x.element_size())
    launch = measured("_ssd_advance_kernel", default, x, b * H, L, P, N)
    run(
        _ssd_advance_kernel,
        (b * H, triton.cdiv(P, launch.BLOCK_P)),
        *(x, dt, *dense(A), B, *dense(dt_bias), state, *dense(lengths), new),
        *(*x.stride()[:3], *dt.stride(), *B.stride()[:3]),
        *((0, 0, 0) if state is None else state.stride()[:3]),
        *(L, H, H // G),
        P=P,
        N=N,
        **arithmetic(x, A, B, dt_limit=(low, high)),
        launch=launch,
    )
    return new


# ---- op ----


def _ssd_advance_fake(x, dt, A, B, *_):
    return x.new_empty((*x.shape[:1], *x.shape[2:], B.shape[3]), dtype=compute_dtype(x.dtype, A.dtype))


ssd_block_forward = define(
    "ssd_block(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, Tensor? state, float low, "
    "float high) -> Tensor",
    _ssd_block,
    lambda x, *_: x.new_empty(x.shape),
)
ssd_advance_forward = define(
    "ssd_advance(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor dt_bias, Tensor? state, Tensor? lengths, float low, "
    "float high) -> Tensor",
    _ssd_advance,
    _ssd_advance_fake,
)
