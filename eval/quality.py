"""`python -m eval.quality`: programs written from held-out specifications, executed: quality against speed.

Every specification (`tt_model/training/boilerplate`: `# class Invoice: number int, paid bool`) is continued greedily in
AR, by diffusion at each threshold (with --rules also by other strategies of docs/decoding.md), and in `speculative`,
through one engine, `--rows` at a time; the ways take turns, batch by batch, after an untimed batch of each. With
--resume FILE a run that was stopped goes on with the next batch; its times are then of several sittings. The
columns:

- exact: the share of completions that are the program itself, character for character, and ended by themselves.
- runs: the share that can be executed and do what the specification says (eval/exercise.py has a driver a template),
  each in a process with limits of time, memory and disk, in a temporary folder.
- kept: exact over AR's exact. as AR: the share that is the same text as AR's.
- tokens a denoiser pass: in AR a pass of the context tower. passes: of either tower, a program: diffusion and
  `speculative` have one of the context tower for each block or draft, too.
- tokens/s: new tokens over seconds, prompts included; times AR: over AR's.

Intervals are 95 %: Wilson's for shares, a bootstrap's for what else there is, over specifications or, for what has
seconds in it, over batches.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from bench.measure import in_a_line, no_commit, parser, positive, record, table, where
from tt_model import Engine, TwoTower, checkpoint
from tt_model.cli.facts import code_digest, weights_digest
from tt_model.engine.settings import CONFIDENCES
from tt_model.files import write_text
from tt_model.training.boilerplate import KINDS, SPLITS, parse, program, specification
from tt_model.training.boilerplate.grammar import TYPED
from tt_model.two_tower import ASSETS

from .execute import run_all
from .intervals import Estimate, quotient, ratio, wilson
from .plots import plot
from .resume import Parts

NUMBERS = {  # of a strategy, and what they are called
    "schedule": "confidence_threshold",
    "threshold": "confidence_threshold",
    "static": "steps_per_block",
    "factor": "factor",
    "entropy_bound": "entropy_bound",
}
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHOWN = {
    "exact": (1, True),
    "runs": (1, True),
    "kept": (1, True),
    "as_ar": (1, True),
    "tokens_per_forward": (2, False),
    "passes": (1, False),
    "tokens_per_s": (0, False),
    "times_ar": (2, False),
}  # digits, percent


class Arm(NamedTuple):
    """One way to generate."""

    name: str
    settings: dict[str, Any]


class Written(NamedTuple):
    """What became of one specification."""

    header: str
    text: str
    ended: bool
    tokens: int
    denoiser: int  # passes of the denoiser
    forwards: int  # of either tower

    @property
    def exact(self) -> bool:
        return self.ended and self.text == program(self.header)

    @property
    def per(self) -> int:
        """The passes that tokens a denoiser pass counts."""
        return self.denoiser or self.forwards


class Batch(NamedTuple):
    """Specifications that were written together."""

    written: list[Written]
    seconds: float


class Writer(Protocol):
    """What is asked of an engine."""

    def submit(self, prompt: str, **settings: Any) -> Any: ...

    def __iter__(self) -> Iterator[Any]: ...


def held_out(split: str, count: int, seed: int = 0) -> list[str]:
    """Different specifications of a split, of every kind in turn."""
    kinds = TYPED if split == "orders" else KINDS
    found: dict[str, None] = {}
    number = 0
    while len(found) < count:
        found[specification(random.Random(f"quality {split} {seed} {number}"), split, kinds[number % len(kinds)])] = (
            None
        )
        number += 1
    return list(found)


def rule(text: str) -> Arm:
    """Diffusion by a strategy, its number and, if named, its confidence: "static=4", "margin:threshold=0.9"."""
    before, _, number = text.rpartition("=")
    confidence, _, strategy = before.rpartition(":")
    confidence = confidence or "probability"
    try:
        if strategy not in NUMBERS or confidence not in CONFIDENCES:
            raise ValueError
        value = int(number) if strategy == "static" else float(number)
    except ValueError:
        known = f"of {', '.join(NUMBERS)} and {', '.join(CONFIDENCES)}"
        raise ValueError(f"--rules has {text!r}: expected [CONFIDENCE:]STRATEGY=NUMBER, {known}") from None
    settings = {"mode": "mask_diffusion", "confidence": confidence, "strategy": strategy, NUMBERS[strategy]: value}
    name = f"{confidence} {strategy}".removeprefix("probability ").replace("_", " ")
    return Arm(f"{name} {value:g}", settings)


def arms_of(
    thresholds: Sequence[float], *, rules: Sequence[str] = (), both: bool = True, **diffusion: Any
) -> list[Arm]:
    """AR first, to which the others are compared. both: whether there is a denoiser. rules: as `rule` reads them."""
    ar = Arm("AR", {"mode": "ar"})
    if not both:
        return [ar]
    default = {"mode": "mask_diffusion", "confidence": "probability", **diffusion}
    arms = [Arm(f"diffusion {t:g}", default | {"confidence_threshold": t}) for t in thresholds]
    arms += [Arm(name, {**settings, **diffusion}) for name, settings in map(rule, rules)]
    return [ar, *arms, Arm("speculative", {"mode": "speculative", **diffusion})]


def write(engine: Writer, headers: Sequence[str], settings: dict[str, Any], advance: Callable[[], Any]) -> Batch:
    """Continue all of them, each from its header and a line end."""
    began = time.perf_counter()
    requests = [engine.submit(f"{header}\n", seed=0, **settings) for header in headers]
    for event in engine:
        if event.kind in ("finished", "failed"):
            advance()
    results = [request.result() for request in requests]
    seconds = time.perf_counter() - began
    written = [
        Written(header, r.text, r.finish_reason == "eos", len(r.tokens), r.nfe, r.forwards)
        for header, r in zip(headers, results, strict=True)
    ]
    return Batch(written, seconds)


def write_all(
    engine: Writer,
    headers: Sequence[str],
    arms: Sequence[Arm],
    rows: int,
    new_tokens: int,
    advance: Callable[[], Any],
    parts: Parts | None = None,
) -> dict[str, list[Batch]]:
    """The batches of every arm, in turns; those that are among the parts are not written again."""
    parts = parts or Parts(None, {})
    name = lambda arm, begin: f"{arm.name}: {begin}"
    begins = range(0, len(headers), rows)
    for arm in arms:  # first calls cost more
        if any(name(arm, begin) not in parts for begin in begins):
            write(engine, headers[:rows], {**arm.settings, "max_new_tokens": min(16, new_tokens)}, lambda: None)
    found: dict[str, list[Batch]] = {arm.name: [] for arm in arms}
    for begin in begins:
        for arm in arms:
            make = partial(write, engine, headers[begin : begin + rows])
            settings = {**arm.settings, "max_new_tokens": new_tokens}
            written, seconds = parts.get(name(arm, begin), partial(make, settings, advance))
            found[arm.name].append(Batch([Written(*w) for w in written], seconds))
    return found


def verdicts(batches: Iterable[Batch], **more: Any) -> dict[tuple[str, str], str]:
    """What went wrong with each different program, or nothing."""
    return run_all(((w.header, w.text) for batch in batches for w in batch.written), **more)


def figures(batches: Sequence[Batch], ar: Sequence[Batch], wrong: dict[tuple[str, str], str]) -> dict[str, Estimate]:
    """The columns of one arm, beside AR's batches of the same specifications; without those that divide by nothing."""
    written, theirs = ([w for batch in some for w in batch.written] for some in (batches, ar))
    tokens, seconds = _tokens(batches), [batch.seconds for batch in batches]
    found = {
        "exact": wilson(sum(w.exact for w in written), len(written)),
        "runs": wilson(sum(not wrong[w.header, w.text] for w in written), len(written)),
        "kept": ratio([w.exact for w in written], [w.exact for w in theirs]),
        "as_ar": wilson(sum(w.text == a.text for w, a in zip(written, theirs, strict=True)), len(written)),
        "tokens_per_forward": ratio([w.tokens for w in written], [w.per for w in written]),
        "passes": ratio([w.forwards for w in written]),
        "tokens_per_s": ratio(tokens, seconds),
        "times_ar": quotient(tokens, seconds, _tokens(ar), [batch.seconds for batch in ar]),
    }
    return {name: estimate for name, estimate in found.items() if math.isfinite(estimate.value)}


