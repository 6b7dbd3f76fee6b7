"""Text to the ids that a model reads, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer

from ..config import TwoTowerConfig
from ..files import read_object
from ..training.data import load_tokenizer


class Vocabulary:
    """A tokenizer that fits a model, and how the model expects a text to begin.

    A text begins with what tokenizer.json itself adds. Where a tokenizer_config.json lies beside it, that is
    transformers' convention: `add_bos_token` decides if it is there, and nothing more is added if it is not (the
    published base models read no begin-of-sequence token: its embedding is untrained). Without one, as in the models
    that are trained here, the config's bos_token_id is put first.
    """

    def __init__(self, folder: str | Path, config: TwoTowerConfig):
        folder = Path(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        known, size = config.vocab_size, self.tokenizer.get_vocab_size()
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= known:
            what = f"it has ids up to {largest}, the model's vocab_size is {known}"
            raise ValueError(f"{folder / 'tokenizer.json'}: wrong vocabulary: {what}")
        if size < known // 2:
            what = f"has {size} tokens, the model {known}: is it the right one?"
            warnings.warn(f"{folder / 'tokenizer.json'}: {what}", stacklevel=2)
        self.first = self._first(folder, config.bos_token_id)

    def _first(self, folder: Path, bos: int | None) -> list[int]:
        """The ids that every text begins with."""
        encoding = self.tokenizer.encode("x")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        own = [token for token, _ in takewhile(itemgetter(1), pairs)]
        convention = folder / "tokenizer_config.json"
        stated = read_object(convention).get("add_bos_token") if convention.is_file() else True
        if bos is None or stated is None:
            return own
        if stated:
            return own if bos in own else [bos, *own]
        return [token for token in own if token != bos]

    def encode(self, text: str) -> list[int]:
        return [*self.first, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text of ids as it reads after the ids `before`; special tokens have none."""
        base, whole = self.tokenizer.decode(list(before)), self.tokenizer.decode([*before, *ids])
        return whole[len(base) :] if whole.startswith(base) else self.tokenizer.decode(list(ids))

    def pieces(self, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
        """The text of ids in pieces that can be shown, each with how many ids it is of: a character's bytes may be
        several tokens."""
        waiting: list[int] = []
        for token in ids:
            waiting.append(token)
            text = self.tokenizer.decode(waiting)
            if not text.endswith("\ufffd") or len(waiting) == 4:  # a character has at most 4 bytes
                yield text, len(waiting)
                waiting = []
        if waiting:
            yield self.tokenizer.decode(waiting), len(waiting)
