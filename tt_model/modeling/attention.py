"""Grouped-query attention without position encoding. B batch, L tokens, D hidden, H heads, P head size."""

from torch import Tensor, nn

from ..config import TwoTowerConfig


class Attention(nn.Module):
    """The projections of an attention layer; who attends to what is the pass's business (tower.py)."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        D, P, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = P
        self.q_proj = nn.Linear(D, config.num_attention_heads * P, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * P, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * P, D, bias=bias)

    def qkv(self, h_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, L, Hq, P], k and v [B, L, Hkv, P]."""
        q, k, v = self.q_proj(h_BLD), self.k_proj(h_BLD), self.v_proj(h_BLD)
        return tuple(t.view(*t.shape[:2], -1, self.head_dim) for t in (q, k, v))

    def out(self, o_BLHP: Tensor) -> Tensor:
        return self.o_proj(o_BLHP.flatten(2))
