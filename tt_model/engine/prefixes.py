"""Beginnings that prompts share: their pages, and the Mamba states at the end of the last one.

A page's key is a hash of all tokens up to its end. A prompt can begin only where there is a state, 48 MB of the
published model, so states are kept where they are known to be of use: at the end of what a prompt shares with an
earlier one. The first prompt leaves its keys, the second one a state on its way, the third one begins from that.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

from ..modeling.pool import PAGE_SIZE, Pool

SEEN = 1 << 16  # pages of prompts that are remembered, 16 bytes each


class Kept(NamedTuple):
    """A beginning that a prompt may start from."""

    pages: list[int]
    slot: int

    @property
    def length(self) -> int:
        return len(self.pages) * PAGE_SIZE


def page_keys(ids: Sequence[int]) -> list[bytes]:
    """A key for each full page of a prompt that leaves a token to be read."""
    keys, key = [], b""
    for start in range(0, len(ids) - PAGE_SIZE, PAGE_SIZE):
        key = blake2b(key + array("q", ids[start : start + PAGE_SIZE]).tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class Prefixes:
    """At most `most` beginnings, the ones used last."""

    def __init__(self, pool: Pool, most: int):
        self.pool, self.most = pool, most
        self.kept: OrderedDict[bytes, Kept] = OrderedDict()
        self.seen: OrderedDict[bytes, None] = OrderedDict()

    def find(self, keys: Sequence[bytes]) -> Kept | None:
        """The longest beginning that is kept; whoever takes it holds its pages."""
        for key in reversed(keys):
            if (kept := self.kept.get(key)) is not None:
                self.kept.move_to_end(key)
                return kept
        return None

    def cut(self, keys: Sequence[bytes], begun: int) -> tuple[int, bytes] | None:
        """Where above `begun` a prompt's states are to be kept: a length and its key. It counts as seen from now on."""
        if not self.most:
            return None
        shared = next((i for i, key in enumerate(keys) if key not in self.seen), len(keys))
        for key in keys:
            self.seen[key] = None
            self.seen.move_to_end(key)
        while len(self.seen) > SEEN:
            self.seen.popitem(last=False)
        return (shared * PAGE_SIZE, keys[shared - 1]) if shared * PAGE_SIZE > begun else None

    def keep(self, key: bytes, pages: Sequence[int]) -> int | None:
        """Hold a beginning; the slot that its states are to be copied to, None where there is none or it is kept."""
        if key in self.kept:
            return None
        while (len(self.kept) >= self.most or not self.pool.slots.free) and self.drop():
            pass
        if len(self.kept) >= self.most or not self.pool.slots.free:
            return None
        (slot,) = self.pool.slots.take(1)
        for page in pages:
            self.pool.pages.hold(page)
        self.kept[key] = Kept(list(pages), slot)
        return slot

    def drop(self, but: Kept | None = None) -> bool:
        """Let the beginning go that was used longest ago; False if there is none, `but` apart."""
        key = next((key for key, kept in self.kept.items() if kept is not but), None)
        if key is None:
            return False
        kept = self.kept.pop(key)
        self.pool.slots.leave(kept.slot)
        for page in kept.pages:
            self.pool.pages.leave(page)
        return True

    def droppable(self, but: Kept | None = None) -> int:
        """Pages that are free when all beginnings have gone, `but` apart: those that nobody else holds."""
        held = Counter(page for kept in self.kept.values() if kept is not but for page in kept.pages)
        return sum(self.pool.pages.holders[page] == count for page, count in held.items())
