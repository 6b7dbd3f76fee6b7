"""`TwoTower.generate` and `TwoTower.stream`: prompts by themselves in an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ..arguments import row_seeds
from ..modeling.state import PAGE_SIZE
from ..modeling.two_tower import TwoTowerModel
from ..vocabulary import Vocabulary, Writing
from .engine import Engine
from .prompts import check
from .request import Request, room_for
from .settings import Generation, Settings, Step

KEPT = "_lent"  # where a model keeps its engine
LEAST_TOKENS = 1 << 14  # of an engine that is kept: 100 MB of the published model


class Lent:
    """An engine for some prompts. On a GPU the model keeps it for the next ones, as its graphs take time to capture:
    while the weights are what and where they were, and it has room."""

    def __init__(self, model: TwoTowerModel, prompts: Sequence[Sequence[int]], settings: Settings):
        self.model, self.weights = model, _weights(model) if _is_kept(model) else None
        rows = len(prompts)
        tokens = sum(-(-room_for(len(row), settings) // PAGE_SIZE) * PAGE_SIZE for row in prompts)
        engine: Engine | None = None
        if (before := model.__dict__.pop(KEPT, None)) is not None:
            if before.weights == self.weights and before.engine.has_room(rows, tokens):
                engine = before.engine
            else:  # as much as it had, lest two sizes take turns
                rows, tokens = max(rows, before.engine.max_rows), max(tokens, before.engine.max_tokens)
            del before  # its memory is to be free before another takes its own
        if engine is None:
            if self.weights is not None:  # the next prompts may be longer: a text grows from call to call
                rows, tokens = 1 << (rows - 1).bit_length(), max(LEAST_TOKENS, 1 << (tokens - 1).bit_length())
            engine = Engine(model, max_rows=rows, max_tokens=tokens, max_prefixes=0)
        self.engine = engine

    def __reduce__(self) -> tuple[object, ...]:  # a copy of the model has none
        return type(None), ()

    def give_back(self) -> None:
        """No request of it is open any more."""
        self.engine.forget()
        if self.weights is not None:
            self.model.__dict__[KEPT] = self


def _is_kept(model: TwoTowerModel) -> bool:
    return model.device.type == "cuda"


def _weights(model: TwoTowerModel) -> tuple[object, ...]:
    """Changes when a weight moves or is written."""
    parameters = model.parameters()
    return model.state_dtype, model.far, *((p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters)


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
    rows = model._rows(prompts)
    check(model, rows, settings, on_step, reader)
    seeds = row_seeds(seed, len(rows), torch.device("cpu")).tolist()
    lent = Lent(model, rows, settings)
    engine, requests = lent.engine, list[Request]()
    try:
        for b, (ids, own) in enumerate(zip(rows, seeds, strict=True)):
            requests.append(engine.enqueue(ids, settings, own, number=b, on_step=on_step, vocabulary=reader))
        engine.run(lambda: any(r.error is not None for r in requests) or not any(r.is_open for r in requests))
        if failed := next((r.error for r in requests if r.error is not None), None):
            raise failed
        found = [request.result() for request in requests]
    finally:
        for request in requests:
            request.cancel()
        lent.give_back()

    def texts() -> list[str]:
        if reader is not None:
            return [row.text or "" for row in found]
        known = vocabulary()
        if known is None:
            raise ValueError("text: the model has no tokenizer; `tokens` has what it wrote")
        written = [Writing(known, ids) for ids in rows]
        for text, row in zip(written, found, strict=True):
            text.push(row.tokens)
        return [text.whole() for text in written]

    return Generation.of(found, texts)


class Stream(Iterator[str]):
    """The text that follows one prompt, piece by piece; `TwoTower.stream` documents it."""

    def __init__(
        self,
        model: TwoTowerModel,
        prompt: Sequence[int],
        settings: Settings,
        vocabulary: Vocabulary | None,  # None: of tokens alone, and no piece comes
        *,
        seed: int | None = None,
        on_step: Callable[[Step], None] | None = None,
    ):
        (ids,) = model._rows([prompt])
        check(model, [ids], settings, on_step, vocabulary)
        (own,) = row_seeds(seed, 1, torch.device("cpu")).tolist()
        self._lent: Lent | None = Lent(model, [ids], settings)
        self._request = self._lent.engine.enqueue(ids, settings, own, number=0, on_step=on_step, vocabulary=vocabulary)

    def __next__(self) -> str:
        while self._lent is not None:
            self._lent.engine.step()
            if not self._request.is_open:
                self.close()
            if self._request.error is not None:
                raise self._request.error
            _, text = self._request.news()
            if text:
                return text
        raise StopIteration

    def close(self) -> None:
        """End the generation where it is."""
        if self._lent is not None:
            self._request.cancel()
            self._lent.give_back()
            self._lent = None

    def __del__(self) -> None:  # whoever stopped reading
        if not sys.is_finalizing() and getattr(self, "_lent", None) is not None:
            self.close()

    @property
    def result(self) -> Generation:
        """What has been generated so far: all of it, when the last piece has been read."""
        found = self._request.so_far()
        return Generation.of([found], lambda: [found.text or ""])
