"""The model written out token by token in fp64: the independent check of the fast reference implementation.

Naive on purpose. One sequence, no batch; loops over tokens, heads and experts; nothing of tt_kernels or tt_model. It
follows the paper and the published implementation step by step, so that they can be compared by reading.

All arithmetic is fp64, but for the roundings of the time embedding, which are part of the model (`time_embedding`).
`residual_in_fp32` changes nothing here, since fp64 is wider. `chunk_size`, `expand`, `time_step_min`, `time_step_max`,
`time_step_floor`, `rope_theta`, `partial_rotary_factor` and `max_position_embeddings` are no part of the mathematics.
A bias (`use_bias`, `mlp_bias`, `attention_bias`, `use_conv_bias`) is added where the configuration asks for it.
Its operations are tiny: run it on one thread.

A cache is a list with one entry a layer, never changed in place:
  M  {"conv_state": [C, conv_kernel] oldest column first, "ssm_state": [heads, mamba_head_dim, state]}
  *  {"key": [kv heads, tokens, head_dim], "value": the same}
  E and -  {}
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

Cache = list[dict[str, Tensor]]
Noise = Callable[[int, int], Tensor]  # (position in the sequence, denoising step) -> Gumbel noise [V]


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


# The towers


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


# Generation


class Generated(NamedTuple):
    tokens: list[int]  # new tokens only, cut after the end-of-sequence token and at max_new_tokens
    output: list[int]  # the prompt and all whole blocks, uncut: what golden/*/generate.json records
    nfe: int  # denoiser passes
    block_before_step: list[list[int]]  # one a denoiser pass; empty for ar
    block_of_step: list[int]


def sample(
    logits: Tensor,
    noise: Tensor | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Argmax at temperature 0 (of equals the lowest id), else the argmax of logits / temperature + Gumbel noise.

    top_k keeps the k largest logits and all that equal the k-th. top_p keeps, of the distribution at this temperature
    and after top_k, the most probable words until their sum exceeds p, the word that makes it exceed p included.
    """
    if temperature <= 0:
        return top(logits.tolist(), 1)[0]
    scaled = logits / temperature
    if top_k is not None and top_k < len(scaled):
        kth = scaled[top(scaled.tolist(), top_k)[-1]]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    if top_p is not None and top_p < 1:
        p, total, allowed = softmax(scaled).tolist(), 0.0, []
        for word in top(p, len(p)):
            allowed.append(word)
            total += p[word]
            if total > top_p:
                break
        narrowed = torch.full_like(scaled, -math.inf)
        narrowed[allowed] = scaled[allowed]
        scaled = narrowed
    assert noise is not None, "a temperature above 0 needs noise"
    return top((scaled + noise).tolist(), 1)[0]


def commit_rule(masked: list[int], confidence: list[float], threshold: float, remaining: int) -> list[int]:
    """The positions that commit now; confidence[i] is that of position masked[i]. Of equals the lower position wins."""
    above = sum(c > threshold for c in confidence)
    count = min(len(masked), max(1, above, math.ceil(len(masked) / remaining)))
    return sorted(masked[i] for i in top(confidence, count))


def cut(tokens: list[int], eos_token_id: int | None, max_new_tokens: int) -> list[int]:
    tokens = tokens[:max_new_tokens]
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens


@torch.no_grad()
def generate_mask_diffusion(
    model: Model,
    prompt: list[int],
    *,
    max_new_tokens: int,
    block_size: int = 16,
    steps_per_block: int = 16,
    confidence_threshold: float = 0.9,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    mask_token_id: int = 3,
    noise: Noise | None = None,
) -> Generated:
    assert prompt, "an empty prompt is refused"
    _, cache = context_forward(model, prompt)
    sequence, befores, block_of_step = list(prompt), [], []
    for number in range(math.ceil(max_new_tokens / block_size)):
        block = [mask_token_id] * block_size
        for step in range(steps_per_block):
            masked = [i for i in range(block_size) if block[i] == mask_token_id]
            if not masked:
                break
            befores.append(list(block))
            block_of_step.append(number)
            logits = denoise(model, block, len(masked) / block_size, cache)
            logits[:, mask_token_id] = -math.inf
            prediction, confidence = {}, []
            for i in masked:
                gumbel = noise(len(sequence) + i, step) if noise else None
                prediction[i] = sample(logits[i], gumbel, temperature, top_k, top_p)
                confidence.append(softmax(logits[i])[prediction[i]].item())
            for i in commit_rule(masked, confidence, confidence_threshold, steps_per_block - step):
                block[i] = prediction[i]
        sequence += block
        if eos_token_id in block:
            break
        _, cache = context_forward(model, block, cache)
    tokens = cut(sequence[len(prompt) :], eos_token_id, max_new_tokens)
    return Generated(tokens, sequence, len(befores), befores, block_of_step)


@torch.no_grad()
def generate_ar(
    model: Model,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    noise: Noise | None = None,
) -> Generated:
    assert prompt, "an empty prompt is refused"
    sequence, cache, unread = list(prompt), empty_cache(model), list(prompt)
    for _ in range(max_new_tokens):
        logits, cache = context_forward(model, unread, cache)
        gumbel = noise(len(sequence), 0) if noise else None
        unread = [sample(logits[-1], gumbel, temperature, top_k, top_p)]
        sequence += unread
        if unread[0] == eos_token_id:
            break
    return Generated(sequence[len(prompt) :], sequence, 0, [], [])


def mock_ar_logits(model: Model, last: int, cache: Cache) -> Tensor:
    """The word after `last`, predicted by the denoiser; `cache` holds all the tokens before `last` and not `last`."""
    return denoise(model, [last], None, cache)[0]


@torch.no_grad()
def generate_mock_ar(
    model: Model,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    noise: Noise | None = None,
) -> Generated:
    assert prompt, "an empty prompt is refused"
    cache = context_forward(model, prompt[:-1])[1] if len(prompt) > 1 else empty_cache(model)
    sequence, befores = list(prompt), []
    for _ in range(max_new_tokens):
        last = sequence[-1]
        befores.append([last])
        gumbel = noise(len(sequence), 0) if noise else None
        sequence.append(sample(mock_ar_logits(model, last, cache), gumbel, temperature, top_k, top_p))
        if sequence[-1] == eos_token_id:
            break
        _, cache = context_forward(model, [last], cache)
    return Generated(sequence[len(prompt) :], sequence, len(befores), befores, list(range(len(befores))))
