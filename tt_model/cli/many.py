"""`twotower generate --jsonl`: many prompts through one engine, resumable."""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..files import read_text
from .common import SETTINGS, describe, machine_of, output_to

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..engine.request import Request
    from ..two_tower import TwoTower

PROMPTS = {"prompt": str, "tokens": list, "messages": list}
ROWS = 16  # prompts at a time
EXPECTED = {"prompt": "a text", "tokens": "a list of token ids", "messages": "a list of objects with role and content"}
KEYS = (*PROMPTS, "id", "seed", "eos_token_id", "logprobs", *SETTINGS)


def run(o: argparse.Namespace) -> None:
    """Every line of a file of JSON objects, each with a prompt and perhaps settings of its own.

    What is done is appended to OUTPUT.part, from which a later run goes on; at the end all of it is written to OUTPUT,
    in the order of the input.
    """
    if o.output is None:
        raise ValueError("--jsonl: needs --output FILE, beside which it keeps what is done")
    alone = ("prompt_file", "tokens", "watch", "json", "trace", "trace_experts")
    given = [f"--{name.replace('_', '-')}" for name in alone if getattr(o, name)]
    if given := given + ["a prompt"] * (o.prompt is not None):
        raise ValueError(f"--jsonl: takes its prompts from the file, and does not go with {' and '.join(given)}")
    if o.compile and o.rows != 1:
        raise ValueError(f"--compile: passes of one row are compiled, not of {o.rows or ROWS}: expected --rows 1")
    part = Path(f"{o.output}.part")
    if os.path.realpath(o.jsonl) in (os.path.realpath(o.output), os.path.realpath(part)):
        raise ValueError(f"--output {o.output}: would overwrite the prompts")
    lines = _lines(Path(o.jsonl))
    defaults = {name: getattr(o, name) for name in SETTINGS} | ({"eos_token_id": None} if o.no_eos else {})
    said = [lines, defaults, o.model, o.tokenizer, o.seed, o.chat, o.dtype]
    with output_to(o.output) as output:
        with _progress(part, hashlib.sha256(json.dumps(said).encode()).hexdigest()) as progress:
            if missing := [i for i in range(len(lines)) if i not in progress.done]:
                _work(o, lines, missing, defaults, progress)
        output += [json.dumps(progress.done[i]) + "\n" for i in range(len(lines))]
    part.unlink()
    if failed := sum("error" in record for record in progress.done.values()):
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
            json.dumps(line, ensure_ascii=False).encode()  # half a character, written as an escape
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON: {error}") from None
        given = [name for name in PROMPTS if isinstance(line, dict) and name in line]
        if len(given) != 1:
            raise ValueError(f'{where}: expected an object with one of "prompt", "tokens" and "messages"')
        if not isinstance(line[given[0]], PROMPTS[given[0]]):
            raise ValueError(f'{where}: "{given[0]}" is {line[given[0]]!r:.40}, expected {EXPECTED[given[0]]}')
        if unknown := [name for name in line if name not in KEYS]:
            raise ValueError(f'{where}: "{unknown[0]}" is none of {", ".join(KEYS)}')
        found.append(line)
    if not found:
        raise ValueError(f"--jsonl {file}: empty, expected a JSON object a line")
    return found


class Progress:
    """What is done: in memory, and a line of a file each. The file comes to be with its first line."""

    def __init__(self, file: Path, kind: str):
        self.file, self.kind = file, kind
        self.done: dict[int, dict[str, Any]] = {}
        self.part: IO[str] | None = None

    def open(self) -> None:
        """Read what there is, and hold it against other processes. A line that was cut short does not count."""
        self.part = self.file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self.part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.file}: another process is at it") from None
        self.part.seek(0)
        try:
            text = self.part.read()
            head, *lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")] or [""]
            ours = not text or json.loads(head) == {"of": self.kind}
            self.done = dict(map(json.loads, lines))
        except ValueError:
            ours = False
        if not ours:
            raise ValueError(f"{self.file}: is of another input or other settings; remove it to begin anew")
        self.part.truncate(len((head + "".join(lines)).encode()))
        self.part.seek(0, 2)
        if not text:
            self._write({"of": self.kind})

    def keep(self, number: int, record: dict[str, Any]) -> None:
        """Write down what has become of a line."""
        self.done[number] = record
        self._write([number, record])

    def _write(self, value: Any) -> None:
        assert self.part is not None
        self.part.write(json.dumps(value) + "\n")  # in ASCII: a line ends at its newline alone
        self.part.flush()


