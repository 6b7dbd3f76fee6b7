"""Peers of attention on a paged cache: FA3 and vLLM's Triton kernel, which read a block from the cache that it was
written to, and for the append itself PyTorch's indices before each of them.

FA3 gets the number of splits that is fastest on the GPU at hand, tried before the clock, not what its heuristic takes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clock import DeviceClock, interleave
from .attention import block_mask, even_length, flex_call, in_order, unlimited
from .base import HOW_TO, Arguments, Call, Peer, Unavailable, needs, on_gpu, once, only, prepared

KV = tuple[Tensor, Tensor]  # keys and values
SPLITS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # 0: FA3's heuristic


# ---- kernels that read the block from the cache ----


class Paged(NamedTuple):
    """Attention of q [B, L, Hq, P] on a cache that its keys and values are in."""

    q: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    cache_lengths: Tensor  # [B], with the block
    longest: int  # of these
    scale: float | None
    causal: bool = True

    @property
    def starts(self) -> Tensor:
        B, L = self.q.shape[:2]
        return torch.arange(0, (B + 1) * L, L, device=self.q.device, dtype=torch.int32)

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


def vllm(p: Paged) -> Call:
    L, flat = p.q.shape[1], p.q.flatten(0, 1)
    only(p.causal or L == 1, "vLLM's unified attention is causal only")
    attention = needs("vllm.v1.attention.ops.triton_unified_attention").unified_attention
    out = torch.empty_like(flat)
    options = dict(q=flat, k=p.keys, v=p.values, out=out, block_table=p.table, softmax_scale=p.factor, causal=True)
    options |= dict(cu_seqlens_q=p.starts, max_seqlen_q=L, seqused_k=p.cache_lengths, max_seqlen_k=p.longest)
    options |= dict(window_size=(-1, -1), softcap=0.0, q_descale=None, k_descale=None, v_descale=None)

    def call() -> Tensor:
        attention(**options)
        return out.view(p.q.shape)

    return call


@cache
def _forward() -> Callable[..., Any]:
    """FA3's forward as vLLM builds it: a library of its own, named by TT_FA3 or inside an installed vllm."""
    given = os.environ.get("TT_FA3")
    if given is None:
        folder = Path(next(iter(needs("vllm").__path__)))
        given = next((str(f) for f in folder.rglob("_vllm_fa3_C*.so")), None)
    if given is None:
        raise Unavailable(f"FA3 is not here: TT_FA3 names _vllm_fa3_C.abi3.so of a vllm wheel ({HOW_TO})")
    try:
        ctypes.CDLL(given)
        return torch.ops._vllm_fa3_C.fwd
    except (OSError, AttributeError, RuntimeError) as error:
        raise Unavailable(f"FA3: {given} does not load with this torch: {error}"[:160]) from error


def _fastest(calls: Mapping[int, Call]) -> int:
    """By device time with a cold L2, in turns, of the least of 10 samples each."""
    torch.cuda.synchronize()  # what they read was made on another stream
    clock = DeviceClock()
    with clock.scope():
        samplers, _, errors = clock.samplers({name: [call] for name, call in calls.items()})
        only(bool(samplers), f"FA3: {next(iter(errors.values()), '')}")
        times = interleave(samplers, seconds=0.0)
    return min(times, key=lambda name: min(times[name]))


def fa3(p: Paged) -> Call:
    """All numbers of splits are tried once a row of the bench."""
    forward, flat, L, starts = _forward(), p.q.flatten(0, 1), p.q.shape[1], p.starts
    new = rotary = descale = (None, None, None)

    def with_splits(splits: int) -> Call:
        def call() -> Tensor:
            out = torch.empty_like(flat)
            forward(
                *(flat, p.keys, p.values, *new, out),
                *(starts, None, None, None, p.cache_lengths, L, p.longest, p.table, None, None),
                *(*rotary, *descale, p.factor, p.causal and L > 1, -1, -1, 0.0, True),
                *(None, splits, None, 0, None, 1, 0, None),  # no plan made before
            )
            return out.view(p.q.shape)

        return call

    key = ("fa3", p.q.shape, p.longest, p.causal)
    return with_splits(once(key, lambda: _fastest({splits: with_splits(splits) for splits in SPLITS})))


def in_context(attention: Callable[[Paged], Call], a: Arguments) -> Call:
    """On pages of a cache into which the block was written before the clock."""
    on_gpu(a.q, attention.__name__)
    unlimited(attention.__name__, a)
    (B, L), S, size = a.k.shape[:2], even_length(a.cache_lengths), a.k_pages.shape[1]
    rows = [F.pad(t, (0, 0, 0, 0, 0, -(S + L) % size)) for t in in_order(a, S)]
    pages = [t.unflatten(1, (-1, size)).flatten(0, 1).contiguous() for t in rows]
    table = torch.arange(len(pages[0]), device=a.k.device, dtype=torch.int32).view(B, -1)
    cache_lengths = torch.full((B,), S + L, device=a.k.device, dtype=torch.int32)
    return attention(Paged(a.q, *pages, table, cache_lengths, S + L, a.scale, a.causal))


