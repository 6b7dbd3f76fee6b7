"""Counter-based Gumbel noise, and the prediction of a token with its confidence."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import can_look, compute_dtype, full_precision, head_logits, of_rows


class Sampling(NamedTuple):
    """How the token of each row is chosen: one number a row, so that requests with different settings share a batch.

    [*] are the rows of the logits; `unmask` takes one number for each block of the batch. A new sampling rule is a
    field here that may be None, a line in `bounds`, and its specification in `tt_kernels/sampling/options.py`.
    """

    temperature: Tensor  # [*] float, 0 or more, inf too: 0 takes the best token, above 0 one is drawn
    seed: Tensor  # [*] int, any 64 bits: key of the noise, with position and step
    position: Tensor  # [*] int: of the token in its sequence, of which the lower 32 bits count
    step: Tensor  # [*] int: the denoising step, as position
    # [*] int: draw among the k best and all that equal the k-th; 0, or V and above: no limit.
    top_k: Tensor | None = None
    # [*] float, above 0: draw among the best whose probabilities first exceed p; 1: no limit.
    top_p: Tensor | None = None

    @classmethod
    def of(
        cls,
        rows: int,
        *,
        temperature: float | Tensor = 0.0,
        seed: int | Tensor = 0,
        position: int | Tensor = 0,
        step: int | Tensor = 0,
        top_k: int | Tensor | None = None,
        top_p: float | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "Sampling":
        """Settings of so many rows: a number holds for all of them, a tensor is itself. ValueError for others."""

        def each(name: str, value: float | Tensor, dtype: torch.dtype) -> Tensor:
            return of_rows(f"Sampling: {name}", value, rows, dtype, device)

        return cls(
            temperature=each("temperature", temperature, torch.float64),
            seed=each("seed", seed, torch.int64),
            position=each("position", position, torch.int64),
            step=each("step", step, torch.int64),
            top_k=None if top_k is None else each("top_k", top_k, torch.int64),
            top_p=None if top_p is None else each("top_p", top_p, torch.float64),
        )

    def select(self, rows: Tensor | slice) -> "Sampling":
        """The settings of some rows."""
        return Sampling(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


class Sampled(NamedTuple):
    """A prediction for each row."""

    token: Tensor  # [*] int64
    confidence: Tensor  # [*] fp32, or fp64: the token's probability at temperature 1


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
    # 32 counters for 128 tokens. More than enough of them in a graph, where sizes that may be 1 are another graph's.
    counters = torch.arange(32 * (vocab_size // 128 + 2 if in_graph else -(-vocab_size // 128)), device=seed.device)
    counter = [counters, position & _WORD, step & _WORD, torch.zeros_like(seed)]
    words = torch.stack(_philox(counter, [seed & _WORD, seed >> 32 & _WORD]), -1)
    if in_graph:  # without a size that is compared with another
        v = torch.arange(vocab_size, device=seed.device)
        bits = words[..., (v >> 7 << 5) | (v >> 1 & 24) | (v & 7), (v >> 3 & 1) | (v >> 5 & 2)]
    else:  # a counter's bits 3 and 4 are a token's 4 and 5, a word's bits its 3 and 6
        bits = (
            words.unflatten(-2, (-1, 4, 8)).unflatten(-1, (2, 2)).permute(*range(words.dim() - 2), -5, -2, -4, -1, -3)
        )
        bits = bits.flatten(-5)[..., :vocab_size]
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


# 2^-f for f of 0 to 1 as c0 - f (c1 - f (c2 - ...)), in units of 2^-30: off by 1.3e-7 of it, and exact at 0.
_HALVINGS = (1073741824, 744257900, 257895614, 59385867, 9895605, 1018364)


def weights(below: Tensor) -> Tensor:
    """2^-below as whole numbers of 2^-40, 0 from 41 on and where below is NaN. Their sums do not depend on the order,
    and nothing here is rounded that another device might round otherwise: `below` counts in steps of 2^-24. Sums of
    2^22 of them are below 2^63."""
    counts = below < 41
    steps = torch.where(counts, below, 0).mul(2.0**24).long()
    f = (steps & 0xFFFFFF) << 8
    power = torch.full_like(f, _HALVINGS[-1])
    for c in _HALVINGS[-2::-1]:
        power = c - (f * power >> 32)
    return torch.where(counts, power << 10 >> (steps >> 24), 0)


def halvings(temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """How many times a probability halves for each unit of its logit: 0 at a temperature that is infinite in dtype."""
    t = temperature.to(dtype).clamp(min=torch.finfo(dtype).tiny)
    return torch.full_like(t, 1 / math.log(2)) / t


def bounds(logits: Tensor, temperature: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> tuple[Tensor, Tensor]:
    """What of logits [*, V] may be drawn: the least of them, and the last token of those that equal it.

    Every row is looked at by itself: what it gets does not depend on the limits of others.
    """
    V = logits.shape[-1]
    if top_p is None and top_k is not None and can_look(top_k):  # the best few take much less time than a sort
        ordered, index = logits.topk(max((k for k in top_k.flatten().tolist() if 0 < k < V), default=1), dim=-1)
    else:
        ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    least, last = torch.full_like(logits[..., 0], -math.inf), torch.full_like(index[..., 0], V)
    if top_k is not None:
        limited = (top_k > 0) & (top_k < V)
        kth = ordered.gather(-1, torch.where(limited, top_k - 1, 0).long().unsqueeze(-1)).squeeze(-1)
        least = torch.where(limited, kth, least)
    if top_p is not None:
        ordered = ordered.masked_fill(ordered < least.unsqueeze(-1), -math.inf)
        sums = weights((ordered[..., :1] - ordered) * halvings(temperature, logits.dtype).unsqueeze(-1)).cumsum(-1)
        share = (top_p.double().clamp(min=0).nan_to_num(1.0) * sums[..., -1].double()).long()
        late = F.pad(sums, (1, -1)) > share.unsqueeze(-1)  # the weights of all better tokens
        end = V - 1 - late.sum(-1, keepdim=True)
        lowest, end = ordered.gather(-1, end).squeeze(-1), index.gather(-1, end).squeeze(-1)
        tighter = (top_p < 1) & ~(lowest < least)
        least, last = torch.where(tighter, lowest, least), torch.where(tighter, end, last)
    return least, last


def _narrow(scores: Tensor, logits: Tensor, sampling: Sampling) -> Tensor:
    """Scores with -inf in place of all that top_k and top_p leave out."""
    if sampling.top_k is None and sampling.top_p is None:
        return scores
    limits = bounds(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    least, last = (t.unsqueeze(-1) for t in limits)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return scores.masked_fill((logits < least) | ((logits == least) & (ids > last)), -math.inf)


def below_largest(logits: Tensor, largest: Tensor) -> Tensor:
    """Logits less the largest of each row [*, 1], where that is finite: so their exponentials are exact near it, which
    a logarithm of sums is not, and infinities and NaN stay what they are."""
    return logits - torch.where(largest.isfinite(), largest, 0)


def _confidence(logits: Tensor, token: Tensor) -> Tensor:
    """How sure a prediction is: its probability at temperature 1. Another rule for this is a function of the same
    arguments here. Its kernel: `Record` and all that makes, merges, stores or reads one, and `combine`, in
    `tt_kernels/sampling/lang.py`; the planes in `records.py`; the launchers of the three ops that sample."""
    below = below_largest(logits, logits.amax(-1, keepdim=True))
    return below.gather(-1, token.unsqueeze(-1)).squeeze(-1).exp() / below.exp().sum(-1)


@full_precision
def sample(logits: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Sampled:
    logits = logits.detach().to(compute_dtype(logits.dtype))
    if suppress is not None:
        logits = logits.index_fill(-1, torch.tensor([suppress], device=logits.device), -math.inf)
    token = _argmax(logits)
    hot = sampling.temperature > 0
    if torch.compiler.is_compiling() or bool(hot.any()):  # a graph is for all temperatures and reads nothing
        divisor, unit = split_temperature(sampling.temperature, logits.dtype)
        scaled = _narrow(logits / divisor.unsqueeze(-1), logits, sampling)
        noise = gumbel_noise(sampling.seed, sampling.position, sampling.step, vocab_size=logits.shape[-1])
        token = torch.where(hot, _argmax(torch.addcmul(scaled, noise.to(scaled), unit.unsqueeze(-1))), token)
    if suppress == 0:  # else the first of a row where everything is -inf
        token = token.clamp(min=1)
    return Sampled(token, _confidence(logits, token))


@full_precision
def head_sample(hidden: Tensor, weight: Tensor, sampling: Sampling, *, suppress: int | None = None) -> Sampled:
    return sample(head_logits(hidden.detach(), weight.detach()), sampling, suppress=suppress)
