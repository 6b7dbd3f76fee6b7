"""`twotower train ar` and `twotower train denoiser`: a run in a folder, which the same command goes on with."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import random
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..stops import Stopped
from . import export
from .common import Parser, add_dtype, add_machine, device_of, dtype_of, use_threads
from .facts import ACCEPTED, code_digest, same_run, weights_digest

if TYPE_CHECKING:
    import torch

    from ..config import TwoTowerConfig
    from ..training.data import Rows
    from ..training.schedule import TrainSettings
    from ..two_tower import TwoTower
    from .vocabulary import Vocabulary

# Fields of TrainSettings: type and help. Their defaults, which a test compares, are in the help only.
SETTINGS = {
    "steps": (int, "N", 1000, "optimizer steps"),
    "batch_size": (int, "N", 8, "rows a step"),
    "learning_rate": (float, "RATE", 1e-4, "largest learning rate"),
    "final_learning_rate": (float, "RATE", 1e-6, "learning rate at the end"),
    "warmup": (int, "N", 100, "steps up to the largest learning rate"),
    "decay": (float, "SHARE", 0.2, "share of the steps, at the end, that fall to the final learning rate"),
    "weight_decay": (float, "RATE", 0.1, "AdamW's weight decay, of matrices"),
    "clip": (float, "NORM", 1.0, "largest norm of the gradient"),
    "seed": (int, "N", 0, "of initial weights, order of the data and noise"),
}

_DESCRIPTION = "Train a context tower on next tokens (ar), then a denoiser on masked tokens (denoiser)."
_EPILOG = """\
examples:
  twotower train ar --config config.json --data stdlib --out run/ar
  twotower train denoiser --model run/ar/model --data stdlib --out run/denoiser
  twotower generate --model run/denoiser/model "def main():"
  twotower train export --out run/denoiser --to snapshot

Every stage has its own --help."""

_AR = "Train a context tower on next tokens, from random weights (--config) or on from a model's (--model)."
_AR_EPILOG = """\
examples:
  twotower train ar --config config.json --data stdlib --out run/ar
  twotower train ar --config config.json --vocab-size 4096 --data my_texts --out run/ar --learning-rate 1e-3
  twotower train ar --model nemotron-3-nano --data my_texts --out run/more --row-length 4096 --batch-size 1
  twotower train ar --config config.json --tokenizer run/ar --data other_texts --out run/other
  twotower train ar --config config.json --data stdlib --out run/ar --steps 4000 --accept settings

The same command goes on with a run that was stopped (Ctrl-C, SIGTERM, SIGHUP, a crash, --stop-after), from its last
save. OUT gets training.pt, log.jsonl and loss.png at every save, and at the end OUT/model: config.json, weights and
tokenizer.json; twotower train export writes the model at any time.

A run goes on only as it began: the same settings, data, base weights and code. --accept allows what it names to be
another, notes the change in log.jsonl and run.json, and goes on from the saved state. With other settings (more
--steps, another --learning-rate ...) the rate warms up from where it was."""

_DENOISER = """\
Train a denoiser on masked tokens. The context tower stays as it is. A model without a denoiser gets one that starts as
a copy of its context tower; a model with one goes on with it."""
_DENOISER_EPILOG = """\
examples:
  twotower train denoiser --model run/ar/model --data stdlib --out run/denoiser
  twotower train denoiser --model run/ar/model --data stdlib --out run/s32 --block-size 32 --steps 4000
  twotower train denoiser --model run/s32/model --data stdlib --out run/s16 --block-size 16 --steps 1000
  twotower train denoiser --model two-towers --data my_texts --out run/big --device cuda

The same command goes on with a run that was stopped; --accept and twotower train export are as for ar. The published
recipe trains with blocks of 32 first, then 16."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    p = commands.add_parser(
        "train",
        prog="twotower train",
        help="train a context tower or a denoiser",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    stages = p.add_subparsers(title="stages", metavar="STAGE", dest="stage", required=True)
    ar = stages.add_parser(
        "ar", prog="twotower train ar", help="a context tower, on next tokens", description=_AR, epilog=_AR_EPILOG
    )
    start = ar.add_mutually_exclusive_group(required=True)
    start.add_argument("--config", metavar="FILE", help="config.json of a tower to begin with random weights")
    start.add_argument("--model", metavar="DIR", help="folder of a model whose context tower to go on with")
    denoiser = stages.add_parser(
        "denoiser",
        prog="twotower train denoiser",
        help="a denoiser, on masked tokens",
        description=_DENOISER,
        epilog=_DENOISER_EPILOG,
    )
    denoiser.add_argument("--model", metavar="DIR", required=True, help="folder of a context tower or of two towers")
    denoiser.add_argument("--block-size", type=int, metavar="N", help="tokens of a block (default: as in config.json)")
    denoiser.add_argument("--mask-token-id", type=int, metavar="ID", help="default: as in config.json")
    for parser in (ar, denoiser):
        _add_common(parser)
    export.add(stages)
    ar.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="of model and tokenizer, which is trained on the data (default: config)",
    )


