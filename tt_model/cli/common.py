"""What the commands share: the argument parser, errors and warnings in one line, devices and types, the output file."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from ..files import partial, sync

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")


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
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


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


def add_machine(parser: argparse._ArgumentGroup | Parser, dtype: str) -> None:
    """--device, --dtype, the latter with its help, and --threads."""
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    add_dtype(parser, "--dtype", dtype)
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="threads of a CPU to compute with (default: one a core)"
    )


def add_dtype(parser: argparse._ArgumentGroup | Parser, option: str, what: str) -> None:
    parser.add_argument(option, choices=DTYPES, metavar="TYPE", help=f"{what}: {', '.join(DTYPES)}")


def _threads(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 4096):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads, at least 1")
    return int(text)


def use_threads(count: int | None) -> None:
    """Compute with as many threads as --threads says."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def device_of(name: str | None) -> torch.device:
    """The device that --device names; ValueError for one that is not here."""
    from ..arguments import device_of as checked

    return checked(name, "--device")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type that an option names, None for None."""
    from ..config import DTYPES as known

    return None if name is None else known[name]


class Output:
    """The file that --output names, written whole or not at all; standard output without one.

    Entering makes a temporary file beside it, so that a path that cannot be written fails before any work.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self._target: Path | None = None
        self._temporary: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Output:
        if self.path is None:
            return self
        try:
            target = Path(os.path.realpath(self.path))
            if target.is_dir():
                raise IsADirectoryError(None, "is a folder, expected a file")
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(None, "is not writable")
            if target.is_file() or not target.exists():
                self._temporary = self._stack.enter_context(partial(target))
                if target.exists():
                    shutil.copymode(target, self._temporary)
        except OSError as error:
            raise self._named(error) from error
        self._target = target
        return self

    def write(self, text: str) -> None:
        if self.path is None:
            put(text)
            return
        try:
            (self._temporary or self._target or self.path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise self._named(error) from error

    def _named(self, error: OSError) -> ValueError:
        return ValueError(f"--output {self.path}: {error.strerror}")

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        with self._stack:
            if self._temporary is not None and self._target is not None and kind is None:
                try:
                    sync(self._temporary)
                    os.replace(self._temporary, self._target)
                except OSError as error:
                    raise self._named(error) from error
