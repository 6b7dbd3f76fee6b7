"""The signals that ask a program to end: Ctrl-C, SIGTERM and SIGHUP, all treated alike. Standard library only."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """One of `SIGNALS`, raised as Ctrl-C is."""

    def __init__(self, number: int = signal.SIGINT, message: str = "interrupted"):
        super().__init__(message)
        self.number = number


@contextmanager
def handling(handle: Callable[[int], None], signals: Sequence[int] = SIGNALS) -> Iterator[None]:
    """Call `handle` for each of the signals. One that is ignored (nohup, a job in the background) stays ignored;
    outside the main thread, which alone may do this, nothing changes."""
    before = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, lambda number, frame: handle(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Later:
    """A handler that holds signals back until something is whole: `number` is the first that came. A second Ctrl-C acts
    at once."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self, number: int) -> None:
        if self.number is None:
            self.number = number
        elif number == signal.SIGINT:
            raise Stopped(number)


@contextmanager
def whole() -> Iterator[Later]:
    """What is inside happens as a whole: Ctrl-C that comes meanwhile is handled after it. What goes on for long looks
    at `number`, and ends early."""
    later = Later()
    try:
        with handling(later, (signal.SIGINT,)):
            yield later
    finally:
        if later.number is not None:
            signal.raise_signal(later.number)


class Raise:
    """A handler that raises `Stopped`. After the first signal only Ctrl-C does: a terminal that closes sends several,
    and the clean-up that the first began must end."""

    def __init__(self) -> None:
        self.first: int | None = None

    def __call__(self, number: int) -> None:
        again, self.first = self.first is not None, self.first or number
        if not again or number == signal.SIGINT:
            raise Stopped(number)
