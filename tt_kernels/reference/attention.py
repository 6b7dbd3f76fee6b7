"""Attention of a block to cached context, causal attention, and the masks of block-diffusion training."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import full_precision, sequence_index


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool = False) -> Tensor:
    """[B, L, Hq, P] against [B, S, Hkv, P]; softmax in fp32 or better."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _page_index(page_table: Tensor, lengths: Tensor, longest: int, pages: Tensor) -> slice | Tensor:
    """The pages of all rows, row after row: a slice where they lie in order. Entries past a row's end do not count."""
    if page_table.device.type == "cpu":  # elsewhere looking would wait for the device
        listed = page_table.flatten().tolist()
        first, count = listed[0], len(listed)
        if 0 <= first <= len(pages) - count and listed == list(range(first, first + count)):
            return slice(first, first + count)
    starts = torch.arange(0, longest, pages.shape[1], device=page_table.device)
    return page_table[:, : len(starts)].masked_fill(starts >= lengths.view(-1, 1), 0).flatten()


def _context(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float | None,
) -> Tensor:
    B, L = q.shape[:2]
    causal = causal and L > 1
    room = page_table.shape[1] * k_pages.shape[1]
    longest, shortest = room, -1  # not known on the host: all pages, masked
    if lengths.device.type == "cpu":
        host = lengths.tolist() or [0]
        longest, shortest = max(host), min(host)
        if shortest < 0:
            raise ValueError(f"{op}: lengths goes down to {shortest}, expected 0 or more")
    if longest > room:
        raise ValueError(f"{op}: lengths goes up to {longest}, but the page table has room for {room}")
    if longest == 0:
        return _sdpa(q, k, v, None, scale, causal=causal)
    index = _page_index(page_table, lengths, longest, k_pages)
    past = [t[index] if isinstance(index, slice) else t.index_select(0, index) for t in (k_pages, v_pages)]
    past = [t.reshape(B, -1, *t.shape[2:])[:, :longest] for t in past]
    mask = None
    if shortest < longest:  # what lies past a row's length may be anything, NaN included
        seen = torch.arange(longest, device=q.device) < lengths.view(B, 1)
        past = [t.masked_fill(~seen[..., None, None], 0) for t in past]
        mask = F.pad(seen, (0, L), value=True).view(B, 1, 1, longest + L)
    if causal:
        own = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
        own = F.pad(own, (longest, 0), value=True)
        mask = own if mask is None else mask & own
    return _sdpa(q, torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), mask, scale)


@full_precision
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return _context("context_attention", q, k, v, k_pages, v_pages, page_table, lengths, causal, scale)


def _append(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, lengths: Tensor, counts: Tensor | None
) -> None:
    (B, L), page_size = k.shape[:2], k_pages.shape[1]
    if k.device.type == "cpu":  # elsewhere looking would wait for the device
        n, entering = lengths.tolist(), [L] * B if counts is None else counts.clamp(0, L).tolist()
        room = page_table.shape[1] * page_size
        for have, more in zip(n, entering, strict=True):
            if more and have + more > room:
                found = f"lengths is {have} and {more} tokens enter"
                raise ValueError(f"append_attention: {found}, but the page table has room for {room}")
        if B == 1:  # page by page: half the time of indices
            at, end = n[0], n[0] + entering[0]
            while at < end:
                slot = at % page_size
                new = slice(at - n[0], min(end, at - slot + page_size) - n[0])
                page = int(page_table[0, at // page_size])
                at = n[0] + new.stop
                k_pages[page, slot : slot + new.stop - new.start] = k[0, new]
                v_pages[page, slot : slot + new.stop - new.start] = v[0, new]
            return
    token = torch.arange(L, device=k.device)
    position = lengths.unsqueeze(1) + token  # [B, L]
    if counts is None:
        page = page_table.gather(1, position // page_size)
    else:
        row, token = (token < counts.unsqueeze(1)).nonzero(as_tuple=True)
        position, k, v = position[row, token], k[row, token], v[row, token]  # [tokens that enter]
        page = page_table[row, position // page_size]
    at = page, position % page_size
    k_pages[at], v_pages[at] = k.to(k_pages.dtype), v.to(v_pages.dtype)


@full_precision
def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    counts: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    o = _context("append_attention", q, k, v, k_pages, v_pages, page_table, lengths, True, scale)
    with torch.no_grad():
        _append(k, v, k_pages, v_pages, page_table, lengths, counts)
    return o


@full_precision
def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    B, N = q.shape[:2]
    if cu_seqlens is None or (B == 1 and len(cu_seqlens) == 2):  # nothing but whole rows
        return _sdpa(q, k, v, None, scale, causal=True)
    seq = sequence_index(cu_seqlens, B, N)
    mask = (seq.unsqueeze(2) == seq.unsqueeze(1)).tril().unsqueeze(1)
    return _sdpa(q, k, v, mask, scale)


@full_precision
def block_diffusion_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_clean: Tensor,
    v_clean: Tensor,
    *,
    block_size: int,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    B, N = q.shape[:2]
    block = torch.arange(N, device=q.device) // block_size
    mask = torch.cat([block.unsqueeze(1) > block, block.unsqueeze(1) == block], -1)  # [N, 2 N]: clean, noisy
    if cu_seqlens is not None:
        seq = sequence_index(cu_seqlens, B, N)
        mask = (mask & (seq.unsqueeze(2) == seq.unsqueeze(1)).repeat(1, 1, 2)).unsqueeze(1)
    return _sdpa(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), mask, scale)
