"""A stand-in for the published TwoTower's remote code: structure, attributes, methods and parameters of its classes, in
plain PyTorch, token by token. It takes the golden checkpoints and is held to their numbers.

What is not needed to prefill, denoise and commit is left out: `generate`, caches of transformers, dropout.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RemoteRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.to(torch.float32) * x).to(hidden_states.dtype)


class RemoteRMSNormGated(nn.Module):
    def __init__(self, size: int, group_size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.group_size = nn.Parameter(torch.ones(size)), eps, group_size

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        x = (hidden_states * F.silu(gate)).unflatten(-1, (-1, self.group_size))
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return x.flatten(-2) * self.weight


class Mamba2(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.ssm_state_size = c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size
        self.n_groups, self.conv_kernel_size, self.chunk_size = c.n_groups, c.conv_kernel, c.chunk_size
        self.activation, self.intermediate_size = c.mamba_hidden_act, c.mamba_num_heads * c.mamba_head_dim
        self.conv_dim = self.intermediate_size + 2 * self.n_groups * self.ssm_state_size
        self.in_proj = nn.Linear(c.hidden_size, self.intermediate_size + self.conv_dim + self.num_heads, bias=False)
        options = dict(groups=self.conv_dim, padding=c.conv_kernel - 1, bias=c.use_conv_bias)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, c.conv_kernel, **options)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(self.num_heads)) for _ in range(3))
        group_size = self.intermediate_size // c.n_groups
        self.norm = RemoteRMSNormGated(self.intermediate_size, group_size, c.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.intermediate_size, c.hidden_size, bias=False)


class Attention(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.num_key_value_groups, self.is_causal = c.num_attention_heads // c.num_key_value_heads, True
        self.attention_dropout = 0.0
        self.q_proj = nn.Linear(c.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj, self.v_proj = (
            nn.Linear(c.hidden_size, self.num_key_value_heads * self.head_dim, bias=False) for _ in range(2)
        )
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, c.hidden_size, bias=False)

    def forward(self, hidden: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Causal, on a cache [B, Hkv, S, P] that it extends."""
        L, S = hidden.shape[1], past[0].shape[2]
        q, k, v = project(self, hidden)
        k, v = (torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True))
        seen = torch.ones(L, S + L, dtype=torch.bool, device=q.device).tril(S)
        return attend(self, q, k, v, seen), (k, v)


