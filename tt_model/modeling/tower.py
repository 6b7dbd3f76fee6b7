"""One tower: embedding, pre-norm residual layers with one mixer each, final norm; and the four ways to walk it.

A *pass* says what the mixers of a walk see: `ContextPass` tokens that follow a cache, `BlockPass` a noisy block on a
cache, `CleanPass` whole clean sequences, `NoisyPass` all noisy blocks of those sequences at once.
B batch, L tokens of a row, S block size, N tokens of a training row, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tt_kernels import (
    append_attention,
    block_diffusion_attention,
    causal_attention,
    context_attention,
    modulated_rms_norm,
    skip_checks,
)

from ..config import TwoTowerConfig
from .attention import Attention
from .mamba2 import Mamba2
from .moe import MLP, MoE
from .state import Cache, Pending


def make_mixer(kind: str, config: TwoTowerConfig) -> nn.Module:
    """The mixer that a letter of the pattern stands for."""
    if kind == "-":
        return MLP(config.hidden_size, config.intermediate_size, config.mlp_hidden_act, bias=config.mlp_bias)
    return {"M": Mamba2, "*": Attention, "E": MoE}[kind](config)


class Norm(nn.Module):
    """The weight of an RMSNorm; the op that uses it also adds the previous branch."""

    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))


class Layer(nn.Module):
    def __init__(self, kind: str, config: TwoTowerConfig):
        super().__init__()
        self.order = "modulate_norm" if kind in "M*" else "norm_modulate"
        self.norm = Norm(config.hidden_size)
        self.mixer = make_mixer(kind, config)


class Tower(nn.Module):
    """A copy of the backbone. Its parameters bear the published names."""

    def __init__(self, config: TwoTowerConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(kind, config) for kind in config.pattern)
        self.norm_f = Norm(config.hidden_size)

    def forward(self, ids_BL: Tensor, walk: Pass, modulation: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] after the final norm. modulation: [layers, 3, B, D] (shift, scale, gate) or None."""
        with skip_checks():
            return self._walk(ids_BL, walk, modulation)

    def _walk(self, ids_BL: Tensor, walk: Pass, modulation: Tensor | None) -> Tensor:
        eps = self.config.layer_norm_epsilon
        x = self.embeddings(ids_BL)
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        branch = gate = None
        for i, layer in enumerate(self.layers):
            shift, scale, next_gate = (None, None, None) if modulation is None else modulation[i].unbind(0)
            h, x = modulated_rms_norm(
                x, layer.norm.weight, shift, scale, branch=branch, gate=gate, order=layer.order, eps=eps
            )
            branch, gate = walk.mix(i, layer.mixer, h), next_gate
        return modulated_rms_norm(x, self.norm_f.weight, branch=branch, gate=gate, eps=eps)[0]


class Pass:
    """What the mixers of one walk through a tower see."""

    def mix(self, i: int, mixer: nn.Module, h: Tensor) -> Tensor:
        if isinstance(mixer, Attention):
            return self.attention(i, mixer, h)
        if isinstance(mixer, Mamba2):
            return self.mamba(i, mixer, h)
        return mixer(h)

    def attention(self, i: int, mixer: Attention, h: Tensor) -> Tensor:
        raise NotImplementedError

    def mamba(self, i: int, mixer: Mamba2, h: Tensor) -> Tensor:
        raise NotImplementedError


class ContextPass(Pass):
    """L clean tokens after the cache, causally. With `write` the first counts[b] of row b enter the cache as the pass
    goes; without, `pending` keeps what `Cache.advance` needs."""

    def __init__(self, cache: Cache, L: int, counts: Tensor | None = None, *, write: bool):
        self.cache, self.counts, self.write = cache, counts, write
        self.pending = Pending()
        if write:
            cache.reserve(cache.longest + L)

    def attention(self, i: int, mixer: Attention, h: Tensor) -> Tensor:
        c = self.cache
        q, k, v = (t.to(c.keys[i].dtype) for t in mixer.qkv(h))  # autocast may be another than at prefill
        cached = c.keys[i], c.values[i], c.page_table, c.lengths
        if self.write:
            return mixer.out(append_attention(q, k, v, *cached, self.counts))
        self.pending.kv[i] = k, v
        return mixer.out(context_attention(q, k, v, *cached, causal=True))

    def mamba(self, i: int, mixer: Mamba2, h: Tensor) -> Tensor:
        c = self.cache
        y, projected, states = mixer(h, c.conv[i], c.ssm[i], self.counts, advance=self.write)
        if self.write:
            c.conv[i], c.ssm[i] = states
        else:
            self.pending.states[i] = mixer, projected
        return y


class BlockPass(Pass):
    """A block of noisy tokens: attention both ways inside it and to the whole cache, Mamba from the cache's states."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def attention(self, i: int, mixer: Attention, h: Tensor) -> Tensor:
        c = self.cache
        q, k, v = (t.to(c.keys[i].dtype) for t in mixer.qkv(h))
        return mixer.out(context_attention(q, k, v, c.keys[i], c.values[i], c.page_table, c.lengths))

    def mamba(self, i: int, mixer: Mamba2, h: Tensor) -> Tensor:
        return mixer(h, self.cache.conv[i], self.cache.ssm[i])[0]


class CleanPass(Pass):
    """Whole sequences from nothing. With a block size it keeps, for `NoisyPass`, K/V and the states before blocks."""

    def __init__(self, cu_seqlens: Tensor | None = None, block_size: int | None = None):
        self.cu_seqlens, self.block_size = cu_seqlens, block_size
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # [B, N, Hkv, P]
        self.states: dict[int, tuple[Tensor, Tensor]] = {}  # [B, N / S, C, K], [B, N / S, H, P, N]

    def attention(self, i: int, mixer: Attention, h: Tensor) -> Tensor:
        q, k, v = mixer.qkv(h)
        if self.block_size is not None:
            self.kv[i] = k, v
        return mixer.out(causal_attention(q, k, v, cu_seqlens=self.cu_seqlens))

    def mamba(self, i: int, mixer: Mamba2, h: Tensor) -> Tensor:
        y, states = mixer.encode(h, self.cu_seqlens, self.block_size)
        if states is not None:
            self.states[i] = states
        return y


class NoisyPass(Pass):
    """All noisy blocks at once, as a batch of blocks [B * N / S, S]: each on the clean blocks before it and itself."""

    def __init__(self, clean: CleanPass, batch: int):
        self.clean, self.batch = clean, batch

    def attention(self, i: int, mixer: Attention, h: Tensor) -> Tensor:
        q, k, v = (t.unflatten(0, (self.batch, -1)).flatten(1, 2) for t in mixer.qkv(h))  # [B, N, ...]
        c = self.clean
        o = block_diffusion_attention(q, k, v, *c.kv[i], block_size=c.block_size, cu_seqlens=c.cu_seqlens)
        return mixer.out(o.reshape(*h.shape[:2], *o.shape[2:]))

    def mamba(self, i: int, mixer: Mamba2, h: Tensor) -> Tensor:
        conv, ssm = self.clean.states[i]
        return mixer(h, conv.flatten(0, 1), ssm.flatten(0, 1))[0]