def _add_common(p: Parser) -> None:
    p.set_defaults(run=run, parser=p)
    p.add_argument(
        "--data", metavar="SOURCE", required=True, help='a folder of *.py, *.txt and *.jsonl, a file, or "stdlib"'
    )
    p.add_argument("--out", metavar="OUT", required=True, help="folder of the run")
    p.add_argument("--tokenizer", metavar="DIR", help="folder of tokenizer.json (default: the model's)")
    p.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="of the files, to measure on (default: %(default)s)",
    )
    p.add_argument("--row-length", type=int, default=512, metavar="N", help="tokens of a row (default: %(default)s)")
    for name, (kind, metavar, default, text) in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        p.add_argument(flag, type=kind, metavar=metavar, help=f"{text} (default: {default})")
    p.add_argument("--betas", type=float, nargs=2, metavar="B", help="AdamW's betas (default: 0.9 0.95)")
    p.add_argument(
        "--save-every", type=int, default=200, metavar="N", help="steps between saves (default: %(default)s)"
    )
    p.add_argument(
        "--stop-after", type=int, metavar="N", help="stop after so many steps of this call, as if interrupted"
    )
    p.add_argument(
        "--accept",
        nargs="+",
        default=[],
        choices=ACCEPTED,
        metavar="WHAT",
        help=f"go on although it is not what the run began with: {', '.join(ACCEPTED)}",
    )
    add_dtype(p, "--save-dtype", "what OUT/model stores (default: as computed)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine(p, "what to compute in (default: float32)")


def run(o: argparse.Namespace) -> None:
    """Begin or go on with a run; at its end write OUT/model."""
    from ..files import hold
    from ..training.schedule import TrainSettings

    given = {name: getattr(o, name) for name in (*SETTINGS, "betas") if getattr(o, name) is not None}
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    settings = TrainSettings(o.stage, **given)
    for name, least in (("row_length", 1), ("save_every", 1), ("stop_after", 0)):
        value = getattr(o, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected at least {least}")
    if o.dtype == "float16":
        raise ValueError("--dtype is float16, in which small gradients are 0: expected bfloat16 or float32 to train in")
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        _run(o, settings, out)


def _run(o: argparse.Namespace, settings: TrainSettings, out: Path) -> None:
    import torch

    from ..checkpoint import save
    from ..config import TwoTowerConfig
    from ..training.loop import train
    from ..training.state import STATE
    from .vocabulary import Vocabulary

    use_threads(o.threads)
    device, dtype = device_of(o.device), dtype_of(o.dtype) or torch.float32
    config = _config(o, TwoTowerConfig.from_file(getattr(o, "config", None) or o.model))
    resumed = (out / STATE).is_file()
    tokenizer = _tokenizer(o, out, config, resumed=resumed)
    facts = {
        "stage": o.stage,
        "model": str(Path(o.model).resolve()) if o.model else None,
        "weights": weights_digest(o.model) if o.model else None,
        "config": config.to_dict(),
        "data": o.data if o.data == "stdlib" else str(Path(o.data).resolve()),
        "held_out": o.held_out,
        "row_length": o.row_length,
        "tokenizer": tokenizer,
        "dtype": str(dtype).removeprefix("torch."),
        "code": code_digest(),
    }
    same_run(out, facts, resumed=resumed, accept=o.accept, store=False)
    vocabulary = Vocabulary(out, config)
    rows, held_out = _rows(o, vocabulary, config, settings)
    facts |= {"tokens": rows.digest(), "held_out_tokens": held_out.digest() if held_out else None}
    changed = same_run(out, facts, resumed=resumed, accept=o.accept)
    for name, (was, now) in changed.items():
        warnings.warn(f"{out}: {name} was {was}, now {now}", stacklevel=2)
    model = _model(o, config, settings, device, dtype)
    try:
        history = train(
            model,
            rows,
            settings,
            out,
            held_out=held_out,
            save_every=o.save_every,
            stop_after=o.stop_after,
            extend="settings" in o.accept,
            note=changed,
            progress=not o.quiet,
        )
        if not history:
            raise ValueError("--stop-after is 0 and no step has been made: there is nothing to save")
        save(model, out / "model", dtype=dtype_of(o.save_dtype), tokenizer=out, progress=not o.quiet)
    except KeyboardInterrupt as stop:
        log = out / "log.jsonl"
        done = len(log.read_text(encoding="utf-8").splitlines()) if log.is_file() else 0
        raise Stopped(
            getattr(stop, "number", signal.SIGINT),
            f"interrupted: {done} of {settings.steps} steps are saved in {out}; the same command goes on from there",
        ) from None
    _report(out, history, settings)


def _config(o: argparse.Namespace, config: TwoTowerConfig) -> TwoTowerConfig:
    """The config with what the command line changes in it."""
    names = ("vocab_size", "block_size", "mask_token_id")
    chosen = {name: getattr(o, name, None) for name in names}
    if chosen["vocab_size"] is not None and o.model:
        raise ValueError("--vocab-size: a model that is there has its vocabulary; it goes with --config")
    if chosen["vocab_size"] is not None and o.tokenizer:
        raise ValueError("--vocab-size and --tokenizer: a tokenizer that is there has its size; expected one of them")
    return dataclasses.replace(config, **{name: value for name, value in chosen.items() if value is not None})


def _tokenizer(o: argparse.Namespace, out: Path, config: TwoTowerConfig, *, resumed: bool) -> str:
    """Put the tokenizer of a new run into its folder: from --tokenizer or the model's folder, or trained on the data.

    A resumed run keeps its own; ValueError when another one is asked for. Its hash.
    """
    from ..checkpoint import TOKENIZER_FILES
    from ..files import write_atomically
    from ..training.data import load_texts, train_tokenizer

    target = out / "tokenizer.json"
    folder = Path(o.tokenizer) if o.tokenizer else Path(o.model) if o.model else None
    if folder is not None and not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: no tokenizer.json; --tokenizer names the folder of one")
    if resumed and target.is_file():
        if folder is not None and target.read_bytes() != (folder / "tokenizer.json").read_bytes():
            raise ValueError(f"{out}: this run began with another tokenizer than that in {folder}; use a new folder")
    elif folder is not None:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                write_atomically(out / name, partial(shutil.copyfile, folder / name))
    else:
        tokenizer = train_tokenizer(load_texts(o.data, "train", o.held_out), config.vocab_size)
        write_atomically(target, lambda path: path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8"))
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _rows(
    o: argparse.Namespace, vocabulary: Vocabulary, config: TwoTowerConfig, settings: TrainSettings
) -> tuple[Rows, Rows | None]:
    """Training rows, and held-out rows if there are enough for one."""
    from ..training.data import Rows, encode_documents, load_texts

    if o.row_length % config.block_size:
        raise ValueError(f"--row-length is {o.row_length}, expected a multiple of the block size {config.block_size}")
    if not config.eos_token_ids:
        raise ValueError("config: eos_token_id is null: documents need a token that ends them")
    eos = config.eos_token_ids[0]
    # As prompts begin; where they begin with nothing, the end of the document before is what comes first.
    bos = vocabulary.first[0] if vocabulary.first else eos

    def rows(split: str) -> Rows:
        texts = load_texts(o.data, split, o.held_out)
        random.Random(settings.seed).shuffle(texts)
        documents = encode_documents(texts, vocabulary.tokenizer, bos=bos, eos=eos, block_size=config.block_size)
        return Rows(*documents, o.row_length)

    train_rows = rows("train")
    if o.held_out == 0:
        return train_rows, None
    try:
        return train_rows, rows("held_out")
    except ValueError as error:
        warnings.warn(f"no held-out loss: {error}", stacklevel=2)
        return train_rows, None


def _model(
    o: argparse.Namespace, config: TwoTowerConfig, settings: TrainSettings, device: torch.device, dtype: torch.dtype
) -> TwoTower:
    """The model to train: new, loaded, or loaded with a new denoiser."""
    import torch

    from ..checkpoint import layout, load, parameter_dtype, start_denoiser
    from ..training.loop import init_weights
    from ..two_tower import TwoTower

    config = dataclasses.replace(config, dtype=dtype)
    progress = not o.quiet
    if o.stage == "ar" and not o.model:
        model = TwoTower(config, towers="context")
        init_weights(model, settings.seed)
        for name, p in model.named_parameters():
            p.data = p.data.to(device, parameter_dtype(name, dtype))
        return model
    towers = "context" if o.stage == "ar" else "both"
    with torch.device("meta"):
        model = TwoTower(config, towers=towers)
    there = "both" if towers == "both" and layout(o.model) == "two_tower" else "context"
    load(model, o.model, device=device, dtype=dtype, towers=there, progress=progress)
    if there != towers:
        start_denoiser(model, seed=settings.seed)
    return model


def _report(out: Path, history: list[dict], settings: TrainSettings) -> None:
    """What there is now, and how to go on."""
    held = next((h["held_out"] for h in reversed(history) if "held_out" in h), None)
    loss = f"loss {history[-1]['loss']:.4f}" + (f", held out {held:.4f}" if held is not None else "")
    print(f"{out / 'model'}: after step {len(history)} of {settings.steps}, {loss} nats per token")
    print(f"loss plot: {out / 'loss.png'}")
    if len(history) < settings.steps:
        print(f"next: the same command goes on with step {len(history) + 1}")
    elif settings.stage == "ar":
        print(f"next: twotower train denoiser --model {out / 'model'} --data SOURCE --out RUN")
    else:
        print(f'next: twotower generate --model {out / "model"} "..."')
