"""A denoiser from a context tower: in a model, or from folder to folder."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..arguments import dtype_of, is_integer, wrapped
from ..config import TwoTowerConfig
from .folder import DTYPES, Folder
from .keys import (
    CONTEXT,
    layout_of,
    match,
    named_parameters,
    parameter_dtype,
    parameter_shapes,
    published_keys,
    unwrapped,
)
from .read import place
from .write import TOKENIZER_FILES, Entry, atomic_folder, check_shard_bytes, companions, write


def _time_modules(config: TwoTowerConfig, seed: int) -> dict[str, Tensor]:
    """Initial time modules in fp32 on the CPU: at first the denoiser computes what the context tower's layers do.

    Tables are (0, 0, 1) for shift, scale, gate and the last linear of `t_block` is zero, so what
    `t_embedder` says does not matter yet; it starts normal with deviation 0.02, biases 0, so that it can learn.
    """
    H, size = config.hidden_size, config.time_embedding_size
    if not is_integer(seed):
        raise ValueError(f"seed is {seed!r}, expected an integer")
    generator = torch.Generator().manual_seed(wrapped(seed))
    values = {
        "t_embedder.mlp.0.weight": torch.randn(H, size, generator=generator).mul_(0.02),
        "t_embedder.mlp.0.bias": torch.zeros(H),
        "t_embedder.mlp.2.weight": torch.randn(H, H, generator=generator).mul_(0.02),
        "t_embedder.mlp.2.bias": torch.zeros(H),
        "t_block.1.weight": torch.zeros(3 * H, H),
        "t_block.1.bias": torch.zeros(3 * H),
    }
    table = torch.tensor([0.0, 0.0, 1.0]).unsqueeze(1).expand(3, H)
    return {**values, **{f"scale_shift_tables.{i}": table.clone() for i in range(config.num_hidden_layers)}}


def start_denoiser(model: nn.Module, *, seed: int = 0) -> None:
    """Make a model's denoiser a copy of its context tower, ready to train.

    Copies tower and head; sets the tables to (0, 0, 1) for shift, scale and gate and the last linear of `t_block` to
    zero, so that every time step starts at the context tower; `t_embedder` starts small and random from `seed`.
    Denoiser parameters that are on meta, or of another device or type than the context tower's, are made anew.

    ValueError when the model has no denoiser, or its context tower has no weights yet.
    """
    inner = unwrapped(model)
    if getattr(inner, "denoiser_tower", None) is None:
        raise ValueError('start_denoiser: the model has no denoiser (it was made with towers="context")')
    head: Tensor = unwrapped(inner.context_lm_head).weight
    values = _time_modules(inner.config, seed)
    for name, parameter in named_parameters(model).items():
        if name.startswith(CONTEXT):
            if parameter.is_meta:
                raise ValueError(f"start_denoiser: {name} has no values yet: load the context tower first")
            copy = name.replace("context_tower.", "denoiser_tower.").replace("context_lm_head.", "lm_head.")
            values[copy] = parameter.detach()
    with torch.no_grad():
        for name, value in values.items():
            copied = name.startswith(("denoiser_tower.", "lm_head."))
            place(model, name, head.device, value.dtype if copied else head.dtype).copy_(value)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    seed: int = 0,
    max_shard_bytes: float = 5e9,
    progress: bool = True,
) -> TwoTowerConfig:
    """Make a folder with a Nemotron-3-Nano into one with a two-tower model that is ready to train.

    The context tower is the source; the denoiser starts as `start_denoiser` says, bit for bit. All that the source's
    folder holds besides weights is copied along: tokenizer, chat template, generation_config.json, licence.

    Args:
        source: a plain Nemotron-H, or a two-tower checkpoint without a denoiser; with its config.json.
        target: another folder, written as `save` does.
        dtype: what weights are stored as; None: as in the source, and the time modules in the config's type.
        block_size, mask_token_id: what the denoiser will be trained with, for the config; None: as in the source's
            config, or else 16 and 3.
        seed, max_shard_bytes, progress: as in `start_denoiser` and `save`.
    Returns:
        the configuration that was written.
    Raises:
        FileNotFoundError, ValueError: as `load` and `TwoTowerConfig.from_file`; the source has a denoiser already.
    Cost: reads the source twice and writes twice its size; memory for one shard's pages and its largest tensor.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise ValueError(f"convert: {source} cannot be converted onto itself")
    if dtype is not None:
        dtype_of(dtype)
    check_shard_bytes(max_shard_bytes)
    files = Folder(source)
    config = TwoTowerConfig.from_file(source)
    config = dataclasses.replace(
        config,
        block_size=config.block_size if block_size is None else block_size,
        mask_token_id=config.mask_token_id if mask_token_id is None else mask_token_id,
    )
    kind = layout_of(files)
    if kind == "two_tower":
        raise ValueError(f"{source}: it has a denoiser already: there is nothing to convert")
    extras = companions(source, target)
    shapes = parameter_shapes(config, denoiser=False)
    found = match(files, shapes, CONTEXT, kind == "plain")

    context = []
    for name, parts in found.items():
        for key, index in published_keys(name, shapes[name]):
            whole = parts.get(None)
            stored = whole or parts[index]
            to = DTYPES[stored.dtype] if dtype is None else parameter_dtype(name, dtype)
            part = index if whole else None  # a slice of a stacked tensor, or a tensor of its own
            shape = shapes[name] if index is None else shapes[name][1:]
            context.append(Entry(key, shape, to, partial(files.read, stored, part)))
    entries = list(context)
    for entry in context:
        key = entry.key.replace("context_tower.", "denoiser_tower.").replace("context_lm_head.", "lm_head.")
        entries.append(dataclasses.replace(entry, key=key))
    for key, value in _time_modules(config, seed).items():
        entries.append(Entry(key, tuple(value.shape), dtype or config.dtype, value.detach))
    with atomic_folder(target, anew=TOKENIZER_FILES if "tokenizer.json" in extras else ()) as temporary:
        write(temporary, config, entries, max_shard_bytes, extras, progress)
    files.close()
    return config
