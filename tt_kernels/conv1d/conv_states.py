"""The conv states that sequences leave behind: copies of the last raw columns."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_whole, refuse
from ..runtime.lang import at_slot, programmatic_launch, row_count
from ..runtime.launch import Launch, run
from ..runtime.registry import define, takes_kernel, wants_gradients
from ..runtime.slots import Slots, check_room, copy_to_slots, empty_beside
from ..runtime.varlen import resets


@triton.jit
def move_on(
    x_ptr,
    before_ptr,
    after_ptr,
    stride_xl,
    stride_xc,
    stride_sc,
    stride_sk,
    count,
    c,
    mask_c,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write a row's state [C, K] after `count` tokens for channels c [BLOCK_C]."""
    c = c[:, None]
    k = tl.arange(0, BLOCK_K)[None, :]
    mask = mask_c[:, None] & (k < K)  # [BLOCK_C, BLOCK_K]
    source = count - K + k  # below 0: before x
    at = x_ptr + source.to(tl.int64) * stride_xl + c.to(tl.int64) * stride_xc
    column = tl.load(at, mask=mask & (source >= 0), other=0.0)
    before = tl.load(before_ptr + c * stride_sc + (source + K) * stride_sk, mask=mask & (source < 0), other=0.0)
    column = tl.where(source < 0, before.to(column.dtype), column)
    tl.store(after_ptr + c * stride_sc + k * stride_sk, column, mask=mask)


