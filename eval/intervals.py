"""95 % intervals: Wilson's for a share, a bootstrap's for a ratio of sums, as which means are written too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

Z = 1.959964  # of a normal distribution, 95 % lie within
DRAWS = 2000


class Estimate(NamedTuple):
    """A figure, and the ends of its interval."""

    value: float
    low: float
    high: float

    def text(self, digits: int = 2, percent: bool = False) -> str:
        """ "2.41 (2.30-2.52)"."""
        factor, unit = (100, " %") if percent else (1, "")
        value, low, high = (f"{factor * x:.{digits}f}" for x in self)
        return f"{value}{unit} ({low}-{high})"


def wilson(hits: int, trials: int) -> Estimate:
    """A share and Wilson's score interval, which also holds where all or none hit. nan without trials."""
    if trials < 1:
        return Estimate(math.nan, math.nan, math.nan)
    share, z2 = hits / trials, Z * Z / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials)) / (1 + z2)
    return Estimate(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def ratio(over: Sequence[float], under: Sequence[float] | None = None, *, seed: int = 0) -> Estimate:
    """sum(over) / sum(under), and the percentile interval of a bootstrap over the pairs; the same seed, the same draws.

    under: None: ones, so the mean of `over`. nan where there is nothing below the line.
    """
    top = torch.tensor(over, dtype=torch.float64)
    bottom = torch.ones_like(top) if under is None else torch.tensor(under, dtype=torch.float64)
    return _interval(top, bottom, seed)


def quotient(
    over: Sequence[float], over_time: Sequence[float], under: Sequence[float], under_time: Sequence[float]
) -> Estimate:
    """The rate sum(over) / sum(over_time) over the other one, resampled together: of what was measured in turns."""
    a, s, b, t = (torch.tensor(x, dtype=torch.float64) for x in (over, over_time, under, under_time))
    picks = _picks(len(a), 0)
    draw = lambda x: x[picks].sum(1)
    return _of(a.sum() * t.sum() / (s.sum() * b.sum()), draw(a) * draw(t) / (draw(s) * draw(b)))


def _picks(count: int, seed: int) -> torch.Tensor:
    return torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(seed))


def _interval(top: torch.Tensor, bottom: torch.Tensor, seed: int) -> Estimate:
    if len(top) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    picks = _picks(len(top), seed)
    return _of(top.sum() / bottom.sum(), top[picks].sum(1) / bottom[picks].sum(1))


def _of(value: torch.Tensor, draws: torch.Tensor) -> Estimate:
    draws = draws[draws.isfinite()]
    if not torch.isfinite(value) or len(draws) == 0:
        return Estimate(math.nan, math.nan, math.nan)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value.item(), low, high)
