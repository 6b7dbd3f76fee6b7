"""The checkpoint and the pieces of a layer, for the vectors of one token."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

Cache = list[dict[str, Tensor]]


class Model(NamedTuple):
    config: dict
    weights: dict[str, Tensor]  # fp64, by the key of the checkpoint
    dtype: torch.dtype  # the checkpoint's: what the time embedding is rounded to


def load(folder: str | Path) -> Model:
    """Read a checkpoint folder: config.json and every shard that the index names."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    shards = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    weights = {}
    for name in sorted(set(shards.values())):
        with safe_open(folder / name, "pt") as shard:
            for key in shard.keys():  # noqa: SIM118 - a safe_open cannot be iterated
                weights[key] = shard.get_tensor(key).double()
    assert weights.keys() == shards.keys(), "the shards do not hold what the index says"
    assert len(config["hybrid_override_pattern"]) == config["num_hidden_layers"]
    assert config.get("mlp_hidden_act", "relu2") == "relu2" and config.get("mamba_hidden_act", "silu") == "silu"
    assert not config.get("tie_word_embeddings", False)
    return Model(config, weights, getattr(torch, config["torch_dtype"]))


# Pieces of a layer. `name` is the beginning of the keys of a mixer's weights; h and x are the vectors of one token.


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def relu2(x: Tensor) -> Tensor:
    return x.clamp(min=0) ** 2


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x.abs())) + x.clamp(min=0)


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max())
    return e / e.sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean() + eps) * weight


def linear(model: Model, name: str, x: Tensor, bias: bool = False) -> Tensor:
    y = model.weights[f"{name}.weight"] @ x
    return y + model.weights[f"{name}.bias"] if bias else y


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def conv_step(conv_state: Tensor, column: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token through the causal depthwise convolution (before its activation): (output [C], next state)."""
    conv_state = torch.cat([conv_state[:, 1:], column[:, None]], dim=1)
    out = (conv_state * weight[:, 0, :]).sum(dim=1)
    return (out if bias is None else out + bias), conv_state


def ssd_step(
    ssm_state: Tensor, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """One token through the recurrence: x [H, P], B and C [G, N], dt, A and D [H] -> y [H, P], next state [H, P, N]."""
    heads, groups = len(dt), len(B)
    y, new_state = torch.zeros_like(x), torch.zeros_like(ssm_state)
    for head in range(heads):
        group = head // (heads // groups)
        decayed = torch.exp(dt[head] * A[head]) * ssm_state[head]
        new_state[head] = decayed + dt[head] * torch.outer(x[head], B[group])
        y[head] = new_state[head] @ C[group] + D[head] * x[head]
    return y, new_state


def mamba_step(model: Model, name: str, h: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """One token through a Mamba-2 mixer: (output [D], next state)."""
    config, w = model.config, model.weights
    heads, head_dim = config["mamba_num_heads"], config["mamba_head_dim"]
    groups, n = config["n_groups"], config["ssm_state_size"]
    inner = heads * head_dim

    projected = linear(model, f"{name}.in_proj", h, config.get("use_bias", False))
    z, xBC, dt = projected.split([inner, inner + 2 * groups * n, heads])
    conv_bias = w[f"{name}.conv1d.bias"] if config["use_conv_bias"] else None
    xBC, conv_state = conv_step(state["conv_state"], xBC, w[f"{name}.conv1d.weight"], conv_bias)
    x, B, C = silu(xBC).split([inner, groups * n, groups * n])
    low, high = config["time_step_limit"]
    dt = softplus(dt + w[f"{name}.dt_bias"]).clamp(low, high)
    A = -torch.exp(w[f"{name}.A_log"])
    y, ssm_state = ssd_step(
        state["ssm_state"], x.view(heads, head_dim), B.view(groups, n), C.view(groups, n), dt, A, w[f"{name}.D"]
    )

    gated = y.reshape(inner) * silu(z)
    normed = torch.zeros_like(gated)
    width = inner // groups
    for group in range(groups):
        part = slice(group * width, (group + 1) * width)
        normed[part] = rms_norm(gated[part], w[f"{name}.norm.weight"][part], config["layer_norm_epsilon"])
    out = linear(model, f"{name}.out_proj", normed, config.get("use_bias", False))
    return out, {"conv_state": conv_state, "ssm_state": ssm_state}


def key_value(model: Model, name: str, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token's key and value, each [kv heads, head_dim]."""
    shape = model.config["num_key_value_heads"], model.config["head_dim"]
    bias = model.config.get("attention_bias", False)
    return linear(model, f"{name}.k_proj", h, bias).view(shape), linear(model, f"{name}.v_proj", h, bias).view(shape)


def append_key_value(state: dict[str, Tensor], key: Tensor, value: Tensor) -> dict[str, Tensor]:
    return {
        "key": torch.cat([state["key"], key[:, None]], dim=1),
        "value": torch.cat([state["value"], value[:, None]], dim=1),
    }


def attention(model: Model, name: str, h: Tensor, state: dict[str, Tensor]) -> Tensor:
    """One query token over all the keys and values in `state`: output [D]."""
    config = model.config
    heads, kv_heads, head_dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    bias = config.get("attention_bias", False)
    q = linear(model, f"{name}.q_proj", h, bias).view(heads, head_dim)
    out = torch.zeros_like(q)
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        weights = softmax(state["key"][kv_head] @ q[head] / math.sqrt(head_dim))
        out[head] = weights @ state["value"][kv_head]
    return linear(model, f"{name}.o_proj", out.reshape(heads * head_dim), bias)


def top(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest, largest first; of equals the first."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]


def route(model: Model, name: str, h: Tensor) -> list[tuple[int, float]]:
    """The experts of one token and their weights."""
    config, w = model.config, model.weights
    logits = w[f"{name}.gate.weight"] @ h
    scores = (1 / (1 + torch.exp(-logits))).tolist()
    biased = [s + b for s, b in zip(scores, w[f"{name}.gate.e_score_correction_bias"].tolist(), strict=True)]
    groups = config.get("n_group", 1)
    if groups > 1:
        size = len(biased) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        group_scores = [sum(sorted(biased[e] for e in experts)[-2:]) for experts in members]
        kept = top(group_scores, config["topk_group"])
        biased = [score if e // size in kept else 0.0 for e, score in enumerate(biased)]
    chosen = top(biased, config["num_experts_per_tok"])
    weights = [scores[e] for e in chosen]
    if config["norm_topk_prob"]:
        total = sum(weights) + 1e-20
        weights = [weight / total for weight in weights]
    return [(e, weight * config["routed_scaling_factor"]) for e, weight in zip(chosen, weights, strict=True)]


def mlp(model: Model, name: str, h: Tensor) -> Tensor:
    bias = model.config.get("mlp_bias", False)
    return linear(model, f"{name}.down_proj", relu2(linear(model, f"{name}.up_proj", h, bias)), bias)


def experts(model: Model, name: str, h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    for expert, weight in route(model, name, h):
        out += weight * mlp(model, f"{name}.experts.{expert}", h)
    if model.config.get("n_shared_experts", 1):
        out += mlp(model, f"{name}.shared_experts", h)
    return out
