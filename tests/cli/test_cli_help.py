"""The command line's help, its live view, and what it costs to start: nothing heavy before a command is understood."""

import argparse
import dataclasses
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import ASSETS, CONFIG, folder  # noqa: F401 (a fixture)

from tt_model import Step, TwoTower, __version__
from tt_model.cli import main, make_parser
from tt_model.cli import train as offered
from tt_model.cli.common import DTYPES
from tt_model.cli.generate import MODES as OFFERED_MODES
from tt_model.cli.train import DENOISER_SETTINGS, SETTINGS
from tt_model.cli.watch import Watch, colour, visible
from tt_model.config import DTYPES as KNOWN_DTYPES
from tt_model.engine.settings import MODES
from tt_model.training.schedule import CONTEXT_TOWERS, OPTIMIZERS, TrainSettings
from tt_model.vocabulary import Vocabulary

ROOT = Path(__file__).resolve().parents[2]


def parsers(parser: argparse.ArgumentParser | None = None) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    parser = parser or make_parser()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for part in action.choices.values():
                yield from parsers(part)


EXAMPLES = [
    (p.prog, line.split("|")[-1].strip() if "| twotower" in line else line.split(" | ")[0].strip())
    for p in parsers()
    for line in p.epilog.splitlines()  # as written: --help may break it
    if line.startswith("  ") and "twotower " in line
]


