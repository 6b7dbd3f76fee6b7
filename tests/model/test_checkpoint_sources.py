"""What a model's folder holds besides weights: read with the config, and kept by whatever is saved or made of it."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import CONFIG, SHARD, contents, loaded, model_of, plain, same

from tt_model import TwoTower
from tt_model.checkpoint import convert, save
from tt_model.config import TwoTowerConfig
from tt_model.two_tower import ASSETS

EXTRAS = {
    "tokenizer.json": (ASSETS / "tokenizer.json").read_bytes(),
    "tokenizer_config.json": json.dumps({"add_bos_token": False, "chat_template": "{{ messages }}"}).encode(),
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "generation_config.json": json.dumps({"eos_token_id": [2, 11], "temperature": 0.1}).encode(),
    "README.md": b"# A card\n",
    "LICENSE": b"...",
    "figures/loss.png": bytes(9),
}
LEFT_OUT = {
    ".gitattributes": b"*",
    "pytorch_model.bin": bytes(9),
    "consolidated.safetensors": bytes(9),
    "pytorch_model.bin.index.json": b"{}",
    "onnx/config.json": b"{}",
    "onnx/model.onnx": bytes(9),
}


def furnished(folder: Path, files: dict[str, bytes] = EXTRAS | LEFT_OUT) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def extras(folder: Path) -> dict[str, bytes]:
    """All files but ours: config.json and weights."""
    ours = lambda name: name == "config.json" or (name.startswith("model") and "safetensors" in name)
    return {name: data for name, data in contents(folder).items() if not ours(name)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save(model_of(), tmp_path / "source", max_shard_bytes=SHARD)
    return furnished(tmp_path / "source")


# ---- kept ----


def test_saved_with_all_that_its_source_had(source: Path, tmp_path: Path) -> None:
    model = TwoTower.from_pretrained(source, device="cpu")
    assert model.source == source and model_of().source is None
    save(model, tmp_path / "copy")
    assert extras(tmp_path / "copy") == EXTRAS
    assert TwoTowerConfig.from_file(tmp_path / "copy").eos_token_ids == (2, 11)
    save(TwoTower.from_pretrained(tmp_path / "copy", device="cpu"), tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "copy")
    save(model_of(), tmp_path / "made")
    assert extras(tmp_path / "made") == {}


def test_saved_onto_its_source(source: Path) -> None:
    before, inode = extras(source), (source / "tokenizer.json").stat().st_ino
    model = TwoTower.from_pretrained(source, device="cpu")
    model.lm_head.weight.data.mul_(2)
    for folder in (source, source / ".." / "source"):
        save(model, folder)
    assert extras(source) == before and (source / "tokenizer.json").stat().st_ino == inode
    assert not list(source.glob("model-*"))  # shards of what was there before
    same(loaded(source), model)


def test_tokenizer_of_a_folder_that_is_replaced_is_never_absent(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the process dies in the step in which the new folder takes the old one's place."""
    write = sys.modules["tt_model.checkpoint.write"]
    exchange = write._exchange

    def killed(one: Path, other: Path) -> None:
        exchange(one, other)
        assert set(contents(source)) >= set(EXTRAS)
        raise KeyboardInterrupt

    monkeypatch.setattr(write, "_exchange", killed)
    with pytest.raises(KeyboardInterrupt):
        save(TwoTower.from_pretrained(source, device="cpu"), source)
    assert set(contents(source)) >= set(EXTRAS)


def test_an_exchange_that_fails_changes_nothing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(one: Path, other: Path) -> None:
        raise OSError("no exchange here")

    before = contents(source)
    monkeypatch.setattr(sys.modules["tt_model.checkpoint.write"], "_exchange", failing)
    with pytest.raises(OSError, match="no exchange here"):
        save(model_of(seed=1), source)
    assert contents(source) == before and [p.name for p in source.parent.iterdir()] == ["source"]


