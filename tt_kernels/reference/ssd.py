"""Mamba-2: the state-space dual form, in chunks, from a seeded state.

Heads of a group share B and C: R = H / G heads, one behind the other. a = dt * A is the log-decay of a token, never
above 0.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, check_lengths, check_starts, compute_dtype, full_precision, sequence_index

CHUNK = 32  # tokens of a chunk where no size is asked for: pairs inside and states between cost about the same on a CPU


def _time_step(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float], acc: torch.dtype) -> Tensor:
    dt = F.softplus(cast(dt, acc) + cast(dt_bias, acc))
    return dt if limit == (0.0, math.inf) else dt.clamp(*limit)


def _cut(lengths: Tensor | None, x: Tensor, dt: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros past each row's length, whatever lies there: a step of 0 neither decays the state nor adds to it."""
    if lengths is None:
        return x, dt, B
    past = (torch.arange(x.shape[1], device=x.device) >= lengths.view(-1, 1)).unsqueeze(-1)  # [b, L, 1]
    return x.masked_fill(past.unsqueeze(-1), 0), dt.masked_fill(past, 0), B.masked_fill(past.unsqueeze(-1), 0)


def _exp(log_decay: Tensor) -> Tensor:
    """exp, and 0 below e^-64 = 2^-92: too little to show in a sum, but on its way to denormal numbers, with which a
    matrix product on a CPU takes several times as long."""
    return torch.threshold(log_decay, -64.0, -math.inf).exp()


