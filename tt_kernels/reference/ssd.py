"""Mamba-2: the state-space dual form, in chunks, from a seeded state.

Heads of a group share B and C: R = H / G heads, one behind the other. a = dt * A is the log-decay of a token, never
above 0.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import cast, check_counts, check_starts, compute_dtype, full_precision, sequence_index, without_gradients
from .slots import check_slots, read_slots, same_slots, write_slots

CHUNK = 32  # tokens of a chunk where no size is asked for: pairs inside and states between cost about the same on a CPU


class SSDChunk(NamedTuple):
    """What `ssd_chunk` returns: b rows of L tokens, H heads of size P, state size N, chunks of Q tokens."""

    y: Tensor  # [b, L, H, P], dtype of x
    final_state: Tensor | None  # [b, H, P, N] fp32 or fp64: after a row's last token; None: it went to ssm_state
    chunk_states: Tensor  # [b, max(1, ceil(L / Q)), H, P, N] fp32 or fp64: before each chunk; [b, 0, ...] without a Q


def _time_step(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float], acc: torch.dtype) -> Tensor:
    dt = F.softplus(cast(dt, acc) + cast(dt_bias, acc))
    return dt if limit == (0.0, math.inf) else dt.clamp(*limit)


def _cut(counts: Tensor | None, x: Tensor, dt: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros past each row's count, whatever lies there: a step of 0 neither decays the state nor adds to it."""
    if counts is None:
        return x, dt, B
    past = (torch.arange(x.shape[1], device=x.device) >= counts.view(-1, 1)).unsqueeze(-1)  # [b, L, 1]
    return x.masked_fill(past.unsqueeze(-1), 0), dt.masked_fill(past, 0), B.masked_fill(past.unsqueeze(-1), 0)


def _exp(log_decay: Tensor) -> Tensor:
    """exp, and 0 below e^-64 = 2^-92: too little to show in a sum, but on its way to denormal numbers, with which a
    matrix product on a CPU takes several times as long."""
    return torch.threshold(log_decay, -64.0, -math.inf).exp()


def _log_decay(dt: Tensor, A: Tensor, acc: torch.dtype) -> Tensor:
    """dt A, finite even where A is -inf: 0 times that is 0, for a step of 0 or in a product of masks."""
    return dt * cast(A, acc).clamp_min(-1e30)


def _decay_between(a: Tensor) -> Tensor:
    """exp(a[j+1] + ... + a[i]) for i >= j, else 1: [..., L] -> [..., L, L]. Summed directly: a difference of
    cumulative sums would cancel."""
    below = a.new_ones(a.shape[-1], a.shape[-1]).tril(-1)
    return _exp((a.unsqueeze(-1) * below).cumsum(-2))


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
    # Heads and groups first, and one behind the other: the product of two stacks of matrices starts sooner than `@`.
    xs, C = x.transpose(1, 2), C.transpose(1, 2).reshape(b * G, L, N)
    dt, a = dt.mT, a.mT
    weights = _decay_between(a) * dt.unsqueeze(-2)  # [b, H, L, L]
    if same is not None:
        weights = weights * same.unsqueeze(1)
    pairs = torch.bmm(C, B.permute(0, 2, 3, 1).reshape(b * G, N, L)).tril()
    weights = pairs.view(b, G, 1, L, L) * weights.view(b, G, R, L, L)
    y = torch.bmm(weights.view(b * H, L, L), xs.reshape(b * H, L, P)).view(b, H, L, P)
    if state is not None:
        decay = _exp(a.cumsum(-1))
        if enters is not None:
            decay = decay * enters.unsqueeze(1)
        seen = torch.bmm(C, state.reshape(b * G, R * P, N).mT).view(b, G, L, R, P).transpose(2, 3)
        y.view(b, G, R, L, P).addcmul_(seen, decay.reshape(b, G, R, L, 1))
    return y.addcmul_(xs, D.view(-1, 1, 1)).transpose(1, 2)


