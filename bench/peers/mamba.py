"""Peers of Mamba-2: mamba_ssm's Triton SSD, flash-linear-attention's simple_gla, convolutions by causal-conv1d and fla,
and our own ops one after the other.

First the parts: each takes the arguments of `causal_conv1d`, or of a scan, gets ready what its package asks for, and
returns a function of what the part before it makes. Then the adapters, of one part or of two in turn. mamba_ssm's scan
is imported without the package's __init__, which wants a CUDA extension that the scan does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import causal_conv1d, conv_advance, ssd_advance, ssd_block, ssd_step

from .base import Arguments, Call, Peer, bare_package, kernels_run, needs, on_gpu, only, prepared

Convolution = Callable[[Tensor], Any]  # [b, L, C] -> the same, convolved, and what the package returns beside it
Scan = Callable[[Tensor, Tensor, Tensor], Any]  # x, B, C -> y and the state after
FORMS = {
    "counts": "rows of one length only",
    "state_indices": "row b has slot b only",
    "cu_seqlens": "no packed sequences",
}


def _without(a: Arguments, package: str, *names: str) -> None:
    """Refuse what the package has no form of. Not every op has all of these arguments."""
    for name in names:
        only(getattr(a, name, None) is None, f"{package}: {FORMS[name]}")


def _sequences(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """[b, L] int32: which packed sequence a token is of."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    return (torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1).view(x.shape[:2]).int()


# ---- parts: convolutions ----


def _cuda_conv(a: Arguments) -> Any:
    on_gpu(a.x, "causal-conv1d")
    _without(a, "causal-conv1d", "state_indices")
    only(a.x.dtype == a.weight.dtype, "causal-conv1d: x and weight of one dtype")
    return needs("causal_conv1d")


def cuda_convolution(a: Arguments) -> Convolution:
    conv, state, index = _cuda_conv(a).causal_conv1d_fn, a.conv_state, _sequences(a.cu_seqlens, a.x)
    only(index is None or state is None, "causal-conv1d: packed sequences without a state only")
    # Channels last, as x lies; K - 1 columns.
    seed = None if state is None else state[..., 1 - a.weight.shape[1] :].transpose(1, 2).contiguous().transpose(1, 2)
    options = dict(seq_idx=index, initial_states=seed, activation=a.activation)
    return lambda x: (conv(x.transpose(1, 2), a.weight, a.bias, **options).transpose(1, 2), None)


def cuda_token_convolution(a: Arguments) -> Convolution:
    """Writes the state in place, as ours."""
    update = _cuda_conv(a).causal_conv1d_update
    return lambda x: (update(x, a.conv_state, a.weight, a.bias, a.activation), a.conv_state)


def _fla_conv(a: Arguments) -> Any:
    kernels_run(a.x, "fla-core")
    _without(a, "fla", "state_indices")
    return needs("fla.modules.causal_conv1d", "fla-core")


def fla_convolution(a: Arguments) -> Convolution:
    conv, state, packed = _fla_conv(a).causal_conv1d, a.conv_state, a.cu_seqlens is not None
    only(not packed or (state is None and len(a.x) == 1), "fla: packed sequences in one row, without a state")
    seed = None if state is None else state[..., -a.weight.shape[1] :].contiguous()
    options = dict(activation=a.activation, cu_seqlens=a.cu_seqlens, backend="triton", initial_state=seed)
    return lambda x: conv(x, a.weight, a.bias, output_final_state=state is not None, **options)


def fla_token_convolution(a: Arguments) -> Convolution:
    """In place too."""
    update = _fla_conv(a).causal_conv1d_update
    return lambda x: update(x, a.conv_state, weight=a.weight, bias=a.bias, activation=a.activation)


# ---- parts: scans ----


def _mamba_ssm(a: Arguments, module: str) -> Any:
    kernels_run(a.dt, "mamba_ssm")
    _without(a, "mamba_ssm", "counts", "state_indices")
    bare_package("mamba_ssm")
    return needs(f"mamba_ssm.ops.triton.{module}")


