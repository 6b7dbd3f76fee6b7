"""`python -m eval.held_out`: what a model writes, measured on held-out Python: bits per byte, speed, syntax, agreement.

What the table's rows are:

- AR bits per byte: the context tower's next-token losses over every held-out file, over the bytes of its text. A file
  is read in windows of `--window` tokens, each half a window after the last. The first counts all its losses, the first
  token's after the beginning-of-sequence token included; the others those of their second half.
- Prompts: whole lines of held-out files, at most `--prompt-tokens` tokens and at least half as many, from the start of
  a file or of a top-level statement. They stop short of the last line's end, so that the model chooses the indentation.
  Files take turns, so that long ones do not fill the sample. Completions are greedy: AR, diffusion at temperature 0.
- Tokens a pass: new tokens over denoiser passes. AR needs a pass of the context tower for each token.
- Finishes a statement: prompt + completion is cut after its last complete top-level statement, which is where the next
  one begins (eval/syntax.py), or not at all if it ended by itself; something of the completion, more than blanks and
  comments, stands before the cut.
- Parses: of these, the texts that `ast.parse` takes, so cut. As a ceiling, the same for the file's own next tokens.
- Agreement of diffusion with AR: positions with the same token up to the shorter length; mean length of the common
  start.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from bench.measure import table
from tt_model import TwoTower, checkpoint
from tt_model.training.data import load_texts
from tt_model.two_tower import ASSETS
from tt_model.vocabulary import load_tokenizer

from .syntax import statement_starts, verdict


@dataclass(frozen=True)
class Prompt:
    """A piece of a held-out file, and what follows it there."""

    ids: list[int]  # with the beginning-of-sequence token where it begins a file
    text: str
    following: list[int]  # as many tokens as are to be written


def cut_prompts(
    texts: Sequence[str], tokenizer: Tokenizer, *, count: int, length: int, new_tokens: int, bos: int, seed: int = 0
) -> list[Prompt]:
    """`count` prompts of at most `length` tokens, as the module's docstring says; the same seed gives the same ones.

    ValueError when the texts hold too few.
    """
    rng = random.Random(seed)
    files = [(text, starts) for text in texts if (starts := statement_starts(text))]
    rng.shuffle(files)
    for _, starts in files:
        rng.shuffle(starts)
    prompts: list[Prompt] = []
    while files and len(prompts) < count:
        for text, starts in list(files):
            prompt = None
            while starts and prompt is None:
                prompt = _prompt(text, starts.pop(), tokenizer, length, new_tokens, bos)
            if prompt is not None and len(prompts) < count:
                prompts.append(prompt)
        files = [(text, starts) for text, starts in files if starts]
    if len(prompts) < count:
        raise ValueError(f"the held-out files yield {len(prompts)} prompts of {length} tokens, expected {count}")
    return prompts


def _prompt(text: str, start: int, tokenizer: Tokenizer, length: int, new_tokens: int, bos: int) -> Prompt | None:
    """The longest run of whole lines from `start`; None where too little is left, of lines or of text after them."""
    piece = text[start : start + 40 * (length + new_tokens)]
    encoding = tokenizer.encode(piece, add_special_tokens=False)
    first = [bos] if start == 0 else []
    room = length - len(first)
    if len(encoding.ids) < length + new_tokens:
        return None
    ends = [m.start() for m in re.finditer(r"(?<=\S)[ \t]*\n", piece[: encoding.offsets[room - 1][1] + 1])]
    for end in reversed(ends):
        ids = tokenizer.encode(piece[:end], add_special_tokens=False).ids
        if len(ids) <= room:
            if 2 * len(ids) < length:
                return None
            following = tokenizer.encode(piece[end:], add_special_tokens=False).ids[:new_tokens]
            return Prompt(first + ids, piece[:end], following)
    return None


@torch.no_grad()
def bits_per_byte(
    model: TwoTower,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    window: int,
    bos: int,
    advance: Callable[[float], None],
) -> float:
    """The context tower's loss in bits over the bytes of all texts. `advance` is told how many bytes are done."""
    step = window // 2
    nats, pieces = 0.0, []  # pieces: ids of a window, how many of its predictions were made before
    sizes = []
    for text in texts:
        ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids]
        begins = range(0, max(1, len(ids) - 1 - step), step)
        pieces += [(ids[b : b + window + 1], 0 if b == 0 else window - step) for b in begins]
        sizes += [len(text.encode()) / len(begins)] * len(begins)
    order = sorted(range(len(pieces)), key=lambda i: len(pieces[i][0]))  # of a length together: little padding
    for some in (order[i : i + 8] for i in range(0, len(order), 8)):
        width = max(len(pieces[i][0]) for i in some)
        batch = torch.full((len(some), width), bos)
        counted = torch.zeros(len(some), width - 1, dtype=torch.bool)
        for row, i in enumerate(some):
            ids, before = pieces[i]
            batch[row, : len(ids)] = torch.tensor(ids)
            counted[row, before : len(ids) - 1] = True
        batch, counted = batch.to(model.device), counted.to(model.device)
        logits = model.context_logits(batch[:, :-1])[counted].float()
        nats += F.cross_entropy(logits, batch[:, 1:][counted], reduction="sum").item()
        advance(sum(sizes[i] for i in some))
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> tuple[float, float]:
    """Share of positions with the same token, up to the shorter of two rows; mean length of the rows' common start."""
    equal = total = prefix = 0
    for a, b in zip(one, other, strict=True):
        same = [x == y for x, y in zip(a, b, strict=False)]
        equal, total = equal + sum(same), total + len(same)
        prefix += next((i for i, s in enumerate(same) if not s), len(same))
    return equal / max(1, total), prefix / max(1, len(one))


