"""Attention of a block to a paged cache and to itself, and the same with the block entering the cache."""

from typing import Literal, overload

import torch
from torch import Tensor

from .. import reference
from ..reference import AttentionWithLSE
from ..runtime.checks import as_float, check, is_real, is_whole, refuse
from ..runtime.registry import define, takes_kernel, unasked, wants_gradients
from .context_attention_launch import _append_attention, _context_attention, _context_attention_fake


def check_heads(op: str, q: Tensor, k: Tensor, **others: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    Hq, Hkv = q.shape[2], k.shape[2]
    if Hq % Hkv:
        raise ValueError(f"{op}: k has Hkv={Hkv} heads, expected a divisor of Hq={Hq}, the heads of q")
    for name, t in dict(k=k, **others).items():
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {t.dtype}, expected {q.dtype}, the dtype of q")


def scale_of(op: str, q: Tensor, scale: float | None) -> float:
    """The factor of the scores: P^-1/2 unless the caller chooses one."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if not is_real(scale):
        refuse(op, "scale", scale, "a finite number, or None")
    return as_float(scale)


def limits_of(op: str, window: int | None, softcap: float | None) -> tuple[int | None, float | None]:
    """The window and the soft cap, as launchers take them."""
    if window is not None and not (is_whole(window) and window >= 1):
        refuse(op, "window", window, "a whole number, 1 or more, or None")
    if softcap is None:
        return window, None
    # Beyond, fp32 would hold neither the cap nor what is divided by it.
    if not (is_real(softcap) and 1e-30 <= softcap <= 1e30):
        refuse(op, "softcap", softcap, "a finite number above 0, of 1e-30 to 1e30, or None")
    return window, as_float(softcap)


def _check_cached(op, q, k, v, k_pages, v_pages, page_table, cache_lengths, counts=None) -> None:
    check(
        op,
        7,
        q=(q, "B L Hq P"),
        k=(k, "B L Hkv P"),
        v=(v, "B L Hkv P"),
        k_pages=(k_pages, "pages page_size Hkv P"),
        v_pages=(v_pages, "pages page_size Hkv P"),
        page_table=(page_table, "B row_pages", int),
        cache_lengths=(cache_lengths, "B", int),
        counts=(counts, "B", int),
    )
    check_heads(op, q, k, v=v, k_pages=k_pages, v_pages=v_pages)


@overload
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
) -> AttentionWithLSE: ...


@unasked(reference.context_attention)
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
    """Let the L tokens of each row attend to the row's cached tokens and to each other; the cache is only read.

    softmax(scale q [K_cache; k]^T) [V_cache; v], without any mask for a denoiser's block; `causal`, a sliding `window`
    and a `softcap` are for other models' layers. The cache is paged: all rows
    share a pool of pages, and token s of row b lies in page page_table[b, s // page_size] at slot s % page_size. Rows
    may have pages in common, as forks of one prompt do. For tokens that are to stay in the cache, `append_attention`.

    Args:
        q:                [B, L, Hq, P] float, any strides.
        k, v:             [B, L, Hkv, P] float: the block's own; query head h uses head h // (Hq / Hkv).
        k_pages, v_pages: [pages, page_size, Hkv, P] float, any strides; fastest with a page_size that 64 divides.
        page_table:       [B, pages of a row] int; entries past a row's cached tokens may be anything.
        cache_lengths:    [B] int, 0 or more: cached tokens. Slots past them may hold anything, NaN included.
        causal:           a token sees the tokens of its own block up to itself, instead of all of them.
        scale:            P^-1/2 if None; 0 and below are fine.
        window:           1 or more: a token sees the last `window` tokens up to itself, itself included, of its block
                          and the cache; None: all. It is a limit to the left only: without `causal` a token sees the
                          tokens of its block behind it too, however many they are.
        softcap:          scores become softcap tanh(scores / softcap), before masks; above 0. None: they stay.
        return_lse:       also give the logarithm of each token's sum of exponents, by which results over parts of a
                          context are joined: o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i).
    Returns:
        o: [B, L, Hq, P] dtype of q; with return_lse (o, lse), lse [B, L, Hq] in fp32 (fp64 for fp64), natural.

    Numerics: softmax and sums in fp32 (fp64 for fp64), of scores up to 2^30. Deterministic: a kernel's result for a row
    has bits that depend on that row, on L, the heads and P, and through the split size on the number of rows B; not on
    what the other rows hold, nor on the room in their pages. NaN and infinity in what a token sees reach it; in what it
    does not see they stay away, except for the values of later tokens of its own block where `causal` (a weight of 0
    times NaN), and with a `window` of tokens shortly before it. With a softcap an infinite score is
    that of the cap. On a GPU the reference, which adds its masks, holds to that only for slots past a row's cached
    tokens.
    Gradients: for q, k, v and the pages; where they are wanted the reference runs.
    Raises: ValueError for sizes, dtypes and devices that disagree, for Hkv that does not divide Hq, and in the
    reference on a CPU for a cache length below 0 or beyond the row's pages and for a page outside the pool. Elsewhere
    such a length is cut to 0 and to the pages; such a page is never read, and the result of its row has no meaning.
    ValueError also for a window below 1 and for a softcap outside of 1e-30 to 1e30.
    Cost: for S cached tokens a row 4 B L Hq (S + L) P flops and (2 B (S + L) Hkv + 2 B L Hq) P itemsize bytes. With a
    window S is window + 63 at most: kernels skip the tiles before it.
    Source: Vaswani et al. (2017), grouped queries of Ainslie et al. (2305.13245), pages of Kwon et al. (2309.06180),
    windows as in Mistral 7B (2310.06825), soft caps as in Gemma 2 (2408.00118).

    Example:
        >>> q, (k, v) = torch.randn(1, 16, 32, 128), torch.randn(2, 1, 16, 2, 128)
        >>> o = context_attention(q, k, v, *torch.randn(2, 4, 64, 2, 128), torch.tensor([[2, 0]]), torch.tensor([100]))
    """
    tensors, places = (q, k, v, k_pages, v_pages), (page_table, cache_lengths)
    _check_cached("context_attention", *tensors, *places)
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            refuse("context_attention", name, flag, "True or False")
    scale = scale_of("context_attention", q, scale)
    window, softcap = limits_of("context_attention", window, softcap)
    if not takes_kernel("context_attention", *tensors) or wants_gradients(*tensors):
        return reference.context_attention(
            *tensors, *places, causal=causal, scale=scale, window=window, softcap=softcap, return_lse=return_lse
        )
    out = AttentionWithLSE(*_context(*tensors, *places, causal, scale, window, softcap))
    return out if return_lse else out.o


@overload
def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None = ...,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None = ...,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> AttentionWithLSE: ...


@unasked(reference.append_attention)
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
    """Causal attention of L tokens to each row's cached tokens and themselves, while their keys and values enter the
    cache: `context_attention(..., causal=True)`, and then the first counts[b] tokens of row b are in its pages.

    Writes k_pages and v_pages in place, at positions cache_lengths[b], cache_lengths[b] + 1, ... `cache_lengths` itself
    is not written: the caller advances it once every layer has appended. Until then the cache holds what it held.

    Args:
        q:                [B, L, Hq, P] float, any strides.
        k, v:             [B, L, Hkv, P] float: of the tokens; query head h uses head h // (Hq / Hkv).
        k_pages, v_pages: [pages, page_size, Hkv, P] float, as in `context_attention`; written in place. Pages with a
                          strided last dimension are copied there and back.
        page_table:       [B, pages of a row] int; entries past the last position that is written may be anything. A
                          page that is written is in the table once; pages that are only read may be shared.
        cache_lengths:    [B] int, 0 or more: cached tokens.
        counts:           [B] int: tokens that enter, cut to 0 to L; None: all L. The others are not written.
        scale:            P^-1/2 if None; 0 and below are fine.
        return_lse:       also give the logarithm of each token's sum of exponents, by which results over parts of a
                          context are joined: o = sum_i exp(lse_i - lse) o_i with lse = log sum_i exp(lse_i).
    Returns:
        o: [B, L, Hq, P] dtype of q, of all L tokens; with return_lse as in `context_attention`.

    Numerics: as `context_attention`.
    Gradients: for q, k and v, by the reference; none flow through the cache.
    Raises: ValueError for sizes, dtypes and devices that disagree, for Hkv that does not divide Hq, and in the
    reference on a CPU for a cache length below 0, for rows that outgrow their pages, for a page outside the pool and
    for one that a row writes and the table has twice. Elsewhere lengths are cut to 0 and to the pages, and tokens
    without a page in the pool do not enter.
    Cost: for S cached tokens a row 4 B L Hq (S + L / 2) P flops and (2 B (S + 2 L) Hkv + 2 B L Hq) P itemsize bytes.
    Source: as `context_attention`.

    Example:
        >>> q, (k, v) = torch.randn(1, 16, 8, 64), torch.randn(2, 1, 16, 2, 64)
        >>> pages, cache_lengths = torch.zeros(2, 4, 64, 2, 64), torch.tensor([100])
        >>> o = append_attention(q, k, v, *pages, torch.tensor([[2, 0]]), cache_lengths)
    """
    tensors, places = (q, k, v, k_pages, v_pages), (page_table, cache_lengths, counts)
    _check_cached("append_attention", *tensors, *places)
    if not isinstance(return_lse, bool):
        refuse("append_attention", "return_lse", return_lse, "True or False")
    scale = scale_of("append_attention", q, scale)
    if not takes_kernel("append_attention", *tensors) or wants_gradients(q, k, v):
        return reference.append_attention(*tensors, *places, scale=scale, return_lse=return_lse)
    out = AttentionWithLSE(*_append(*tensors, *places, scale))
    return out if return_lse else out.o


_context = define(_context_attention, _context_attention_fake)

_append = define(_append_attention, _context_attention_fake, writes=("k_pages", "v_pages"))
