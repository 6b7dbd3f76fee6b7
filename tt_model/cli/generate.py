"""`twotower generate`: continue a prompt."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import SETTINGS, Parser, add_command, add_machine, machine_of, number, option, output_to, put, tell

if TYPE_CHECKING:
    from ..config import TwoTowerConfig
    from ..engine.generate import Stream
    from ..engine.settings import Settings, Step
    from ..vocabulary import Vocabulary
    from .watch import Watch

# As in tt_model.engine.settings and tt_model.config, which are not imported for --help.
MODES = ("mask_diffusion", "ar", "mock_ar", "speculative")
STRATEGIES = ("schedule", "threshold", "static", "factor", "entropy_bound")
CONFIDENCES = ("probability", "margin", "entropy", "random", "sequential")

_DESCRIPTION = """\
Continue a prompt: block by block with the denoiser, or token by token. The text goes to standard output as it is
written, a line of figures to standard error. The prompt is an argument, a file, or standard input. Ctrl-C ends it, and
keeps what is there."""

_EPILOG = """\
modes:
  mask_diffusion  the denoiser resolves a block at a time, most confident tokens first (default)
  ar              the context tower alone, a token a step: half the memory; also for a plain Nemotron-3-Nano
  mock_ar         the denoiser, a token a step
  speculative     what ar writes, several tokens a cycle: the denoiser drafts, the context tower verifies

examples:
  echo "# enum Color: RED, GREEN, BLUE" | twotower generate
  echo "# csv reading: sensor str, level float" | twotower generate --watch
  printf '%s' "import os" | twotower generate --temperature 0.7 --top-p 0.95 --seed 1
  twotower generate --prompt-file prompt.txt --max-new-tokens 512 --json --output out.json
  twotower generate --model two-towers --device cuda --dtype bfloat16 "The capital of France is"
  twotower generate --jsonl prompts.jsonl --output texts.jsonl --rows 32

A line of --jsonl has "prompt" (or "tokens", or "messages"), and may have an "id" and settings of its own:
  {"id": 7, "prompt": "def f(", "max_new_tokens": 64, "temperature": 0.7, "stop": ["\\n\\n"]}
Whoever stops it and runs the same command again goes on where it was.

