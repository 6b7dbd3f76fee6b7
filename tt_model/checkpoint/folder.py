"""A folder of safetensors files: which tensors it holds, read one at a time."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import read_object, refuse_pointer

if TYPE_CHECKING:
    from rich.progress import Progress

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LISTED = 8  # names of one kind that an error spells out


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies and what it is."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


class Folder:
    """The tensors of a folder of safetensors files by key. Headers are read at once; one file is open at a time."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            what = "not a folder" if self.path.exists() else "no such folder"
            raise FileNotFoundError(f"{self.path}: {what} (a model is a folder with config.json and its weights)")
        self.tensors: dict[str, Stored] = {}
        self._file: Path | None = None
        self._handle: Any = None
        where = self._index()
        names = sorted(set(where.values())) if where is not None else [SINGLE]
        if absent := [name for name in names if not (self.path / name).is_file()]:
            raise FileNotFoundError(f"{self.path}: {some(absent)} missing, of {len(names)} files of weights")
        self.astray: list[str] = []  # in a file without being in the index
        for name in names:
            for key, stored in self._header(self.path / name).items():
                if where is None or where.get(key) == name:
                    self.tensors[key] = stored
                elif key not in where:
                    self.astray.append(key)

    def _index(self) -> dict[str, str] | None:
        """File names by key; None for a folder of one file without an index."""
        index = self.path / INDEX
        if not index.is_file():
            if (self.path / SINGLE).is_file():
                return None
            raise FileNotFoundError(f"{self.path}: neither {INDEX} nor {SINGLE} is there")
        where = read_object(index).get("weight_map")
        if not isinstance(where, dict) or not all(isinstance(n, str) and Path(n).name == n for n in where.values()):
            raise ValueError(f"{index}: not an index of weights: weight_map must give a file name for every key")
        return where

    def _header(self, file: Path) -> dict[str, Stored]:
        handle = self._open(file)
        stored = {}
        for key in handle.keys():  # noqa: SIM118 (not a dict)
            part = handle.get_slice(key)
            stored[key] = Stored(file, key, tuple(part.get_shape()), part.get_dtype())
            if stored[key].dtype not in DTYPES:
                what = f"{key} is stored as {stored[key].dtype}, which is not supported: only {', '.join(DTYPES)}"
                raise ValueError(f"{file}: {what}")
        return stored

    def _open(self, file: Path) -> Any:
        if file != self._file:
            self.close()
            refuse_pointer(file)
            try:
                self._handle = safe_open(file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: unreadable, truncated or corrupt: {error}") from error
            self._file = file
        return self._handle

    def read(self, stored: Stored, index: int | None = None) -> Tensor:
        """A tensor, or one slice of its first dimension, on the CPU. It may be a view of the file's pages."""
        handle = self._open(stored.file)
        try:
            return handle.get_tensor(stored.key) if index is None else handle.get_slice(stored.key)[index]
        except SafetensorError as error:
            raise ValueError(f"{stored.file}: {stored.key} is truncated or corrupt: {error}") from error

    def close(self) -> None:
        """Let go of the open file's pages."""
        self._file = self._handle = None


def finite(tensor: Tensor) -> Tensor:
    """Whether a tensor is free of NaN and Inf: a boolean on its device, computed without a copy."""
    low, high = torch.aminmax(tensor)
    return low.isfinite() & high.isfinite()


def some(names: Sequence[str]) -> str:
    """The first few of a list, and how many more."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


class Bar:
    """A progress bar on stderr, only on a terminal and only once a second has passed."""

    def __init__(self, what: str, total: int, show: bool):
        self.what, self.total, self.done = what, total, 0
        self.show = show and sys.stderr.isatty()
        self.begin = time.monotonic()
        self.bar: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        if self.bar is None and self.show and time.monotonic() - self.begin > 1:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task(self.what, total=self.total)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done)
