"""Peers of attention: SDPA's cuDNN and Flash, varlen, flex_attention with its mask built once. FA3 and vLLM: paged.py.

What they need and we do not is made once, before the clock: keys of the two halves in one tensor, the pages of a
context in order with the block's own keys behind them. That favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .base import Adapter, Peer, needs, on_gpu, once, only, prepared

Call = Callable[[], Any]


# ---- scaled_dot_product_attention, one backend at a time ----


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Call:
    """[B, L, Hq, P] against [B, S, Hkv, P]; causal: of equally many."""
    if name == "cudnn":
        on_gpu(q, "cuDNN's SDPA")
        only(q.dtype.itemsize == 2, "cuDNN's SDPA: 16-bit inputs only")
    backend = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]

    def call() -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)

    return call


def _causal(name: str) -> Adapter:
    def adapter(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
    ) -> Call:
        only(cu_seqlens is None, "SDPA has no packed sequences")
        return _sdpa(name, q, k, v, True, scale)

    return adapter


def _context(name: str) -> Adapter:
    def adapter(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any
    ) -> Call:
        L, S = q.shape[1], even_length(rest["cache_lengths"])
        only(not causal or L == 1 or S == 0, "SDPA's causal mask starts at the first key")
        keys, values = (in_order(own, rest[n], rest["page_table"], S) for own, n in ((k, "k_pages"), (v, "v_pages")))
        return _sdpa(name, q, keys, values, causal and L > 1, scale)

    return adapter


def even_length(cache_lengths: Tensor) -> int:
    """The one length of all rows. Reads the device: before the clock only."""
    found = set(cache_lengths.tolist())
    only(len(found) <= 1, "rows of one context length only")
    return found.pop() if found else 0


def in_order(own: Tensor, pages: Tensor, table: Tensor, length: int) -> Tensor:
    """[B, length + L, H, P]: the context's pages one behind the other, then the block's own."""
    past = pages[table.long()].flatten(1, 2)[:, :length]
    return torch.cat([past, own], 1)


# ---- torch.nn.attention.varlen ----


def varlen(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None) -> Call:
    on_gpu(q, "varlen_attn")
    only(q.dtype.itemsize == 2, "varlen_attn: 16-bit inputs only")
    attention = needs("torch.nn.attention.varlen", "torch")
    B, N, H = q.shape[:3]
    ends = torch.arange(B + 1, device=q.device) * N if cu_seqlens is None else cu_seqlens
    ends = ends.int()
    longest = int(ends.diff().max())
    # Heads are repeated before the clock where this torch's form has no grouped ones.
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))

    def call() -> Tensor:
        out = attention.varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=(-1, 0))
        return out.view(B, N, H, -1)

    return call


# ---- flex_attention ----


def _flex() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention import flex_attention

    return flex_attention.flex_attention, flex_attention.create_block_mask


def flex_call(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Call:
    fn = prepared(_flex()[0], q)  # on a CPU unfused: to check that the mask is right
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return lambda: fn(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def block_mask(mask: Callable[..., Any], B: int | None, L: int, S: int, t: Tensor, *key: Any) -> Any:
    """Built once for a row: `key` is all that the mask depends on besides these sizes."""
    build = lambda: _flex()[1](mask, B, None, L, S, device=t.device, _compile=t.is_cuda)
    return once((mask.__qualname__, B, L, S, str(t.device), *key), build)


def _ends(t: Tensor | None) -> tuple[int, ...]:
    return () if t is None else tuple(t.tolist())


def _sequence(cu_seqlens: Tensor | None, B: int, N: int, device: torch.device) -> Tensor:
    tokens = torch.arange(B * N, device=device)
    if cu_seqlens is None:
        return torch.zeros(B, N, dtype=torch.long, device=device)
    return torch.searchsorted(cu_seqlens.long(), tokens, right=True).view(B, N)


def flex_causal(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Call:
    B, N = q.shape[:2]
    sequence = _sequence(cu_seqlens, B, N, q.device)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    def packed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (sequence[b, i] == sequence[b, j])

    mask = causal if cu_seqlens is None else packed
    return flex_call(q, k, v, block_mask(mask, None if cu_seqlens is None else B, N, N, q, *_ends(cu_seqlens)), scale)


def flex_block_diffusion(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_clean: Tensor,
    v_clean: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Call:
    """Noisy queries against clean keys, then noisy ones, in one tensor of 2 N."""
    B, N = q.shape[:2]
    S, sequence = block_size, _sequence(cu_seqlens, B, N, q.device)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j >= N
        block = torch.where(own, j - N, j) // S
        return torch.where(own, i // S == block, i // S > block)

    def packed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(b, h, i, j) & (sequence[b, i] == sequence[b, torch.where(j >= N, j - N, j)])

    rows = None if cu_seqlens is None else B
    mask = block_mask(seen if cu_seqlens is None else packed, rows, N, 2 * N, q, S, *_ends(cu_seqlens))
    return flex_call(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), mask, scale)


def flex_context(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any
) -> Call:
    (B, L), cache_lengths = q.shape[:2], rest["cache_lengths"]
    longest = int(cache_lengths.max()) if B else 0
    keys, values = (in_order(own, rest[n], rest["page_table"], longest) for own, n in ((k, "k_pages"), (v, "v_pages")))
    # What lies past a row's length may be anything: zeros, as 0 * NaN would show.
    dead = (torch.arange(longest, device=q.device) >= cache_lengths.view(-1, 1)).view(B, -1, 1, 1)
    keys, values = (t.masked_fill(F.pad(dead, (0, 0, 0, 0, 0, L)), 0) for t in (keys, values))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j >= longest
        return torch.where(own, (j - longest <= i) | (not causal), j < cache_lengths[b])

    return flex_call(q, keys, values, block_mask(seen, B, L, longest + L, q, causal, *_ends(cache_lengths)), scale)


PEERS = {
    "causal_attention": (
        Peer("flash", _causal("flash"), backward=True),
        Peer("cudnn", _causal("cudnn"), backward=True),
        Peer("varlen", varlen, backward=True),
        Peer("flex", flex_causal, backward=True),
    ),
    "block_diffusion_attention": (Peer("flex", flex_block_diffusion, backward=True),),
    "context_attention": (
        Peer("flash", _context("flash")),
        Peer("cudnn", _context("cudnn")),
        Peer("flex", flex_context),
    ),
}
