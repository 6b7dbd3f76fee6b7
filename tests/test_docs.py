"""Every code block of README and docs: Python runs, a console shows what its command writes, commands can be parsed."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

from eval import demo
from tt_model.cli import main, make_parser

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tt_model/assets/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page, kind, text) for page in PAGES for kind, text in FENCE.findall(page.read_text())]


def blocks(kind: str) -> list:
    return [pytest.param(page, text, id=f"{page.stem}-{i}") for i, (page, k, text) in enumerate(BLOCKS) if k == kind]


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell block; `\\` joins lines, `#` begins a comment."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def assert_can_be_run(words: list[str]) -> None:
    if "=" in words[0]:  # an environment variable before the command
        words = words[1:]
    match words:
        case ["echo", _, "|", *rest]:
            assert_can_be_run(rest)
        case ["twotower", *arguments]:
            make_parser().parse_args(arguments)
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= set(known), words
        case ["python" | "python3" | ".venv/bin/python", "-m", module, *_]:
            assert importlib.util.find_spec(module), words
        case _:
            assert words[0] in ("pip", "git"), f"no way to check {words}"


@pytest.mark.parametrize("page", [page for page in PAGES if any(p == page and k == "python" for p, k, _ in BLOCKS)])
def test_python_runs(page: Path) -> None:
    """The blocks of a page one after the other, as a reader would paste them."""
    names: dict = {}
    for text in (text for p, kind, text in BLOCKS if p == page and kind == "python"):
        exec(compile(text, str(page), "exec"), names)


@pytest.mark.parametrize(("page", "text"), blocks("bash"))
def test_commands_are_understood(page: Path, text: str) -> None:
    for words in commands(text):
        assert_can_be_run(words)


@pytest.mark.parametrize(("page", "text"), blocks("console"))
def test_a_console_shows_what_is_written(page: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it but seconds, tokens a second and how many times as many."""
    command, *shown = text.splitlines()
    program, *arguments = shlex.split(command.removeprefix("$ "))
    if program == "twotower":
        status = main(arguments)
    else:
        assert [program, *arguments[:2]] == ["python", "-m", "eval.demo"]
        status = demo.main(arguments[2:])
    out, err = capsys.readouterr()
    assert status == 0
    told = lambda lines: [re.sub(r"[\d.]+ (?=s\b|tokens/s|times)", "", line) for line in lines]
    assert told((out + err).splitlines()) == told(shown)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 1000


def test_nothing_is_left_unchecked() -> None:
    """A block without a language is a drawing; any other kind would not be checked."""
    assert {kind for _, kind, _ in BLOCKS} <= {"", "python", "bash", "console"}


def test_what_cannot_be_run_is_caught() -> None:
    for line in ("twotower generate --modes ar", "make tests", "python -m bench.nothing", "frobnicate"):
        with pytest.raises((AssertionError, SystemExit)):
            assert_can_be_run(shlex.split(line))
