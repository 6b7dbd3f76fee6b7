"""`twotower convert`: a Nemotron-3-Nano into two towers that are ready to train."""

from __future__ import annotations

import argparse

from .common import Parser, add_command, add_dtype, dtype_of, option

_DESCRIPTION = """\
Make a plain Nemotron-3-Nano (or the context tower of a two-tower model) into a model of two towers: the context tower
is the source, the denoiser starts as its copy, with time modules that change nothing yet. Weights are streamed, tensor
by tensor: memory for the largest of them is enough. All else in SOURCE is copied along: tokenizer, chat template,
generation_config.json, licence."""

_EPILOG = """\
examples:
  twotower convert NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16 two-towers
  twotower convert run/ar/model two-towers --block-size 32
  twotower convert nemotron two-towers --dtype bfloat16 --shard-size 2
  twotower train denoiser --model two-towers --data my_texts --out run/denoiser

The target appears complete or not at all: a model that is there already is replaced at the end. It takes twice the
source's space."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    text = "Nemotron-3-Nano -> two towers ready to train"
    p = add_command(commands, "convert", run, text, _DESCRIPTION, _EPILOG)
    p.add_argument("source", metavar="SOURCE", help="folder with config.json and safetensors")
    p.add_argument("target", metavar="TARGET", help="folder to write")
    add_dtype(p, "--dtype", "what to store (default: as in the source)")
    option(p, "--block-size", int, "N", "what the denoiser will be trained with (default: 16)")
    option(p, "--mask-token-id", int, "ID", "id that stands for a masked token (default: 3)")
    option(p, "--seed", int, "N", "of the time embedder", default=0)
    option(p, "--shard-size", float, "GB", "largest file of weights", default=5.0)
    p.add_argument("--quiet", action="store_true", help="no progress bar")


def run(o: argparse.Namespace) -> None:
    """Convert, and say how to go on."""
    from ..checkpoint import convert

    if not o.shard_size > 0:
        raise ValueError(f"--shard-size is {o.shard_size}, expected above 0")
    config = convert(
        o.source,
        o.target,
        dtype=dtype_of(o.dtype),
        block_size=o.block_size,
        mask_token_id=o.mask_token_id,
        seed=o.seed,
        max_shard_bytes=o.shard_size * 1e9,
        progress=not o.quiet,
    )
    print(f"{o.target}: two towers of {config.num_hidden_layers} layers, blocks of {config.block_size}")
    print(f"next: twotower train denoiser --model {o.target} --data FOLDER --out RUN")
