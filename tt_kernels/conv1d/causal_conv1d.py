"""The convolution: every channel with its own taps, then SiLU."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from ..reference.common import compute_dtype
from ..runtime.checks import check, refuse
from ..runtime.lang import at_slot, programmatic_launch, row_count, silu
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.registry import define, takes_kernel, wants_gradients
from ..runtime.slots import NO_STATES, Slots, check_room
from ..runtime.varlen import resets
from .conv_states import move_on


@triton.jit(do_not_specialize=["L", "tiles"])
def _causal_conv1d_kernel(
    x_ptr,  # [B, L, C]
    weight_ptr,  # [C, K], contiguous
    bias_ptr,  # [C]; None: zeros
    state,  # Slots of [C, S]; none: zeros
    after_state,  # Slots of [C, K]: the states that are written, which none reads, of the same strides; none: y is all
    counts_ptr,  # [B]: tokens that enter those; None: all L
    resets_ptr,  # [B * L]; None: no sequence starts
    y_ptr,  # [B, L, C], contiguous
    stride_xb,
    stride_xl,
    stride_sc,
    stride_sk,
    L,
    C,
    S,
    tiles,  # of a row
    K: tl.constexpr,
    ACC: tl.constexpr,
    SILU: tl.constexpr,
    CLOSE: tl.constexpr,  # a channel's columns lie side by side in a state
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    programmatic_launch()
    b = (tl.program_id(0) // tiles).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_L
    t = start + tl.arange(0, BLOCK_L)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    mask_c = c < C
    # A channel's taps lie side by side: read as such, and picked one by one below.
    taps = tl.load(weight_ptr + c[:, None] * K + k[None, :], mask=mask_c[:, None] & (k < K)[None, :], other=0.0).to(ACC)
    y = tl.zeros((BLOCK_L, BLOCK_C), dtype=ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if CLOSE:
        stride_sc, stride_sk = K, 1
    state_at = None
    if state.ptr is not None:
        state_at = at_slot(state, b)
    alive = t < L  # whether the token that a tap reaches back to is of the same sequence
    for back in tl.static_range(K):  # the last tap first
        source = t - back
        if resets_ptr is not None and back > 0:
            after = tl.load(resets_ptr + b * L + source + 1, mask=(source >= -1) & alive, other=1)
            alive = alive & (after == 0)
        mask = (alive & (source >= 0))[:, None] & mask_c[None, :]
        at = x_ptr + b * stride_xb + source.to(tl.int64)[:, None] * stride_xl + c[None, :]
        column = tl.load(at, mask=mask, other=0.0)  # [BLOCK_L, BLOCK_C], after the first tap from L1
        tap = tl.sum(tl.where((k == K - 1 - back)[None, :], taps, 0.0), axis=1)
        y += column.to(ACC) * tap[None, :]
    if state.ptr is not None:  # noqa: SIM102 (known to the compiler, what follows is not)
        # The first tokens of a row. By itself, so that no load of x waits for one of the state, and in a loop, so that
        # the programs of other tokens do not keep registers for it.
        if start < K - 1:
            for gone in tl.range(1, K):
                source = t - gone
                mask = ((source < 0) & (t < L))[:, None] & mask_c[None, :]
                at = state_at + c[None, :] * stride_sc + (S + source)[:, None] * stride_sk
                # As a column of x would be: in its dtype.
                past = tl.load(at, mask=mask, other=0.0).to(x_ptr.dtype.element_ty)
                tap = tl.sum(tl.where((k == K - 1 - gone)[None, :], taps, 0.0), axis=1)
                y += past.to(ACC) * tap[None, :]
    if SILU:
        y = silu(y)
    at = y_ptr + (b * L + t)[:, None] * C + c[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(t < L)[:, None] & mask_c[None, :])
    if after_state.ptr is not None:  # noqa: SIM102
        if start == 0:  # once for a row; what it reads lies in L1
            count, x_ptr, after_ptr = row_count(counts_ptr, b, L), x_ptr + b * stride_xb, at_slot(after_state, b)
            move_on(x_ptr, state_at, after_ptr, stride_xl, 1, stride_sc, stride_sk, count, c, mask_c, K, BLOCK_K)


@dataclass(frozen=True, kw_only=True)
class CausalConv1dLaunch(Launch):
    BLOCK_L: int
    BLOCK_C: int
    num_warps: int = 4
    num_stages: int = 1


def causal_conv1d_launch(B: int, L: int, C: int, itemsize: int) -> CausalConv1dLaunch:
    """Memory bounds it: 16 bytes a load, channel after channel. A tile of 32 tokens reads 3 rows twice (from L2) and
    its taps once for all of them. Of long rows it has 64 channels and two warps: programs are many, and six of a
    multiprocessor, or nine without a state, hide each other's waits. One row alone has a hundred programs. Blocks of
    16 tokens read their state too, after its slot: one warp of 32 channels, of which a multiprocessor holds 16, waits
    least by the compiled code."""
    block_l = min(triton.next_power_of_2(max(L, 1)), 32)
    if 4 < L < 32:
        return CausalConv1dLaunch(BLOCK_L=block_l, BLOCK_C=min(triton.next_power_of_2(C), 512 // block_l), num_warps=1)
    if L >= 32 and B * L > 512:
        return CausalConv1dLaunch(BLOCK_L=block_l, BLOCK_C=min(triton.next_power_of_2(C), 64), num_warps=2)
    together = 1024 if B * L <= 512 else 2048  # numbers of a program
    block_c = min(triton.next_power_of_2(C), max(64 if L > 4 else 256, together // block_l))
    warps = max(1, min(4, block_l * block_c * itemsize // (32 * 32)))
    return CausalConv1dLaunch(BLOCK_L=block_l, BLOCK_C=block_c, num_warps=warps)


def near(state: Tensor | None) -> Tensor | None:
    """A state whose rows lie within 32-bit offsets: with 64 bits a tile takes up to 16 registers more. Others, which
    are small and rare, are copied."""
    if state is None:
        return None
    reach = sum((n - 1) * stride for n, stride in zip(state.shape[1:], state.stride()[1:], strict=True))
    return state if reach < 2**31 else state.contiguous()


def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    before = Slots.of(near(state), state_indices)
    return convolve(x, weight, bias, before, cu_seqlens=cu_seqlens, activate=activate)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Slots,
    after: Slots = NO_STATES,
    counts: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    activate: bool = True,
) -> Tensor:
    """y, and where `after` has slots the states after the first counts[b] tokens, which lie as those that are read."""
    (B, L, C), K = x.shape, weight.shape[1]
    y = x.new_empty(x.shape)
    x = x if x.stride(-1) == 1 else x.contiguous()
    wide = compute_dtype(x.dtype, weight.dtype) == torch.float64
    default = causal_conv1d_launch(B, L, C, x.element_size())
    launch = tuned("_causal_conv1d_kernel", default, architecture(x), tokens=triton.next_power_of_2(B * L), C=C)
    # Wide stores of the states. With 32 tokens to a tile it takes registers that programs are short of.
    close = after.ptr is not None and state.ptr.stride()[1:] == (K, 1)
    tiles = triton.cdiv(L, launch.BLOCK_L)
    run(
        _causal_conv1d_kernel,
        (B * tiles, triton.cdiv(C, launch.BLOCK_C)),
        *(x, weight.contiguous(), None if bias is None else bias.contiguous()),
        *(state, after, None if counts is None else counts.contiguous(), resets(cu_seqlens, B, L), y),
        *(*x.stride()[:2], *((0, 0) if state.ptr is None else state.ptr.stride()[1:])),
        *(L, C, 0 if state.ptr is None else state.ptr.shape[2], tiles),
        K=K,
        ACC=tl.float64 if wide else tl.float32,
        SILU=activate,
        CLOSE=close and launch.BLOCK_L <= 16,
        BLOCK_K=triton.next_power_of_2(K),
        launch=launch,
    )
    return y


_conv = define(_causal_conv1d, lambda x, *_: x.new_empty(x.shape))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    conv_state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Convolve every channel with its own K taps over the token and the K - 1 before it, then activate.

    y[b, t, c] = act(bias[c] + sum_k weight[c, k] x[b, t - K + 1 + k, c]), the tokens before the first from the state,
    which is only read: `conv_advance` moves it on.

    Args:
        x:             [B, L, C] float, any strides.
        weight:        [C, K] float; the last tap belongs to the token itself.
        bias:          [C] float or None.
        conv_state:    [slots, C, S] float, S >= K - 1: the columns before x, oldest first (the last K - 1 count); None:
                       zeros.
        activation:    "silu" or None.
        state_indices: [B] int: the slot of conv_state that each row reads; None: row b has slot b.
        cu_seqlens:    [sequences + 1] int, from 0, ascending, counted over the flattened B * L tokens: sequences packed
                       in x start from zeros and do not see each other, tokens behind the last entry are one more; not
                       with a state. A row starts anew in any case.
    Returns:
        y: [B, L, C] dtype of x.

    Numerics: computes in fp32 (fp64 where x or weight is fp64) and rounds once; deterministic.
    Gradients: for x, weight, bias and conv_state; where they are wanted the reference runs.
    Raises: ValueError for sizes that disagree, a state that is too short, a state beside cu_seqlens, fewer slots than
        rows without indices, an unknown activation.
    Cost: 2 K B L C flops, 2 B L C itemsize bytes: bound by memory.
    Source: `causal_conv1d_fn` of causal-conv1d with initial_states.

    Example:
        >>> causal_conv1d(torch.randn(2, 16, 8), torch.randn(8, 4)).shape
        torch.Size([2, 16, 8])
    """
    check(
        "causal_conv1d",
        2,
        x=(x, "B L C"),
        weight=(weight, "C K"),
        bias=(bias, "C"),
        conv_state=(conv_state, "slots C S"),
        state_indices=(state_indices, "B", int),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    check_room("causal_conv1d", "conv_state", conv_state, x.shape[0], state_indices)
    if activation not in ("silu", None):
        refuse("causal_conv1d", "activation", activation, "'silu' or None")
    if conv_state is not None:
        if conv_state.shape[-1] < weight.shape[-1] - 1:
            refuse(
                "causal_conv1d", "conv_state", list(conv_state.shape), f"at least K-1={weight.shape[-1] - 1} columns"
            )
        if cu_seqlens is not None:
            refuse("causal_conv1d", "conv_state", list(conv_state.shape), "None beside cu_seqlens")
    tensors = (x, weight, bias, conv_state)
    if not takes_kernel("causal_conv1d", *tensors) or wants_gradients(*tensors):
        options: dict[str, Any] = dict(activation=activation, state_indices=state_indices, cu_seqlens=cu_seqlens)
        return reference.causal_conv1d(*tensors, **options)
    return _conv(*tensors, state_indices, cu_seqlens, activation == "silu")