@contextmanager
def _progress(file: Path, kind: str) -> Iterator[Progress]:
    progress = Progress(file, kind)
    try:
        if file.exists():
            progress.open()
        yield progress
    finally:
        if progress.part is not None:
            progress.part.close()


def _work(
    o: argparse.Namespace,
    lines: list[dict[str, Any]],
    missing: list[int],
    defaults: dict[str, Any],
    progress: Progress,
) -> None:
    """Generate what is missing, and write it down line by line."""
    from rich import progress as bars
    from rich.console import Console

    from ..engine.prompts import prompt_ids
    from ..two_tower import TwoTower
    from ..vocabulary import Vocabulary

    towers = "context" if all(lines[i].get("mode", defaults["mode"]) == "ar" for i in missing) else "both"
    devices, dtype = machine_of(o, alone="the context tower alone" * (towers == "context"))
    model = TwoTower.from_pretrained(o.model, device=devices, dtype=dtype, towers=towers, progress=not o.quiet)
    if o.compile:
        model.compile_passes()
    if o.tokenizer is not None:
        model.tokenizer = Vocabulary(o.tokenizer, model.config)

    if progress.part is None:  # what can be refused has been
        progress.open()

    def keep(number: int, record: dict[str, Any]) -> None:
        named = {"id": lines[number]["id"]} if "id" in lines[number] else {}
        progress.keep(number, named | record)

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
    engine = _engine(model, prompts, lines, defaults, o.rows or ROWS)
    for i, ids in prompts.items():
        own = {name: value for name, value in lines[i].items() if name not in ("prompt", "tokens", "messages", "id")}
        try:
            requests[engine.submit(ids, **{**defaults, "seed": o.seed + i, **own})] = i
        except (ValueError, TypeError) as error:
            keep(i, {"error": describe(error)})
    rate = bars.TextColumn("{task.fields[rate]:.0f} tokens/s")
    columns = (bars.BarColumn(), bars.MofNCompleteColumn(), rate, bars.TimeRemainingColumn())
    quiet = o.quiet or not sys.stderr.isatty()
    began, tokens = time.perf_counter(), 0
    with bars.Progress(*columns, console=Console(stderr=True), disable=quiet) as bar:
        task = bar.add_task("prompts", total=len(lines), completed=len(progress.done), rate=0.0)
        for event in engine:
            tokens += len(event.tokens)
            if not event.request.is_open:
                keep(requests[event.request], _record(event.request))
            bar.update(task, completed=len(progress.done), rate=tokens / (time.perf_counter() - began))
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
        new = sum(n for n in (asked, block) if isinstance(n, int) and n > 0)
        return min(len(prompts[number]) + new + PAGE_SIZE, 2 * limit) // PAGE_SIZE * PAGE_SIZE + PAGE_SIZE

    largest = sorted(map(need, prompts), reverse=True)[:rows]
    return Engine(model, max_rows=max(1, len(largest)), max_tokens=max(PAGE_SIZE, sum(largest)))


def _record(request: Request) -> dict[str, Any]:
    """What is written of a request that has ended."""
    if request.error is not None:
        return {"error": describe(request.error) if isinstance(request.error, Exception) else str(request.error)}
    result = request.so_far()
    record = {name: getattr(result, name) for name in ("text", "tokens", "finish_reason", "nfe", "forwards")}
    logprobs = [log if math.isfinite(log) else None for log in result.logprobs or ()]  # JSON has no -inf
    more = {"cycles": result.cycles, "logprobs": logprobs, "cached_tokens": request.cached_tokens}
    return record | {name: value for name, value in more.items() if value}
