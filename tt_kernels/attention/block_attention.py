"""Attention of training: clean sequences causally, and noisy blocks against the clean blocks before them."""

from torch import Tensor

from .. import reference
from ..runtime.checks import check, is_whole, refuse
from ..runtime.registry import define, takes_kernel, wants_gradients
from .block_attention_launch import _block_attention, _block_attention_fake
from .context_attention import check_heads, limits_of, scale_of


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal grouped-query attention within each sequence, without a cache.

    Args:
        q:          [B, N, Hq, P] float, any strides.
        k, v:       [B, N, Hkv, P] float; query head h uses head h // (Hq / Hkv).
        cu_seqlens: [sequences + 1] int, from 0 and ascending, counted over the flattened B * N tokens: sequences packed
                    in a row do not see each other. Every row starts a sequence, and so do the tokens behind the last
                    entry.
        scale:      P^-1/2 if None; 0 and below are fine.
        window:     1 or more: token i sees tokens j of its sequence with i - window < j <= i; None: all up to itself.
        softcap:    scores become softcap tanh(scores / softcap), before masks; above 0. None: they stay.
    Returns:
        o: [B, N, Hq, P] dtype of q.

    Numerics: softmax and sums in fp32 (fp64 for fp64), of scores up to 2^30. Deterministic, except for the reference on
    a GPU. NaN and infinity in what a token sees reach it; in v they may also reach tokens of the same row which do not
    see them (a weight of 0 times NaN), and in k where the reference, which adds its masks there, runs on a GPU.
    Gradients: for q, k and v; where they are wanted the reference runs.
    Raises: ValueError for sizes, dtypes and devices that disagree, for Hkv that does not divide Hq, and in the
    reference on a CPU for a cu_seqlens that is not from 0 and ascending up to B * N. Kernels take every entry for the
    start of a sequence, and leave out those that are no token. ValueError also for a window below 1 and for a softcap
    outside of 1e-30 to 1e30.
    Cost: 2 B Hq N^2 P flops, 2 B N (Hq + Hkv) P itemsize bytes. With a window 4 B Hq N window P flops at most: tiles
    before it are skipped.
    Source: Vaswani et al. (2017), grouped queries of Ainslie et al. (2305.13245), windows as in Mistral 7B
    (2310.06825), soft caps as in Gemma 2 (2408.00118).

    Example:
        >>> q, (k, v) = torch.randn(1, 64, 32, 128), torch.randn(2, 1, 64, 2, 128)
        >>> o = causal_attention(q, k, v, cu_seqlens=torch.tensor([0, 40, 64]))
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
    window, softcap = limits_of("causal_attention", window, softcap)
    if not takes_kernel("causal_attention", q, k, v) or wants_gradients(q, k, v):
        return reference.causal_attention(q, k, v, cu_seqlens=cu_seqlens, scale=scale, window=window, softcap=softcap)
    return _block(q, k, v, cu_seqlens, scale, 1, None, None, window, softcap)[0]


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
    """Attention of all noisy blocks of a sequence at once: the denoiser's, in training.

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

    Numerics: as `causal_attention`. NaN in the last clean block, which no token of an unpacked row sees, reaches none.
    Gradients: for all tensors; where they are wanted the reference runs.
    Raises: ValueError as `causal_attention`, and for a block_size below 1.
    Cost: 2 B Hq N (N + S) P flops, 2 B N (Hq + 2 Hkv) P itemsize bytes.
    Source: Arriola et al., Block Diffusion (2503.09573), section 3.

    Example:
        >>> q, (k, v, k_clean, v_clean) = torch.randn(1, 64, 32, 128), torch.randn(4, 1, 64, 2, 128)
        >>> o = block_diffusion_attention(q, k, v, k_clean, v_clean, block_size=16)
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
    return _block(q, k_clean, v_clean, cu_seqlens, scale, block_size, k, v)[0]


_block = define(_block_attention, _block_attention_fake)
