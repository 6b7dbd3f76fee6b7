"""The kernels of `context_attention`: split over the context, combined by log-sum-exp."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..core import define
from ..launch import Launch, architecture, run, tuned
from ..reference.common import compute_dtype
from .tile import attend, cached, page_of

# ---- kernels ----


@triton.jit(do_not_specialize=["fill", "pages"])
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
    counts_ptr,  # [B], or None: L; where APPEND
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
    pages,
    page_size,
    room,
    fill,  # splits of a row's context: as many as keep the GPU busy
    most,
    least,  # cached tokens of a split
    scale,  # times log2(e)
    P: tl.constexpr,
    R: tl.constexpr,  # query heads of a KV head
    APPEND: tl.constexpr,  # the block's keys and values enter the cache behind its tokens
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,  # tokens that begin in a row tile, or more
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Rows of a KV head: token after token, each with its R query heads. Programs of a KV head and split lie together,
    # so that what one row tile reads the next finds in L2.
    tile = tl.program_id(0)
    head = (tl.program_id(1) % Hkv).to(tl.int64)  # strides may carry it past 2^31, as a slot and b
    split = tl.program_id(1) // Hkv if SPLIT else 0
    b = tl.program_id(2).to(tl.int64)
    acc = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), room).to(tl.int32)  # never outside the row's pages
    start, end = 0, length
    if SPLIT:  # the row's own length: every split then has as much to do, however much room there is
        splits = tl.minimum(tl.maximum(fill, tl.cdiv(length, 16 * least)), most)
        size = tl.maximum(tl.cdiv(tl.cdiv(length, splits), 64) * 64, least)
        start = split * size
        end = tl.minimum(length, start + size)
    table_ptr = page_table_ptr + b * stride_table
    offs_p = tl.arange(0, BLOCK_P)
    if APPEND:  # noqa: SIM102 (known to the compiler, the split is not)
        if split == 0:
            # The tokens whose first query row is in this tile, so that each is written once. They lie from `length` on,
            # where cached tiles are masked: no program uses what another writes here.
            at = (tile * BLOCK_M + R - 1) // R + tl.arange(0, BLOCK_T)
            count = L
            if counts_ptr is not None:
                count = tl.minimum(tl.load(counts_ptr + b), L)
            to = length + at
            mask = (at < (tile * BLOCK_M + BLOCK_M + R - 1) // R) & (at < count) & (to < room)
            page = tl.load(table_ptr + to // page_size, mask=mask, other=0).to(tl.int64)
            slot = (to % page_size).to(tl.int64)
            mask = mask & (page >= 0) & (page < pages)
            mask = mask[:, None] & (offs_p < P)[None, :]
            from_k = b * stride_kb + at.to(tl.int64) * stride_kl + head * stride_kh
            from_v = b * stride_vb + at.to(tl.int64) * stride_vl + head * stride_vh
            k = tl.load(k_ptr + from_k[:, None] + offs_p[None, :], mask=mask)  # [BLOCK_T, BLOCK_P]
            v = tl.load(v_ptr + from_v[:, None] + offs_p[None, :], mask=mask)
            to_k = page * stride_kpage + slot * stride_kslot + head * stride_khead
            to_v = page * stride_vpage + slot * stride_vslot + head * stride_vhead
            tl.store(k_pages_ptr + to_k[:, None] + offs_p[None, :], k, mask=mask)
            tl.store(v_pages_ptr + to_v[:, None] + offs_p[None, :], v, mask=mask)

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // R
    query_head = head * R + rows % R
    offs_n = tl.arange(0, BLOCK_N)
    mask_q = (token < L)[:, None] & (offs_p < P)[None, :]
    at = b * stride_qb + token.to(tl.int64) * stride_ql + query_head * stride_qh
    q = tl.load(q_ptr + at[:, None] + offs_p[None, :], mask=mask_q, other=0.0)  # [BLOCK_M, BLOCK_P]
    m = tl.full((BLOCK_M,), -float("inf"), dtype=acc)
    l = tl.zeros((BLOCK_M,), dtype=acc)
    o = tl.zeros((BLOCK_M, BLOCK_P), dtype=acc)

    full = start + tl.maximum(end - start, 0) // BLOCK_N * BLOCK_N
    # The page of a tile is looked up an iteration ahead: a look-up in the same one would take a stage of the pipeline,
    # and leave the tile's own load none to run ahead in.
    page = page_of(table_ptr, start, end, page_size, TMA)
    for n in tl.range(start, full, BLOCK_N):  # all of these are seen: no mask
        k, v = cached(
            *(k_desc, v_desc, k_pages_ptr, v_pages_ptr, table_ptr, page, n, end, head),
            *(stride_kpage, stride_kslot, stride_khead, stride_vpage, stride_vslot, stride_vhead),
            *(pages, page_size, P, BLOCK_N, BLOCK_P, TMA, False),
        )
        page = page_of(table_ptr, n + BLOCK_N, end, page_size, TMA)
        m, l, o = attend(q, k, v, m, l, o, True, scale, MASKED=False)
    if full < end:
        k, v = cached(
            *(k_desc, v_desc, k_pages_ptr, v_pages_ptr, table_ptr, page, full, end, head),
            *(stride_kpage, stride_kslot, stride_khead, stride_vpage, stride_vslot, stride_vhead),
            *(pages, page_size, P, BLOCK_N, BLOCK_P, TMA, True),
        )
        m, l, o = attend(q, k, v, m, l, o, (full + offs_n < end)[None, :], scale, MASKED=True)

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
            m, l, o = attend(q, k, v, m, l, o, seen, scale, MASKED=True)

    out = ((split * B + b) * L + token) * (Hkv * R) + query_head
    if SPLIT:
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
    offs_s = tl.arange(0, BLOCK_S).to(tl.int64)
    offs_p = tl.arange(0, BLOCK_P)
    m = tl.load(m_ptr + offs_s * rows + row, mask=offs_s < splits, other=-float("inf"))  # [BLOCK_S]
    l = tl.load(l_ptr + offs_s * rows + row, mask=offs_s < splits, other=0.0)
    weight = tl.exp2(m - tl.max(m, axis=0))  # split 0 has seen the token itself: the maximum is finite
    # A split past the row's length has written nothing but m = -inf.
    mask = (m > -float("inf"))[:, None] & (offs_p < P)[None, :]
    at = (offs_s[:, None] * rows + row) * P + offs_p[None, :]
    o = tl.load(partial_ptr + at, mask=mask, other=0.0)  # [BLOCK_S, BLOCK_P]
    o = tl.sum(o * weight[:, None], axis=0) / tl.sum(l * weight, axis=0)
    tl.store(o_ptr + row * P + offs_p, o.to(o_ptr.dtype.element_ty), mask=offs_p < P)


# ---- launches ----


def context_splits(batch: int, rows: int, heads: int) -> tuple[int, int, int]:
    """(fill, most, least): into how many splits a row's context goes to keep the GPU busy, how many at most, and how
    many cached tokens one has at least.

    A row of S tokens goes into n = max(fill, S / (16 least)), up to `most`, splits of max(least, S / n, rounded up to
    64) tokens, on the device: what other rows hold and the room in the cache do not change its bits. The published
    block (2 KV heads of 256 rows, 128 to a program) alone has 32 splits of 2 * 2 programs from 8K tokens on: 128 of
    equal work for the 132 multiprocessors of an H200, one wave without a tail. One token (16 rows a head) has 64.

    What a split leaves behind (fp32, written and read) is 2 rows / tokens of the bytes of its K and V (16 bits): twice
    as many at `least`, an eighth at 16 least. One row can afford that: 8.5 MB at P = 128, which stay in L2. With 32
    splits for each of 64 rows of 8K it would be 1.6 GB instead of 537 MB, 375 us for 125. So B rows share the splits
    that fill the GPU, and the 8.5 MB. Beyond that a row is split where it costs an eighth (2 splits each of those 64),
    for a long one not to be waited for. From 16 least * most tokens on (128K) the batch does not matter at all.

    From L = 257 on at the published heads, as in a prompt's stretches of 2048, there is one split and no workspace.
    """
    programs = triton.cdiv(rows, 128) * heads
    most = min(64, max(1, 128 // programs))
    return min(most, max(1, 128 // (programs * max(batch, 1)))), most, triton.cdiv(rows, 64) * 64


def splits_of(length: int, fill: int, most: int, least: int) -> int:
    """Splits of which a row of so many tokens, or fewer, leaves none out."""
    return max(1, min(most, max(fill, triton.cdiv(length, 16 * least)), triton.cdiv(length, least)))


def context_attention_launch(batch: int, rows: int, room: int, P: int, itemsize: int, architecture: int) -> Launch:
    """Above 8K tokens in all, and where rows are many, products bound it (256 rows a KV head do 256 flops a byte): 128
    rows share a tile of keys, and the second half finds it in L2. Below, latency does: 64 rows, what wgmma takes, on
    more programs. On Hopper three tiles of 64 keys and values are in shared memory, of which two are on their way
    (TMA) while one is used. Without wgmma operands live in registers, which half a tile of keys leaves free."""
    block_p = max(16, triton.next_power_of_2(P))
    block_m = min(max(16, triton.next_power_of_2(rows)), 64 if batch * room <= 8192 and rows <= 8192 else 128)
    if itemsize > 2 or block_p > 128:  # in fp32 operands are registers: 64 rows of 128 would spill 9 KB a thread
        block_m = min(block_m, 64 if itemsize == 2 else max(16, 1024 // block_p))
        return Launch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=32, num_warps=4, num_stages=2)
    warps = 8 if block_m >= 64 else 4
    if architecture != 90:
        block_m, block_n = 128 if block_m >= 64 else block_m, 64 if architecture > 90 else 32
        return Launch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=2)
    return Launch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=64, num_warps=warps, num_stages=3)


def _tiles(pages: Tensor, launch: Launch) -> TensorDescriptor | None:
    """Pages as a matrix for TMA, where there is one, a tile of tokens lies in one page and rows are whole 16-byte
    pieces."""
    n, page_size, H, P = pages.shape
    # Splits begin at multiples of 64: larger tiles would cross pages.
    fits = page_size % launch.BLOCK_N == 0 and launch.BLOCK_N <= 64 and P == launch.BLOCK_P
    aligned = pages.is_meta or pages.data_ptr() % 16 == 0
    # Coordinates of TMA are 32 bits.
    plain = pages.is_contiguous() and 0 < n * page_size < 2**31 and pages.element_size() == 2
    if not (architecture(pages) >= 90 and fits and aligned and plain):
        return None
    return TensorDescriptor.from_tensor(pages.view(n * page_size, H * P), [launch.BLOCK_N, P])


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    counts: Tensor | None,
    append: bool,
    causal: bool,
    scale: float,
) -> Tensor:
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    page_table, lengths = page_table.contiguous(), lengths.contiguous()
    B, L, Hq, P = q.shape
    Hkv, page_size = k.shape[2], k_pages.shape[1]
    R, room = Hq // Hkv, page_table.shape[1] * page_size if len(k_pages) else 0
    o = q.new_empty(q.shape)
    launch = tuned(
        "_context_attention_kernel",
        context_attention_launch(B, L * R, room, P, q.element_size(), architecture(q)),
        architecture(q),
        batch=triton.next_power_of_2(B),
        rows=L * R,
        room=triton.next_power_of_2(room),
        P=P,
        itemsize=q.element_size(),
    )
    fill, most, least = context_splits(B, max(L, 1) * R, Hkv)
    splits = splits_of(room, fill, most, least)
    k_desc, v_desc = _tiles(k_pages, launch), _tiles(v_pages, launch)
    tma = k_desc is not None and v_desc is not None
    m = l = partial = None
    if splits > 1:
        m, l = torch.empty(2, splits, B, L, Hq, dtype=compute_dtype(q.dtype), device=q.device)
        partial = torch.empty(splits, B, L, Hq, P, dtype=m.dtype, device=q.device)
    run(
        _context_attention_kernel,
        (triton.cdiv(L * R, launch.BLOCK_M), Hkv * splits, B),
        *(q, k, v, k_pages, v_pages, k_desc if tma else None, v_desc if tma else None, page_table, lengths),
        *(None if counts is None else counts.contiguous(), o, partial, m, l),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        *(*k_pages.stride()[:3], *v_pages.stride()[:3], page_table.stride(0)),
        *(B, L, Hkv, len(k_pages), page_size, room, fill, most, least, scale * 1.4426950408889634),
        P=P,
        R=R,
        APPEND=append,
        CAUSAL=causal and L > 1,
        TMA=tma,
        SPLIT=splits > 1,
        BLOCK_T=triton.next_power_of_2(triton.cdiv(launch.BLOCK_M, R)) if append else 1,
        launch=launch,
    )
    if splits > 1:
        run(
            _combine_splits_kernel,
            (B * L * Hq,),
            *(partial, m, l, o, B * L * Hq, splits),
            P=P,
            # `most`, not `splits`: in what order they are added must not depend on the room.
            launch=Launch(BLOCK_S=triton.next_power_of_2(most), BLOCK_P=launch.BLOCK_P, num_warps=4, num_stages=1),
        )
    return o


def _context_attention(q, k, v, k_pages, v_pages, page_table, lengths, causal, scale):
    pages = (t if t.stride(-1) == 1 else t.contiguous() for t in (k_pages, v_pages))
    return _attention(q, k, v, *pages, page_table, lengths, None, False, causal, scale)


def _append_attention(q, k, v, k_pages, v_pages, page_table, lengths, counts, scale):
    pages = [t if t.stride(-1) == 1 else t.contiguous() for t in (k_pages, v_pages)]
    o = _attention(q, k, v, *pages, page_table, lengths, counts, True, True, scale)
    for mine, theirs in zip(pages, (k_pages, v_pages), strict=True):
        if mine is not theirs:
            theirs.copy_(mine)
    return o


# ---- op ----

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
