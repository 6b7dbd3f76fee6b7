"""One prompt on its way through an engine: what it asked for, what it has got, and what it needs next."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from ..vocabulary import Vocabulary, Writing
from .passes import Kind, Outcome
from .settings import Result, Settings, Step

if TYPE_CHECKING:
    from ..modeling.state import Cache

AHEAD = 4  # AR steps that a GPU makes before the host looks
State = Literal["waiting", "running", "finished", "cancelled", "failed"]


class Want(NamedTuple):
    """A pass that a request needs: those that want the same share it."""

    kind: Kind | Literal["prefill"]
    length: int = 0  # tokens of the row; 0: however many


PREFILL = Want("prefill")


class Read:
    """The outcome of a pass on the host: what is always wanted at once, the rest where somebody asks."""

    def __init__(self, outcome: Outcome | None):
        self.outcome = outcome
        self.listed: list[list[int]] = [] if outcome is None else outcome.listed.tolist()

    @cached_property
    def confidence(self) -> list[list[float]]:
        assert self.outcome is not None
        return self.outcome.confidence.tolist()

    @cached_property
    def committed(self) -> list[list[bool]]:
        assert self.outcome is not None and self.outcome.committed is not None
        return self.outcome.committed.tolist()


class Seen(NamedTuple):
    """A row's place in the outcome of a pass; none after a prompt whose mode wants no token then."""

    read: Read
    place: int

    @property
    def listed(self) -> list[int]:
        return self.read.listed[self.place]

    @property
    def confidence(self) -> list[float]:
        return self.read.confidence[self.place]

    @property
    def committed(self) -> list[bool]:
        return self.read.committed[self.place]


Program = Generator[Want, Seen, None]  # what a request does: see loops.py


class Runs(Protocol):
    """What a request asks of its engine."""

    def finish(self, request: Request) -> None: ...

    def cancel(self, request: Request) -> None: ...


def room_for(prompt: int, settings: Settings) -> int:
    """Tokens that a prompt of so many can come to hold in the cache: a pass writes a whole block, or `AHEAD` tokens."""
    blocks = settings.mode in ("mask_diffusion", "speculative")
    return prompt + settings.max_new_tokens + max(settings.block_size if blocks else 1, AHEAD)


class Request:
    """A prompt that an engine continues. Made by `Engine.submit`.

    Attributes:
        number:  counts an engine's requests from 0.
        prompt:  its token ids.
        state:   "waiting" for room, "running", "finished", "cancelled" or "failed".
        tokens:  new tokens so far.
        error:   what it failed of, None if it did not.
        cached_tokens: of the prompt, that did not have to be read as an earlier prompt began alike.
    """

    def __init__(
        self,
        engine: Runs,
        number: int,
        prompt: Sequence[int],
        settings: Settings,
        seed: int,
        *,
        on_step: Callable[[Step], None] | None = None,
        vocabulary: Vocabulary | None = None,
        prefix: Cache | None = None,
    ):
        self._engine, self.number, self.prompt, self.settings, self.seed = engine, number, list(prompt), settings, seed
        self.on_step, self.prefix = on_step, prefix
        self.state: State = "waiting"
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.nfe = self.forwards = self.cycles = self.cached_tokens = 0
        self.finish_reason = "length"
        self._logprobs: list[float] = []
        self._writing = Writing(vocabulary, self.prompt, settings.stop) if vocabulary else None
        # Where it is, known to the engine. `length`: tokens in the cache.
        self.row, self.slot, self.length, self.pages = -1, -1, 0, list[int]()
        self.cut: tuple[int, bytes] | None = None  # a length at which its states are kept for others, and its key
        self.program: Program | None = None
        self.wants: Want | None = None
        self.has_started = False  # and is told to have
        self.turn = 0  # the last one that it had
        self.told = [0, 0]  # tokens and characters that events have told
        self.is_told = False  # an event waits to tell more
        self.shown: tuple[int, int] | None = None  # start and step of what `on_step` is to be told

    def __repr__(self) -> str:
        return f"<Request {self.number}: {self.state}, {len(self.prompt)} tokens read, {len(self.tokens)} written>"

    # ---- for callers ----

    @property
    def is_open(self) -> bool:
        """Whether there is more to come."""
        return self.state in ("waiting", "running")

    def result(self) -> Result:
        """Run the engine until this request has ended; what became of it. Others go on with it.

        Raises what it failed of. A request that was cancelled gives what there was, `finish_reason` "cancelled".
        """
        self._engine.finish(self)
        if self.error is not None:
            raise self.error
        return self.so_far()

    def cancel(self) -> None:
        """End it where it is. Nothing happens to one that has ended."""
        self._engine.cancel(self)

    def so_far(self) -> Result:
        """What it has got until now, without running anything; while it is open, `finish_reason` is its state."""
        reason = self.finish_reason if self.state == "finished" else self.state
        logprobs = list(self._logprobs) if self.settings.logprobs else None
        text = None if self._writing is None else self._writing.whole()
        return Result(list(self.tokens), self.nfe, self.forwards, self.cycles, reason, logprobs, text)

    # ---- for its program ----

    @property
    def room(self) -> int:
        """Tokens that are still wanted."""
        return self.settings.max_new_tokens - len(self.tokens)

    def report(self, step: int) -> None:
        """What this pass has made is to be shown."""
        self.shown = self.length, step

    def write(self, tokens: Sequence[int], probabilities: Iterable[float] = ()) -> bool:
        """Take new tokens, predicted with these probabilities, up to the end; whether it has come."""
        room, ends = self.room, self.settings.eos_token_ids
        taken = list(tokens[:room])
        end = next((i + 1 for i, t in enumerate(taken) if t in ends), None)
        taken, reason = taken[:end], "eos"
        if self._writing is not None and (cut := self._writing.push(taken)) is not None:
            taken, end, reason = taken[:cut], cut, "stop"
        self.tokens += taken
        if self.settings.logprobs:
            logs = (math.log(p) if p > 0 else -math.inf for p in probabilities)
            self._logprobs += [log for log, _ in zip(logs, taken, strict=False)]
        if end is not None:
            self.finish_reason = reason
        return end is not None or len(taken) == room

    # ---- for the engine ----

    @property
    def base(self) -> int:
        """Tokens of the cache that it begins with."""
        return 0 if self.prefix is None else self.prefix.longest

    def context(self) -> list[int]:
        """The tokens that the context tower reads before the first pass; mock-AR's denoiser reads the last one."""
        ids = self.prompt + self.tokens
        return ids[:-1] if self.settings.mode == "mock_ar" else ids

    def most(self) -> int:
        """Tokens that it can come to hold in the cache."""
        return self.base + room_for(len(self.prompt), self.settings)

    def news(self) -> tuple[tuple[int, ...], str]:
        """Tokens, and text that has become certain, since it was asked for last."""
        text = "" if self._writing is None else self._writing.text if self.is_open else self._writing.whole()
        tokens, new = tuple(self.tokens[self.told[0] :]), text[self.told[1] :]
        self.told = [len(self.tokens), len(text)]
        return tokens, new
