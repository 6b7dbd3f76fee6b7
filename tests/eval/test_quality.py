"""Quality by execution: a perfect writer and broken ones, programs that never end, and what the intervals are."""

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from boilerplate import boilerplate_models

from bench import report
from eval import execute, quality
from eval.intervals import Estimate, quotient, ratio, wilson
from eval.resume import Parts
from tt_model.training.boilerplate import KINDS, parse, program, split_of

HEADER = "# class Invoice: number int, paid bool"


class Perfect:
    """An engine that answers with the program, at a pass for four tokens; in AR one a token."""

    def __init__(self) -> None:
        self.waiting: list[SimpleNamespace] = []

    def answer(self, header: str, mode: str) -> str:
        return program(header)

    def submit(self, prompt: str, *, mode: str, **settings: object) -> SimpleNamespace:
        assert prompt.endswith("\n") and settings["max_new_tokens"]
        text = self.answer(prompt.removesuffix("\n"), mode)
        passes = len(text) if mode == "ar" else -(-len(text) // 4)
        nfe = 0 if mode == "ar" else passes
        result = SimpleNamespace(text=text, tokens=[*text], nfe=nfe, forwards=passes, finish_reason="eos")
        self.waiting.append(SimpleNamespace(result=lambda: result))
        return self.waiting[-1]

    def __iter__(self) -> Iterator[SimpleNamespace]:
        while self.waiting:
            time.sleep(0.001)
            yield SimpleNamespace(kind="finished", request=self.waiting.pop())


class Broken(Perfect):
    """The same, which by diffusion forgets a line in every second header."""

    def answer(self, header: str, mode: str) -> str:
        text = program(header)
        return text.replace("\n    ", "\n    )", 1) if mode != "ar" and len(header) % 2 else text


def measured(engine: Perfect, count: int = 24) -> dict[str, dict[str, Estimate]]:
    headers = quality.held_out("headers", count)
    arms, told = quality.arms_of((0.5, 0.9)), []
    found = quality.write_all(engine, headers, arms, 5, 700, lambda: told.append(1))
    assert len(told) == count * len(arms) and all(len(b.written) <= 5 for b in found["AR"])
    wrong = quality.verdicts(b for batches in found.values() for b in batches)
    return {name: quality.figures(batches, found["AR"], wrong) for name, batches in found.items()}


def test_a_perfect_writer_is_found_perfect() -> None:
    found = measured(Perfect(), 16)
    assert list(found) == ["AR", "diffusion 0.5", "diffusion 0.9", "speculative"]
    for name, arm in found.items():
        assert arm["exact"] == arm["runs"] == wilson(16, 16) and arm["kept"] == (1, 1, 1), name
    assert found["AR"]["tokens_per_forward"] == (1, 1, 1) == found["AR"]["times_ar"]
    value, low, high = found["diffusion 0.5"]["tokens_per_forward"]
    assert 3.9 < low <= value <= high <= 4
    assert found["diffusion 0.5"]["passes"].value == pytest.approx(found["AR"]["passes"].value / 4, rel=0.01)
    assert all(arm["tokens_per_s"].value > 0 for arm in found.values())


def test_what_is_broken_neither_is_exact_nor_runs() -> None:
    headers = quality.held_out("headers", 24)
    right = sum(len(header) % 2 == 0 for header in headers)
    found = measured(Broken())
    assert found["AR"]["exact"].value == 1 and 0 < right < 24
    for name in ("diffusion 0.5", "speculative"):
        assert found[name]["exact"] == found[name]["runs"] == wilson(right, 24)
        assert found[name]["kept"].value == right / 24 and found[name]["as_ar"] == wilson(right, 24)


def test_what_does_not_end_is_not_exact() -> None:
    written = quality.Written(HEADER, program(HEADER), True, 5, 2, 3)
    assert written.exact and written.per == 2
    assert not written._replace(ended=False).exact
    assert not written._replace(text=program(HEADER) + "\n").exact


def test_specifications_are_held_out_and_of_every_kind() -> None:
    for split in ("headers", "words", "pairs", "orders"):
        found = quality.held_out(split, 16)
        assert len(set(found)) == 16 and {split_of(header) for header in found} == {split}
        assert found == quality.held_out(split, 16) != quality.held_out(split, 16, seed=1)
    assert {parse(header).kind for header in quality.held_out("headers", 8)} == set(KINDS)


def test_a_stopped_run_goes_on_with_the_next_batch(tmp_path: Path) -> None:
    headers, arms = quality.held_out("headers", 12), quality.arms_of((0.5,), rules=("static=4",))
    assert [arm.name for arm in arms] == ["AR", "diffusion 0.5", "static 4", "speculative"]
    file, told = tmp_path / "parts.json", []

    def write(rows: int = 5, stop: int = 10**9) -> dict[str, list[quality.Batch]]:
        def advance() -> None:
            told.append(1)
            if len(told) == stop:
                raise KeyboardInterrupt

        parts = Parts(file, {"rows": rows, "arms": arms})
        return quality.write_all(Broken(), headers, arms, rows, 700, advance, parts)

    with pytest.raises(KeyboardInterrupt):
        write(stop=33)  # in the third batch of the second turn
    kept = json.loads(file.read_text())["parts"]
    assert len(kept) == 6 and list(tmp_path.iterdir()) == [file]
    told.clear()
    found = write()
    assert len(told) == len(headers) * len(arms) - 30
    assert found["AR"][0].seconds == kept["AR: 0"][1]
    fresh = quality.write_all(Broken(), headers, arms, 5, 700, lambda: None)
    assert {name: [b.written for b in batches] for name, batches in found.items()} == {
        name: [b.written for b in batches] for name, batches in fresh.items()
    }
    told.clear()
    assert write() == found and told == []
    with pytest.raises(ValueError, match="of a measurement with other rows: remove it"):
        write(rows=4)


# ---- in a process of its own ----


def test_programs_run_in_a_process() -> None:
    some = quality.held_out("words", 8)
    assert set(execute.run_all((header, program(header)) for header in some).values()) == {""}


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("while True:\n    pass\n", "ended early: SIG|more than 3 s"),
        ("import time\ntime.sleep(60)\n", "more than 3 s"),
        ("x = bytearray(1 << 32)\n", "MemoryError"),
        ("x = [0]\nwhile True:\n    x += x\n", "MemoryError"),
        ("def f():\n    f()\nf()\n", "RecursionError"),
        ("import os\nos._exit(0)\n", "ended early: status 0"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("import socket\nsocket.socket()\n", "socket"),
        ("import os\nos.system('true')\n", "os.system is refused"),
        ("import subprocess\nsubprocess.run(['true'])\n", "is refused"),
        ("open('big', 'w').write('x' * 10000000)\n", "OSError"),
        ("class Invoice:\n", "IndentationError"),
        ("x = 1\n", "KeyError"),
        ("print('ok')\nraise ValueError('no')\n", "ValueError: no"),
        ("\0", "null bytes"),
        ("\udc80", "surrogates"),
    ],
)
def test_limits(code: str, complaint: str) -> None:
    assert re.search(complaint, execute.run(HEADER, code, seconds=1, megabytes=256))


