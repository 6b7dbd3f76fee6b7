"""Peers of attention: SDPA's cuDNN and Flash, varlen, flex_attention with its mask built once. FA3 and vLLM: paged.py.

What they need and we do not is made once, before the clock: keys of the two halves in one tensor, the pages of a
context in order with the block's own keys behind them. That favours them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from .base import Arguments, Call, Peer, needs, on_gpu, once, only, prepared

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


def unlimited(name: str, a: Arguments) -> None:
    only(a.window is None and a.softcap is None, f"{name}: neither windows nor soft caps")


def sdpa_causal(name: str, a: Arguments) -> Call:
    unlimited("SDPA", a)
    only(a.cu_seqlens is None, "SDPA has no packed sequences")
    return _sdpa(name, a.q, a.k, a.v, True, a.scale)


def sdpa_context(name: str, a: Arguments) -> Call:
    unlimited("SDPA", a)
    L, S = a.q.shape[1], even_length(a.cache_lengths)
    only(not a.causal or L == 1 or S == 0, "SDPA's causal mask starts at the first key")
    return _sdpa(name, a.q, *in_order(a, S), a.causal and L > 1, a.scale)


def even_length(cache_lengths: Tensor) -> int:
    """The one length of all rows. Reads the device: before the clock only."""
    found = set(cache_lengths.tolist())
    only(len(found) <= 1, "rows of one context length only")
    return found.pop() if found else 0


def in_order(a: Arguments, length: int) -> list[Tensor]:
    """Keys and values, [B, length + L, H, P]: the context's pages one behind the other, then the block's own."""
    past = [pages[a.page_table.long()].flatten(1, 2)[:, :length] for pages in (a.k_pages, a.v_pages)]
    return [torch.cat(pair, 1) for pair in zip(past, (a.k, a.v), strict=True)]


# ---- torch.nn.attention.varlen ----


def varlen(a: Arguments) -> Call:
    on_gpu(a.q, "varlen_attn")
    unlimited("varlen_attn", a)
    only(a.q.dtype.itemsize == 2, "varlen_attn: 16-bit inputs only")
    attention = needs("torch.nn.attention.varlen", "torch").varlen_attn
    B, N, H = a.q.shape[:3]
    ends = torch.arange(B + 1, device=a.q.device) * N if a.cu_seqlens is None else a.cu_seqlens
    ends = ends.int()
    longest = int(ends.diff().max())
    # Heads are repeated before the clock where this torch's form has no grouped ones.
    q, k, v = (t.flatten(0, 1) for t in (a.q, a.k, a.v))
    k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    options = dict(scale=a.scale, window_size=(-1, 0))
    return lambda: attention(q, k, v, ends, ends, longest, longest, **options).view(B, N, H, -1)


# ---- flex_attention ----


def flex_call(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None, softcap: float | None = None) -> Call:
    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    score_mod = None if softcap is None else capped
    fn = prepared(flex_attention.flex_attention, q)  # on a CPU unfused: to check that the mask is right
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    options = dict(block_mask=mask, score_mod=score_mod, scale=scale, enable_gqa=grouped)
    return lambda: fn(q, k, v, **options).transpose(1, 2)


def block_mask(seen: Callable[..., Any], B: int | None, L: int, S: int, t: Tensor, *key: Any) -> Any:
    """Built once for a row: `key` is all that the mask depends on besides these sizes."""
    build = lambda: flex_attention.create_block_mask(seen, B, None, L, S, device=t.device, _compile=t.is_cuda)
    return once((seen.__qualname__, B, L, S, str(t.device), *key), build)


def _mask_of_sequences(seen: Callable[..., Any], a: Arguments, S: int, *key: Any) -> Any:
    """A mask over N queries and S keys, N of them or twice: where sequences are packed, each sees itself only."""
    B, N = a.q.shape[:2]
    if a.cu_seqlens is None:
        return block_mask(seen, None, N, S, a.q, *key)
    tokens = torch.arange(B * N, device=a.q.device)
    sequence = torch.searchsorted(a.cu_seqlens.long(), tokens, right=True).view(B, N)

    def packed(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen(b, h, i, j) & (sequence[b, i] == sequence[b, torch.where(j >= N, j - N, j)])

    return block_mask(packed, B, N, S, a.q, *key, *a.cu_seqlens.tolist())


def flex_causal(a: Arguments) -> Call:
    N = a.q.shape[1]
    window = N if a.window is None else a.window

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j < window)

    return flex_call(a.q, a.k, a.v, _mask_of_sequences(causal, a, N, window), a.scale, a.softcap)


def flex_block_diffusion(a: Arguments) -> Call:
    """Noisy queries against clean keys, then noisy ones, in one tensor of 2 N."""
    N, S = a.q.shape[1], a.block_size

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j >= N
        block = torch.where(own, j - N, j) // S
        return torch.where(own, i // S == block, i // S > block)

    keys, values = torch.cat([a.k_clean, a.k], 1), torch.cat([a.v_clean, a.v], 1)
    return flex_call(a.q, keys, values, _mask_of_sequences(seen, a, 2 * N, S), a.scale)


def flex_context(a: Arguments) -> Call:
    (B, L), causal, cache_lengths = a.q.shape[:2], a.causal, a.cache_lengths
    longest = int(cache_lengths.max()) if B else 0
    # What lies past a row's length may be anything: zeros, as 0 * NaN would show.
    dead = (torch.arange(longest, device=a.q.device) >= cache_lengths.view(-1, 1)).view(B, -1, 1, 1)
    keys, values = (t.masked_fill(F.pad(dead, (0, 0, 0, 0, 0, L)), 0) for t in in_order(a, longest))

    window = longest + L if a.window is None else a.window

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = torch.where(j >= longest, j - longest, j - cache_lengths[b]) > i - window
        return near & torch.where(j >= longest, (j - longest <= i) | (not causal), j < cache_lengths[b])

    mask = block_mask(seen, B, L, longest + L, a.q, causal, window, *cache_lengths.tolist())
    return flex_call(a.q, keys, values, mask, a.scale, a.softcap)


PEERS = {
    "causal_attention": (
        Peer("flash", partial(sdpa_causal, "flash"), backward=True),
        Peer("cudnn", partial(sdpa_causal, "cudnn"), backward=True),
        Peer("varlen", varlen, backward=True),
        Peer("flex", flex_causal, backward=True),
    ),
    "block_diffusion_attention": (Peer("flex", flex_block_diffusion, backward=True),),
    "context_attention": (
        Peer("flash", partial(sdpa_context, "flash")),
        Peer("cudnn", partial(sdpa_context, "cudnn")),
        Peer("flex", flex_context),
    ),
}
