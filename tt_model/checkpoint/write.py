"""A model into a folder in the published layout, tensor by tensor, all of it or nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..arguments import dtype_of
from ..config import TwoTowerConfig
from ..files import named, naming, partial, refuse_pointer, sync
from .folder import DTYPES, INDEX, SINGLE, Bar, finite, some
from .keys import named_parameters, parameter_dtype, parameter_shapes, published_keys, unwrapped

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# What a model's folder is read or used with, besides config.json and weights.
COMPANIONS = frozenset((*TOKENIZER_FILES, "generation_config.json"))
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # of our own layout
_ANY_WEIGHTS = re.compile(r".*\.(safetensors|bin|pth?|ckpt|gguf|h5|msgpack|onnx|npz|index\.json|partial)")
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
        tokenizer: a tokenizer.json, or the folder that holds it, to be copied along; None: the one that the folder has
            from which the model was loaded.
        progress: as in `load`.
    All else that the folder holds from which the model was loaded (`model.source`) is copied, too, but for weights of
    whatever format and hidden files: generation_config.json, chat template, model card, licence. A warning if that
    folder is gone. torch.compile around the model or a part of it leaves no trace.
    Raises:
        ValueError: parameters without values (on meta), with NaN or Inf, or too large for `dtype`: the key is named;
            parameters that are not those of the model's config; no TwoTower; a setting that cannot be meant.
        OSError: the folder or the disk does not take it.
    Cost: one pass over the weights; on top of the model, memory for its largest tensor in the stored type (of routed
    experts one matrix).
    """
    inner = unwrapped(model)
    if not isinstance(getattr(inner, "config", None), TwoTowerConfig):
        kind = type(inner).__name__
        raise ValueError(f"save: model is a {kind}, expected a TwoTower (if {kind} wraps one, the one inside)")
    if dtype is not None:
        dtype_of(dtype)
    check_shard_bytes(max_shard_bytes)
    parameters = named_parameters(inner)
    expected = parameter_shapes(inner.config, denoiser=inner.denoiser_tower is not None)
    found = {name: tuple(p.shape) for name, p in parameters.items()}
    if strange := [name for name in found | expected if found.get(name) != expected.get(name)]:
        raise ValueError(f"save: the model's parameters are not those of its config: {some(strange)}")
    if empty := [name for name, p in parameters.items() if p.is_meta]:
        raise ValueError(f"save: {len(empty)} parameters have no values: {some(empty)}")
    config: TwoTowerConfig = dataclasses.replace(inner.config, dtype=inner.context_lm_head.weight.dtype)
    entries: list[Entry] = []
    for name in expected:
        value = parameters[name].detach()
        stored = parameter_dtype(name, value.dtype if dtype is None else dtype)
        for key, index in published_keys(name, value.shape):
            part = value if index is None else value[index]
            entries.append(Entry(key, tuple(part.shape), stored, part.detach))
    anew = () if tokenizer is None else TOKENIZER_FILES
    extras = {name: file for name, file in _extras(inner, Path(folder)).items() if name not in anew}
    if tokenizer is not None:
        extras |= tokenizer_files(tokenizer)
    with atomic_folder(folder, anew=anew) as temporary:
        write(temporary, config, entries, max_shard_bytes, extras, progress)


def check_shard_bytes(value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"max_shard_bytes is {value!r}, expected a number above 0")


def _extras(model: nn.Module, target: Path) -> dict[str, Path]:
    """What to copy along from the folder that a model was loaded from; nothing when it is saved onto that folder."""
    source: Path | None = getattr(model, "source", None)
    if source is None or source.resolve() == target.resolve():
        return {}
    if not source.is_dir():
        what = "its tokenizer, generation_config.json and the like are not copied"
        warnings.warn(f"{source}: the folder that the model was loaded from is gone: {what}", stacklevel=3)
        return {}
    return companions(source, target)


def companions(source: Path, target: Path) -> dict[str, Path]:
    """What a model's folder holds besides config.json and weights, by its name in it.

    Left out are hidden files, folders that hold weights, and `target` where it lies inside. Refused is a
    git-LFS pointer in place of a file that models are run with.
    """
    found: dict[str, Path] = {}
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name == "config.json" or target.resolve().is_relative_to(path.resolve()):
            continue
        inside = [path]
        if path.is_dir():
            inside = [Path(where, name) for where, _, names in os.walk(path) for name in sorted(names)]
        if not any(_ANY_WEIGHTS.fullmatch(file.name) for file in inside):
            found |= {file.relative_to(source).as_posix(): file for file in inside if file.is_file()}
    for name in COMPANIONS.intersection(found):
        refuse_pointer(found[name])
    return found


def tokenizer_files(path: str | Path) -> dict[str, Path]:
    """The files of a tokenizer by the name they have in a model's folder, from their folder or a tokenizer.json."""
    path = Path(path)
    files = {name: path / name for name in TOKENIZER_FILES} if path.is_dir() else {"tokenizer.json": path}
    files = {name: file for name, file in files.items() if file.is_file()}
    if "tokenizer.json" not in files:
        raise FileNotFoundError(f"{path}: no such tokenizer")
    for file in files.values():
        refuse_pointer(file)
    return files


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
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
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
        file.write(stored.view(-1).view(torch.uint8).numpy().data)
        bar.advance(entry.nbytes)


@contextmanager
def atomic_folder(folder: str | Path, *, anew: Collection[str] = ()) -> Iterator[Path]:
    """A folder that appears complete or not at all: yields a temporary one beside it, to be filled and then renamed.

    If the block raises, the temporary folder is removed and `folder` stays as it was. If it ends, the temporary folder
    takes the place of `folder` in one step; what was there before and was not written anew is kept, except weights and
    the files named in `anew`, which only fit each other. Files that are written are on the disk before the step. What a
    killed process left beside `folder` is removed first. OSError when `folder` is a file or cannot be written; it names
    the file in `folder`.
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
                left_out = lambda name: _WEIGHTS.fullmatch(name) or name in anew
                _keep(target, temporary, left_out)
                _exchange(temporary, target)
                _keep(temporary, target, left_out)  # what was made there since
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


def _keep(old: Path, new: Path, left_out: Callable[[str], object] = lambda name: False) -> None:
    """Give `new` what stands in `old` alone, under a second name: `old` may go at any moment."""
    for path in old.iterdir():
        kept = new / path.name
        if left_out(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            if not kept.exists():
                shutil.copytree(path, kept, symlinks=True, copy_function=_link)
            elif kept.is_dir():
                _keep(path, kept)
        elif not os.path.lexists(kept):
            _link(path, kept)


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
