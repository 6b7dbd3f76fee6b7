"""Causal depthwise convolution with a carried state."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, check_lengths, check_starts, compute_dtype, full_precision, sequence_index


def _with_history(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """The `taps` columns before x, from the state or zeros, then x: [B, taps + L, C]."""
    if state is None:
        return F.pad(x, (0, 0, taps, 0))
    return torch.cat([state[..., state.shape[-1] - taps :].transpose(1, 2).to(x.dtype), x], dim=1)


@full_precision
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    acc = compute_dtype(x.dtype, weight.dtype)
    (B, L, _), K = x.shape, weight.shape[-1]
    if L == 1 and state is not None:  # a decoding step: as the state lies, without turning the weights
        window = torch.cat([cast(state[..., state.shape[-1] - K + 1 :], x.dtype), x.transpose(1, 2)], -1)  # [B, C, K]
        y = (cast(window, acc) * cast(weight, acc)).sum(-1).unsqueeze(1)
        y = y if bias is None else y + cast(bias, acc)
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


@full_precision
def conv_state(x: Tensor, lengths: Tensor | None, state: Tensor | None, *, kernel_size: int) -> Tensor:
    B, L, C = x.shape
    check_lengths("conv_state", lengths, L)
    traced = torch.compiler.is_compiling()  # a graph takes the way that serves every length
    if lengths is None and not traced and kernel_size <= L:
        return x[:, L - kernel_size :].transpose(1, 2).contiguous()
    if lengths is None and not traced and state is not None:
        return torch.cat([cast(state[..., state.shape[-1] - kernel_size + L :], x.dtype), x.transpose(1, 2)], -1)
    columns = _with_history(x, state, kernel_size)  # [B, K + L, C]
    if lengths is None:
        return columns[:, L:].transpose(1, 2).contiguous()
    index = lengths.long().clamp(0, L).view(B, 1, 1) + torch.arange(kernel_size, device=x.device).view(1, -1, 1)
    return columns.gather(1, index.expand(-1, -1, C)).transpose(1, 2).contiguous()


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