def mamba_scan(a: Arguments) -> Scan:
    """Their chunk is a tile: 128, or a short block as one. Below one chunk with a state theirs is reported wrong."""
    scan = _mamba_ssm(a, "ssd_combined").mamba_chunk_scan_combined
    L, chunk = a.dt.shape[1], min(128, a.dt.shape[1])
    whole = chunk >= 16 and chunk & (chunk - 1) == 0 and L % chunk == 0
    only(whole, "mamba_ssm: whole chunks of 16 to 128 tokens only")
    options = dict(D=a.D, dt_bias=a.dt_bias, dt_softplus=True, dt_limit=a.dt_limit, return_final_states=True)
    options |= dict(initial_states=a.ssm_state, seq_idx=_sequences(getattr(a, "cu_seqlens", None), a.dt))
    return lambda x, B, C: scan(x, a.dt, a.A, B, C, chunk, **options)


def mamba_token(a: Arguments) -> Scan:
    """Theirs writes the state in place too."""
    update = _mamba_ssm(a, "selective_state_update").selective_state_update
    only(a.dt_limit == (0.0, math.inf), "mamba_ssm: selective_state_update has no dt_limit")
    shape = a.ssm_state.shape[1:]  # H, P, N: per head as it is stored, stride 0 in what does not vary
    decay, steps = a.A.view(-1, 1, 1).expand(shape), a.dt.unsqueeze(-1).expand(*a.dt.shape, shape[1])
    skip, bias = (t.view(-1, 1).expand(shape[:2]) for t in (a.D, a.dt_bias))
    options = dict(z=None, dt_bias=bias, dt_softplus=True)
    return lambda x, B, C: (update(a.ssm_state, x, steps, decay, B, C, skip, **options), a.ssm_state)


