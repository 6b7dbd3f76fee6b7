"""Peers of attention on a paged cache: FA3 and vLLM's Triton kernel, which read a block from the cache that it was
written to, and for the append itself PyTorch's indices before each of them.

FA3 gets the number of splits that is fastest on the GPU at hand, tried before the clock, not what its heuristic takes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import block_mask, even_length, flex_call, in_order
from .base import HOW_TO, Adapter, Peer, Unavailable, needs, on_gpu, once, only, prepared

Call = Callable[[], Any]
SPLITS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # 0: FA3's heuristic


# ---- kernels that read the block from the cache ----


def _appended(k: Tensor, v: Tensor, length: int, rest: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages of a cache into which the block was written, their table, cache_lengths with it."""
    size = rest["k_pages"].shape[1]
    both = []
    for own, name in ((k, "k_pages"), (v, "v_pages")):
        rows = in_order(own, rest[name], rest["page_table"], length)
        rows = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % size))
        both.append(rows.unflatten(1, (-1, size)).flatten(0, 1).contiguous())
    B = len(k)
    table = torch.arange(len(both[0]), device=k.device, dtype=torch.int32).view(B, -1)
    cache_lengths = torch.full((B,), length + k.shape[1], device=k.device, dtype=torch.int32)
    return both[0], both[1], table, cache_lengths


def _starts(B: int, L: int, device: torch.device) -> Tensor:
    return torch.arange(0, (B + 1) * L, L, device=device, dtype=torch.int32)


def _vllm(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, cache_lengths: Tensor, longest: int, scale: float | None
) -> Call:
    """Causal; cache_lengths [B] with the block, `longest` of them."""
    ops = needs("vllm.v1.attention.ops.triton_unified_attention")
    (B, L, _, P), flat = q.shape, q.flatten(0, 1)
    starts, factor = _starts(B, L, q.device), P**-0.5 if scale is None else scale
    out = torch.empty_like(flat)

    def call() -> Tensor:
        ops.unified_attention(
            q=flat,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=L,
            seqused_k=cache_lengths,
            max_seqlen_k=longest,
            softmax_scale=factor,
            causal=True,
            window_size=(-1, -1),
            block_table=table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
        )
        return out.view(q.shape)

    return call


def vllm_unified(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any
) -> Call:
    L, S = q.shape[1], even_length(rest["cache_lengths"])
    on_gpu(q, "vLLM's unified attention")
    only(causal or L == 1, "vLLM's unified attention is causal only")
    return _vllm(q, *_appended(k, v, S, rest), S + L, scale)


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


def _seconds(call: Call) -> float:
    """Device time of a call, of 10 the least, the L2 filled with other lines before each."""
    others = torch.ones(1 << 26, device="cuda")  # 256 MB
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        others.sum()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def _fa3(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    cache_lengths: Tensor,
    longest: int,
    scale: float | None,
    causal: bool = True,
) -> Call:
    """cache_lengths [B] with the block, `longest` of them. All numbers of splits are tried once a row of the bench."""
    forward = _forward()
    (B, L, _, P), flat = q.shape, q.flatten(0, 1)
    starts, factor = _starts(B, L, q.device), P**-0.5 if scale is None else scale
    new = rotary = descale = (None, None, None)

    def with_splits(splits: int) -> Call:
        def call() -> Tensor:
            out = torch.empty_like(flat)
            forward(
                *(flat, keys, values, *new, out),
                *(starts, None, None, None, cache_lengths, L, longest, table, None, None),
                *(*rotary, *descale, factor, causal and L > 1, -1, -1, 0.0, True),
                *(None, splits, None, 0, None, 1, 0, None),  # no plan made before
            )
            return out.view(q.shape)

        return call

    best = once(
        ("fa3", q.shape, longest, causal), lambda: min(SPLITS, key=lambda splits: _seconds(with_splits(splits)))
    )
    return with_splits(best)


def fa3(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any) -> Call:
    L, S = q.shape[1], even_length(rest["cache_lengths"])
    on_gpu(q, "FA3")
    return _fa3(q, *_appended(k, v, S, rest), S + L, scale, causal)


# ---- the append: keys and values into the pages, then attention ----


