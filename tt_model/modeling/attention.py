"""Grouped-query attention without position encoding.

B batch, L tokens, D hidden, H heads, P head size, S block size, N tokens of a training row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tt_kernels import append_attention, block_diffusion_attention, causal_attention, context_attention

from ..config import TwoTowerConfig
from .constants import Constant
from .linear import Linear, product
from .state import ForwardContext


def _joined(*projections: Tensor) -> Tensor:
    return torch.cat(projections)


class Attention(nn.Module):
    """Projections, and attention to what the walk through the tower sees."""

    def __init__(self, config: TwoTowerConfig, layer: int):
        super().__init__()
        D, P, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.layer, self.head_dim = layer, P
        self.q_proj = nn.Linear(D, config.num_attention_heads * P, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * P, D, bias=bias)
        self.qkv_weight, self.qkv_bias = Constant(_joined), Constant(_joined)

    def _project(self, h_BLD: Tensor) -> Sequence[Tensor]:
        """q, k and v: one product where no gradients are wanted."""
        projections = self.q_proj, self.k_proj, self.v_proj
        # Whatever was put in a projection's place or hooked to it is called. Autocast keeps parameters that it has
        # cast, but not what is made of them.
        plain = all(type(p) is nn.Linear and not p._forward_hooks and not p._forward_pre_hooks for p in projections)
        together = plain and not torch._C._is_any_autocast_enabled()
        weight = self.qkv_weight.kept(*(p.weight for p in projections)) if together else None
        if weight is None:
            return [p(h_BLD) for p in projections]
        bias = None if projections[0].bias is None else self.qkv_bias(*(p.bias for p in projections))
        return product(h_BLD, weight, bias).split_with_sizes([p.out_features for p in projections], -1)

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