def _prepare(x: Tensor, dt: Tensor, A: Tensor, dt_bias: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(low, high)
    return (x.float() * dt.unsqueeze(-1)).to(x.dtype), dt * A.float()


def _skip(y: Tensor, x: Tensor, D: Tensor) -> Tensor:
    return torch.addcmul(y.float(), x.float(), D.float().unsqueeze(-1)).to(x.dtype)


def fla_scan(a: Arguments) -> Scan:
    """SSD is simple_gla with queries C, keys B, values dt x and log-decay dt A; dt, dt x and D x are PyTorch's. Its
    state kernel knows no grouped heads: B and C of every head [b, L, H, N]."""
    kernels_run(a.dt, "fla-core")
    _without(a, "fla", "counts", "state_indices", "cu_seqlens")  # of packed ones its states are another result
    gla = needs("fla.ops.simple_gla", "fla-core").chunk_simple_gla
    before, after = prepared(_prepare, a.dt), prepared(_skip, a.dt)
    options = dict(scale=1.0, initial_state=a.ssm_state, output_final_state=True, state_v_first=True)

    def scan(x: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        values, decay = before(x, a.dt, a.A, a.dt_bias, *a.dt_limit)
        y, last = gla(C, B, values, decay, **options)
        return y if a.D is None else after(y, x, a.D), last

    return scan


def _of_every_head(x: Tensor, *of_groups: Tensor) -> list[Tensor]:
    return [t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in of_groups]


# ---- adapters: one part. Of a scan only y: the states are written in place, or lie in memory of their own ----


def convolution(part: Callable[[Arguments], Convolution], a: Arguments) -> Call:
    convolve = part(a)
    return lambda: convolve(a.x)[0]


def mamba_scanned(part: Callable[[Arguments], Scan], a: Arguments) -> Call:
    scan = part(a)
    return lambda: scan(a.x, a.B, a.C)[0]


def fla_scanned(a: Arguments) -> Call:
    scan, (B, C) = fla_scan(a), _of_every_head(a.x, a.B, a.C)  # before the clock
    return lambda: scan(a.x, B, C)[0]


# ---- adapters: convolution and scan, one after the other ----


def _split(columns: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., H, P], B and C [..., G, N] of convolved columns."""
    H, P, N = state.shape[1:]
    GN = (columns.shape[-1] - H * P) // 2
    x, B, C = columns.split_with_sizes([H * P, GN, GN], -1)
    return x.unflatten(-1, (H, P)), B.unflatten(-1, (-1, N)), C.unflatten(-1, (-1, N))


def joined(convolution: Callable[[Arguments], Convolution], scan: Callable[[Arguments], Scan], a: Arguments) -> Call:
    """`mamba_block`, `mamba_advance` or `mamba_step`. fla's scan wants B and C of every head, which here come out of
    the convolution, inside the clock."""
    w, s, inputs = a.weights, a.state, dict(cu_seqlens=None, counts=getattr(a, "counts", None))
    conv = dict(x=a.xBC, weight=w.conv_weight, bias=w.conv_bias, conv_state=s.conv, state_indices=s.conv_indices)
    convolve = convolution(Arguments(**conv, **inputs, activation="silu"))
    rest = dict(dt=a.dt, A=w.A, D=w.D, dt_bias=w.dt_bias, ssm_state=s.ssm, state_indices=s.ssm_indices)
    run = scan(Arguments(**rest, **inputs, dt_limit=a.dt_limit))

    def call() -> Tensor | None:
        x, B, C = _split(convolve(a.xBC)[0], s.ssm)
        if scan is fla_scan:
            B, C = _of_every_head(x, B, C)
        y, _ = run(x, B, C)
        return None if w.D is None else y

    return call


# ---- adapters: our own ops, each with its launch, which shows what taking them together gains ----


def _convolved(xBC: Tensor, a: Arguments) -> Tensor:
    w, s = a.weights, a.state
    return causal_conv1d(xBC, w.conv_weight, w.conv_bias, s.conv, state_indices=s.conv_indices)


def apart_block(a: Arguments) -> Call:
    w, s = a.weights, a.state

    def call() -> Tensor:
        x, B, C = _split(_convolved(a.xBC, a), s.ssm)
        options = dict(state_indices=s.ssm_indices, dt_limit=a.dt_limit)
        return ssd_block(x, a.dt, w.A, B, C, w.D, w.dt_bias, s.ssm, **options)

    return call


def apart_advance(a: Arguments) -> Call:
    w, s = a.weights, a.state
    options = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices, dt_limit=a.dt_limit)

    def call() -> None:
        x, B, _ = _split(_convolved(a.xBC, a), s.ssm)
        ssd_advance(x, a.dt, w.A, B, w.dt_bias, s.ssm, a.counts, **options)
        conv_advance(a.xBC, s.conv, a.counts, state_indices=s.conv_indices, out_indices=s.conv_out_indices)

    return call


def apart_step(a: Arguments) -> Call:
    w, s, token = a.weights, a.state, a.xBC.unsqueeze(1)
    options = dict(state_indices=s.ssm_indices, out_indices=s.ssm_out_indices, dt_limit=a.dt_limit)

    def call() -> Tensor:
        x, B, C = _split(_convolved(token, a).squeeze(1), s.ssm)
        y = ssd_step(x, a.dt, w.A, B, C, w.D, w.dt_bias, s.ssm, **options)
        conv_advance(token, s.conv, state_indices=s.conv_indices, out_indices=s.conv_out_indices)
        return y

    return call


JOINED = (
    Peer("causal_conv1d+mamba_ssm", partial(joined, cuda_convolution, mamba_scan)),
    Peer("fla+mamba_ssm", partial(joined, fla_convolution, mamba_scan)),
    Peer("fla", partial(joined, fla_convolution, fla_scan)),
)
MAMBA_SCAN = partial(mamba_scanned, mamba_scan)
PEERS = {
    "ssd_chunk": (
        Peer("mamba_ssm", MAMBA_SCAN, outputs=("y",), backward=True),
        Peer("fla", fla_scanned, outputs=("y",), backward=True),
    ),
    "ssd_block": (Peer("mamba_ssm", MAMBA_SCAN, backward=True), Peer("fla", fla_scanned, backward=True)),
    "ssd_step": (Peer("mamba_ssm", partial(mamba_scanned, mamba_token)),),
    "causal_conv1d": (
        Peer("causal_conv1d", partial(convolution, cuda_convolution), backward=True),
        Peer("fla", partial(convolution, fla_convolution), backward=True),
    ),
    "mamba_block": (Peer("apart", apart_block), *JOINED),
    # Theirs make the outputs too, no conv state, and the state in memory of their own.
    "mamba_advance": (Peer("apart", apart_advance), *JOINED),
    "mamba_step": (
        Peer("apart", apart_step),
        Peer("causal_conv1d+mamba_ssm", partial(joined, cuda_token_convolution, mamba_token)),
        Peer("fla+mamba_ssm", partial(joined, fla_token_convolution, mamba_token)),
    ),
}
