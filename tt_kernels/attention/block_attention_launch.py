"""The launch of training's attention masks."""

from dataclasses import dataclass

import triton
from torch import Tensor

from ..reference.common import compute_dtype
from ..runtime.launch import Launch, architecture, run, tuned
from ..runtime.varlen import begins
from .block_attention_kernels import _block_attention_kernel
from .lang import heads, in_tiles, log2_scale


@dataclass(frozen=True, kw_only=True)
class BlockAttentionLaunch(Launch):
    BLOCK_P: int
    BLOCK_M: int
    BLOCK_N: int
    num_warps: int = 8
    num_stages: int = 2


def block_attention_launch(P: int, itemsize: int, architecture: int) -> BlockAttentionLaunch:
    """A tile of queries and keys:

    | where               | queries x keys | stages | reason                                                         |
    |---------------------|----------------|--------|----------------------------------------------------------------|
    | sm_90 and above     | 128 x 64       | 3      | two warpgroups; two tiles are on their way while one is used   |
    | the same, P > 128   | 128 x 32       | 3      | 64 keys spill                                                  |
    | sm_80               | 128 x 32       | 4      | operands live in registers; with fewer stages they do not fit  |
    | the same, P > 128   | 16 x 32        | 3      | 32 queries spill                                               |
    | P > 256             | 16 x 32        | 2      | shared memory                                                  |
    | fp32, fp64          | 32 x 32        | 2      | exactness, not speed: operands are registers                   |
    """
    block_p = max(16, triton.next_power_of_2(P))
    if itemsize > 2:
        block_m, block_n, stages = 32, 32, 2
    elif block_p > 256:
        block_m, block_n, stages = 16, 32, 2
    elif architecture >= 90:
        block_m, block_n, stages = 128, 64 if block_p <= 128 else 32, 3
    else:
        block_m, block_n, stages = (128, 32, 4) if block_p <= 128 else (16, 32, 3)
    warps = 8 if block_m == 128 else 4
    return BlockAttentionLaunch(BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)


def _block_attention(
    q: Tensor,
    k_clean: Tensor,
    v_clean: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    block_size: int = 1,
    k: Tensor | None = None,
    v: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result [B, N, Hq, P] and its log-sum-exp, natural, [B, N, Hq]. Without the noisy k and v: causal attention
    among the clean tokens, and only then with a window."""
    B, N, Hq, P = q.shape
    out = _block_attention_fake(q, k_clean, v_clean)
    packed, itemsize, arch = cu_seqlens is not None, q.element_size(), architecture(q)
    default = block_attention_launch(P, itemsize, arch)
    if window is not None and window >= N:  # it reaches every token
        window = None
    near, S = triton.next_power_of_2(N), 0 if k is None else block_size
    launch = tuned("_block_attention_kernel", default, arch, N=near, S=S, packed=int(packed), P=P, itemsize=itemsize)
    run(
        _block_attention_kernel,
        (triton.cdiv(N, launch.BLOCK_M), Hq, B),
        *(heads(q), heads(k_clean), heads(v_clean)),
        *in_tiles(k_clean, v_clean, launch.BLOCK_N, launch.BLOCK_P, arch),
        *(None if t is None else heads(t) for t in (k, v)),
        *(None if cu_seqlens is None else begins(cu_seqlens, B, N), *out),
        *(N, Hq, window, *log2_scale(scale, softcap)),
        P=P,
        R=Hq // k_clean.shape[2],
        S=block_size,
        launch=launch,
    )
    return out


def _block_attention_fake(q, k_clean, v_clean, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=compute_dtype(q.dtype))
