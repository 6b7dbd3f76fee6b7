"""Attention of transformers' models, as its `AttentionInterface` and `AttentionMaskInterface` call it.

A mask is made once for a pass and read by every layer: None, or where the tokens of each row lie between its padding,
int32: [B], where they start, of causal attention; [B, 1], the same of causal attention in a sliding window, whose size
the layer names; [B, 2, n], where they start and end, of full attention, a view whose n says without a look at the
device how many tokens the shortest row has; [B, 3], of a mask that is not served, which some models make and no layer
reads.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ... import causal_attention, context_attention
from ...runtime.registry import wants_gradients

# What a model may ask of an attention function beside the mask, and why it is not served. None and False ask nothing.
_SINKS = "attention sinks enter the sum of exponents without a key, which no kernel of ours has"
_CHOSEN = "keys that an indexer chooses for each query, served are all that the mask leaves"
_UNSERVED = {
    "s_aux": _SINKS,
    "sinks": _SINKS,
    "indices": _CHOSEN,
    "block_indices": _CHOSEN,
    "position_bias": "scores are those of queries and keys alone",
    "cu_seq_lens_q": "packed sequences have a mask of their own",
    "cu_seq_lens_k": "packed sequences have a mask of their own",
    "output_attentions": "no weights are kept",
}
_OWN_MASKS = ("doge",)  # types whose layers read the mask before they hand it on


def _refuse(reason: str) -> NoReturn:
    raise NotImplementedError(f"tt_kernels: attention: {reason}; choose another attn_implementation")


def _held(function: Any, like: Callable) -> Any:
    """What a function of transformers was made with, if it was made as `like` was, else None."""
    return function.__closure__[0].cell_contents if getattr(function, "__code__", None) is like.__code__ else None


def _window_of(mask_function: Callable | None, local_size: int | None) -> int | None:
    """The window of a mask function that is transformers' causal sliding window and nothing else, else None."""
    from transformers import masking_utils as theirs

    both = _held(mask_function, theirs.sliding_window_causal_mask_function(1))
    if both is None or len(both) != 2 or both[1] is not theirs.causal_mask_function:
        return None
    window = _held(both[0], theirs.sliding_window_overlay(1))
    return window if local_size in (None, window) else None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> Tensor | None:
    """What the layers get for the padding of attention_mask [B, kv_offset + kv_length] bool, 1 where a token is. Reads
    it on the host, once a pass, as transformers' own mask does. kv_offset: the tokens that a cache has dropped."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    window = None
    if (kind := getattr(config, "model_type", None)) in _OWN_MASKS:
        _refuse(f"models of type {kind} add to their mask of every query and key")
    if local_size is not None or mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        window = _window_of(mask_function, local_size)
        if window is None:
            other = (
                "chunks, a window to both sides, packed sequences, which torch.compile asks for as well, or your own"
            )
            _refuse(f"a mask that is neither causal, in a sliding window or not, nor full ({other})")
    full = mask_function is bidirectional_mask_function
    if not isinstance(q_offset, int) or (not full and kv_offset + kv_length != q_offset + q_length):
        _refuse("a cache with room behind its tokens (a static one), served is one that grows")
    if kv_offset and (window is None or kv_offset > q_offset - window + 1):
        return torch.empty(batch_size, 3, dtype=torch.int32, device=device)
    if full and q_offset:
        _refuse("full attention on a cache, served is full attention of the tokens to each other")
    windowed = window is not None and window < kv_length
    starts = None
    if attention_mask is not None:
        end = kv_offset + kv_length
        if attention_mask.dim() != 2 or attention_mask.shape[1] < end:
            _refuse(f"attention_mask is {list(attention_mask.shape)}, served is [B, {end}]")
        here = attention_mask[:, kv_offset:end].bool()
        if not bool(here.all()):
            starts = _spans(here) if full else _causal_starts(here, q_offset - kv_offset)
    if not windowed:
        return starts
    if starts is None:
        starts = torch.zeros(batch_size, dtype=torch.int32, device=device)
    return starts.unsqueeze(1)


def _ends(here: Tensor) -> tuple[Tensor, Tensor]:
    """Where the tokens of each row start and end, [B] int32; rows with padding between tokens are refused."""
    starts = here.int().argmax(1).int()
    counts = here.sum(1, dtype=torch.int32)
    at = torch.arange(here.shape[1], device=here.device)
    span = (at >= starts[:, None]) & (at < (starts + counts)[:, None])
    if not bool((span == here).all()):
        _refuse("attention_mask has padding between tokens, served is padding before and behind them")
    return starts, starts + counts


def _causal_starts(here: Tensor, q_offset: int) -> Tensor:
    starts, ends = _ends(here)
    if q_offset and bool(((ends < here.shape[1]) | (starts > q_offset)).any()):
        _refuse("attention_mask has padding behind cached tokens, served is padding before them")
    return starts  # padding behind is seen by itself alone


def _spans(here: Tensor) -> Tensor:
    starts, ends = _ends(here)
    counts = [count for count in (ends - starts).tolist() if count]
    return torch.stack((starts, ends), 1).unsqueeze(2).expand(-1, -1, min(counts, default=1))


def _check(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, asked: dict[str, Any]) -> None:
    if dropout:
        _refuse(f"dropout is {dropout}, served is 0 (config.attention_dropout)")
    for name, reason in _UNSERVED.items():
        if asked.get(name) is not None and asked[name] is not False:
            _refuse(f"{name} is given, and not served: {reason}")
    if mask is not None and mask.dtype == torch.int32 and mask.shape[1:] == (3,):
        _refuse("a cache that has dropped its first tokens, which are seen, served is one that has these")
    if mask is not None and (mask.dtype != torch.int32 or not (mask.shape[1:] in ((), (1,)) or _is_full(mask))):
        _refuse(f"a mask {list(mask.shape)} of {mask.dtype} of your own, served is a 2-D attention_mask")
    if query.is_cuda and wants_gradients(query, key):
        _refuse("no backward kernel; train with 'sdpa', or run under torch.no_grad()")


def _is_full(mask: Tensor) -> bool:
    return mask.dim() == 3 and mask.shape[1] == 2


def _window(module: Any, key: Tensor, mask: Tensor | None, window: int | None) -> int | None:
    """Of a layer and of the mask that it was given, which must agree; None where it holds all tokens. Some layers
    (Qwen2-MoE's) have a window and do not hand it on."""
    masked = mask is not None and mask.shape[1:] == (1,)
    if masked and window is None:
        window = getattr(module, "sliding_window", None)
    if window is not None and window >= key.shape[2]:
        window = None
    if masked and window is None:
        _refuse("the mask is of a sliding window, and the layer names no sliding_window or another")
    if not masked and window is not None:
        _refuse(f"sliding_window is {window}, and the mask is of attention to all {key.shape[2]} tokens")
    return window


def _autocast(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """In the dtype of autocast, as PyTorch's own attention takes them: a rotation by fp32 leaves keys wider than
    values."""
    device = tensors[0].device.type
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """query [B, Hq, q, D], key and value [B, Hkv, kv, D] -> [B, q, Hq, D]. Queries on a cache are the last of kv."""
    window = _window(module, key, attention_mask, sliding_window)
    _check(query, key, attention_mask, dropout, asked)
    if key.shape[-1] != value.shape[-1]:
        _refuse(f"heads of {key.shape[-1]} in keys and {value.shape[-1]} in values, served is one size")
    q, k, v = (t.transpose(1, 2) for t in _autocast((query, key, value)))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    spans = attention_mask
    if spans is not None:
        causal = not _is_full(spans)
        spans = spans if window is None else spans[:, 0]
    (B, L), N = q.shape[:2], k.shape[1]
    if L == N and causal:
        packed = _packed(spans, B, N)
        return causal_attention(q, k, v, cu_seqlens=packed, scale=scaling, window=window, softcap=softcap), None
    if not causal and (spans is not None or L not in (1, N)):
        if spans is None:
            starts = torch.zeros(B, dtype=torch.int32, device=q.device)
            spans = torch.stack((starts, starts + N), 1).unsqueeze(2).expand(-1, -1, N)
        return _between_padding(q, k, v, spans, scaling, softcap), None
    if L > N:
        _refuse(f"causal attention of {L} queries to {N} keys, served are no more than keys")
    cached = N - L
    starts = q.new_zeros(B, dtype=torch.int32) if spans is None else spans
    pages, table = _as_pages(k[:, :cached], v[:, :cached], starts)
    own = (q, k[:, cached:], v[:, cached:])
    return context_attention(
        *own, *pages, table, cached - starts, causal=causal, scale=scaling, window=window, softcap=softcap
    ), None


def _between_padding(
    q: Tensor, k: Tensor, v: Tensor, spans: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Every query [B, L, Hq, P] to the keys [B, N, Hkv, P] between the padding of its row, also those of other tokens
    (cross-attention). It is `context_attention` of blocks of queries, as long as the shortest span: a block's own keys
    are the last of the span, its context those before."""
    own = min(spans.shape[2], q.shape[1])
    starts, ends = spans[:, :, 0].unbind(1)  # what a row of nothing but padding gets is noise
    places = torch.arange(own, device=k.device)
    at = (ends.unsqueeze(1) - own + places).clamp(min=0)[..., None, None].long()
    last_k, last_v = (t.gather(1, at.expand(-1, -1, *t.shape[2:])) for t in (k, v))
    pages, table = _as_pages(k, v, starts)
    lengths = (ends - own - starts).clamp(min=0)
    found = []
    for block in q.split(own, 1):
        n = block.shape[1]
        mine = (last_k[:, own - n :], last_v[:, own - n :])
        found.append(
            context_attention(
                block, *mine, *pages, table, lengths + (own - n), causal=False, scale=scale, softcap=softcap
            )
        )
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _packed(starts: Tensor | None, B: int, N: int) -> Tensor | None:
    """Rows after their padding, as the sequences of `causal_attention`."""
    if starts is None:
        return None
    rows = torch.arange(B, device=starts.device, dtype=starts.dtype) * N
    return torch.cat([torch.stack([rows, rows + starts], 1).flatten(), starts.new_full((1,), B * N)])


def _as_pages(k: Tensor, v: Tensor, starts: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """k and v [B, N, H, P], from starts[b] on, as a pool of pages of one token each, [tokens, 1, H, P], and the table
    [B, N] of each row's: views. A token further along a row is one page further, and a row begins at a whole page."""
    B, N = k.shape[:2]
    if k.stride() != v.stride() or (B > 1 and N and (k.stride(1) == 0 or k.stride(0) % k.stride(1))):
        k, v = k.contiguous(), v.contiguous()
    row = k.stride(0) // k.stride(1) if B > 1 and N else N
    size = ((B - 1) * row + N if N else 0, 1, *k.shape[2:])
    pages = [t.as_strided(size, (t.stride(1), *t.stride()[1:])) for t in (k, v)]
    first = torch.arange(B, device=starts.device, dtype=starts.dtype) * row + starts
    table = first[:, None] + torch.arange(N, device=starts.device, dtype=starts.dtype)
    return (pages[0], pages[1]), table
