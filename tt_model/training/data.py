"""From text files to batches of tokens for training: corpus, tokenizer, rows.

`python -m tt_model.training.data --source stdlib --out FOLDER/tokenizer.json` trains a tokenizer.
Everything here runs on the CPU and depends only on its arguments: the same files and seeds give the same batches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import sysconfig
import warnings
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from ..files import refuse_pointer, write_text

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<mask>")  # ids 0, 1, 2, 3
HELD_OUT = 0.05
SPLITS = ("train", "held_out")
JSON_LINES = ".jsonl"  # a document a line: a JSON object with its "text"

_SKIPPED_FOLDERS = {"__pycache__"}
_SKIPPED_OF_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}

# Pieces that a token never crosses, first match wins. Both begin with line ends and the indentation after them, and end
# with other whitespace.
PIECES = {
    # A name with one space or sign before it (" self", ".append"); one digit; signs. The fewest tokens.
    "names": r"(?:[ \t]*\r?\n)+[ \t]*|[^\s\p{L}\p{M}\p{N}_]?[\p{L}\p{M}_]+| [\p{L}\p{M}_]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}_]+|\s+",
    # Signs with the spaces around them (" = ", ", "); the words of a name, by capitals and "_"; one digit. A word is
    # the same token wherever it stands, so that names are copied token by token; some 14 % more tokens.
    "words": r"(?:[ \t]*\r?\n)+[ \t]*| ?[^\s\p{L}\p{M}\p{N}_]+ ?|\p{Lu}?[\p{Ll}\p{M}]+|\p{Lu}+(?!\p{Ll})|[\p{L}\p{M}]+"
    r"|\p{N}|_+|\s+",
}


def _root(source: str | Path) -> Path:
    """The folder (or the single file) that `source` names; ValueError when there is none."""
    root = Path(sysconfig.get_paths()["stdlib"]) if source == "stdlib" else Path(source)
    if not root.exists():
        raise ValueError(f'source is {str(source)!r}, which does not exist: expected a file, a folder or "stdlib"')
    return root


def _is_table(path: Path) -> bool:
    """Of the standard library (`path` relative to it): data tables and generated files, not code as people write it."""
    if path.parts[0] == "encodings":
        return path.name not in ("__init__.py", "idna.py", "punycode.py")
    generated = path.parts[0].startswith(("config-", "_sysconfigdata"))
    return generated or path.as_posix() in ("html/entities.py", "stringprep.py")


def text_files(source: str | Path) -> list[Path]:
    """The files of a corpus, sorted by their path.

    source: a file (whatever its name); a folder: every *.py, *.txt and *.jsonl below it, hidden folders and __pycache__
        left out; or the word "stdlib": the running Python's standard library, *.py without tests, data tables and
        installed packages, about 10 MB ("./stdlib" is a folder of that name).
    Raises ValueError when the source is missing or holds no such file.
    """
    root, stdlib = _root(source), source == "stdlib"
    if root.is_file():
        return [root]
    kinds = (".py",) if stdlib else (".py", ".txt", JSON_LINES)
    skipped = _SKIPPED_FOLDERS | (_SKIPPED_OF_STDLIB if stdlib else set())
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if not (d.startswith(".") or d in skipped)]
        paths = [Path(folder, name) for name in names if name.endswith(kinds)]
        found += [path for path in paths if path.is_file() and not (stdlib and _is_table(path.relative_to(root)))]
    if not found:
        raise ValueError(f"source is {str(source)!r}, a folder without any {', '.join(kinds)} file: expected some")
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def split_files(files: Iterable[Path], root: Path, held_out: float = HELD_OUT) -> tuple[list[Path], list[Path]]:
    """(train, held): about `held_out` of the files are held, chosen by a hash of each path relative to `root`.

    A file's side depends on nothing else: not on order, on other files or on the machine. Both lists are sorted.
    Raises ValueError when held_out is not in [0, 1) or a file is not below root.
    """
    if not 0.0 <= held_out < 1.0:
        raise ValueError(f"held_out is {held_out}: expected a fraction, at least 0 and below 1")
    sides: tuple[list[Path], list[Path]] = ([], [])
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        sides[_is_held(name, held_out)].append(path)
    return sides


def _is_held(name: str, held_out: float) -> bool:
    return _hash(name) < held_out * 2**63


def _hash(text: str) -> int:
    """63 bits of SHA-256: the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


