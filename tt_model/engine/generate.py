"""Generation: block by block with the denoiser, token by token (AR, mock-AR), or AR's tokens several at a time from the
denoiser's drafts (speculative), for batches of unequal prompts.

Every row has its own masked fraction t, commit rule, noise and end, and gets the tokens that it would get alone.
B rows asked for, R rows still going, L block length, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tt_kernels import Sampling, head_sample, unmask

from ..arguments import row_seeds
from ..modeling.two_tower import TwoTowerModel
from ..vocabulary import Vocabulary, Writing
from .settings import HOTTEST, Generation, Settings, Step

if TYPE_CHECKING:
    from ..modeling.state import Cache


class _Rows:
    """The rows of a batch that are still going, and what has been written so far."""

    def __init__(
        self,
        model: TwoTowerModel,
        cache: Cache,
        s: Settings,
        seed: Tensor,
        on_step: Callable | None,
        writing: Sequence[Writing] = (),
    ):
        B = cache.batch
        self.model, self.cache, self.settings, self.on_step = model, cache, s, on_step
        self.index = list(range(B))  # of the rows still going: R of B
        V = model.config.vocab_size
        self.sampling = Sampling.of(  # [R]; at each pass with its positions and its step
            B,
            temperature=min(s.temperature, HOTTEST),
            seed=seed,
            top_k=None if s.top_k is None or s.top_k >= V else s.top_k,
            top_p=None if s.top_p is None or s.top_p >= 1 else s.top_p,
            device=model.device,
        )
        self.ends = torch.tensor(s.eos_token_ids, dtype=torch.int64, device=model.device)
        self.tokens: list[list[int]] = [[] for _ in range(B)]
        self.nfe = [0] * B
        self.cycles = [0] * B if s.mode == "speculative" else []
        self.writing = writing  # the rows' texts, where somebody reads them along
        self.reasons = ["length"] * B
        self.logprobs: list[list[float]] = [[] for _ in range(B)] if s.logprobs else []

    def sampling_at(self, rows: Tensor | None, position: Tensor, step: int) -> Sampling:
        """How some of the rows still going are sampled at a pass."""
        sampling = self.sampling if rows is None else self.sampling.select(rows)
        return sampling._replace(position=position, step=torch.full_like(sampling.seed, step))

    def sampling_after(self, start: Tensor, places: Tensor) -> Sampling:
        """How what follows each place of a block [L] is sampled, as the autoregressive mode does: tensors [R, L]."""
        rows = torch.arange(len(start), device=start.device).unsqueeze(1).expand(-1, len(places))
        each = self.sampling.select(rows)
        position = start.unsqueeze(1) + 1 + places
        return each._replace(position=position, step=torch.zeros_like(position))

    def report(self, rows: Sequence[int], position: Tensor, step: int, *results: Tensor) -> None:
        if self.on_step is not None:  # copies: it may keep them and write into them
            copies = (result.clone() for result in results)
            self.on_step(Step([self.index[r] for r in rows], position.tolist(), step, *copies))

    def unfinished(self, block: Tensor, masked: Tensor) -> list[bool]:
        """Which rows need a further pass over their block [R, L], of which masked [R] positions are left.

        None once an end-of-sequence token is there and no mask token before it: tokens behind it are dropped. A single
        position behind is resolved all the same: the published NFE, which the golden files pin, counts that pass.
        """
        if len(self.ends):
            open_before = (block == self.model.config.mask_token_id).cumsum(-1)  # masked up to and with each position
            ends = (block.unsqueeze(-1) == self.ends).any(-1)
            settled = (ends & (open_before == 0)).any(-1)
            masked = masked.masked_fill(settled & (masked > 1), 0)
        return [m > 0 for m in masked.tolist()]

    def write(self, new: list[list[int]], probable: Tensor | None) -> Tensor | None:
        """Take each row's new tokens, predicted with these probabilities, up to its end; drop rows that ended. The
        indices that stay, None for all."""
        logs = probable.log().tolist() if self.settings.logprobs and probable is not None else ()
        stay = []
        for r, (row, tokens) in enumerate(zip(self.index, new, strict=True)):
            room = self.settings.max_new_tokens - len(self.tokens[row])
            taken, ends = tokens[:room], self.settings.eos_token_ids
            end = next((i + 1 for i, t in enumerate(taken) if t in ends), None)
            taken, reason = taken[:end], "eos"
            if self.writing and (cut := self.writing[row].push(taken)) is not None:
                taken, end, reason = taken[:cut], cut, "stop"
            self.tokens[row] += taken
            if logs:
                self.logprobs[row] += logs[r][: len(taken)]
            if end is not None:
                self.reasons[row] = reason
            elif len(taken) < room:
                stay.append(r)
        if len(stay) == len(self.index):
            return None
        kept = torch.tensor(stay, dtype=torch.int64, device=self.model.device)
        self.index = [self.index[r] for r in stay]
        self.sampling, self.cache = self.sampling.select(kept), self.cache.fork(stay)
        return kept


def _blocks(rows: _Rows) -> Iterator[None]:
    """Mask diffusion: denoise a block of mask tokens until none is left, then let the context tower read it."""
    s = rows.settings
    while rows.index:
        masks = torch.full((len(rows.index), s.block_size), rows.model.config.mask_token_id, device=rows.model.device)
        block, probable = _denoised(rows, masks, s.steps_per_block)
        stay = rows.write(block.tolist(), probable)
        yield
        if rows.index:
            rows.model.commit(block if stay is None else block[stay], rows.cache)


def _denoised(rows: _Rows, block: Tensor, steps: int, *, draft: bool = False) -> tuple[Tensor, Tensor | None]:
    """The next block [R, L] of every row from one that is masked, in at most `steps` passes. Where log-probabilities
    are wanted, also how probable each of its tokens was when it was committed.

    draft: with the noise that the autoregressive mode draws at each position, so that alike logits give alike tokens.
    """
    model, s = rows.model, rows.settings
    mask, (R, L) = model.config.mask_token_id, block.shape
    start = rows.cache.lengths.long()
    live, cache = None, rows.cache  # rows that still have mask tokens, on the device; None: all
    running = list(range(R))  # the same, on the host
    masked = torch.full((R,), L - 1 if draft else L, device=model.device)
    probable: Tensor | None = None
    for step in range(steps):
        now = block if live is None else block[live]
        position = start if live is None else start[live]
        hidden = model.denoise(now, masked / L, cache, output="hidden")
        now, committed, confidence, masked = unmask(
            hidden,
            model.lm_head.weight,
            now,
            rows.sampling_at(live, position, 0 if draft else step),
            mask_token_id=mask,
            threshold=torch.full_like(masked, s.confidence_threshold, dtype=torch.float64),
            steps_left=torch.full_like(masked, min(steps - step, L)),  # more means no more
        )
        for r in running:
            rows.nfe[rows.index[r]] += 1
        if not draft:
            rows.report(running, position, step, now, confidence, committed)
        block = now if live is None else block.index_copy(0, live, now)
        if s.logprobs and not draft:
            before = 0 if probable is None else probable if live is None else probable[live]
            taken = torch.where(committed, confidence, before)
            probable = taken if probable is None or live is None else probable.index_copy(0, live, taken)
        left = rows.unfinished(now, masked)
        if not any(left):
            break
        if not all(left):
            keep = torch.tensor([i for i, m in enumerate(left) if m], device=model.device)
            live = keep if live is None else live[keep]
            running = [r for r, m in zip(running, left, strict=True) if m]
            masked, cache = masked[keep], rows.cache.fork(running)
    return block, probable


def _speculative(rows: _Rows) -> Iterator[None]:
    """The autoregressive mode's tokens, several a cycle: the denoiser drafts what follows a token that is certain, the
    context tower reads the draft, and what it would have written itself stays."""
    model, L = rows.model, rows.settings.block_size
    cache, places = rows.cache, torch.arange(L, device=model.device)
    assert cache.last_hidden is not None and cache.head is not None  # prompts have tokens
    token, certain = head_sample(cache.last_hidden, cache.head, rows.sampling_at(None, cache.lengths.long(), 0))
    while rows.index:
        cache, start = rows.cache, rows.cache.lengths.long()
        block = torch.full((len(rows.index), L), model.config.mask_token_id, device=model.device)
        block[:, 0] = token
        if L > 1:
            block, _ = _denoised(rows, block, rows.settings.draft_steps, draft=True)
            block[:, 0] = token  # which may be the mask token, as AR writes any
        pending = model._verify(block, cache)
        assert pending.hidden is not None and cache.head is not None
        follows, confidence = head_sample(pending.hidden, cache.head, rows.sampling_after(start, places))  # [R, L]
        agreed = (follows[:, :-1] == block[:, 1:]).cumprod(-1).sum(-1)  # [R] tokens of the draft, from its first on
        entered = places <= agreed.unsqueeze(1)  # with the token that was certain
        cache.advance(pending, agreed + 1)
        for row in rows.index:
            rows.cycles[row] += 1
        shown = block.masked_fill(~entered, model.config.mask_token_id)
        probable = torch.cat([certain.unsqueeze(1), confidence[:, :-1]], -1)
        rows.report(range(len(rows.index)), start, 0, shown, probable.masked_fill(~entered, 0), entered)
        listed = torch.cat([block, agreed.unsqueeze(1) + 1], -1).tolist()  # read together: each waits for the device
        stay = rows.write([row[: row[-1]] for row in listed], probable)
        yield
        token, certain = (t.gather(1, agreed.unsqueeze(1)).squeeze(1) for t in (follows, confidence))
        if stay is not None:
            token, certain = token[stay], certain[stay]


def _token(rows: _Rows, hidden: Tensor, head: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
    """The next token of every row [R, 1] after its hidden state, and the rows that stay, as `write` says."""
    token, confidence = head_sample(hidden, head, rows.sampling_at(None, position, 0))
    column = token.unsqueeze(1)
    done = torch.ones_like(column, dtype=torch.bool)
    rows.report(range(len(rows.index)), position, 0, column, confidence.unsqueeze(1), done)
    return column, rows.write(column.tolist(), confidence.unsqueeze(1))


def _ar(rows: _Rows) -> Iterator[None]:
    """The context tower alone, one token a step."""
    while rows.index:
        cache = rows.cache
        assert cache.last_hidden is not None and cache.head is not None  # prompts have tokens
        column, stay = _token(rows, cache.last_hidden, cache.head, cache.lengths.long())
        yield
        if rows.index:
            rows.model.commit(column if stay is None else column[stay], rows.cache)


def _mock_ar(rows: _Rows, last: Tensor) -> Iterator[None]:
    """The denoiser, one token a step, on a cache without the last token; then the context tower reads that token."""
    token = last.unsqueeze(1)  # [R, 1]
    while rows.index:
        hidden = rows.model.denoise(token, None, rows.cache, output="hidden")[:, -1]
        for row in rows.index:
            rows.nfe[row] += 1
        column, stay = _token(rows, hidden, rows.model.lm_head.weight, rows.cache.lengths.long() + 1)
        yield
        if rows.index:
            token, column = (token, column) if stay is None else (token[stay], column[stay])
            rows.model.commit(token, rows.cache)
            token = column


def _checked(
    model: TwoTowerModel, prompts: Any, settings: Settings, on_step: Callable | None, vocabulary: Vocabulary | None
) -> list[list[int]]:
    """The prompts, after everything that can be refused before any work."""
    settings.check(model.config)
    rows = model._rows(prompts)
    longest, limit = max(map(len, rows)), model.config.max_position_embeddings
    if longest + settings.max_new_tokens > limit:
        raise ValueError(
            f"prompts: {longest} tokens and {settings.max_new_tokens} new ones exceed the model's context of {limit}"
        )
    if settings.mode != "ar" and model.denoiser_tower is None:
        raise ValueError(f'mode is {settings.mode!r}, but the model was loaded with towers="context": only "ar" works')
    if settings.stop and vocabulary is None:
        raise ValueError(f"stop is {list(settings.stop)}, but the model has no tokenizer to read what it writes")
    mask = model.config.mask_token_id
    if masked := [b for b, row in enumerate(rows) if mask in row]:
        message = f"prompt {masked[0]} holds the mask token ({mask}), which is read like any other and not filled in"
        warnings.warn(message, stacklevel=4)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r}, expected a function of a Step, or None")
    return rows


@torch.inference_mode()
def _written(
    model: TwoTowerModel,
    rows: list[list[int]],
    s: Settings,
    seeds: Tensor,
    on_step: Callable[[Step], None] | None,
    writing: Sequence[Writing],
) -> Iterator[_Rows]:
    """Prefill, then every time that rows have got new tokens."""
    mock = s.mode == "mock_ar"
    cache = model._prefill([row[:-1] if mock else row for row in rows], s.max_new_tokens + s.block_size)
    state = _Rows(model, cache, s, seeds, on_step, writing)
    yield state
    if s.max_new_tokens == 0:
        return
    if mock:
        passes = _mock_ar(state, torch.tensor([row[-1] for row in rows], device=model.device))
    else:
        passes = {"ar": _ar, "speculative": _speculative, "mask_diffusion": _blocks}[s.mode](state)
    for _ in passes:
        yield state


def _result(state: _Rows, texts: Callable[[], list[str]]) -> Generation:
    return Generation(state.tokens, state.nfe, state.cycles, state.reasons, state.logprobs, texts)


def generate(
    model: TwoTowerModel,
    prompts: Tensor | Sequence[Sequence[int]],
    settings: Settings,
    *,
    seed: int | Sequence[int] | None = None,
    on_step: Callable[[Step], None] | None = None,
    vocabulary: Callable[[], Vocabulary | None] = lambda: None,
) -> Generation:
    """Continue prompts; `TwoTower.generate` documents it. vocabulary: asked for where text is wanted."""
    reader = vocabulary() if settings.stop else None
    rows = _checked(model, prompts, settings, on_step, reader)
    seeds = row_seeds(seed, len(rows), model.device)
    writing = [Writing(reader, row, settings.stop) for row in rows] if reader else []
    *_, state = _written(model, rows, settings, seeds, on_step, writing)

    def texts() -> list[str]:
        if writing:
            return [row.whole() for row in writing]
        found = vocabulary()
        if found is None:
            raise ValueError("text: the model has no tokenizer; `tokens` has what it wrote")
        return [found.decode(tokens, row) for tokens, row in zip(state.tokens, rows, strict=True)]

    return _result(state, texts)


class Stream(Iterator[str]):
    """The text that follows one prompt, piece by piece; `TwoTower.stream` documents it."""

    def __init__(
        self,
        model: TwoTowerModel,
        prompt: Sequence[int],
        settings: Settings,
        vocabulary: Vocabulary,
        *,
        seed: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ):
        rows = _checked(model, [prompt], settings, on_step, vocabulary)
        seeds = row_seeds(seed, 1, model.device)
        self._writing = Writing(vocabulary, rows[0], settings.stop)
        self._state: _Rows | None = None
        self._pieces: Generator[str, None, None] = self._read(
            _written(model, rows, settings, seeds, on_step, [self._writing])
        )

    def _read(self, states: Iterator[_Rows]) -> Generator[str, None, None]:
        shown = 0
        for self._state in states:
            if len(self._writing.text) > shown:
                yield self._writing.text[shown:]
                shown = len(self._writing.text)
        if rest := self._writing.whole()[shown:]:
            yield rest

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the generation where it is."""
        self._pieces.close()

    @property
    def result(self) -> Generation:
        """What has been generated so far: all of it, when the last piece has been read."""
        if self._state is None:
            return Generation([[]], [0])
        return _result(self._state, lambda: [self._writing.whole()])
