"""`twotower generate --jsonl`: many prompts through one engine, resumable."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import read_text
from .common import describe, machine_of, output_to

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Request
    from ..two_tower import TwoTower

_LOOP = ("mode", "max_new_tokens", "block_size", "steps_per_block", "draft_steps", "confidence_threshold")
SETTINGS = (*_LOOP, "temperature", "top_k", "top_p", "stop")
KEYS = ("prompt", "tokens", "messages", "id", "seed", "eos_token_id", "logprobs", *SETTINGS)


def run(o: argparse.Namespace) -> None:
    """Every line of a file of JSON objects, each with a prompt and perhaps settings of its own.

    What is done is appended to OUTPUT.part, from which a later run goes on; at the end all of it is written to OUTPUT,
    in the order of the input.
    """
    if o.output is None:
        raise ValueError("--jsonl: needs --output FILE, beside which it keeps what is done")
    given = [f"--{name.replace('_', '-')}" for name in ("prompt_file", "tokens", "watch", "json") if getattr(o, name)]
    if given := given + ["a prompt"] * (o.prompt is not None):
        raise ValueError(f"--jsonl: takes its prompts from the file, and does not go with {' and '.join(given)}")
    lines = _lines(Path(o.jsonl))
    defaults = {name: getattr(o, name) for name in SETTINGS} | ({"eos_token_id": None} if o.no_eos else {})
    kind = hashlib.sha256(json.dumps([lines, defaults, o.model, o.tokenizer, o.seed, o.chat]).encode()).hexdigest()
    with output_to(o.output) as output, _progress(Path(f"{o.output}.part"), kind) as (part, done):
        missing = [i for i in range(len(lines)) if i not in done]
        if missing:
            _work(o, lines, missing, defaults, part, done)
        output += [json.dumps(done[i]) + "\n" for i in range(len(lines))]
    Path(part.name).unlink()
    if failed := sum("error" in record for record in done.values()):
        raise ValueError(f'{failed} of {len(lines)} lines failed: "error" in {o.output} says why')


def _lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file; ValueError, with the number of the line, for anything else."""
    found = []
    try:
        whole = read_text(file)
    except UnicodeDecodeError as error:
        raise ValueError(f"--jsonl {file}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    for number, text in enumerate(whole.split("\n"), 1):  # not splitlines: a JSON string may hold U+2028
        if not text.strip():
            continue
        where = f"--jsonl {file}, line {number}"
        try:
            line = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(line, dict) or sum(name in line for name in ("prompt", "tokens", "messages")) != 1:
            raise ValueError(f'{where}: expected an object with one of "prompt", "tokens" and "messages"')
        if unknown := [name for name in line if name not in KEYS]:
            raise ValueError(f'{where}: "{unknown[0]}" is none of {", ".join(KEYS)}')
        found.append(line)
    if not found:
        raise ValueError(f"--jsonl {file}: empty, expected a JSON object a line")
    return found


@contextmanager
def _progress(file: Path, kind: str) -> Iterator[tuple[IO[str], dict[int, dict[str, Any]]]]:
    """The file of what is done, open for more, and what is in it. A line that was cut short is not."""
    with file.open("a+", encoding="utf-8") as part:
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{file}: another process is at it") from None
        part.seek(0)
        whole = [line for line in part if line.endswith("\n")]
        if whole and json.loads(whole[0]) != {"of": kind}:
            raise ValueError(f"{file}: is of another input or other settings; remove it to begin anew")
        part.truncate(sum(len(line.encode()) for line in whole))
        part.seek(0, 2)
        if not whole:
            part.write(json.dumps({"of": kind}) + "\n")
        yield part, dict(map(json.loads, whole[1:]))


def _work(
    o: argparse.Namespace,
    lines: list[dict[str, Any]],
    missing: list[int],
    defaults: dict[str, Any],
    part: IO[str],
    done: dict[int, dict[str, Any]],
) -> None:
    """Generate what is missing, and write it down line by line."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..engine.prompts import prompt_ids
    from ..two_tower import TwoTower
    from ..vocabulary import Vocabulary

    device, dtype = machine_of(o)
    modes = {lines[i].get("mode", defaults["mode"]) for i in missing}
    towers = "context" if modes == {"ar"} else "both"
    model = TwoTower.from_pretrained(o.model, device=device, dtype=dtype, towers=towers, progress=not o.quiet)
    if o.tokenizer is not None:
        model.tokenizer = Vocabulary(o.tokenizer, model.config)

    def keep(number: int, record: dict[str, Any]) -> None:
        named = {"id": lines[number]["id"]} if "id" in lines[number] else {}
        done[number] = named | record
        part.write(json.dumps([number, done[number]]) + "\n")
        part.flush()

    requests: dict[Request, int] = {}
    prompts = {}
    for i in missing:
        line = lines[i]
        messages = line.get("messages")
        if o.chat and "prompt" in line:
            messages = [{"role": "user", "content": line["prompt"]}]
        try:
            prompts[i] = prompt_ids(model, None if messages else line.get("prompt", line.get("tokens")), messages)
        except (ValueError, TypeError) as error:
            keep(i, {"error": describe(error)})
    engine = _engine(model, prompts, lines, defaults, o.rows)
    for i, ids in prompts.items():
        own = {name: value for name, value in lines[i].items() if name not in ("prompt", "tokens", "messages", "id")}
        try:
            requests[engine.submit(ids, **{**defaults, "seed": o.seed + i, **own})] = i
        except (ValueError, TypeError) as error:
            keep(i, {"error": describe(error)})
    columns = (
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn(),
    )  # fmt: skip
    quiet = o.quiet or not sys.stderr.isatty()
    began, tokens = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("prompts", total=len(lines), completed=len(done), rate=0.0)
        for event in engine:
            tokens += len(event.tokens)
            if not event.request.is_open:
                keep(requests[event.request], _record(event.request))
            bar.update(task, completed=len(done), rate=tokens / (time.perf_counter() - began))
    if not o.quiet:
        seconds = time.perf_counter() - began
        print(
            f"{len(requests)} prompts, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s",
            file=sys.stderr,
        )


def _engine(
    model: TwoTower, prompts: dict[int, list[int]], lines: list[dict[str, Any]], defaults: dict[str, Any], rows: int
) -> Engine:
    """With room for the largest prompts at once; what no room would do for is refused one by one."""
    from ..engine.engine import Engine
    from ..modeling.state import PAGE_SIZE

    limit = model.config.max_position_embeddings

    def need(number: int) -> int:
        asked = lines[number].get("max_new_tokens", defaults["max_new_tokens"])
        block = lines[number].get("block_size", defaults["block_size"]) or model.config.block_size
        new = sum(n for n in (asked, block) if isinstance(n, int))
        return min(len(prompts[number]) + new + PAGE_SIZE, 2 * limit) // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE

    largest = sorted(map(need, prompts), reverse=True)[:rows]
    return Engine(model, max_rows=max(1, len(largest)), max_tokens=max(PAGE_SIZE, sum(largest)))


def _record(request: Request) -> dict[str, Any]:
    """What is written of a request that has ended."""
    if request.error is not None:
        return {"error": describe(request.error) if isinstance(request.error, Exception) else str(request.error)}
    result = request.so_far()
    record = {name: getattr(result, name) for name in ("text", "tokens", "finish_reason", "nfe", "forwards")}
    more = {"cycles": result.cycles, "logprobs": result.logprobs, "cached_tokens": request.cached_tokens}
    return record | {name: value for name, value in more.items() if value}
