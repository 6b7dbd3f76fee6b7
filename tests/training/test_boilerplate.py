"""Boilerplate: programs depend on headers alone, run, and are formatted; splits are apart; a corpus is resumable."""

import builtins
import importlib.util
import json
import keyword
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval import execute, exercise
from tt_model.training import boilerplate, data
from tt_model.training.boilerplate import KINDS, SPLITS, corpus, parse, program, specification, split_of, words
from tt_model.training.boilerplate.grammar import keeps
from tt_model.training.boilerplate.sampling import names_of

SAMPLE = {
    "# class Invoice by total: number int, total float, customer str?, paid bool = False": "class Invoice:",
    "# dataclass Window frozen: width int > 0, title str <= 20, tags list = []": "@dataclass(frozen=True)",
    "# tests Invoice: number int, paid bool, note str?": "    assert made.note is None",
    "# table city by region: region str, size float = 1.5, open_year int": "    size REAL NOT NULL DEFAULT 1.5,",
    "# csv order_item: number int, paid bool, note str?": '        "paid": row["paid"] == "yes",',
    "# command resize_image: width int, size_ratio float = 0.5, verbose bool": '    print("verbose:", args.verbose)',
    "# enum Color flag: RED, DARK_GREEN, BLUE": "    DARK_GREEN = 2",
    "# machine Door: open shut -> ajar, close ajar -> shut": '        ("shut", "open"): "ajar",',
}


def headers(count: int, split: str = "train", seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    kinds = [kind for kind in KINDS if split != "orders" or kind in boilerplate.grammar.TYPED]
    return [specification(rng, split, kinds[i % len(kinds)]) for i in range(count)]


def used(header: str, code: str) -> None:
    """Execute a program here, and use it."""
    task = json.loads(json.dumps(execute.task_of(header)), object_hook=lambda found: SimpleNamespace(**found))
    exercise.exercise(task, code)


def fails(header: str, code: str) -> bool:
    try:
        used(header, code)
    except (Exception, SystemExit):
        return True
    return False


# ---- specifications and programs ----


@pytest.mark.parametrize(("header", "line"), SAMPLE.items())
def test_a_header_says_its_program(header: str, line: str) -> None:
    assert str(parse(header)) == header
    assert line in program(header).splitlines()
    used(header, program(header))


def test_every_program_does_what_its_header_says() -> None:
    for split in SPLITS:
        for header in headers(80, split):
            used(header, program(header))


def test_the_same_seed_gives_the_same_headers() -> None:
    assert headers(50) == headers(50) != headers(50, seed=1)
    assert corpus.document(7) == corpus.document(7) != corpus.document(8)


def test_programs_do_not_depend_on_anything_else() -> None:
    """Another process, with another hash seed and after other calls, writes the same."""
    source = (
        "import sys; from tt_model.training.boilerplate import program\n"
        "sys.stdout.write('\\0'.join(program(header) for header in reversed(sys.argv[1:])))"
    )
    some = headers(16, seed=3)
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", source, *some]
    root = Path(boilerplate.__file__).parents[3]
    out = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    assert out.split("\0")[::-1] == [program(header) for header in some]


def test_every_part_of_a_header_counts() -> None:
    """Without an item, a type, a default, a rule or a modifier the program is another."""
    for header in headers(400, seed=4):
        for part in (r", [^,]+$", r" = [^,]+", r" (?:>|>=|<=) \d+", r"\?", r" (?:int|flag|frozen)(?=:)", r" by \w+"):
            if (less := re.sub(part, "", header, count=1)) != header and (": " in less):
                try:
                    other = program(less)
                except ValueError:
                    continue
                assert other != program(header), (header, less)
        for one, two in (("int", "float"), ("str", "int"), ("bool", "str"), ("list", "str")):
            less = re.sub(rf" {one}(?=,|$)", f" {two}", header, count=1)
            if less != header:
                assert program(less) != program(header), (header, less)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "def f():",
        "# class Invoice",
        "# class Invoice: ",
        "# class Invoice: number integer",
        "# class Invoice: number int,paid bool",
        "# class Invoice: number int, paid bool ",
        "# class Invoice by total: number int",
        "# struct Invoice: number int",
        "# enum Color: RED int",
        "# enum Color by RED: RED, GREEN",
        "# enum Color: red, green",
        "# machine Door: open shut",
        "# class Invoice: note str?, number int",
        "# class Invoice: number int, number str",
        "# class Invoice frozen: number int",
        "# class Invoice: number int > 0",
        "# class invoice: number int",
        "# class Invoice: number int, paid bool = 3",
        "# table Order: number int",
        "# table city: names list",
        "# csv city: number int, size int?",
        "# dataclass Window: width int > 5, height int > 5 = 3",
        "# command scan: paid bool?",
        "# enum Color: RED, RED",
        "# machine Door: open shut -> ajar\n",
    ],
)
def test_another_text_is_no_specification(text: str) -> None:
    with pytest.raises(ValueError, match="no specification"):
        program(text)


