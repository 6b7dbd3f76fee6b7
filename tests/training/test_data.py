"""tt_model/training/data.py: the tokenizer loses nothing, the split is stable, batches are pure and know boundaries."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tt_model.training import data
from tt_model.vocabulary import load_tokenizer

ASSETS = Path(data.__file__).parents[1] / "assets"
CODE = 'def f(x):\n    """Doc."""\n    if x:\n        return self._f(x, a=[1, 2])\n\n\nclass A:\n    pass\n'


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ASSETS)


@pytest.fixture
def corpus(tmp_path):
    """40 small files in nested folders, and things that are not part of a corpus."""
    root = tmp_path / "corpus"
    for i in range(40):
        path = root / f"part{i % 3}" / f"file{i:02d}.{'py' if i % 2 else 'txt'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# file {i}\n" + CODE * (1 + i % 4), encoding="utf-8")
    for name in ("part0/notes.md", ".hidden/a.py", "part0/__pycache__/a.py"):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("left out", encoding="utf-8")
    return root


def make_rows(lengths, row_length):
    """Rows over a stream whose token at position p is p."""
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return data.Rows(torch.arange(int(starts[-1]), dtype=torch.int32), starts, row_length)


# Tokenizer


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\r\n\t  \n \r x\u00a0\u2028\x00e\u0301\U0001f600")
@example("a <mask> b<eos><pad><bos>")
@example(CODE)
def test_tokenizer_round_trip(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert all(4 <= i < tokenizer.get_vocab_size() for i in ids)  # never a special token


TRUNCATION = {"direction": "Right", "max_length": 33, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 4000},
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


def carrying(folder, *, bom=False, dropout=None, **carried):
    """The bundled tokenizer in a folder, its file carrying what some earlier use of it left there."""
    values = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8")) | carried
    values["model"]["dropout"] = dropout
    text = json.dumps(values, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    return folder


@pytest.mark.parametrize(
    "carried",
    [
        dict(truncation=TRUNCATION),
        dict(padding=PADDING),
        dict(padding=PADDING | {"strategy": "BatchLongest"}),
        dict(dropout=0.5),
        dict(truncation=TRUNCATION, padding=PADDING, dropout=0.1, bom=True),
    ],
)
def test_what_a_tokenizer_file_carries_does_not_change_a_text(tokenizer, tmp_path, carried):
    loaded = load_tokenizer(carrying(tmp_path, **carried))
    assert len(tokenizer.encode(CODE * 40).ids) > 800
    for text in (CODE * 40, "x", "", "a <mask> b<eos>"):
        assert loaded.encode(text).ids == tokenizer.encode(text).ids
    rows = [[e.ids for e in t.encode_batch_fast([CODE * 40, "x", ""])] for t in (loaded, tokenizer)]
    assert rows[0] == rows[1]
    documents = [data.encode_documents(["x", CODE], t, bos=1, eos=2, block_size=4) for t in (loaded, tokenizer)]
    assert torch.equal(documents[0][0], documents[1][0])


def test_added_tokens_that_are_not_special_stay_tokens(tokenizer, tmp_path):
    added = json.loads((ASSETS / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    word = dict(added[0], id=2048, content="twotower", special=False)
    loaded = load_tokenizer(carrying(tmp_path, added_tokens=[*added, word]))
    assert 2048 in loaded.encode("a twotower <mask>").ids and 3 not in loaded.encode("a twotower <mask>").ids


def test_tokenizers_that_cannot_be_read(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for text, message in (
        (pointer, "json: a git-LFS pointer, .*`git lfs pull`"),
        ("{}", "is not a tokenizer"),
        ("", "is not"),
    ):
        (tmp_path / "tokenizer.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not a tokenizer that can be read"):
        load_tokenizer(tmp_path)


def test_bundled_tokenizer(tokenizer):
    assert tokenizer.get_vocab_size() == 2048
    assert [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS] == [0, 1, 2, 3]
    for piece in ("\n        ", "def", "self", "return", "order"):
        assert len(tokenizer.encode(piece).ids) == 1, piece
    assert len(CODE.encode()) / len(tokenizer.encode(CODE).ids) > 2.0


def test_train_tokenizer_is_deterministic_and_lossless():
    texts = [CODE, "naïve café\n", "x = 1\n" * 5]
    first, second = data.train_tokenizer(texts, 300), data.train_tokenizer(texts, 300)
    assert first.to_str() == second.to_str()
    assert 260 < first.get_vocab_size() <= 300
    assert first.decode(first.encode("日本 <eos>\n").ids) == "日本 <eos>\n"


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\r\n\t  \n \r x\u00a0\u2028\x00e\u0301\U0001f600")
@example('HTTPServer_x2__y = OrderItem( "a  b" )  \n')
@example(CODE)
def test_words_round_trip(text):
    tokenizer = data.train_tokenizer([CODE], 300, "words")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_saved_tokenizer_is_the_trained_one(tmp_path, corpus, capsys):
    out = tmp_path / "new" / "tokenizer.json"
    assert data.main(["--source", str(corpus), "--vocab-size", "290", "--out", str(out)]) == 0
    assert "bytes/token" in capsys.readouterr().out
    trained = data.train_tokenizer(data.load_texts(corpus, "train"), 290)
    loaded = load_tokenizer(out.parent)
    for text in (CODE, "<mask>"):
        assert loaded.encode(text).ids == trained.encode(text).ids
    with pytest.raises(SystemExit):
        data.main(["--source", str(corpus), "--vocab-size", "10", "--out", str(out)])
    assert "vocab_size is 10" in capsys.readouterr().err


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"not": "a tokenizer"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="vocab_size is 259: expected at least 260"):
        data.train_tokenizer([CODE], 259)


# Corpus


def test_text_files_are_sorted_and_chosen(corpus):
    files = data.text_files(str(corpus))
    names = [path.relative_to(corpus).as_posix() for path in files]
    assert names == sorted(names) and len(names) == 40
    assert data.text_files(files[3]) == [files[3]]


def test_stdlib_is_code_only():
    files = data.text_files("stdlib")
    root = Path(data.sysconfig.get_paths()["stdlib"])
    names = {path.relative_to(root).as_posix() for path in files}
    assert {"argparse.py", "asyncio/tasks.py", "json/decoder.py", "encodings/__init__.py"} <= names
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "cp437.py", "__pycache__"}
    assert not any(name.startswith("_sysconfigdata") for name in names)  # holds paths of one machine
    assert 5e6 < sum(path.stat().st_size for path in files) < 30e6


def test_split_depends_on_relative_path_only(corpus, tmp_path):
    files = data.text_files(corpus)
    train, held = data.split_files(files, corpus, 0.3)
    assert sorted(train + held) == sorted(files) and train and held
    mixed = random.Random(0).sample(files, len(files))
    assert data.split_files(mixed, corpus, 0.3) == (train, held)
    assert data.split_files(held[:1], corpus, 0.3) == ([], held[:1])
    moved = corpus.rename(tmp_path / "elsewhere")
    assert data.split_files(data.text_files(moved), moved, 0.3)[1] == [
        moved / path.relative_to(corpus) for path in held
    ]


def test_split_fraction_grows_by_inclusion():
    files = [Path(f"r/{i}.py") for i in range(4000)]
    small, large = (set(data.split_files(files, Path("r"), f)[1]) for f in (0.05, 0.2))
    assert small < large
    assert 120 < len(small) < 280 and 700 < len(large) < 900  # five standard deviations or more
    assert data.split_files(files, Path("r"), 0.0)[1] == []


def test_split_is_fixed_for_ever():
    names = [f"{i}.py" for i in range(60)]
    held = data.split_files([Path(name) for name in names], Path(), 0.05)[1]
    assert [path.name for path in held] == ["27.py", "35.py", "43.py", "46.py", "8.py"]  # sorted as text


def test_files_that_are_not_utf8(corpus):
    (corpus / "bad.py").write_bytes(b"x = '\xff'\n")
    with pytest.warns(UserWarning, match="1 of 41 files .* not UTF-8"):
        texts = data.load_texts(corpus, "train", held_out=0.0)
    assert len(texts) == 40
    with pytest.raises(ValueError, match="is not UTF-8"):
        data.load_texts(corpus / "bad.py", "train")


def test_single_file_is_split_at_a_line(tmp_path):
    path = tmp_path / "one.log"
    path.write_text("".join(f"line {i}\n" for i in range(100)), encoding="utf-8")
    (train,), (held,) = data.load_texts(path, "train", 0.1), data.load_texts(path, "held_out", 0.1)
    assert train + held == path.read_text(encoding="utf-8")
    assert held.startswith("line ") and 9 <= held.count("\n") <= 12


def test_json_lines_are_documents(tmp_path):
    """The "text" of each line, nested folders and single files alike; a line's side depends on its place alone."""
    lines = [json.dumps({"id": i, "text": f"text\n{i} \u2028 ü"}, ensure_ascii=False) for i in range(200)]
    path = tmp_path / "corpus" / "deep" / "a.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\ufeff" + "\r\n".join(lines[:100]) + "\n\n" + "\n".join(lines[100:]), encoding="utf-8", newline="")
    (tmp_path / "corpus" / "b.py").write_text("b = 1\n")
    for source, more in ((tmp_path / "corpus", {"b = 1\n"}), (path, set())):
        train, held = (data.load_texts(source, split, 0.2) for split in data.SPLITS)
        assert {*train, *held} == {f"text\n{i} \u2028 ü" for i in range(200)} | more
        assert len(train) + len(held) == 200 + len(more) and 20 < len(held) < 60
        assert data.load_texts(source, "train", 0.0)[:100] == [f"text\n{i} \u2028 ü" for i in range(100)] or more
    path.write_text(path.read_text(encoding="utf-8") + '\n{"text": "one more"}\n', encoding="utf-8")
    assert set(held) <= set(data.load_texts(path, "held_out", 0.2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ('"a"', "no object, expected an object"),
        ('{"data": {"text": "a"}, "n": 1}', "an object with 'data', 'n', expected"),
        ('{"text": ["a"]}', "expected an object with a string"),
        ('{"text": null}', "expected an object with a string"),
        ('{"text": "\\ud800"}', "half a character"),
    ],
)
def test_json_lines_are_checked(tmp_path, line, message):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jsonl").write_text('{"text": "fine"}\n\n' + line + "\n")
    for source in (tmp_path, tmp_path / "a" / "x.jsonl"):
        with pytest.raises(ValueError, match=rf"x\.jsonl:3: .*{message}"):
            data.load_texts(source, "train", 0.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: data.text_files(p / "none"), "source is '.*none', which does not exist"),
        (lambda p: data.text_files(p), r"source is .* a folder without any \.py, \.txt, \.jsonl file"),
        (lambda p: data.split_files([], p, 1.0), "held_out is 1.0"),
        (lambda p: data.load_texts("stdlib", "test"), "split is 'test': expected one of train, held_out"),
        (lambda p: data.encode_documents([], None, bos=1, eos=2, block_size=0), "block_size is 0"),
        (lambda p: make_rows([16, 16], 48), "the corpus has 32 tokens: expected at least one row, row_length=48"),
        (lambda p: make_rows([16], 0), "row_length is 0"),
        (lambda p: make_rows([16], 16).batch(-1, 1, seed=0), "step is -1"),
        (lambda p: make_rows([16], 16).batch(0, 0, seed=0), "batch_size is 0"),
        (lambda p: data.load_rows(p, None, row_length=40, block_size=16), "expected a multiple of block_size=16"),
    ],
)
def test_errors(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_blank_corpus(tmp_path):
    (tmp_path / "a.py").write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="train split has no text"):
        data.load_texts(tmp_path, "train", held_out=0.0)


