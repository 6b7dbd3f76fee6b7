"""The unmasking step: what masked positions are predicted to be, how sure that is, and how many of them commit."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import can_look, compute_dtype, full_precision, head_logits, of_rows
from .sampling import Sampling, _narrow, _philox, below_largest, sample

CONFIDENCES = ("probability", "margin", "entropy", "random", "sequential")


class Strategy(NamedTuple):
    """What decides which masked positions of a block commit, beside a threshold and a schedule: a number a row, so that
    rows with different rules share a batch. None: no row has it, and no work is done for it.

    The masked positions of a row stand in an order: the most confident first, NaN last, of equals the lower position.
    Every rule says how long a beginning of that order may commit, and the longest counts.
    """

    # [B] int, a place in CONFIDENCES: what orders the positions and is held to the threshold and to the factor.
    # probability p of the prediction; margin p1 - p2 of the two best tokens; entropy sum p log p; random: uniform in
    # (0, 1), keyed on seed, position and step; sequential: the lower position first, p for the rest. None: probability.
    confidence: Tensor | None = None
    # [B] float f, below 0: none. The first, and while the n-th confidence is at least 1 - f / (n + 1).
    factor: Tensor | None = None
    # [B] float e, below 0: none. While the sum of the first entropies less the largest of them is at most e.
    entropy_bound: Tensor | None = None
    # [B] int, below 0: none. So many, 0 too, whatever the other rules say.
    number: Tensor | None = None
    # [B] bool: p is of the distribution that is drawn from, after temperature, top_k and top_p; else of the softmax of
    # all logits. Rows of temperature 0 draw from that as well.
    tempered: Tensor | None = None
    # [B] float, 0 and below: none. The order is drawn: the next position in proportion to exp(confidence / alg_temp),
    # without replacement, by Gumbel noise keyed on seed, position and step. Thresholds see confidences as they are;
    # "sequential" stays in its order.
    alg_temp: Tensor | None = None

    @classmethod
    def of(
        cls,
        rows: int,
        *,
        confidence: str | Sequence[str] | Tensor = "probability",
        factor: float | Tensor | None = None,
        entropy_bound: float | Tensor | None = None,
        number: int | Tensor | None = None,
        tempered: bool | Tensor = False,
        alg_temp: float | Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> "Strategy":
        """Rules of so many rows: a value holds for all of them, a tensor is taken as it is, and confidence may be a
        list with a name for each row. ValueError for others."""

        def each(name: str, value: float | Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if value is None else of_rows(f"Strategy: {name}", value, rows, dtype, device)

        if not isinstance(confidence, Tensor):
            names = list(confidence) if isinstance(confidence, (list, tuple)) else [confidence] * rows
            if len(names) != rows:
                raise ValueError(f"Strategy: confidence has {len(names)} names, expected one for each of {rows} rows")
            for name in names:
                if name not in CONFIDENCES:
                    raise ValueError(f"Strategy: confidence is {name!r}, expected one of {', '.join(CONFIDENCES)}")
            confidence = torch.tensor([CONFIDENCES.index(name) for name in names], dtype=torch.int64, device=device)
            plain = all(name == "probability" for name in names)
        else:
            plain = False
        return cls(
            confidence=None if plain else confidence,
            factor=each("factor", factor, torch.float64),
            entropy_bound=each("entropy_bound", entropy_bound, torch.float64),
            number=each("number", number, torch.int64),
            tempered=None if tempered is False else each("tempered", tempered, torch.bool),
            alg_temp=each("alg_temp", alg_temp, torch.float64),
        )

    def select(self, rows: Tensor | slice) -> "Strategy":
        """The rules of some rows."""
        return Strategy(*(None if t is None else t[rows] for t in self))

    def contiguous(self) -> "Strategy":
        return Strategy(*(None if t is None else t.contiguous() for t in self))


class Committed(NamedTuple):
    """A block after the commit rule."""

    block: Tensor  # [B, L] dtype of the block that came in, in new memory
    committed: Tensor  # [B, L] bool: what took its prediction now
    masked: Tensor  # [B] int64: how many positions are masked still


class Unmasked(NamedTuple):
    """A block after one unmasking step."""

    block: Tensor  # [B, L] dtype of the block that came in, in new memory
    committed: Tensor  # [B, L] bool: what took its prediction now
    confidence: Tensor  # [B, L] fp32, or fp64: probability of the predictions; 0 where nothing was masked
    masked: Tensor  # [B] int64: how many positions are masked still


class Judged(NamedTuple):
    """What a strategy knows of predictions."""

    token: Tensor  # [*] int64
    confidence: Tensor  # [*]: the token's probability
    score: Tensor  # [*]: what is held to the threshold and to the factor
    entropy: Tensor  # [*]: of the distribution
    key: Tensor | None = None  # [*]: what orders the positions; None: the score


def word_at(seed: Tensor, position: Tensor, step: Tensor, counter: int) -> Tensor:
    """Word 0 of Philox4x32-10 at (counter, position, step, 0). Tokens' noise has the counters from 0 up to V / 4; what
    is drawn once a position has -1 and below."""
    word = 0xFFFFFFFF
    seed, position, step = (t.long() for t in (seed, position, step))
    at = [torch.full_like(seed, counter & word), position & word, step & word, torch.zeros_like(seed)]
    return _philox(at, [seed & word, seed >> 32 & word])[0]


def uniform(seed: Tensor, position: Tensor, step: Tensor, counter: int) -> Tensor:
    """Numbers in (0, 1) that fp32 holds, of 23 bits."""
    return ((word_at(seed, position, step, counter) >> 9).double() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, position: Tensor, step: Tensor, counter: int) -> Tensor:
    """Standard Gumbel noise, of a word as tokens' noise is."""
    u = (word_at(seed, position, step, counter).double() + 0.5) * 2.0**-32
    return -(-(-u).log1p()).log()


