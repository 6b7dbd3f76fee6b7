"""The demonstration: a race in a terminal, figures off it, a verdict, errors of a line."""

import io
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from boilerplate import boilerplate_models
from rich.console import Console

from eval import demo
from tt_model import TwoTower
from tt_model.training.boilerplate import KINDS, parse, program, split_of

HEADER = "# enum Color: RED, GREEN"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    boilerplate_models(folder := tmp_path_factory.mktemp("models"))
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "NEW_TOKENS", 24)
    monkeypatch.setattr(demo, "PICTURES_A_SECOND", 10000)


def test_what_a_model_without_training_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([HEADER, "--model", str(folder / "both")]) == 1
    out = capsys.readouterr().out
    assert out.startswith(f"{HEADER}\n") and demo.SPLIT[split_of(HEADER)] in out and "does not do what" in out
    for side in ("speculative", "AR"):
        assert re.search(
            rf"^{side}: +\d+ tokens in [\d.]+ s: \d+ tokens/s, \d+ passes, [\d.]+ tokens a pass", out, re.M
        )
    assert re.search(r"writes [\d.]+ times as many tokens a second\n$", out)


def test_a_program_that_is_right(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = demo.Side.result
    monkeypatch.setattr(demo.Side, "result", lambda side: replace(result(side), text=program(HEADER)))
    assert demo.main([HEADER, "--model", str(folder / "both")]) == 0
    out = capsys.readouterr().out
    assert program(HEADER) in out and "it runs, and does what the line says" in out and "; the same text" in out


def test_a_terminal_shows_both(folder: Path) -> None:
    model = TwoTower.from_pretrained(folder / "both", progress=False)
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=90, height=12, color_system=None)
    settings = {"prompt": f"{HEADER}\n", "watched": True, "eos_token_id": None}
    sides = [demo.Side(model, mode, mode=mode, **settings) for mode in ("mask_diffusion", "ar")]
    demo.race(sides, console)
    ends = [side.result() for side in sides]
    assert [len(end.tokens) for end in ends] == [24, 24]
    assert [side.forwards for side in sides] == [end.forwards for end in ends]
    shown = terminal.getvalue()
    assert (
        "mask_diffusion" in shown
        and f"{sides[1].seconds:.2f} s, {ends[1].forwards} passes" in shown
        and "\u2591" in shown
    )
    assert all(side.seconds > 0 for side in sides)


def test_a_picture(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "race.svg"
    demo.main([HEADER, "--model", str(folder / "both"), "--svg", str(file)])
    drawing = file.read_text()
    assert drawing.startswith("<svg") and "speculative" in drawing and 'url("http' not in drawing
    assert ElementTree.fromstring(drawing).tag.endswith("svg")


def test_whoever_has_used_less_time_is_next() -> None:
    class Clock:
        def __init__(self, pass_takes: float, passes: int):
            self.seconds, self.takes, self.left = 0.0, pass_takes, passes

        @property
        def is_open(self) -> bool:
            return self.left > 0

        def step(self) -> None:
            apart = max(side.seconds for side in sides if side.is_open) - self.seconds
            assert apart >= 0
            self.seconds, self.left = self.seconds + self.takes, self.left - 1

    sides = [Clock(3.0, 5), Clock(1.0, 40)]
    demo.race(sides, Console(file=io.StringIO()))
    assert [side.seconds for side in sides] == [15, 40]


def test_what_is_drawn_was_not_in_training() -> None:
    found = [demo.drawn(seed) for seed in range(40)]
    assert {parse(header).kind for header in found} == set(KINDS)
    assert all(split_of(header) != "train" for header in [*found, demo.SPECIFICATION])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["class Invoice"], "docs/training.md"),
        ([HEADER, "--random", "1"], "--random"),
        (["--threads", "0"], "--threads"),
        ([HEADER, "--mode", "mask_diffusion", "--threshold", "2"], "confidence_threshold is 2"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_errors(arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if "--model" in arguments else ["--model", str(folder / "both")]
    try:
        code = demo.main([*arguments, *more])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2 and message in capsys.readouterr().err
