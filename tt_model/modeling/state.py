"""The context tower's memory of committed tokens: paged K/V per attention layer, conv and SSM state per Mamba layer.

Shapes: B rows, L tokens entering, Hkv key/value heads, P head size, C conv channels, K conv kernel, H Mamba heads,
N state size. Row b's token s lives in page `page_table[b, s // page_size]` at offset `s % page_size`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import TwoTowerConfig

PAGE_SIZE = 64


@dataclass
class Pending:
    """What `verify` keeps of a block so that `Cache.advance` can let any number of its tokens in."""

    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> k, v [B, L, Hkv, P]
    states: dict[int, tuple] = field(default_factory=dict)  # layer -> what its Mamba mixer's `advance` needs
    hidden: Tensor | None = None  # [B, L, D], after the final norm
    lengths: Tensor | None = None  # [B] of the cache when it was verified


class Cache:
    """Created by `TwoTower.prefill`; `commit` and `advance` extend it, `denoise` and `verify` only read it.

    Attributes:
        lengths:     [B] int32, on the device: committed tokens of each row.
        page_table:  [B, pages per row] int32.
        keys, values: layer -> [pages, page_size, Hkv, P].
        conv, ssm:   layer -> [B, C, K] and [B, H, P, N] (fp32, or fp64 in an fp64 model).
        last_hidden: [B, D] hidden state of each row's last committed token, after the final norm.
    """

    def __init__(self, config: TwoTowerConfig, batch: int, *, device: torch.device, dtype: torch.dtype):
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.page_table = torch.zeros(batch, 0, dtype=torch.int32, device=device)
        self.longest = 0  # no row is longer; known on the host
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.conv: dict[int, Tensor] = {}
        self.ssm: dict[int, Tensor] = {}
        self.last_hidden: Tensor | None = None
        self.head: Tensor | None = None
        for i, kind in enumerate(config.pattern):
            if kind == "*":
                empty = (0, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
                self.keys[i] = torch.empty(empty, device=device, dtype=dtype)
                self.values[i] = torch.empty(empty, device=device, dtype=dtype)
            elif kind == "M":
                heads = (batch, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                state_dtype = torch.promote_types(dtype, torch.float32)
                self.conv[i] = torch.zeros(batch, config.conv_dim, config.conv_kernel, device=device, dtype=dtype)
                self.ssm[i] = torch.zeros(heads, device=device, dtype=state_dtype)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def last_logits(self) -> Tensor:
        """[B, V] fp32 (fp64 in an fp64 model): the context tower's next-token logits after the last committed token."""
        if self.last_hidden is None or self.head is None:
            raise ValueError("last_logits: the cache is empty; prefill it with at least one token a row")
        acc = torch.promote_types(self.head.dtype, torch.float32)
        hidden, parts = self.last_hidden.to(acc), self.head.split(16384)
        return torch.cat([F.linear(hidden, part.to(acc)) for part in parts], -1)  # not rounded to 16 bits

    def reserve(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens. Copies all K/V when it has to grow, then to twice the room."""
        B, have = self.page_table.shape
        if tokens <= have * PAGE_SIZE:
            return
        need = max(-(-tokens // PAGE_SIZE), 2 * have)
        for pages in (self.keys, self.values):
            for i, old in pages.items():
                new = old.new_empty(B, need, *old.shape[1:])
                new[:, :have] = old[self.page_table.long()]
                pages[i] = new.flatten(0, 1)
        self.page_table = torch.arange(B * need, dtype=torch.int32, device=self.lengths.device).view(B, need)

    def select(self, rows: Tensor) -> Cache:
        """The cache of some rows [R] int64, all different: K/V pages are shared with this one, states are copied.

        From then on write to one of the two only: the other's pages may change.
        """
        listed = rows.tolist()
        if len(set(listed)) < len(listed):
            raise ValueError(f"select: rows is {listed}, expected different rows: they share their pages")
        if not all(0 <= row < self.batch for row in listed):
            raise ValueError(f"select: rows is {listed}, expected 0 to {self.batch - 1}")
        out = object.__new__(Cache)
        out.__dict__.update(self.__dict__)
        out.lengths, out.page_table = self.lengths[rows], self.page_table[rows]
        out.keys, out.values = dict(self.keys), dict(self.values)
        out.conv = {i: t[rows] for i, t in self.conv.items()}
        out.ssm = {i: t[rows] for i, t in self.ssm.items()}
        out.last_hidden = None if self.last_hidden is None else self.last_hidden[rows]
        return out

    def extend(self, L: int, counts: Tensor | None, hidden: Tensor) -> None:
        """Count L new tokens a row (the first counts[b] of them) and keep the last one's hidden state."""
        if counts is None:
            self.last_hidden = hidden[:, -1]
            self.lengths = self.lengths + L
        else:
            last = hidden[torch.arange(self.batch, device=hidden.device), (counts - 1).clamp(min=0).long()]
            if self.last_hidden is not None:
                last = torch.where((counts > 0).unsqueeze(1), last, self.last_hidden)
            self.last_hidden = last
            self.lengths = self.lengths + counts
        self.longest += L

    def advance(self, pending: Pending, lengths: Tensor) -> None:
        """Let the first lengths[b] tokens of a verified block in.

        Args:
            pending: from `TwoTower.verify` on this cache, which must not have changed since.
            lengths: [B] int, 0..L.
        On a GPU it waits for the device once; `commit` and `verify` do not.
        """
        if not isinstance(lengths, Tensor) or lengths.dim() != 1 or lengths.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"advance: lengths is {lengths!r}, expected a tensor of integers, one for each row")
        if pending.hidden is None or len(lengths) != self.batch:
            raise ValueError(f"advance: lengths has {len(lengths)} rows, the cache has {self.batch}")
        L = pending.hidden.shape[1]
        counts = lengths.to(self.lengths)
        ends = self.lengths + counts
        # The one read of the device: how far the longest row has come is not known before, nor what is in `lengths`.
        checks = (pending.lengths != self.lengths).any(), counts.min(), counts.max(), ends.max()
        changed, least, most, longest = torch.stack([c.to(ends) for c in checks]).tolist()
        if changed:
            raise ValueError("advance: the cache has changed since the block was verified")
        if least < 0 or most > L:
            raise ValueError(f"advance: lengths is {lengths.tolist()}, expected values from 0 to the block's {L}")
        self.reserve(self.longest + L)
        offsets = torch.arange(L, device=self.lengths.device)
        position = self.lengths.unsqueeze(1) + offsets  # [B, L]
        page, slot = self.page_table.gather(1, position // PAGE_SIZE), position % PAGE_SIZE
        for i, (k, v) in pending.kv.items():  # all L: what lies past a row's length is not read
            self.keys[i][page, slot], self.values[i][page, slot] = k, v
        for i, (mixer, projected) in pending.states.items():
            self.conv[i], self.ssm[i] = mixer.advance(*projected, self.conv[i], self.ssm[i], counts)
        self.extend(L, counts, pending.hidden)
        self.longest = longest  # far fewer than L may have come in
