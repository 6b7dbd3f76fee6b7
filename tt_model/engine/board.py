"""What the device knows of an engine's rows: buffers with fixed addresses, which passes read and write.

R rows, and a few more that fill up a batch: an idle row has a slot and a page of its own, and never any tokens. B rows
take part in a pass, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tt_kernels import Sampling, Strategy

from ..modeling.pool import PAGE_SIZE, Buffers, Pool
from ..modeling.state import Cache, View
from ..modeling.two_tower import TwoTowerModel
from .settings import CONFIDENCES, HOTTEST, Settings


class Lane(NamedTuple):
    """The blocks of the rows that have a block size."""

    block: Tensor  # [rows, L] int64
    masked: Tensor  # [rows] int64: positions that hold the mask token; a draft's, without what is given


class Board:
    """Pages and states in a pool, and a number or so a row for everything else.

    Where the towers are apart each has a board: passes of the denoiser read and write the one that `far` is, on its
    device; else that is this one.
    """

    def __init__(
        self, model: TwoTowerModel, *, rows: int, pages: int, slots: int, idle: int = 1, near: Board | None = None
    ):
        config, dtype = model.config, model.state_dtype
        self.rows, self.idle = rows, range(rows, rows + idle)
        self.mask, self.limit = config.mask_token_id, config.vocab_size
        if near is None:
            size = dict(pages=pages + idle, slots=slots + idle)
            self.pool = Pool(config, **size, device=model.device, dtype=dtype, far=model.far)
            self.places = list(zip(self.pool.pages.take(idle), self.pool.slots.take(idle), strict=True))  # of idle rows
        else:
            self.pool, self.places = near.pool, near.places
        self.buffers: Buffers = self.pool if near is None or self.pool.far is None else self.pool.far
        self.device = device = self.buffers.device

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((rows + idle, *shape), value, dtype=dtype, device=device)

        self.lengths, self.page_table = full(0, torch.int32), full(0, torch.int32, pages)
        # The slot of a row's states, and the plane that its conv state is read from: it is written to the other one.
        self.slot, self.conv = full(0, torch.int32), full(0, torch.int32)
        self.idle_lengths = self.lengths[rows:]
        for row, (page, slot) in zip(self.idle, self.places, strict=True):
            for t, number in ((self.page_table, page), (self.slot, slot), (self.conv, 2 * slot)):
                t[row].fill_(number)
        self.token = full(0, torch.int64)  # in the autoregressive modes: the last one, not in the cache yet
        self.certain = full(0, torch.promote_types(model.dtype, torch.float32))  # its probability
        self.draft = full(False, torch.bool)  # of blocks that the context tower will verify
        self.step, self.steps = full(0, torch.int64), full(1, torch.int64)  # denoising steps: made, and allowed
        self.threshold, self.temperature = full(0, torch.float64), full(0, torch.float64)
        self.top_k, self.top_p, self.seed = full(0, torch.int64), full(1, torch.float64), full(0, torch.int64)
        self.kind, self.factor, self.bound = full(0, torch.int64), full(-1, torch.float64), full(-1, torch.float64)
        self.tempered, self.alg_temp = full(False, torch.bool), full(0, torch.float64)
        self.lanes: dict[int, Lane] = {}
        apart = near is None and self.pool.far is not None
        self.far = Board(model, rows=rows, pages=pages, slots=slots, idle=idle, near=self) if apart else self

    def lane(self, L: int) -> Lane:
        """The blocks of L tokens."""
        if L not in self.lanes:
            # Any token but the mask token: nothing of an idle row's block is to be filled in.
            block = torch.full((len(self.seed), L), int(self.mask == 0), device=self.device)
            self.lanes[L] = Lane(block, torch.zeros_like(self.seed))
        return self.lanes[L]

    # ---- a row comes ----

    def enter(self, row: int, slot: int, pages: Sequence[int], s: Settings, seed: int) -> None:
        """A new row, with states that are zero."""
        self.buffers.ssm.whole[:, slot].zero_()
        self.buffers.conv.whole[:, 2 * slot].zero_()
        k, p = s.top_k, s.top_p
        numbers: dict[str, Any] = dict(
            lengths=0,
            slot=slot,
            conv=2 * slot,
            draft=s.mode == "speculative",
            steps=s.scheduled_steps,
            threshold=s.threshold,
            kind=CONFIDENCES.index(s.confidence),
            factor=s.factor if s.strategy == "factor" else -1.0,
            bound=s.entropy_bound if s.strategy == "entropy_bound" else -1.0,
            tempered=s.tempered,
            alg_temp=s.alg_temp,
            temperature=min(s.temperature, HOTTEST),
            top_k=0 if k is None or k >= self.limit else k,
            top_p=1.0 if p is None or p >= 1 else p,
            seed=seed,
        )
        for name, number in numbers.items():
            getattr(self, name)[row].fill_(number)
        self.page_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32).to(self.device)

    def begin(self, row: int, length: int) -> None:
        """A row of this many tokens goes on from states that were written into its slot."""
        self.lengths[row].fill_(length)

    def copy_states(self, source: int, row: int | None, target: int) -> None:
        """Mamba states from a slot into another. row: whose slot it is, as its conv state may be in either plane."""
        plane = 2 * source if row is None else self.conv[row].long()
        ssm, conv = self.buffers.ssm.whole, self.buffers.conv.whole
        ssm[:, target], conv[:, 2 * target] = ssm[:, source], conv[:, plane]

    def check(self, cache: Cache) -> None:
        """ValueError for what is no cache of one row of such a model."""
        if not isinstance(cache, Cache) or cache.batch != 1:
            found = f"has {cache.batch} rows" if isinstance(cache, Cache) else f"is {cache!r:.40}"
            raise ValueError(f"prefix {found}, expected a cache of one row, from `prefill` or `Cache.fork`")
        shapes = [
            {i: t.shape[1:] for name in ("keys", "conv", "ssm") for i, t in getattr(pool, name).items()}
            for pool in (self.pool, cache.pool)
        ]
        if shapes[0] != shapes[1]:
            raise ValueError("prefix is a cache of a model of another size")

    def take_over(self, cache: Cache, slot: int, pages: Sequence[int]) -> None:
        """Keys, values and states of a cache of one row into a slot and pages of this pool."""
        used = -(-cache.longest // PAGE_SIZE)
        source, target = cache.page_table[0, :used].long(), torch.tensor(pages[:used], device=self.device)
        for layer, keys in self.pool.keys.items():
            for own, other in zip((keys, self.pool.values[layer]), cache.kv(layer), strict=True):
                own[target] = other[source].to(own)
        for layer in self.pool.ssm:
            conv, ssm = cache.states(layer)
            self.pool.conv[layer][2 * slot], self.pool.ssm[layer][slot] = conv[0], ssm[0]

    # ---- a pass: `index_select` and `index_copy_` take half the time of `t[rows]` on a CPU ----

    def view(self, rows: Tensor, pages: int) -> View:
        """Some rows [B], the first pages of each, for one pass."""
        lengths, slot, conv = (t.index_select(0, rows) for t in (self.lengths, self.slot, self.conv))
        table = self.page_table[:, :pages].index_select(0, rows)
        return View(self.buffers, lengths, table, slot, slot, conv, conv ^ 1)

    def count(self, rows: Tensor, view: View, entered: Tensor | int) -> None:
        """What a pass has written: `entered` [B] tokens of each row."""
        self.lengths.index_copy_(0, rows, view.lengths + entered)
        self.conv.index_copy_(0, rows, view.conv_out)
        self.idle_lengths.zero_()

    def sampling(self, rows: Tensor, position: Tensor, step: Tensor, *, narrow: bool) -> Sampling:
        """How tokens at `position` [B] or [B, n] are drawn. narrow: whether a row among them has top_k or top_p."""

        def of(t: Tensor) -> Tensor:
            own = t.index_select(0, rows)
            return own if position.dim() == 1 else own.unsqueeze(1).expand_as(position)

        limits = (of(self.top_k), of(self.top_p)) if narrow else (None, None)
        return Sampling(of(self.temperature), of(self.seed), position, step, *limits)

    def strategy(self, rows: Tensor, *, rules: bool) -> Strategy | None:
        """Which positions of some rows [B] commit. rules: whether one among them has more than a threshold and a
        schedule."""
        if not rules:
            return None
        fields = (self.kind, self.factor, self.bound, self.tempered, self.alg_temp)
        kind, factor, bound, tempered, alg_temp = (t.index_select(0, rows) for t in fields)
        return Strategy(kind, factor, bound, tempered=tempered, alg_temp=alg_temp)