@cache
def _lower_triangle(L: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones on and below the diagonal; only below it."""
    with torch.inference_mode(False):  # made once, and used in training too
        lower = torch.ones(L, L, dtype=dtype, device=device).tril()
        return lower, lower.tril(-1)


def _decay_between(a: Tensor) -> Tensor:
    """exp(a[j+1] + ... + a[i]) for i >= j, else 0: [..., L] -> [..., L, L]. Summed directly: a difference of
    cumulative sums would cancel."""
    lower, below = _lower_triangle(a.shape[-1], a.dtype, a.device)
    return _exp((a.unsqueeze(-1) * below).cumsum(-2)) * lower


def _decay_to_end(a: Tensor) -> tuple[Tensor, Tensor]:
    """From each token, itself excluded, to the end [b, L, H]; over all tokens [b, H]."""
    decay = _exp(F.pad(a, (0, 0, 0, 1)).flip(1).cumsum(1).flip(1))
    return decay[:, 1:], decay[:, 0]


def _outputs(x, dt, a, B, C, D, state, same=None, enters=None) -> Tensor:
    """y of the tokens of a chunk: from each other, from the state before the chunk, from themselves.

    x [b, L, H, P], dt and a [b, L, H], B and C [b, L, G, N], state [b, H, P, N] or None; packed sequences: same
    [b, L, L], whether two tokens are of one sequence, enters [b, L], whether the state is of the token's sequence.
    """
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    R = H // G
    x, B, C, dt, a = (t.transpose(1, 2) for t in (x, B, C, dt, a))  # heads and groups first
    weights = _decay_between(a) * dt.unsqueeze(-2)  # [b, H, L, L]
    if same is not None:
        weights = weights * same.unsqueeze(1)
    weights = (C @ B.mT).unsqueeze(2) * weights.view(b, G, R, L, L)
    y = weights.flatten(1, 2) @ x  # [b, H, L, P]
    if state is not None:
        decay = _exp(a.cumsum(-1))
        if enters is not None:
            decay = decay * enters.unsqueeze(1)
        seen = (C @ state.reshape(b, G, R * P, N).mT).view(b, G, L, R, P).transpose(2, 3)
        y.view(seen.shape).addcmul_(seen, decay.reshape(b, G, R, L, 1))
    return y.addcmul_(x, D.view(-1, 1, 1)).transpose(1, 2)


def _added(x: Tensor, weight: Tensor, B: Tensor) -> Tensor:
    """The sum over tokens of weight * x B^T: x [b, L, H, P], weight [b, L, H], B [b, L, G, N] -> [b, H, P, N]."""
    weighted = (x * weight.unsqueeze(-1)).unflatten(2, (B.shape[2], -1)).flatten(3)  # [b, L, G, R * P]
    return (weighted.permute(0, 2, 3, 1) @ B.transpose(1, 2)).unflatten(2, (-1, x.shape[3])).flatten(1, 2)


@full_precision
def ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    acc = compute_dtype(x.dtype, A.dtype)
    dt = _time_step(dt, dt_bias, dt_limit, acc)
    state = None if state is None else cast(state, acc)
    y = _outputs(cast(x, acc), dt, dt * cast(A, acc), cast(B, acc), cast(C, acc), cast(D, acc), state)
    return cast(y, x.dtype)


@full_precision
def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    acc = compute_dtype(x.dtype, A.dtype)
    (b, H, P), (G, N) = x.shape, B.shape[1:]
    RP = H // G * P
    xs, dt = cast(x, acc), _time_step(dt, dt_bias, dt_limit, acc)
    # By groups: [b * G, R * P, N], so that no head needs a copy of B and C; rows times rows is the faster product.
    carried = cast(state, acc) * _exp(dt * cast(A, acc)).reshape(b, H, 1, 1)
    grown = (xs * dt.unsqueeze(-1)).reshape(b * G, RP, 1)
    new = torch.addcmul(carried.reshape(b * G, RP, N), grown, cast(B, acc).reshape(b * G, 1, N))
    y = torch.bmm(cast(C, acc).reshape(b * G, 1, N), new.mT).view(b, H, P)
    y = torch.addcmul(y, xs, cast(D, acc).unsqueeze(-1))
    return cast(y, x.dtype), new.view(b, H, P, N)


@full_precision
def ssd_advance(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    check_lengths("ssd_advance", lengths, x.shape[1])
    acc = compute_dtype(x.dtype, A.dtype)
    x, dt, B = _cut(lengths, cast(x, acc), _time_step(dt, dt_bias, dt_limit, acc), cast(B, acc))
    to_end, whole = _decay_to_end(dt * cast(A, acc))
    new = _added(x, to_end * dt, B)
    return new if state is None else new.addcmul_(cast(state, acc), whole[..., None, None])


@full_precision
def ssd_chunk(
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
    chunk_size: int | None = 64,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_lengths("ssd_chunk", lengths, x.shape[1])
    acc, dtype = compute_dtype(x.dtype, A.dtype), x.dtype
    (b, L, H, P), N, Q = x.shape, B.shape[3], chunk_size or CHUNK
    n = max(1, -(-L // Q))  # chunks
    x, dt, B = _cut(lengths, cast(x, acc), _time_step(dt, dt_bias, dt_limit, acc), cast(B, acc))

    def chunks(t: Tensor) -> Tensor:  # [b, L, ...] -> [b * n, Q, ...], dt = 0 in the padding
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, n * Q - L)).reshape(b * n, Q, *t.shape[2:])

    x, dt, B, C = chunks(x), chunks(dt), chunks(B), chunks(cast(C, acc))
    a = dt * cast(A, acc)
    to_end, whole = _decay_to_end(a)
    same = enters = None
    check_starts("ssd_chunk", cu_seqlens, b * L)
    if cu_seqlens is not None and L:
        seq = sequence_index(cu_seqlens, b, L)
        seq = torch.cat([seq, seq[:, -1:].expand(b, n * Q - L)], 1).view(b, n, Q)
        same = (seq.unsqueeze(-1) == seq.unsqueeze(-2)).flatten(0, 1)
        to_end = to_end * same[:, -1].unsqueeze(-1)
        last = F.pad(seq[:, :, -1], (1, 0))[:, :-1]  # the sequence that the state before a chunk belongs to
        enters = (seq == last.unsqueeze(-1)).flatten(0, 1)  # [b * n, Q]
        whole = whole * enters[:, -1:]
    added = _added(x, to_end * dt, B).view(b, n, H, P, N)
    whole = whole.view(b, n, H, 1, 1)
    carried = x.new_zeros(b, H, P, N) if state is None else cast(state, acc)
    before = []
    for i in range(n):
        before.append(carried)
        carried = torch.addcmul(added[:, i], carried, whole[:, i])
    states = torch.stack(before, 1)  # [b, n, H, P, N]
    y = _outputs(x, dt, a, B, C, cast(D, acc), states.flatten(0, 1), same, enters)
    if enters is not None:
        states = states * enters[:, 0].view(b, n, 1, 1, 1)
    return y.reshape(b, n * Q, H, P)[:, :L].to(dtype), carried, states if chunk_size is not None else states[:, :0]
