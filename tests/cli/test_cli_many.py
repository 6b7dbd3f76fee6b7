"""`twotower generate --jsonl`: many prompts, what becomes of each, and going on after an interruption."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tt_model import Engine, TwoTower
from tt_model.cli import main

LINES: list[dict[str, Any]] = [
    {"id": "a", "prompt": "def f("},
    {"prompt": "import ", "mode": "ar", "temperature": 0.7, "seed": 5},
    {"tokens": [5, 6, 7], "max_new_tokens": 3, "logprobs": True},
    {"id": 3, "prompt": "class A:", "mode": "speculative", "stop": ["\n"]},
    {"prompt": "x" * 40, "max_new_tokens": 1},
    {"prompt": "return ", "temperature": 0.4, "top_p": 0.8, "tempered": True, "strategy": "factor", "alg_temp": 0.1},
]
SHORT = ["--max-new-tokens", "8", "--temperature", "0", "--quiet"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    given = tmp_path / "in.jsonl"
    given.write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    return given, tmp_path / "out.jsonl"


def run(given: Path, out: Path, *more: str) -> int:
    return main(["generate", "--jsonl", str(given), "--output", str(out), *SHORT, *more])


def read(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_each_line_gets_what_it_would_get_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(*files, "--rows", "2") == 0
    records, model = read(files[1]), TwoTower.from_pretrained()
    assert [record.get("id") for record in records] == ["a", None, None, 3, None, None]
    for i, (line, record) in enumerate(zip(LINES, records, strict=True)):
        options = dict(max_new_tokens=8, temperature=0.0, seed=i)
        options |= {k: v for k, v in line.items() if k not in ("prompt", "tokens", "id")}
        out = model.generate(line["prompt"] if "prompt" in line else [line["tokens"]], **options)
        assert (record["text"], record["tokens"], record["nfe"]) == (out.text[0], out.tokens[0], out.nfe[0])
        assert record["finish_reason"] == out.finish_reason[0]
        assert record.get("logprobs", []) == pytest.approx(out.logprobs[0] if out.logprobs else [], abs=1e-3)
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_a_file_as_other_programs_write_it(files: tuple[Path, Path]) -> None:
    """A byte order mark, CR LF, blank lines, no newline at the end, and a line separator inside a text."""
    files[0].write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n\r\n  \n{"prompt": "c"}'.encode())
    assert run(*files) == 0 and len(read(files[1])) == 2


def test_what_is_done_is_not_done_again(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    files[0].write_text(files[0].read_text().replace('"logprobs": true', '"logprobs": false'))  # rounding differs
    assert run(*files) == 0
    whole = read(files[1])
    files[1].unlink()
    ended, told = [], Engine.__next__

    def cut(engine: Engine) -> Any:
        if len(ended) == 2:
            signal.raise_signal(signal.SIGINT)
        event = told(engine)
        ended.extend([event.request] * (event.kind == "finished"))
        return event

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "__next__", cut)
        assert run(*files, "--rows", "1") == 130
    part = files[1].with_name("out.jsonl.part")
    assert not files[1].exists() and len(part.read_text().splitlines()) == 3
    with part.open("a") as torn:
        torn.write('[4, {"text": "hal')
    submitted, submit = [], Engine.submit

    def count(engine: Engine, *args: Any, **more: Any) -> Any:
        submitted.append(args)
        return submit(engine, *args, **more)

    monkeypatch.setattr(Engine, "submit", count)
    assert run(*files, "--rows", "3") == 0
    assert read(files[1]) == whole and len(submitted) == 4 and not part.exists()


def test_what_is_half_done_is_of_this_input(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_step", fail)
        assert run(*files) == 1
    assert run(*files, "--seed", "1") == 1
    assert "out.jsonl.part: is of another input or other settings; remove it" in capsys.readouterr().err
    assert run(*files) == 0


def test_lines_that_fail_are_told_and_the_others_written(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [{"prompt": "x", "mode": "fast"}, {"tokens": []}, {"tokens": [10**6]}, {"prompt": "x", "block_size": "3"}]
    bad += [{"prompt": "x", "max_new_tokens": 10**9}, {"prompt": "x", "max_new_tokens": -1000}]
    bad += [{"prompt": "x", "mode": ["ar"]}, {"messages": []}]
    files[0].write_text("\n".join(map(json.dumps, [*bad, LINES[0]])))
    assert run(*files) == 1
    assert '8 of 9 lines failed: "error" in' in capsys.readouterr().err
    *failed, good = read(files[1])
    expected = ["mode is 'fast'", "at least one", "token id", "block_size", "context", "max_new_tokens", "mode is", ""]
    for record, words in zip(failed, expected, strict=True):
        assert words in record["error"] and list(record) == ["error"]
    assert good["tokens"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty, expected a JSON object a line"),
        ('{"prompt": "x"}\n{"prompt": ', "line 2: not valid JSON"),
        ("[1]", "line 1: expected an object with one of"),
        ('{"prompt": "x", "tokens": [4]}', "line 1: expected an object with one of"),
        ('{"prompt": "\udcff"}', "not UTF-8 text: invalid start byte at byte 12"),
        ('{"prompt": 3}', 'line 1: "prompt" is 3, expected a text'),
        ('{"tokens": "5 6"}', "line 1: \"tokens\" is '5 6', expected a list of token ids"),
        (r'{"prompt": "\ud800"}', "line 1: not valid JSON"),
        ("[" * 100_000, "line 1: not valid JSON"),
        ('{"prompt": "x", "topk": 4}', 'line 1: "topk" is none of'),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    files: tuple[Path, Path], text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files[0].write_bytes(text.encode(errors="surrogateescape"))
    assert run(*files) == 1
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not files[1].exists()


def test_nothing_else_is_overwritten(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    given, out = files
    before = given.read_text()
    assert run(given, given) == 1 and "would overwrite the prompts" in capsys.readouterr().err
    named = given.rename(given.with_name("out.jsonl.part"))
    assert run(named, out) == 1 and "would overwrite the prompts" in capsys.readouterr().err
    assert named.read_text() == before
    named.rename(given)
    for other in ("notes", "notes\n", '{"of": "another"}\n', "\xff\n"):
        part = given.with_name("out.jsonl.part")
        part.write_bytes(other.encode("latin-1"))
        assert run(given, out) == 1
        assert "out.jsonl.part: is of another input or other settings" in capsys.readouterr().err
        assert part.read_bytes() == other.encode("latin-1") and not out.exists()


def test_a_slip_leaves_nothing_behind(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Of what is refused before the first line is done."""
    assert run(*files, "--model", str(tmp_path / "nowhere")) == 1
    assert run(*files, "--tokenizer", str(tmp_path)) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}
    assert run(*files) == 0


def test_options_that_do_not_go_together(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--jsonl", str(files[0])]) == 1
    assert "--jsonl: needs --output" in capsys.readouterr().err
    for more, words in (
        (["--json"], "--json"),
        (["--watch"], "--watch"),
        (["--trace", "t"], "--trace"),
        (["x"], "a prompt"),
    ):
        assert run(*files, *more) == 1
        assert f"does not go with {words}" in capsys.readouterr().err
    assert run(*files, "--compile") == 1
    assert "--compile: passes of one row are compiled, not of 16: expected --rows 1" in capsys.readouterr().err
    assert main(["generate", "--rows", "3", "x"]) == 1
    assert "--rows: is for the prompts of --jsonl FILE" in capsys.readouterr().err
