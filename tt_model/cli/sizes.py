"""How large a model is and how many bytes its passes must move, from its config alone.

E experts of which k are chosen per token, T tokens of a pass. Bytes count each weight, K/V entry and state once per
pass, so a time made from them is a lower bound: no arithmetic, no activations, no launches.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import TwoTowerConfig


@dataclass(frozen=True)
class Format:
    """What weights are stored as, in bits per weight, scales included; K/V and convolution states are as `other`."""

    name: str
    other: int  # all but the routed experts
    experts: float


FORMATS = (
    Format("fp32", 32, 32),
    Format("bf16", 16, 16),
    Format("fp8 experts", 16, 8),  # a scale per output channel: below 0.1 %, not counted
    Format("fp4 experts", 16, 4 + 8 / 32),  # 8-bit scales of 32 weights
)
PASSES = ("AR step", "denoiser pass", "commit pass")


def parameters(c: TwoTowerConfig) -> dict[str, int]:
    """Parameters of one tower and its head, by part."""
    D, H, inner, conv = c.hidden_size, c.mamba_num_heads, c.d_inner, c.conv_dim
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    E = c.n_routed_experts

    projections = D * (inner + conv + H) + inner * D + c.use_bias * (inner + conv + H + D)
    mamba = projections + conv * (c.conv_kernel + c.use_conv_bias) + 3 * H + inner
    attention = 2 * D * (q + kv) + c.attention_bias * (q + 2 * kv + D)
    mlp = 2 * D * c.intermediate_size + c.mlp_bias * (c.intermediate_size + D)
    layers = {kind: len(c.layers_of(kind)) for kind in "M*E-"}
    return {
        "embeddings": c.vocab_size * D,
        "Mamba-2": layers["M"] * mamba,
        "attention": layers["*"] * attention,
        "routed experts": layers["E"] * E * 2 * D * c.moe_intermediate_size,
        "shared experts": layers["E"] * 2 * D * c.moe_shared_expert_intermediate_size,
        "router": layers["E"] * (E * D + E),
        "dense MLP": layers["-"] * mlp,
        "norms": (c.num_hidden_layers + 1) * D,
        "head": c.vocab_size * D,
    }


def time_modules(c: TwoTowerConfig) -> int:
    """Parameters that only the denoiser has: time embedder, modulation, and a table per layer."""
    D = c.hidden_size
    return (c.time_embedding_size * D + D) + (D * D + D) + (D * 3 * D + 3 * D) + c.num_hidden_layers * 3 * D


def active_parameters(c: TwoTowerConfig) -> dict[str, int]:
    """Those of `parameters` that one token uses; the embedding table counts as whole, as is customary."""
    active = parameters(c)
    if c.n_routed_experts:
        active["routed experts"] = active["routed experts"] * c.num_experts_per_tok // c.n_routed_experts
    return active


def fp32_parameters(c: TwoTowerConfig) -> int:
    """Those of one tower that are fp32 in any format: decay, skip and time steps of the scan, and the router."""
    return len(c.layers_of("M")) * 3 * c.mamba_num_heads + parameters(c)["router"]


def tower_bytes(c: TwoTowerConfig, f: Format, *, denoiser: bool = False) -> float:
    """Bytes of one tower's weights, its head and, for the denoiser, the time modules."""
    count, kept = parameters(c), fp32_parameters(c)
    others = sum(count.values()) - count["routed experts"] - kept + (time_modules(c) if denoiser else 0)
    return (others * f.other + count["routed experts"] * f.experts + kept * 32) / 8


def kv_bytes(c: TwoTowerConfig, f: Format) -> float:
    """Bytes of K/V cache per token of context."""
    return len(c.layers_of("*")) * 2 * c.num_key_value_heads * c.head_dim * f.other / 8


def state_bytes(c: TwoTowerConfig, f: Format, *, planes: int = 1) -> float:
    """Bytes of Mamba states per sequence: the convolution's columns, of which memory holds two planes, and the fp32
    scan state."""
    ssm = c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
    return len(c.layers_of("M")) * (planes * c.conv_dim * c.conv_kernel * f.other + ssm * 32) / 8


def distinct_experts(c: TwoTowerConfig, tokens: int) -> float:
    """Experts that a layer is expected to use for so many tokens, E (1 - (1 - k / E)^T): routing that is uniform and
    independent from token to token, the worst case. Real tokens agree more and need fewer."""
    E, k = c.n_routed_experts, c.num_experts_per_tok
    return E * (1 - (1 - k / E) ** tokens) if E else 0.0


def pass_bytes(c: TwoTowerConfig, f: Format, kind: str, *, batch: int, context: int) -> dict[str, float]:
    """Bytes that one pass over `batch` sequences of `context` tokens must move, by what they are.

    An AR step takes one token a sequence through the context tower; a denoiser pass a block through the denoiser, which
    only reads the cache; a commit pass a block through the context tower, without its head.
    """
    tokens = batch * (1 if kind == "AR step" else c.block_size)
    count, width = parameters(c), f.other / 8
    experts = count["routed experts"] * f.experts / 8
    weights = tower_bytes(c, f, denoiser=kind == "denoiser pass") - experts - count["embeddings"] * width
    weights += tokens * c.hidden_size * width  # the rows of the embedding table
    if kind == "commit pass":
        weights -= count["head"] * width
    share = distinct_experts(c, tokens) / c.n_routed_experts if c.n_routed_experts else 0
    writes = kind != "denoiser pass"
    return {
        "experts": experts * share,
        "other weights": weights,
        "K/V": kv_bytes(c, f) * (batch * context + writes * tokens),
        "states": state_bytes(c, f) * batch * (1 + writes),
    }


def break_even(c: TwoTowerConfig, f: Format, *, batch: int, context: int) -> float | None:
    """Tokens per denoiser pass at which a block costs the bytes of as many AR steps; None: not at any number.

    A block of S tokens takes S / r denoiser passes at r tokens per pass, and a commit pass.
    """
    ar, denoise, commit = (sum(pass_bytes(c, f, p, batch=batch, context=context).values()) for p in PASSES)
    left = c.block_size * ar - commit
    return c.block_size * denoise / left if left > 0 else None