@pytest.mark.parametrize("links", [True, False])
def test_what_a_target_had_is_merged(
    source: Path, tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    save(model_of(seed=1), target)
    furnished(target, {"figures/other.png": b"1", "figures/loss.png": b"2", "notes.txt": b"3", "README.md": b"4"})
    (target / "link").symlink_to("nowhere")
    if not links:
        monkeypatch.setattr(os, "link", lambda *a, **k: (_ for _ in ()).throw(OSError("no links here")))
    save(TwoTower.from_pretrained(source, device="cpu"), target)
    assert extras(target) == EXTRAS | {"figures/other.png": b"1", "notes.txt": b"3"}
    assert os.readlink(target / "link") == "nowhere"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_another_tokenizer_comes_whole(source: Path, tmp_path: Path) -> None:
    """No file of the one before stays beside it: they only fit each other."""
    other = furnished(tmp_path, {"other/tokenizer.json": b"{}", "other/chat_template.jinja": b"other"}) / "other"
    want = {name: data for name, data in EXTRAS.items() if "token" not in name and name != "chat_template.jinja"}
    want |= {"tokenizer.json": b"{}", "chat_template.jinja": b"other"}
    model = TwoTower.from_pretrained(source, device="cpu")
    save(model, tmp_path / "copy", tokenizer=other)
    assert extras(tmp_path / "copy") == want
    save(model, source, tokenizer=other)
    assert extras(source) == want | LEFT_OUT


def test_a_source_that_is_gone(source: Path, tmp_path: Path) -> None:
    model = TwoTower.from_pretrained(source, device="cpu")
    source.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="source: the folder that the model was loaded from is gone: its tokenizer"):
        save(model, tmp_path / "copy")
    same(loaded(tmp_path / "copy"), model_of())


@pytest.mark.parametrize("where", ["beside", "inside", "inside, again"])
def test_converted_with_all_that_its_source_had(tmp_path: Path, where: str) -> None:
    plain(tmp_path / "plain")
    furnished(tmp_path / "plain")
    target = tmp_path / "two" if where == "beside" else tmp_path / "plain" / "two"
    for _ in range(2 if "again" in where else 1):
        convert(tmp_path / "plain", target)
    assert extras(target) == EXTRAS
    assert TwoTowerConfig.from_file(target).eos_token_ids == (2, 11)
    assert TwoTower.from_pretrained(target, device="cpu").source == target


# ---- what generation_config.json says ----


def written(folder: Path, config: dict, generation: object) -> Path:
    folder.mkdir(exist_ok=True)
    values = {k: v for k, v in CONFIG.to_dict().items() if not k.endswith("os_token_id")} | config
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(
        generation if isinstance(generation, str) else json.dumps(generation)
    )
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "eos"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": [2, 11]}, (2, 11)),
        ({"eos_token_id": 2}, {"eos_token_id": 11}, (2, 11)),
        ({"eos_token_id": [5, 2]}, {"eos_token_id": [11, 2]}, (5, 2, 11)),
        ({"eos_token_id": 2}, {"eos_token_id": 2}, 2),
        ({"eos_token_id": 2}, {"eos_token_id": None}, 2),
        ({"eos_token_id": 2}, {"eos_token_id": []}, 2),
        ({"eos_token_id": 2}, {}, 2),
        ({"eos_token_id": None}, {"eos_token_id": 11}, (11,)),
        ({"eos_token_id": None}, {}, None),
        ({}, {"eos_token_id": 11}, (11,)),
    ],
)
def test_ends_of_both_files(tmp_path: Path, config: dict, generation: dict, eos: object) -> None:
    folder = written(tmp_path, config, generation)
    want = replace(CONFIG, eos_token_id=eos)
    assert TwoTowerConfig.from_file(folder) == TwoTowerConfig.from_file(folder / "config.json") == want
    (folder / "config.json").rename(folder / "other.json")  # not the config that generation_config.json goes with
    assert TwoTowerConfig.from_file(folder / "other.json") == TwoTowerConfig.from_dict(
        json.loads((folder / "other.json").read_text())
    )


