"""What the commands share: the argument parser, errors and warnings in one line, devices and types, the output file."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

DTYPES = "float32, bfloat16, float16 or float64"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with something to say about it."""


class Parser(argparse.ArgumentParser):
    """argparse with examples kept as written, no guessing of abbreviations, and errors in one line."""

    def __init__(self, prog: str, description: str = "", epilog: str = "", **more: object):
        more.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=prog, description=description, epilog=epilog, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"twotower: error: {one_line(message)} ({self.prog} --help shows how)\n")


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def describe(error: Exception) -> str:
    """An exception in one line, for someone who has not read the code."""
    if isinstance(error, OSError) and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return one_line(f"out of memory: {error}") if str(error) else "out of memory"
    if isinstance(error, ValueError | OSError | NotImplementedError):
        return one_line(error)
    return f"{one_line(f'{type(error).__name__}: {error}')} (unexpected; TWOTOWER_DEBUG=1 shows where)"


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
    """--device and --dtype, the latter with its help."""
    parser.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", metavar="TYPE", help=f"{dtype}: {DTYPES}")


def device_of(name: str | None) -> torch.device:
    """The device that --device names; ValueError for one that is not here."""
    from ..arguments import device_of as checked

    return checked(name, "--device")


def dtype_of(name: str | None, option: str = "--dtype") -> torch.dtype | None:
    """The type that an option names, None for None."""
    from ..config import DTYPES as known

    if name is not None and name not in known:
        raise ValueError(f"{option} is {name!r}, expected one of {', '.join(known)}")
    return None if name is None else known[name]


class Output:
    """The file that --output names, written whole or not at all; standard output without one.

    Entering makes a temporary file beside it, so that a path that cannot be written fails before any work.
    """

    def __init__(self, path: str | None):
        self.path = None if path is None else Path(path)
        self._target = self._temporary = None

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
                self._temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
                self._temporary.open("x").close()
        except OSError as error:
            self._temporary = None
            raise ValueError(f"--output {self.path}: {error.strerror}") from error
        self._target = target
        return self

    def write(self, text: str) -> None:
        if self.path is None:
            sys.stdout.write(text)
        else:
            (self._temporary or self._target).write_text(text, encoding="utf-8")

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._temporary is not None:
            try:
                if kind is None:
                    os.replace(self._temporary, self._target)
            finally:
                self._temporary.unlink(missing_ok=True)