def _added(x: Tensor, weight: Tensor, B: Tensor) -> Tensor:
    """The sum over tokens of weight * x B^T: x [b, L, H, P], weight [b, L, H], B [b, L, G, N] -> [b, H, P, N]."""
    (b, L, H, P), (G, N) = x.shape, B.shape[2:]
    weighted = (x * weight.unsqueeze(-1)).reshape(b, L, G, H // G * P).permute(0, 2, 3, 1)
    added = torch.bmm(weighted.reshape(b * G, H // G * P, L), B.transpose(1, 2).reshape(b * G, L, N))
    return added.view(b, H, P, N)


def _carry(state: Tensor, added: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each of n chunks [b, n, H, P, N] and after the last, from what chunks add [b, n, H, P, N] and
    leave [b, n, H, 1, 1]."""
    before = []
    for i in range(added.shape[1]):
        before.append(state)
        state = torch.addcmul(added[:, i], state, whole[:, i])
    return torch.stack(before, 1), state


@full_precision
def ssd_block(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    check_slots("ssd_block", ssm_state, state_indices=state_indices)
    acc = compute_dtype(x.dtype, A.dtype)
    dt = _time_step(dt, dt_bias, dt_limit, acc)
    state = None if ssm_state is None else cast(read_slots(ssm_state, state_indices, x.shape[0]), acc)
    y = _outputs(cast(x, acc), dt, _log_decay(dt, A, acc), cast(B, acc), cast(C, acc), cast(D, acc), state)
    return cast(y, x.dtype)


@without_gradients
@full_precision
def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Tensor:
    check_slots("ssd_step", ssm_state, state_indices=state_indices, out_indices=out_indices)
    places = state_indices, state_indices if out_indices is None else out_indices
    return step(x, dt, A, B, C, D, dt_bias, ssm_state, *places, dt_limit)


def step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    read: Tensor | None,
    written: Tensor | None,
    dt_limit: tuple[float, float],
) -> Tensor:
    """`ssd_step` after its checks."""
    acc = compute_dtype(x.dtype, A.dtype)
    (b, H, P), (G, N) = x.shape, B.shape[1:]
    RP = H // G * P
    state = cast(read_slots(ssm_state, read, b), acc)
    xs, dt = cast(x, acc), _time_step(dt, dt_bias, dt_limit, acc)
    # By groups: [b * G, R * P, N], so that no head needs a copy of B and C; rows times rows is the faster product.
    target = same_slots(ssm_state, written, state)
    new = torch.mul(state, _exp(_log_decay(dt, A, acc)).reshape(b, H, 1, 1), out=target).reshape(b * G, RP, N)
    grown = (xs * dt.unsqueeze(-1)).reshape(b * G, RP, 1)
    new.addcmul_(grown, cast(B, acc).reshape(b * G, 1, N))
    y = torch.bmm(cast(C, acc).reshape(b * G, 1, N), new.mT).view(b, H, P)
    y.addcmul_(xs, cast(D, acc).unsqueeze(-1))
    if target is None:
        write_slots(ssm_state, new.view(b, H, P, N), written)
    return cast(y, x.dtype)


@without_gradients
@full_precision
def ssd_advance(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    counts: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> None:
    check_counts("ssd_advance", counts, x.shape[1])
    check_slots("ssd_advance", ssm_state, state_indices=state_indices, out_indices=out_indices)
    acc = compute_dtype(x.dtype, A.dtype)
    state = cast(read_slots(ssm_state, state_indices, x.shape[0]), acc)
    x, dt, B = _cut(counts, cast(x, acc), _time_step(dt, dt_bias, dt_limit, acc), cast(B, acc))
    to_end, whole = _decay_to_end(_log_decay(dt, A, acc))
    new = _added(x, to_end * dt, B).addcmul_(state, whole[..., None, None])
    write_slots(ssm_state, new, state_indices if out_indices is None else out_indices)


@full_precision
def ssd_chunk(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor | None = None,
    *,
    counts: Tensor | None = None,
    state_indices: Tensor | None = None,
    out_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = 64,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> SSDChunk:
    check_counts("ssd_chunk", counts, x.shape[1])
    check_starts("ssd_chunk", cu_seqlens, x.shape[0] * x.shape[1])
    check_slots("ssd_chunk", ssm_state, state_indices=state_indices, out_indices=out_indices)
    state, run = None, _chunked_in_graph if torch.compiler.is_compiling() else _chunked
    if ssm_state is not None:
        state = read_slots(ssm_state, state_indices, x.shape[0], own=torch.is_grad_enabled())
    y, final, states = run(x, dt, A, B, C, D, dt_bias, state, counts, cu_seqlens, chunk_size, *dt_limit)
    if ssm_state is None:
        return SSDChunk(y, final, states)
    write_slots(ssm_state, final, state_indices if out_indices is None else out_indices)
    return SSDChunk(y, None, states)


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    acc, dtype = compute_dtype(x.dtype, A.dtype), x.dtype
    (b, L, H, P), N = x.shape, B.shape[3]
    Q = min(chunk_size or CHUNK, max(L, 1))
    n = max(1, -(-L // Q))  # chunks
    x, dt, B = _cut(counts, cast(x, acc), _time_step(dt, dt_bias, (low, high), acc), cast(B, acc))

    def chunks(t: Tensor) -> Tensor:  # [b, L, ...] -> [b * n, Q, ...], dt = 0 in the padding
        return F.pad(t, (0, 0) * (t.dim() - 2) + (0, n * Q - L)).reshape(b * n, Q, *t.shape[2:])

    x, dt, B, C = chunks(x), chunks(dt), chunks(B), chunks(cast(C, acc))
    a = _log_decay(dt, A, acc)
    to_end, whole = _decay_to_end(a)
    same = enters = None
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
    states, carried = _carry(carried, added, whole)
    y = _outputs(x, dt, a, B, C, cast(D, acc), states.flatten(0, 1), same, enters)
    if enters is not None:
        states = states * enters[:, 0].view(b, n, 1, 1, 1)
    return y.reshape(b, n * Q, H, P)[:, :L].to(dtype), carried, states if chunk_size is not None else states[:, :0]


# As one node of a graph, with a backward that runs it again: the chunks' number may be a symbol there, and an unrolled
# loop would grow with it.


def _node(*inputs):
    return tuple(t.contiguous() for t in _chunked(*inputs))


def _node_fake(x, dt, A, B, C, D, dt_bias, state, counts, cu_seqlens, chunk_size, low, high):
    (b, L, H, P), N = x.shape, B.shape[3]
    last = x.new_empty((b, H, P, N), dtype=compute_dtype(x.dtype, A.dtype))
    chunks = 0 if chunk_size is None else max(1, -(-L // chunk_size))
    return x.new_empty(x.shape), last, last.new_empty(b, chunks, H, P, N)


def _node_backward(
    gradients: list[Tensor],
    tensors: list[Tensor],
    counts: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    low: float,
    high: float,
) -> list[Tensor]:
    def again(*tensors):
        state = () if len(tensors) == 8 else (None,)
        return _chunked(*(*tensors, *state, counts, cu_seqlens, chunk_size, low, high))

    return [t.contiguous() for t in torch.func.vjp(again, *tensors)[1](tuple(gradients))]


_signature = torch.library.infer_schema(_chunked, mutates_args=())
_chunked_in_graph = torch.library.custom_op("tt_reference::ssd_chunk", _node, mutates_args=(), schema=_signature)
_chunked_in_graph.register_fake(_node_fake)
_chunked_backward = torch.library.custom_op("tt_reference::ssd_chunk_backward", _node_backward, mutates_args=())
_chunked_backward.register_fake(lambda gradients, tensors, *_: [t.new_empty(t.shape) for t in tensors])


def _save(ctx, inputs, output) -> None:
    ctx.given, ctx.rest = [t is not None for t in inputs[:10]], inputs[10:]
    ctx.save_for_backward(*(t for t in inputs[:10] if t is not None))


def _backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if given else None for given in ctx.given]
    free = [t for t in tensors[:8] if t is not None]
    found = iter(_chunked_backward(list(gradients), free, *tensors[8:], *ctx.rest))
    return *(None if t is None else next(found) for t in tensors[:8]), *[None] * 5


_chunked_in_graph.register_autograd(_backward, setup_context=_save)
