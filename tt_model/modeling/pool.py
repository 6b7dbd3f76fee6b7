"""The buffers of a context tower's state: K/V pages, conv and SSM states, who holds which, and what a denoiser on
another device has of them.

Shapes: Hkv key/value heads, P head size, C conv channels, K conv kernel, H Mamba heads, N state size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..config import TwoTowerConfig

PAGE_SIZE = 64
STAGED = 1 << 28  # bytes that cross to another device at a time: what a copy takes of both beside the buffers


class Layers(dict[int, Tensor]):
    """A buffer for each of some layers, all in one tensor [layers, places, ...]: what moves, moves in one go."""

    def __init__(self, layers: Sequence[int], whole: Tensor):
        super().__init__((layer, whole[i]) for i, layer in enumerate(layers))
        self.whole = whole

    def grow(self, more: int) -> None:
        new = self.whole.new_zeros(len(self), more, *self.whole.shape[2:])
        Layers.__init__(self, list(self), torch.cat([self.whole, new], 1))


class Places:
    """Equal places of buffers: which are free, how many rows hold each of the others, and of how many tokens the
    denoiser's device has what is in it."""

    def __init__(self, size: int, *buffers: Layers):
        self.holders = [0] * size
        self.sent = [-1] * size
        self.free = list(range(size - 1, -1, -1))
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self.holders)

    def take(self, count: int) -> list[int]:
        if count > len(self.free):
            self._grow(max(count - len(self.free), len(self)))
        taken = [self.free.pop() for _ in range(count)]
        for place in taken:
            self.holders[place], self.sent[place] = 1, -1
        return taken

    def _grow(self, more: int) -> None:
        size = len(self)
        for layers in self.buffers:  # a place may be several planes
            layers.grow(more * layers.whole.shape[1] // size)
        self.holders += [0] * more
        self.sent += [-1] * more
        self.free = [*range(size + more - 1, size - 1, -1), *self.free]

    def hold(self, place: int) -> None:
        self.holders[place] += 1

    def leave(self, place: int) -> None:
        self.holders[place] -= 1
        if not self.holders[place]:
            self.free.append(place)

    def is_shared(self, place: int) -> bool:
        return self.holders[place] > 1


class Buffers:
    """Of one device, a layer each.

    keys, values: [pages, PAGE_SIZE, Hkv, P]. ssm: [slots, H, P, N], fp32 (fp64 in an fp64 model). conv: [2 * slots, C,
    K], two planes a slot: a launch reads one and writes the other, since its other programs still read.
    """

    def __init__(self, config: TwoTowerConfig, *, pages: int, slots: int, device: torch.device, dtype: torch.dtype):
        attention, mamba = config.layers_of("*"), config.layers_of("M")
        kv = (len(attention), pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        conv = (len(mamba), 2 * slots, config.conv_dim, config.conv_kernel)
        ssm = (len(mamba), slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
        wide = torch.promote_types(dtype, torch.float32)
        self.device = device
        self.keys = Layers(attention, torch.empty(kv, device=device, dtype=dtype))
        self.values = Layers(attention, torch.empty(kv, device=device, dtype=dtype))
        self.conv = Layers(mamba, torch.zeros(conv, device=device, dtype=dtype))
        self.ssm = Layers(mamba, torch.zeros(ssm, device=device, dtype=wide))


@dataclass
class Row:
    """What the host knows of a row."""

    pages: list[int]
    slot: int
    length: int = 0  # tokens in the cache


class Held(Protocol):
    """A `Row`, or what has the same."""

    pages: list[int]
    slot: int
    length: int


class Pool(Buffers):
    """The buffers, and who holds which of their places.

    They keep their addresses until there are more pages or slots wanted than there are: then they are made twice as
    large, which copies them. `TwoTower.prefill` makes room for what it is told of (`reserve`, `forks`).

    far: where the denoiser tower has a device to itself, the same buffers there, in the same places.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        *,
        pages: int,
        slots: int,
        device: torch.device,
        dtype: torch.dtype,
        far: torch.device | None = None,
    ):
        super().__init__(config, pages=pages, slots=slots, device=device, dtype=dtype)
        self.far = None if far is None else Buffers(config, pages=pages, slots=slots, device=far, dtype=dtype)
        sides = [self] if self.far is None else [self, self.far]
        self.pages = Places(pages, *(layers for side in sides for layers in (side.keys, side.values)))
        self.slots = Places(slots, *(layers for side in sides for layers in (side.conv, side.ssm)))

    def stale(self, rows: Sequence[Held]) -> list[int]:
        """Which rows' last tokens the denoiser's device has not got. Only what grows is written: by a row's number of
        tokens its state is known, and when it was sent, all pages before it were."""
        return [b for b, row in enumerate(rows) if self.slots.sent[row.slot] < row.length]

    def send(self, rows: Sequence[Held], planes: Tensor) -> None:
        """Copy rows' states, and the pages with tokens that it lacks, to the denoiser's device; what rows share goes
        once. Work that was enqueued on both devices' current streams before is waited for there, not on the host.

        Args:
            rows: that are stale.
            planes: [B] where each one's conv state is; there it lies in its slot's first plane.
        """
        assert self.far is not None
        filled = {
            page: min(PAGE_SIZE, row.length - i * PAGE_SIZE)
            for row in rows
            for i, page in enumerate(row.pages[: -(-row.length // PAGE_SIZE)])
        }
        filled = {page: tokens for page, tokens in filled.items() if self.pages.sent[page] < tokens}
        slots = {row.slot: b for b, row in enumerate(rows)}
        pages, states = numbers([*filled], self.device), numbers([*slots], self.device)
        first = planes[numbers([*slots.values()], self.device)].long()
        for own, other, source, target in (
            (self.keys, self.far.keys, pages, pages),
            (self.values, self.far.values, pages, pages),
            (self.ssm, self.far.ssm, states, states),
            (self.conv, self.far.conv, first, 2 * states),
        ):
            _copy(own.whole, other.whole, source, target)
        for page, tokens in filled.items():
            self.pages.sent[page] = tokens
        for slot, b in slots.items():
            self.slots.sent[slot] = rows[b].length


def _copy(source: Tensor, target: Tensor, here: Tensor, there: Tensor) -> None:
    """Some places [n] of one buffer of layers to places of another's."""
    if not source.numel() or not len(here):
        return
    most = max(1, STAGED * source.shape[1] // source.nbytes)
    for one, other in zip(here.split(most), there.split(most), strict=True):
        part = source.index_select(1, one)
        target.index_copy_(1, across(other, target.device), across(part, target.device))


def across(t: Tensor, device: torch.device) -> Tensor:
    """A tensor on another device of its kind: in the order of both devices' current streams, not for the host."""
    return t.to(device, non_blocking=True)


def numbers(listed: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers of the host on a device, without waiting for it."""
    t = torch.tensor(listed, dtype=torch.int64)
    return across(t.pin_memory() if device.type == "cuda" else t, device)
