"""Peers of Mamba-2: mamba_ssm's Triton SSD, flash-linear-attention's simple_gla, convolutions by causal-conv1d and fla,
and our own ops one after the other.

First the parts: each gets ready what its package asks for and returns a function of what the part before it makes. Then
the adapters, which bind parts to an op's inputs. mamba_ssm's scan is imported without the package's __init__, which
wants a CUDA extension that the scan does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import MambaState, MambaWeights, causal_conv1d, conv_advance, ssd_advance, ssd_block, ssd_step

from .base import Adapter, Peer, bare_package, kernels_run, needs, on_gpu, only, prepared

Call = Callable[[], Any]
Convolution = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # [b, L, C] -> the same, convolved; the conv state after
Scan = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # x, B, C -> y and the state after
NO_LIMIT = (0.0, math.inf)
PLACED = "row b has slot b only"


def _sequences(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """[b, L] int32: which packed sequence a token is of."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    return (torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1).view(x.shape[:2]).int()


# ---- parts: convolutions ----


def cuda_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> Convolution:
    on_gpu(x, "causal-conv1d")
    only(x.dtype == weight.dtype, "causal-conv1d: x and weight of one dtype")
    only(cu_seqlens is None or state is None, "causal-conv1d: packed sequences without a state only")
    package = needs("causal_conv1d", "causal-conv1d")
    index = _sequences(cu_seqlens, x)
    # Channels last, as x lies; K - 1 columns.
    seed = None if state is None else state[..., 1 - weight.shape[1] :].transpose(1, 2).contiguous().transpose(1, 2)

    def convolve(x: Tensor) -> tuple[Tensor, None]:
        channels = x.transpose(1, 2)
        y = package.causal_conv1d_fn(channels, weight, bias, seq_idx=index, initial_states=seed, activation=activation)
        return y.transpose(1, 2), None

    return convolve


def fla_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: str | None,
) -> Convolution:
    kernels_run(x, "fla-core")
    only(cu_seqlens is None or (state is None and len(x) == 1), "fla: packed sequences in one row, without a state")
    ops = needs("fla.modules.causal_conv1d", "fla-core")
    seed = None if state is None else state[..., -weight.shape[1] :].contiguous()
    options = dict(activation=activation, cu_seqlens=cu_seqlens, backend="triton", output_final_state=state is not None)
    return lambda x: ops.causal_conv1d(x, weight, bias, initial_state=seed, **options)


def cuda_token_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Convolution:
    """Writes the state in place, as ours."""
    on_gpu(x, "causal-conv1d")
    only(x.dtype == weight.dtype, "causal-conv1d: x and weight of one dtype")
    package = needs("causal_conv1d", "causal-conv1d")
    return lambda x: (package.causal_conv1d_update(x, state, weight, bias, "silu"), state)


def fla_token_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Convolution:
    """In place too."""
    kernels_run(x, "fla-core")
    ops = needs("fla.modules.causal_conv1d", "fla-core")
    return lambda x: ops.causal_conv1d_update(x, state, weight=weight, bias=bias, activation="silu")


# ---- parts: scans ----


def _mamba(module: str) -> Any:
    bare_package("mamba_ssm")
    return needs(f"mamba_ssm.ops.triton.{module}", "mamba-ssm")


def mamba_scan(
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    state: Tensor | None,
    dt_limit: tuple[float, float] = NO_LIMIT,
    cu_seqlens: Tensor | None = None,
) -> Scan:
    """Their chunk is a tile: 128, or a short block as one. Below one chunk with a state theirs is reported wrong."""
    kernels_run(dt, "mamba_ssm")
    L, chunk = dt.shape[1], min(128, dt.shape[1])
    whole = chunk >= 16 and chunk & (chunk - 1) == 0 and L % chunk == 0
    only(whole, "mamba_ssm: whole chunks of 16 to 128 tokens only")
    scan, index = _mamba("ssd_combined").mamba_chunk_scan_combined, _sequences(cu_seqlens, dt)
    options = dict(D=D, dt_bias=dt_bias, initial_states=state, seq_idx=index, dt_softplus=True, dt_limit=dt_limit)
    return lambda x, B, C: scan(x, dt, A, B, C, chunk, **options, return_final_states=True)


