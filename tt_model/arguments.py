"""Checks of what callers pass: integers, devices, types, seeds, prompts. Errors name the argument."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DTYPES

PACKAGE = f"{Path(__file__).parent}{os.sep}"


def warn(message: str) -> None:
    """A UserWarning where the package was called from, however deep in it this is."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def is_integer(value: object) -> bool:
    """Whether a value is an integer, NumPy's included; a truth value is none."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def integer(name: str, value: Any, least: int) -> int:
    """An integer of at least `least`; ValueError for any other value."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an integer of at least {least}")
    return int(value)


def device_of(device: str | int | torch.device | None, name: str = "device") -> torch.device:
    """A device that is here; None: the current CUDA device if there is one, else the CPU. ValueError for any other."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    said = str(device) if isinstance(device, torch.device) else device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} is {said!r}, expected something like cpu, cuda or cuda:1") from None
    if isinstance(device, bool) or found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is {said!r}, expected cpu or cuda")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"{name} is {said!r}, but there are {torch.cuda.device_count()} CUDA devices here")
    return found


def devices_of(device: Any, name: str = "device", *, alone: str = "") -> tuple[torch.device, ...]:
    """One device as `device_of` reads it, or two: the context tower's and the denoiser's, in a sequence, or in a text
    with a comma between. ValueError for more, or for two in what stands `alone`, which it names."""
    parts = device.split(",") if isinstance(device, str) and "," in device else device
    if not isinstance(parts, list | tuple) or not parts:
        return (device_of(device, name),)
    if len(parts) > (1 if alone else 2):
        expected = f"one for {alone}" if alone else "one, or two: the context tower's and the denoiser's"
        raise ValueError(f"{name} is {device!r}, expected {expected}")
    found = tuple(device_of(part, name) for part in parts)
    if len({each.type for each in found}) > 1:
        raise ValueError(f"{name} is {device!r}, expected two of one kind")
    return found


def dtype_of(dtype: torch.dtype, name: str = "dtype") -> torch.dtype:
    """A type that models have; ValueError for any other."""
    if dtype not in DTYPES.values():
        raise ValueError(f"{name} is {dtype!r}, expected a torch.dtype of {', '.join(DTYPES)}")
    return dtype


def wrapped(seed: int) -> int:
    """A seed modulo 2^64, as the signed 64 bits that a tensor holds."""
    return (int(seed) + 2**63) % 2**64 - 2**63


def row_seeds(seed: int | Sequence[int] | Tensor | None, rows: int, device: torch.device) -> Tensor:
    """One seed a row, modulo 2^64: an int s gives row b the seed s + b; None draws from torch's default generator."""
    if seed is None:
        return torch.randint(2**62, (rows,)).to(device)
    plain: Any = seed.tolist() if hasattr(seed, "tolist") else seed
    if is_integer(plain):
        plain = [plain + b for b in range(rows)]
    elif isinstance(plain, str | bytes) or not isinstance(plain, Sequence) or not all(map(is_integer, plain)):
        raise ValueError(f"seed is {seed!r}, expected an integer, or one for each of the {rows} prompts")
    elif len(plain) != rows:
        raise ValueError(f"seed has {len(plain)} values, expected one for each of the {rows} prompts, or an integer")
    return torch.tensor([wrapped(s) for s in plain], dtype=torch.int64, device=device)


def token_rows(prompts: Tensor | Iterable[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Prompts as lists of ids, some perhaps empty. ValueError for what are no rows of ids of the vocabulary."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ValueError(f"prompts is {prompts!r:.40}, expected a list of lists of token ids")
    rows = []
    for b, given in enumerate(prompts):
        row = given.tolist() if hasattr(given, "tolist") else given
        if isinstance(row, str | bytes) or not isinstance(row, Sequence) or not all(map(is_integer, row)):
            raise ValueError(f"prompts: prompt {b} is {row!r:.40}, expected a list of token ids")
        rows.append([int(i) for i in row])
        if outside := next((i for i in rows[-1] if not 0 <= i < vocab_size), None):
            raise ValueError(f"prompts holds token id {outside}, expected 0 to {vocab_size - 1} (prompt {b})")
    return rows