def project(mixer: Any, hidden: Tensor) -> list[Tensor]:
    split = lambda x: x.unflatten(-1, (-1, mixer.head_dim)).transpose(1, 2)
    return [split(p(hidden)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]


def attend(mixer: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    k, v = (t.repeat_interleave(mixer.num_key_value_groups, 1) for t in (k, v))
    return mixer.o_proj(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))


class ReLUSquaredActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class MLP(nn.Module):
    def __init__(self, c: Any, size: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (
            nn.Linear(*sizes, bias=False) for sizes in ((c.hidden_size, size), (size, c.hidden_size))
        )
        self.act_fn = ReLUSquaredActivation()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class TopkRouter(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.config, self.weight = c, nn.Parameter(torch.empty(c.n_routed_experts, c.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.n_routed_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [..., D] -> ids and weights [tokens, K]."""
        c = self.config
        scores = F.linear(hidden_states.flatten(0, -2), self.weight).sigmoid()
        biased = (scores + self.e_score_correction_bias).unflatten(-1, (c.n_group, -1))
        kept = biased.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
        mask = torch.zeros_like(biased[..., 0]).scatter(1, kept, 1).unsqueeze(-1)
        topk_indices = torch.where(mask > 0, biased, 0).flatten(1).topk(c.num_experts_per_tok, -1).indices
        topk_weights = scores.gather(1, topk_indices)
        if c.norm_topk_prob:
            topk_weights = topk_weights / (topk_weights.sum(-1, keepdim=True) + 1e-20)
        return topk_indices, topk_weights * c.routed_scaling_factor


class MOE(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList(MLP(c, c.moe_intermediate_size) for _ in range(c.n_routed_experts))
        self.gate, self.shared_experts = TopkRouter(c), MLP(c, c.moe_shared_expert_intermediate_size)

    def moe(self, hidden_states: Tensor, topk_indices: Tensor, topk_weights: Tensor) -> Tensor:
        dense = (
            torch.zeros_like(topk_weights[:, :1]).repeat(1, len(self.experts)).scatter(1, topk_indices, topk_weights)
        )
        terms = [expert(hidden_states) * dense[:, i, None] for i, expert in enumerate(self.experts)]
        return torch.stack(terms).sum(0)

    def forward(self, hidden_states: Tensor) -> Tensor:
        ids, weights = self.gate(hidden_states)
        routed = self.moe(hidden_states.flatten(0, -2), ids, weights).view(hidden_states.shape)
        return routed + self.shared_experts(hidden_states)


class Block(nn.Module):
    def __init__(self, c: Any, letter: str) -> None:
        super().__init__()
        self.residual_in_fp32, self.norm = c.residual_in_fp32, RemoteRMSNorm(c.hidden_size, c.layer_norm_epsilon)
        self.block_type = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}[letter]
        makers = dict(mamba=Mamba2, attention=Attention, moe=MOE, mlp=lambda c: MLP(c, c.intermediate_size))
        self.mixer = makers[self.block_type](c)


class Tower(nn.Module):
    def __init__(self, c: Any) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, letter) for letter in c.hybrid_override_pattern)
        self.norm_f = RemoteRMSNorm(c.hidden_size, c.layer_norm_epsilon)


class TimestepEmbedder(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, size), nn.SiLU(), nn.Linear(size, size))

    def forward(self, t: Tensor) -> Tensor:
        angles = 1000 * t[:, None].float() * torch.exp(-torch.arange(128) / 128 * torch.tensor(10000.0).log())
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(t.dtype))


class TwoTowerStandIn(nn.Module):
    """config: a golden config.json's values."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        c = self.config = SimpleNamespace(**config)
        self.context_tower, self.denoiser_tower = Tower(c), Tower(c)
        self.context_lm_head, self.lm_head = (nn.Linear(c.hidden_size, c.vocab_size, bias=False) for _ in range(2))
        self.t_embedder = TimestepEmbedder(c.hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(c.hidden_size, 3 * c.hidden_size))
        self.scale_shift_tables = nn.ParameterList(torch.zeros(3, c.hidden_size) for _ in self.context_tower.layers)

    def _denoiser_block_attention(self, mixer: Any, hidden: Tensor, ctx_k: Tensor, ctx_v: Tensor) -> Tensor:
        q, k, v = project(mixer, hidden)
        return attend(mixer, q, torch.cat([ctx_k, k], 2), torch.cat([ctx_v, v], 2), None)

    def _denoiser_block_mamba(
        self,
        mixer: Any,
        hidden: Tensor,
        init_conv: Tensor | None,
        init_ssm: Tensor | None,
        return_states: bool = False,
    ) -> Any:
        B, L, K, H = *hidden.shape[:2], mixer.conv_kernel_size, mixer.num_heads
        z, xBC, dt = mixer.in_proj(hidden).split([mixer.intermediate_size, mixer.conv_dim, H], -1)
        before = xBC.new_zeros(B, K - 1, mixer.conv_dim) if init_conv is None else init_conv.mT
        columns = torch.cat([before, xBC], 1)
        taps = mixer.conv1d.weight.squeeze(1).mT
        bias = 0 if mixer.conv1d.bias is None else mixer.conv1d.bias
        convolved = F.silu(torch.stack([(columns[:, t : t + K] * taps).sum(1) for t in range(L)], 1) + bias)
        GN = mixer.n_groups * mixer.ssm_state_size
        x, b, c = convolved.split([mixer.intermediate_size, GN, GN], -1)
        x = x.unflatten(-1, (H, mixer.head_dim))
        b, c = (t.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(H // mixer.n_groups, 2) for t in (b, c))
        dt, A = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp()
        sizes = (B, H, mixer.head_dim, mixer.ssm_state_size)
        state, y = xBC.new_zeros(sizes) if init_ssm is None else init_ssm, []
        for t in range(L):
            step = dt[:, t, :, None, None]
            state = (step * A[:, None, None]).exp() * state + step * x[:, t, ..., None] * b[:, t, :, None]
            y.append((state * c[:, t, :, None]).sum(-1) + mixer.D[:, None] * x[:, t])
        out = mixer.out_proj(mixer.norm(torch.stack(y, 1).flatten(2), z))
        # A cache keeps K columns, the oldest of which the next token does not read.
        return (out, F.pad(columns, (0, 0, 1, 0))[:, -K:].mT, state) if return_states else out

    def empty_cache(self, batch: int) -> list[Any]:
        """What the context has of every layer: (conv, ssm), (keys, values) or None."""
        layers, like = self.context_tower.layers, self.lm_head.weight
        empty = lambda m: like.new_zeros(batch, m.num_key_value_heads, 0, m.head_dim)
        kinds = {"mamba": lambda m: (None, None), "attention": lambda m: (empty(m), empty(m))}
        return [kinds.get(block.block_type, lambda m: None)(block.mixer) for block in layers]

    def extend_context(self, tokens: Tensor, cache: list[Any]) -> Tensor:
        """The context tower over [B, L] tokens: logits [B, L, V]; they enter the cache."""
        hidden = self.context_tower.embeddings(tokens)
        for i, block in enumerate(self.context_tower.layers):
            h = block.norm(hidden)
            if block.block_type == "mamba":
                conv, ssm = cache[i]
                last = None if conv is None else conv[..., 1:]
                h, *states = self._denoiser_block_mamba(block.mixer, h, last, ssm, return_states=True)
                cache[i] = tuple(states)
            elif block.block_type == "attention":
                h, cache[i] = block.mixer(h, cache[i])
            else:
                h = block.mixer(h)
            hidden = hidden + h
        return self.context_lm_head(self.context_tower.norm_f(hidden))

    def denoise(self, block_ids: Tensor, t: Tensor, cache: list[Any]) -> Tensor:
        """The denoiser over a block [B, L] at times [B]: logits [B, L, V]; the cache is only read."""
        time, hidden = self.t_block(self.t_embedder(t)), self.denoiser_tower.embeddings(block_ids)
        for i, block in enumerate(self.denoiser_tower.layers):
            shift, scale, gate = (self.scale_shift_tables[i] + time.unflatten(-1, (3, -1))).unsqueeze(2).unbind(1)
            modulate = lambda x, scale=scale, shift=shift: x * (1 + scale) + shift
            if block.block_type == "mamba":
                conv, ssm = cache[i]
                h = self._denoiser_block_mamba(block.mixer, block.norm(modulate(hidden)), conv[..., 1:], ssm)
            elif block.block_type == "attention":
                h = self._denoiser_block_attention(block.mixer, block.norm(modulate(hidden)), *cache[i])
            else:
                h = block.mixer(modulate(block.norm(hidden)))
            hidden = hidden + gate * h
        return self.lm_head(self.denoiser_tower.norm_f(hidden))