def load_texts(source: str | Path, split: str, held_out: float = HELD_OUT) -> list[str]:
    """The documents of one split ("train" or "held_out") of a corpus, one a file, sorted by path; blank ones left out.

    Of a *.jsonl file every line is a document, the "text" of a JSON object; its side follows from a hash of the file's
    path and the line's number. Of any other single file, the last `held_out` of its text, from the start of a line, is
    the held-out split. Files that are not UTF-8 are skipped, with one warning that counts them. Raises ValueError when
    nothing is left, when a single file is not UTF-8, for a git-LFS pointer in place of a file, for a line of a *.jsonl
    file that is something else, and for what text_files and split_files refuse.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}: expected one of {', '.join(SPLITS)}")
    root, files = _root(source), text_files(source)
    side = SPLITS.index(split)
    base = root.parent if root.is_file() else root
    chosen = set(split_files(files, base, held_out)[side])
    texts, read, skipped = [], 0, 0
    for path in files:
        lines = path.suffix == JSON_LINES
        if not lines and not root.is_file() and path not in chosen:
            continue
        read += 1
        refuse_pointer(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            if root.is_file():
                raise ValueError(f"source is {str(source)!r}, which is not UTF-8 text ({error.reason})") from None
            skipped += 1
            continue
        if lines:
            name = path.relative_to(base).as_posix()
            texts += [t for n, t in _json_texts(path, text) if _is_held(f"{name}:{n}", held_out) == side]
        elif root.is_file():
            end = int(len(text) * (1 - held_out))
            cut = text.rfind("\n", 0, end) + 1 or end
            texts.append((text[:cut], text[cut:])[side])
        else:
            texts.append(text)
    if skipped:
        warnings.warn(f"{skipped} of {read} files in {str(source)!r} are not UTF-8: skipped", stacklevel=2)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"source is {str(source)!r}: its {split} split has no text (held_out={held_out})")
    return texts


def _json_texts(path: Path, lines: str) -> Iterator[tuple[int, str]]:
    """Number and "text" of every line of a *.jsonl file that is not blank."""
    for number, line in enumerate(lines.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            names = ", ".join(map(repr, value)) if isinstance(value, dict) else ""
            found = f"an object with {names or 'nothing'}" if isinstance(value, dict) else "no object"
            raise ValueError(f'{path}:{number}: {found}, expected an object with a string "text"')
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f'{path}:{number}: "text" holds half a character (a surrogate)') from None
        yield number, text


def train_tokenizer(texts: Iterable[str], vocab_size: int, pieces: str = "names") -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens (fewer when `texts` is small); deterministic.

    Ids 0 to 3 are <pad>, <bos>, <eos>, <mask>; all 256 bytes are tokens, so decode(encode(text).ids) == text for every
    text. Nothing is added at either end, and "<mask>" in a text is six characters, not the special token.
    pieces: of PIECES, what a token never crosses.
    Raises ValueError when vocab_size is below 260, the special tokens and the bytes, and for unknown pieces.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}: expected at least {smallest}, for special tokens and bytes")
    if pieces not in PIECES:
        raise ValueError(f"pieces is {pieces!r}: expected one of {', '.join(PIECES)}")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES[pieces]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(
    texts: Sequence[str], tokenizer: Tokenizer, *, bos: int, eos: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """All documents in one stream, in the order given: each is bos, its tokens, eos, then eos up to whole blocks.

    Returns ids, int32 [total], and starts, int64 [documents + 1]: document d is ids[starts[d]:starts[d + 1]], and every
    start is a multiple of block_size. Raises ValueError when block_size is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}: expected at least 1")
    documents, starts = [], [0]
    for i in range(0, len(texts), 256):  # a slice at a time: an Encoding takes many times the memory of its ids
        for encoding in tokenizer.encode_batch_fast(texts[i : i + 256], add_special_tokens=False):
            ids = [bos, *encoding.ids, eos]
            ids += [eos] * (-len(ids) % block_size)
            documents.append(torch.tensor(ids, dtype=torch.int32))
            starts.append(starts[-1] + len(ids))
    stream = torch.cat(documents) if documents else torch.empty(0, dtype=torch.int32)
    return stream, torch.tensor(starts, dtype=torch.int64)