def _tokens(batches: Sequence[Batch]) -> list[int]:
    return [sum(w.tokens for w in batch.written) for batch in batches]


def shares(
    found: dict[str, list[Batch]], group: Callable[[str], str], order: Sequence[str]
) -> dict[str, dict[str, tuple[int, int]]]:
    """Of each arm, exact ones and all, by a word for the header; the words in that order."""
    counts: dict[str, dict[str, tuple[int, int]]] = {}
    for name, batches in found.items():
        mine = counts.setdefault(name, {})
        for w in (w for batch in batches for w in batch.written):
            exact, total = mine.get(group(w.header), (0, 0))
            mine[group(w.header)] = exact + w.exact, total + 1
    return {name: {word: mine[word] for word in order if word in mine} for name, mine in counts.items()}


# ---- what is shown ----


def markdown(arms: dict[str, dict[str, Estimate]], *parts: dict[str, dict[str, tuple[int, int]]]) -> str:
    """The columns with their intervals; below it, the share of exact ones in every part."""
    header = ("", "exact", "runs", "kept", "as AR", "tokens a denoiser pass", "passes", "tokens/s", "times AR")
    cell = lambda arm, column: Estimate(*arm[column]).text(*SHOWN[column]) if column in arm else "-"
    rows = [(name, *(cell(arm, column) for column in SHOWN)) for name, arm in arms.items()]
    tables = [table(header, rows)]
    for part in parts:
        groups = list(next(iter(part.values())))
        if len(groups) > 1:
            lines = [(name, *(f"{c[g][0] / c[g][1]:.0%} of {c[g][1]}" for g in groups)) for name, c in part.items()]
            tables.append(table(("exact", *groups), lines))
    return "\n\n".join(tables)