RANDOM, REMASK, DRAW = -1, -2, -3  # counters of what is drawn once a position
HOTTEST_DRAW = 1e30  # above it nothing is left of any confidence beside the noise, and fp32 holds their product


def drawn(score: Tensor, sampling: Sampling, alg_temp: Tensor) -> Tensor:
    """Keys [*] whose order is drawn: confidence + alg_temp noise, which is confidence / alg_temp + noise in another
    unit, of which 0 makes the confidence itself."""
    t = alg_temp.to(score)
    t = torch.where(t > 0, t.clamp(max=HOTTEST_DRAW), 0)
    return score + t * gumbel(sampling.seed, sampling.position, sampling.step, DRAW).to(score)


def _used(strategy: Strategy) -> Strategy:
    """The rules that some row has, where one can look: those of none change nothing, and would take time."""
    has: dict[str, Callable[[Tensor], Tensor]] = dict(
        confidence=lambda t: t != 0,
        factor=lambda t: t >= 0,
        entropy_bound=lambda t: t >= 0,
        number=lambda t: t >= 0,
        tempered=lambda t: t,
        alg_temp=lambda t: t > 0,
    )
    given = {name: t for name, t in strategy._asdict().items() if t is not None and can_look(t)}
    return strategy._replace(**{name: None for name, t in given.items() if not bool(has[name](t).any())})


def judge(logits: Tensor, token: Tensor, sampling: Sampling, strategy: Strategy) -> Judged:
    """What the rules need to know, of logits [R, V] and what was drawn from them; sampling and strategy of R rows."""
    y = logits
    if strategy.tempered is not None:
        t = sampling.temperature.to(y.dtype)
        tempered = strategy.tempered & (t > 0)
        narrowed = _narrow(y, y, sampling)  # by limits at the row's temperature
        y = torch.where(tempered.unsqueeze(-1), narrowed / t.clamp(1e-30, 1e30).unsqueeze(-1), y)
    best = y.topk(min(2, y.shape[-1]), dim=-1).values
    below = below_largest(y, best[..., :1])
    total = below.exp().sum(-1)
    confidence = below.gather(-1, token.unsqueeze(-1)).squeeze(-1).exp() / total
    log_p = below - total.log().unsqueeze(-1)
    entropy = -torch.where(y == -math.inf, 0, log_p.exp() * log_p).sum(-1)
    entropy = torch.where(total.isfinite() & (total > 0), entropy, math.nan)
    score = confidence
    if strategy.confidence is not None:
        kind = strategy.confidence
        asked = set(kind.tolist()) if can_look(kind) else {1, 2, 3}
        others = {
            1: lambda: -torch.expm1(best[..., -1] - best[..., 0]) * below.amax(-1).exp() / total,
            2: lambda: -entropy,
            3: lambda: uniform(sampling.seed, sampling.position, sampling.step, RANDOM).to(confidence),
        }
        for place in asked & set(others):
            score = torch.where(kind == place, others[place](), score)
    key = None if strategy.alg_temp is None else drawn(score, sampling, strategy.alg_temp)
    return Judged(token, confidence, score, entropy, key)


