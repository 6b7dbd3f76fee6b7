"""The passes of an engine, each over some rows of its board: what a CUDA graph holds.

A pass reads and writes the board's buffers and the model's weights; nothing on the host decides in the middle of it,
so that one with equal `Pass` and other rows is the same work on the same addresses. B rows, L tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tt_kernels import head_sample, skip_checks, unmask

from ..modeling.pool import Held, across, numbers
from ..modeling.state import ForwardContext, Pending, View
from ..modeling.two_tower import TwoTowerModel
from .board import Board

Kind = Literal["denoise", "commit", "ar", "mock_ar", "verify"]


class Pass(NamedTuple):
    """What a pass does, apart from the rows that it does it to."""

    kind: Kind
    length: int  # L
    pages: int  # of a row that it may read and write
    narrow: bool = False  # whether top_k or top_p is to be looked at
    repeat: int = 1  # in "ar": steps, of a token each
    rules: bool = False  # in "denoise": whether a strategy is to be looked at


class Outcome(NamedTuple):
    """What a pass tells the host."""

    listed: Tensor  # [B, n] int64: what decides how a row goes on
    tokens: Tensor  # [B, L], confidence and committed: what `Step` shows
    confidence: Tensor  # [B, L] float
    committed: Tensor | None = None  # [B, L] bool; None: all


class Passes:
    """A model's passes over a board; the denoiser's over `far`, which is another where the towers are apart."""

    def __init__(self, model: TwoTowerModel, board: Board):
        self.model, self.board, self.far = model, board, board.far
        self.is_apart = self.far is not board

    def device(self, what: Pass) -> torch.device:
        """Of what it reads and writes; "mock_ar" needs both where the towers are apart."""
        return (self.far if what.kind == "denoise" else self.board).device

    @torch.inference_mode()
    def __call__(self, what: Pass, rows: Tensor) -> Outcome:
        """Make a pass over rows [B] int64, idle ones among them."""
        with skip_checks():
            return getattr(self, f"_{what.kind}")(rows, what)

    @torch.inference_mode()
    def prefill(self, rows: Tensor, ids: Tensor, counts: Tensor, what: Pass, ends: Tensor | None) -> Outcome | None:
        """The first counts[b] of the tokens [B, L] enter. ends: the places in the batch of those whose next token the
        context tower chooses; None: of none."""
        with skip_checks():
            hidden = self._extend(rows, ids, self.board.view(rows, what.pages), counts)
            if ends is None:
                return None
            return self._next(rows[ends], hidden[ends, (counts[ends] - 1).long()], what)

    def _extend(self, rows: Tensor, ids: Tensor, view: View, counts: Tensor | None = None) -> Tensor:
        hidden = self.model.context_tower(ids, ForwardContext("extend", view, counts))
        self.board.count(rows, view, ids.shape[1] if counts is None else counts)
        return hidden

    def _next(self, rows: Tensor, hidden: Tensor, what: Pass) -> Outcome:
        """The context tower's token after the last one of each row, from its hidden state [B, D]."""
        board = self.board
        position = board.lengths.index_select(0, rows).long()
        sampling = board.sampling(rows, position, torch.zeros_like(position), narrow=what.narrow)
        return self._chosen(rows, *head_sample(hidden, self.model.context_lm_head.matrix, sampling))

    def _chosen(self, rows: Tensor, token: Tensor, confidence: Tensor) -> Outcome:
        self.board.token.index_copy_(0, rows, token)
        self.board.certain.index_copy_(0, rows, confidence)
        column = token.unsqueeze(1)
        return Outcome(column, column, confidence.unsqueeze(1))

    def _renew(self, rows: Tensor, L: int, token: Tensor | None = None) -> None:
        """A block of mask tokens, or of one that is certain and mask tokens, for each row that is not idle."""
        board, lane = self.far, self.far.lane(L)
        live = rows < board.rows
        block = torch.where(live.unsqueeze(1), board.mask, lane.block.index_select(0, rows))
        if token is not None:
            block[:, 0] = torch.where(live, token, block[:, 0])
        lane.block.index_copy_(0, rows, block)
        lane.masked.index_copy_(0, rows, (L - (token is not None)) * live)
        board.step.index_fill_(0, rows, 0)  # not `[rows] = 0`, which copies a number from the host

    @torch.inference_mode()
    def start(self, rows: Tensor, L: int, *, draft: bool) -> None:
        """The first block of rows whose prompts have been read; where the towers are apart, any block."""
        token = across(self.board.token[rows], self.far.device) if draft else None
        self._renew(across(rows, self.far.device), L, token)

    @torch.inference_mode()
    def to_denoiser(self, rows: Sequence[int], held: Sequence[Held]) -> list[int]:
        """Where the towers are apart: have the denoiser's device catch up with rows; those that were behind."""
        near, far, pool = self.board, self.far, self.board.pool
        stale = pool.stale(held)
        if stale:
            behind = [rows[b] for b in stale]
            pool.send([held[b] for b in stale], near.conv[numbers(behind, near.device)])
            lengths = numbers([held[b].length for b in stale], far.device).int()
            far.lengths[numbers(behind, far.device)] = lengths
        return stale

    @torch.inference_mode()
    def to_context(self, rows: Sequence[int], L: int) -> None:
        """Where the towers are apart: bring blocks that the context tower is to read."""
        here, there = (numbers(rows, board.device) for board in (self.board, self.far))
        self.board.lane(L).block[here] = across(self.far.lane(L).block[there], self.board.device)

    def _denoise(self, rows: Tensor, what: Pass) -> Outcome:
        """A denoiser pass over the rows' blocks, its predictions and the commit rule."""
        board, lane, L = self.far, self.far.lane(what.length), what.length
        view = board.view(rows, what.pages)
        block, masked, step, steps, draft, threshold = (
            t.index_select(0, rows)
            for t in (lane.block, lane.masked, board.step, board.steps, board.draft, board.threshold)
        )
        hidden = self.model._denoise(block, masked / L, view)
        # A draft has the noise that the autoregressive mode draws at each position: alike logits give alike tokens.
        noise = step.masked_fill(draft, 0)
        out = unmask(
            hidden,
            self.model.lm_head.matrix,
            block,
            board.sampling(rows, view.lengths.long(), noise, narrow=what.narrow),
            mask_token_id=board.mask,
            threshold=threshold,
            steps_left=(steps - step).clamp(max=L),  # more means no more
            strategy=board.strategy(rows, rules=what.rules),
        )
        for t, new in ((lane.block, out.block), (lane.masked, out.masked), (board.step, step + 1)):
            t.index_copy_(0, rows, new)
        listed = torch.cat([out.block, out.masked.unsqueeze(1)], 1)
        return Outcome(listed, out.block, out.confidence, out.committed)

    def _commit(self, rows: Tensor, what: Pass) -> Outcome:
        """The context tower reads the rows' finished blocks, and the next ones begin."""
        block = self.board.lane(what.length).block.index_select(0, rows)
        self._extend(rows, block, self.board.view(rows, what.pages))
        if not self.is_apart:  # else `start` does, when the denoiser's device has caught up
            self._renew(rows, what.length)
        return Outcome(block[:, :0], block, block)

    def _ar(self, rows: Tensor, what: Pass) -> Outcome:
        """The context tower reads each row's last token and chooses the next one."""
        steps = []
        for _ in range(what.repeat):
            token = self.board.token.index_select(0, rows).unsqueeze(1)
            hidden = self._extend(rows, token, self.board.view(rows, what.pages))
            steps.append(self._next(rows, hidden[:, -1], what))
        if len(steps) == 1:
            return steps[0]
        listed, tokens, confidence = (torch.cat([getattr(s, f) for s in steps], 1) for f in Outcome._fields[:3])
        return Outcome(listed, tokens, confidence)

    def _mock_ar(self, rows: Tensor, what: Pass) -> Outcome:
        """The denoiser chooses what follows each row's last token; then the context tower reads that token."""
        board, far, token = self.board, self.far, self.board.token.index_select(0, rows).unsqueeze(1)
        there, view = across(rows, far.device), board.view(rows, what.pages)
        read = far.view(there, what.pages) if self.is_apart else view
        hidden = self.model._denoise(across(token, far.device), None, read)[:, -1]
        position = read.lengths.long() + 1
        sampling = far.sampling(there, position, torch.zeros_like(position), narrow=what.narrow)
        chosen = head_sample(hidden, self.model.lm_head.matrix, sampling)
        self._extend(rows, token, view)
        return self._chosen(rows, *(across(t, board.device) for t in chosen))

    def _verify(self, rows: Tensor, what: Pass) -> Outcome:
        """The context tower reads the rows' drafts; as much enters as it would have written itself."""
        board, lane, L = self.board, self.board.lane(what.length), what.length
        view = board.view(rows, what.pages)
        block, certain, token = (t.index_select(0, rows) for t in (lane.block, board.certain, board.token))
        block[:, 0] = token  # which may be the mask token, as AR writes any, and was filled in then
        pending = Pending()
        pending.hidden = self.model.context_tower(block, ForwardContext("verify", view, pending=pending))
        places = torch.arange(L, device=board.device)
        position = view.lengths.long().unsqueeze(1) + 1 + places  # [B, L]
        sampling = board.sampling(rows, position, torch.zeros_like(position), narrow=what.narrow)
        follows, confidence = head_sample(pending.hidden, self.model.context_lm_head.matrix, sampling)  # [B, L]
        agreed = (follows[:, :-1] == block[:, 1:]).cumprod(-1).sum(-1)  # [B] tokens of the draft, from its first on
        count = agreed + 1  # with the token that was certain
        view.let_in(pending, count.int())
        board.count(rows, view, count.int())
        last = agreed.unsqueeze(1)
        self._chosen(rows, *(t.gather(1, last).squeeze(1) for t in (follows, confidence)))
        if not self.is_apart:
            self._renew(rows, L, board.token.index_select(0, rows))
        entered = places <= last
        shown = block.masked_fill(~entered, board.mask)
        probable = torch.cat([certain.unsqueeze(1), confidence[:, :-1]], -1).masked_fill(~entered, 0)
        return Outcome(torch.cat([block, count.unsqueeze(1)], 1), shown, probable, entered)