# ---- the append: keys and values into the pages, then attention ----


def _places(a: Arguments) -> tuple[Tensor, ...]:
    """Row and token of all that enters, its page and slot. Reads the device: before the clock only."""
    (B, L), size, lengths = a.k.shape[:2], a.k_pages.shape[1], a.cache_lengths
    taken = torch.full((B,), L, device=lengths.device) if a.counts is None else a.counts
    row, token = (torch.arange(L, device=lengths.device) < taken.view(B, 1)).nonzero(as_tuple=True)
    position = lengths.long()[row] + token
    return row, token, a.page_table.long()[row, position // size], position % size


def _append_and_gather(
    q: Tensor, new: KV, pages: KV, table: Tensor, places: tuple[Tensor, ...], mask: Tensor, scale: float | None
) -> Tensor:
    """SDPA over the pages of every row one behind the other, and the tokens themselves."""
    row, token, page, slot = places
    L, Hq = q.shape[1:3]
    past = [t[table].flatten(1, 2)[:, : mask.shape[-1] - L] for t in pages]
    keys, values = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(past, new, strict=True))
    for cached, own in zip(pages, new, strict=True):
        cached[page, slot] = own[row, token]
    grouped = Hq != new[0].shape[2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa_append(a: Arguments) -> Call:
    (B, L), device = a.q.shape[:2], a.q.device
    longest = int(a.cache_lengths.max()) if B else 0
    table = a.page_table[:, : -(-longest // a.k_pages.shape[1])].long().clamp(0, len(a.k_pages) - 1)
    cached = torch.arange(longest, device=device) < a.cache_lengths.view(B, 1, 1)
    own = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    mask = torch.cat([cached.expand(B, L, longest), own.expand(B, L, L)], -1).unsqueeze(1)
    fn, new, pages, places = prepared(_append_and_gather, a.q), (a.k, a.v), (a.k_pages, a.v_pages), _places(a)
    return lambda: fn(a.q, new, pages, table, places, mask, a.scale)


def _appending(a: Arguments, then: Call) -> Call:
    """Write all tokens into their pages, then do what reads them there."""
    row, _, page, slot = _places(a)
    only(len(row) == a.k.shape[:2].numel(), "reads the tokens from the cache: only where all of them enter")
    keys, values = a.k.flatten(0, 1), a.v.flatten(0, 1)

    def call() -> Any:
        a.k_pages[page, slot], a.v_pages[page, slot] = keys, values
        return then()

    return call


def flex_append(a: Arguments) -> Call:
    """All pages are keys of every row, as they lie: the mask says where in which row each of them is."""
    (B, L), (n, size), cache_lengths = a.q.shape[:2], a.k_pages.shape[:2], a.cache_lengths
    first = torch.arange(a.page_table.shape[1], device=a.q.device) * size  # where each of a row's pages begins
    begins = torch.full((B, n), 1 << 30, device=a.q.device)  # nobody's: behind all that is seen
    row, at = (first < cache_lengths.view(B, 1) + L).nonzero(as_tuple=True)
    begins[row, a.page_table.long()[row, at]] = first[at]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return begins[b, j // size] + j % size <= cache_lengths[b] + i

    mask = block_mask(seen, B, L, n * size, a.q, *a.page_table.flatten().tolist(), *cache_lengths.tolist())
    keys, values = (pages.flatten(0, 1).expand(B, -1, -1, -1) for pages in (a.k_pages, a.v_pages))
    return _appending(a, flex_call(a.q, keys, values, mask, a.scale))


def in_append(attention: Callable[[Paged], Call], a: Arguments) -> Call:
    on_gpu(a.q, attention.__name__)
    after = a.cache_lengths.int() + a.q.shape[1]
    on_pages = Paged(a.q, a.k_pages, a.v_pages, a.page_table.int(), after, int(after.max()), a.scale)
    return _appending(a, attention(on_pages))


PEERS = {
    "context_attention": (Peer("fa3", partial(in_context, fa3)), Peer("vllm", partial(in_context, vllm))),
    "append_attention": (
        Peer("sdpa", sdpa_append),
        Peer("flex", flex_append),
        Peer("fa3", partial(in_append, fa3)),
        Peer("vllm", partial(in_append, vllm)),
    ),
}