@triton.jit(do_not_specialize=["L"])
def _conv_advance_kernel(
    x_ptr,  # [B, L, C]
    counts_ptr,  # [B]; None: all L
    before,  # Slots of [C, K]: the state that each row reads, and the one that it writes, which none reads
    after,
    stride_xb,
    stride_xl,
    stride_xc,
    stride_sc: tl.constexpr,  # constants: whether columns or channels lie side by side decides how wide loads are
    stride_sk: tl.constexpr,
    L,
    C,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = row_count(counts_ptr, b, L)
    before_ptr, after_ptr = at_slot(before, b), at_slot(after, b)
    x_ptr += b * stride_xb
    move_on(x_ptr, before_ptr, after_ptr, stride_xl, stride_xc, stride_sc, stride_sk, count, c, c < C, K, BLOCK_K)


@triton.jit(do_not_specialize=["N", "blocks"])
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
    programmatic_launch()
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


def conv_advance_launch(C: int, K: int) -> Launch:
    """A few numbers a thread, which are read column by column: only many programs hide that."""
    return Launch(BLOCK_C=min(triton.next_power_of_2(C), 128), BLOCK_K=triton.next_power_of_2(K))


def conv_block_states_launch(C: int, itemsize: int) -> Launch:
    """16 bytes a thread and column; a program copies its channels of all K columns."""
    return Launch(BLOCK_C=min(triton.next_power_of_2(C), 2048 // itemsize))


@contextmanager
def conv_slots(pool: Tensor, rows: int, read: Tensor | None, out: Tensor | None) -> Iterator[tuple[Slots, Slots]]:
    """The conv states that a launch reads and those that it writes, which are others: without a place of their own they
    are written beside, and copied afterwards. Both have the same strides inside a slot, which is dense."""
    C, K = pool.shape[1:]
    used = pool if pool.stride()[1:] in ((K, 1), (1, C)) else pool.contiguous()
    if out is None:
        new = empty_beside(used, rows)
        yield Slots.of(used, read), Slots.of(new, None)
        copy_to_slots(pool, new, read)
    else:
        yield Slots.of(used, read), Slots.of(used, out)
        if used is not pool:
            pool.copy_(used)


def _conv_advance(
    x: Tensor, conv_state: Tensor, counts: Tensor | None, state_indices: Tensor | None, out_indices: Tensor | None
) -> None:
    (B, L, C), K = x.shape, conv_state.shape[2]
    launch = conv_advance_launch(C, K)
    with conv_slots(conv_state, B, state_indices, out_indices) as (before, after):
        run(
            _conv_advance_kernel,
            (B, triton.cdiv(C, launch.BLOCK_C)),
            *(x, None if counts is None else counts.contiguous(), before, after),
            *(*x.stride(), *before.ptr.stride()[1:], L, C),
            K=K,
            launch=launch,
        )


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


def _conv_block_states_fake(x, block_size, kernel_size, *_):
    return x.new_empty(x.shape[0], -(-x.shape[1] // block_size), kernel_size, x.shape[2])


_advance = define(_conv_advance, lambda *_: None, writes=("conv_state",))

_block_states = define(_conv_block_states, _conv_block_states_fake)


@torch.no_grad()
def conv_advance(
    x: Tensor,
    conv_state: Tensor,
    counts: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
) -> None:
    """Move conv states on by the first counts[b] tokens of each row, in place.

    Use it beside `causal_conv1d`, which only reads them. `mamba_advance` and `mamba_step` contain it.

    Args:
        x:             [B, L, C] float: raw columns, any strides.
        conv_state:    [slots, C, K] float, written: the last K raw columns, oldest first.
        counts:        [B] int, 0 to L, or None for all L. Tokens that do not enter may be anything, NaN included.
        state_indices: [B] int: the slot that each row reads; None: row b has slot b. Rows may read one together.
        out_indices:   [B] int: the slots that are written, all different and none of them read by this call; None: the
                       slots that are read, then written beside and copied, which is slower.
    Returns:
        None.

    Numerics: copies, cast to the dtype of conv_state. Kernels cut counts to 0 and L and indices to the slots that
        exist; the reference refuses them where they are on a CPU.
    Gradients: none; what is written carries none.
    Raises: ValueError for sizes that disagree and for fewer slots than rows without indices.
    Cost: 2 B C K itemsize bytes, twice that without out_indices.
    Source: the conv state of causal-conv1d's `causal_conv1d_update`, whose oldest column the next token does not read.

    Example:
        >>> pool = torch.zeros(8, 96, 4)  # [slots, C, K]
        >>> read, written = torch.tensor([0, 1]), torch.tensor([2, 3])
        >>> conv_advance(torch.randn(2, 16, 96), pool, state_indices=read, out_indices=written)
    """
    check(
        "conv_advance",
        2,
        x=(x, "B L C"),
        conv_state=(conv_state, "slots C K"),
        counts=(counts, "B", int),
        state_indices=(state_indices, "B", int),
        out_indices=(out_indices, "B", int),
    )
    check_room("conv_advance", "conv_state", conv_state, x.shape[0], state_indices)
    if takes_kernel("conv_advance", x, conv_state):
        _advance(x, conv_state, counts, state_indices, out_indices)
    else:
        reference.conv_advance(x, conv_state, counts, state_indices=state_indices, out_indices=out_indices)


def conv_block_states(x: Tensor, *, block_size: int, kernel_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    """The conv states before every block of whole sequences, as training needs them.

    Args:
        x:           [B, N, C] float: raw columns from the start of each row, any strides.
        block_size:  S, tokens of a block.
        kernel_size: K.
        cu_seqlens:  as in `causal_conv1d`.
    Returns:
        states: [B, ceil(N / S), C, K] dtype of x, laid out as [B, ceil(N / S), K, C]. The number of blocks is a size of
                the result: an export with a dynamic N holds for one block or for several, as its example had.

    Numerics: copies.
    Gradients: for x; where they are wanted the reference runs.
    Raises: ValueError for sizes below 1.
    Cost: 2 B ceil(N / S) C K itemsize bytes.
    Source: none; `conv_state` of causal-conv1d, before every block.

    Example:
        >>> conv_block_states(torch.randn(1, 64, 8), block_size=16, kernel_size=4).shape
        torch.Size([1, 4, 8, 4])
    """
    check("conv_block_states", 1, x=(x, "B N C"), cu_seqlens=(cu_seqlens, "sequences+1", int))
    for name, value in (("block_size", block_size), ("kernel_size", kernel_size)):
        if not is_whole(value) or value < 1:
            refuse("conv_block_states", name, value, "1 or more")
    if not takes_kernel("conv_block_states", x) or wants_gradients(x):
        return reference.conv_block_states(x, block_size=block_size, kernel_size=kernel_size, cu_seqlens=cu_seqlens)
    return _block_states(x, block_size, kernel_size, cu_seqlens).transpose(2, 3)
