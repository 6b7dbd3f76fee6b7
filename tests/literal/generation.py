"""The commit rule and the three modes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .layers import Cache, Model, softmax, top
from .towers import context_forward, denoise, empty_cache

Noise = Callable[[int, int], Tensor]  # (position in the sequence, denoising step) -> Gumbel noise [V]


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