def test_defaults_keep_their_rules() -> None:
    found = [f for h in headers(600, seed=5) for f in parse(h).fields if f.rule and f.default is not None]
    assert len(found) > 5 and all(keeps(field, field.value) for field in found)


def test_the_page_shows_what_is_written() -> None:
    page = Path(__file__).parents[2] / "docs" / "training.md"
    samples = re.findall(r"^```\n(# .+)\n((?:.*\n)+?)```", page.read_text(), re.MULTILINE)
    assert {parse(header).kind for header, _ in samples} == set(KINDS)
    assert [code for _, code in samples] == [program(header) for header, _ in samples]
    known = {*words.NOUNS, *words.ADJECTIVES, *words.VERBS}
    assert f"{len(known)} English words" in page.read_text() and f"{len(words.UNSEEN)} words that" in page.read_text()


# ---- what they look like ----


def test_programs_are_formatted(tmp_path: Path) -> None:
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("ruff is not installed")
    for i, header in enumerate(headers(160, seed=6)):
        (tmp_path / f"{i}.py").write_text(program(header))
    ruff = [sys.executable, "-m", "ruff"]
    for width in ("88", "120"):
        command = [*ruff, "format", "--diff", "--isolated", "--no-cache", "--line-length", width, str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout[:2000] + found.stderr[-500:]
    lint = [*ruff, "check", "--isolated", "--no-cache", "--select", "E,F,W,I", "--line-length", "88", str(tmp_path)]
    found = subprocess.run(lint, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[:2000]


def test_programs_are_short() -> None:
    texts = [corpus.document(i) for i in range(800)]
    programs = [text.partition("\n")[2] for text in texts]
    assert max(len(line) for text in programs for line in text.splitlines()) <= 88
    tokenizer = data.train_tokenizer(texts, 1024)
    lengths = sorted(len(tokenizer.encode(text).ids) for text in texts)
    assert lengths[400] < 250 and lengths[-1] < 700
    assert Counter(parse(text.partition("\n")[0]).kind for text in texts).keys() == set(KINDS)


def test_words_can_be_names() -> None:
    known = {*words.NOUNS, *words.ADJECTIVES, *words.VERBS}
    reserved = {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), *sys.stdlib_module_names}
    assert not known & reserved
    assert not {*words.VERBS} & {"fire", "state"}  # names of every machine
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in known)
    assert words.plural("city") == "cities" and words.plural("tray") == "trays" and words.plural("box") == "boxes"
    assert words.snake(words.camel("dark_room")) == "dark_room"
    assert 15 <= len(words.UNSEEN) <= 40
    samples = (corpus.document(i).partition("\n")[2] for i in range(200))
    written = {word for text in samples for word in re.findall("[a-z]+", text)}
    assert not words.UNSEEN & written, "programs themselves have them: a token of its own, never copied in training"
    rng = random.Random(0)
    made = {words.made_up(rng, words.NOUNS) for _ in range(3000)}
    assert len(made) > 2500 and not made & (known | set(keyword.kwlist) | set(dir(builtins)))
    assert all(re.fullmatch("[a-z]{4,8}", word) for word in made)


def test_names_of_made_up_words() -> None:
    """A part of the words is made up, and a program of them does what it should: also those that SQL reads."""
    train = [parse(header) for header in headers(400, seed=9)]
    found = [word for spec in train for name in names_of(spec) for word in name.split("_")]
    known = {*words.NOUNS, *words.ADJECTIVES, *words.VERBS}
    assert 0.1 < sum(word not in known for word in found) / len(found) < 0.3
    for made_up, least, most in ((0, 0, 0), (0.5, 0.35, 0.65), (1, 1, 1)):  # unseen words stay in their own split
        some = [parse(specification(random.Random(i), made_up=made_up)) for i in range(100)]
        found = [word for spec in some for name in names_of(spec) for word in name.split("_")]
        assert least <= sum(word not in known for word in found) / len(found) <= most


# ---- tokens ----


def test_a_word_is_the_same_token_wherever_it_stands():
    text = 'order.order = order("order", -order)\n    order_item[order] += [order]\nreturn order\n'
    tokenizer = data.train_tokenizer([text] * 9, 300, "words")
    (order,) = tokenizer.encode("order").ids
    assert tokenizer.encode(text).ids.count(order) == text.count("order")
    assert tokenizer.encode("OrderItem").tokens == [*tokenizer.encode("Order").tokens, *tokenizer.encode("Item").tokens]
    with pytest.raises(ValueError, match="pieces is 'letters'"):
        data.train_tokenizer([text], 300, "letters")


# ---- splits ----


def test_splits_share_no_header() -> None:
    found = {split: headers(300, split, seed=7) for split in SPLITS}
    for split, mine in found.items():
        assert {split_of(header) for header in mine} == {split}
    assert sum(len(set(mine)) for mine in found.values()) == len(set().union(*map(set, found.values())))


