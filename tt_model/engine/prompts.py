"""What callers give: texts, conversations or token ids, and what cannot be generated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..arguments import is_integer, warn
from ..modeling.state import Cache
from ..modeling.two_tower import TwoTowerModel
from ..vocabulary import Vocabulary
from .settings import Settings


def prompt_ids(
    model: TwoTowerModel, prompt: Any, messages: Sequence[Mapping[str, str]] | None, *, bare: bool = False
) -> list[int]:
    """Token ids of one prompt that may be text, or a conversation. bare: without what a text begins with."""
    if (prompt is None) == (messages is None):
        raise ValueError("prompt, messages: expected one of them")
    if messages is not None:
        return model.tokenizer.chat(messages)
    if isinstance(prompt, str):
        ids = model.tokenizer.encode(prompt)
        return ids[len(model.tokenizer.first) :] if bare else ids
    if isinstance(prompt, Sequence) and prompt and not is_integer(prompt[0]):
        raise ValueError(f"prompt is {prompt!r:.40}, expected one text, or the token ids of one")
    (row,) = model._rows([prompt])
    return row


def check(
    model: TwoTowerModel,
    rows: Sequence[Sequence[int]],
    settings: Settings,
    on_step: Callable | None,
    vocabulary: Vocabulary | None,
    prefix: Cache | None = None,
) -> None:
    """Refuse what cannot be generated, before any work."""
    settings.check(model.config)
    longest, limit = (prefix.longest if prefix else 0) + max(map(len, rows)), model.config.max_position_embeddings
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
        warn(message)
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {on_step!r}, expected a function of a Step, or None")