def whole_documents(
    ids: Tensor, starts: Tensor, row_length: int, *, fill: int, window: int = 64
) -> tuple[Tensor, Tensor]:
    """The same documents, moved so that no row begins inside one that fits into a row.

    A row takes the oldest of the next `window` documents, then again and again the longest that fits, and ends in
    `fill`, as the last document's end does. A document longer than a row is cut into rows, and its rest is one of its
    own. Arguments and results are as of encode_documents.
    """
    ends = starts.tolist()
    coming: Iterator[tuple[int, int]] = (
        (begin, min(begin + row_length, end))
        for first, end in pairwise(ends)
        for begin in range(first, end, row_length)
    )
    pool = list(islice(coming, window))
    pieces, begins, total = [], [], 0
    while pool:
        room, chosen = row_length, 0
        while chosen >= 0:
            begin, end = pool.pop(chosen)
            pool += islice(coming, 1)
            pieces.append(ids[begin:end])
            begins.append(total)
            total, room = total + end - begin, room - (end - begin)
            fitting = [i for i, (b, e) in enumerate(pool) if e - b <= room]
            chosen = max(fitting, key=lambda i: (pool[i][1] - pool[i][0], -i), default=-1)
        pieces.append(torch.full((room,), fill, dtype=ids.dtype))
        total += room
    stream = torch.cat(pieces) if pieces else ids
    return stream, torch.tensor([*begins, total], dtype=torch.int64)


@dataclass
class Batch:
    """B rows of N tokens, and where the separate sequences in them begin."""

    ids: Tensor  # [B, N] int64
    counted: Tensor  # [B, N] bool: from the end of its document's first line on
    cu_seqlens: Tensor  # [n + 1] int32, over the B * N tokens: every row start, every document start in a row, B * N


