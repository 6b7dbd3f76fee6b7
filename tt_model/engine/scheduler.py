"""Who runs: admission by what a request can need at most, and the next pass. Nothing here touches the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from ..modeling.pool import PAGE_SIZE, Pool
from .prefixes import Kept, Prefixes, page_keys
from .request import PREFILL, Request, Want


class Admitted(NamedTuple):
    """A request that has a row, a slot and pages, and what it may begin from."""

    request: Request
    kept: Kept | None


class Scheduler:
    """Rows, pages and slots, and the requests that hold them or wait for them.

    The pool has a slot for each row and each prefix, so that a row always finds one.
    """

    def __init__(self, pool: Pool, *, rows: int, prefixes: int):
        self.pool, self.prefixes = pool, Prefixes(pool, prefixes)
        self.total = len(pool.pages.free)
        self.rows = list(range(rows - 1, -1, -1))  # that are free
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.turn, self.was_reading = 0, False

    def refuse(self, request: Request) -> None:
        """ValueError for a request that will never fit."""
        need = -(-request.most() // PAGE_SIZE)
        if need > self.total:
            given = f"{request.base + len(request.prompt)} tokens and {request.settings.max_new_tokens} new ones"
            have = self.total * PAGE_SIZE
            raise ValueError(f"prompt: {given} need room for {need * PAGE_SIZE}, the engine's max_tokens is {have}")

    def admit(self) -> Iterator[Admitted]:
        """Give places to those who have waited longest, until one does not fit."""
        while self.waiting and self.rows:
            request = self.waiting[0]
            keys = [] if request.prefix is not None else page_keys(request.prompt + request.tokens)
            kept = self.prefixes.find(keys)
            shared = [] if kept is None else list(kept.pages)
            for page in shared:
                self.pool.pages.hold(page)
            need = -(-request.most() // PAGE_SIZE) - len(shared)
            free = self.pool.pages.free
            if need > len(free) + self.prefixes.droppable(but=kept):  # beginnings go only where that is enough
                for page in shared:
                    self.pool.pages.leave(page)
                return
            while need > len(free):
                self.prefixes.drop(but=kept)
            yield self._place(request, kept, [*shared, *self.pool.pages.take(need)], keys)

    def _place(self, request: Request, kept: Kept | None, pages: list[int], keys: list[bytes]) -> Admitted:
        self.waiting.popleft()
        request.row, (request.slot,), request.pages = self.rows.pop(), self.pool.slots.take(1), pages
        request.length = request.cached_tokens = 0 if kept is None else kept.length
        request.cut = self.prefixes.cut(keys, request.length)
        request.state, request.turn = "running", self.turn
        self.running.append(request)
        return Admitted(request, kept)

    def release(self, request: Request) -> None:
        """Take back what a request holds."""
        self.running.remove(request)
        self.rows.append(request.row)
        self.pool.slots.leave(request.slot)
        for page in request.pages:
            self.pool.pages.leave(page)
        request.row, request.slot, request.pages = -1, -1, []

    def choose(self) -> tuple[Want, list[Request]] | None:
        """The next pass and who takes part; None when nobody runs.

        A pass costs much the same for many rows as for few, so the one goes first whose rows have waited most passes
        together. The exponent makes long waits count more: a lone row of another mode is not held up by the number of
        the others. Prompts are read in every other pass, as long as others write.
        """
        groups: dict[Want, list[Request]] = {}
        for request in self.running:
            assert request.wants is not None
            groups.setdefault(request.wants, []).append(request)
        if not groups:
            return None
        readers = groups.pop(PREFILL, [])
        if readers and not (groups and self.was_reading):
            self.was_reading = True
            return PREFILL, readers
        self.was_reading = False
        self.turn += 1
        want, group = max(groups.items(), key=lambda item: sum((self.turn - r.turn) ** 1.5 for r in item[1]))
        for request in group:
            request.turn = self.turn
        return want, group

    @property
    def is_mixed(self) -> bool:
        """Whether somebody runs whose prompt has been read."""
        return any(request.wants != PREFILL for request in self.running)