ENTROPY_UNIT = 2.0**32  # entropies are added as whole numbers of 2^-32, whose sum has no order
LARGEST_ENTROPY, LARGEST_BOUND = 1024.0, 2.0**30


def entropy_units(entropy: Tensor) -> Tensor:
    """An entropy that is no number counts as the largest."""
    return (entropy.double().nan_to_num(LARGEST_ENTROPY).clamp(0, LARGEST_ENTROPY) * ENTROPY_UNIT).long()


def finish(logits: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """What a head does after its product: cap tanh((x + bias) / cap), -inf where the bias is."""
    if bias is not None:
        logits = logits + bias.to(logits)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        if bias is not None:
            logits = logits.masked_fill(bias == -math.inf, -math.inf)
    return logits


def decide(
    block: Tensor,
    judged: Judged,
    strategy: Strategy,
    mask_token_id: int,
    threshold: Tensor | None,
    steps_left: Tensor | None,
) -> Committed:
    """The commit rule of predictions [B, L]: the longest beginning of the order that a rule allows, at least one."""
    masked, score = block == mask_token_id, judged.score
    m = masked.sum(-1)
    key = score if judged.key is None else judged.key
    if strategy.confidence is not None:
        key = torch.where((strategy.confidence == CONFIDENCES.index("sequential")).unsqueeze(-1), 0, key)
    order = (-key).argsort(dim=-1, stable=True)  # ascending, where NaN is last
    order = order.gather(-1, (~masked.gather(-1, order)).int().argsort(dim=-1, stable=True))  # the masked ones first
    n = torch.arange(1, block.shape[-1] + 1, device=block.device)
    live, sure = n <= m.unsqueeze(-1), score.gather(-1, order)

    def beginning(passes: Tensor) -> Tensor:
        return (passes & live).long().cumprod(-1).sum(-1)

    count = torch.ones_like(m)
    if threshold is not None:
        count = torch.maximum(count, beginning(sure > threshold.to(sure).unsqueeze(-1)))
    if steps_left is not None:
        count = torch.maximum(count, -(-m // steps_left.clamp(min=1)))  # ceil(m / steps left)
    if strategy.factor is not None:
        factor = strategy.factor.to(sure).unsqueeze(-1)
        passes = (n == 1) | (sure >= 1 - factor / (n + 1))
        count = torch.maximum(count, beginning(passes))  # below 0 only the first passes
    if strategy.entropy_bound is not None:
        entropy = entropy_units(judged.entropy.gather(-1, order))
        spread = entropy.cumsum(-1) - entropy.cummax(-1).values
        limit = strategy.entropy_bound.double().nan_to_num(-1.0, posinf=LARGEST_BOUND)
        limit = (limit.clamp(-1, LARGEST_BOUND) * ENTROPY_UNIT).floor().long()
        count = torch.maximum(count, beginning(spread <= limit.unsqueeze(-1)))
    if strategy.number is not None:
        count = torch.where(strategy.number >= 0, strategy.number, count)
    count = torch.minimum(count, m)
    committed = torch.zeros_like(masked).scatter(-1, order, n <= count.unsqueeze(-1))
    return Committed(torch.where(committed, judged.token.to(block.dtype), block), committed, m - count)


@full_precision
def commit(
    block: Tensor, token: Tensor, confidence: Tensor, *, mask_token_id: int, threshold: Tensor, steps_left: Tensor
) -> Committed:
    masked = block == mask_token_id  # [B, L]
    m = masked.sum(-1)
    above = (masked & (confidence > threshold.to(confidence).unsqueeze(-1))).sum(-1)
    share = -(-m // steps_left.clamp(min=1))  # ceil(m / steps left)
    count = torch.minimum(m, torch.maximum(above, share).clamp(min=1))
    order = (-confidence).argsort(dim=-1, stable=True)  # ascending, where NaN is last
    ranked = masked.gather(-1, order)
    committed = torch.zeros_like(masked).scatter(-1, order, ranked & (ranked.cumsum(-1) <= count.unsqueeze(-1)))
    return Committed(torch.where(committed, token, block), committed, m - count)


def _step(
    read: Callable[[Tensor | slice, Tensor | slice], Tensor],
    block: Tensor,
    dtype: torch.dtype,
    sampling: Sampling,
    mask_token_id: int,
    threshold: Tensor | None,
    steps_left: Tensor | None,
    strategy: Strategy | None,
    shift: bool,
) -> Unmasked:
    """One unmasking step of positions whose logits `read` knows, by rows and columns."""
    masked = block == mask_token_id
    in_graph = torch.compiler.is_compiling()
    if in_graph:  # the number of masked positions is no size there: logits of all
        rows, cols = (torch.arange(n, device=block.device) for n in block.shape)
        rows, cols = rows.unsqueeze(-1).expand(block.shape), cols.expand(block.shape)
    else:
        rows, cols = masked.nonzero(as_tuple=True)
    logits = read(rows, (cols - 1).clamp(min=0) if shift else cols)
    mine = sampling.select(rows)
    mine = mine._replace(position=mine.position + cols)
    found = sample(logits, mine, suppress=mask_token_id)

    def placed(t: Tensor, like: Tensor) -> Tensor:
        if in_graph:
            return torch.where(masked, t.to(like.dtype), like)
        like[rows, cols] = t.to(like.dtype)
        return like

    def zeros() -> Tensor:
        return torch.zeros(block.shape, dtype=dtype, device=block.device)

    token, confidence = placed(found.token, block.clone()), placed(found.confidence, zeros())
    if strategy is None and threshold is not None and steps_left is not None:
        rule = dict(mask_token_id=mask_token_id, threshold=threshold, steps_left=steps_left)
        done = commit(block, token, confidence, **rule)  # type: ignore[arg-type]
        return Unmasked(done.block, done.committed, confidence, done.masked)
    strategy = _used(strategy or Strategy())
    logits = logits.to(dtype).index_fill(-1, torch.tensor([mask_token_id], device=logits.device), -math.inf)
    judged = judge(logits, found.token, mine, strategy.select(rows))
    judged = Judged(token, *(None if t is None else placed(t, zeros()) for t in judged[1:]))  # type: ignore[arg-type]
    done = decide(block, judged, strategy, mask_token_id, threshold, steps_left)
    return Unmasked(done.block, done.committed, judged.confidence, done.masked)


@full_precision
def unmask(
    hidden: Tensor,
    weight: Tensor,
    block: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    threshold: Tensor | None = None,
    steps_left: Tensor | None = None,
    strategy: Strategy | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: bool = False,
) -> Unmasked:
    def read(rows: Tensor | slice, cols: Tensor | slice) -> Tensor:
        return finish(head_logits(hidden[rows, cols].detach(), weight.detach()), bias, softcap)

    dtype = compute_dtype(hidden.dtype, weight.dtype)
    return _step(read, block, dtype, sampling, mask_token_id, threshold, steps_left, strategy, shift)


@full_precision
def unmask_logits(
    logits: Tensor,
    block: Tensor,
    sampling: Sampling,
    *,
    mask_token_id: int,
    threshold: Tensor | None = None,
    steps_left: Tensor | None = None,
    strategy: Strategy | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: bool = False,
) -> Unmasked:
    def read(rows: Tensor | slice, cols: Tensor | slice) -> Tensor:
        return finish(logits[rows, cols].detach().to(dtype), bias, softcap)

    dtype = compute_dtype(logits.dtype)
    return _step(read, block, dtype, sampling, mask_token_id, threshold, steps_left, strategy, shift)
