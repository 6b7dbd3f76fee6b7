"""What the commands share: the argument parser, errors and warnings in one line, devices and types, the output file."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..files import naming, partial, sync

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
# Options of `generate`, and keys of a line of --jsonl, that are settings of those names.
_LOOP = ("mode", "max_new_tokens", "block_size", "steps_per_block", "draft_steps", "confidence_threshold")
_RULES = ("strategy", "confidence", "factor", "entropy_bound", "tempered", "alg_temp")
SETTINGS = (*_LOOP, *_RULES, "temperature", "top_k", "top_p", "stop")


class Help(argparse.HelpFormatter):
    """Help that fits the terminal: paragraphs are filled, indented lines keep their own line and go on below it."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for indented, part in groupby(text.splitlines(), key=lambda line: line.startswith(" ") or not line):
            if not indented:
                lines += _wrapped(" ".join(part), width)
                continue
            for line in part:
                if "twotower " in line:
                    lines += _command_lines(line, width)
                else:  # a word and what it means, or a blank line
                    indent, word, gap = re.findall(r"( *)(\S*)( *)", line)[0]
                    lines += _wrapped(line, width, " " * len(indent + word + gap))
        return "\n".join(lines)


def _wrapped(text: str, width: int, hang: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(width, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text) or [""]


def _command_lines(line: str, width: int) -> list[str]:
    """A shell command on as many lines as it takes, broken between its words."""
    lines: list[str] = []
    for word in re.findall(r"""(?:[^\s"']|"[^"]*"|'[^']*')+""", line):
        if lines and len(lines[-1]) + len(word) + 3 <= width:  # a space before, and " \\" after
            lines[-1] += " " + word
        else:
            lines.append(("    " if lines else "  ") + word)
    return [part + " \\" for part in lines[:-1]] + lines[-1:]


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as commands, no guessing of abbreviations, and errors in one line."""

    def __init__(self, prog: str, description: str = "", epilog: str = "", **more: Any):
        more.setdefault("formatter_class", Help)
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"twotower: error: {one_line(message)} ({self.prog} --help shows how)\n")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def describe(error: Exception) -> str:
    """An exception in one line, for someone who has not read the code."""
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(f) if isinstance(f, bytes) else str(f) for f in (error.filename, error.filename2) if f]
        return one_line(f"{' -> '.join(names)}: {error.strerror}" if names else error.strerror)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return one_line(f"out of memory: {error}") if str(error) else "out of memory"
    if isinstance(error, ValueError | OSError | NotImplementedError):
        return one_line(error)
    return f"{one_line(f'{type(error).__name__}: {error}')} (unexpected; TWOTOWER_DEBUG=1 shows where)"


def put(text: str) -> None:
    """Write to standard output; an error of it, as that the disk is full, names it."""
    with naming(Path("standard output")):
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings as `twotower: warning: ...` on stderr, the same one once."""
    said = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        text = one_line(message)
        if text not in said:
            said.add(text)
            print(f"twotower: warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def tell(logger: str) -> None:
    """What a logger informs of, in lines on standard error."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("twotower: %(message)s"))
    found = logging.getLogger(logger)
    found.handlers, found.propagate = [handler], False
    found.setLevel(logging.INFO)


def add_command(
    commands: argparse._SubParsersAction[Parser],
    name: str,
    run: Callable[[argparse.Namespace], None],
    text: str,
    description: str,
    epilog: str,
) -> Parser:
    """The parser of a command that `run` carries out; `text` is its line in the list of commands."""
    parser = commands.add_parser(name, help=text, description=description, epilog=epilog)
    parser.set_defaults(run=run, parser=parser)
    return parser


def option(to: argparse._ActionsContainer, flag: str, kind: Callable, metavar: str, text: str, **more: Any) -> None:
    """An option with a value. Its help ends in the default where it has one and `text` says nothing of it."""
    if "default" in more and "default" not in text:
        text += " (default: %(default)s)"
    to.add_argument(flag, type=kind, metavar=metavar, help=text, **more)


def number(kind: type, least: float, most: float = sys.float_info.max) -> Callable[[str], Any]:
    """What reads an option's number and refuses one out of range."""

    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            expected = f"at least {least}" if most == sys.float_info.max else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {expected}")
        return value

    read.__name__ = kind.__name__  # argparse names it when the text is not a number
    return read


def add_machine(parser: argparse._ActionsContainer, dtype: str, *, more: str = "") -> None:
    """--device, with more of its help, --dtype, the latter with its help, and --threads."""
    option(parser, "--device", str, "DEVICE", "cpu, cuda, cuda:1 ... (default: a GPU if there is one)" + more)
    add_dtype(parser, "--dtype", dtype)
    threads = "threads of a CPU to compute with (default: one a core)"
    option(parser, "--threads", number(int, 1, 4096), "N", threads)


def add_dtype(parser: argparse._ActionsContainer, flag: str, what: str) -> None:
    option(parser, flag, str, "TYPE", f"{what}: {', '.join(DTYPES)}", choices=DTYPES)


def machine_of(o: argparse.Namespace, *, alone: str = "") -> tuple[tuple[torch.device, ...], torch.dtype | None]:
    """The devices and the type that the options of `add_machine` name, of which --threads is followed here.

    ValueError for a device that is not here, and for two in what stands `alone`.
    """
    import torch

    from ..arguments import devices_of

    if o.threads is not None:
        torch.set_num_threads(o.threads)
    return devices_of(o.device, "--device", alone=alone), dtype_of(o.dtype)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type that an option names, None for None."""
    from ..config import DTYPES as known

    return None if name is None else known[name]


@contextmanager
def output_to(path: str | None, flag: str = "--output") -> Iterator[list[str]]:
    """Pieces of text for the file that `flag` names, written at the end, whole or not at all; None: standard output.

    A temporary file beside it is made first, so that a path that cannot be written fails before any work.
    """
    pieces: list[str] = []
    if path is None:
        yield pieces
        put("".join(pieces))
        return
    target = Path(os.path.realpath(path))
    with ExitStack() as stack:
        with _naming(path, flag):
            if target.is_dir():
                raise IsADirectoryError(None, "is a folder, expected a file")
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(None, "is not writable")
            replaced = target.is_file() or not target.exists()  # rather than a device or a pipe
            temporary = stack.enter_context(partial(target)) if replaced else target
            if target.is_file():
                shutil.copymode(target, temporary)
        yield pieces
        with _naming(path, flag):
            temporary.write_text("".join(pieces), encoding="utf-8")
            if replaced:
                sync(temporary)
                os.replace(temporary, target)


@contextmanager
def _naming(path: str, flag: str) -> Iterator[None]:
    """Errors of writing to what `flag` names."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error