def test_nothing_is_written_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert "outside the folder" in execute.run(HEADER, f"open({str(file)!r}, 'w')\n")
    assert not file.exists()
    assert execute.run(HEADER, program(HEADER) + "open('here', 'w').write('x')\n") == ""
    assert not Path("here").exists()


# ---- intervals ----


def test_wilson() -> None:
    assert wilson(8, 10) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)  # Newcombe's (1998) formula by hand
    assert wilson(0, 10) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert wilson(10, 10)[1:] == pytest.approx((0.7225, 1), abs=1e-4)
    assert math.isnan(wilson(0, 0).value)


def test_bootstrap() -> None:
    draws = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).add(5).tolist()
    value, low, high = ratio(draws)
    assert value == pytest.approx(sum(draws) / 400) and low < value < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert ratio(draws) == ratio(draws)
    assert ratio([2.0, 4.0], [1.0, 2.0]) == (2, 2, 2)
    assert quotient([2, 4], [1, 2], [1, 2], [1, 2]) == (2, 2, 2)
    assert math.isnan(ratio([1.0, 1.0], [0.0, 0.0]).value) and math.isnan(ratio([]).value)
    assert Estimate(0.5, 0.25, 0.75).text(1, True) == "50.0 % (25.0-75.0)"


# ---- the command ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    boilerplate_models(folder := tmp_path_factory.mktemp("models"))
    return folder


def test_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.measure.RESULTS", tmp_path / "results")
    monkeypatch.setenv("TT_COMMIT", "0123456789ab")
    size = ["--specifications", "2", "--rows", "3", "--new-tokens", "6", "--thresholds", "0.5", "0.99"]
    more = [
        "--split",
        "headers",
        "orders",
        "--plot",
        str(tmp_path / "plot.png"),
        "--texts",
        str(tmp_path / "texts.jsonl"),
    ]
    more += ["--resume", str(tmp_path / "parts.json"), "--rules", "margin:factor=1"]
    assert quality.main(["--model", str(folder / "both"), *size, *more, "--record"]) == 0
    out = capsys.readouterr().out
    for words in (
        "| diffusion 0.99 ",
        "| speculative ",
        "| margin factor 1 ",
        "tokens/s",
        "| headers | ",
        "times AR",
        "0.0 % (0.0-49.0)",
    ):
        assert words in out, words
    texts = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == 5 * 4 and all(line["wrong"] and not line["exact"] for line in texts)
    assert quality.main(["--model", str(folder / "one"), *size, "--resume", str(tmp_path / "parts.json")]) == 2
    assert "is of a measurement with other model, " in capsys.readouterr().err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (file,) = (tmp_path / "results").iterdir()
    line = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is recorded"))
    assert line["kind"] == "quality" and len(line["arms"]) == 5 and "texts" not in line
    assert report.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path)]) == 0
    assert "| diffusion 0.99 " in (tmp_path / "SPEED.md").read_text()


def test_a_model_without_a_denoiser(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--specifications", "2", "--new-tokens", "4"]
    assert quality.main(["--model", str(folder / "one"), *size, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["arms"]) == ["AR"] and "kept" not in found["arms"]["AR"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--thresholds", "2"], "confidence_threshold is 2"),
        (["--rules", "sure=4"], "--rules has 'sure=4': expected [CONFIDENCE:]STRATEGY=NUMBER"),
        (["--rules", "static=x"], "--rules has 'static=x': expected"),
        (["--new-tokens", "100000"], "exceed the model's context"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(["--model", str(folder / "both"), "--specifications", "1", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and message in error[0]
