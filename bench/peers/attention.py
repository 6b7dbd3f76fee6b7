"""Peers of attention: SDPA's cuDNN and Flash, flex_attention with its mask built once, FA3, vLLM's Triton kernel.

What they need and we do not is made once, before the clock: keys of the two halves in one tensor, the pages of a
context in order with the block's own keys behind them. That favours them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .base import HOW_TO, Adapter, Peer, Unavailable, needs, on_gpu, once, only, prepared

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
        L, S = q.shape[1], _even_length(rest["lengths"])
        only(not causal or L == 1 or S == 0, "SDPA's causal mask starts at the first key")
        keys, values = (_in_order(own, rest[n], rest["page_table"], S) for own, n in ((k, "k_pages"), (v, "v_pages")))
        return _sdpa(name, q, keys, values, causal and L > 1, scale)

    return adapter


def _even_length(lengths: Tensor) -> int:
    """The one length of all rows. Reads the device: before the clock only."""
    found = set(lengths.tolist())
    only(len(found) <= 1, "rows of one context length only")
    return found.pop() if found else 0


def _in_order(own: Tensor, pages: Tensor, table: Tensor, length: int) -> Tensor:
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


def _flex_call(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float | None) -> Call:
    fn = prepared(_flex()[0], q)  # on a CPU unfused: to check that the mask is right
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return lambda: fn(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


def _block_mask(mask: Callable[..., Any], B: int | None, L: int, S: int, t: Tensor, *key: Any) -> Any:
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
    return _flex_call(q, k, v, _block_mask(mask, None if cu_seqlens is None else B, N, N, q, *_ends(cu_seqlens)), scale)


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
    mask = _block_mask(seen if cu_seqlens is None else packed, rows, N, 2 * N, q, S, *_ends(cu_seqlens))
    return _flex_call(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), mask, scale)


def flex_context(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any
) -> Call:
    (B, L), lengths = q.shape[:2], rest["lengths"]
    longest = int(lengths.max()) if B else 0
    keys, values = (_in_order(own, rest[n], rest["page_table"], longest) for own, n in ((k, "k_pages"), (v, "v_pages")))
    # What lies past a row's length may be anything: zeros, as 0 * NaN would show.
    dead = (torch.arange(longest, device=q.device) >= lengths.view(-1, 1)).view(B, -1, 1, 1)
    keys, values = (t.masked_fill(F.pad(dead, (0, 0, 0, 0, 0, L)), 0) for t in (keys, values))

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        own = j >= longest
        return torch.where(own, (j - longest <= i) | (not causal), j < lengths[b])

    return _flex_call(q, keys, values, _block_mask(seen, B, L, longest + L, q, causal, *_ends(lengths)), scale)


# ---- a paged cache that already holds the block: how vLLM and FA3 are called ----


def _appended(k: Tensor, v: Tensor, length: int, rest: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages of a cache into which the block was written, their table, lengths with it."""
    size = rest["k_pages"].shape[1]
    both = []
    for own, name in ((k, "k_pages"), (v, "v_pages")):
        rows = _in_order(own, rest[name], rest["page_table"], length)
        rows = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[1] % size))
        both.append(rows.unflatten(1, (-1, size)).flatten(0, 1).contiguous())
    B = len(k)
    table = torch.arange(len(both[0]), device=k.device, dtype=torch.int32).view(B, -1)
    lengths = torch.full((B,), length + k.shape[1], device=k.device, dtype=torch.int32)
    return both[0], both[1], table, lengths


def _starts(B: int, L: int, device: torch.device) -> Tensor:
    return torch.arange(0, (B + 1) * L, L, device=device, dtype=torch.int32)


def vllm_unified(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any
) -> Call:
    (B, L, _, P), S = q.shape, _even_length(rest["lengths"])
    on_gpu(q, "vLLM's unified attention")
    only(causal or L == 1, "vLLM's unified attention is causal only")
    ops = needs("vllm.v1.attention.ops.triton_unified_attention")
    keys, values, table, lengths = _appended(k, v, S, rest)
    flat, starts, factor = q.flatten(0, 1), _starts(B, L, q.device), scale or P**-0.5
    out = torch.empty_like(flat)

    def call() -> Tensor:
        ops.unified_attention(
            q=flat,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=L,
            seqused_k=lengths,
            max_seqlen_k=S + L,
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


@cache
def _fa3() -> Callable[..., Any]:
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


def fa3(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None, **rest: Any) -> Call:
    (B, L, _, P), S = q.shape, _even_length(rest["lengths"])
    on_gpu(q, "FA3")
    forward = _fa3()
    keys, values, table, lengths = _appended(k, v, S, rest)
    flat, starts, factor = q.flatten(0, 1), _starts(B, L, q.device), scale or P**-0.5
    new = rotary = descale = (None, None, None)

    def call() -> Tensor:
        out = torch.empty_like(flat)
        forward(
            *(flat, keys, values, *new, out),
            *(starts, None, None, None, lengths, L, S + L, table, None, None),
            *(*rotary, *descale, factor, causal and L > 1, -1, -1, 0.0, True),
            *(None, 0, None, 0, None, 1, 0, None),  # no plan made before, as many splits as its heuristic wants
        )
        return out.view(q.shape)

    return call


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
        Peer("fa3", fa3),
        Peer("vllm", vllm_unified),
    ),
}
