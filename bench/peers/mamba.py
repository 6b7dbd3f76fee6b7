"""Peers of Mamba-2: mamba_ssm's Triton SSD, flash-linear-attention's simple_gla, causal-conv1d, and FLA's convolution.

mamba_ssm's scan is imported without the package's __init__, which wants a CUDA extension that the scan does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Peer, bare_package, kernels_run, needs, on_gpu, only, prepared

Call = Callable[[], Any]
NO_LIMIT = (0.0, math.inf)


def _mamba(module: str) -> Any:
    bare_package("mamba_ssm")
    return needs(f"mamba_ssm.ops.triton.{module}", "mamba-ssm")


def _chunk(L: int) -> int:
    """Their chunk is a tile: 128, or a short block as one. Below one chunk with a state theirs is reported wrong."""
    chunk = min(128, L)
    only(
        chunk >= 16 and chunk & (chunk - 1) == 0 and L % chunk == 0, "mamba_ssm: whole chunks of 16 to 128 tokens only"
    )
    return chunk


def mamba_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    chunk_size: int = 64,
    dt_limit: tuple[float, float] = NO_LIMIT,
    cu_seqlens: Tensor | None = None,
) -> Call:
    kernels_run(x, "mamba_ssm")
    only(lengths is None, "mamba_ssm: rows of one length only")
    chunk = _chunk(x.shape[1])
    scan = _mamba("ssd_combined").mamba_chunk_scan_combined
    index = None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        index = (torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1).view(x.shape[:2]).int()

    def call() -> tuple[Tensor, Tensor]:
        return scan(
            *(x, dt, A, B, C, chunk),
            D=D,
            dt_bias=dt_bias,
            initial_states=state,
            seq_idx=index,
            dt_softplus=True,
            dt_limit=dt_limit,
            return_final_states=True,
        )

    return call


def mamba_block(x: Tensor, *args: Tensor, **kwargs: Any) -> Call:
    call = mamba_chunk(x, *args, **kwargs)
    return lambda: call()[0]


def mamba_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Call:
    """Theirs writes the state in place: a copy of ours, which goes on from call to call."""
    kernels_run(x, "mamba_ssm")
    only(dt_limit == NO_LIMIT, "mamba_ssm: selective_state_update has no dt_limit")
    update = _mamba("selective_state_update").selective_state_update
    own = state.clone()
    shape = state.shape[1:]  # H, P, N: per head as it is stored, stride 0 in what does not vary
    decay, steps = A.view(-1, 1, 1).expand(shape), dt.unsqueeze(-1).expand(*dt.shape, shape[1])
    skip, bias = (t.view(-1, 1).expand(shape[:2]) for t in (D, dt_bias))

    def call() -> tuple[Tensor, Tensor]:
        return update(own, x, steps, decay, B, C, skip, z=None, dt_bias=bias, dt_softplus=True), own

    return call


# ---- flash-linear-attention ----


def _prepare(x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(low, high)
    return (x.float() * dt.unsqueeze(-1)).to(x.dtype), dt * A.float()


def _skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return torch.addcmul(y.float(), x.float(), D.float().unsqueeze(-1)).to(x.dtype)


def fla_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    chunk_size: int = 64,
    dt_limit: tuple[float, float] = NO_LIMIT,
    cu_seqlens: Tensor | None = None,
) -> Call:
    """SSD is simple_gla with queries C, keys B, values dt x and log-decay dt A; dt, dt x and D x are PyTorch's."""
    kernels_run(x, "fla-core")
    only(lengths is None, "fla: rows of one length only")
    only(cu_seqlens is None, "fla: the states of packed sequences are another result")
    gla = needs("fla.ops.simple_gla", "fla-core").chunk_simple_gla
    before, after = prepared(_prepare, x), prepared(_skip, x)
    # Its state kernel knows no grouped heads: B and C of every head, made before the clock.
    keys, queries = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))

    def call() -> tuple[Tensor, Tensor]:
        values, decay = before(x, dt, A, dt_bias, *dt_limit)
        y, last = gla(
            *(queries, keys, values, decay),
            scale=1.0,
            initial_state=state,
            output_final_state=True,
            state_v_first=True,
        )
        return after(y, x, D), last

    return call


def fla_block(x: Tensor, *args: Tensor, **kwargs: Any) -> Call:
    call = fla_chunk(x, *args, **kwargs)
    return lambda: call()[0]


def fla_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Call:
    kernels_run(x, "fla-core")
    only(cu_seqlens is None or (state is None and len(x) == 1), "fla: packed sequences in one row, without a state")
    ops = needs("fla.modules.causal_conv1d", "fla-core")
    seed = None if state is None else state[..., -weight.shape[1] :].contiguous()

    def call() -> Tensor:
        return ops.causal_conv1d(
            x, weight, bias, initial_state=seed, activation=activation, cu_seqlens=cu_seqlens, backend="triton"
        )[0]

    return call


# ---- causal-conv1d ----


def cuda_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Call:
    on_gpu(x, "causal-conv1d")
    only(x.dtype == weight.dtype, "causal-conv1d: x and weight of one dtype")
    only(cu_seqlens is None or state is None, "causal-conv1d: packed sequences without a state only")
    package = needs("causal_conv1d", "causal-conv1d")
    channels = x.transpose(1, 2)  # [B, C, L], channels last as it lies
    seed = index = None
    if state is not None:
        seed = state[..., 1 - weight.shape[1] :].transpose(1, 2).contiguous().transpose(1, 2)
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        index = (torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1).view(x.shape[:2]).int()

    def call() -> Tensor:
        y = package.causal_conv1d_fn(channels, weight, bias, seq_idx=index, initial_states=seed, activation=activation)
        return y.transpose(1, 2)

    return call


PEERS = {
    "ssd_chunk": (
        Peer("mamba_ssm", mamba_chunk, outputs=("y", "state"), backward=True),
        Peer("fla", fla_chunk, outputs=("y", "state"), backward=True),
    ),
    "ssd_block": (
        Peer("mamba_ssm", mamba_block, backward=True),
        Peer("fla", fla_block, backward=True),
    ),
    "ssd_step": (Peer("mamba_ssm", mamba_step),),
    "causal_conv1d": (
        Peer("causal_conv1d", cuda_conv, backward=True),
        Peer("fla", fla_conv, backward=True),
    ),
}
