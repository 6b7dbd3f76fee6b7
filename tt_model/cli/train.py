"""`twotower train ar` and `twotower train denoiser`: a run in a folder, which the same command goes on with."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import shutil
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..stops import Stopped
from . import export
from .common import Parser, add_command, add_dtype, add_machine, dtype_of, machine_of, number, option
from .facts import ACCEPTED, code_digest, same_run, steps_logged, weights_digest

if TYPE_CHECKING:
    import torch

    from ..config import TwoTowerConfig
    from ..training.data import Rows
    from ..training.schedule import TrainSettings
    from ..two_tower import TwoTower
    from ..vocabulary import Vocabulary

# Fields of TrainSettings, which is not imported for --help: a test compares the defaults.
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
    "average": (float, "DECAY", 0.0, "store a running average of the weights, 0.999 or so; 0: the last ones"),
}
DENOISER_SETTINGS = {
    "draws": (int, "N", 1, "draws of noise over one pass of the context tower"),
    "split_blocks": (int, "N", 1, "steps in turn learn blocks split into 1, 2, 4 ... N: more of them are near"),
    "full_blocks": (float, "SHARE", 0.0, "of blocks, masked as a whole, as generation begins"),
    "near": (float, "TOKENS", 0.0, "masked ones of a block by which the share of those that count halves"),
    "tail_blocks": (float, "SHARE", 0.0, "of blocks, masked from one of their tokens on"),
    "own_blocks": (float, "SHARE", 0.0, "of blocks, partly filled with the denoiser's own predictions"),
    "distil": (float, "WEIGHT", 0.0, "of the context tower's distributions beside the tokens"),
}
# Of training.schedule.
CONTEXT_TOWERS = ("frozen", "trained", "tied")
OPTIMIZERS = ("adamw", "muon")

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
Train a denoiser on masked tokens. The context tower stays as it is, but for --context-tower. A model without a denoiser
gets one that starts as a copy of its context tower; a model with one goes on with it. --denoiser takes that of another
model of the same sizes, as when the context tower was trained further."""
_DENOISER_EPILOG = """\
examples:
  twotower train denoiser --model run/ar/model --data stdlib --out run/denoiser
  twotower train denoiser --model run/ar/model --data stdlib --out run/s32 --block-size 32 --steps 4000
  twotower train denoiser --model run/s32/model --data stdlib --out run/s16 --block-size 16 --steps 1000
  twotower train denoiser --model run/more/model --denoiser run/denoiser/model --data stdlib --out run/again
  twotower train denoiser --model two-towers --data my_texts --out run/big --device cuda

The same command goes on with a run that was stopped; --accept and twotower train export are as for ar. The published
recipe trains with blocks of 32 first, then 16."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    p = commands.add_parser(
        "train", help="train a context tower or a denoiser", description=_DESCRIPTION, epilog=_EPILOG
    )
    stages = p.add_subparsers(title="stages", metavar="STAGE", dest="stage", required=True)
    ar = add_command(stages, "ar", run, "a context tower, on next tokens", _AR, _AR_EPILOG)
    start = ar.add_mutually_exclusive_group(required=True)
    option(start, "--config", str, "FILE", "config.json of a tower to begin with random weights")
    option(start, "--model", str, "DIR", "folder of a model whose context tower to go on with")
    denoiser = add_command(stages, "denoiser", run, "a denoiser, on masked tokens", _DENOISER, _DENOISER_EPILOG)
    option(denoiser, "--model", str, "DIR", "folder of a context tower or of two towers", required=True)
    option(denoiser, "--denoiser", str, "DIR", "folder of two towers whose denoiser to begin with (default: --model's)")
    option(denoiser, "--block-size", int, "N", "tokens of a block (default: as in config.json)")
    option(denoiser, "--mask-token-id", int, "ID", "default: as in config.json")
    for parser in (ar, denoiser):
        _add_common(parser)
    _add_settings(denoiser, DENOISER_SETTINGS)
    learns = "trained: it learns, too; tied: it and the denoiser are one (default: frozen)"
    denoiser.add_argument("--context-tower", choices=CONTEXT_TOWERS, default="frozen", help=learns)
    denoiser.add_argument("--no-time", action="store_true", help="without time conditioning: t says nothing")
    export.add(stages)
    vocabulary = "of model and tokenizer, which is trained on the data (default: config)"
    option(ar, "--vocab-size", int, "N", vocabulary)


def _add_settings(p: Parser, settings: dict[str, tuple]) -> None:
    for name, (kind, metavar, default, text) in settings.items():
        option(p, "--" + name.replace("_", "-"), kind, metavar, text, default=default)


def _add_common(p: Parser) -> None:
    option(p, "--data", str, "SOURCE", 'a folder of *.py, *.txt and *.jsonl, a file, or "stdlib"', required=True)
    option(p, "--out", str, "OUT", "folder of the run", required=True)
    option(p, "--tokenizer", str, "DIR", "folder of tokenizer.json (default: the model's)")
    option(p, "--held-out", float, "SHARE", "of the files, to measure on", default=0.05)
    option(p, "--row-length", number(int, 1), "N", "tokens of a row", default=512)
    p.add_argument("--whole-documents", action="store_true", help="cut none at a row's end that fits into a row")
    _add_settings(p, SETTINGS)
    first = "a document's first line is read, and not learned to be written"
    p.add_argument("--skip-first-lines", action="store_true", help=first)
    which = "muon: of the matrices inside the towers, with the same rates; AdamW of all others (default: adamw)"
    p.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help=which)
    option(p, "--betas", float, "B", "AdamW's betas (default: 0.9 0.95)", nargs=2, default=(0.9, 0.95))
    option(p, "--save-every", number(int, 1), "N", "steps between saves", default=200)
    option(p, "--stop-after", number(int, 0), "N", "stop after so many steps of this call, as if interrupted")
    accept = f"go on although it is not what the run began with: {', '.join(ACCEPTED)}"
    p.add_argument("--accept", nargs="+", default=[], choices=ACCEPTED, metavar="WHAT", help=accept)
    add_dtype(p, "--save-dtype", "what OUT/model stores (default: as computed)")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    add_machine(p, "what to compute in (default: float32)")


def run(o: argparse.Namespace) -> None:
    """Begin or go on with a run; at its end write OUT/model."""
    from ..files import hold

    settings = settings_of(o)
    if o.dtype == "float16":
        raise ValueError("--dtype is float16, in which small gradients are 0: expected bfloat16 or float32 to train in")
    out = Path(o.out)
    out.mkdir(parents=True, exist_ok=True)
    with hold(out):
        _run(o, settings, out)


def settings_of(o: argparse.Namespace) -> TrainSettings:
    """What the command line says of the training itself."""
    from ..training.schedule import TrainSettings

    names = [*SETTINGS, "skip_first_lines", "optimizer"]
    if o.stage == "denoiser":
        names += [*DENOISER_SETTINGS, "context_tower", "no_time"]
    return TrainSettings(o.stage, betas=tuple(o.betas), **{name: getattr(o, name) for name in names})


def _run(o: argparse.Namespace, settings: TrainSettings, out: Path) -> None:
    import torch

    from ..checkpoint import save
    from ..config import TwoTowerConfig
    from ..training.loop import train
    from ..training.state import STATE
    from ..vocabulary import Vocabulary

    (device,), dtype = machine_of(o, alone="training")
    dtype = dtype or torch.float32
    config = _config(o, TwoTowerConfig.from_file(getattr(o, "config", None) or o.model))
    resumed = (out / STATE).is_file()
    tokenizer = _tokenizer(o, out, config, resumed=resumed)
    facts = {
        "stage": o.stage,
        "model": str(Path(o.model).resolve()) if o.model else None,
        "weights": weights_digest(o.model) if o.model else None,
        "denoiser": weights_digest(o.denoiser) if getattr(o, "denoiser", None) else None,
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
        saved = f"{steps_logged(out)} of {settings.steps} steps are saved in {out}"
        message = f"interrupted: {saved}; the same command goes on from there"
        raise Stopped(getattr(stop, "number", signal.SIGINT), message) from None
    _report(out, history, settings)


def _config(o: argparse.Namespace, config: TwoTowerConfig) -> TwoTowerConfig:
    """The config with what the command line changes in it."""
    given = {name: value for name, value in vars(o).items() if value is not None}
    chosen = {name: given[name] for name in ("vocab_size", "block_size", "mask_token_id") if name in given}
    if "vocab_size" in chosen and o.model:
        raise ValueError("--vocab-size: a model that is there has its vocabulary; it goes with --config")
    if "vocab_size" in chosen and o.tokenizer:
        raise ValueError("--vocab-size and --tokenizer: a tokenizer that is there has its size; expected one of them")
    return dataclasses.replace(config, **chosen)


def _tokenizer(o: argparse.Namespace, out: Path, config: TwoTowerConfig, *, resumed: bool) -> str:
    """Put the tokenizer of a new run into its folder: from --tokenizer or the model's folder, or trained on the data.

    A resumed run keeps its own; ValueError when another one is asked for. Its hash.
    """
    from ..checkpoint import TOKENIZER_FILES
    from ..files import write_atomically, write_text
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
        write_text(target, tokenizer.to_str(pretty=True))
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _rows(
    o: argparse.Namespace, vocabulary: Vocabulary, config: TwoTowerConfig, settings: TrainSettings
) -> tuple[Rows, Rows | None]:
    """Training rows, and held-out rows if there are enough for one."""
    from ..training.data import load_rows

    if o.row_length % config.block_size:
        raise ValueError(f"--row-length is {o.row_length}, expected a multiple of the block size {config.block_size}")
    if not config.eos_token_ids:
        raise ValueError("config: eos_token_id is null: documents need a token that ends them")
    eos = config.eos_token_ids[0]
    # As prompts begin; where they begin with nothing, the end of the document before is what comes first.
    bos = vocabulary.first[0] if vocabulary.first else eos
    tokens = {"bos": bos, "eos": eos, "row_length": o.row_length, "block_size": config.block_size}
    tokens |= {"whole": o.whole_documents}
    rows = partial(load_rows, o.data, vocabulary.tokenizer, **tokens, held_out=o.held_out, seed=settings.seed)
    train_rows = rows(split="train")
    if o.held_out == 0:
        return train_rows, None
    try:
        return train_rows, rows(split="held_out")
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
    if other := getattr(o, "denoiser", None):
        if layout(other) != "two_tower":
            raise ValueError(f"--denoiser is {other}, which has a context tower alone: expected two towers")
        load(model, other, device=device, dtype=dtype, progress=progress)
    there = "both" if towers == "both" and not other and layout(o.model) == "two_tower" else "context"
    load(model, o.model, device=device, dtype=dtype, towers=there, progress=progress)
    if there != towers and not other:
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
