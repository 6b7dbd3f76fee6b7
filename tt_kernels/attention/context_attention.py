"""Attention of a block to a paged cache and to itself, and the same with the block entering the cache."""

import torch
from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_real, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .context_attention_launch import _append_attention, _context_attention


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
    """What products are multiplied with: P^-1/2 unless the caller says."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if not is_real(scale):
        refuse(op, "scale", scale, "a finite number, or None")
    return scale if isinstance(scale, torch.SymFloat) else float(scale)


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
    """Let the L tokens of each row attend to the row's cached tokens and to each other; the cache is only read.

    softmax(scale q [K_cache; k]^T) [V_cache; v], without any mask for a denoiser's block. Token s of row b lies in page
    page_table[b, s // page_size] at offset s % page_size.

    Args:
        q:                [B, L, Hq, P] float, any strides.
        k, v:             [B, L, Hkv, P] float: the block's own; query head h uses head h // (Hq / Hkv).
        k_pages, v_pages: [pages, page_size, Hkv, P] float, any strides; fastest with a page_size that 64 divides.
        page_table:       [B, pages of a row] int; entries past a row's length may be anything.
        lengths:          [B] int, 0 or more: cached tokens. What lies past them may be anything, NaN included.
        causal:           a token sees the tokens of its own block up to itself, instead of all of them.
        scale:            P^-1/2 if None; 0 and below are fine.
    Returns:
        o: [B, L, Hq, P] dtype of q.

    Softmax and sums in fp32 (fp64 for fp64). Gradients for q, k, v and the pages. Deterministic: a kernel's result for
    a row has bits that depend on that row, on L, the heads and P, and through the split size on the number of rows B;
    not on what the other rows hold, nor on the room in their pages. NaN and infinity in what a token sees reach it; in
    what it does not see they stay away, but for the values of later tokens of its own block where `causal` (a weight of
    0 times NaN). On a GPU the reference, which adds its masks, holds to that only for what lies past a row's length.
    Raises ValueError for sizes, dtypes and devices that disagree, Hkv that does not divide Hq, and in the reference on
    a CPU for a length below 0 or beyond the row's pages, which are cut to 0 and to them elsewhere, and for a page
    outside the pool in a row's length: nothing is read outside the pool in any case, but that row means nothing. Cost
    for S cached tokens a row: 4 B L Hq (S + L) P flops, (2 B (S + L) Hkv + 2 B L Hq) P itemsize bytes. Where gradients
    are wanted the reference runs.
    Source: Vaswani et al. (2017), grouped queries of Ainslie et al. (2305.13245), pages of Kwon et al. (2309.06180).
    """
    check(
        "context_attention",
        7,
        q=(q, "B L Hq P"),
        k=(k, "B L Hkv P"),
        v=(v, "B L Hkv P"),
        k_pages=(k_pages, "pages page_size Hkv P"),
        v_pages=(v_pages, "pages page_size Hkv P"),
        page_table=(page_table, "B row_pages", int),
        lengths=(lengths, "B", int),
    )
    check_heads("context_attention", q, k, v=v, k_pages=k_pages, v_pages=v_pages)
    if not isinstance(causal, bool):
        refuse("context_attention", "causal", causal, "True or False")
    scale = scale_of("context_attention", q, scale)
    tensors = (q, k, v, k_pages, v_pages)
    if not takes_kernel("context_attention", *tensors) or wants_gradients(*tensors):
        return reference.context_attention(q, k, v, k_pages, v_pages, page_table, lengths, causal=causal, scale=scale)
    return context_attention_forward(*tensors, page_table, lengths, causal, scale)


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
    """Causal attention of L tokens to each row's cached tokens and themselves, while their keys and values enter the
    cache: `context_attention(..., causal=True)`, and then the first counts[b] tokens of row b are in its pages.

    They take positions lengths[b], lengths[b] + 1, ...; `lengths` stays: it is the caller's to advance, once every
    layer has appended. Until then the cache holds what it held for whoever reads it.

    Args:
        q:                [B, L, Hq, P] float, any strides.
        k, v:             [B, L, Hkv, P] float: of the tokens; query head h uses head h // (Hq / Hkv).
        k_pages, v_pages: [pages, page_size, Hkv, P] float, as in `context_attention`; written. A page that is written
                          is in the table once. Pages with a strided last dimension are copied there and back.
        page_table:       [B, pages of a row] int; entries past the last position that is written may be anything.
        lengths:          [B] int, 0 or more: cached tokens.
        counts:           [B] int: tokens that enter, cut to 0 to L; None: all L. The others are not written.
        scale:            P^-1/2 if None; 0 and below are fine.
    Returns:
        o: [B, L, Hq, P] dtype of q, of all L tokens.

    Softmax and sums in fp32 (fp64 for fp64). Gradients for q, k and v; none flow through the cache, and where they are
    wanted the reference runs. Deterministic, and NaN, as in `context_attention`. Raises ValueError for sizes, dtypes
    and devices that disagree, Hkv that does not divide Hq, and in the reference on a CPU for a length below 0, for rows
    that outgrow their pages, for a page outside the pool and for one that a row writes and the table has twice.
    Elsewhere lengths are cut to 0 and to the pages, and tokens that no page of the pool is for do not enter. Cost for S
    cached tokens a row: 4 B L Hq (S + L / 2) P flops, (2 B (S + 2 L) Hkv + 2 B L Hq) P itemsize bytes. Source: as
    `context_attention`.
    """
    check(
        "append_attention",
        7,
        q=(q, "B L Hq P"),
        k=(k, "B L Hkv P"),
        v=(v, "B L Hkv P"),
        k_pages=(k_pages, "pages page_size Hkv P"),
        v_pages=(v_pages, "pages page_size Hkv P"),
        page_table=(page_table, "B row_pages", int),
        lengths=(lengths, "B", int),
        counts=(counts, "B", int),
    )
    check_heads("append_attention", q, k, v=v, k_pages=k_pages, v_pages=v_pages)
    scale = scale_of("append_attention", q, scale)
    if not takes_kernel("append_attention", q, k, v, k_pages, v_pages) or wants_gradients(q, k, v):
        return reference.append_attention(q, k, v, k_pages, v_pages, page_table, lengths, counts, scale=scale)
    return append_attention_forward(q, k, v, k_pages, v_pages, page_table, lengths, counts, scale)


context_attention_forward = define(
    "context_attention(Tensor q, Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor page_table, "
    "Tensor lengths, bool causal, float scale) -> Tensor",
    _context_attention,
    lambda q, *_: q.new_empty(q.shape),
)

append_attention_forward = define(
    "append_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor page_table, "
    "Tensor lengths, Tensor? counts, float scale) -> Tensor",
    _append_attention,
    lambda q, *_: q.new_empty(q.shape),
)
