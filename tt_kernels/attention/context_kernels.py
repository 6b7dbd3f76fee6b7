"""The kernels of `context_attention`: split over the context, combined by log-sum-exp."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core import define
from ..launch import Launch, architecture, run, tuned
from ..reference.common import compute_dtype
from .tile import attend

# ---- kernels ----


@triton.jit
def _cached(
    desc,
    pages_ptr,
    table_ptr,
    n,
    end,
    head,
    stride_page,
    stride_slot,
    stride_head,
    page_size,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys or values of cached tokens n and on: [BLOCK_N, BLOCK_P]; MASKED: zeros from `end` on, whatever is there."""
    tokens = n + tl.arange(0, BLOCK_N)
    if TMA:  # a tile lies in one page
        page = tl.load(table_ptr + n // page_size).to(tl.int32)
        t = desc.load([page * page_size + n % page_size, head * P])
        if MASKED:
            t = tl.where((tokens < end)[:, None], t, tl.zeros_like(t))
    else:
        offs_p = tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[None, :]
        if MASKED:
            mask = mask & (tokens < end)[:, None]
            page = tl.load(table_ptr + tokens // page_size, mask=tokens < end, other=0).to(tl.int64)
        else:
            page = tl.load(table_ptr + tokens // page_size).to(tl.int64)
        at = page * stride_page + tokens % page_size * stride_slot + head * stride_head
        t = tl.load(pages_ptr + at[:, None] + offs_p[None, :], mask=mask, other=0.0)
    return t


@triton.jit
def _context_attention_kernel(
    q_ptr,  # [B, L, Hq, P]
    k_ptr,  # [B, L, Hkv, P]: the block's own, as v
    v_ptr,
    k_pages_ptr,  # [pages, page_size, Hkv, P], as v_pages
    v_pages_ptr,
    k_desc,  # the same pages as [pages * page_size, Hkv * P], in tiles [BLOCK_N, P], where TMA
    v_desc,
    page_table_ptr,  # [B, pages of a row]
    lengths_ptr,  # [B]
    o_ptr,  # [B, L, Hq, P], contiguous
    partial_ptr,  # [splits, B, L, Hq, P] where splits > 1
    m_ptr,  # [splits, B, L, Hq], as l: maximum and sum of a split, log2
    l_ptr,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_kpage,
    stride_kslot,
    stride_khead,
    stride_vpage,
    stride_vslot,
    stride_vhead,
    stride_table,
    B,
    L,
    Hkv,
    page_size,
    room,
    splits,
    split_size,
    scale,  # times log2(e)
    P: tl.constexpr,
    R: tl.constexpr,  # query heads of a KV head
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Rows of a KV head: token after token, each with its R query heads. Programs of a KV head and split lie together,
    # so that what one row tile reads the next finds in L2.
    tile = tl.program_id(0)
    head = tl.program_id(1) % Hkv
    split = tl.program_id(1) // Hkv
    b = tl.program_id(2).to(tl.int64)
    acc = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    PRECISION: tl.constexpr = "ieee"  # of fp32 products; 16-bit ones do not see it
    length = tl.minimum(tl.load(lengths_ptr + b), room)  # never past the row's pages
    start = split * split_size
    end = tl.minimum(length, start + split_size) if SPLIT else length

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // R
    query_head = head * R + rows % R
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)
    mask_q = (token < L)[:, None] & (offs_p < P)[None, :]
    at = b * stride_qb + token.to(tl.int64) * stride_ql + query_head * stride_qh
    q = tl.load(q_ptr + at[:, None] + offs_p[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_P]
    m = tl.full((BLOCK_M,), -float("inf"), dtype=acc)
    l = tl.zeros((BLOCK_M,), dtype=acc)
    o = tl.zeros((BLOCK_M, BLOCK_P), dtype=acc)

    full = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    table_ptr = page_table_ptr + b * stride_table
    for n in tl.range(start, full, BLOCK_N):  # all of these are seen: no mask
        k = _cached(
            k_desc,
            k_pages_ptr,
            table_ptr,
            n,
            end,
            head,
            stride_kpage,
            stride_kslot,
            stride_khead,
            page_size,
            P,
            BLOCK_N,
            BLOCK_P,
            TMA,
            False,
        )
        v = _cached(
            v_desc,
            v_pages_ptr,
            table_ptr,
            n,
            end,
            head,
            stride_vpage,
            stride_vslot,
            stride_vhead,
            page_size,
            P,
            BLOCK_N,
            BLOCK_P,
            TMA,
            False,
        )
        m, l, o = attend(q, k, v, m, l, o, True, scale, MASKED=False, PRECISION=PRECISION)
    if full < end:
        k = _cached(
            k_desc,
            k_pages_ptr,
            table_ptr,
            full,
            end,
            head,
            stride_kpage,
            stride_kslot,
            stride_khead,
            page_size,
            P,
            BLOCK_N,
            BLOCK_P,
            TMA,
            True,
        )
        v = _cached(
            v_desc,
            v_pages_ptr,
            table_ptr,
            full,
            end,
            head,
            stride_vpage,
            stride_vslot,
            stride_vhead,
            page_size,
            P,
            BLOCK_N,
            BLOCK_P,
            TMA,
            True,
        )
        m, l, o = attend(q, k, v, m, l, o, (full + offs_n < end)[None, :], scale, MASKED=True, PRECISION=PRECISION)

    if split == 0:  # its own block, straight from the projection
        last = L
        if CAUSAL:
            last = tl.minimum(L, (tile * BLOCK_M + BLOCK_M - 1) // R + 1)
        for n in tl.range(0, last, BLOCK_N):
            own = n + offs_n
            mask_n = (own < L)[:, None] & (offs_p < P)[None, :]
            at_k = b * stride_kb + own.to(tl.int64) * stride_kl + head * stride_kh
            at_v = b * stride_vb + own.to(tl.int64) * stride_vl + head * stride_vh
            k = tl.load(k_ptr + at_k[:, None] + offs_p[None, :], mask=mask_n, other=0.0)
            v = tl.load(v_ptr + at_v[:, None] + offs_p[None, :], mask=mask_n, other=0.0)
            seen = (own < L)[None, :]
            if CAUSAL:
                seen = seen & (own[None, :] <= token[:, None])
            m, l, o = attend(q, k, v, m, l, o, seen, scale, MASKED=True, PRECISION=PRECISION)

    out = (b * L + token) * (Hkv * R) + query_head
    if SPLIT:
        out += split * B * L * (Hkv * R)
        tl.store(m_ptr + out, m, mask=token < L)
        tl.store(l_ptr + out, l, mask=token < L)
        if (split == 0) | (start < end):
            tl.store(partial_ptr + out[:, None] * P + offs_p[None, :], o, mask=mask_q)
    else:
        o = o / l[:, None]
        tl.store(o_ptr + out[:, None] * P + offs_p[None, :], o.to(o_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _combine_splits_kernel(
    partial_ptr,  # [splits, rows, P]
    m_ptr,  # [splits, rows], as l
    l_ptr,
    o_ptr,  # [rows, P]
    rows,
    splits,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_s = tl.arange(0, BLOCK_S)
    offs_p = tl.arange(0, BLOCK_P)
    m = tl.load(m_ptr + offs_s * rows + row, mask=offs_s < splits, other=-float("inf"))  # [BLOCK_S]
    l = tl.load(l_ptr + offs_s * rows + row, mask=offs_s < splits, other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))  # split 0 has seen the token itself: the maximum is finite
    # A split past the row's length has written nothing but m = -inf.
    mask = (m > -float("inf"))[:, None] & (offs_p < P)[None, :]
    at = (offs_s.to(tl.int64)[:, None] * rows + row) * P + offs_p[None, :]
    o = tl.load(partial_ptr + at, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_P]
    o = tl.sum(o * weight[:, None], axis=0) / tl.sum(l * weight, axis=0)
    tl.store(o_ptr + row * P + offs_p, o.to(o_ptr.dtype.element_ty), mask=offs_p < P)


# ---- launches ----


def split_size(room: int) -> int:
    """Cached tokens of a split. A function of the room in the cache alone: a row's bits do not depend on its batch.

    The published model (2 KV heads, 256 rows each) then has 128 programs for an H200's 132 multiprocessors at 8K and
    32K tokens and 256 at 128K; partial results of a split stay below a quarter of what it reads.
    """
    return 512 if room <= 8192 else 1024 if room <= 32768 else 2048


def context_attention_launch(rows: int, room: int, P: int, itemsize: int, architecture: int) -> Launch:
    """Above 8K tokens products bound it (256 rows a KV head do 256 flops a byte): 128 rows share a tile of keys, and
    the second half finds it in L2. Below, latency does: 64 rows, what wgmma takes, spread over more programs. Without
    wgmma operands live in registers, which half a tile of keys leaves free."""
    block_p = max(16, triton.next_power_of_2(P))
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if room <= 8192 else 128)
    if itemsize > 2 or block_p > 128:  # fp32 tiles are twice as large
        return Launch(BLOCK_P=block_p, BLOCK_M=min(block_m, 64), BLOCK_N=32, num_warps=4, num_stages=2)
    warps = 8 if block_m >= 64 else 4
    if architecture != 90:
        block_m, block_n = 128 if block_m >= 64 else block_m, 64 if architecture > 90 else 32
        return Launch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=2)
    return Launch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=64, num_warps=warps, num_stages=3)


def _tiles(pages: Tensor, launch: Launch) -> TensorDescriptor | None:
    """Pages as a matrix for TMA, where there is one, a tile of tokens lies in one page and rows are whole 16-byte
    pieces."""
    n, page_size, H, P = pages.shape
    if architecture(pages) < 90:
        return None
    fits = page_size % launch.BLOCK_N == 0 and P == launch.BLOCK_P
    if not (fits and pages.is_contiguous() and pages.numel() and pages.element_size() == 2):
        return None
    return TensorDescriptor.from_tensor(pages.view(n * page_size, H * P), [launch.BLOCK_N, P])


def _context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    causal: bool,
    scale: float,
) -> Tensor:
    q, k, v, k_pages, v_pages = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, k_pages, v_pages))
    page_table, lengths = page_table.contiguous(), lengths.contiguous()
    B, L, Hq, P = q.shape
    Hkv, page_size = k.shape[2], k_pages.shape[1]
    R, room = Hq // Hkv, page_table.shape[1] * page_size
    o = q.new_empty(q.shape)
    launch = tuned(
        "_context_attention_kernel",
        context_attention_launch(L * R, room, P, q.element_size(), architecture(q)),
        architecture(q),
        rows=L * R,
        room=triton.next_power_of_2(room),
    )
    size = split_size(room)
    tiles = triton.cdiv(L * R, launch.BLOCK_M)
    splits = max(1, triton.cdiv(room, size)) if L <= 64 else 1  # long blocks have row tiles enough
    k_desc, v_desc = _tiles(k_pages, launch), _tiles(v_pages, launch)
    tma = k_desc is not None and v_desc is not None
    m = l = partial = None
    if splits > 1:
        m, l = torch.empty(2, splits, B, L, Hq, dtype=compute_dtype(q.dtype), device=q.device)
        partial = torch.empty(splits, B, L, Hq, P, dtype=m.dtype, device=q.device)
    run(
        _context_attention_kernel,
        (tiles, Hkv * splits, B),
        *(q, k, v, k_pages, v_pages, k_desc if tma else None, v_desc if tma else None, page_table, lengths),
        *(o, partial, m, l, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0)),
        *(B, L, Hkv, page_size, room, splits, size, scale * 1.4426950408889634),
        P=P,
        R=R,
        CAUSAL=causal,
        TMA=tma,
        SPLIT=splits > 1,
        launch=launch,
    )
    if splits > 1:
        run(
            _combine_splits_kernel,
            (B * L * Hq,),
            *(partial, m, l, o, B * L * Hq, splits),
            P=P,
            launch=Launch(BLOCK_S=triton.next_power_of_2(splits), BLOCK_P=launch.BLOCK_P, num_warps=4, num_stages=1),
        )
    return o


# ---- op ----

context_attention_forward = define(
    "context_attention(Tensor q, Tensor k, Tensor v, Tensor k_pages, Tensor v_pages, Tensor page_table, "
    "Tensor lengths, bool causal, float scale) -> Tensor",
    _context_attention,
    lambda q, *_: q.new_empty(q.shape),
)
