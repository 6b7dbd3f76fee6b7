"""What generation is asked for, and what it tells."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any, cast

from torch import Tensor

from ..arguments import integer, is_integer, warn
from ..config import CONFIDENCES, TwoTowerConfig

MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")
STRATEGIES = ("schedule", "threshold", "static", "factor", "entropy_bound")  # what commits in a pass
NO_SCHEDULE = 2**31  # steps that are left: more than any block has positions
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
    strategy: str = "schedule"
    confidence: str = "probability"
    factor: float = 1.0
    entropy_bound: float = 0.1
    tempered: bool = False
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    @classmethod
    def of(
        cls,
        config: TwoTowerConfig,
        *,
        eos_token_id: int | Iterable[int] | str | None = "config",
        stop: str | Iterable[str] | None = None,
        **given: Any,
    ) -> Settings:
        """What `TwoTower.generate` was told, in the model's terms; TypeError for a setting that there is not."""
        eos: Any = eos_token_id
        if isinstance(eos, str) and eos == "config":
            eos = config.eos_token_ids
        eos = eos.tolist() if hasattr(eos, "tolist") else eos
        if eos is None or is_integer(eos):
            eos = () if eos is None else (eos,)
        elif isinstance(eos, str | bytes) or not isinstance(eos, Iterable):
            raise ValueError(f"eos_token_id is {eos!r}, expected one or several token ids, or None")
        stop = () if stop is None else (stop,) if isinstance(stop, str) else stop
        if isinstance(stop, bytes) or not isinstance(stop, Iterable):
            raise ValueError(f"stop is {stop!r}, expected a text or several")
        for name in ("block_size", "confidence_threshold", "confidence"):
            if given.get(name) is None:
                given[name] = getattr(config, name)
        return cls(eos_token_ids=tuple(eos), stop=tuple(stop), **given)

    def __post_init__(self) -> None:
        """NumPy's numbers as Python's; what is no number is for `check` to refuse."""
        for name, value in vars(self).items():
            if isinstance(value, Real) and not isinstance(value, bool):
                object.__setattr__(self, name, int(cast(Any, value)) if is_integer(value) else float(value))
        ids = tuple(int(token) if is_integer(token) else token for token in self.eos_token_ids)
        object.__setattr__(self, "eos_token_ids", ids)

    @property
    def passes_per_block(self) -> int:
        """The most for a block. A strategy without a schedule commits at least one position in each."""
        return self.steps_per_block if self.strategy in ("schedule", "static") else self.block_size

    @property
    def scheduled_steps(self) -> int:
        """Passes that a strategy with a schedule spreads a block over. A draft's last one takes all that is left: a
        wrong token costs no more than one that is missing."""
        steps = self.draft_steps if self.mode == "speculative" else self.steps_per_block
        return min(steps, NO_SCHEDULE) if self.strategy in ("schedule", "static") else NO_SCHEDULE

    @property
    def threshold(self) -> float:
        """What confidences are to be above; infinite where the strategy asks for something else."""
        return self.confidence_threshold if self.strategy in ("schedule", "threshold") else math.inf

    @property
    def has_rules(self) -> bool:
        """Whether unmasking needs to know more than a threshold and the steps that are left."""
        if self.mode == "speculative" and self.scheduled_steps == 1:  # all at once, whatever is sure
            return False
        is_tempered = self.tempered and self.temperature > 0  # else there is nothing to temper
        is_other = self.strategy in ("factor", "entropy_bound") or self.confidence != "probability"
        return is_other or is_tempered or self.alg_temp > 0

    def check(self, config: TwoTowerConfig) -> None:
        for name, known in (("mode", MODES), ("strategy", STRATEGIES), ("confidence", CONFIDENCES)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name, least in (("max_new_tokens", 0), ("block_size", 1), ("steps_per_block", 1), ("draft_steps", 1)):
            integer(name, getattr(self, name), least)
        for name in ("confidence_threshold", "factor", "entropy_bound", "alg_temp", "temperature", "top_p"):
            value = getattr(self, name)
            if type(value) not in (int, float) and not (value is None and name == "top_p"):
                raise ValueError(f"{name} is {value!r}, expected a number")
        if self.block_size > (limit := max(config.max_position_embeddings, config.block_size)):
            raise ValueError(f"block_size is {self.block_size}, expected at most the model's context of {limit}")
        if not 0 <= self.confidence_threshold <= 1:
            raise ValueError(f"confidence_threshold is {self.confidence_threshold}, expected 0 to 1")
        for name in ("factor", "entropy_bound", "alg_temp"):
            if not 0 <= (value := getattr(self, name)) <= sys.float_info.max:
                raise ValueError(f"{name} is {value}, expected 0 or more, finite")
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
        for name in ("tempered", "logprobs"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} is {value!r}, expected True or False")
        if bad := [text for text in self.stop if not isinstance(text, str) or not text]:
            raise ValueError(f"stop holds {bad[0]!r}, expected texts of at least a character")
        if self.mode in ("mask_diffusion", "speculative") and self.block_size > config.block_size:
            message = (
                f"block_size {self.block_size} is above the {config.block_size} that the denoiser was trained with: "
                "expect worse text"
            )
            warn(message)


@dataclass(frozen=True)
class Step:
    """What `on_step` is told after every denoiser pass (token, in the autoregressive modes; cycle, in speculative)."""

    rows: list[int]  # which prompts of the batch took part: R of them
    start: list[int]  # [R] position in its sequence, prompt included, of each row's first token here
    step: int  # denoising step inside the block, from 0; 0 in the autoregressive modes
    tokens: Tensor  # [R, L] after the step, masked positions holding the mask token
    confidence: Tensor  # [R, L] probability of this step's predictions; 0 where none was needed
    committed: Tensor  # [R, L] bool: positions that took their token in this step


def _per_forward(tokens: Sequence[int], nfe: int, forwards: int) -> float:
    return len(tokens) / max(1, nfe or forwards)


@dataclass(frozen=True)
class Result:
    """What has become of one request."""

    tokens: list[int]  # new tokens, ending with the end-of-sequence token if there was one
    nfe: int  # denoiser passes (number of function evaluations)
    forwards: int  # passes of either tower, the reading of the prompt as one
    cycles: int  # in "speculative": drafts that were verified
    # "eos": an end-of-sequence token; "stop": a stop string; "length": max_new_tokens; "cancelled"; "failed". Of what
    # has not ended: "waiting" or "running".
    finish_reason: str
    logprobs: list[float] | None  # as in `Generation`
    text: str | None  # cut where a stop string begins; None without a tokenizer

    @property
    def tokens_per_forward(self) -> float:
        """New tokens for each denoiser pass, as transformers counts; in "ar" for each of the context tower's."""
        return _per_forward(self.tokens, self.nfe, self.forwards)


@dataclass(frozen=True)
class Generation:
    """What `generate` returns: a value for each row."""

    tokens: list[list[int]]  # new tokens, ending with the end-of-sequence token if there was one
    nfe: list[int]  # denoiser passes (number of function evaluations)
    cycles: list[int] = field(default_factory=list)  # in "speculative": drafts that were verified
    # "eos": an end-of-sequence token; "stop": a stop string; "length": max_new_tokens; "cancelled": left before.
    finish_reason: list[str] = field(default_factory=list, compare=False)
    # Where asked for: of each token, as the model predicted it when it was committed, at temperature 1; with `tempered`
    # in "mask_diffusion", in the distribution that it was drawn from. -inf where fp32 has no such small probability.
    logprobs: list[list[float]] = field(default_factory=list, compare=False)
    # Passes of either tower, the reading of the prompt as one.
    forwards: list[int] = field(default_factory=list, compare=False)
    _texts: Callable[[], list[str]] = field(default=list, compare=False, repr=False)

    @classmethod
    def of(cls, rows: Sequence[Result], texts: Callable[[], list[str]]) -> Generation:
        """Of one result a row. texts: asked for when somebody wants the text."""
        return cls(
            tokens=[row.tokens for row in rows],
            nfe=[row.nfe for row in rows],
            cycles=[row.cycles for row in rows if row.cycles],
            forwards=[row.forwards for row in rows],
            finish_reason=[row.finish_reason for row in rows],
            logprobs=[row.logprobs for row in rows if row.logprobs is not None],
            _texts=texts,
        )

    @cached_property
    def text(self) -> list[str]:
        """The new text, cut where a stop string begins; special tokens have none."""
        return self._texts()

    @property
    def tokens_per_forward(self) -> list[float]:
        """Of each row, as `Result` has it."""
        return [_per_forward(*row) for row in zip(self.tokens, self.nfe, self.forwards, strict=True)]
