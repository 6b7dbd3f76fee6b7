"""The engine: many requests share a model's passes, coming and going between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..arguments import integer, row_seeds
from ..modeling.state import PAGE_SIZE, Cache
from ..modeling.two_tower import TwoTowerModel
from ..stops import whole
from ..vocabulary import Vocabulary
from .batches import Batches
from .board import Board
from .loops import PROGRAMS
from .passes import Outcome, Passes
from .prompts import check, prompt_ids
from .request import Request, Seen
from .runner import Runner, idle_rows
from .scheduler import Scheduler
from .settings import Settings, Step

EventKind = Literal["started", "tokens", "finished", "failed"]


@dataclass(frozen=True)
class Event:
    """Something that has happened to a request."""

    kind: EventKind
    request: Request
    tokens: tuple[int, ...] = ()  # new since the request's last event; "finished" has the last ones
    text: str = ""  # that has become certain since then


class Engine(Iterator[Event]):
    """Continues many prompts at once, each with settings of its own, on one model.

    Rows of different lengths, settings and modes share passes. A row leaves after the pass that ends it, and a prompt
    that waits takes its place; prompts are read beside rows that write. A request's tokens are those that it would get
    alone. Work is done where somebody waits for it: in `for event in engine`, and in `request.result()`. To be used
    from one thread.

    Args:
        model: a TwoTower. On a GPU its passes become CUDA graphs; its weights must stay where and as they are.
        max_rows: requests that run at a time. Each holds its Mamba states, 48 MB of the published model.
        max_tokens: tokens that all of them may hold together, prompts and what they may still write included.
        max_prefixes: beginnings of prompts that are kept to be shared, 48 MB each likewise; 0: none.
    Cost: pages and states are taken at once: 6 kB a token and 48 MB a row of the published model.

    Example:
        >>> engine = Engine(TwoTower.from_pretrained(), max_rows=4)
        >>> requests = [engine.submit(text, max_new_tokens=32) for text in ("def f(", "import ")]
        >>> for event in engine:
        ...     print(event.request.number, event.kind, repr(event.text))
    """

    def __init__(
        self,
        model: TwoTowerModel,
        *,
        max_rows: int = 16,
        max_tokens: int = 65536,
        max_prefixes: int = 8,
    ):
        integer("max_rows", max_rows, 1)
        integer("max_prefixes", max_prefixes, 0)
        pages = -(-integer("max_tokens", max_tokens, 1) // PAGE_SIZE)
        self.model, self.max_rows, self.max_tokens = model, max_rows, pages * PAGE_SIZE
        with torch.inference_mode():
            slots, idle = max_rows + max_prefixes, idle_rows(max_rows)
            self._board = Board(model, rows=max_rows, pages=pages, slots=slots, idle=idle)
        self._scheduler = Scheduler(self._board.pool, rows=max_rows, prefixes=max_prefixes)
        passes = Passes(model, self._board)
        self._batches = Batches(passes, self._board, self._scheduler.prefixes, Runner(passes))
        self._events: deque[tuple[EventKind, Request]] = deque()
        self._cancelled: list[Request] = []
        self._count, self._is_busy = 0, False

    # ---- for callers ----

    def submit(
        self,
        prompt: str | Sequence[int] | None = None,
        *,
        messages: Sequence[Mapping[str, str]] | None = None,
        prefix: Cache | None = None,
        seed: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        **settings: Any,
    ) -> Request:
        """Put a prompt into the queue; nothing is computed yet.

        Args:
            prompt: a text, which `model.tokenizer` encodes, or token ids; messages in its place: a conversation.
            prefix: a cache of one row, from `model.prefill`, that the prompt follows; it is copied when the request
                starts, and stays as it is. A text's tokens then begin without a begin-of-sequence token.
            seed: of its noise; None: from torch's default generator.
            on_step: called with a `Step` of the row `request.number` after every pass. What it raises ends it.
            **settings: as in `TwoTower.generate`.
        Raises: ValueError for what cannot be meant, or can never fit into `max_tokens`, before anything is queued.
        """
        if prefix is not None:
            self._board.check(prefix)
        vocabulary = self.model.tokenizer if self.model.has_tokenizer else None
        ids = prompt_ids(self.model, prompt, messages, bare=prefix is not None)
        s = Settings.of(self.model.config, **settings)
        check(self.model, [ids], s, on_step, vocabulary, prefix)
        (number,) = row_seeds(seed, 1, torch.device("cpu")).tolist()
        kept = None if prefix is None else prefix.fork()
        return self.enqueue(ids, s, number, on_step=on_step, vocabulary=vocabulary, prefix=kept)

    def enqueue(
        self,
        ids: Sequence[int],
        settings: Settings,
        seed: int,
        *,
        number: int | None = None,
        on_step: Callable[[Step], None] | None = None,
        vocabulary: Vocabulary | None = None,
        prefix: Cache | None = None,
    ) -> Request:
        """`submit` for what has been checked already. number: what `Step.rows` calls it; None: its own."""
        number = self._count if number is None else number
        request = Request(self, number, ids, settings, seed, on_step=on_step, vocabulary=vocabulary, prefix=prefix)
        self._scheduler.refuse(request)
        self._count += 1
        self._scheduler.waiting.append(request)
        return request

    def prepare(self, *, mode: str = "mask_diffusion", tokens: int = 2048, progress: bool = True, **more: Any) -> None:
        """On a GPU, capture the CUDA graphs of a mode now, for batches of all sizes and rows of up to `tokens` tokens,
        with a bar. Others are captured when they are first wanted, which holds up everybody for a second."""
        s = Settings.of(self.model.config, mode=mode, **more)
        check(self.model, [[]], s, None, None)
        self._batches.prepare(s, integer("tokens", tokens, 1), self.max_rows, progress=progress)

    def __iter__(self) -> Engine:
        return self

    def __next__(self) -> Event:
        """The next event, running passes until there is one; StopIteration when nothing is left to do."""
        if not self.run(lambda: bool(self._events)):
            raise StopIteration
        with whole():
            kind, request = self._events.popleft()
            if kind == "started":
                return Event(kind, request)
            if kind == "tokens":
                request.is_told = False
            return Event(kind, request, *request.news())

    def step(self) -> bool:
        """Make one pass, over the rows that share it; False when there is nothing to do."""
        with whole():
            return self._step()

    def run(self, until: Callable[[], bool]) -> bool:
        """Make passes until something holds; False when nothing is left to do before. Ctrl-C comes between two passes,
        as in `step`, which prepares for it each time."""
        while not until():
            with whole() as stop:
                while stop.number is None and not until():
                    if not self._step():
                        return False
        return True

    def finish(self, request: Request) -> None:
        """Run until a request has ended. Its events are not told any more."""
        if not self.run(lambda: not request.is_open):
            raise RuntimeError(f"engine: request {request.number} is {request.state}, and nothing is left to do")
        self._events = deque(event for event in self._events if event[1] is not request)

    def cancel(self, request: Request) -> None:
        """End a request where it is."""
        if request.is_open:
            with whole():
                request.state = "cancelled"
                self._cancelled.append(request)
                if not self._is_busy:
                    self._sweep()

    def forget(self) -> None:
        """Drop the events that nobody has read."""
        for _, request in self._events:
            request.is_told = False
        self._events.clear()

    def has_room(self, rows: int, tokens: int) -> bool:
        """Whether so many requests, of so many tokens together, could start at once."""
        scheduler = self._scheduler
        return rows <= len(scheduler.rows) and tokens <= len(self._board.pool.pages.free) * PAGE_SIZE

    # ---- between passes ----

    def _step(self) -> bool:
        if self._is_busy:
            raise RuntimeError("engine: it is in the middle of a pass, which this was called from")
        self._is_busy = True
        try:
            return self._pass()
        finally:
            self._is_busy = False

    def _pass(self) -> bool:
        self._sweep()
        self._admit()
        chosen = self._scheduler.choose()
        if chosen is None:
            assert not self._scheduler.waiting  # whoever waits fits into an empty pool: `refuse` has seen to that
            return bool(self._events)
        want, group = chosen
        try:
            outcome, seen = self._batches.make(want, group, beside=self._scheduler.is_mixed)
        except Exception as error:
            for request in group:
                self._fail(request, error)
            return True
        except BaseException:  # a second Ctrl-C in the middle of a pass: what it has written is in doubt
            for request in reversed(group):
                self._restart(request)
            raise
        self._look(outcome, seen)
        return True

    def _look(self, outcome: Outcome | None, seen: dict[Request, Seen]) -> None:
        """Let the programs of those that took part in a pass look at it, then `on_step`, then end those that ended."""
        left, ended = list(seen), list[Request]()
        try:
            while left:
                self._advance(left[0], seen[left[0]], ended)
                del left[0]
            self._show(outcome, seen)
        finally:
            for request in reversed(left):
                self._restart(request)
            for request in ended:
                if request.state == "running":
                    self._end(request, "finished")
            for request in seen:
                if request.state == "running" and len(request.tokens) > request.told[0]:
                    self._tell("tokens", request)

    def _sweep(self) -> None:
        """Let go of those that were cancelled."""
        while self._cancelled:
            self._end(self._cancelled.pop(), "cancelled")

    def _admit(self) -> None:
        for request, kept in self._scheduler.admit():
            try:
                self._batches.enter(request, kept)
            except Exception as error:  # as of a cache on a device that has gone
                self._fail(request, error)
                continue
            except BaseException:
                self._restart(request)
                raise
            request.program = PROGRAMS[request.settings.mode](request, self._board.mask)
            request.wants = next(request.program)
            if not request.has_started:
                self._tell("started", request)
                request.has_started = True
            if request.room == 0:
                self._end(request, "finished")

    def _advance(self, request: Request, seen: Seen, ended: list[Request]) -> None:
        """Let a request's program look at what a pass has made of its row."""
        assert request.program is not None
        if request.state != "running":  # cancelled in between
            return
        try:
            request.wants = request.program.send(seen)
        except StopIteration:
            ended.append(request)
        except Exception as error:
            self._fail(request, error)

    def _show(self, outcome: Outcome | None, seen: Mapping[Request, Seen]) -> None:
        """Tell `on_step` of the rows that a pass has changed: those that were at the same step together."""
        groups: dict[tuple[int, int], dict[Request, int]] = {}
        for request in seen:
            if request.shown is not None and request.on_step is not None and request.state == "running":
                start, step = request.shown
                groups.setdefault((id(request.on_step), step), {})[request] = start
            request.shown = None
        for (_, step), requests in groups.items():
            on_step = next(iter(requests)).on_step
            assert outcome is not None and on_step is not None
            places = torch.tensor([seen[r].place for r in requests], device=outcome.tokens.device)
            tokens, confidence = outcome.tokens[places], outcome.confidence[places]
            done = outcome.committed
            committed = torch.ones_like(tokens, dtype=torch.bool) if done is None else done[places]
            numbers, starts = [r.number for r in requests], list(requests.values())
            try:
                on_step(Step(numbers, starts, step, tokens, confidence, committed))
            except Exception as error:
                for request in requests:
                    self._fail(request, error)

    def _end(self, request: Request, state: Literal["finished", "cancelled", "failed"]) -> None:
        request.state = state
        if request.program is not None:
            request.program.close()
        if request.row >= 0:
            self._scheduler.release(request)
        else:
            self._scheduler.waiting.remove(request)
        request.prefix = request.program = request.wants = None
        self._tell("failed" if state == "failed" else "finished", request)

    def _fail(self, request: Request, error: BaseException) -> None:
        if request.state == "running":
            request.error = error
            self._end(request, "failed")

    def _restart(self, request: Request) -> None:
        """Put a request whose states are in doubt back to the front of the queue."""
        if request.state == "running":
            self._scheduler.release(request)
            if request.program is not None:
                request.program.close()
            request.state, request.program, request.wants = "waiting", None, None
            self._scheduler.waiting.appendleft(request)

    def _tell(self, kind: EventKind, request: Request) -> None:
        """Put an event into the queue; what is still unread of a request's tokens is one event."""
        if kind == "tokens":
            if request.is_told:
                return
            request.is_told = True
        self._events.append((kind, request))
