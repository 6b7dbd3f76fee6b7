"""The conv states that sequences leave behind: copies of the last raw columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..core import Op, check, define, is_whole, refuse, takes_kernel, wants_gradients
from ..lang import row_length
from ..launch import Launch, run
from ..packed import resets

# ---- kernels ----


@triton.jit
def move_on(
    x_ptr,
    state_ptr,
    new_ptr,
    stride_xl,
    stride_xc,
    stride_sc,
    stride_sk,
    length,
    c,
    mask_c,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a row's state [C, K] after `length` tokens for channels c [BLOCK_C]; state_ptr None: zeros before them."""
    c = c[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = mask_c[:, None] & (k < K)  # [BLOCK_C, BLOCK_K]
    source = length - K + k  # below 0: before x
    at = x_ptr + source.to(tl.int64) * stride_xl + c.to(tl.int64) * stride_xc
    column = tl.load(at, mask=mask & (source >= 0), other=0.0)
    if state_ptr is not None:
        at = state_ptr + c.to(tl.int64) * stride_sc + (source + K).to(tl.int64) * stride_sk
        before = tl.load(at, mask=mask & (source < 0), other=0.0)
        column = tl.where(source < 0, before.to(column.dtype), column)
    tl.store(new_ptr + c * K + k, column, mask=mask)


@triton.jit
def _conv_state_kernel(
    x_ptr,  # [B, L, C]
    lengths_ptr,  # [B]; None: all L
    state_ptr,  # [B, C, K]; None: zeros
    new_ptr,  # [B, C, K], contiguous
    stride_xb,
    stride_xl,
    stride_xc,
    stride_sb,
    stride_sc,
    stride_sk,
    L,
    C,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    length = row_length(lengths_ptr, b, L)
    if state_ptr is not None:
        state_ptr += b * stride_sb
    x_ptr += b * stride_xb
    new_ptr += b * C * K
    move_on(x_ptr, state_ptr, new_ptr, stride_xl, stride_xc, stride_sc, stride_sk, length, c, c < C, K, BLOCK_K)


@triton.jit
def _conv_block_states_kernel(
    x_ptr,  # [B, N, C]
    resets_ptr,  # [B * N]; None: no sequence starts
    states_ptr,  # [B, blocks, K, C], contiguous
    stride_xb,
    stride_xl,
    N,
    C,
    blocks,
    block_size,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    b = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * block_size + tl.zeros((BLOCK_C,), dtype=tl.int32)  # its masks are vectors
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = states_ptr + tl.program_id(0).to(tl.int64) * K * C + c
    alive = c < C  # and whether the token is of the sequence that the block starts with
    for back in tl.static_range(1, K + 1):
        source = start - back
        if resets_ptr is not None:
            alive = alive & (tl.load(resets_ptr + b * N + source + 1, mask=source >= -1, other=1) == 0)
        at = x_ptr + b * stride_xb + source.to(tl.int64) * stride_xl + c
        column = tl.load(at, mask=alive & (source >= 0), other=0.0)
        tl.store(out + (K - back) * C, column, mask=c < C)


# ---- launches ----


def conv_state_launch(B: int, C: int, K: int) -> Launch:
    """A few numbers a thread, which are read column by column: only many programs hide that."""
    block_c = min(triton.next_power_of_2(C), 128)
    return Launch(BLOCK_C=block_c, BLOCK_K=triton.next_power_of_2(K), num_warps=4, num_stages=1)


def conv_block_states_launch(C: int, itemsize: int) -> Launch:
    """16 bytes a thread and column; a program copies its channels of all K columns."""
    block_c = min(triton.next_power_of_2(C), 2048 // itemsize)
    return Launch(BLOCK_C=block_c, num_warps=4, num_stages=1)


def _conv_state(x: Tensor, lengths: Tensor | None, state: Tensor | None, kernel_size: int) -> Tensor:
    new = _conv_state_fake(x, lengths, state, kernel_size)
    B, L, C = x.shape
    launch = conv_state_launch(B, C, kernel_size)
    run(
        _conv_state_kernel,
        (B, triton.cdiv(C, launch.BLOCK_C)),
        *(x, None if lengths is None else lengths.contiguous(), state, new, *x.stride()),
        *((0, 0, 0) if state is None else state.stride()),
        *(L, C),
        K=kernel_size,
        launch=launch,
    )
    return new


def _conv_block_states(x: Tensor, block_size: int, kernel_size: int, cu_seqlens: Tensor | None) -> Tensor:
    states = _conv_block_states_fake(x, block_size, kernel_size)
    x = x if x.stride(-1) == 1 else x.contiguous()
    (B, N, C), blocks = x.shape, states.shape[1]
    launch = conv_block_states_launch(C, x.element_size())
    run(
        _conv_block_states_kernel,
        (B * blocks, triton.cdiv(C, launch.BLOCK_C)),
        *(x, resets(cu_seqlens, B, N), states, *x.stride()[:2], N, C, blocks, block_size),
        K=kernel_size,
        launch=launch,
    )
    return states


# ---- op ----


def _conv_state_fake(x, lengths, state, kernel_size):
    return x.new_empty(x.shape[0], x.shape[2], kernel_size)


def _conv_block_states_fake(x, block_size, kernel_size, *_):
    return x.new_empty(x.shape[0], -(-x.shape[1] // block_size), kernel_size, x.shape[2])


_state_after = define(
    "conv_state(Tensor x, Tensor? lengths, Tensor? state, SymInt kernel_size) -> Tensor", _conv_state, _conv_state_fake
)
_block_states = define(
    "conv_block_states(Tensor x, SymInt block_size, SymInt kernel_size, Tensor? cu_seqlens) -> Tensor",
    _conv_block_states,
    _conv_block_states_fake,
)


def conv_state(x: Tensor, lengths: Tensor | None, state: Tensor | None, *, kernel_size: int) -> Tensor:
    """The conv state after the first lengths[b] tokens of each row.

    Args:
        x:           [B, L, C] float: raw columns.
        lengths:     [B] int, 0 to L, or None for all L; what lies past a row's length may be anything. Kernels cut
                     other lengths to 0 or L, the reference refuses them where they are on a CPU.
        state:       [B, C, K] float: the state before x; None: zeros.
        kernel_size: K.
    Returns:
        state: [B, C, K] dtype of x, contiguous, in new memory.

    Copies without arithmetic. Gradients for x and state: where they are wanted the reference runs. Raises ValueError
    for sizes that disagree.
    Cost: 2 B C K itemsize bytes (the reference also copies x). Source: `conv_state` of causal-conv1d's
    `causal_conv1d_update`, whose oldest column the next token does not read.
    """
    check("conv_state", 1, x=(x, "B L C"), lengths=(lengths, "B", int), state=(state, "B C K"))
    if not is_whole(kernel_size) or kernel_size < 1 or (state is not None and state.shape[-1] != kernel_size):
        refuse("conv_state", "kernel_size", kernel_size, "1 or more" if state is None else f"K={state.shape[-1]}")
    if not takes_kernel("conv_state", x, state) or wants_gradients(x, state):
        return reference.conv_state(x, lengths, state, kernel_size=kernel_size)
    return _state_after(x, lengths, state, kernel_size)


def conv_block_states(x: Tensor, *, block_size: int, kernel_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The conv states before every block of whole sequences, as training needs them.

    Args:
        x:           [B, N, C] float: raw columns from the start of each row.
        block_size:  S, tokens of a block.
        kernel_size: K.
        cu_seqlens:  as in `causal_conv1d`.
    Returns:
        states: [B, ceil(N / S), C, K] dtype of x, laid out as [B, ceil(N / S), K, C].

    The number of blocks is a size of the result: an export with a dynamic N holds for one block or for several, as its
    example had.
    Copies without arithmetic. Gradients for x: where they are wanted the reference runs. Raises ValueError for sizes
    below 1.
    Cost: 2 B ceil(N / S) C K itemsize bytes.
    """
    check("conv_block_states", 1, x=(x, "B N C"), cu_seqlens=(cu_seqlens, "sequences+1", int))
    for name, value in (("block_size", block_size), ("kernel_size", kernel_size)):
        if not is_whole(value) or value < 1:
            refuse("conv_block_states", name, value, "1 or more")
    if not takes_kernel("conv_block_states", x) or wants_gradients(x):
        return reference.conv_block_states(x, block_size=block_size, kernel_size=kernel_size, cu_seqlens=cu_seqlens)
    return _block_states(x, block_size, kernel_size, cu_seqlens).transpose(2, 3)


# ---- card ----


def _state_inputs(dtype: torch.dtype, B: int, L: int, C: int, K: int, ragged: int = 1) -> dict[str, object]:
    lengths = torch.randint(0, L + 1, (B,)) if ragged else None
    state = torch.randn(B, C, K, dtype=dtype) if ragged else None
    return dict(x=torch.randn(B, L, C, dtype=dtype), lengths=lengths, state=state, kernel_size=K)


def _block_states_inputs(
    dtype: torch.dtype, B: int, N: int, C: int, K: int, S: int, packed: int = 0
) -> dict[str, object]:
    cu_seqlens = torch.tensor([0, S, B * N]) if packed else None
    return dict(x=torch.randn(B, N, C, dtype=dtype), block_size=S, kernel_size=K, cu_seqlens=cu_seqlens)


OPS = (
    Op(
        fn=conv_state,
        reference=reference.conv_state,
        inputs=_state_inputs,
        cases=(dict(B=3, L=5, C=6, K=4), dict(B=2, L=2, C=29, K=4, ragged=0), dict(B=2, L=0, C=3, K=4)),
        shapes=(
            dict(B=1, L=16, C=6144, K=4),
            dict(B=1, L=1, C=6144, K=4, ragged=0),
            dict(B=64, L=16, C=6144, K=4),
            dict(B=1, L=4096, C=6144, K=4, ragged=0),
        ),
        outputs=("state",),
        grads=("x", "state"),
        kernels=("_conv_state_kernel",),
        forward_only=True,
        cost=lambda itemsize, B, L, C, K, ragged=1: (0, 2 * B * C * K * itemsize),
    ),
    Op(
        fn=conv_block_states,
        reference=reference.conv_block_states,
        inputs=_block_states_inputs,
        cases=(
            dict(B=2, N=12, C=5, K=4, S=4),
            dict(B=1, N=7, C=3, K=4, S=2),
            dict(B=1, N=16, C=3, K=4, S=4, packed=1),
            dict(B=1, N=0, C=3, K=4, S=4),
        ),
        shapes=(dict(B=1, N=4096, C=6144, K=4, S=16), dict(B=1, N=8192, C=6144, K=4, S=16, packed=1)),
        outputs=("states",),
        grads=("x",),
        kernels=("_conv_block_states_kernel",),
        forward_only=True,
        cost=lambda itemsize, B, N, C, K, S, packed=0: (0, 2 * B * -(-N // S) * C * K * itemsize),
    ),
)