# Rows


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_encode_documents(tokenizer, block_size):
    texts = [CODE[:n] for n in (0, 1, 14, 15, 16, 50)] + [CODE] * 300
    ids, starts = data.encode_documents(texts, tokenizer, bos=1, eos=2, block_size=block_size)
    assert ids.dtype == torch.int32 and starts.dtype == torch.int64
    assert starts[0] == 0 and starts[-1] == len(ids) and len(starts) == len(texts) + 1
    for text, begin, end in zip(texts, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        document = ids[begin:end].tolist()
        tokens = tokenizer.encode(text).ids
        assert document[: len(tokens) + 2] == [1, *tokens, 2]
        assert set(document[len(tokens) + 2 :]) <= {2}
        assert len(document) % block_size == 0 and len(document) - len(tokens) - 2 < block_size


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_cu_seqlens_against_a_slow_loop(blocks, row_blocks, batch_size, step):
    lengths = [4 * b for b in blocks]
    if sum(lengths) < 4 * row_blocks:
        return
    rows = make_rows(lengths, 4 * row_blocks)
    batch = rows.batch(step, batch_size, seed=1)
    assert batch.ids.shape == (batch_size, 4 * row_blocks) and batch.ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    starts = {sum(lengths[:d]) for d in range(len(lengths))}
    flat = batch.ids.flatten().tolist()  # each token is its position in the stream
    expected = [i for i, p in enumerate(flat) if i % (4 * row_blocks) == 0 or p in starts]
    assert batch.cu_seqlens.tolist() == [*expected, len(flat)]
    for row in batch.ids:
        assert row[0] % (4 * row_blocks) == 0 and torch.equal(row, torch.arange(len(row)) + row[0])


def test_every_epoch_visits_every_row_once():
    rows = make_rows([16] * 11, 16)
    assert len(rows) == 11
    seen = [rows.batch(step, 4, seed=7).ids[:, 0].floor_divide(16) for step in range(11)]  # 44 rows: four epochs
    epochs = torch.cat(seen).view(4, 11).tolist()
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != list(range(11))


def test_last_incomplete_row_is_dropped():
    rows = make_rows([16, 16, 16], 32)
    assert len(rows) == 1
    assert int(rows.batch(0, 3, seed=0).ids.max()) == 31


def test_batch_is_a_pure_function_of_step_and_seed():
    rows, resumed = make_rows([16, 48] * 20, 32), make_rows([16, 48] * 20, 32)
    forward = [rows.batch(step, 3, seed=5) for step in range(100)]
    for step in (99, 0, 13, 14, 57):  # out of order, in a fresh object, across epoch ends
        again = resumed.batch(step, 3, seed=5)
        assert torch.equal(again.ids, forward[step].ids) and torch.equal(again.cu_seqlens, forward[step].cu_seqlens)
    state = torch.get_rng_state()
    other = rows.batch(0, 3, seed=6)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is left alone
    assert not torch.equal(other.ids, forward[0].ids)
    # The same rows whatever the batch size.
    assert torch.equal(rows.batch(1, 6, seed=5).ids, torch.cat([forward[2].ids, forward[3].ids]))


def test_load_rows(corpus, tokenizer):
    def stream(**options):
        rows = data.load_rows(corpus, tokenizer, row_length=32, block_size=16, held_out=0.2, **options)
        batch = rows.batch(0, len(rows), seed=0)
        assert not (batch.cu_seqlens % 16).any()
        inner = batch.cu_seqlens[batch.cu_seqlens % 32 != 0].long()
        assert len(inner) > 0 and set(batch.ids.flatten()[inner].tolist()) == {1}
        return {tuple(row) for row in batch.ids.tolist()}, batch

    (train, batch), (held, _) = stream(), stream(split="held_out")
    assert torch.equal(stream(seed=0)[1].ids, batch.ids)
    assert not torch.equal(stream(seed=1)[1].ids, batch.ids)
    names = [{text.split("\n")[0] for text in data.load_texts(corpus, split, 0.2)} for split in data.SPLITS]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 40
    assert train and held


def test_load_rows_needs_bos_and_eos(corpus):
    plain = data.Tokenizer(data.models.BPE())
    with pytest.raises(ValueError, match="no <bos> or no <eos>"):
        data.load_rows(corpus, plain, row_length=32, block_size=16)


def test_a_pointer_of_git_lfs_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(ValueError, match=r"b\.py: a git-LFS pointer, .* install git-lfs"):
        data.load_texts(tmp_path, "train", 0.0)