A prompt is read as it is, and is best ended without a trailing space or newline: models rarely begin a token there
(`printf '%s'` adds no newline, `echo` does). The small model that comes along is another case: it writes the program
of a line of specification (docs/training.md), which its line end completes. Put -- before a prompt that begins with a
dash. No model is downloaded: --model is a folder with config.json, safetensors and tokenizer.json."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    p = add_command(commands, "generate", run, "continue a prompt", _DESCRIPTION, _EPILOG)
    source = p.add_argument_group("prompt and model")
    source.add_argument("prompt", nargs="?", help="the text to continue")
    source.add_argument("--chat", action="store_true", help="the prompt is a message, for the folder's chat template")
    option(source, "--prompt-file", str, "FILE", "read the prompt from a UTF-8 file; -: standard input")
    option(source, "--jsonl", str, "FILE", "many prompts, a JSON object a line; needs --output, and goes on from there")
    option(source, "--tokens", str, "IDS", 'the prompt as token ids, "5 6 7"; ids are written, too')
    option(source, "--model", str, "DIR", "folder of a model (default: the small one that comes along)")
    option(source, "--tokenizer", str, "DIR", "folder of tokenizer.json (default: the model's)")
    add_machine(source, "what to compute in (default: what config.json says)", more="; cuda:0,cuda:1: a tower on each")
    compiled = "on a CPU: compile passes first, half a minute each, for a prompt at a time (needs a C++ compiler)"
    source.add_argument("--compile", action="store_true", help=compiled)

    s = p.add_argument_group("settings")
    option(s, "--mode", str, "MODE", f"{', '.join(MODES[:-1])} or {MODES[-1]}", choices=MODES, default=MODES[0])
    option(s, "--max-new-tokens", int, "N", "most tokens to write", default=128)
    option(s, "--block-size", int, "N", "tokens denoised together (default: as trained)")
    option(s, "--steps-per-block", int, "N", "schedule and static: most passes for a block", default=16)
    option(s, "--draft-steps", int, "N", "speculative: most passes for a draft", default=1)
    threshold = "predictions more probable than this are all taken at once (default: what config.json says, or 0.8)"
    option(s, "--confidence-threshold", float, "P", threshold)
    chosen = f"which positions are taken in a pass: {', '.join(STRATEGIES[:-1])} or {STRATEGIES[-1]}"
    option(s, "--strategy", str, "RULE", chosen, choices=STRATEGIES, default=STRATEGIES[0])
    sure = f"by which they are ordered: {', '.join(CONFIDENCES[:-1])} or {CONFIDENCES[-1]}"
    sure += f" (default: what config.json says, or {CONFIDENCES[0]})"
    option(s, "--confidence", str, "KIND", sure, choices=CONFIDENCES)
    option(s, "--factor", float, "F", "of the strategy of that name", default=1.0)
    option(s, "--entropy-bound", float, "E", "of the strategy of that name", default=0.1)
    s.add_argument("--tempered", action="store_true", help="how sure: after temperature, top-k and top-p")
    option(s, "--alg-temp", float, "T", "above 0: draw which positions are taken, by how sure they are", default=0.0)
    temperature = "0: the most probable token; above: samples (default: %(default)s, as published)"
    option(s, "--temperature", float, "T", temperature, default=0.1)
    option(s, "--top-k", int, "K", "sample among the K most probable tokens")
    option(s, "--top-p", float, "P", "sample among the most probable tokens that make up P")
    option(s, "--seed", number(int, 0, 2**62 - 1), "N", "another one, another text", default=0)
    s.add_argument("--no-eos", action="store_true", help="go on after an end-of-sequence token")
    option(s, "--stop", str, "TEXT", "end where this text is complete, before it; more than once", action="append")

    option(s, "--rows", number(int, 1, 4096), "N", "with --jsonl: prompts at a time (default: 16)")

    out = p.add_argument_group("output")
    out.add_argument("--watch", action="store_true", help="show blocks resolving, tokens coloured by confidence")
    option(out, "--trace", str, "FILE", "write a page (HTML) that replays the passes, for a browser")
    out.add_argument("--trace-experts", action="store_true", help="with the tokens each expert got in each pass")
    out.add_argument("--json", action="store_true", help="one JSON object: text, tokens, passes, timings, settings")
    option(out, "--output", str, "FILE", "write there instead of standard output, all of it or nothing")
    out.add_argument("--quiet", action="store_true", help="no figures on standard error")


