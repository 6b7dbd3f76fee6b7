"""Attention of a block to cached context, causal attention, and the masks of block-diffusion training."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import can_look, check_starts, compute_dtype, full_precision, sequence_index

SHORT = 32  # tokens: sequences that are shorter in the mean cost more one by one than all at once


class AttentionWithLSE(NamedTuple):
    """What attention gives with return_lse."""

    o: Tensor  # [B, L, Hq, P]
    lse: Tensor  # [B, L, Hq]: natural logarithm of the sum of exp(scores)


def _largest(t: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    if not t.numel():
        return 0.0
    low, high = torch.aminmax(t.detach())
    return max(-low.item(), high.item())


def _is_tame(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Whether PyTorch's attention is right on a CPU: masks are added to scores there, which hides no NaN or infinity,
    and a query whose scores are all NaN gets 0. Looking takes 5 % of what attention to a long context does."""
    if not can_look(q):
        return False
    scores = _largest(q) * _largest(k) * q.shape[-1] * abs(scale)
    return scores < torch.finfo(compute_dtype(q.dtype)).max and math.isfinite(_largest(v))


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[B, Hkv, R, L, S]: scale q k, capped to softcap tanh(scale q k / softcap), -inf where a query does not see."""
    acc, Hkv = compute_dtype(q.dtype), k.shape[2]
    grouped = q.to(acc).unflatten(2, (Hkv, q.shape[2] // Hkv))
    scores = torch.einsum("blgrp,bsgp->bgrls", grouped, k.to(acc)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if seen is None else scores.masked_fill(~seen[:, None, None], -math.inf)


def _up_to_itself(L: int, window: int | None, device: torch.device) -> Tensor:
    """[1, L, L]: token i sees tokens j with i - window < j <= i."""
    seen = torch.ones(1, L, L, dtype=torch.bool, device=device).tril()
    return seen if window is None or window >= L else seen.triu(1 - window)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float, softcap: float | None = None) -> Tensor:
    """Written out: what a query does not see is replaced among its scores, and what no query sees is cleared."""
    if seen is not None:
        nobody = ~seen.any(1)[..., None, None]  # [B or 1, S, 1, 1]
        k, v = k.masked_fill(nobody, 0), v.masked_fill(nobody, 0)
    weights = _scores(q, k, seen, scale, softcap).softmax(-1)
    rounded = weights.to(q.dtype).to(weights.dtype)  # as PyTorch's attention rounds them
    return torch.einsum("bgrls,bsgp->blgrp", rounded, v.to(weights.dtype)).flatten(2, 3).to(q.dtype)


def _log_sums(
    q: Tensor, k: Tensor, seen: Tensor | None, scale: float | None, causal: bool, softcap: float | None
) -> Tensor:
    """[B, L, Hq]: log sum exp of the scores, of the arguments of `_attend`."""
    if causal:
        seen = _up_to_itself(q.shape[1], None, q.device)
    scores = _scores(q, k, seen, q.shape[-1] ** -0.5 if scale is None else scale, softcap)
    return scores.logsumexp(-1).flatten(1, 2).transpose(1, 2)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None,
    scale: float | None,
    causal: bool = False,
    softcap: float | None = None,
) -> Tensor:
    """[B, L, Hq, P] against [B, S, Hkv, P], of which queries see those in `seen` [B or 1, L or 1, S], or where causal
    those up to themselves; softmax in fp32 or better."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # PyTorch's attention has no soft cap.
    if softcap is not None or (q.device.type == "cpu" and not _is_tame(q, k, v, scale)):
        return _masked(q, k, v, _up_to_itself(q.shape[1], None, q.device) if causal else seen, scale, softcap)
    # PyTorch multiplies with the mask in place, whose infinities turn, or are NaN where the scale is 0 in fp32.
    if abs(scale) < 1e-44:
        q, scale = q * 0, 1.0
    elif scale < 0:
        q, scale = -q, -scale
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = None if seen is None else seen.unsqueeze(1)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _look(
    op: str, pages: Tensor, page_table: Tensor, cache_lengths: Tensor, entering: list[int] | None
) -> tuple[int, int, slice | None]:
    """The longest and the shortest length, and the pages of all rows where they lie in order, row after row. Refuses
    what rows would read or write outside the pages, or write into each other's. entering: new tokens of each row."""
    page_size, have, table = pages.shape[1], cache_lengths.tolist(), page_table.tolist()
    room = page_table.shape[1] * page_size
    longest, shortest = max(have, default=0), min(have, default=0)
    if shortest < 0:
        raise ValueError(f"{op}: cache_lengths goes down to {shortest}, expected 0 or more")
    if longest > room:
        raise ValueError(f"{op}: cache_lengths goes up to {longest}, but the page table has room for {room}")
    more = entering or [0] * len(have)
    for n, new in zip(have, more, strict=True):
        if new and n + new > room:
            found = f"cache_lengths is {n} and {new} tokens enter"
            raise ValueError(f"{op}: {found}, but the page table has room for {room}")
    listed = [page for row in table for page in row]
    first, last = (listed[0], listed[0] + len(listed)) if listed else (0, 0)
    if first >= 0 and last <= len(pages) and listed == list(range(first, last)):
        return longest, shortest, slice(first, last)
    used = [row[: -(-(n + new) // page_size)] for row, n, new in zip(table, have, more, strict=True)]
    for b, row in enumerate(used):
        if row and not (min(row) >= 0 and max(row) < len(pages)):
            page = next(page for page in row if not 0 <= page < len(pages))
            raise ValueError(f"{op}: page_table has page {page} in row {b}, expected 0 to {len(pages) - 1}")
    if any(more):
        owners = Counter(page for row in used for page in row)
        for b, (row, n, new) in enumerate(zip(used, have, more, strict=True)):
            for page in row[n // page_size :] if new else ():
                if owners[page] > 1:
                    found = f"page_table has page {page} {owners[page]} times"
                    raise ValueError(f"{op}: {found}, expected once: row {b} writes it")
    return longest, shortest, None


def _past(pages: Tensor, page_table: Tensor, in_order: slice | None, cache_lengths: Tensor, longest: int) -> Tensor:
    """[B, longest, Hkv, P]: the cached tokens of all rows. Table entries past a row's end do not count."""
    B, page_size = page_table.shape[0], pages.shape[1]
    if in_order is not None:
        return pages[in_order].reshape(B, page_table.shape[1] * page_size, *pages.shape[2:])[:, :longest]
    page_table = page_table[:, : -(-longest // page_size)]
    starts = torch.arange(page_table.shape[1], device=page_table.device) * page_size
    index = page_table.masked_fill(starts >= cache_lengths.unsqueeze(1), 0).clamp(0, pages.shape[0] - 1)
    past = pages.index_select(0, index.flatten()).unflatten(0, index.shape)
    return past.flatten(1, 2)[:, :longest]


def _behind(before: int, L: int, device: torch.device) -> Tensor:
    """[1, L, before + L]: what of them L tokens see that stand behind `before` others."""
    return F.pad(_up_to_itself(L, None, device), (before, 0), value=True)


def _in_window(window: int, longest: int, L: int, cache_lengths: Tensor) -> Tensor:
    """[B, L, longest + L]: whether keys, cached ones and then the block's, are less than `window` tokens before a token
    of the block, or behind it."""
    token = torch.arange(L, device=cache_lengths.device)
    last = cache_lengths.unsqueeze(1)
    slots = torch.arange(longest, device=cache_lengths.device)
    place = torch.cat([slots.expand(len(last), longest), last + token], 1)  # of keys in their sequence
    return place.unsqueeze(1) > (last + token - window).unsqueeze(2)


Cached = tuple[Tensor, Tensor, Tensor, Tensor]  # k_pages, v_pages, page_table, cache_lengths
# Of `_attend`, without the soft cap.
Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float | None, bool]


def _context(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cached: Cached,
    causal: bool,
    scale: float | None,
    window: int | None = None,
    entering: list[int] | None = None,
) -> Arguments:
    """The arguments of `_attend`. entering: as `_look` takes it."""
    (k_pages, v_pages, page_table, cache_lengths), L = cached, q.shape[1]
    causal = causal and L > 1
    longest, shortest = page_table.shape[1] * k_pages.shape[1], -1  # not known on the host: all pages, masked
    in_order = None
    if can_look(cache_lengths):
        longest, shortest, in_order = _look(op, k_pages, page_table, cache_lengths, entering)
    if window is not None and window >= longest + L:  # it reaches every token
        window = None
    if longest == 0 or k_pages.shape[0] == 0:
        if window is None:
            return q, k, v, None, scale, causal
        own = _in_window(window, 0, L, cache_lengths.new_zeros(1))
        return q, k, v, own & _behind(0, L, q.device) if causal else own, scale, False
    past = [_past(pages, page_table, in_order, cache_lengths, longest) for pages in (k_pages, v_pages)]
    mask = None
    if shortest < longest:  # cached tokens past a row's length may hold anything, NaN included
        seen = torch.arange(longest, device=q.device) < cache_lengths.unsqueeze(1)
        past = [t.masked_fill(~seen[..., None, None], 0) for t in past]
        mask = F.pad(seen, (0, L), value=True).unsqueeze(1)  # [B, 1, longest + L]
    if causal:
        own = _behind(longest, L, q.device)
        mask = own if mask is None else mask & own
    if window is not None:
        near = _in_window(window, longest, L, cache_lengths)
        mask = near if mask is None else mask & near
    return q, torch.cat([past[0], k], 1), torch.cat([past[1], v], 1), mask, scale, False


def _result(arguments: Arguments, return_lse: bool, softcap: float | None = None) -> Tensor | AttentionWithLSE:
    q, k, v, seen, scale, causal = arguments
    o = _attend(q, k, v, seen, scale, causal, softcap)
    return AttentionWithLSE(o, _log_sums(q, k, seen, scale, causal, softcap)) if return_lse else o


@full_precision
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | AttentionWithLSE:
    cached = k_pages, v_pages, page_table, cache_lengths
    return _result(_context("context_attention", q, k, v, cached, causal, scale, window), return_lse, softcap)


def _enter(k: Tensor, v: Tensor, cached: Cached, entering: list[int]) -> None:
    """`_append` of so many tokens of each row, where the host may look: a row page by page, which takes half the time
    of indices."""
    k_pages, v_pages, page_table, cache_lengths = cached
    page_size, have, table = k_pages.shape[1], cache_lengths.tolist(), page_table.tolist()
    if len(have) == 1:
        at, end = have[0], have[0] + entering[0]
        while at < end:
            page, slot = table[0][at // page_size], at % page_size
            n = min(end - at, page_size - slot)
            rows = slice(at - have[0], at - have[0] + n)
            k_pages[page, slot : slot + n] = k[0, rows]
            v_pages[page, slot : slot + n] = v[0, rows]
            at += n
        return
    places = [
        (b * k.shape[1] + i, table[b][(n + i) // page_size] * page_size + (n + i) % page_size)
        for b, (n, new) in enumerate(zip(have, entering, strict=True))
        for i in range(new)
    ]
    if places:
        token, slot = torch.tensor(places).unbind(1)
        page, slot = slot // page_size, slot % page_size
        for new, pages in ((k, k_pages), (v, v_pages)):
            new = new.flatten(0, 1)
            pages[page, slot] = new if len(places) == len(new) else new[token]


def _append(k: Tensor, v: Tensor, cached: Cached, counts: Tensor | None) -> None:
    """Tokens that no slot is for do not enter. Nothing is read on the host."""
    k_pages, v_pages, page_table, cache_lengths = cached
    (B, L), (pages, page_size), row_pages = k.shape[:2], k_pages.shape[:2], page_table.shape[1]
    if B * L * pages * row_pages == 0:
        return
    token = torch.arange(L, device=k.device)
    position = cache_lengths.clamp(min=0).unsqueeze(1) + token  # [B, L]
    enters = position < row_pages * page_size
    if counts is not None:
        enters = enters & (token < counts.unsqueeze(1))
    page = page_table.gather(1, (position // page_size).clamp(max=row_pages - 1))
    enters = (enters & (page >= 0) & (page < pages)).flatten()
    page, slot = page.clamp(0, pages - 1).flatten(), (position % page_size).flatten()
    # The others write once more what the first that enters writes, or, where none does, what is there.
    first = enters.int().argmax(0, keepdim=True)
    at = torch.where(enters, page, page[first]), torch.where(enters, slot, slot[first])
    for new, cache in ((k, k_pages), (v, v_pages)):
        new = new.flatten(0, 1)
        same = torch.where(enters[first][:, None, None], new[first], cache[page[first], slot[first]])
        cache[at] = torch.where(enters[:, None, None], new, same)


@full_precision
def append_attention(
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
    return_lse: bool = False,
) -> Tensor | AttentionWithLSE:
    (B, L), entering = k.shape[:2], None
    cached = k_pages, v_pages, page_table, cache_lengths
    if can_look(cache_lengths):
        entering = [L] * B if counts is None else counts.clamp(0, L).tolist()
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if entering is not None and not gradients and entering == [L] * B:
        longest, shortest, in_order = _look("append_attention", k_pages, page_table, cache_lengths, entering)
        if in_order is not None and 0 < shortest == longest:  # they enter first: what they see lies side by side
            _enter(k, v, cached, entering)
            S, mask = longest + L, None if L == 1 else _behind(longest, L, q.device)
            k, v = (_past(pages, page_table, in_order, cache_lengths, S) for pages in (k_pages, v_pages))
            return _result((q, k, v, mask, scale, False), return_lse)
    out = _result(_context("append_attention", q, k, v, cached, True, scale, None, entering), return_lse)
    with torch.no_grad():
        if entering is None:
            _append(k, v, cached, counts)
        else:
            _enter(k, v, cached, entering)
    return out


Attend = Callable[..., Tensor]  # where the tokens begin in their row, which are of one sequence, and the tensors


def _of_sequences(op: str, attend: Attend, tensors: tuple[Tensor, ...], cu_seqlens: Tensor | None) -> Tensor:
    """Attention among the tokens of each packed sequence: one after the other where the host knows them and they are
    long, so that nobody computes scores between them; else of whole rows, `together` [B, N, N] saying who may."""
    B, N = tensors[0].shape[:2]
    starts = check_starts(op, cu_seqlens, B * N)
    if cu_seqlens is None or B * N == 0:
        return attend(0, None, *tensors)
    if starts is None or len(starts) * SHORT > B * N:
        seq = sequence_index(cu_seqlens, B, N)
        return attend(0, seq.unsqueeze(2) == seq.unsqueeze(1), *tensors)
    bounds = sorted({*starts, *range(0, B * N + 1, N)})  # none goes on in the next row
    if bounds == list(range(0, B * N + 1, N)):
        return attend(0, None, *tensors)
    lengths = [b - a for a, b in pairwise(bounds)]
    parts = zip(*(t.flatten(0, 1).split(lengths) for t in tensors), strict=True)
    each = (attend(at % N, None, *(t.unsqueeze(0) for t in part)) for at, part in zip(bounds, parts, strict=False))
    return torch.cat(list(each), 1).view(B, N, *tensors[0].shape[2:])


@full_precision
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    def attend(at: int, together: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N = q.shape[1]
        if together is None and (window is None or window >= N):
            return _attend(q, k, v, None, scale, causal=True, softcap=softcap)
        seen = _up_to_itself(N, window, q.device)
        return _attend(q, k, v, seen if together is None else seen & together, scale, softcap=softcap)

    return _of_sequences("causal_attention", attend, (q, k, v), cu_seqlens)


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
    def attend(
        at: int, together: Tensor | None, q: Tensor, k: Tensor, v: Tensor, k_clean: Tensor, v_clean: Tensor
    ) -> Tensor:
        block = torch.arange(at, at + q.shape[1], device=q.device) // block_size
        mask = torch.cat([block.unsqueeze(1) > block, block.unsqueeze(1) == block], -1).unsqueeze(0)  # clean, noisy
        if together is not None:
            mask = mask & together.repeat(1, 1, 2)
        return _attend(q, torch.cat([k_clean, k], 1), torch.cat([v_clean, v], 1), mask, scale)

    return _of_sequences("block_diffusion_attention", attend, (q, k, v, k_clean, v_clean), cu_seqlens)
