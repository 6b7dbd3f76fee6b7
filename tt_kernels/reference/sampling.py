"""The unmasking step: counter-based Gumbel noise, prediction with its confidence, the commit rule."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import compute_dtype, full_precision, head_logits

_WORD = 0xFFFFFFFF  # 32 bits
_ROUND = ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85))  # Philox4x32: multipliers, key increments


def _philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on int64 tensors that hold unsigned 32-bit words and broadcast."""
    (m0, m1), increments = _ROUND
    c0, c1, c2, c3 = counter
    rounds = torch.arange(10, device=c0.device)
    keys = (((k.unsqueeze(-1) + rounds * step) & _WORD).unbind(-1) for k, step in zip(key, increments, strict=True))
    for key0, key1 in zip(*keys, strict=True):
        p0, p1 = c0 * m0, c2 * m1  # the low 64 bits survive the wrap
        c0, c1, c2, c3 = (p1 >> 32 & _WORD) ^ c1 ^ key0, p1 & _WORD, (p0 >> 32 & _WORD) ^ c3 ^ key1, p0 & _WORD
    return [c0, c1, c2, c3]


@full_precision
def gumbel_noise(seed: Tensor, position: Tensor, step: Tensor, *, vocab_size: int) -> Tensor:
    seed, position, step = (t.long().unsqueeze(-1) for t in (seed, position, step))
    in_graph = torch.compiler.is_compiling()
    # Four words of noise a counter. Two counters too many in a graph, where sizes that may be 1 are another graph's.
    quads = torch.arange(vocab_size // 4 + 2 if in_graph else -(-vocab_size // 4), device=seed.device)
    counter = [quads, position & _WORD, step & _WORD, torch.zeros_like(seed)]
    words = _philox(counter, [seed & _WORD, seed >> 32 & _WORD])
    if in_graph:  # without a size that is compared with another
        ids = torch.arange(vocab_size, device=seed.device)
        bits = torch.stack(words, -1)[..., ids // 4, ids % 4]
    else:
        bits = torch.stack(words, -1).flatten(-2)[..., :vocab_size]
    uniform = bits.double().add_(0.5).mul_(2.0**-32)  # in (0, 1)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _argmax(scores: Tensor) -> Tensor:
    """Of equals the first. On a CPU `max` takes a fifth of the time of `argmax`."""
    return scores.max(-1).indices


_EXPONENT = {torch.float32: (torch.int32, 0x7F800000), torch.float64: (torch.int64, 0x7FF0000000000000)}


def split_temperature(temperature: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A temperature as divisor * unit, where unit is the power of 2, at most 1, that leaves a divisor of 1 or more.

    logits / divisor + unit * noise are the bits of logits / temperature + noise with another exponent, so their order
    is the same, but no quotient overflows. What is below the least normal number of dtype counts as that; what is
    infinite in dtype is 2^64 times its largest number, which leaves nothing of any logit beside the noise.
    """
    integer, exponent = _EXPONENT[dtype]
    t = temperature.to(dtype).clamp(min=torch.finfo(dtype).tiny)
    power = (t.view(integer) & exponent).view(dtype)  # of 2, at or below t
    unit = power.clamp(max=1)
    return (t / unit).clamp(max=torch.finfo(dtype).max), torch.where(power.isinf(), 2.0**64, unit)


def _narrow(scaled: Tensor, unit: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Scaled logits outside the top k, or outside the smallest set that holds top_p of the probability, to -inf."""
    V = scaled.shape[-1]
    if top_k is not None and torch.compiler.is_compiling():  # a graph is for every V
        worse = torch.arange(V, device=scaled.device) >= top_k
        least = scaled.sort(dim=-1, descending=True).values.masked_fill(worse, math.inf).amin(-1, keepdim=True)
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    elif top_k is not None and top_k < V:
        least = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = scaled.sort(dim=-1, descending=True, stable=True)
        before = F.pad(probabilities(ordered, unit).cumsum(-1), (1, -1))  # the probability of all better ones
        late = before > top_p
        scaled = scaled.masked_fill(late.scatter(-1, index, late), -math.inf)
    return scaled


def probabilities(ordered: Tensor, unit: Tensor) -> Tensor:
    """Softmax of descending scaled logits, out of their unit again, where only their differences are to fit."""
    return (ordered - ordered[..., :1]).div_(unit.unsqueeze(-1)).softmax(-1)


@full_precision
def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    logits = logits.detach().to(compute_dtype(logits.dtype))
    if suppress is not None:
        logits = logits.index_fill(-1, torch.tensor([suppress], device=logits.device), -math.inf)
    token = _argmax(logits)
    hot = temperature > 0
    if torch.compiler.is_compiling() or bool(hot.any()):  # a graph is for all temperatures and reads nothing
        divisor, unit = split_temperature(temperature, logits.dtype)
        scaled = _narrow(logits / divisor.unsqueeze(-1), unit, top_k, top_p)
        noise = gumbel_noise(seed, position, step, vocab_size=logits.shape[-1])
        token = torch.where(hot, _argmax(torch.addcmul(scaled, noise.to(scaled), unit.unsqueeze(-1))), token)
    if suppress == 0:  # else the first of a row where everything is -inf
        token = token.clamp(min=1)
    confidence = (logits.gather(-1, token.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)).exp()
    return token, confidence


@full_precision
def head_sample(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    suppress: int | None = None,
) -> tuple[Tensor, Tensor]:
    return sample(
        head_logits(hidden.detach(), weight.detach()),
        temperature=temperature,
        seed=seed,
        position=position,
        step=step,
        top_k=top_k,
        top_p=top_p,
        suppress=suppress,
    )


@full_precision
def commit(
    block: Tensor, token: Tensor, confidence: Tensor, *, mask_token_id: int, threshold: Tensor, steps_left: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    masked = block == mask_token_id  # [B, L]
    m = masked.sum(-1)
    above = (masked & (confidence > threshold.to(confidence).unsqueeze(-1))).sum(-1)
    share = -(-m // steps_left.clamp(min=1))  # ceil(m / r)
    count = torch.minimum(m, torch.maximum(above, share).clamp(min=1))
    order = (-confidence).argsort(dim=-1, stable=True)  # ascending, where NaN is last
    ranked = masked.gather(-1, order)
    committed = torch.zeros_like(masked).scatter(-1, order, ranked & (ranked.cumsum(-1) <= count.unsqueeze(-1)))
    return torch.where(committed, token, block), committed, m - count


@full_precision
def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    *,
    mask_token_id: int,
    threshold: Tensor,
    temperature: Tensor,
    seed: Tensor,
    position: Tensor,
    step: Tensor,
    steps_left: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    masked = block == mask_token_id
    token = block.clone()
    confidence = torch.zeros(block.shape, dtype=compute_dtype(hidden.dtype, weight.dtype), device=block.device)
    options = dict(top_k=top_k, top_p=top_p, suppress=mask_token_id)
    if torch.compiler.is_compiling():  # the number of masked positions is no size in a graph: logits of all
        first, *settings = (t.unsqueeze(-1).expand(block.shape) for t in (position, temperature, seed, step))
        settings = dict(zip(("temperature", "seed", "step"), settings, strict=True))
        each = first + torch.arange(block.shape[1], device=block.device)
        found, sure = head_sample(hidden, weight, position=each, **settings, **options)
        token, confidence = torch.where(masked, found.to(token.dtype), token), torch.where(masked, sure, confidence)
    else:
        rows, cols = masked.nonzero(as_tuple=True)  # only masked positions need logits
        found, sure = head_sample(
            hidden[rows, cols],
            weight,
            temperature=temperature[rows],
            seed=seed[rows],
            position=position[rows] + cols,
            step=step[rows],
            **options,
        )
        token[rows, cols], confidence[rows, cols] = found.to(token.dtype), sure
    block, committed, left = commit(
        block, token, confidence, mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left
    )
    return block, committed, confidence, left