class Rows:
    """A stream of documents chopped into rows of `row_length` tokens; what is left at the end is dropped.

    ids: [total], any integer dtype; starts: [documents + 1] int64, as from encode_documents; newlines: ids of tokens
    that end a line. A row that begins inside a document just begins there. Raises ValueError when the stream is too
    short for one row.
    """

    def __init__(self, ids: Tensor, starts: Tensor, row_length: int, newlines: Iterable[int] = ()) -> None:
        if row_length < 1:
            raise ValueError(f"row_length is {row_length}: expected at least 1")
        if ids.numel() < row_length:
            raise ValueError(f"the corpus has {ids.numel()} tokens: expected at least one row, row_length={row_length}")
        count = ids.numel() // row_length
        self.row_length = row_length
        self._ids, self._starts = ids[: count * row_length].view(count, row_length), starts.tolist()
        self._counted = _after_first_lines(ids, starts, newlines)[: count * row_length].view(count, row_length)

    def digest(self) -> str:
        """A hash of all tokens and of where documents begin: of what a run learns from."""
        whole = hashlib.sha256(self._ids.contiguous().numpy().data)
        whole.update(repr(self._starts).encode())
        return whole.hexdigest()

    def __len__(self) -> int:
        return self._ids.shape[0]

    def batch(self, step: int, batch_size: int, *, seed: int) -> Batch:
        """Rows step * batch_size ... of an endless sequence: epoch after epoch, each a new permutation of all rows.

        A pure function of its arguments, so a run resumed at `step` sees what it would have seen. A batch may span two
        epochs. Raises ValueError when step is negative or batch_size is below 1.
        """
        if step < 0 or batch_size < 1:
            raise ValueError(f"step is {step}, batch_size is {batch_size}: expected at least 0 and at least 1")
        first = step * batch_size
        rows = [_order(len(self), seed, p // len(self))[p % len(self)] for p in range(first, first + batch_size)]
        bounds = []
        for b, row in enumerate(rows):
            begin, end = row * self.row_length, (row + 1) * self.row_length
            inside = self._starts[bisect_right(self._starts, begin) : bisect_left(self._starts, end)]
            bounds += [b * self.row_length + start - begin for start in [begin, *inside]]
        bounds.append(batch_size * self.row_length)
        chosen = torch.tensor(rows)
        return Batch(self._ids[chosen].long(), self._counted[chosen], torch.tensor(bounds, dtype=torch.int32))


def _after_first_lines(ids: Tensor, starts: Tensor, newlines: Iterable[int]) -> Tensor:
    """[total] bool: tokens from the first on of their document that ends a line; a row's first tokens may be of a
    document that began before."""
    ends = torch.isin(ids, torch.tensor(list(newlines), dtype=ids.dtype)).int()
    so_far = ends.cumsum(0)
    return so_far > (so_far - ends)[starts[:-1]].repeat_interleave(starts.diff())


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch."""
    generator = torch.Generator().manual_seed(_hash(f"rows {seed} {epoch}"))
    return torch.randperm(rows, generator=generator).tolist()


def load_rows(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    row_length: int,
    block_size: int,
    split: str = "train",
    held_out: float = HELD_OUT,
    seed: int = 0,
    bos: int | None = None,
    eos: int | None = None,
    whole: bool = False,
) -> Rows:
    """One split of a corpus as rows: load_texts, shuffled by `seed`, encode_documents, Rows.

    bos, eos: None: the tokenizer's <bos> and <eos>.
    whole: whether rows are made of whole documents, as far as they fit (`whole_documents`).
    Raises ValueError when row_length is not a multiple of block_size, when there is no bos or eos, and for what those
    refuse.
    """
    if block_size < 1 or row_length < 1 or row_length % block_size:
        raise ValueError(f"row_length is {row_length}: expected a multiple of block_size={block_size}")
    bos = tokenizer.token_to_id("<bos>") if bos is None else bos
    eos = tokenizer.token_to_id("<eos>") if eos is None else eos
    if bos is None or eos is None:
        raise ValueError("tokenizer has no <bos> or no <eos> token: expected one from train_tokenizer")
    texts = load_texts(source, split, held_out)
    random.Random(seed).shuffle(texts)
    stream = encode_documents(texts, tokenizer, bos=bos, eos=eos, block_size=block_size)
    newlines = (token for token in range(tokenizer.get_vocab_size()) if "\n" in tokenizer.decode([token]))
    return Rows(*(whole_documents(*stream, row_length, fill=eos) if whole else stream), row_length, newlines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a tokenizer on the train split of a corpus, write it, say how it does on the held-out split."""
    parser = argparse.ArgumentParser(prog="python -m tt_model.training.data", description=main.__doc__)
    parser.add_argument("--source", default="stdlib", help='a file, a folder or "stdlib" (default: %(default)s)')
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens, at least 260 (default: %(default)s)")
    parser.add_argument("--pieces", choices=PIECES, default="names", help="of a text (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the tokenizer.json to write")
    options = parser.parse_args(arguments)
    try:
        train, held = load_texts(options.source, "train"), load_texts(options.source, "held_out")
        tokenizer = train_tokenizer(train, options.vocab_size, options.pieces)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, tokenizer.to_str(pretty=True))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: {tokenizer.get_vocab_size()} tokens")
    for split, texts in zip(SPLITS, (train, held), strict=True):
        size = sum(len(text.encode()) for text in texts)
        tokens = sum(len(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        print(f"{split}: {len(texts)} documents, {size / 1e6:.2f} MB, {tokens} tokens, {size / tokens:.2f} bytes/token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
