"""The kernels of `mamba_block` and `mamba_advance`: convolution and scan in one launch, for few rows.

One program for each row, head and slice of its state. It convolves its own columns of x and its group's of B and C in
registers, as the other heads of the group do again.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..conv1d.causal import _causal_conv1d
from ..conv1d.states import _conv_state, move_on
from ..core import define
from ..lang import row_length
from ..launch import Launch, run
from ..reference.common import compute_dtype
from ..ssd.block_kernels import _ssd_advance, _ssd_block
from ..ssd.tile import arithmetic, block_outputs, dense, grow, lined_up, log_decays, measured, placed, replayed
from .conv import conv_parameters, convolved

# ---- kernels ----


@triton.jit
def _mamba_block_kernel(
    xBC_ptr,  # [b, L, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, L, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as D and dt_bias
    D_ptr,
    dt_bias_ptr,
    conv_ptr,  # [b, C, K]
    state_ptr,  # [b, H, P, N]
    y_ptr,  # [b, L, H, P], contiguous
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_cb,
    stride_cc,
    stride_ck,
    stride_sb,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    t = tl.arange(0, BLOCK_T)
    mask_t, mask_p, mask_n = t < L, offs_p < P, offs_n < N
    row = t.to(tl.int64)
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr += b * stride_cb

    # All that comes from afar, before anything waits for it; the state last: it goes on to shared memory at once.
    at = xBC_ptr + row[:, None] * stride_xl
    mask_x, mask_B = mask_t[:, None] & mask_p[None, :], mask_t[:, None] & mask_n[None, :]
    x = tl.load(at + c_x[None, :], mask=mask_x, other=0.0)  # [BLOCK_T, BLOCK_P]
    B = tl.load(at + c_B[None, :], mask=mask_B, other=0.0)  # [BLOCK_T, BLOCK_N]
    C = tl.load(at + c_C[None, :], mask=mask_B, other=0.0)
    conv_x = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K)
    conv_B = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K)
    conv_C = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_C, mask_n, K, BLOCK_K)
    A, D = tl.load(A_ptr + head).to(ACC), tl.load(D_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    at_dt = dt_ptr + b * stride_dtb + row * stride_dtl + head * stride_dth
    dt, a = log_decays(at_dt, mask_t, dt_bias, A, None, mask_t, LOW, HIGH)
    at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[:, None] * stride_sp + offs_n[None, :]
    state = tl.trans(tl.load(at_s, mask=mask_p[:, None] & mask_n[None, :], other=0.0).to(ACC))  # [BLOCK_N, BLOCK_P]

    C = convolved(C, conv_C, xBC_ptr, stride_xl, t, L, c_C, mask_n, K, ACC)
    B = convolved(B, conv_B, xBC_ptr, stride_xl, t, L, c_B, mask_n, K, ACC)
    x = convolved(x, conv_x, xBC_ptr, stride_xl, t, L, c_x, mask_p, K, ACC)
    y = block_outputs(x, B, C, D, dt, a, state, SPLIT, PRECISION, ACC, BLOCK_T, BLOCK_P)
    out = y_ptr + ((b * L + row) * H + head)[:, None] * P + offs_p[None, :]
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=mask_x)


@triton.jit
def _mamba_advance_kernel(
    xBC_ptr,  # [b, L, C]: H P channels of x, G N of B, G N of C
    dt_ptr,  # [b, L, H]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    A_ptr,  # [H], as dt_bias
    dt_bias_ptr,
    conv_ptr,  # [b, C, K]
    state_ptr,  # [b, H, P, N]
    lengths_ptr,  # [b]; None: all L
    new_conv_ptr,  # [b, C, K], contiguous
    new_ptr,  # [b, H, P, N], contiguous
    stride_xb,
    stride_xl,
    stride_dtb,
    stride_dtl,
    stride_dth,
    stride_cb,
    stride_cc,
    stride_ck,
    stride_sb,
    stride_sh,
    stride_sp,
    L,
    H,
    R,  # heads of a group
    G,
    P: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, head, group, offs_p, offs_n = placed(H, R, BLOCK_P, BLOCK_N)
    mask_p, mask_n = offs_p < P, offs_n < N
    mask_s = mask_p[None, :] & mask_n[:, None]
    c_x, c_B = head.to(tl.int32) * P + offs_p, H * P + group.to(tl.int32) * N + offs_n
    c_C = c_B + G * N
    xBC_ptr += b * stride_xb
    conv_ptr += b * stride_cb
    at_dt = dt_ptr + b * stride_dtb + head * stride_dth
    length = row_length(lengths_ptr, b, L)
    A = tl.load(A_ptr + head).to(ACC)
    dt_bias = tl.load(dt_bias_ptr + head).to(ACC)
    conv_x = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_x, mask_p, K, BLOCK_K)
    conv_B = conv_parameters(weight_ptr, bias_ptr, conv_ptr, stride_cc, stride_ck, c_B, mask_n, K, BLOCK_K)
    at_s = state_ptr + b * stride_sb + head * stride_sh + offs_p[None, :] * stride_sp + offs_n[:, None]
    state = tl.load(at_s, mask=mask_s, other=0.0).to(ACC)  # [BLOCK_N, BLOCK_P]
    for start in tl.range(0, length, BLOCK_T, disable_licm=True):
        t = start + tl.arange(0, BLOCK_T)
        at, mask_t = xBC_ptr + t.to(tl.int64)[:, None] * stride_xl, t < length  # what lies past the length is not read
        x = tl.load(at + c_x[None, :], mask=mask_t[:, None] & mask_p[None, :], other=0.0)  # [BLOCK_T, BLOCK_P]
        B = tl.load(at + c_B[None, :], mask=mask_t[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_T, BLOCK_N]
        left, weight = replayed(at_dt, stride_dtl, start, length, dt_bias, A, LOW, HIGH, BLOCK_T)
        B = convolved(B, conv_B, xBC_ptr, stride_xl, t, length, c_B, mask_n, K, ACC)
        x = convolved(x, conv_x, xBC_ptr, stride_xl, t, length, c_x, mask_p, K, ACC)
        state = grow(state * left, B, x, weight, SPLIT, PRECISION)
    out = new_ptr + ((b * H + head) * P + offs_p)[None, :] * N + offs_n[:, None]
    tl.store(out, state, mask=mask_s)

    new_conv_ptr += b * (H * P + 2 * G * N) * K
    move_on(xBC_ptr, conv_ptr, new_conv_ptr, stride_xl, 1, stride_cc, stride_ck, length, c_x, mask_p, K, BLOCK_K)
    if (head % R == 0) & (tl.program_id(1) == 0):  # once for a group
        move_on(xBC_ptr, conv_ptr, new_conv_ptr, stride_xl, 1, stride_cc, stride_ck, length, c_B, mask_n, K, BLOCK_K)
        move_on(xBC_ptr, conv_ptr, new_conv_ptr, stride_xl, 1, stride_cc, stride_ck, length, c_C, mask_n, K, BLOCK_K)


# ---- launches ----


def in_one_launch(rows: int, L: int) -> bool:
    """`rows`: rows times heads. By the compiled code, convolving B and C again for every head takes some 6000
    instructions of a warp a head and 16 tokens, 0.8 us for 64 heads on an H200 at two a cycle; a second launch and its
    round trip to memory take 2 to 3 us whatever the rows, and reading and writing the columns 0.1 us a row. So four
    rows of 64 heads and 16 tokens go in one launch, more in several. Above 32 tokens the convolution's columns do not
    fit into registers beside the pairs of tokens."""
    return L <= 32 and rows * triton.cdiv(L, 16) <= 256


def mamba_block_launch(rows: int, L: int, P: int, N: int) -> Launch:
    """Latency bounds it: one round trip to memory (everything is asked for before anything is waited for), three to L1
    for the taps to the left, some thirty barriers. Every slice of P repeats the convolution of B and C, so there are no
    more of them than give each of an H200's 132 multiprocessors a program: two of 32 for one row of 64 heads; above 16
    tokens one of 64. Eight warps: with four a thread holds twice as many numbers, and the compiler takes twice the
    barriers."""
    block_p = min(max(16, triton.next_power_of_2(P)), 64)
    if rows * triton.cdiv(P, block_p) < 128 and L <= 16:
        block_p = min(block_p, 32)
    block_t, block_n = max(16, triton.next_power_of_2(L)), max(16, triton.next_power_of_2(N))
    return Launch(BLOCK_T=block_t, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8, num_stages=1)


def mamba_advance_launch(P: int, N: int) -> Launch:
    """As `mamba_block_launch`: a round trip to memory to know how many tokens, then one for all else. 16 tokens a tile:
    registers hold no more beside the state; 17 to 32 tokens are two, the second read while the first is worked on."""
    block_p, block_n = min(max(16, triton.next_power_of_2(P)), 32), max(16, triton.next_power_of_2(N))
    return Launch(BLOCK_T=16, BLOCK_P=block_p, BLOCK_N=block_n, num_warps=8, num_stages=1)


def _sizes(xBC: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    H, P, N = state.shape[1:]
    return H, P, (xBC.shape[-1] - H * P) // (2 * N), N


def _convolved(
    xBC: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (b, L), (H, P, G, N) = xBC.shape[:2], _sizes(xBC, state)
    columns = _causal_conv1d(xBC, weight, bias, conv_state, True, None)
    x, B, C = columns.split_with_sizes([H * P, G * N, G * N], -1)
    return x.view(b, L, H, P), B.view(b, L, G, N), C.view(b, L, G, N)


def _mamba_block(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    low: float,
    high: float,
) -> Tensor:
    (b, L), (H, P, G, N), K = xBC.shape[:2], _sizes(xBC, state), weight.shape[1]
    if not in_one_launch(b * H, L):
        x, B, C = _convolved(xBC, weight, bias, conv_state, state)
        return _ssd_block(x, dt, A, B, C, D, dt_bias, state, low, high)
    y = xBC.new_empty(b, L, H, P)
    xBC, state = lined_up(xBC), lined_up(state, 2)
    default = mamba_block_launch(b * H, L, P, N)
    launch = measured("_mamba_block_kernel", default, xBC, b * H, L, P, N)
    run(
        _mamba_block_kernel,
        (b * H if L else 0, triton.cdiv(P, launch.BLOCK_P)),
        *(xBC, dt, *dense(weight, bias, A, D, dt_bias), conv_state, state, y),
        *(*xBC.stride()[:2], *dt.stride(), *conv_state.stride(), *state.stride()[:3]),
        *(L, H, H // G, G),
        P=P,
        N=N,
        K=K,
        **arithmetic(xBC, A, dt_limit=(low, high)),
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return y


def _mamba_advance(
    xBC: Tensor,
    dt: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor]:
    (b, L), (H, P, G, N), K = xBC.shape[:2], _sizes(xBC, state), weight.shape[1]
    if not in_one_launch(b * H, L):
        x, B, _ = _convolved(xBC, weight, bias, conv_state, state)
        return _conv_state(xBC, lengths, conv_state, K), _ssd_advance(x, dt, A, B, dt_bias, state, lengths, low, high)
    new_conv, new = _mamba_advance_fake(xBC, dt, weight, bias, A, dt_bias, conv_state, state)
    xBC, state = lined_up(xBC), lined_up(state, 2)
    default = mamba_advance_launch(P, N)
    launch = measured("_mamba_advance_kernel", default, xBC, b * H, L, P, N)
    run(
        _mamba_advance_kernel,
        (b * H, triton.cdiv(P, launch.BLOCK_P)),
        *(xBC, dt, *dense(weight, bias, A, dt_bias), conv_state, state, *dense(lengths), new_conv, new),
        *(*xBC.stride()[:2], *dt.stride(), *conv_state.stride(), *state.stride()[:3]),
        *(L, H, H // G, G),
        P=P,
        N=N,
        K=K,
        **arithmetic(xBC, A, dt_limit=(low, high)),
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return new_conv, new


# ---- op ----


def _mamba_block_fake(xBC, dt, weight, bias, A, D, dt_bias, conv_state, state, *_):
    return xBC.new_empty((*xBC.shape[:2], *state.shape[1:3]))


def _mamba_advance_fake(xBC, dt, weight, bias, A, dt_bias, conv_state, state, *_):
    return xBC.new_empty(conv_state.shape), state.new_empty(state.shape, dtype=compute_dtype(xBC.dtype, A.dtype))


mamba_block_forward = define(
    "mamba_block(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor D, Tensor dt_bias, "
    "Tensor conv_state, Tensor state, float low, float high) -> Tensor",
    _mamba_block,
    _mamba_block_fake,
)
mamba_advance_forward = define(
    "mamba_advance(Tensor xBC, Tensor dt, Tensor weight, Tensor? bias, Tensor A, Tensor dt_bias, Tensor conv_state, "
    "Tensor state, Tensor? lengths, float low, float high) -> (Tensor, Tensor)",
    _mamba_advance,
    _mamba_advance_fake,
)
