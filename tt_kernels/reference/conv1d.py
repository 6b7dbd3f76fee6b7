"""Causal depthwise convolution with a carried state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, check_counts, check_starts, compute_dtype, full_precision, sequence_index, without_gradients
from .slots import check_slots, read_slots, write_slots


def _with_history(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """The `taps` columns before x, from the state or zeros, then x: [B, taps + L, C]."""
    if state is None:
        return F.pad(x, (0, 0, taps, 0))
    return torch.cat([state[..., state.shape[-1] - taps :].transpose(1, 2).to(x.dtype), x], dim=1)


def columns_after(x: Tensor, columns: Tensor) -> Tensor:
    """[B, C, K]: the columns [B, C, K], and x [B, C] behind them in place of the first."""
    # Rolled as one row, which copies memory as it lies: what a channel loses falls behind the last of the one before,
    # where x is written.
    after = columns.flatten(1).roll(-1, 1).view(columns.shape)
    after[..., -1] = x
    return after


def convolved(window: Tensor, weight: Tensor, bias: Tensor | None, acc: torch.dtype) -> Tensor:
    """[B, C] in acc: the convolution where the last tap meets the last column of a window [B, C, K]."""
    # A product with ones is a sum over the last dimension in a third of the time that `sum` takes for a few numbers.
    y = (cast(window, acc) * cast(weight, acc)) @ torch.ones(weight.shape[-1], dtype=acc, device=weight.device)
    return y if bias is None else y + cast(bias, acc)


@full_precision
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
    acc = compute_dtype(x.dtype, weight.dtype)
    (B, L, _), K = x.shape, weight.shape[-1]
    check_slots("causal_conv1d", conv_state, state_indices=state_indices)
    state = None if conv_state is None else read_slots(conv_state, state_indices, B)
    if L == 1 and state is not None:  # a decoding step: as the state lies, without turning the weights
        window = torch.cat([cast(state[..., state.shape[-1] - K + 1 :], x.dtype), x.transpose(1, 2)], -1)  # [B, C, K]
        y = convolved(window, weight, bias, acc).unsqueeze(1)
        return cast(F.silu(y) if activation == "silu" else y, x.dtype)
    padded = cast(_with_history(x, state, K - 1), acc)
    taps = cast(weight, acc).T.contiguous()  # [K, C]: a tap multiplies whole rows
    if cu_seqlens is not None:
        check_starts("causal_conv1d", cu_seqlens, B * L)
        seq = F.pad(sequence_index(cu_seqlens, B, L), (K - 1, 0))  # 0: nothing before the row
    own = padded[:, K - 1 :]
    y = own * taps[K - 1] if bias is None else torch.addcmul(cast(bias, acc), own, taps[K - 1])
    for k in range(K - 1):
        column = padded[:, k : k + L]
        if cu_seqlens is not None:
            column = column.masked_fill((seq[:, k : k + L] != seq[:, K - 1 :]).unsqueeze(-1), 0)
        y.addcmul_(column, taps[k])
    return cast(F.silu(y, inplace=not y.requires_grad) if activation == "silu" else y, x.dtype)


def _state_after(x: Tensor, state: Tensor, counts: Tensor | None) -> Tensor:
    """The last K columns of the state and the first counts[b] of x: [B, C, K]."""
    (B, L, C), K = x.shape, state.shape[-1]
    if counts is None and not torch.compiler.is_compiling():  # a graph takes the way that serves every length
        own = x[:, max(0, L - K) :].transpose(1, 2)
        return own if L >= K else torch.cat([cast(state[..., L:], x.dtype), own], -1)
    columns = _with_history(x, state, K)  # [B, K + L, C]
    if counts is None:
        return columns[:, L:].transpose(1, 2)
    index = counts.long().clamp(0, L).view(B, 1, 1) + torch.arange(K, device=x.device).view(1, -1, 1)
    return columns.gather(1, index.expand(-1, -1, C)).transpose(1, 2)


@without_gradients
@full_precision
def conv_advance(
    x: Tensor,
    conv_state: Tensor,
    counts: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
) -> None:
    check_counts("conv_advance", counts, x.shape[1])
    check_slots("conv_advance", conv_state, state_indices=state_indices, out_indices=out_indices)
    new = _state_after(x, read_slots(conv_state, state_indices, x.shape[0]), counts)
    write_slots(conv_state, new, state_indices if out_indices is None else out_indices)


@full_precision
def conv_block_states(x: Tensor, *, block_size: int, kernel_size: int, cu_seqlens: Tensor | None = None) -> Tensor:
    B, N = x.shape[:2]
    starts = torch.arange(0, N, block_size, device=x.device)
    index = (starts[:, None] + torch.arange(kernel_size, device=x.device)).flatten()  # into the padded columns
    windows = F.pad(x, (0, 0, kernel_size, 0))[:, index].unflatten(1, (starts.shape[0], kernel_size))
    if cu_seqlens is not None:
        check_starts("conv_block_states", cu_seqlens, B * N)
        seq = sequence_index(cu_seqlens, B, N)
        before = F.pad(seq, (kernel_size, 0))[:, index].view(B, -1, kernel_size)
        windows = windows.masked_fill((before != seq[:, starts, None]).unsqueeze(-1), 0)
    return windows.transpose(2, 3)  # [B, N / S, C, K]
