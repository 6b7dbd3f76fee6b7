"""Cards of attention: against a paged cache, and with the masks of training."""

import torch

from tt_kernels.attention.block_attention import block_diffusion_attention, causal_attention
from tt_kernels.attention.block_attention_launch import BlockAttentionLaunch
from tt_kernels.attention.context_attention import append_attention, context_attention
from tt_kernels.attention.context_attention_launch import ContextAttentionLaunch

from .op import Op


def _context_attention_inputs(
    dtype, B, L, Hq, Hkv, P, S, page_size=64, causal=0, shuffled=1, wide=0, window=0, softcap=0
):
    """Rows of S tokens in pages in order; shuffled=1: of S and fewer, in shuffled pages; 2: of S, in shuffled pages; 3:
    as 1, with cache_lengths around the ends of pages. wide: table and lengths in 64 bits. window, softcap: 0: none."""
    row = max(1, -(-S // page_size))
    pages = torch.randn(2, B * row, page_size, Hkv, P, dtype=dtype)
    table = torch.randperm(B * row) if shuffled else torch.arange(B * row)
    lengths = torch.randint(0, S + 1, (B,)) if shuffled == 1 else torch.full((B,), S)
    if shuffled == 3:
        edges = torch.tensor([S, 0, page_size, 1, page_size + 1, page_size - 1])
        lengths = edges[torch.arange(B) % len(edges)].clamp(max=S)
    ints = torch.int64 if wide else torch.int32
    k, v = torch.randn(2, B, L, Hkv, P, dtype=dtype)
    return dict(
        q=torch.randn(B, L, Hq, P, dtype=dtype),
        k=k,
        v=v,
        k_pages=pages[0],
        v_pages=pages[1],
        page_table=table.view(B, row).to(ints),
        cache_lengths=lengths.to(ints),
        causal=bool(causal),
        window=window or None,
        softcap=float(softcap) or None,
    )


def _in_windows(L, S, window):
    """Pairs of L tokens behind S others, where each sees what is before it, itself included, up to `window` of it."""
    whole = max(0, S + L - max(window, S))  # tokens that see `window`; those before see all
    return whole * window + (L - whole) * S + (L - whole) * (L - whole + 1) // 2


def _context_attention_cost(itemsize, *, B, L, Hq, Hkv, P, S, causal=0, window=0, **_):
    pairs = _in_windows(L, S, window or S + L)
    pairs += 0 if causal else L * (L - 1) // 2  # tokens of the block behind each
    cached = min(S, window - 1) if window else S
    return 4 * B * Hq * pairs * P, (2 * B * (cached + L) * Hkv + 2 * B * L * Hq) * P * itemsize


def _append_inputs(dtype, *, B, L, S, counted=0, **dims):
    """Room for S tokens a row and L more. counted: the rows take none, one, ... of them in turn."""
    inputs = _context_attention_inputs(dtype, B=B, L=L, S=S + L, **dims)
    for option in ("causal", "window", "softcap"):
        del inputs[option]
    inputs["cache_lengths"] = (inputs["cache_lengths"] - L).clamp(min=0)
    return inputs | dict(counts=(torch.arange(B) % (L + 1)).to(inputs["cache_lengths"].dtype) if counted else None)


def _append_cost(itemsize, **dims):
    flops, moved = _context_attention_cost(itemsize, causal=1, **dims)
    return flops, moved + 2 * dims["B"] * dims["L"] * dims["Hkv"] * dims["P"] * itemsize


def _causal(dtype, B, N, Hq, Hkv, P, packed=0, window=0, softcap=0):
    """window, softcap: 0 is none."""
    k, v = torch.randn(2, B, N, Hkv, P, dtype=dtype)
    cu_seqlens = torch.tensor([0, N // 3, N // 2, B * N]) if packed else None
    limits = dict(window=window or None, softcap=float(softcap) or None)
    return dict(q=torch.randn(B, N, Hq, P, dtype=dtype), k=k, v=v, cu_seqlens=cu_seqlens) | limits


def _causal_cost(itemsize, B, N, Hq, Hkv, P, packed=0, window=0, **_):
    pieces = [N // 3, N // 2 - N // 3, N - N // 2] if packed else [N]  # of the first row; the others are whole
    pieces += [N] * (B - 1)
    pairs = sum(2 * _in_windows(n, 0, window) if 0 < window < n else n * n for n in pieces)
    return 2 * Hq * pairs * P, 2 * B * N * (Hq + Hkv) * P * itemsize


def _blocks(dtype, B, N, Hq, Hkv, P, S, packed=0):
    k_clean, v_clean = torch.randn(2, B, N, Hkv, P, dtype=dtype)
    cu_seqlens = torch.tensor([0, S, 3 * S, B * N]) if packed else None
    inputs = _causal(dtype, B, N, Hq, Hkv, P)
    del inputs["window"], inputs["softcap"]
    return dict(inputs, k_clean=k_clean, v_clean=v_clean, block_size=S, cu_seqlens=cu_seqlens)


_HEADS = dict(Hq=32, Hkv=2, P=128)
_PUBLISHED = dict(_HEADS, shuffled=2)
# Of others' models: Mistral 7B v0.1 has windows; Gemma 2 9B caps scores, and has windows in every second layer.
_MISTRAL = dict(Hq=32, Hkv=8, P=128, window=4096)
_GEMMA2 = dict(Hq=16, Hkv=8, P=256, window=4096, softcap=50)

# What the two ops on a paged cache share, and the two with the masks of training.
_PAGED = dict(
    grows=dict(B=64, L=64, S=131072),
    outputs=("o",),
    kernels=("_context_attention_kernel", "_combine_splits_kernel"),
    tensor_cores={"_context_attention_kernel": "BLOCK_M"},
    candidates=dict(
        _context_attention_kernel=tuple(
            ContextAttentionLaunch(BLOCK_P=128, BLOCK_M=m, BLOCK_N=64, num_warps=warps, num_stages=stages)
            for m, warps, stages in ((16, 4, 4), (64, 4, 3), (64, 4, 4), (64, 8, 4), (128, 8, 3), (128, 8, 4))
        )
    ),
)
_MASKED = dict(
    grows=dict(N=1024),
    outputs=("o",),
    kernels=("_block_attention_kernel",),
    tensor_cores={"_block_attention_kernel": "BLOCK_M"},
    candidates=dict(
        _block_attention_kernel=tuple(
            BlockAttentionLaunch(BLOCK_P=128, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
            for m, n, warps, stages in (
                *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
                *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)),
            )
        )
    ),
)

OPS = (
    Op(
        fn=context_attention,
        when="A block on a paged cache that stays as it is: denoisers, drafts, beams.",
        inputs=_context_attention_inputs,
        cases=(
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4),
            dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70, causal=1),
            dict(B=1, L=1, Hq=2, Hkv=2, P=29, S=64, shuffled=0),
            dict(B=2, L=4, Hq=2, Hkv=1, P=8, S=0, causal=1),
            dict(B=1, L=0, Hq=2, Hkv=1, P=8, S=3),
            dict(B=3, L=3, Hq=4, Hkv=2, P=16, S=700),
            dict(B=1, L=2, Hq=2, Hkv=1, P=8, S=65, shuffled=0),
            dict(B=2, L=2, Hq=2, Hkv=1, P=8, S=90, page_size=16),
            dict(B=2, L=20, Hq=2, Hkv=1, P=16, S=100, causal=1),
            dict(B=1, L=140, Hq=2, Hkv=1, P=16, S=30, causal=1, shuffled=2),  # its own keys by TMA in 16 bits
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4, causal=1, window=5, softcap=2),
            dict(B=3, L=3, Hq=4, Hkv=2, P=16, S=700, window=200),  # in splits
            dict(B=2, L=20, Hq=4, Hkv=1, P=8, S=100, window=12, softcap=1),
            dict(B=1, L=140, Hq=2, Hkv=1, P=16, S=70, causal=1, shuffled=2, window=67),  # by TMA in 16 bits
            dict(B=6, L=3, Hq=4, Hkv=2, P=16, S=150, shuffled=3),  # in 16 bits with TMA, as the next two
            dict(B=4, L=5, Hq=2, Hkv=1, P=128, S=130, page_size=128, causal=1, shuffled=3, wide=1),
            dict(B=2, L=17, Hq=4, Hkv=1, P=128, S=120, shuffled=2),
        ),
        shapes=(
            *(dict(B=1, L=16, S=S, **_PUBLISHED) for S in (256, 4096, 8192, 32768, 131072)),
            *(dict(B=1, L=1, S=S, **_PUBLISHED) for S in (4096, 131072)),
            *(dict(B=B, L=16, S=S, **_PUBLISHED) for B, S in ((8, 1024), (8, 8192), (64, 1024), (64, 8192))),
            dict(B=1, L=16, S=4096, causal=1, **_PUBLISHED),
            dict(B=1, L=16, S=4096, wide=1, **_PUBLISHED),
            dict(B=1, L=2048, S=32768, causal=1, **_PUBLISHED),
            dict(B=1, L=4096, S=0, causal=1, **_PUBLISHED),
            *(dict(B=B, L=1, S=32768, causal=1, shuffled=2, **model) for B in (1, 64) for model in (_MISTRAL, _GEMMA2)),
            *(dict(B=1, L=2048, S=32768, causal=1, shuffled=2, **model) for model in (_MISTRAL, _GEMMA2)),
        ),
        grads=("q", "k", "v", "k_pages", "v_pages"),
        cost=_context_attention_cost,
        **_PAGED,
    ),
    Op(
        fn=append_attention,
        when="Prefill, commit passes and decoding on a paged cache: attention and the writing of keys and values.",
        inputs=_append_inputs,
        cases=(
            dict(B=2, L=3, Hq=4, Hkv=2, P=5, S=9, page_size=4),
            dict(B=3, L=5, Hq=4, Hkv=1, P=8, S=70, counted=1),
            dict(B=1, L=1, Hq=2, Hkv=2, P=29, S=63, shuffled=0),
            dict(B=1, L=70, Hq=2, Hkv=1, P=8, S=30, shuffled=2),
            dict(B=2, L=4, Hq=2, Hkv=1, P=8, S=0, counted=1),
            dict(B=1, L=0, Hq=2, Hkv=1, P=8, S=3),
            dict(B=2, L=7, Hq=6, Hkv=2, P=16, S=200, page_size=16),
            dict(B=6, L=3, Hq=4, Hkv=2, P=16, S=150, counted=1, shuffled=3),  # in 16 bits with TMA, as the next two
            dict(B=4, L=5, Hq=2, Hkv=1, P=128, S=130, counted=1, shuffled=3, wide=1),
            dict(B=2, L=17, Hq=4, Hkv=1, P=128, S=111, shuffled=2),
        ),
        shapes=(
            *(dict(B=1, L=L, S=S, **_PUBLISHED) for L, S in ((1, 4096), (16, 4096), (16, 131072), (2048, 32768))),
            dict(B=64, L=16, S=8192, **_PUBLISHED),
            dict(B=1, L=2048, S=0, counted=1, **_PUBLISHED),
            dict(B=1, L=2048, S=0, counted=1, wide=1, **_PUBLISHED),
        ),
        grads=("q", "k", "v"),
        writes=("k_pages", "v_pages"),
        cost=_append_cost,
        **_PAGED,
    ),
    Op(
        fn=causal_attention,
        when="Training and scoring without a cache, packed sequences too.",
        inputs=_causal,
        cases=(
            dict(B=2, N=5, Hq=4, Hkv=2, P=3),
            dict(B=1, N=12, Hq=2, Hkv=1, P=8, packed=1),
            dict(B=2, N=12, Hq=2, Hkv=2, P=8, packed=1),
            dict(B=1, N=1, Hq=2, Hkv=1, P=29),
            dict(B=1, N=0, Hq=2, Hkv=1, P=8),
            dict(B=2, N=70, Hq=2, Hkv=1, P=8, packed=1),
            dict(B=2, N=9, Hq=4, Hkv=2, P=8, window=4, softcap=2),
            dict(B=2, N=70, Hq=2, Hkv=1, P=8, packed=1, window=17),
            dict(B=1, N=200, Hq=2, Hkv=1, P=16),  # in 16 bits with TMA
            dict(B=1, N=200, Hq=2, Hkv=1, P=16, window=70, softcap=1),
        ),
        shapes=(
            dict(B=1, N=4096, **_HEADS),
            dict(B=1, N=8192, **_HEADS),
            dict(B=1, N=4096, packed=1, **_HEADS),
            dict(B=1, N=8192, **_MISTRAL),
            dict(B=1, N=8192, packed=1, **_MISTRAL),
            dict(B=1, N=8192, **_GEMMA2),
        ),
        grads=("q", "k", "v"),
        cost=_causal_cost,
        **_MASKED,
    ),
    Op(
        fn=block_diffusion_attention,
        when="Block-diffusion training (BD3-LM, TwoTower): all noisy blocks in one call, no mask in memory.",
        inputs=_blocks,
        cases=(
            dict(B=2, N=6, Hq=4, Hkv=2, P=3, S=2),
            dict(B=1, N=16, Hq=2, Hkv=1, P=8, S=4, packed=1),
            dict(B=1, N=7, Hq=2, Hkv=1, P=8, S=4),
            dict(B=1, N=0, Hq=2, Hkv=1, P=8, S=4),
            dict(B=2, N=140, Hq=2, Hkv=1, P=8, S=16),
            dict(B=1, N=96, Hq=2, Hkv=2, P=29, S=12, packed=1),
            dict(B=1, N=90, Hq=1, Hkv=1, P=8, S=48),
            dict(B=2, N=260, Hq=2, Hkv=2, P=16, S=16),  # in 16 bits with TMA
        ),
        shapes=(
            dict(B=1, N=4096, S=16, **_HEADS),
            dict(B=1, N=8192, S=16, **_HEADS),
            dict(B=1, N=4096, S=16, packed=1, **_HEADS),
        ),
        grads=("q", "k", "v", "k_clean", "v_clean"),
        cost=lambda itemsize, B, N, Hq, Hkv, P, S, **_: (
            2 * B * Hq * N * (N + S) * P,
            2 * B * N * (Hq + 2 * Hkv) * P * itemsize,
        ),
        **_MASKED,
    ),
)
