"""A model into a folder in the published layout, tensor by tensor, all of it or nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..config import TwoTowerConfig
from ..files import named, naming, partial, sync
from .folder import DTYPES, INDEX, SINGLE, Bar, finite, some
from .keys import parameter_dtype, published_keys

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written, and how to get its values."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
    tokenizer: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Write a model as a checkpoint in the published layout, all of it or nothing.

    Args:
        model: a `TwoTower`, with or without a denoiser.
        folder: where to; made with its parents. An existing checkpoint there is replaced in one step once the new one
            is complete, and stays as it was if anything fails. Other files in the folder are kept.
        dtype: what weights are stored as; None: what they are. `FP32_PARAMETERS` are stored in at least fp32. The
            config's `torch_dtype` says what the model computes in, which is the type of its parameters.
        max_shard_bytes: files are at most this large, unless one tensor is larger. One file needs no index.
        tokenizer: a tokenizer.json, or the folder that holds it, to be copied along.
        progress: as in `load`.
    Raises:
        ValueError: parameters without values (on meta), with NaN or Inf, or too large for `dtype`: the key is named.
        OSError: the folder or the disk does not take it.
    Cost: one pass over the weights; on top of the model, memory for its largest tensor in the stored type (of routed
    experts one matrix).
    """
    config: TwoTowerConfig = dataclasses.replace(model.config, dtype=model.context_lm_head.weight.dtype)
    if empty := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(f"save: {len(empty)} parameters have no values: {some(empty)}")
    entries = []
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        stored = value.dtype if dtype is None else parameter_dtype(name, dtype)
        for key, index in published_keys(name, value.shape):
            part = value if index is None else value[index]
            entries.append(Entry(key, tuple(part.shape), stored, lambda part=part: part))
    files = {}
    if tokenizer is not None:
        files = tokenizer_files(tokenizer)
        if "tokenizer.json" not in files:
            raise FileNotFoundError(f"{tokenizer}: no such tokenizer")
    with atomic_folder(folder) as temporary:
        write(temporary, config, entries, max_shard_bytes, files, progress)


def tokenizer_files(path: str | Path) -> dict[str, Path]:
    """The files of a tokenizer by the name they have in a model's folder, from their folder or a tokenizer.json."""
    path = Path(path)
    files = {name: path / name for name in TOKENIZER_FILES} if path.is_dir() else {"tokenizer.json": path}
    return {name: file for name, file in files.items() if file.is_file()}


def write(
    folder: Path,
    config: TwoTowerConfig,
    entries: Sequence[Entry],
    max_shard_bytes: float,
    extras: Mapping[str, Path],
    progress: bool,
) -> None:
    """Weights, index, config.json and copies of `extras` into an empty folder."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    weight_map: dict[str, str] = {}
    total = sum(entry.nbytes for entry in entries)
    with Bar("writing", total, progress) as bar:
        for i, shard in enumerate(shards):
            name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            weight_map |= {entry.key: name for entry in shard}
            with naming(folder / name), (folder / name).open("wb") as file:
                _write_shard(file, shard, bar)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(folder / "config.json", config.to_dict())
    for name, extra in extras.items():
        shutil.copyfile(extra, folder / name)


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    with naming(file):
        file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_shard(file: BinaryIO, entries: Sequence[Entry], bar: Bar) -> None:
    """A safetensors file, tensor by tensor (the library's own writer holds a whole file in memory)."""
    # Larger elements first, as the library does, so that every tensor lies aligned to its own element size.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        end = offset + entry.nbytes
        kind = _DTYPE_NAMES[entry.dtype]
        header[entry.key] = {"dtype": kind, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        value = entry.read()
        assert tuple(value.shape) == entry.shape, entry.key
        stored = value.to(device="cpu", dtype=entry.dtype).contiguous()
        if not finite(stored):
            name = str(entry.dtype).removeprefix("torch.")
            what = f"too large for {name}" if finite(value) else "NaN or Inf"
            raise ValueError(f"not written: {entry.key} holds values that are {what}")
        file.write(stored.view(-1).view(torch.uint8).numpy())
        bar.advance(entry.nbytes)


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """A folder that appears complete or not at all: yields a temporary one beside it, to be filled and then renamed.

    If the block raises, the temporary folder is removed and `folder` stays as it was. If it ends, the temporary folder
    takes the place of `folder` in one step; what was there before and was not written anew is kept, except weights,
    which only fit each other. Files that are written are on the disk before the step. What a killed process left beside
    `folder` is removed first. OSError when `folder` is a file or cannot be written; it names the file in `folder`.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{folder}: exists and is not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with partial(target, folder=True) as temporary:
        try:
            yield temporary
            for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary):
                sync(path)
            if not _appears(temporary, target):
                shutil.copymode(target, temporary)
                _keep(target, temporary)
                _exchange(temporary, target)
                for late in _others(temporary):  # made there since `_keep` looked
                    if not (target / late.name).exists():
                        late.rename(target / late.name)
            sync(target.parent)
        except OSError as error:
            raise named(error, temporary, target) from error


def _appears(temporary: Path, target: Path) -> bool:
    """Whether the folder could take its target's name; False where something is there already."""
    if target.exists():
        return False
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():  # rather than another process that was faster
            raise
        return False
    return True


def _others(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not _WEIGHTS.fullmatch(path.name)]


def _keep(old: Path, new: Path) -> None:
    """Give `new` what stands in `old` alone, except weights, under a second name: `old` may go at any moment."""
    for path in _others(old):
        if (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name of a file; a copy on a file system that has none."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders swap names: in one step where the system can (Linux), else in three."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2 is None or renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) != 0:
        aside = one.with_name(one.name + ".old")
        other.rename(aside)
        try:
            one.rename(other)
        except OSError:
            aside.rename(other)
            raise
        aside.rename(one)
