"""Generation as it happens: blocks resolving in the terminal, tokens coloured by the model's confidence."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from ..engine.settings import Step
    from ..vocabulary import Vocabulary

_RED, _YELLOW, _GREEN = (230, 60, 60), (220, 190, 40), (60, 200, 80)  # also distinct where only 16 colours are
_MASK = "░"
# Control characters, the escape that begins terminal commands among them, as their visible pictures.
_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | dict.fromkeys(range(127, 160), 65533)


def visible(text: str) -> str:
    """A text that can be shown on a terminal: what a model writes must not command it."""
    return text.translate(_PICTURES)


def colour(confidence: float) -> str:
    """From red (0) through yellow (0.5) to green (1)."""
    low, high = (_RED, _YELLOW) if confidence < 0.5 else (_YELLOW, _GREEN)
    share = min(1.0, max(0.0, confidence * 2 - (confidence >= 0.5)))
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(low, high, strict=True)))


class Watch:
    """A live view of one sequence; `step` is what `generate` calls after every pass.

    Off a terminal, and without a console, nothing is shown.
    Afterwards `coloured` gives the final text with its colours.
    """

    PROMPT = "bold"  # how it is told from what was generated

    def __init__(self, console: Console | None, prompt: str, prompt_length: int, vocabulary: Vocabulary | None):
        self.prompt, self.prompt_length, self.vocabulary = prompt, prompt_length, vocabulary
        self.tokens: list[int] = []
        self.confidence: list[float | None] = []  # None: still masked
        self.passes = 0
        self._lock = threading.Lock()
        shown = console is not None and console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, refresh_per_second=15, transient=True) if shown else None

    @property
    def is_live(self) -> bool:
        """Whether it shows anything, and leaves it there when it is interrupted."""
        return self._live is not None

    def __enter__(self) -> Watch:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            with suppress(OSError) if kind else nullcontext():  # a terminal that has gone must not hide what happened
                self._live.stop()
                if kind:  # the live view goes; what was generated so far stays
                    self._live.console.print(self.coloured(), soft_wrap=True)

    def step(self, step: Step) -> None:
        tokens, committed = step.tokens[0].tolist(), step.committed[0].tolist()
        confidence = step.confidence[0].tolist()
        begin = step.start[0] - self.prompt_length
        with self._lock:
            self.passes += 1
            missing = begin + len(tokens) - len(self.tokens)
            self.tokens += [0] * missing
            self.confidence += [None] * missing
            self.tokens[begin : begin + len(tokens)] = tokens
            for i, (now, p) in enumerate(zip(committed, confidence, strict=True), begin):
                if now:
                    self.confidence[i] = p

    def coloured(self, length: int | None = None) -> Text:
        """Prompt and tokens, up to `length` of them; masked positions are dim."""
        with self._lock:  # Ctrl-C may have come between the two lists' growing
            pairs = list(zip(self.tokens, self.confidence, strict=False))[:length]
        out = Text().append(visible(self.prompt), style=self.PROMPT)  # not Text(style=...): that would style all of it
        for masked, run in groupby(pairs, key=lambda pair: pair[1] is None):
            tokens, confidence = zip(*run, strict=True)
            if masked:
                out.append(_MASK * len(tokens), style="dim")
            else:
                self._append(out, tokens, confidence)
        return out

    def _append(self, out: Text, tokens: Sequence[int], confidence: Sequence[float]) -> None:
        """Tokens in their colours, by themselves where there is no vocabulary to read them with."""
        pieces = self.vocabulary.pieces(tokens) if self.vocabulary else ((f" {token}", 1) for token in tokens)
        i = 0
        for text, count in pieces:
            out.append(visible(text), style=colour(min(confidence[i : i + count])))
            i += count

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The last lines that fit, and a legend below them."""
        lines = self.coloured().wrap(console, options.max_width)
        room = max(1, console.height - 2)
        yield Text("\n").join(lines[-room:])
        legend = Text("confidence ", style="dim", no_wrap=True, overflow="crop")
        for p in (0.1, 0.3, 0.5, 0.7, 0.9):
            legend.append(f" {p}", style=colour(p))
        legend.append(f"   {_MASK} masked   pass {self.passes}", style="dim")
        yield legend