def run(o: argparse.Namespace) -> None:
    """Check everything that can be checked, load, generate, write."""
    if not o.quiet and not o.watch:
        tell("tt_model.engine")  # graphs of a GPU take seconds to capture
        tell("tt_model.modeling.compiled")
    if o.jsonl is not None:
        from .many import run as run_many

        return run_many(o)
    given = [name for name in ("prompt", "prompt_file", "tokens") if getattr(o, name) is not None]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") if name != "prompt" else "a prompt" for name in given)
        raise ValueError(f"{names}: expected one of them")
    if o.rows is not None:
        raise ValueError("--rows: is for the prompts of --jsonl FILE")
    if o.tokens is not None and o.tokenizer is not None:
        raise ValueError("--tokenizer: reads texts, and does not go with --tokens")
    if o.trace_experts and o.trace is None:
        raise ValueError("--trace-experts: needs --trace FILE")
    if o.trace is not None and o.output is not None and os.path.realpath(o.trace) == os.path.realpath(o.output):
        raise ValueError(f"--trace {o.trace}: is the file of --output, too")
    with output_to(o.output) as output, output_to(o.trace, "--trace") as page:
        prompt = _parse_ids(o.tokens) if o.tokens is not None else _read_prompt(o.prompt, o.prompt_file)

        from ..config import TwoTowerConfig
        from ..engine.generate import Stream
        from ..engine.trace import Trace
        from ..two_tower import ASSETS, TwoTower
        from ..vocabulary import Vocabulary

        folder = ASSETS if o.model is None else Path(o.model)
        config = TwoTowerConfig.from_file(folder)
        settings = _settings(o, config)
        if o.compile and settings.mode not in ("ar", "mock_ar") and settings.block_size != config.block_size:
            expected = f"expected --block-size {config.block_size}"
            raise ValueError(
                f"--compile: blocks of the trained size are compiled, not of {settings.block_size}: {expected}"
            )
        if o.trace_experts and (o.mode == "ar" or "E" not in config.pattern):
            what = "--mode ar has no denoiser" if o.mode == "ar" else f"{folder}: the model has no experts"
            raise ValueError(f"--trace-experts: {what}")
        vocabulary = None
        if isinstance(prompt, str):
            tokenizer = folder if o.tokenizer is None else Path(o.tokenizer)
            if not (tokenizer / "tokenizer.json").is_file():
                how = "name its folder (--tokenizer) or give ids (--tokens)"
                raise ValueError(f"{tokenizer}: no tokenizer.json; {how}")
            vocabulary = Vocabulary(tokenizer, config)
            messages = [{"role": "user", "content": prompt}]
            ids = vocabulary.chat(messages) if o.chat else vocabulary.encode(prompt)
        elif o.chat or o.stop:
            raise ValueError(f"--{'chat' if o.chat else 'stop'}: needs a prompt that is text, not --tokens")
        else:
            ids, prompt = prompt, " ".join(map(str, prompt))
        _check_prompt(ids, settings, config)
        towers = _towers(folder, settings.mode)
        devices, dtype = machine_of(o, alone="the context tower alone" * (towers == "context"))

        began = time.perf_counter()
        model = TwoTower.from_pretrained(folder, device=devices, dtype=dtype, towers=towers, progress=not o.quiet)
        if o.compile:
            model.compile_passes()
        load = time.perf_counter() - began
        view = _watch(prompt, len(ids), vocabulary) if o.watch else None
        trace = Trace(model if o.trace_experts else None) if o.trace is not None else None
        on_step = _all_of(view.step if view else None, trace)
        aloud = vocabulary is not None and view is None and o.output is None and not o.json
        before, stopped = "" if o.chat else prompt, None
        began = time.perf_counter()
        with view or nullcontext(), trace or nullcontext():
            stream = Stream(model, ids, settings, vocabulary, seed=o.seed, on_step=on_step)
            try:
                _read(stream, before, _say if aloud else None)
            except KeyboardInterrupt as error:
                stream.close()
                shown = view is not None and view.is_live and not (o.output or o.json or o.trace)
                if shown or not stream.result.tokens[0]:
                    raise
                stopped = error
            out = stream.result
        seconds = time.perf_counter() - began

        tokens, nfe, cycles = out.tokens[0], out.nfe[0], sum(out.cycles)
        text = None if vocabulary is None else out.text[0]
        record: dict[str, Any] = {
            "prompt": prompt if vocabulary else ids,
            "text": text,
            "prompt_tokens": ids,
            "tokens": tokens,
            "finish_reason": out.finish_reason[0],
            "nfe": nfe,
            "timings": {"load": round(load, 4), "generate": round(seconds, 4)},
            "tokens_per_second": round(len(tokens) / seconds, 2),
            "tokens_per_pass": round(len(tokens) / nfe, 3) if nfe else None,
            "cycles": cycles,
            "settings": asdict(settings)
            | {"seed": o.seed, "model": str(folder), "device": ",".join(map(str, devices))}
            | {"dtype": str(model.dtype).removeprefix("torch.")},
        }
        if trace:
            about = record["settings"] | {"model": folder.name if o.model else "the bundled one"}
            page.append(trace.page(out, [prompt if vocabulary else ids], vocabulary, about))
        if o.json:
            output.append(json.dumps(record) + "\n")
        elif text is None:
            output.append(" ".join(map(str, [*ids, *tokens])) + "\n")
        elif o.output is None and sys.stdout.isatty() and view:
            _show(before, text, view, len(tokens))
        elif not aloud:
            output.append(before + text + "\n" * (not (before + text).endswith("\n")))
    if not o.quiet:
        print(_figures(record, ended=bool(tokens) and tokens[-1] in settings.eos_token_ids), file=sys.stderr)
    if stopped:
        raise stopped


def _read_prompt(prompt: str | None, file: str | None) -> str:
    """The prompt from where it is; ValueError when there is none or it is not UTF-8 text."""
    if prompt is not None:
        where, data = "prompt", prompt.encode(errors="surrogatepass")  # to be refused below
    elif file not in (None, "-"):
        where, data = f"--prompt-file {file}", Path(file).read_bytes()
    elif file is None and sys.stdin.isatty():
        raise ValueError('no prompt: give one (twotower generate "def main():"), a --prompt-file, or pipe one in')
    else:
        where, data = "standard input", sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")  # without a byte order mark: training strips it, too
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not text:
        raise ValueError(f"{where}: empty, expected some text to continue")
    return text


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f'--tokens is {text!r}, expected token ids such as "5 6 7"') from None


