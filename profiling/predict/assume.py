"""What lies in memory that a kernel's control flow looks at: stated assumptions, by the argument's name.

Every row's cache holds `context` tokens (for an op: all that its pages hold), in pages in order. Routing is uniform:
the experts' counts are the quantiles of the binomial distribution, so that as many are hit as one expects. All
positions are masked and hot (but with --greedy); nothing is packed; every row's states lie in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from tt_kernels.moe.experts_launch import heights, spare

Array = np.ndarray[Any, Any]
RARE = ("again",)  # conditions, by name, that hardly ever hold: the router's first choice is in doubt


@dataclass(frozen=True, eq=False)
class Launched:
    """A launch's arguments by name, and what is known of its cache."""

    kernel: str
    given: Mapping[str, Any]
    options: Mapping[str, Any]
    context: int | None
    hot: bool = True

    def number(self, *names: str) -> int | None:
        for name in names:
            value = self.given.get(name)
            if isinstance(value, int):
                return value
        return None

    def tensor(self, *names: str) -> Tensor | None:
        return next((t for name in names if isinstance(t := self.given.get(name), Tensor)), None)


@cache
def expert_rows(rows: int, experts: int, tokens: int) -> Array:
    """Rows of every expert under uniform routing: quantiles of Binomial(tokens, rows / tokens / experts)."""
    share = rows / max(tokens, 1) / experts
    n = np.arange(tokens + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.maximum(tokens - n[:-1], 1)) - np.log(n[1:]))])
    with np.errstate(divide="ignore"):
        chance = np.exp(logs + n * np.log(share) + (tokens - n) * np.log1p(-min(share, 1 - 1e-12)))
    found = np.searchsorted(np.cumsum(chance), (np.arange(experts) + 0.5) / experts).astype(np.int64)
    found = np.random.default_rng(0).permutation(np.minimum(found, tokens))
    busy = np.flatnonzero(found)
    for i in range(abs(rows - int(found.sum()))):  # rounding
        found[busy[i % max(len(busy), 1)] if len(busy) else 0] += 1 if rows > found.sum() else -1
    return np.maximum(found, 0)


def _experts(a: Launched) -> tuple[int, int, int]:
    """(experts, sorted rows, tokens)"""
    ids = a.tensor("topk_ids", "ids_ptr", "topk_ids_ptr")
    pairs = a.tensor("sorted_pairs_ptr", "sorted_pairs")
    rows = a.number("R") or (pairs.numel() if pairs is not None else ids.numel() if ids is not None else 0)
    tokens = a.number("T")
    if (doubled := a.number("sizes.odd_T")) is not None:
        tokens = doubled >> 1
    if tokens is None:
        tokens = rows // (a.number("sizes.top_k", "K") or 6)
    experts = a.number("E", "sizes.E")
    if experts is None:
        w = a.tensor("w", "up", "down", "w_ptr", "out_ptr", "dw_ptr")
        narrow = a.number("sizes.N") if "up" in a.kernel else a.number("sizes.D")
        experts = 128 if w is None else w.shape[0] if w.dim() == 3 else w.shape[0] // (narrow or w.shape[0])
    return max(experts, 1), rows, max(tokens, 1)


def _offsets(a: Launched, t: Tensor) -> Array:
    experts, rows, tokens = _experts(a)
    experts = min(experts, t.numel()) if "offsets_ptr" in a.given and a.number("E") is None else experts
    ends = np.cumsum(expert_rows(rows, experts, tokens))
    return np.concatenate([[0], ends])[-t.numel() :] if t.numel() <= experts else np.concatenate([[0], ends])


def cut(rows: int, block: int) -> Iterator[tuple[int, int]]:
    """An expert's tiles: (first row, rows)."""
    for start in range(0, max(rows - spare(block), min(rows, 1)), block):
        yield start, rows - start if rows - start <= block + spare(block) else block


def _tiles(a: Launched, t: Tensor) -> Array:
    """The list that `experts_schedule` writes: its length, then (expert, rows, first row) packed; or the offsets."""
    experts, rows, tokens = _experts(a)
    if a.options.get("BLOCK_E"):
        return np.cumsum(expert_rows(rows, experts, tokens))
    block = int(a.options.get("BLOCK_T", 16))
    entries, first = [], 0
    for expert, count in enumerate(expert_rows(rows, experts, tokens)):
        for start, height in cut(int(count), block):
            entries.append(expert << 41 | height << 32 | (first + start))
        first += int(count)
    return np.array([len(entries), *entries, *[-1] * max(0, t.numel() - 1 - len(entries))])


def useful(a: Launched) -> float:
    """The share of the rows that products compute which are rows of an expert: tiles are filled up with others."""
    if not a.kernel.startswith("_experts") or "BLOCK_T" not in a.options or a.tensor("tiles_ptr") is None:
        return 1.0
    experts, rows, tokens = _experts(a)
    block = int(a.options["BLOCK_T"])
    counts = expert_rows(rows, experts, tokens)
    computed = [min(h for h in heights(block) if h >= n) for count in counts for _, n in cut(int(count), block)]
    return rows / max(float(sum(computed)), 1.0)


def _lengths(a: Launched, t: Tensor) -> Array:
    if a.context is not None:
        return np.full(t.numel(), a.context)
    table, size = a.tensor("page_table_ptr", "page_table"), a.number("page_size") or int(a.options.get("page_size", 64))
    return np.full(t.numel(), table.shape[-1] * size if table is not None else 2048)


def _order(a: Launched, t: Tensor) -> Array:
    return np.arange(min(t.numel(), 1 << 20))


KNOWN: dict[str, Callable[[Launched, Tensor], Array]] = {
    "cache_lengths": _lengths,
    "lengths": _lengths,
    "table": _order,
    "page_table": _order,
    "counts": lambda a, t: np.full(t.numel(), 1 << 30),  # the whole block: kernels clamp
    "offsets": _offsets,
    "tiles": _tiles,
    "sorted_pairs": _order,
    "topk_ids": lambda a, t: np.arange(min(t.numel(), 1 << 20)) % 128,
    "ids": lambda a, t: np.arange(min(t.numel(), 1 << 20)) % 128,
    "indices": _order,
    "index": _order,
    "count": lambda a, t: np.array([rows.numel() if (rows := a.tensor("listed.index")) is not None else 1 << 30]),
    "starts": lambda a, t: np.zeros(min(t.numel(), 1 << 20), np.int64),
    "temperature": lambda a, t: np.full(t.numel(), float(a.hot)),
    "resets": lambda a, t: np.zeros(min(t.numel(), 1 << 20), np.int64),
}


def remembered(a: Launched, name: str) -> Array | None:
    """What the argument holds, or None: nobody assumes anything about it."""
    t = a.given.get(name)
    assumed = KNOWN.get(name.rpartition(".")[2].removesuffix("_ptr"))
    return assumed(a, t) if assumed is not None and isinstance(t, Tensor) else None
