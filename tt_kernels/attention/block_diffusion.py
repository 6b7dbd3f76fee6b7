"""Attention of training: clean sequences causally, and noisy blocks against the clean blocks before them."""

import torch
from torch import Tensor

from .. import reference
from ..core import Op, check, is_whole, refuse, takes_kernel, wants_gradients
from ..launch import Launch
from .block_diffusion_kernels import block_attention_forward
from .context import check_heads, scale_of


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Causal grouped-query attention within each sequence.

    Args:
        q:          [B, N, Hq, P] float, any strides.
        k, v:       [B, N, Hkv, P] float; query head h uses head h // (Hq / Hkv).
        cu_seqlens: [sequences + 1] int, from 0 and ascending, counted over the flattened B * N tokens: sequences packed
                    in a row do not see each other. A row starts anew in any case, and so does what lies behind the last
                    entry.
        scale:      P^-1/2 if None; 0 and below are fine.
    Returns:
        o: [B, N, Hq, P] dtype of q.

    Softmax and sums in fp32 (fp64 for fp64). Gradients for q, k and v. Deterministic. Where gradients are wanted the
    reference runs, which on a GPU need not be. NaN and infinity in what a token sees reach it; in v they may also reach
    tokens of the same row which do not see them (a weight of 0 times NaN), and in k where the reference, which adds its
    masks there, runs on a GPU. Raises ValueError for sizes, dtypes and devices that disagree, Hkv that does not divide
    Hq, and in the reference on a CPU for a cu_seqlens that is not from 0 and ascending up to B * N: kernels take every
    entry for the start of a sequence, and leave out those that are no token. Cost: 2 B Hq N^2 P flops,
    2 B N (Hq + Hkv) P itemsize bytes.
    Source: Vaswani et al. (2017), grouped queries of Ainslie et al. (2305.13245).
    """
    check(
        "causal_attention",
        3,
        q=(q, "B N Hq P"),
        k=(k, "B N Hkv P"),
        v=(v, "B N Hkv P"),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    check_heads("causal_attention", q, k, v=v)
    scale = scale_of("causal_attention", q, scale)
    if not takes_kernel("causal_attention", q, k, v) or wants_gradients(q, k, v):
        return reference.causal_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale)
    return block_attention_forward(q, None, None, k, v, cu_seqlens, 1, scale)[0]


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
    """Attention of all noisy blocks of a sequence at once.

    A token of block j sees the clean tokens of the blocks before j and all noisy tokens of block j, both ways. With the
    clean tokens as the noisy ones, it is block-causal attention.

    Args:
        q:                [B, N, Hq, P] float: the noisy tokens.
        k, v:             [B, N, Hkv, P] float: of the noisy tokens; query head h uses head h // (Hq / Hkv).
        k_clean, v_clean: [B, N, Hkv, P] float: of the same places in the clean sequence.
        block_size:       S; the last block of a row may be shorter.
        cu_seqlens:       as in `causal_attention`. Blocks are counted from where the row begins: sequences that start
                          at multiples of S have blocks of their own; where two share one, neither sees the other.
        scale:            P^-1/2 if None; 0 and below are fine.
    Returns:
        o: [B, N, Hq, P] dtype of q.

    Softmax and sums in fp32 (fp64 for fp64). Gradients for all tensors. Deterministic. Where gradients are wanted the
    reference runs, which on a GPU need not be. NaN as in `causal_attention`; what no token of an unpacked row sees,
    which is the last clean block, reaches none. Raises ValueError as `causal_attention`, and for a block_size below 1.
    Cost: 2 B Hq N (N + S) P flops, 2 B N (Hq + 2 Hkv) P itemsize bytes.
    Source: Arriola et al., Block Diffusion (2503.09573), section 3.
    """
    check(
        "block_diffusion_attention",
        5,
        q=(q, "B N Hq P"),
        k=(k, "B N Hkv P"),
        v=(v, "B N Hkv P"),
        k_clean=(k_clean, "B N Hkv P"),
        v_clean=(v_clean, "B N Hkv P"),
        cu_seqlens=(cu_seqlens, "sequences+1", int),
    )
    check_heads("block_diffusion_attention", q, k, v=v, k_clean=k_clean, v_clean=v_clean)
    scale = scale_of("block_diffusion_attention", q, scale)
    if not is_whole(block_size) or block_size < 1:
        refuse("block_diffusion_attention", "block_size", block_size, "1 or more")
    tensors = (q, k, v, k_clean, v_clean)
    if not takes_kernel("block_diffusion_attention", *tensors) or wants_gradients(*tensors):
        return reference.block_diffusion_attention(
            q, k, v, k_clean, v_clean, block_size=block_size, cu_seqlens=cu_seqlens, scale=scale
        )
    return block_attention_forward(q, k, v, k_clean, v_clean, cu_seqlens, block_size, scale)[0]


def _causal(dtype: torch.dtype, B: int, N: int, Hq: int, Hkv: int, P: int, packed: int = 0) -> dict[str, Tensor | None]:
    k, v = torch.randn(2, B, N, Hkv, P, dtype=dtype)
    cu_seqlens = torch.tensor([0, N // 3, N // 2, B * N]) if packed else None
    return dict(q=torch.randn(B, N, Hq, P, dtype=dtype), k=k, v=v, cu_seqlens=cu_seqlens)


def _causal_cost(itemsize: int, B: int, N: int, Hq: int, Hkv: int, P: int, packed: int = 0) -> tuple[int, int]:
    pieces = (N // 3, N // 2 - N // 3, N - N // 2) if packed else (N,)  # of the first row; the others are whole
    pairs = sum(n * n for n in pieces) + (B - 1) * N * N
    return 2 * Hq * pairs * P, 2 * B * N * (Hq + Hkv) * P * itemsize


def _blocks(
    dtype: torch.dtype, B: int, N: int, Hq: int, Hkv: int, P: int, S: int, packed: int = 0
) -> dict[str, object]:
    k_clean, v_clean = torch.randn(2, B, N, Hkv, P, dtype=dtype)
    cu_seqlens = torch.tensor([0, S, 3 * S, B * N]) if packed else None
    inputs = _causal(dtype, B, N, Hq, Hkv, P)
    return dict(inputs, k_clean=k_clean, v_clean=v_clean, block_size=S, cu_seqlens=cu_seqlens)


_HEADS = dict(Hq=32, Hkv=2, P=128)
_CANDIDATES = dict(
    _block_attention_kernel=tuple(
        Launch(BLOCK_P=128, BLOCK_M=m, BLOCK_N=n, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in (
            *((64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)),
            *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)),
        )
    )
)

OPS = (
    Op(
        fn=causal_attention,
        kernels=("_block_attention_kernel",),
        forward_only=True,
        tensor_cores={"_block_attention_kernel": "BLOCK_M"},
        candidates=_CANDIDATES,
        reference=reference.causal_attention,
        inputs=_causal,
        cases=(
            dict(B=2, N=5, Hq=4, Hkv=2, P=3),
            dict(B=1, N=12, Hq=2, Hkv=1, P=8, packed=1),
            dict(B=2, N=12, Hq=2, Hkv=2, P=8, packed=1),
            dict(B=1, N=1, Hq=2, Hkv=1, P=29),
            dict(B=1, N=0, Hq=2, Hkv=1, P=8),
            dict(B=2, N=70, Hq=2, Hkv=1, P=8, packed=1),
        ),
        shapes=(dict(B=1, N=4096, **_HEADS), dict(B=1, N=4096, packed=1, **_HEADS)),
        grows=dict(N=1024),
        outputs=("o",),
        grads=("q", "k", "v"),
        cost=_causal_cost,
    ),
    Op(
        fn=block_diffusion_attention,
        kernels=("_block_attention_kernel",),
        forward_only=True,
        tensor_cores={"_block_attention_kernel": "BLOCK_M"},
        candidates=_CANDIDATES,
        reference=reference.block_diffusion_attention,
        inputs=_blocks,
        cases=(
            dict(B=2, N=6, Hq=4, Hkv=2, P=3, S=2),
            dict(B=1, N=16, Hq=2, Hkv=1, P=8, S=4, packed=1),
            dict(B=1, N=7, Hq=2, Hkv=1, P=8, S=4),
            dict(B=1, N=0, Hq=2, Hkv=1, P=8, S=4),
            dict(B=2, N=140, Hq=2, Hkv=1, P=8, S=16),
            dict(B=1, N=96, Hq=2, Hkv=2, P=29, S=12, packed=1),
            dict(B=1, N=90, Hq=1, Hkv=1, P=8, S=48),
        ),
        shapes=(
            dict(B=1, N=4096, S=16, **_HEADS),
            dict(B=1, N=8192, S=16, **_HEADS),
            dict(B=1, N=4096, S=16, packed=1, **_HEADS),
        ),
        grows=dict(N=1024),
        outputs=("o",),
        grads=("q", "k", "v", "k_clean", "v_clean"),
        cost=lambda itemsize, B, N, Hq, Hkv, P, S, packed=0: (
            2 * B * Hq * N * (N + S) * P,
            2 * B * N * (Hq + 2 * Hkv) * P * itemsize,
        ),
    ),
)
