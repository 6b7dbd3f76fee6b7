"""The launches of `context_attention` and `append_attention`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from .context_attention_kernels import _combine_splits_kernel, _context_attention_kernel
from .lang import Pages, heads, in_tiles, log2_scale, side_by_side


class Splits(NamedTuple):
    """How a row's context is split."""

    fill: int  # splits that keep the GPU busy
    max_splits: int
    min_tokens: int  # cached tokens of a split, at least

    def of(self, length: int) -> int:
        """Splits that a row of so many tokens, or fewer, takes at most."""
        wanted = max(self.fill, triton.cdiv(length, 16 * self.min_tokens))
        return max(1, min(self.max_splits, wanted, triton.cdiv(length, self.min_tokens)))


def context_splits(batch: int, rows: int, heads: int) -> Splits:
    """A row of S tokens goes into n = max(fill, S / (16 min_tokens)) splits, at most max_splits, of
    max(min_tokens, S / n, rounded up to 64) tokens. The kernel computes n on the device: neither what other rows hold
    nor the room in the cache changes a row's bits. With a window S is what the block's first token sees, from a
    multiple of 64 on.

    max_splits makes 128 programs of equal work for the 132 multiprocessors of an H200, one wave without a tail: 32 for
    the published block alone (2 KV heads of 256 rows, 128 to a program) from 8K tokens on, 64 for one token (16 rows a
    head), and from L = 257 on, as in a prompt's stretches of 2048, one, without a workspace.

    A split writes fp32 results and reads them back, 2 rows / tokens of the bytes of its K and V in 16 bits: twice as
    many at min_tokens, an eighth at 16 min_tokens. One row may take that, 8.5 MB at P = 128, which stay in L2; 32
    splits of each of 64 rows of 8K would be 1.6 GB beside 537 MB of K and V. So B rows share the splits that fill the
    GPU, and their 8.5 MB, and a row is split further where that costs an eighth (2 splits each of those 64), so that a
    long row does not run alone. From 16 min_tokens * max_splits tokens on (128K) the batch does not matter.
    """
    programs = triton.cdiv(rows, 128) * heads
    max_splits = min(64, max(1, 128 // programs))
    fill = min(max_splits, max(1, 128 // (programs * max(batch, 1))))
    return Splits(fill, max_splits, triton.cdiv(rows, 64) * 64)


@dataclass(frozen=True, kw_only=True)
class ContextAttentionLaunch(Launch):
    BLOCK_P: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 4
    num_stages: int = 2


def context_attention_launch(
    batch: int, rows: int, room: int, P: int, itemsize: int, architecture: int
) -> ContextAttentionLaunch:
    """Query rows of a program:

    | where                             | rows     | warps | reason                                                  |
    |-----------------------------------|----------|-------|---------------------------------------------------------|
    | up to 64 rows a KV head, or 8K of | 64       | 4     | bound by latency or memory: what wgmma takes, and two   |
    | them against 8K tokens in all     |          |       | programs a multiprocessor: one multiplies, one weighs   |
    | above                             | 128      | 8     | bound by products (256 rows a KV head do 256 flops a    |
    |                                   |          |       | byte): with 64 rows keys come from L2 twice as often,   |
    |                                   |          |       | 6 TB/s at 400 TFLOP/s, all that it gives                |
    | sm_100, P > 128                   | 64       | 8     | both of the above spill                                 |
    | sm_80, up to 32 rows              | 16, 32   | 4     | no wgmma                                                |
    | sm_80, above                      | 128      | 8     | with 64 four warps spill                                |
    | sm_80, P > 128; P > 256           | 16       | 4     | more spill, by hundreds of bytes                        |
    | fp32, fp64                        | 16 to 64 | 4     | operands are registers: 64 rows of 128 would spill 9 KB |
    |                                   |          |       | a thread                                                |

    Keys of a tile: 64, three tiles in shared memory, two of which are on their way while one is used. They are 32 on
    sm_80, where operands live in registers, and for P > 128.
    """
    block_p, block_m = max(16, triton.next_power_of_2(P)), max(16, triton.next_power_of_2(rows))
    few = rows <= 64 or (batch * room <= 8192 and rows <= 8192)
    block_n, warps, stages = 32, 4, 3
    if itemsize > 2:
        block_m, stages = min(block_m, 64, max(16, 1024 // block_p)), 2
    elif block_p > 256:
        block_m, stages = 16, 2
    elif architecture < 90:
        block_m = 16 if block_p > 128 else 128 if block_m >= 64 else block_m
    elif block_p > 128 and architecture >= 100:
        block_m, warps = 64, 8
    else:
        block_m, block_n = 64 if few else 128, 64 if block_p <= 128 else 32
    if block_m == 128:
        warps = 8
    return ContextAttentionLaunch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)


def _context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    append: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    page_table = page_table.contiguous()
    k_pages, v_pages = side_by_side(k_pages), side_by_side(v_pages)
    B, L, Hq, P = q.shape
    Hkv, page_size = k.shape[2], k_pages.shape[1]
    R, room = Hq // Hkv, page_table.shape[1] * page_size if len(k_pages) else 0
    if window is not None and window >= room + L:  # it reaches every token
        window = None
    reach = room if window is None else min(room, window + 63)  # cached tokens that a row can see, whole tiles of 64
    out = _context_attention_fake(q)
    itemsize, arch = q.element_size(), architecture(q)
    batch, near = triton.next_power_of_2(B), triton.next_power_of_2(reach)
    default = context_attention_launch(B, L * R, reach, P, itemsize, arch)
    launch = tuned(
        "_context_attention_kernel", default, arch, batch=batch, rows=L * R, room=near, P=P, itemsize=itemsize
    )
    limits = context_splits(B, max(L, 1) * R, Hkv)
    splits = limits.of(reach)
    in_page = page_size % launch.BLOCK_N == 0 and launch.BLOCK_N <= 64  # splits begin at multiples of 64
    cached = in_tiles(k_pages, v_pages, launch.BLOCK_N, launch.BLOCK_P, arch) if in_page else (None, None)
    own_whole = L > launch.BLOCK_N and P <= 128 and window is None  # others lack the registers
    own = in_tiles(k, v, launch.BLOCK_N, launch.BLOCK_P, arch) if own_whole else (None, None)
    is_plain = window is None and softcap is None
    own_keys = triton.next_power_of_2(L) if is_plain or P <= 128 else 16  # more than those spill
    m = l = partial = None
    if splits > 1:
        m, l = torch.empty(2, splits, B, L, Hq, dtype=compute_dtype(q.dtype), device=q.device)
        partial = torch.empty(splits, B, L, Hq, P, dtype=m.dtype, device=q.device)
    run(
        _context_attention_kernel,
        (triton.cdiv(L * R, launch.BLOCK_M), Hkv * splits, B),
        *(heads(q), heads(k), heads(v), *(Pages(t, *t.stride()[:3]) for t in (k_pages, v_pages))),
        *(*cached, *own),
        *(page_table, cache_lengths.contiguous(), None if counts is None else counts.contiguous(), *out),
        *(partial, m, l),
        *(page_table.stride(0), B, L, Hkv, len(k_pages), page_size, room, *limits, window),
        *log2_scale(scale, softcap),
        P=P,
        R=R,
        APPEND=append,
        CAUSAL=causal and L > 1,
        IN_PAGE=in_page,
        TMA=cached[0] is not None,
        SPLIT=splits > 1,
        # Below 64 rows four warps lie side by side along the keys, 8 each.
        BLOCK_L=min(launch.BLOCK_N, max(16 if launch.BLOCK_M >= 64 else 32, own_keys)),
        BLOCK_T=triton.next_power_of_2(triton.cdiv(launch.BLOCK_M, R)) if append else 1,
        launch=launch,
    )
    if splits > 1:
        combine = combine_launch(B * L * Hq, limits, launch.BLOCK_P)
        run(
            _combine_splits_kernel,
            (triton.cdiv(B * L * Hq, combine.BLOCK_R),),
            *(partial, m, l, *out, B * L * Hq, splits),
            P=P,
            launch=combine,
        )
    return out


def combine_launch(rows: int, limits: Splits, block_p: int) -> Launch:
    """Few rows: all results of one at once, which is one round trip to memory. Many rows have few splits each, of which
    most of a tile would be empty: four of eight rows. max_splits, not how many there are: the order in which results
    are added must not depend on the room."""
    block_m = triton.next_power_of_2(limits.max_splits)
    many = rows > 1024
    return Launch(
        BLOCK_R=8 if many else 1,
        BLOCK_M=block_m,
        BLOCK_S=min(block_m, 4) if many else block_m,
        BLOCK_P=block_p,
        num_warps=4 if many else 8,
    )


def _context_attention_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))


def _append_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    cache_lengths: Tensor,
    counts: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    pages = side_by_side(k_pages), side_by_side(v_pages)
    out = _context_attention(q, k, v, *pages, page_table, cache_lengths, True, scale, append=True, counts=counts)
    for written, place in zip(pages, (k_pages, v_pages), strict=True):
        if written is not place:
            place.copy_(written)
    return out