def test_other_special_tokens_come_from_config_json_first(tmp_path: Path) -> None:
    generation = {"bos_token_id": 7, "pad_token_id": 8}
    found = TwoTowerConfig.from_file(written(tmp_path, {"bos_token_id": 4}, generation))
    assert (found.bos_token_id, found.pad_token_id) == (4, CONFIG.pad_token_id)
    found = TwoTowerConfig.from_file(written(tmp_path, {}, generation))
    assert found.bos_token_id == 7


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": 29}, r"eos_token_id is 29: it is not in the vocabulary of 29 tokens"),
        ({"eos_token_id": "two"}, r"eos_token_id is 'two': expected"),
        ({"eos_token_id": [2, True]}, r"eos_token_id is \(2, True\): expected"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
    ],
)
def test_a_wrong_generation_config_is_named(tmp_path: Path, generation: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"generation_config\.json: .*{message}"):
        TwoTowerConfig.from_file(written(tmp_path, {"eos_token_id": 2}, generation))


def test_the_second_end_stops_a_row(source: Path) -> None:
    """Any token that a run without ends writes, as one of generation_config.json's."""
    free = TwoTower.from_pretrained(source, device="cpu").generate([[4, 5]], max_new_tokens=16, eos_token_id=None)
    (tokens,) = free.tokens
    end = tokens[-1]
    furnished(source, {"generation_config.json": json.dumps({"eos_token_id": [28, end]}).encode()})
    stopped = TwoTower.from_pretrained(source, device="cpu").generate([[4, 5]], max_new_tokens=16)
    ends = (*CONFIG.eos_token_ids, 28, end)
    first = next(i for i, token in enumerate(tokens) if token in ends)
    assert stopped.tokens == [tokens[: first + 1]]


# ---- git-LFS pointers and byte order marks ----

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
READ: dict[str, Callable[[Path], object]] = {
    "config.json": lambda folder: TwoTowerConfig.from_file(folder),
    "generation_config.json": lambda folder: TwoTowerConfig.from_file(folder),
    "model.safetensors.index.json": loaded,
    "model-00002-of-": loaded,
}


@pytest.mark.parametrize("name", READ)
def test_a_git_lfs_pointer_is_named(source: Path, name: str) -> None:
    file = next(source.glob(f"{name}*"))
    file.write_bytes(POINTER)
    for call in (READ[name], lambda folder: TwoTower.from_pretrained(folder, device="cpu")):
        with pytest.raises(
            ValueError, match=rf"^\S*{name}\S*: a git-LFS pointer, .*install git-lfs and run `git lfs pull`"
        ):
            call(source)


def test_a_pointer_is_not_passed_on(source: Path, tmp_path: Path) -> None:
    plain(tmp_path / "plain")
    furnished(tmp_path / "plain", {"tokenizer.json": POINTER, "figure.png": POINTER})
    loaded = model_of()
    loaded.source = tmp_path / "plain"
    for call in (
        lambda: save(loaded, tmp_path / "two"),
        lambda: convert(tmp_path / "plain", tmp_path / "two"),
        lambda: save(model_of(), tmp_path / "two", tokenizer=tmp_path / "plain"),
    ):
        with pytest.raises(ValueError, match=r"tokenizer\.json: a git-LFS pointer"):
            call()
    assert not (tmp_path / "two").exists()


def test_byte_order_marks(source: Path) -> None:
    model = TwoTower.from_pretrained(source, device="cpu")
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        (source / name).write_bytes(b"\xef\xbb\xbf" + (source / name).read_bytes())
    again = TwoTower.from_pretrained(source, device="cpu")
    assert again.config == model.config and again.config.eos_token_ids == (2, 11)
    same(again, model)
