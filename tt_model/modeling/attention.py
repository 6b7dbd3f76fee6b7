"""Grouped-query attention without position encoding.

B batch, L tokens, D hidden, H heads, P head size, S block size, N tokens of a training row.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tt_kernels import append_attention, block_diffusion_attention, causal_attention, context_attention

from ..config import TwoTowerConfig
from .constants import joined, lay_side_by_side
from .state import ForwardContext


class Attention(nn.Module):
    """Projections, and attention to what the walk through the tower sees."""

    def __init__(self, config: TwoTowerConfig, layer: int):
        super().__init__()
        D, P, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, P
        self.q_proj = nn.Linear(D, config.num_attention_heads * P, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * P, D, bias=bias)
        self.join()

    def join(self) -> None:
        """Let the weights of q, k and v lie side by side, so that passes without gradients take one product for all."""
        projections = self.q_proj, self.k_proj, self.v_proj
        lay_side_by_side([p.weight for p in projections])
        lay_side_by_side([p.bias for p in projections])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every cast and move of torch.nn goes through: it moves each parameter by itself."""
        super()._apply(fn, recurse)
        self.join()
        return self

    def _project(self, h_BLD: Tensor) -> Sequence[Tensor]:
        projections = self.q_proj, self.k_proj, self.v_proj
        # Whatever was put in a projection's place or hooked to it is called. Autocast keeps parameters that it has
        # cast, but not what is made of them.
        plain = all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks for p in projections)
        if plain and not torch.is_autocast_enabled(h_BLD.device.type):
            weight, biases = joined([p.weight for p in projections]), [p.bias for p in projections]
            bias = None if biases[0] is None else joined(biases)
            if weight is not None and (bias is None) == (biases[0] is None):
                return F.linear(h_BLD, weight, bias).split_with_sizes([len(p.weight) for p in projections], -1)
        return [p(h_BLD) for p in projections]

    def forward(self, h_BLD: Tensor, ctx: ForwardContext) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], -1, self.head_dim) for t in self._project(h_BLD))  # [B, L, Hq or Hkv, P]
        if (cache := ctx.cache) is not None:
            keys, values = cache.kv(self.layer)
            q, k, v = (t.to(keys.dtype) for t in (q, k, v))  # autocast may be another than at prefill
            cached = keys, values, cache.page_table, cache.lengths
            if ctx.kind == "extend":
                o = append_attention(q, k, v, *cached, ctx.counts)
            else:
                o = context_attention(q, k, v, *cached, causal=ctx.kind == "verify")
            if ctx.pending is not None:
                ctx.pending.kv[self.layer] = k, v
        elif (clean := ctx.clean) is not None:  # noisy blocks [B * N / S, S] as rows [B, N] beside the clean ones
            k_clean, v_clean = clean.kv[self.layer]
            q, k, v = (t.reshape(*k_clean.shape[:2], *t.shape[2:]) for t in (q, k, v))
            o = block_diffusion_attention(
                q, k, v, k_clean, v_clean, block_size=clean.block_size, cu_seqlens=clean.cu_seqlens
            )
        else:
            o = causal_attention(q, k, v, cu_seqlens=ctx.cu_seqlens)
            if ctx.keep is not None:
                ctx.keep.kv[self.layer] = k, v
        return self.o_proj(o.reshape(*h_BLD.shape[:2], -1))


def join_projections(model: nn.Module, kept: Collection[nn.Parameter] = ()) -> None:
    """After parameters were made anew one by one: q, k and v of each attention layer side by side again, but where all
    of them are among those that were kept, whose addresses stay."""
    ids = set(map(id, kept))
    for module in model.modules():
        if isinstance(module, Attention) and not ids.issuperset(map(id, module.parameters())):
            module.join()