# ---- help ----


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda p: p.prog)
def test_help_teaches_by_example(parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*parser.prog.split()[1:], "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and parser.description.splitlines()[0][:40] in out
    assert 3 <= sum(prog == parser.prog for prog, _ in EXAMPLES) <= 6


@pytest.mark.parametrize("parser", list(parsers()), ids=lambda p: p.prog)
def test_help_fits_the_terminal(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*parser.prog.split()[1:], "--help"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if len(line) > 80] == []
    # Paragraphs are filled, and an example is still a command when it is pasted.
    words = parser.epilog.rsplit("\n\n", 1)[-1].split()
    assert " ".join(words) in " ".join(out.split())
    shown = [line for line in out.replace("\\\n", "").splitlines() if line.startswith("  ")]
    for prog, line in EXAMPLES:
        if prog == parser.prog:
            assert any(" ".join(line.split()) in " ".join(text.split()) for text in shown), line


@pytest.mark.parametrize(("prog", "line"), EXAMPLES)
def test_examples_are_commands(prog: str, line: str) -> None:
    words = shlex.split(line)
    assert words[0] == "twotower" and " ".join(words).startswith("twotower")
    assert callable(make_parser().parse_args(words[1:]).run), prog


def test_help_knows_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--help"])
    out = capsys.readouterr().out
    assert [mode for mode in MODES if f"\n  {mode} " not in out] == [] and tuple(MODES) == OFFERED_MODES
    assert set(DTYPES) == set(KNOWN_DTYPES)
    flags = vars(make_parser().parse_args(["generate"]))
    for name, parameter in inspect.signature(TwoTower.generate).parameters.items():
        if name in (
            "temperature",
            "seed",
        ):  # the command samples as published, and repeats itself; the library is greedy
            assert flags[name] == {"temperature": 0.1, "seed": 0}[name]
        elif name in flags and name != "prompt":
            assert flags[name] == parameter.default, name
    options = SETTINGS | DENOISER_SETTINGS
    for field in dataclasses.fields(TrainSettings):
        if field.name in options:
            assert options[field.name][2] == field.default, field.name
        else:
            others = ("stage", "betas", "skip_first_lines", "context_tower", "no_time", "optimizer")
            assert field.name in others, f"{field.name} has no option"
    assert (CONTEXT_TOWERS, OPTIMIZERS) == (offered.CONTEXT_TOWERS, offered.OPTIMIZERS)
    assert TrainSettings("ar").betas == (0.9, 0.95)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"twotower {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    # A bare package in place of tt_model's own __init__: what the command line's modules import by themselves.
    code = f"""
import sys, types
package = types.ModuleType("tt_model")
package.__path__, package.__version__ = [{str(ROOT / "tt_model")!r}], "0"
sys.modules["tt_model"] = package
from tt_model.cli import main
assert main(["generate", "--help"]) == 0 and main(["generate", "x", "--banana"]) == 2
print(sorted({{"torch", "numpy", "rich", "tokenizers", "safetensors", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- as a process ----


def test_process(folder: Path, tmp_path: Path) -> None:  # noqa: F811 (the fixture)
    command = [sys.executable, "-m", "tt_model.cli", "generate", "--model", folder, "--max-new-tokens", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    shared = dict(cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen([*command, "--quiet", "import"], stdout=write, **shared) as closed:  # beside the other one
        os.close(write)
        done = subprocess.run([*command, "import"], stdout=subprocess.PIPE, **shared)
        assert done.returncode == 0 and done.stdout.startswith("import") and "tokens/s" in done.stderr
        message = "twotower: error: standard output was closed before everything was written\n"
        assert (closed.communicate()[1], closed.returncode) == (message, 141)


# ---- live view ----


def step_of(start: int, tokens: list[int], confidence: list[float], committed: list[int], step: int = 0) -> Step:
    done = torch.zeros(1, len(tokens), dtype=torch.bool)
    done[0, committed] = True
    return Step([0], [start], step, torch.tensor([tokens]), torch.tensor([confidence]), done)


def terminal(height: int = 20, colours: str | None = "truecolor") -> Console:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=60, height=height, color_system=colours, _environ={})


def test_watch_shows_a_block_resolving() -> None:
    vocabulary = Vocabulary(ASSETS, CONFIG)
    ids = vocabulary.tokenizer.encode(" self.name = name").ids
    mask = CONFIG.mask_token_id
    console = terminal()
    view = Watch(console, "x = 1", 3, vocabulary)
    n = len(ids)
    with view:
        view.step(step_of(3, [ids[0]] + [mask] * (n - 1), [0.9] + [0.2] * (n - 1), [0]))
        assert view.coloured().plain == "x = 1" + vocabulary.decode(ids[:1]) + "░" * (n - 1)
        view.step(step_of(3, ids, [0.0] + [0.4] * (n - 1), list(range(1, n)), step=1))
        view.step(step_of(3 + n, [mask] * n, [0.1] * n, []))
        assert view.coloured().plain == "x = 1 self.name = name" + "░" * n
    final = view.coloured(n)
    assert final.plain == "x = 1 self.name = name"
    assert str(final.spans[0].style) == "bold" and len(final.spans) == 1 + len(list(vocabulary.pieces(ids)))
    assert view.passes == 3 and view.confidence[0] == pytest.approx(0.9)  # of the step that took it
    shown = console.file.getvalue()
    assert "masked" in shown and "pass 3" in shown and "\x1b[38;2;" in shown


def test_watch_keeps_what_there_was_when_it_is_stopped() -> None:
    vocabulary = Vocabulary(ASSETS, CONFIG)
    ids = vocabulary.tokenizer.encode(" self.name = name").ids
    console = terminal()
    with pytest.raises(KeyboardInterrupt), Watch(console, "x = 1", 3, vocabulary) as view:
        view.step(step_of(3, ids, [0.9] * len(ids), list(range(len(ids)))))
        view.step(step_of(3 + len(ids), [CONFIG.mask_token_id] * 3, [0.1] * 3, []))
        view.tokens.append(7)  # the signal came in the middle of a step
        raise KeyboardInterrupt
    last = console.file.getvalue().rpartition("\x1b[2K")[2]  # after the live view was taken away
    assert re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last) == "x = 1 self.name = name░░░\n"

    class Gone(io.StringIO):  # a terminal that was closed: SIGHUP
        gone = False

        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

    console = Console(file=Gone(), force_terminal=True, width=60, height=20, _environ={})
    with pytest.raises(KeyboardInterrupt), Watch(console, "x", 3, vocabulary):
        console.file.gone = True
        raise KeyboardInterrupt


def test_watch_shows_ids_without_a_tokenizer() -> None:
    view = Watch(Console(file=io.StringIO()), "5 6", 2, None)
    with view:
        view.step(step_of(2, [7, 3], [0.5, 0.1], [0]))
    assert view.coloured().plain == "5 6 7░"
    assert view._live is None  # not a terminal: nothing was shown


def test_watch_keeps_to_the_end_of_a_long_text() -> None:
    console = terminal(height=8)
    view = Watch(console, "\n".join(f"line {i}" for i in range(50)), 1, None)
    with console.capture() as captured:
        console.print(view)
    lines = captured.get().splitlines()
    assert len(lines) <= 8 and "line 49" in lines[-2] and "confidence" in lines[-1]


def test_text_does_not_command_the_terminal() -> None:
    assert visible("a\tb\n\x1b[2J\x07\r\x9b") == "a\tb\n␛[2J␇␍\ufffd"
    view = Watch(terminal(), "\x1b]0;title\x07", 1, None)
    assert "\x1b" not in view.coloured().plain


def test_colours_run_from_red_to_green() -> None:
    reds, greens = zip(*(map(int, colour(p / 10)[4:-1].split(",")[:2]) for p in range(11)), strict=True)
    assert reds == tuple(sorted(reds, reverse=True)) and greens[:6] == tuple(sorted(greens[:6]))
    assert colour(-1) == colour(0) and colour(2) == colour(1)