@dataclass(frozen=True)
class Syntax:
    """Verdicts over all prompts."""

    prompts: int
    finished: int  # completions that finish a top-level statement
    parsed: int  # of these

    @classmethod
    def of(
        cls, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]], tokenizer: Tokenizer, ends: set[int]
    ) -> Syntax:
        found = []
        for prompt, row in zip(prompts, tokens, strict=True):
            ended = bool(row) and row[-1] in ends
            found.append(verdict(prompt.text, tokenizer.decode(list(row[:-1] if ended else row)), ended))
        parsed = found.count("parses")
        return cls(len(prompts), parsed + found.count("fails"), parsed)

    def cells(self) -> tuple[str, str]:
        parsed = f"{self.parsed} of {self.finished} ({self.parsed / self.finished:.0%})" if self.finished else "none"
        return f"{self.finished} of {self.prompts}", parsed


def generate(model: TwoTower, prompts: Sequence[Prompt], options: argparse.Namespace, mode: str, advance) -> Any:
    """(tokens of each prompt, denoiser passes of each), in batches of `options.batch`."""
    tokens, nfe = [], []
    for i in range(0, len(prompts), options.batch):
        out = model.generate(
            [prompt.ids for prompt in prompts[i : i + options.batch]],
            mode=mode,
            max_new_tokens=options.new_tokens,
            block_size=options.block_size,
            confidence_threshold=options.threshold,
            confidence="probability",
            on_step=lambda step: advance(int(step.committed.sum())),
        )
        tokens, nfe = tokens + out.tokens, nfe + out.nfe
    return tokens, nfe


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as `--json` prints them."""
    folder = ASSETS if options.model is None else Path(options.model)
    tokenizer = load_tokenizer(folder)
    both = checkpoint.layout(folder) == "two_tower"
    model = TwoTower.from_pretrained(folder, towers="both" if both else "context", device=options.device)
    bos, ends = model.config.bos_token_id, set(model.config.eos_token_ids)
    if bos is None:
        raise ValueError("the model has no beginning-of-sequence token (bos_token_id), which its files began with")
    texts = load_texts(options.data, "held_out")[: options.files]
    size = dict(count=options.prompts, length=options.prompt_tokens, new_tokens=options.new_tokens)
    prompts = cut_prompts(texts, tokenizer, **size, bos=bos, seed=options.seed)
    block_size = options.block_size or model.config.block_size
    found: dict[str, Any] = {
        "model": str(options.model or "bundled"),
        "data": {"source": options.data, "files": len(texts), "bytes": sum(len(t.encode()) for t in texts)},
        "python": sys.version.split()[0],
        "settings": {
            **size,
            "window": options.window,
            "seed": options.seed,
            "block_size": block_size,
            "threshold": options.threshold,
        },
    }
    percent = TextColumn("{task.percentage:3.0f}%")
    columns = (TextColumn("{task.description}"), BarColumn(), percent, TimeRemainingColumn())
    written = options.prompts * options.new_tokens
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("bits per byte", total=found["data"]["bytes"])
        told = lambda n: progress.advance(bar, n)
        found["bits_per_byte"] = bits_per_byte(model, texts, tokenizer, window=options.window, bos=bos, advance=told)
        rows = {"file": [p.following for p in prompts]}
        for mode, name in (("ar", "ar"), ("mask_diffusion", "diffusion"))[: 1 + both]:
            bar = progress.add_task(name, total=written)
            rows[name], nfe = generate(model, prompts, options, mode, lambda n, bar=bar: progress.advance(bar, n))
            progress.update(bar, completed=written)
            if mode == "mask_diffusion":
                found["tokens_per_pass"] = sum(map(len, rows[name])) / sum(nfe)
    found["syntax"] = {name: asdict(Syntax.of(prompts, tokens, tokenizer, ends)) for name, tokens in rows.items()}
    if both:
        share, prefix = agreement(rows["diffusion"], rows["ar"])
        found["agreement"] = {"share": share, "prefix": prefix}
    if options.texts:
        found["texts"] = [
            {"prompt": p.text, **{name: tokenizer.decode(list(tokens[i])) for name, tokens in rows.items()}}
            for i, p in enumerate(prompts)
        ]
    return found


def markdown(found: dict[str, Any]) -> str:
    """The table for a model's card."""
    s, data = found["settings"], found["data"]
    cells = {name: Syntax(**values).cells() for name, values in found["syntax"].items()}
    pick = lambda i: [cells[name][i] if name in cells else "" for name in ("ar", "diffusion", "file")]
    rows = [
        ("bits per byte", f"{found['bits_per_byte']:.3f}", "", ""),
        ("tokens a pass", "1", f"{found['tokens_per_pass']:.2f}" if "tokens_per_pass" in found else "", ""),
        ("completions that finish a top-level statement", *pick(0)),
        ("of these, parse as Python", *pick(1)),
    ]
    if "agreement" in found:
        a = found["agreement"]
        rows.append(("positions that equal AR's", "", f"{a['share']:.1%}", ""))
        rows.append(("tokens before the first that differs, mean", "", f"{a['prefix']:.1f} of {s['new_tokens']}", ""))
    settings = (
        f"{data['files']} held-out files ({data['bytes'] / 1e6:.2f} MB) of {data['source']}, Python {found['python']}; "
        f"{s['count']} prompts of up to {s['length']} tokens, {s['new_tokens']} new ones, seed {s['seed']}; "
        f"diffusion at block {s['block_size']}, threshold {s['threshold']}, temperature 0."
    )
    header = ("", "AR, greedy", "diffusion", "the file itself")
    return f"{settings}\n\n{table(header, rows)}"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m eval.held_out", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="a checkpoint folder with tokenizer.json (default: the bundled model)")
    p.add_argument("--data", default="stdlib", help='a file, a folder or "stdlib" (default: %(default)s)')
    p.add_argument("--files", type=int, help="use the first so many held-out files only")
    p.add_argument("--prompts", type=int, default=64, help="default: %(default)s")
    p.add_argument("--prompt-tokens", type=int, default=128, help="of a prompt, at most (default: %(default)s)")
    p.add_argument("--new-tokens", type=int, default=128, help="of a completion (default: %(default)s)")
    p.add_argument("--window", type=int, default=512, help="tokens of a window of text (default: %(default)s)")
    p.add_argument("--block-size", type=int, help="default: the one that the model was trained with")
    p.add_argument("--threshold", type=float, default=0.8, help="of confidence (default: %(default)s)")
    p.add_argument("--batch", type=int, default=16, help="prompts at a time (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the choice of prompts (default: %(default)s)")
    p.add_argument("--device", help="default: a CUDA device if there is one")
    p.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    p.add_argument("--texts", action="store_true", help="with --json: the texts too")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser()
    options = p.parse_args(arguments)
    least = dict(files=1, prompts=1, prompt_tokens=2, new_tokens=1, window=2, block_size=1, batch=1)
    for name, smallest in least.items():
        if (value := getattr(options, name)) is not None and value < smallest:
            p.error(f"--{name.replace('_', '-')} is {value}, expected at least {smallest}")
    if options.texts and not options.json:
        p.error("--texts goes with --json")
    try:
        found = measure(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{p.prog}: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found) if options.json else markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
