"""What passes see of the state that generation keeps: views of buffers with fixed addresses.

A `Pool` owns the buffers: K/V pages, conv and SSM states. A `View` is a batch of rows in it: a page table, state
indices and lengths. A `Cache` is one whose tokens the host counts and makes room for. Passes write the buffers in
place; dropping, reordering and forking rows move indices only.

Shapes: B rows, L tokens that enter, Hkv key/value heads, P head size, C conv channels, K conv kernel, H Mamba heads,
N state size. Row b's token s lies in page `page_table[b, s // PAGE_SIZE]` at offset `s % PAGE_SIZE`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tt_kernels import MambaState, MambaWeights, mamba_advance

from ..config import TwoTowerConfig
from .pool import PAGE_SIZE, Buffers, Pool, Row, across, numbers


class Projected(NamedTuple):
    """A block as a Mamba layer projects it."""

    xBC: Tensor  # [B, L, C]
    dt: Tensor  # [B, L, H]
    weights: MambaWeights
    dt_limit: tuple[float, float]


@dataclass
class Pending:
    """What `verify` keeps of a block so that `Cache.advance` can let any number of its tokens in."""

    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> k, v [B, L, Hkv, P]
    mamba: dict[int, Projected] = field(default_factory=dict)  # layer -> what its states advance by
    hidden: Tensor | None = None  # [B, L, D], after the final norm
    lengths: Tensor | None = None  # [B] of the cache when it was verified
    cache: Cache | None = None


@dataclass
class CleanStates:
    """What `encode_clean` keeps of clean sequences for the noisy blocks that follow their blocks."""

    block_size: int
    cu_seqlens: Tensor | None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> k, v [B, N, Hkv, P]
    mamba: dict[int, MambaState] = field(default_factory=dict)  # layer -> states before each of the B * N / S blocks
    hidden: Tensor | None = None  # [B, N, D] of the context tower, after the final norm


@dataclass(frozen=True)
class ForwardContext:
    """What the mixers of one walk through a tower see.

    kind:
        "extend":  L clean tokens that follow the cache, causally; the first counts[b] of row b enter it.
        "verify":  the same, but nothing is written: `pending` keeps what `Cache.advance` needs.
        "denoise": a noisy block on the cache, which is only read; attention both ways inside the block.
        "clean":   whole sequences from nothing; what noisy blocks will need is kept in `keep`, where there is one.
        "noisy":   all noisy blocks of the sequences in `clean` at once, as a batch [B * N / S, S].
    """

    kind: Literal["extend", "verify", "denoise", "clean", "noisy"]
    cache: View | None = None
    counts: Tensor | None = None  # [B] int32: tokens of each row that enter; None: all
    pending: Pending | None = None
    keep: CleanStates | None = None
    clean: CleanStates | None = None
    cu_seqlens: Tensor | None = None  # [n + 1] int32: where packed clean sequences begin and end


def _leave(pool: Pool, rows: list[Row]) -> None:
    for row in rows:
        pool.slots.leave(row.slot)
        for page in row.pages:
            pool.pages.leave(page)


@dataclass(eq=False)
class View:
    """Rows of a pool as one pass reads and writes them: what is on the device, and nothing that the host counts."""

    pool: Buffers
    lengths: Tensor  # [B] int32: tokens of each row
    page_table: Tensor  # [B, pages of a row] int32
    # [B] int32: where a row's states are read, and where the pass writes them: a conv state in its other plane.
    ssm: Tensor
    ssm_out: Tensor
    conv: Tensor
    conv_out: Tensor

    def mamba(self, layer: int) -> MambaState:
        """Where the rows' states of a Mamba layer are read and written."""
        p = self.pool
        return MambaState(p.conv[layer], p.ssm[layer], self.conv, self.ssm, self.conv_out, self.ssm_out)

    def kv(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of an attention layer: [pages, PAGE_SIZE, Hkv, P] each."""
        return self.pool.keys[layer], self.pool.values[layer]

    def let_in(self, pending: Pending, entered: Tensor) -> None:
        """Write the first entered[b] [B] int32 tokens of a verified block; there is room for all of it."""
        assert pending.hidden is not None
        L = pending.hidden.shape[1]
        position = self.lengths.unsqueeze(1) + torch.arange(L, device=self.lengths.device)  # [B, L]
        page, offset = self.page_table.gather(1, position // PAGE_SIZE), position % PAGE_SIZE
        for i, (k, v) in pending.kv.items():  # all L: tokens behind a row's length are not read
            keys, values = self.kv(i)
            keys[page, offset], values[page, offset] = k, v
        for i, (xBC, dt, weights, dt_limit) in pending.mamba.items():
            mamba_advance(xBC, dt, weights, self.mamba(i), entered, dt_limit=dt_limit)


class Cache(View):
    """Committed tokens of B rows. `commit` and `advance` extend it, `denoise` and `verify` only read it.

    Made by `TwoTower.prefill`. While its rows and its room stay the same, all its tensors keep their addresses.

    Attributes:
        lengths:     [B] int32, on the device: committed tokens of each row.
        page_table:  [B, pages of a row] int32.
        last_hidden: [B, D] hidden state of each row's last committed token, after the final norm; None if none.
    """

    pool: Pool

    def __init__(self, pool: Pool, rows: list[Row], device: torch.device, *, width: int = 1):
        """Rows that hold their places already; `width` pages fit into the page table before it is made anew."""
        slots, lengths = (
            torch.tensor([getattr(row, name) for row in rows], dtype=torch.int32, device=device)
            for name in ("slot", "length")
        )
        table = torch.zeros(len(rows), width, dtype=torch.int32, device=device)
        super().__init__(pool, lengths, table, slots, slots.clone(), 2 * slots, 2 * slots + 1)
        self._rows = rows
        self.last_hidden: Tensor | None = None
        self.head: Tensor | None = None
        weakref.finalize(self, _leave, pool, rows).atexit = False

    @classmethod
    def empty(
        cls,
        config: TwoTowerConfig,
        batch: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        far: torch.device | None = None,
        reserve: int = 0,
        forks: int = 0,
    ) -> Cache:
        """Empty rows, in a pool with room for them and `forks` further rows of `reserve` tokens each. far: where a
        denoiser tower reads it that has a device to itself."""
        width, slots = max(1, -(-reserve // PAGE_SIZE)), batch + forks
        pool = Pool(config, pages=slots * width, slots=slots, device=device, dtype=dtype, far=far)
        cache = cls(pool, [Row([], slot) for slot in pool.slots.take(batch)], device, width=width)
        cache.reserve(reserve)
        return cache

    @property
    def batch(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, known on the host."""
        return max((row.length for row in self._rows), default=0)

    @property
    def last_logits(self) -> Tensor:
        """[B, V] fp32 (fp64 in an fp64 model): the context tower's next-token logits after the last committed token."""
        if self.last_hidden is None or self.head is None:
            raise ValueError("last_logits: the cache is empty; prefill it with at least one token a row")
        acc = torch.promote_types(self.head.dtype, torch.float32)
        hidden, parts = self.last_hidden.to(acc), self.head.split(16384)
        return torch.cat([F.linear(hidden, part.to(acc)) for part in parts], -1)  # not rounded to 16 bits

    def states(self, layer: int) -> tuple[Tensor, Tensor]:
        """Copies of the rows' conv [B, C, K] and SSM [B, H, P, N] states of a Mamba layer."""
        return self.pool.conv[layer][self.conv.long()], self.pool.ssm[layer][self.ssm.long()]

    def for_denoiser(self) -> View:
        """What a denoiser pass reads: this cache, or what its device has of it, after what is new has gone there."""
        pool = self.pool
        if (far := pool.far) is None:
            return self
        if stale := pool.stale(self._rows):
            pool.send([self._rows[b] for b in stale], self.conv[numbers(stale, pool.device)])
        lengths, table, slots = (across(t, far.device) for t in (self.lengths, self.page_table, self.ssm))
        return View(far, lengths, table, slots, slots, 2 * slots, 2 * slots + 1)

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens in all. Nothing is copied while the pool has pages."""
        need = -(-tokens // PAGE_SIZE)
        self._widen(need)
        taken = []
        for b, row in enumerate(self._rows):
            more = self.pool.pages.take(max(0, need - len(row.pages)))
            taken += [(b, len(row.pages) + i, page) for i, page in enumerate(more)]
            row.pages += more
        self._enter(taken)

    def _widen(self, pages: int) -> None:
        have = self.page_table.shape[1]
        if pages > have:
            self.page_table = F.pad(self.page_table, (0, max(pages, 2 * have) - have))

    def _enter(self, taken: Sequence[tuple[int, int, int]]) -> None:
        """Write (row, place in the table, page) into the page table."""
        if taken:
            rows, places, pages = torch.tensor(taken, device=self.lengths.device).unbind(1)
            self.page_table[rows, places] = pages.int()

    def prepare(self, counts: Iterable[int]) -> None:
        """Make sure that what the next pass writes is each row's own: pages for counts[b] tokens, and its states.

        What other caches read too is left to them: the page that goes on is copied, states are written elsewhere.
        """
        pool, taken, copied = self.pool, [], []
        # Rows of this cache may share a slot too: all of them move, as none may write what another one reads.
        sharing = [b for b, row in enumerate(self._rows) if pool.slots.is_shared(row.slot)]
        moved = list(zip(sharing, pool.slots.take(len(sharing)), strict=True))
        for b, own in moved:
            pool.slots.leave(self._rows[b].slot)
            self._rows[b].slot = own
        for b, (row, count) in enumerate(zip(self._rows, counts, strict=True)):
            first, last = row.length // PAGE_SIZE, (row.length + count - 1) // PAGE_SIZE
            for place in range(first, last + 1):
                if place < len(row.pages) and not pool.pages.is_shared(row.pages[place]):
                    continue
                (own,) = pool.pages.take(1)
                if place == len(row.pages):
                    row.pages.append(own)
                else:
                    if place == first and row.length % PAGE_SIZE:
                        copied.append((row.pages[place], own))
                    pool.pages.leave(row.pages[place])
                    row.pages[place] = own
                taken.append((b, place, own))
        if taken:
            self._widen(1 + max(place for _, place, _ in taken))
            self._enter(taken)
        if copied:
            source, target = torch.tensor(copied, device=self.lengths.device).unbind(1)
            for pages in (*pool.keys.values(), *pool.values.values()):
                pages[target] = pages[source]
        if moved:
            rows, slots = torch.tensor(moved, device=self.lengths.device).unbind(1)
            self.ssm_out[rows], self.conv_out[rows] = slots.int(), 2 * slots.int()

    def extend(self, counts: Sequence[int], hidden: Tensor, entered: Tensor | None = None) -> None:
        """Count the tokens that a pass has written: counts[b] of row b, on the device in `entered` where it is not all
        L of `hidden` [B, L, D]; keep each row's last hidden state."""
        if self.last_hidden is None:
            self.last_hidden = hidden.new_zeros(hidden.shape[0], hidden.shape[2])
        if entered is None:
            self.last_hidden.copy_(hidden[:, -1])
            self.lengths.add_(hidden.shape[1])
        else:
            last = hidden[torch.arange(self.batch, device=hidden.device), (entered - 1).clamp(min=0).long()]
            self.last_hidden.copy_(torch.where((entered > 0).unsqueeze(1), last, self.last_hidden))
            self.lengths.add_(entered)
        for row, count in zip(self._rows, counts, strict=True):
            row.length += count
        self.ssm.copy_(self.ssm_out)
        self.conv.copy_(self.conv_out)
        self.conv_out.bitwise_xor_(1)

    def advance(self, pending: Pending, counts: Tensor) -> None:
        """Let the first counts[b] tokens of a verified block in.

        Args:
            pending: from `TwoTower.verify` on this cache, which must not have changed since, no fork of it.
            counts:  [B] int, 0..L.
        On a GPU it waits for the device once; `commit` and `verify` do not.
        """
        if not isinstance(counts, Tensor) or counts.dim() != 1 or counts.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"advance: counts is {counts!r}, expected a tensor of integers, one for each row")
        if pending.cache is not self:
            raise ValueError("advance: pending is of another cache, expected what `verify` gave for this one")
        if pending.hidden is None or pending.lengths is None or len(counts) != self.batch:
            raise ValueError(f"advance: counts has {len(counts)} rows, the cache has {self.batch}")
        L = pending.hidden.shape[1]
        entered = counts.to(self.lengths)
        # The one read of the device: how far each row has come is not known before.
        *listed, changed = torch.cat([entered, (pending.lengths != self.lengths).any().to(entered).view(1)]).tolist()
        if changed:
            raise ValueError("advance: the cache has changed since the block was verified")
        if min(listed) < 0 or max(listed) > L:
            raise ValueError(f"advance: counts is {listed}, expected values from 0 to the block's {L}")
        self.prepare([L] * self.batch)
        self.let_in(pending, entered)
        self.extend(listed, pending.hidden, entered)

    def fork(self, rows: Sequence[int] | Tensor | None = None) -> Cache:
        """A cache of some of the rows (None: all), in any order, a row as often as wanted; this one goes on as it was.

        Both read the same pages and states; the first to write gets places of its own, and neither ever sees the
        other's tokens. Copies nothing but [R, D] hidden states; a write into a page that is shared copies that page.

        Args:
            rows: [R] indices of rows.
        """
        listed = range(self.batch) if rows is None else rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not all(isinstance(row, int) and not isinstance(row, bool) and 0 <= row < self.batch for row in listed):
            raise ValueError(f"fork: rows is {listed}, expected 0 to {self.batch - 1}")
        device = self.lengths.device
        kept = [Row(list(r.pages), r.slot, r.length) for r in (self._rows[row] for row in listed)]
        for row in kept:
            self.pool.slots.hold(row.slot)
            for page in row.pages:
                self.pool.pages.hold(page)
        out = Cache(self.pool, kept, device, width=self.page_table.shape[1])
        index = torch.tensor(listed, dtype=torch.int64, device=device)
        for name in ("ssm", "ssm_out", "conv", "conv_out", "lengths", "page_table", "last_hidden"):
            t = getattr(self, name)
            setattr(out, name, None if t is None else t[index])
        out.head = self.head
        return out
