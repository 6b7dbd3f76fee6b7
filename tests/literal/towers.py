"""The context tower token by token, and the denoiser on a block."""

import math

import torch
from torch import Tensor

from .layers import (
    Cache,
    Model,
    append_key_value,
    attention,
    experts,
    key_value,
    linear,
    mamba_step,
    mlp,
    modulate,
    rms_norm,
    silu,
)


def empty_cache(model: Model) -> Cache:
    config = model.config
    inner = config["mamba_num_heads"] * config["mamba_head_dim"]
    channels = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    cache: Cache = []
    for kind in config["hybrid_override_pattern"]:
        if kind == "M":
            shape = config["mamba_num_heads"], config["mamba_head_dim"], config["ssm_state_size"]
            conv_state = torch.zeros(channels, config["conv_kernel"], dtype=torch.float64)
            cache.append({"conv_state": conv_state, "ssm_state": torch.zeros(shape, dtype=torch.float64)})
        elif kind == "*":
            nothing = torch.zeros(config["num_key_value_heads"], 0, config["head_dim"], dtype=torch.float64)
            cache.append({"key": nothing, "value": nothing})
        else:
            cache.append({})
    return cache


def context_forward(model: Model, tokens: list[int], cache: Cache | None = None) -> tuple[Tensor, Cache]:
    """The context tower over `tokens` after `cache`: (logits [tokens, V], the cache that has these tokens too)."""
    w, eps = model.weights, model.config["layer_norm_epsilon"]
    cache = list(cache or empty_cache(model))
    logits = []
    for token in tokens:
        x = w["context_tower.embeddings.weight"][token]
        for i, kind in enumerate(model.config["hybrid_override_pattern"]):
            name = f"context_tower.layers.{i}.mixer"
            h = rms_norm(x, w[f"context_tower.layers.{i}.norm.weight"], eps)
            if kind == "M":
                y, cache[i] = mamba_step(model, name, h, cache[i])
            elif kind == "*":
                cache[i] = append_key_value(cache[i], *key_value(model, name, h))
                y = attention(model, name, h, cache[i])
            else:
                y = experts(model, name, h) if kind == "E" else mlp(model, name, h)
            x = x + y
        logits.append(linear(model, "context_lm_head", rms_norm(x, w["context_tower.norm_f.weight"], eps)))
    return torch.stack(logits), cache


def time_embedding(model: Model, t: float) -> Tensor:
    """The time embedding e: t, 1000 t and e rounded to the model's dtype, f and the angles to fp32.

    These roundings are the model's: at an angle of 1000 fp32 resolves 6e-5, and the logits show it.
    """
    half = model.weights["t_embedder.mlp.0.weight"].shape[1] // 2
    t_rounded = torch.tensor(t, dtype=torch.float64).to(model.dtype)
    angle_at_1 = (1000 * t_rounded).float()
    f = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = angle_at_1 * f
    return torch.cat([torch.cos(angles), torch.sin(angles)]).to(model.dtype).double()


def time_conditioning(model: Model, t: float | None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(shift, scale, gate) of every layer, each [D]; without t: no shift, no scale, gate 1, and no table."""
    layers, hidden = model.config["num_hidden_layers"], model.config["hidden_size"]
    if t is None:
        zero = torch.zeros(hidden, dtype=torch.float64)
        return [(zero, zero, zero + 1)] * layers
    embedded = linear(model, "t_embedder.mlp.0", time_embedding(model, t), bias=True)
    embedded = linear(model, "t_embedder.mlp.2", silu(embedded), bias=True)
    common = linear(model, "t_block.1", silu(embedded), bias=True).view(3, hidden)
    tables = [model.weights[f"scale_shift_tables.{i}"] + common for i in range(layers)]
    return [(table[0], table[1], table[2]) for table in tables]


def denoise(model: Model, block: list[int], t: float | None, cache: Cache) -> Tensor:
    """The denoiser tower over a block after `cache`, which is not changed: logits [block, V]. t None: mock-AR."""
    w, eps = model.weights, model.config["layer_norm_epsilon"]
    conditioning = time_conditioning(model, t)
    xs = [w["denoiser_tower.embeddings.weight"][token] for token in block]
    for i, kind in enumerate(model.config["hybrid_override_pattern"]):
        name, norm = f"denoiser_tower.layers.{i}.mixer", w[f"denoiser_tower.layers.{i}.norm.weight"]
        shift, scale, gate = conditioning[i]
        if kind in "M*":
            hs = [rms_norm(modulate(x, shift, scale), norm, eps) for x in xs]
        else:
            hs = [modulate(rms_norm(x, norm, eps), shift, scale) for x in xs]
        state, ys = cache[i], []
        if kind == "M":
            for h in hs:
                y, state = mamba_step(model, name, h, state)
                ys.append(y)
        elif kind == "*":
            for h in hs:
                state = append_key_value(state, *key_value(model, name, h))
            ys = [attention(model, name, h, state) for h in hs]
        else:
            ys = [experts(model, name, h) if kind == "E" else mlp(model, name, h) for h in hs]
        xs = [x + gate * y for x, y in zip(xs, ys, strict=True)]
    return torch.stack([linear(model, "lm_head", rms_norm(x, w["denoiser_tower.norm_f.weight"], eps)) for x in xs])
