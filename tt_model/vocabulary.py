"""Text to the ids that a model reads, and back: whole, in pieces, as it is written, and as a conversation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path

from tokenizers import Tokenizer, models

from .config import TwoTowerConfig
from .files import read_object, read_text, refuse_pointer


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in folder/tokenizer.json, whose `encode` keeps all of a text, the same way every time.

    What the file may carry for some earlier use of it is off: truncation, padding, and BPE dropout, which draws other
    tokens each time. Special tokens in a text are plain characters. What belongs to the vocabulary stays as in the
    file: normaliser, pre-tokeniser, added tokens that are not special, and the special tokens that the post-processor
    puts around a text (`add_special_tokens=False` leaves them out).

    Raises ValueError when the file is missing, is not a tokenizer or is a git-LFS pointer.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"folder is {str(folder)!r}, which has no tokenizer.json")
    refuse_pointer(path)
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{str(path)!r} is not a tokenizer that can be read: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, models.BPE):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True  # not kept in the file
    return tokenizer


class Vocabulary:
    """A tokenizer that fits a model, and how the model expects a text to begin.

    A text begins with what tokenizer.json itself adds. Where a tokenizer_config.json lies beside it, that is
    transformers' convention: `add_bos_token` decides if it is there, and nothing more is added if it is not (the
    published base models read no begin-of-sequence token: its embedding is untrained). Without one, as in the models
    that are trained here, the config's bos_token_id is put first.
    """

    def __init__(self, folder: str | Path, config: TwoTowerConfig):
        self.folder = folder = Path(folder)
        self.tokenizer: Tokenizer = load_tokenizer(folder)
        convention = folder / "tokenizer_config.json"
        self.convention = read_object(convention) if convention.is_file() else {"add_bos_token": True}
        known, size = config.vocab_size, self.tokenizer.get_vocab_size()
        largest = max(self.tokenizer.get_vocab().values(), default=-1)
        if largest >= known:
            what = f"it has ids up to {largest}, the model's vocab_size is {known}"
            raise ValueError(f"{folder / 'tokenizer.json'}: wrong vocabulary: {what}")
        if size < known // 2:
            what = f"has {size} tokens, the model {known}: is it the right one?"
            warnings.warn(f"{folder / 'tokenizer.json'}: {what}", stacklevel=2)
        self.first = self._first(config.bos_token_id)

    def _first(self, bos: int | None) -> list[int]:
        """The ids that every text begins with."""
        encoding = self.tokenizer.encode("x")
        pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        own = [token for token, _ in takewhile(itemgetter(1), pairs)]
        stated = self.convention.get("add_bos_token")
        if bos is None or stated is None:
            return own
        if stated:
            return own if bos in own else [bos, *own]
        return [token for token in own if token != bos]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of a text. special: special tokens are those that it names, and none is put before it. ValueError for
        a text with half a character (a surrogate)."""
        try:
            text.encode()
        except (UnicodeEncodeError, AttributeError):
            raise ValueError(f"text is {text!r:.60}, expected a text that can be written as UTF-8") from None
        if special:
            return self._with_special.encode(text, add_special_tokens=False).ids
        return [*self.first, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    @cached_property
    def _with_special(self) -> Tokenizer:
        tokenizer = load_tokenizer(self.folder)
        tokenizer.encode_special_tokens = False
        return tokenizer

    def decode(self, ids: Sequence[int], before: Sequence[int] = ()) -> str:
        """The text of ids as it reads after the ids `before`; special tokens have none."""
        base, whole = self.tokenizer.decode(list(before)), self.tokenizer.decode([*before, *ids])
        return whole[len(base) :] if whole.startswith(base) else self.tokenizer.decode(list(ids))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation that the model is to continue, by the folder's chat template (Jinja).

        Args:
            messages: dicts with "role" and "content", the oldest first.
        Raises ValueError where the folder has no template, or the template refuses the messages.
        """
        template = self._template()
        if not messages or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
            raise ValueError(f"messages is {messages!r:.60}, expected dicts with role and content")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        names = {name: t for name, t in self.convention.items() if name.endswith("_token") and isinstance(t, str)}
        try:
            text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
        except TemplateError as error:
            raise ValueError(f"messages: {self.folder}'s chat template refuses them: {error}") from None
        return self.encode(text, special=True)

    def _template(self) -> str:
        file = self.folder / "chat_template.jinja"
        template = read_text(file) if file.is_file() else self.convention.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = next((t.get("template") for t in template if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise ValueError(f"{self.folder}: has no chat template (chat_template.jinja, or in tokenizer_config.json)")
        return template

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


class Writing:
    """The text of tokens as they come: never a broken character, and cut where a stop string begins.

    What may still become a character or a stop string is held back.
    """

    def __init__(self, vocabulary: Vocabulary, before: Sequence[int], stop: Sequence[str] = ()):
        self.decode, self.stop = vocabulary.tokenizer.decode, tuple(stop)
        self.ids = list(before)
        # Tokens from `begin` on are decoded together, as a tokenizer may read one differently on its own; those up to
        # `end` have been.
        self.begin, self.end = max(0, len(self.ids) - 4), len(self.ids)
        self.held = ""  # may be the beginning of a stop string
        self.text = ""  # all that is certain

    def _characters(self, tokens: Sequence[int]) -> str:
        self.ids += tokens
        known, size = self.decode(self.ids[self.begin : self.end]), len(self.ids)
        # A character has at most 4 bytes, and so at most three tokens wait for its last one.
        for end in range(size, max(self.end, size - 4), -1):
            whole = self.decode(self.ids[self.begin : end])
            if not whole.endswith("\ufffd"):
                break
        else:
            if size - self.end < 4:
                return ""
            end, whole = size, self.decode(self.ids[self.begin :])
        self.begin, self.end = self.end, end
        return whole[len(known) :]

    def push(self, tokens: Sequence[int]) -> int | None:
        """Take tokens; how many of them are kept where a stop string ends in them, the last one with its end."""
        if not self.stop:
            self.text += self._characters(tokens)
            return None
        for count, token in enumerate(tokens, 1):
            self.held += self._characters([token])
            if (at := self._found()) is not None:
                self.text, self.held = self.text + self.held[:at], ""
                return count
            certain = len(self.held) - self._beginning()
            self.text, self.held = self.text + self.held[:certain], self.held[certain:]
        return None

    def _found(self) -> int | None:
        """Where the first stop string begins that is there."""
        places = [at for stop in self.stop if (at := self.held.find(stop)) >= 0]
        return min(places, default=None)

    def _beginning(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        most = min(len(self.held), max(map(len, self.stop)) - 1)
        return next((n for n in range(most, 0, -1) if any(s.startswith(self.held[-n:]) for s in self.stop)), 0)

    def whole(self) -> str:
        """All of the text so far, with what is held back; what comes later is not changed by it."""
        known, whole = self.decode(self.ids[self.begin : self.end]), self.decode(self.ids[self.begin :])
        return self.text + self.held + whole[len(known) :]
