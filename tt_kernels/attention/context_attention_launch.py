"""The kernels of `context_attention`: split over the context, combined by log-sum-exp."""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from .context_attention_kernels import _combine_splits_kernel, _context_attention_kernel


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
