"""`python -m tt_model.training.boilerplate --out DIR`: a corpus of specifications with their programs, and real Python.

DIR gets *.jsonl files, a document a line, which `twotower train --data DIR` reads: boilerplate-000.jsonl and so on,
whose documents are a header, a line end and its program; and python.jsonl, files of the standard library (or of another
--source) from its train split, so that what is held out there stays apart. corpus.json says what all of it is of. A
file appears whole or not at all, and the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...files import hold, read_object, write_text
from ..data import load_texts
from .programs import program
from .sampling import SPLITS, specification
from .words import MADE_UP

FACTS = "corpus.json"
OF_A_FILE = 5000  # documents


def document(number: int, *, seed: int = 0, split: str = "train", made_up: float = MADE_UP) -> str:
    """One document, of these alone: a header, a line end, its program."""
    header = specification(random.Random(f"boilerplate {split} {seed} {number}"), split, made_up=made_up)
    return f"{header}\n{program(header)}"


def facts(documents: int, seed: int, split: str, share: float, source: str, made_up: float) -> dict[str, Any]:
    """What a corpus is of."""
    code = hashlib.sha256()
    for name in ("words", "grammar", "programs", "sampling"):
        code.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return {
        "documents": documents,
        "seed": seed,
        "split": split,
        "made_up_share": made_up,
        "python_share": share,
        "python_source": source,
        "python_version": platform.python_version(),
        "code": code.hexdigest()[:16],
    }


def write_corpus(
    out: Path,
    *,
    documents: int,
    seed: int = 0,
    split: str = "train",
    share: float = 0.25,
    source: str = "stdlib",
    made_up: float = MADE_UP,
    advance: Callable[[int], object] = lambda documents: None,
) -> dict[str, int]:
    """Write what is missing of a corpus; bytes of text in each of its files.

    share: real Python in all of the text, by bytes, as near as whole files come to it, or all that there is.
    made_up: words of names that are, of all of them.
    advance: is told how many more documents are there.
    Raises ValueError where the folder holds another corpus, and for a share, split or source that there is not.
    """
    if documents < 1 or not 0 <= share < 1 or not 0 <= made_up <= 1 or split not in SPLITS:
        raise ValueError(
            f"documents is {documents}, share is {share}, made_up is {made_up}, split is {split!r}: expected at least "
            f"1, a share of at least 0 and below 1, one of 0 to 1, and one of {', '.join(SPLITS)}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        known, wanted = out / FACTS, facts(documents, seed, split, share, source, made_up)
        if known.is_file():
            there = read_object(known)
            if other := [name for name in wanted if there.get(name) != wanted[name]]:
                raise ValueError(
                    f"{out} holds a corpus with other {', '.join(other)}: remove it, or use another folder"
                )
        else:
            write_text(known, json.dumps(wanted, indent=1) + "\n")
        sizes = {}
        for begin in range(0, documents, OF_A_FILE):
            numbers = range(begin, min(begin + OF_A_FILE, documents))
            file = out / f"boilerplate-{begin // OF_A_FILE:03d}.jsonl"
            make = partial(document, seed=seed, split=split, made_up=made_up)
            sizes[file.name] = _write(file, partial(map, make, numbers))
            advance(len(numbers))
        if share:
            most = round(share / (1 - share) * sum(sizes.values()))
            sizes["python.jsonl"] = _write(out / "python.jsonl", lambda: _python(source, most, seed))
    return sizes


def _write(file: Path, texts: Callable[[], Iterator[str]]) -> int:
    """Write the texts, a document a line, if the file is not there; how many bytes they have."""
    if not file.is_file():
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts()))
    with file.open(encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines)


def _python(source: str, most: int, seed: int) -> Iterator[str]:
    """Files of the train split, by chance, as long as they have no more bytes than that together."""
    texts = load_texts(source, "train")
    random.Random(seed).shuffle(texts)
    for text in texts:
        most -= len(text.encode())
        if most < 0:
            return
        yield text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a corpus, and say what is in it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    p = argparse.ArgumentParser(
        prog="python -m tt_model.training.boilerplate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    p.add_argument("--documents", type=int, default=40000, metavar="N", help="specifications (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    p.add_argument("--split", choices=SPLITS, default="train", help="default: %(default)s")
    p.add_argument(
        "--made-up", type=float, default=MADE_UP, metavar="SHARE", help="of the words in names (default: %(default)s)"
    )
    p.add_argument(
        "--python", type=float, default=0.25, metavar="SHARE", help="of real Python, by bytes (default: %(default)s)"
    )
    p.add_argument("--source", default="stdlib", help='of real Python: a file, a folder or "stdlib" (default)')
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    o = p.parse_args(arguments)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = o.quiet or not sys.stderr.isatty()
    try:
        with Progress(*columns, console=Console(stderr=True), disable=quiet) as progress:
            bar = progress.add_task("documents", total=o.documents)
            sizes = write_corpus(
                o.out,
                documents=o.documents,
                seed=o.seed,
                split=o.split,
                share=o.python,
                source=o.source,
                made_up=o.made_up,
                advance=lambda done: progress.advance(bar, done),
            )
    except (ValueError, OSError) as error:
        p.error(str(error))
    total, real = sum(sizes.values()), sizes.get("python.jsonl", 0)
    print(
        f"{o.out}: {o.documents} specifications, {(total - real) / 1e6:.2f} MB; "
        f"real Python, {real / 1e6:.2f} MB ({real / total:.0%})"
    )
    return 0