def mamba_token(
    dt: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor, dt_limit: tuple[float, float] = NO_LIMIT
) -> Scan:
    """Theirs writes the state in place too."""
    kernels_run(dt, "mamba_ssm")
    only(dt_limit == NO_LIMIT, "mamba_ssm: selective_state_update has no dt_limit")
    update = _mamba("selective_state_update").selective_state_update
    shape = state.shape[1:]  # H, P, N: per head as it is stored, stride 0 in what does not vary
    decay, steps = A.view(-1, 1, 1).expand(shape), dt.unsqueeze(-1).expand(*dt.shape, shape[1])
    skip, bias = (t.view(-1, 1).expand(shape[:2]) for t in (D, dt_bias))
    options = dict(z=None, dt_bias=bias, dt_softplus=True)
    return lambda x, B, C: (update(state, x, steps, decay, B, C, skip, **options), state)


def _prepare(x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(low, high)
    return (x.float() * dt.unsqueeze(-1)).to(x.dtype), dt * A.float()


def _skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return torch.addcmul(y.float(), x.float(), D.float().unsqueeze(-1)).to(x.dtype)


def fla_scan(
    dt: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor,
    state: Tensor | None,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Scan:
    """SSD is simple_gla with queries C, keys B, values dt x and log-decay dt A; dt, dt x and D x are PyTorch's. Its
    state kernel knows no grouped heads: B and C of every head [b, L, H, N]."""
    kernels_run(dt, "fla-core")
    gla = needs("fla.ops.simple_gla", "fla-core").chunk_simple_gla
    before, after = prepared(_prepare, dt), prepared(_skip, dt)
    options = dict(scale=1.0, initial_state=state, output_final_state=True, state_v_first=True)

    def scan(x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        values, decay = before(x, dt, A, dt_bias, *dt_limit)
        y, last = gla(C, B, values, decay, **options)
        return y if D is None else after(y, x, D), last

    return scan


# ---- adapters: one part ----


def convolution(part: Callable[..., Convolution]) -> Adapter:
    def adapter(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        conv_state: Tensor | None = None,
        *,
        activation: str | None = "silu",
        state_indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Call:
        only(state_indices is None, PLACED)
        convolve = part(x, weight, bias, conv_state, cu_seqlens, activation)
        return lambda: convolve(x)[0]

    return adapter


def mamba_chunk(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    ssm_state: Tensor | None,
    counts: Tensor | None = None,
    chunk_size: int | None = None,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    **inputs: Any,
) -> Call:
    only(counts is None, "mamba_ssm: rows of one length only")
    only(state_indices is None, PLACED)
    scan = mamba_scan(state=ssm_state, **inputs)
    return lambda: scan(x, B, C)


def mamba_step(x: Tensor, B: Tensor, C: Tensor, ssm_state: Tensor, **inputs: Any) -> Call:
    only(inputs.pop("state_indices", None) is None, PLACED)
    inputs.pop("out_indices", None)
    scan = mamba_token(state=ssm_state, **inputs)
    return lambda: scan(x, B, C)


def fla_chunk(
    x: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    ssm_state: Tensor | None,
    counts: Tensor | None = None,
    chunk_size: int | None = None,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **inputs: Any,
) -> Call:
    only(counts is None, "fla: rows of one length only")
    only(state_indices is None, PLACED)
    only(cu_seqlens is None, "fla: the states of packed sequences are another result")
    scan = fla_scan(state=ssm_state, **inputs)
    keys, queries = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))  # before the clock
    return lambda: scan(x, keys, queries)


def outputs_of(adapter: Adapter) -> Adapter:
    """Of a scan only y, as `ssd_block` returns; the states are written in place, or lie in memory of their own."""

    def block(*args: Any, **kwargs: Any) -> Call:
        call = adapter(*args, **kwargs)
        return lambda: call()[0]

    return block


# ---- adapters: convolution and scan, one after the other ----


def _apart(columns: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., H, P], B and C [..., G, N] of convolved columns."""
    H, P, N = state.shape[1:]
    GN = (columns.shape[-1] - H * P) // 2
    x, B, C = columns.split_with_sizes([H * P, GN, GN], -1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))


def _plain(state: MambaState) -> tuple[Tensor, Tensor]:
    only(state.conv_indices is None and state.ssm_indices is None, PLACED)
    return state.conv, state.ssm


def joined(name: str, convolution: Callable[..., Convolution], scan: Callable[..., Scan], heads: bool = False) -> Peer:
    """`mamba_block` or `mamba_advance`, which of them the inputs say. `heads`: the scan wants B and C of every head,
    which here come out of the convolution, inside the clock."""

    def adapter(
        xBC: Tensor,
        dt: Tensor,
        weights: MambaWeights,
        state: MambaState,
        counts: Tensor | None = None,
        *,
        dt_limit: tuple[float, float] = NO_LIMIT,
    ) -> Call:
        only(counts is None, f"{name}: rows of one length only")
        (conv, ssm), w = _plain(state), weights
        convolve = convolution(xBC, w.conv_weight, w.conv_bias, conv, None, "silu")
        run = scan(dt, w.A, w.D, w.dt_bias, ssm, dt_limit)

        def call() -> Tensor | None:
            x, B, C = _apart(convolve(xBC)[0], ssm)
            if heads:
                B, C = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (B, C))
            y, _ = run(x, B, C)
            return None if w.D is None else y

        return call

    return Peer(name, adapter)


def joined_token(name: str, convolution: Callable[..., Convolution]) -> Peer:
    def adapter(xBC: Tensor, dt: Tensor, weights: MambaWeights, state: MambaState, **limit: Any) -> Call:
        (conv, ssm), w = _plain(state), weights
        convolve = convolution(xBC, w.conv_weight, w.conv_bias, conv)
        scan = mamba_token(dt, w.A, w.D, w.dt_bias, ssm, **limit)
        return lambda: scan(*_apart(convolve(xBC)[0], ssm))[0]

    return Peer(name, adapter)


def apart_block(xBC: Tensor, dt: Tensor, weights: MambaWeights, state: MambaState, **limit: Any) -> Call:
    """Our own ops, each with its launch: what taking them together gains."""
    w, s = weights, state

    def call() -> Tensor:
        columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
        x, B, C = _apart(columns, s.ssm)
        return ssd_block(x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, state_indices=s.ssm_indices, **limit)

    return call


def apart_advance(
    xBC: Tensor, dt: Tensor, weights: MambaWeights, state: MambaState, counts: Tensor | None = None, **limit: Any
) -> Call:
    w, s = weights, state
    places = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices)

    def call() -> None:
        columns = causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
        x, B, _ = _apart(columns, s.ssm)
        ssd_advance(x, dt, w.A, B, w.dt_bias, s.ssm, counts, **places, **limit)
        conv_advance(xBC, s.conv, counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)

    return call


def apart_step(xBC: Tensor, dt: Tensor, weights: MambaWeights, state: MambaState, **limit: Any) -> Call:
    w, s, token = weights, state, xBC.unsqueeze(1)
    places = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices)

    def call() -> Tensor:
        columns = causal_conv1d(token, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)
        x, B, C = _apart(columns.squeeze(1), s.ssm)
        y = ssd_step(x, dt, w.A, B, C, w.D, w.dt_bias, s.ssm, **places, **limit)
        conv_advance(token, s.conv, state_indices=s.conv_indices, out_indices=s.conv_out_indices)
        return y

    return call


JOINED = (
    joined("causal_conv1d+mamba_ssm", cuda_convolution, mamba_scan),
    joined("fla+mamba_ssm", fla_convolution, mamba_scan),
    joined("fla", fla_convolution, fla_scan, heads=True),
)
PEERS = {
    "ssd_chunk": (
        Peer("mamba_ssm", outputs_of(mamba_chunk), outputs=("y",), backward=True),
        Peer("fla", outputs_of(fla_chunk), outputs=("y",), backward=True),
    ),
    "ssd_block": (
        Peer("mamba_ssm", outputs_of(mamba_chunk), backward=True),
        Peer("fla", outputs_of(fla_chunk), backward=True),
    ),
    "ssd_step": (Peer("mamba_ssm", outputs_of(mamba_step)),),
    "causal_conv1d": (
        Peer("causal_conv1d", convolution(cuda_convolution), backward=True),
        Peer("fla", convolution(fla_convolution), backward=True),
    ),
    "mamba_block": (Peer("apart", apart_block), *JOINED),
    # Theirs make the outputs too, no conv state, and the state in memory of their own.
    "mamba_advance": (Peer("apart", apart_advance), *JOINED),
    "mamba_step": (
        Peer("apart", apart_step),
        joined_token("causal_conv1d+mamba_ssm", cuda_token_convolution),
        joined_token("fla+mamba_ssm", fla_token_convolution),
    ),
}
