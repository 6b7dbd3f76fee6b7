"""Weights from a folder straight into a model's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from ..arguments import devices_of, dtype_of
from .folder import Bar, Folder, Stored, finite, some
from .keys import CONTEXT, DENOISER, layout_of, match, named_parameters, owner, parameter_dtype, unwrapped


def load(
    model: nn.Module,
    folder: str | Path,
    *,
    device: torch.device | str | Sequence[torch.device | str],
    dtype: torch.dtype,
    towers: str = "both",
    progress: bool = True,
) -> None:
    """Fill a model with a checkpoint's weights, tensor by tensor, straight into their final place.

    Args:
        model: a `TwoTower`, best built under `torch.device("meta")`: its parameters are then made here, on demand.
            Parameters that are already on `device` and of the right type are filled in place, others are replaced. Its
            `source` is set to the folder, for `save` to copy from.
        folder: safetensors with an index, or one model.safetensors: a two-tower checkpoint in the published layout, or
            for `towers="context"` also a plain Nemotron-H.
        device, dtype: of the loaded parameters; `FP32_PARAMETERS` are at least fp32. Two devices: the second one is the
            denoiser's, and `is_apart` is set.
        towers: "both", or "context" for the context tower and its head alone; the rest is then left as it is.
        progress: show a bar on stderr if that is a terminal and loading takes over a second.
    Raises:
        FileNotFoundError: no such folder, or no weights in it, or a file of its index is missing.
        ValueError: a device that is not here, a type that models do not have; a shard is a git-LFS pointer, truncated
            or corrupt (it is named); keys are missing, unexpected or mis-shaped (one error lists them all; nothing has
            been loaded); weights hold NaN or Inf, also after rounding to `dtype` (their keys are named; the model is
            then partly loaded).
    Cost: peak memory is the loaded parameters and the pages of one shard.
    """
    if towers not in ("both", "context"):
        raise ValueError(f'load: towers is {towers!r}, expected "both" or "context"')
    devices, dtype = devices_of(device, alone='towers="context"' * (towers == "context")), dtype_of(dtype)
    files = Folder(folder)
    kind = layout_of(files)
    if towers == "both" and kind != "two_tower":
        what = "is a plain Nemotron-H" if kind == "plain" else "holds a context tower only"
        raise ValueError(
            f'{files.path}: {what}: load it with towers="context", or make it a model of two towers (twotower convert)'
        )
    wanted = CONTEXT if towers == "context" else (*CONTEXT, *DENOISER)
    shapes = {name: tuple(p.shape) for name, p in named_parameters(model).items() if name.startswith(wanted)}
    if towers == "both" and not any(name.startswith(DENOISER) for name in shapes):
        raise ValueError('load: the model has no denoiser (it was made with towers="context")')
    found = match(files, shapes, wanted, kind == "plain")

    jobs = [(stored, name, index) for name, parts in found.items() for index, stored in parts.items()]
    jobs.sort(key=lambda job: job[0].file)  # stable: one file after the other, inside it in the model's order
    memory: dict[str, Tensor] = {}
    with torch.no_grad(), Bar("loading", sum(stored.nbytes for stored, *_ in jobs), progress) as bar:
        for _, shard in groupby(jobs, key=lambda job: job[0].file):
            sound: list[tuple[Stored, Tensor]] = []
            for stored, name, index in shard:
                if name not in memory:
                    there = devices[-1 if name.startswith(DENOISER) else 0]
                    memory[name] = place(model, name, there, parameter_dtype(name, dtype))
                target = memory[name] if index is None else memory[name][index]
                target.copy_(files.read(stored))
                sound.append((stored, finite(target)))
                bar.advance(stored.nbytes)
            flags = torch.stack([flag.to(devices[0]) for _, flag in sound])
            are_sound = flags.tolist()  # one wait for the device per shard
            if bad := [stored for (stored, _), flag in zip(sound, are_sound, strict=True) if not flag]:
                raise _not_finite(files, bad, dtype)
    files.close()
    unwrapped(model).source = files.path.absolute()
    if towers == "both":
        unwrapped(model).is_apart = len(devices) > 1


def _not_finite(files: Folder, bad: Sequence[Stored], dtype: torch.dtype) -> ValueError:
    stored = [s.key for s in bad if not finite(files.read(s))]
    if stored:
        return ValueError(f"{files.path}: NaN or Inf in the weights: {some(stored)}")
    name = str(dtype).removeprefix("torch.")
    return ValueError(f"{files.path}: weights too large for {name}: {some([s.key for s in bad])}")


def place(model: nn.Module, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The memory of a parameter on a device, made anew if the model has it elsewhere, as another type or on meta."""
    module, leaf = owner(model, name)
    old = getattr(module, leaf)
    here = old.device.type == device.type and device.index in (None, old.device.index)
    if not here or old.dtype != dtype:
        fresh = torch.empty(old.shape, dtype=dtype, device=device)
        module.register_parameter(leaf, nn.Parameter(fresh, requires_grad=old.requires_grad))
    return getattr(module, leaf).detach()  # writes to .data would not be counted
