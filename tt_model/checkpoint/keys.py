"""Which stored tensor is which parameter: published keys, plain Nemotron-H keys, stacked experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TwoTowerConfig
from ..modeling.two_tower import TwoTowerModel
from .folder import Folder, Stored, some

CONTEXT = ("context_tower.", "context_lm_head.")
DENOISER = ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables.")
_PLAIN = ("backbone.", "model.")
_EXPERT = re.compile(r"(.*\.experts)\.(0|[1-9]\d*)(\.(?:up|down)_proj)\.weight")
_STACKED = re.compile(r"(.*\.experts)(\.(?:up|down)_proj)")

# Parameters that stay in fp32 in a 16-bit model: they set the scan's decay and the choice of experts.
FP32_PARAMETERS = ("A_log", "D", "dt_bias", "gate.weight", "gate.e_score_correction_bias")


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a model of type `dtype` holds the parameter `name`: at least fp32 for `FP32_PARAMETERS`."""
    keep = name.endswith(tuple(f".mixer.{suffix}" for suffix in FP32_PARAMETERS))
    return torch.promote_types(dtype, torch.float32) if keep else dtype


def unwrapped(module: nn.Module) -> Any:
    """What torch.compile wrapped; any other module as it is."""
    return getattr(module, "_orig_mod", module)


def named_parameters(model: nn.Module, *, once: bool = False) -> dict[str, nn.Parameter]:
    """Every parameter by the name that it has without torch.compile around the model or a part of it; a parameter in
    two places has both names, or the first where it is to come once."""
    named = model.named_parameters(remove_duplicate=once)
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): p for name, p in named}


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the parameter of such a name, and what it calls it."""
    *path, leaf = name.split(".")
    module = unwrapped(model)
    for part in path:
        module = unwrapped(getattr(module, part))
    return module, leaf


def parameter_shapes(config: TwoTowerConfig, *, denoiser: bool) -> dict[str, tuple[int, ...]]:
    """The parameters of a model: of the context tower and its head, and with `denoiser` all others."""
    with torch.device("meta"):
        model = TwoTowerModel(config, towers="both" if denoiser else "context")
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def published_keys(name: str, shape: Sequence[int]) -> Iterable[tuple[str, int | None]]:
    """The published keys of a parameter, with the expert that each is of (None: not of routed experts)."""
    stacked = _STACKED.fullmatch(name)
    if not stacked:
        return [(name, None)]
    return [(f"{stacked[1]}.{j}{stacked[2]}.weight", j) for j in range(shape[0])]


def layout(folder: str | Path) -> str:
    """What a folder of weights holds, from its keys alone.

    Returns:
        "two_tower" (both towers), "context" (the context tower of one, without a denoiser) or "plain" (a Nemotron-H).
    Raises:
        FileNotFoundError: no folder, no weights in it, or a file of its index missing.
        ValueError: an unreadable index or file, or keys of some other model.
    """
    return layout_of(Folder(folder))


def layout_of(folder: Folder) -> str:
    keys = folder.tensors
    if any(key.startswith(("context_tower.", "denoiser_tower.")) for key in keys):
        return "two_tower" if any(key.startswith(DENOISER) for key in keys) else "context"
    if any(key.startswith(_PLAIN) for key in keys):
        return "plain"
    raise ValueError(f"{folder.path}: not a TwoTower or Nemotron-H model: it holds {some(sorted(keys)) or 'nothing'}")


def _published(key: str) -> str | None:
    """The two-tower key of a plain Nemotron-H's; None for its multi-token prediction layers, which go unused."""
    if key.startswith("mtp."):
        return None
    for prefix in _PLAIN:
        if key.startswith(prefix):
            return "context_tower." + key.removeprefix(prefix)
    return f"context_{key}" if key.startswith("lm_head.") else key


def match(
    folder: Folder, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[str, ...], plain: bool
) -> dict[str, dict[int | None, Stored]]:
    """For every parameter of `shapes` where it comes from: {None: whole} or {expert: its part}.

    Keys that begin with none of `wanted` are left alone where they belong to the other tower. ValueError lists
    everything that is missing, unexpected or mis-shaped.
    """
    found: dict[str, dict[int | None, Stored]] = {name: {} for name in shapes}
    unexpected, misshaped = list(folder.astray), []
    others = () if plain else tuple(p for p in (*CONTEXT, *DENOISER) if p not in wanted)
    for key, stored in folder.tensors.items():
        name = _published(key) if plain else key
        if name is None or name.startswith(others):
            continue
        index: int | None = None
        if name not in shapes and (part := _EXPERT.fullmatch(name)):
            name, index = part[1] + part[3], int(part[2])
        shape = shapes.get(name)
        if shape is None or (index is not None and index >= shape[0]) or index in found[name]:
            unexpected.append(key)
            continue
        found[name][index] = stored
        if stored.shape != (expected := shape if index is None else shape[1:]):
            misshaped.append(f"{key} is {list(stored.shape)}, not {list(expected)}")
    missing = []
    for name, sources in found.items():
        stacked = _STACKED.fullmatch(name)
        if None in sources and len(sources) > 1:
            unexpected += [s.key for i, s in sources.items() if i is not None]
        elif not sources and not stacked:
            missing.append(name)
        elif stacked and None not in sources:
            missing += [f"{stacked[1]}.{j}{stacked[2]}.weight" for j in range(shapes[name][0]) if j not in sources]
    if missing or unexpected or misshaped:
        kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
        parts = [f"{len(keys)} {kind} ({some(keys)})" for kind, keys in kinds.items() if keys]
        raise ValueError(f"{folder.path}: the weights do not fit the model: {'; '.join(parts)}")
    return found