def test_training_has_nothing_that_is_held_out() -> None:
    """A word, a pair of words, an order of types that the held-out splits are about is in no training header."""
    train = [parse(header) for header in headers(3000, seed=8)]
    names = {name for spec in train for name in names_of(spec)}
    seen = {word for name in names for word in name.split("_")}
    orders = {tuple(field.type for field in spec.fields) for spec in train}
    known = {*words.NOUNS, *words.ADJECTIVES, *words.VERBS} - words.UNSEEN
    assert not seen & words.UNSEEN
    assert len(seen & known) > 0.95 * len(known)
    for header in headers(300, "words", seed=8):
        assert any({*name.split("_")} & words.UNSEEN for name in names_of(parse(header)))
    for header in headers(300, "pairs", seed=8):
        mine = names_of(parse(header))
        assert any(name not in names and "_" in name for name in mine)
        assert not any(words.is_held(name) for name in names) and any(map(words.is_held, mine))
    for header in headers(300, "orders", seed=8):
        assert tuple(field.type for field in parse(header).fields) not in orders


def test_unknown_splits_and_kinds_are_refused() -> None:
    for arguments in (("held",), ("train", "struct"), ("orders", "enum")):
        with pytest.raises(ValueError, match="kind is"):
            specification(random.Random(0), *arguments)


# ---- drivers ----


def test_drivers_notice_a_missing_line() -> None:
    for header in headers(24, seed=9):
        lines = program(header).splitlines(keepends=True)
        for i, line in enumerate(lines):
            if line.strip():
                without = "".join(lines[:i] + lines[i + 1 :])
                # bool() of False, and a module that stands in annotations only, which Python 3.14 does not look at.
                same = re.fullmatch(r"\s+\w+=bool\(.*False\)\),\n|import sqlite3\n", line)
                assert same or fails(header, without), (header, line)


@pytest.mark.parametrize(
    ("kind", "old", "new"),
    [
        ("class", "int(", "str("),
        ("class", " < ", " <= "),
        ("dataclass", ' must be > 0")\n', ""),
        ("dataclass", " <= ", " < "),
        ("dataclass", "frozen=True", "frozen=False"),
        ("tests", " == 1", " != 2"),
        ("tests", " is True", " is not None"),
        ("table", "INTEGER NOT", "REAL NOT"),
        ("table", " NOT NULL", ""),
        ("table", "DEFAULT 1.5", "DEFAULT 2.5"),
        ("csv", '"yes"', '"true"'),
        ("csv", "int(", "float("),
        ("command", "type=int", "type=float"),
        ("command", "0.5", "0.25"),
        ("command", "store_true", "store_false"),
        ("enum", "= 4", "= 3"),
        ("enum", ".upper()", ""),
        ("machine", '"ajar"', '"open"'),
        ("machine", "ValueError", "KeyError"),
    ],
)
def test_drivers_notice_a_wrong_piece(kind: str, old: str, new: str) -> None:
    (header,) = (header for header in SAMPLE if header.split()[1] == kind)
    code = program(header)
    assert old in code and fails(header, code.replace(old, new, 1)), code


# ---- the corpus ----


def write(out: Path, **more: object) -> list[str]:
    arguments = [f"--{name}={value}" for name, value in more.items()]
    assert corpus.main(["--out", str(out), "--quiet", *arguments]) == 0
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def test_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(corpus, "OF_A_FILE", 20)
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for i in range(100):
        (source / f"{i}.py").write_text(f"value_{i} = {i}\n" * 20)
    size = dict(documents=50, seed=3, python=0.25, source=source)
    files = write(out, **size)
    assert files == [
        "boilerplate-000.jsonl",
        "boilerplate-001.jsonl",
        "boilerplate-002.jsonl",
        "corpus.json",
        "python.jsonl",
    ]
    texts = data.load_texts(out, "train", held_out=0)
    mine = [text for text in texts if text.startswith("# ")]
    assert mine == [corpus.document(i, seed=3) for i in range(50)]
    real = [text for text in texts if text not in mine]
    assert real and set(real) <= set(data.load_texts(source, "train"))
    assert 0.2 < sum(map(len, real)) / sum(map(len, texts)) <= 0.25

    before = {name: (out / name).read_bytes() for name in files}
    stamps = {name: (out / name).stat().st_mtime_ns for name in files}
    (out / "boilerplate-001.jsonl").unlink()  # as if it had been stopped
    assert write(out, **size) == files and {name: (out / name).read_bytes() for name in files} == before
    again = {name for name in files if (out / name).stat().st_mtime_ns != stamps[name]}
    assert again == {"boilerplate-001.jsonl"}

    for other in ({"seed": 4}, {"documents": 60}, {"python": 0.5}):
        with pytest.raises(SystemExit):
            write(out, **{**size, **other})
        assert f"other {next(iter(other)).replace('python', 'python_share')}" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [{"documents": 0}, {"python": 1}, {"source": "no/such/folder"}])
def test_what_no_corpus_can_be_is_refused(bad: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        write(tmp_path / "out", **{"documents": 5, **bad})
    assert "error" in capsys.readouterr().err