def _settings(o: argparse.Namespace, config: TwoTowerConfig) -> Settings:
    from ..engine.settings import Settings

    ends = {"eos_token_id": None} if o.no_eos else {}
    settings = Settings.of(config, **{name: getattr(o, name) for name in SETTINGS}, **ends)
    settings.check(config)
    return settings


def _check_prompt(ids: list[int], settings: Settings, config: TwoTowerConfig) -> None:
    """What `generate` refuses, before minutes go into loading."""
    if not ids:
        raise ValueError("prompt: empty, expected at least one token")
    if bad := [i for i in ids if not 0 <= i < config.vocab_size]:
        raise ValueError(f"prompt: token id {bad[0]} is out of range, expected 0 to {config.vocab_size - 1}")
    limit = config.max_position_embeddings
    if len(ids) + settings.max_new_tokens > limit:
        count = f"{len(ids)} tokens and {settings.max_new_tokens} new ones"
        raise ValueError(f"prompt: {count} exceed the model's context of {limit} (--max-new-tokens asks for fewer)")


def _towers(folder: Path, mode: str) -> str:
    """Which towers to load; ValueError when the folder has no denoiser and the mode needs one."""
    from ..checkpoint import layout

    if mode == "ar":
        return "context"
    if layout(folder) != "two_tower":
        raise ValueError(
            f"{folder}: has a context tower only, and --mode {mode} needs a denoiser: use --mode ar, or make one "
            "(twotower convert, twotower train denoiser)"
        )
    return "both"


def _watch(prompt: str, length: int, vocabulary: Vocabulary | None) -> Watch:
    """A live view on the first of standard output and standard error that is a terminal."""
    from rich.console import Console

    from .watch import Watch

    out, err = Console(highlight=False), Console(stderr=True, highlight=False)
    return Watch(out if out.is_terminal else err, prompt, length, vocabulary)


def _all_of(*told: Callable[[Step], None] | None) -> Callable[[Step], None] | None:
    """What tells a step to all that are there; None: nobody."""
    there = [tell for tell in told if tell]

    def tell_all(step: Step) -> None:
        for watcher in there:
            watcher(step)

    return tell_all if there else None


def _say(text: str, style: str = "") -> None:
    """A piece of the text, at once."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.text import Text

        from .watch import visible

        Console(highlight=False).print(Text(visible(text), style), end="", soft_wrap=True)
    else:
        put(text)


def _read(stream: Stream, before: str, say: Callable[..., None] | None) -> None:
    """Read a stream to its end, or to Ctrl-C, and say it as it comes."""
    if say is None:
        for _ in stream:
            pass
        return
    said = before
    try:
        say(before, "bold")
        for piece in stream:
            say(piece)
            said += piece
    except KeyboardInterrupt:
        rest = (before + stream.result.text[0])[len(said) :]  # what was held back
        say(rest)
        said += rest
        raise
    finally:
        say("\n" * (not said.endswith("\n")))


def _show(prompt: str, text: str, view: Watch | None, length: int) -> None:
    """Prompt and text, told apart, on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from .watch import Watch, visible

    plain = Text().append(visible(prompt), style=Watch.PROMPT).append(visible(text))
    shown = plain if view is None else view.coloured(length)
    # Colours only where they leave the text as it is: a tokenizer may read a token differently on its own.
    Console(highlight=False).print(shown if shown.plain == plain.plain else plain, soft_wrap=True)


def _figures(record: dict[str, Any], ended: bool) -> str:
    """Speed in one line."""
    count, timings, nfe = len(record["tokens"]), record["timings"], record["nfe"]
    passes = f"{nfe} denoiser pass{'es' * (nfe != 1)}"
    if record["settings"]["mode"] == "ar":
        passes = "context tower alone"
    elif cycles := record["cycles"]:
        passes += f", {cycles} drafts verified, {count / cycles:.2f} tokens each"
    elif nfe:
        passes += f", {record['tokens_per_pass']:.2f} tokens per pass"
    end = ", ended by the model" if ended else ""
    seconds = f"{timings['generate']:.2f} s: {record['tokens_per_second']:.1f} tokens/s"
    return f"{count} tokens in {seconds}, {passes}{end} (loaded in {timings['load']:.2f} s)"