# ---- the command ----


def measure(o: argparse.Namespace, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """All figures, as they are recorded; the texts under "texts", which is not. check: called after every program."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    folder = None if o.model is None else Path(o.model)
    both = folder is None or checkpoint.layout(folder) == "two_tower"
    model = TwoTower.from_pretrained(folder, towers="both" if both else "context", device=o.device)
    size = {} if o.block_size is None else {"block_size": o.block_size}
    arms = arms_of(o.thresholds, rules=o.rules, both=both, **size)
    sides = {header: split for split in o.split for header in held_out(split, o.specifications, o.seed)}
    headers = list(sides)
    random.Random(o.seed).shuffle(headers)  # so that batches are alike
    longest = max(len(model.tokenizer.encode(f"{header}\n")) for header in headers)
    pages = -(-(longest + o.new_tokens + max(o.block_size or model.config.block_size, 4)) // 64) + 1
    engine = Engine(model, max_rows=o.rows, max_tokens=64 * pages * o.rows, max_prefixes=0)
    ran_on = where(threads=torch.get_num_threads())
    facts = {
        "model": o.resume and weights_digest(folder or ASSETS),
        "code": o.resume and code_digest(),
        "machine": {k: v for k, v in ran_on.items() if k not in ("date", "load", "commit")},
        "specifications": headers,
        "arms": arms,
        "settings": [o.rows, o.new_tokens, str(model.dtype)],
    }
    parts = Parts(o.resume, facts)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("writing", total=len(headers) * len(arms))
        advance = lambda: (progress.advance(bar), check())
        found = write_all(engine, headers, arms, o.rows, o.new_tokens, advance, parts)
        pairs = {(w.header, w.text) for batches in found.values() for batch in batches for w in batch.written}
        bar = progress.add_task("executing", total=len(pairs))
        wrong = verdicts(
            (batch for batches in found.values() for batch in batches), advance=lambda: progress.advance(bar)
        )
    return {
        "kind": "quality",
        "machine": ran_on,
        "model": "bundled" if folder is None else folder.resolve().name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "split": list(o.split),
        "specifications": len(headers),
        "seed": o.seed,
        "rows": o.rows,
        "new_tokens": o.new_tokens,
        "block_size": o.block_size or model.config.block_size,
        "arms": {name: figures(batches, found["AR"], wrong) for name, batches in found.items()},
        "kinds": shares(found, lambda header: parse(header).kind, KINDS),
        "splits": shares(found, lambda header: sides[header], o.split),
        "texts": [
            {"arm": name, "header": w.header, "text": w.text, "exact": w.exact, "wrong": wrong[w.header, w.text]}
            for name, batches in found.items()
            for batch in batches
            for w in batch.written
        ],
    }


def about(found: dict[str, Any]) -> str:
    """What was measured, in a line."""
    return (
        f"{found['model']}, {found['dtype']}, {found['specifications']} specifications ({', '.join(found['split'])}), "
        f"seed {found['seed']}, {found['rows']} at a time, at most {found['new_tokens']} tokens, "
        f"block {found['block_size']}"
    )


def make_parser() -> argparse.ArgumentParser:
    p = parser("eval.quality", __doc__)
    p.add_argument("--model", help="a checkpoint folder with tokenizer.json (default: the bundled model)")
    p.add_argument("--specifications", type=positive, default=200, help="of each split (default: %(default)s)")
    p.add_argument("--split", nargs="+", choices=SPLITS, default=["headers"], help="default: headers")
    p.add_argument(
        "--thresholds", type=float, nargs="*", default=THRESHOLDS, help="of diffusion (default: 0.5 to 0.99)"
    )
    p.add_argument(
        "--rules", nargs="+", default=(), metavar="RULE", help='other strategies: "static=4", "margin:threshold=0.9"'
    )
    p.add_argument("--rows", type=positive, default=8, help="specifications at a time (default: %(default)s)")
    p.add_argument("--new-tokens", type=positive, default=768, help="of a program, at most (default: %(default)s)")
    p.add_argument("--block-size", type=positive, help="default: the one that the model was trained with")
    p.add_argument("--seed", type=int, default=0, help="of the choice of specifications (default: %(default)s)")
    p.add_argument("--threads", type=positive, help="default: what torch takes")
    p.add_argument("--device", help="default: a CUDA device if there is one")
    p.add_argument("--plot", type=Path, metavar="FILE", help="quality against speed, PNG or SVG by its ending")
    p.add_argument("--resume", type=Path, metavar="FILE", help="keep finished batches there, and go on from them")
    p.add_argument("--texts", type=Path, metavar="FILE", help="every program with its verdict, a JSON object a line")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    p.add_argument("--record", action="store_true", help="append a JSON line to bench/results/")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = make_parser()
    o = p.parse_args(arguments)
    if o.record and (why := no_commit()):
        p.error(f"--record: {why}")
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    try:
        found = measure(o)
        texts = found.pop("texts")
        if o.texts is not None:
            write_text(o.texts, "".join(json.dumps(line) + "\n" for line in texts))
        if o.plot is not None:
            plot(o.plot, found["arms"], about(found))
        print(json.dumps(found) if o.json else f"{in_a_line(found['machine'])}\n{about(found)}\n")
        if not o.json:
            print(markdown(found["arms"], found["kinds"], found["splits"]))
        if o.record:
            print(f"\n{record(found)}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