def _places(
    L: int, size: int, table: Tensor, cache_lengths: Tensor, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and token of all that enters, its page and slot. Reads the device: before the clock only."""
    B = len(cache_lengths)
    taken = torch.full((B,), L, device=cache_lengths.device) if counts is None else counts
    row, token = (torch.arange(L, device=cache_lengths.device) < taken.view(B, 1)).nonzero(as_tuple=True)
    position = cache_lengths.long()[row] + token
    return row, token, table.long()[row, position // size], position % size


def _append_and_gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor,
    scale: float | None,
) -> Tensor:
    """SDPA over the pages of every row one behind the other, and the tokens themselves."""
    row, token, page, slot = places
    L, Hq = q.shape[1:3]
    past = [pages[table].flatten(1, 2)[:, : mask.shape[-1] - L] for pages in (k_pages, v_pages)]
    keys, values = (torch.cat(pair, 1).transpose(1, 2) for pair in zip(past, (k, v), strict=True))
    k_pages[page, slot], v_pages[page, slot] = k[row, token], v[row, token]
    grouped = Hq != k.shape[2]
    out = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, mask, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def sdpa_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Call:
    B, L = q.shape[:2]
    longest = int(cache_lengths.max()) if B else 0
    places = _places(L, k_pages.shape[1], page_table, cache_lengths, counts)
    table = page_table[:, : -(-longest // k_pages.shape[1])].long().clamp(0, len(k_pages) - 1)
    cached = torch.arange(longest, device=q.device) < cache_lengths.view(B, 1, 1)
    own = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    mask = torch.cat([cached.expand(B, L, longest), own.expand(B, L, L)], -1).unsqueeze(1)
    fn = prepared(_append_and_gather, q)
    return lambda: fn(q, k, v, k_pages, v_pages, table, places, mask, scale)


def _appending(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None,
    then: Call,
) -> Call:
    """Write all tokens into their pages, then do what reads them there."""
    B, L = k.shape[:2]
    row, _, page, slot = _places(L, k_pages.shape[1], table, cache_lengths, counts)
    only(len(row) == B * L, "reads the tokens from the cache: only where all of them enter")
    keys, values = k.flatten(0, 1), v.flatten(0, 1)

    def call() -> Any:
        k_pages[page, slot], v_pages[page, slot] = keys, values
        return then()

    return call


def flex_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Call:
    """All pages are keys of every row, as they lie: the mask says where in which row each of them is."""
    (B, L), (n, size) = q.shape[:2], k_pages.shape[:2]
    first = torch.arange(page_table.shape[1], device=q.device) * size  # the position that each of a row's pages begins
    needed = first < cache_lengths.view(B, 1) + L
    begins = torch.full((B, n), 1 << 30, device=q.device)  # nobody's: behind all that is seen
    row, at = needed.nonzero(as_tuple=True)
    begins[row, page_table.long()[row, at]] = first[at]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return begins[b, j // size] + j % size <= cache_lengths[b] + i

    key = (*page_table.flatten().tolist(), *cache_lengths.tolist())
    mask = block_mask(seen, B, L, n * size, q, *key)
    keys, values = (pages.flatten(0, 1).expand(B, -1, -1, -1) for pages in (k_pages, v_pages))
    then = flex_call(q, keys, values, mask, scale)
    return _appending(k, v, k_pages, v_pages, page_table, cache_lengths, counts, then)


def _reading(package: str, attention: Callable[..., Call]) -> Adapter:
    """Kernels that read the tokens from the cache, once they are there."""

    def adapter(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        page_table: Tensor,
        cache_lengths: Tensor,
        counts: Tensor | None = None,
        *,
        scale: float | None = None,
    ) -> Call:
        on_gpu(q, package)
        after = cache_lengths.int() + q.shape[1]
        then = attention(q, k_pages, v_pages, page_table.int(), after, int(after.max()), scale)
        return _appending(k, v, k_pages, v_pages, page_table, cache_lengths, counts, then)

    return adapter


PEERS = {
    "context_attention": (Peer("fa3", fa3), Peer("vllm", vllm_unified)),
    "append_attention": (
        Peer("sdpa", sdpa_append),
        Peer("flex", flex_append),
        Peer("fa3", _reading("FA3", _fa3)),
        Peer("vllm", _reading("vLLM's unified attention", _vllm)),
    ),
}
