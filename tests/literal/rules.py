"""The rules of masked diffusion decoding as their papers and published programs state them: Python's own numbers."""

import math


def order(score: dict[int, float], sequential: bool = False) -> list[int]:
    """Positions, the most confident first, NaN last, of equals the lower one."""
    if sequential:
        return sorted(score)
    return sorted(score, key=lambda i: (math.isnan(score[i]), 0.0 if math.isnan(score[i]) else -score[i], i))


def while_(passes: list[bool]) -> int:
    """How many pass before the first that does not."""
    return passes.index(False) if False in passes else len(passes)


def factor(confidence: list[float], f: float) -> int:
    """Fast-dLLM: the n most confident, as long as the n-th has at least 1 - f / (n + 1); the first always."""
    return while_([n == 1 or c >= 1 - f / (n + 1) for n, c in enumerate(confidence, 1)])


def entropy_bound(entropy: list[float], e: float) -> int:
    """EB-Sampler: the longest beginning whose entropies, less their largest, sum to at most e."""
    sums = [math.fsum(entropy[: n + 1]) - max(entropy[: n + 1]) for n in range(len(entropy))]
    return while_([s <= e for s in sums])


def llada_numbers(masked: int, steps: int) -> list[int]:
    """LLaDA: how many commit in each step: an equal share, of the remainder one more in each of the first."""
    return [masked // steps + (step < masked % steps) for step in range(steps)]


def dream_number(masked: int, step: int, steps: int, eps: float = 1e-3) -> int:
    """Dream: the floor of masked (1 - s / t), all in the last step; times fall evenly from 1 to eps."""
    t, s = (1 - i * (1 - eps) / steps for i in (step, step + 1))
    return int(masked * (1 - s / t)) if step < steps - 1 else masked


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    terms = [math.exp(x - top) for x in logits]
    return [t / math.fsum(terms) for t in terms]


def margin(p: list[float]) -> float:
    first, second = sorted(p, reverse=True)[:2]
    return first - second


def entropy(p: list[float]) -> float:
    return -math.fsum(x * math.log(x) for x in p if x > 0)
