"""The kernel of training's attention masks, forward: causal, block-causal and block-diffusion, never a mask in memory.

Rows of noisy queries see the clean keys of the blocks before theirs, then the noisy keys of their own block. Tiles that
are seen whole run without a mask; only the tile at the diagonal, and the row's own blocks, are masked by arithmetic.
"""

import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.varlen import begins
from .block_attention_kernels import _block_attention_kernel

# ---- launches ----


def block_attention_launch(P: int, itemsize: int, architecture: int, packed: bool) -> Launch:
    """128 rows by 128 keys and two warpgroups keep wgmma fed on Hopper; where sequences are packed, their masks take
    the registers of half the keys. Elsewhere operands live in registers. fp32 is for exactness: small tiles."""
    block_p = max(16, triton.next_power_of_2(P))
    if itemsize > 2 or block_p > 128:
        return Launch(BLOCK_P=block_p, BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)
    if architecture == 90:
        block_n, stages = (64, 3) if packed else (128, 2)
        return Launch(BLOCK_P=block_p, BLOCK_M=128, BLOCK_N=block_n, num_warps=8, num_stages=stages)
    return Launch(BLOCK_P=block_p, BLOCK_M=128, BLOCK_N=64 if architecture > 90 else 32, num_warps=8, num_stages=2)


def _block_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_clean: Tensor,
    v_clean: Tensor,
    cu_seqlens: Tensor | None,
    block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    causal = k is None
    k, v = (k_clean, v_clean) if causal else (k, v)
    q, k, v, k_clean, v_clean = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, k_clean, v_clean))
    B, N, Hq, P = q.shape
    o, lse = _block_attention_fake(q, k, v, k_clean, v_clean, cu_seqlens, block_size, scale)
    default = block_attention_launch(P, q.element_size(), architecture(q), cu_seqlens is not None)
    launch = tuned(
        "_block_attention_kernel",
        default,
        architecture(q),
        N=triton.next_power_of_2(N),
        S=0 if causal else block_size,
        packed=int(cu_seqlens is not None),
        P=P,
        itemsize=q.element_size(),
    )
    run(
        _block_attention_kernel,
        (triton.cdiv(N, launch.BLOCK_M), Hq, B),
        *(q, k, v, k_clean, v_clean, None if cu_seqlens is None else begins(cu_seqlens, B, N), o, lse),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_clean.stride()[:3], *v_clean.stride()[:3]),
        *(N, Hq, P, scale * 1.4426950408889634),
        R=Hq // k.shape[2],
        S=block_size,
        CAUSAL=causal,
        PACKED=cu_seqlens is not None,
        launch=launch,
    )
    return o, lse


# ---- op ----


def _block_attention_fake(q, k, v, k_clean, v_clean, cu_seqlens, block_size, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))
