"""Generation: block by block with the denoiser, token by token (AR, mock-AR), or AR's tokens several at a time from the
denoiser's drafts (speculative), for batches of unequal prompts.

Every row has its own masked fraction t, commit rule, noise and end, and gets the tokens that it would get alone.
B rows asked for, R rows still going, L block length, V vocabulary.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tt_kernels import Sampling, head_sample, unmask

from ..arguments import integer, is_integer, row_seeds
from ..config import TwoTowerConfig
from ..modeling.two_tower import TwoTowerModel

if TYPE_CHECKING:
    from ..modeling.state import Cache

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")
HOTTEST = 1e30  # fp32 holds it, and logits divided by it are nothing beside the noise: more is the same


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to generate; `check` refuses what cannot be meant. See `TwoTower.generate`."""

    mode: str = "mask_diffusion"
    max_new_tokens: int = 128
    block_size: int = 16
    steps_per_block: int = 16
    draft_steps: int = 1
    confidence_threshold: float = 0.8
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """NumPy's numbers as Python's; what is no number is for `check` to refuse."""
        for name, value in vars(self).items():
            if isinstance(value, Real) and not isinstance(value, bool):
                object.__setattr__(self, name, int(cast(Any, value)) if is_integer(value) else float(value))
        ids = tuple(int(token) if is_integer(token) else token for token in self.eos_token_ids)
        object.__setattr__(self, "eos_token_ids", ids)

    def check(self, config: TwoTowerConfig) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, expected one of {', '.join(MODES)}")
        for name, least in (("max_new_tokens", 0), ("block_size", 1), ("steps_per_block", 1), ("draft_steps", 1)):
            integer(name, getattr(self, name), least)
        for name in ("confidence_threshold", "temperature", "top_p"):
            value = getattr(self, name)
            if type(value) not in (int, float) and not (value is None and name == "top_p"):
                raise ValueError(f"{name} is {value!r}, expected a number")
        if self.block_size > (limit := max(config.max_position_embeddings, config.block_size)):
            raise ValueError(f"block_size is {self.block_size}, expected at most the model's context of {limit}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}, expected 0 to 1")
        # Logits are divided by it in fp32, where less than about 1e-36 makes infinities of them.
        if self.temperature != 0 and not 1e-30 <= self.temperature <= sys.float_info.max:
            raise ValueError(f"temperature is {self.temperature}, expected 0 (greedy), or 1e-30 and above, finite")
        if self.top_k is not None:
            integer("top_k", self.top_k, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, expected above 0 and at most 1")
        for token in self.eos_token_ids:
            if not is_integer(token) or not 0 <= token < config.vocab_size:
                raise ValueError(f"eos_token_id is {token!r}, expected 0 to {config.vocab_size - 1}")
        if self.mode in ("mask_diffusion", "speculative") and self.block_size > config.block_size:
            message = (
                f"block_size {self.block_size} is above the {config.block_size} that the denoiser was trained with: "
                "expect worse text"
            )
            warnings.warn(message, stacklevel=4)


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every denoiser pass (token, in the autoregressive modes; cycle, in speculative)."""

    rows: list[int]  # which prompts of the batch took part: R of them
    start: list[int]  # [R] position in its sequence, prompt included, of each row's first token here
    step: int  # denoising step inside the block, from 0; 0 in the autoregressive modes
    tokens: Tensor  # [R, L] after the step, masked positions holding the mask token
    confidence: Tensor  # [R, L] probability of this step's predictions; 0 where none was needed
    committed: Tensor  # [R, L] bool: positions that took their token in this step


@dataclass(frozen=True)
class Generation:
    """What `generate` returns."""

    tokens: list[list[int]]  # new tokens of each row, ending with the end-of-sequence token if there was one
    nfe: list[int]  # denoiser passes (number of function evaluations) of each row
    cycles: list[int] = field(default_factory=list)  # of each row, in speculative: drafts that were verified


class _Rows:
    """The rows of a batch that are still going, and what has been written so far."""

    def __init__(self, model: TwoTowerModel, cache: Cache, s: Settings, seed: Tensor, on_step: Callable | None):
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

    def write(self, new: list[list[int]]) -> Tensor | None:
        """Take each row's new tokens up to its end; drop rows that ended. The indices that stay, None for all."""
        stay = []
        for r, (row, tokens) in enumerate(zip(self.index, new, strict=True)):
            room = self.settings.max_new_tokens - len(self.tokens[row])
            tokens = tokens[:room]
            end = next((i for i, t in enumerate(tokens) if t in self.settings.eos_token_ids), None)
            self.tokens[row] += tokens if end is None else tokens[: end + 1]
            if end is None and len(tokens) < room:
                stay.append(r)
        if len(stay) == len(self.index):
            return None
        kept = torch.tensor(stay, dtype=torch.int64, device=self.model.device)
        self.index = [self.index[r] for r in stay]
        self.sampling, self.cache = self.sampling.select(kept), self.cache.fork(stay)
        return kept


def _blocks(rows: _Rows) -> None:
    """Mask diffusion: denoise a block of mask tokens until none is left, then let the context tower read it."""
    s = rows.settings
    while rows.index:
        masks = torch.full((len(rows.index), s.block_size), rows.model.config.mask_token_id, device=rows.model.device)
        block = _denoised(rows, masks, s.steps_per_block)
        stay = rows.write(block.tolist())
        if rows.index:
            rows.model.commit(block if stay is None else block[stay], rows.cache)


def _denoised(rows: _Rows, block: Tensor, steps: int, *, draft: bool = False) -> Tensor:
    """The next block [R, L] of every row from one that is masked, in at most `steps` passes.

    draft: with the noise that the autoregressive mode draws at each position, so that alike logits give alike tokens.
    """
    model, s = rows.model, rows.settings
    mask, (R, L) = model.config.mask_token_id, block.shape
    start = rows.cache.lengths.long()
    live, cache = None, rows.cache  # rows that still have mask tokens, on the device; None: all
    running = list(range(R))  # the same, on the host
    masked = torch.full((R,), L - 1 if draft else L, device=model.device)
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
        left = rows.unfinished(now, masked)
        if not any(left):
            break
        if not all(left):
            keep = torch.tensor([i for i, m in enumerate(left) if m], device=model.device)
            live = keep if live is None else live[keep]
            running = [r for r, m in zip(running, left, strict=True) if m]
            masked, cache = masked[keep], rows.cache.fork(running)
    return block


def _speculative(rows: _Rows) -> None:
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
            block = _denoised(rows, block, rows.settings.draft_steps, draft=True)
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
        counts = (agreed + 1).tolist()
        stay = rows.write([row[:count] for row, count in zip(block.tolist(), counts, strict=True)])
        token, certain = (t.gather(1, agreed.unsqueeze(1)).squeeze(1) for t in (follows, confidence))
        if stay is not None:
            token, certain = token[stay], certain[stay]


def _token(rows: _Rows, hidden: Tensor, head: Tensor, position: Tensor) -> tuple[Tensor, Tensor | None]:
    """The next token of every row [R, 1] after its hidden state, and the rows that stay, as `write` says."""
    token, confidence = head_sample(hidden, head, rows.sampling_at(None, position, 0))
    column = token.unsqueeze(1)
    done = torch.ones_like(column, dtype=torch.bool)
    rows.report(range(len(rows.index)), position, 0, column, confidence.unsqueeze(1), done)
    return column, rows.write(column.tolist())


def _ar(rows: _Rows) -> None:
    """The context tower alone, one token a step."""
    while rows.index:
        cache = rows.cache
        assert cache.last_hidden is not None and cache.head is not None  # prompts have tokens
        column, stay = _token(rows, cache.last_hidden, cache.head, cache.lengths.long())
        if rows.index:
            rows.model.commit(column if stay is None else column[stay], rows.cache)


def _mock_ar(rows: _Rows, last: Tensor) -> None:
    """The denoiser, one token a step, on a cache without the last token; then the context tower reads that token."""
    token = last.unsqueeze(1)  # [R, 1]
    while rows.index:
        hidden = rows.model.denoise(token, None, rows.cache, output="hidden")[:, -1]
        for row in rows.index:
            rows.nfe[row] += 1
        column, stay = _token(rows, hidden, rows.model.lm_head.weight, rows.cache.lengths.long() + 1)
        if rows.index:
            token, column = (token, column) if stay is None else (token[stay], column[stay])
            rows.model.commit(token, rows.cache)
            token = column


@torch.inference_mode()
def generate(
    model: TwoTowerModel,
    prompts: Tensor | Sequence[Sequence[int]],
    settings: Settings,
    *,
    seed: int | Sequence[int] | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Generation:
    """Continue prompts; `TwoTower.generate` documents it."""
    settings.check(model.config)
    rows = model._rows(prompts)
    longest, limit = max(map(len, rows)), model.config.max_position_embeddings
    if longest + settings.max_new_tokens > limit:
        raise ValueError(
            f"prompts: {longest} tokens and {settings.max_new_tokens} new ones exceed the model's context of {limit}"
        )
    if settings.mode != "ar" and model.denoiser_tower is None:
        raise ValueError(f'mode is {settings.mode!r}, but the model was loaded with towers="context": only "ar" works')
    mask = model.config.mask_token_id
    if masked := [b for b, row in enumerate(rows) if mask in row]:
        message = f"prompt {masked[0]} holds the mask token ({mask}), which is read like any other and not filled in"
        warnings.warn(message, stacklevel=4)
    seeds = row_seeds(seed, len(rows), model.device)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r}, expected a function of a Step, or None")
    mock = settings.mode == "mock_ar"
    cache = model._prefill([row[:-1] if mock else row for row in rows], settings.max_new_tokens + settings.block_size)
    state = _Rows(model, cache, settings, seeds, on_step)
    if settings.max_new_tokens == 0:
        pass
    elif mock:
        _mock_ar(state, torch.tensor([row[-1] for row in rows], device=model.device))
    elif settings.mode == "ar":
        _ar(state)
    elif settings.mode == "speculative":
        _speculative(state)
    else:
        _blocks(state)
    return Generation(state.tokens, state.nfe, state.cycles)
