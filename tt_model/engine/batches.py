"""Passes for requests that want the same: what they are made over, and what each request sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..modeling.state import PAGE_SIZE
from ..modeling.two_tower import PREFILL_CHUNK, prefill_stretch
from .board import Board
from .loops import WANTS
from .passes import Kind, Outcome, Pass, Passes
from .prefixes import Kept, Prefixes
from .request import AHEAD, PREFILL, Read, Request, Seen, Want
from .runner import Runner
from .settings import Settings

# Tokens of prompts that are read in one pass while others write: about as long as reading the experts' weights takes.
BESIDE = 2048


class Batches:
    """Brings requests to the board and makes their passes."""

    def __init__(self, passes: Passes, board: Board, prefixes: Prefixes, runner: Runner):
        self.passes, self.board, self.prefixes, self.runner = passes, board, prefixes, runner
        self.ahead = AHEAD if runner.graphs else 1  # AR steps between two looks: a CPU has nothing to wait for

    @torch.inference_mode()
    def enter(self, request: Request, kept: Kept | None) -> None:
        """Bring a request that has been admitted to the board; it goes on after what is kept, or after its prefix."""
        for board in {self.board, self.board.far}:
            board.enter(request.row, request.slot, request.pages, request.settings, request.seed)
        if kept is not None:
            self.board.copy_states(kept.slot, None, request.slot)
        if request.prefix is not None:
            self.board.take_over(request.prefix, request.slot, request.pages)
            request.length = request.base
        self.board.begin(request.row, request.length)

    def make(self, want: Want, group: Sequence[Request], *, beside: bool) -> tuple[Outcome | None, dict[Request, Seen]]:
        """The pass that a group wants, and who is to look at it. beside: whether others write meanwhile."""
        return self._read(group, beside) if want == PREFILL else self._write(want, group)

    def _write(self, want: Want, group: Sequence[Request]) -> tuple[Outcome, dict[Request, Seen]]:
        repeat = 1
        if want.kind == "ar" and not any(request.on_step for request in group):
            repeat = min(self.ahead, max(request.room for request in group))  # what is behind an end is cut off
        what = self._what(want, group, max(want.length, repeat))._replace(repeat=repeat)
        rows = [request.row for request in group]
        if self.passes.is_apart:
            self._cross(want, rows, group)
        outcome = self.runner(what, rows)
        read = Read(outcome)
        for request in group:
            request.forwards += 2 if want.kind == "mock_ar" else min(repeat, request.room)
        return outcome, {request: Seen(read, place) for place, request in enumerate(group)}

    @torch.inference_mode()
    def _cross(self, want: Want, rows: Sequence[int], group: Sequence[Request]) -> None:
        """Between devices: what a pass needs of the other tower's. It is left until then, so that meanwhile the other
        device has passes of other rows to make."""
        if want.kind in ("commit", "verify"):
            self.passes.to_context(rows, want.length)
        elif want.kind != "ar":
            behind = [group[b] for b in self.passes.to_denoiser(rows, group)]
            if want.kind == "denoise":  # a row that has more tokens begins a block
                self._begin(behind)

    def prepare(self, s: Settings, tokens: int, rows: int, *, progress: bool) -> None:
        """Have the passes of a request with such settings captured for batches of up to so many rows."""
        narrow = s.top_k is not None or s.top_p is not None
        for want in WANTS[s.mode](s):
            repeat = self.ahead if want.kind == "ar" else 1
            pages = 1
            while pages < 2 * -(-tokens // PAGE_SIZE):
                rules = s.has_rules and want.kind == "denoise"
                what = Pass(cast(Kind, want.kind), want.length, pages, narrow, repeat, rules)
                self.runner.prepare(what, rows, progress=progress)
                pages *= 2

    def _what(self, want: Want, group: Sequence[Request], more: int) -> Pass:
        longest = max(request.length for request in group) + more
        narrow = any(r.settings.top_k is not None or r.settings.top_p is not None for r in group)
        rules = want.kind == "denoise" and any(r.settings.has_rules for r in group)
        return Pass(cast(Kind, want.kind), want.length, -(-longest // PAGE_SIZE), narrow, rules=rules)

    def _read(self, group: Sequence[Request], beside: bool) -> tuple[Outcome | None, dict[Request, Seen]]:
        """Read a stretch of each prompt. Who is through looks at the token that comes next, if its mode wants one."""
        contexts = [request.context() for request in group]
        most = prefill_stretch(len(group))
        if beside:
            most = max(PAGE_SIZE, most * BESIDE // PREFILL_CHUNK)
        counts = [min(self._stop(r, c) - r.length, most) for r, c in zip(group, contexts, strict=True)]
        parts = [c[r.length - r.base :][:n] for r, c, n in zip(group, contexts, counts, strict=True)]
        through = [r.length + n == r.base + len(c) for r, c, n in zip(group, contexts, counts, strict=True)]
        ends = [i for i, r in enumerate(group) if through[i] and r.settings.mode in ("ar", "speculative")]
        outcome = self._stretch(group, parts, ends) if any(parts) else None
        read = Read(outcome)
        for request, count in zip(group, counts, strict=True):
            request.length += count
            if request.cut is not None and request.length == request.cut[0]:
                self._keep(request)
        seen = {r: Seen(read, ends.index(i) if i in ends else -1) for i, r in enumerate(group) if through[i]}
        self._start(list(seen))
        return outcome, seen

    @staticmethod
    def _stop(request: Request, context: Sequence[int]) -> int:
        """The length at which reading stops: where states are to be kept, or the prompt ends."""
        return request.base + len(context) if request.cut is None else request.cut[0]

    def _stretch(self, group: Sequence[Request], parts: Sequence[Sequence[int]], ends: list[int]) -> Outcome | None:
        L = max(map(len, parts))
        ids = self._to_device([[*part, *[0] * (L - len(part))] for part in parts])
        counts = self._to_device([len(part) for part in parts]).int()
        where = self._to_device(ends) if ends else None
        return self.passes.prefill(self._rows(group), ids, counts, self._what(PREFILL, group, L), where)

    def _rows(self, group: Sequence[Request]) -> Tensor:
        return self._to_device([request.row for request in group])

    def _to_device(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64).to(self.board.device)

    @torch.inference_mode()
    def _start(self, group: Sequence[Request]) -> None:
        """Give those whose prompts have been read what their first pass begins from."""
        for request in group:
            request.forwards = max(1, request.forwards)
            if request.settings.mode == "mock_ar":
                self.board.token[request.row].fill_((request.prompt + request.tokens)[-1])
        if not self.passes.is_apart:
            self._begin([request for request in group if request.settings.mode not in ("ar", "mock_ar")])

    def _begin(self, group: Sequence[Request]) -> None:
        """The rows' next blocks."""
        blocks: dict[tuple[int, bool], list[Request]] = {}
        for request in group:
            draft = request.settings.mode == "speculative"
            blocks.setdefault((request.settings.block_size, draft), []).append(request)
        for (size, draft), requests in blocks.items():
            self.passes.start(self._rows(requests), size, draft=draft)

    @torch.inference_mode()
    def _keep(self, request: Request) -> None:
        """Keep what a request has read so far for others that begin alike."""
        assert request.cut is not None
        length, key = request.cut
        slot = self.prefixes.keep(key, request.pages[: length // PAGE_SIZE])
        if slot is not None:
            self.board.copy_states(request.slot, request.row, slot)
        request.cut = None
