"""`twotower generate`: what it writes and where, how prompts become ids, every bad input in one line."""

import dataclasses
import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import model_of, rewritten
from tokenizers import Tokenizer, processors

from tt_model import TwoTower, TwoTowerConfig
from tt_model.checkpoint import save
from tt_model.cli import common, main
from tt_model.cli.watch import visible
from tt_model.engine.engine import Engine
from tt_model.vocabulary import Vocabulary

ASSETS = Path(common.__file__).parents[1] / "assets"
CONFIG = TwoTowerConfig(
    vocab_size=2048, hidden_size=16, pattern="ME*", num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=4, n_groups=1, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=8, moe_shared_expert_intermediate_size=8, max_position_embeddings=200,
)  # fmt: skip
PROMPT = "def f(x):\n    return"
SHORT = ("--max-new-tokens", "12", "--steps-per-block", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights and the bundled tokenizer."""
    path = tmp_path_factory.mktemp("cli") / "model"
    save(model_of(CONFIG), path, tokenizer=ASSETS / "tokenizer.json")
    return path


@pytest.fixture
def twotower(folder: Path, capsys: pytest.CaptureFixture[str]):
    """Run `twotower generate` on that model: exit code, standard output, standard error."""

    def call(*arguments: object, model: Path | None = folder) -> tuple[int, str, str]:
        chosen = [] if model is None else ["--model", str(model)]
        code = main(["generate", *chosen, *map(str, arguments)])
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure of the test."""
    monkeypatch.setattr(TwoTower, "from_pretrained", lambda *a, **k: pytest.fail("the model was loaded"))


def stdin_of(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data))


def refused(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    """One line on standard error that says it, nothing on standard output."""
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert err.startswith("twotower: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


# ---- what generate writes ----


def test_text_and_figures(twotower, folder: Path) -> None:
    code, out, err = twotower(*SHORT, PROMPT)
    vocabulary = Vocabulary(folder, CONFIG)
    ids = vocabulary.encode(PROMPT)
    sampled = dict(temperature=0.1, seed=0)
    expected = TwoTower.from_pretrained(folder).generate([ids], max_new_tokens=12, steps_per_block=4, **sampled)
    text = PROMPT + vocabulary.decode(expected.tokens[0], ids)
    assert code == 0 and out == text + "\n" * (not text.endswith("\n"))
    assert re.fullmatch(
        rf"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s, {expected.nfe[0]} denoiser pass(es)?, [\d.]+ tokens per pass"
        r"(, ended by the model)? \(loaded in [\d.]+ s\)\n",
        err,
    )


def test_stop_ends_the_text_before_it(twotower, folder: Path) -> None:
    text = twotower("--quiet", *SHORT, "--temperature", "0", PROMPT)[1].removeprefix(PROMPT)
    stop = text[4:6]
    code, out, _ = twotower(*SHORT, "--temperature", "0", "--stop", "never there", "--stop", stop, PROMPT)
    assert code == 0 and out.rstrip("\n") == (PROMPT + text[: text.index(stop)]).rstrip("\n")
    refused(twotower(*SHORT, "--stop", "", PROMPT), "stop holds ''")
    refused(twotower(*SHORT, "--stop", "x", "--tokens", "4 5"), "--stop", "text")
    refused(twotower(*SHORT, "--chat", PROMPT), "no chat template")


def test_prompt_from_anywhere(twotower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy = (*SHORT, "--temperature", "0")
    file = tmp_path / "prompt.txt"
    file.write_bytes(PROMPT.encode())
    given = twotower("--quiet", *greedy, PROMPT)
    assert given[2] == ""
    assert twotower("--quiet", *greedy, "--prompt-file", file) == given
    for arguments in ((), ("--prompt-file", "-")):
        monkeypatch.setattr(sys, "stdin", stdin_of(PROMPT.encode()))
        assert twotower("--quiet", *greedy, *arguments) == given
    file.write_bytes(b"\xef\xbb\xbf" + PROMPT.encode())  # a byte order mark
    assert twotower("--quiet", *greedy, "--prompt-file", file) == given
    monkeypatch.setattr(sys, "stdin", stdin_of(file.read_bytes()))
    assert twotower("--quiet", *greedy) == given == twotower("--quiet", *greedy, "\ufeff" + PROMPT)
    ids = " ".join(map(str, Vocabulary(ASSETS, CONFIG).encode(PROMPT)))
    code, out, _ = twotower(*SHORT, "--tokens", ids)
    assert code == 0 and out.startswith(ids + " ")


def test_json_says_everything(twotower, folder: Path, tmp_path: Path) -> None:
    sampled = ("--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--seed", "7")
    others = ("--no-eos", "--dtype", "float64", "--json", "--block-size", "5", "--confidence-threshold", "0.3")
    arguments = (*SHORT, *sampled, *others, "--tempered", "--alg-temp", "0.5", PROMPT)
    code, out, _ = twotower(*arguments)
    got = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    names = "prompt text prompt_tokens tokens finish_reason nfe timings tokens_per_second tokens_per_pass cycles"
    assert list(got) == [*names.split(), "settings"]
    chosen = dict(mode="mask_diffusion", max_new_tokens=12, block_size=5, steps_per_block=4, confidence_threshold=0.3)
    chosen |= dict(draft_steps=1, temperature=0.9, top_k=50, top_p=0.9, tempered=True, alg_temp=0.5)
    chosen |= dict(strategy="schedule", confidence="probability", factor=1.0, entropy_bound=0.1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = dict(seed=7, model=str(folder), device=device, dtype="float64")
    assert got["settings"] == chosen | dict(eos_token_ids=[], stop=[], logprobs=False) | where
    model = TwoTower.from_pretrained(folder, dtype=torch.float64)
    expected = model.generate([got["prompt_tokens"]], seed=7, eos_token_id=None, **chosen)
    assert (got["tokens"], got["nfe"]) == (expected.tokens[0], expected.nfe[0])
    assert len(got["tokens"]) == 12 and got["tokens_per_pass"] == round(12 / got["nfe"], 3)
    assert set(got["timings"]) == {"load", "generate"} and got["prompt"] == PROMPT

    assert twotower(*arguments, "--output", tmp_path / "out.json")[1] == ""
    assert json.loads((tmp_path / "out.json").read_text())["tokens"] == got["tokens"]


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
def test_golden(device: str, golden_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = json.loads((golden_dir / "small" / "generate.json").read_text())["mask_diffusion"][0]
    arguments = ["generate", "--model", str(golden_dir / "small"), "--device", device, "--no-eos", "--temperature", "0"]
    for name in ("max_new_tokens", "block_size", "steps_per_block", "confidence_threshold"):
        arguments += [f"--{name.replace('_', '-')}", str(case[name])]
    assert main([*arguments, "--tokens", " ".join(map(str, case["prompt"]))]) == 0
    out, err = capsys.readouterr()
    assert list(map(int, out.split())) == case["output"]
    assert f", {case['nfe']} denoiser passes, " in err


def test_defaults_are_the_models(golden_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"confidence_threshold": 0.25, "confidence": "margin"}
    folder = Path(shutil.copytree(golden_dir / "small", tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | own))
    arguments = ["generate", "--model", str(folder), "--tokens", "5 6", "--max-new-tokens", "4", "--json", "--quiet"]
    for given, want in (([], own), (["--confidence-threshold", "0.5"], own | {"confidence_threshold": 0.5})):
        assert main([*arguments, *given]) == 0
        assert json.loads(capsys.readouterr().out)["settings"].items() >= want.items()


def test_modes_without_blocks(twotower) -> None:
    for mode, figures in (("ar", "context tower alone"), ("mock_ar", "3 denoiser passes, 1.00 tokens per pass")):
        code, out, err = twotower("--mode", mode, "--no-eos", "--max-new-tokens", "3", PROMPT)
        assert code == 0 and out.startswith(PROMPT) and figures in err


def test_a_context_tower_alone_can_do_ar(twotower, tmp_path: Path) -> None:
    save(model_of(CONFIG, "context"), tmp_path / "model", tokenizer=ASSETS)
    assert twotower(*SHORT, "--mode", "ar", PROMPT, model=tmp_path / "model")[0] == 0
    refused(twotower(*SHORT, PROMPT, model=tmp_path / "model"), "has a context tower only", "--mode ar")


def test_watch_off_a_terminal_changes_nothing(twotower) -> None:
    assert twotower(*SHORT, "--watch", PROMPT)[:2] == twotower(*SHORT, PROMPT)[:2]


def test_terminal_tells_prompt_from_text(
    twotower, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = twotower("--quiet", *SHORT, PROMPT)[1]
    for name in ("NO_COLOR", "TERM", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for watch in ([], ["--watch"]):
        out = twotower("--quiet", *SHORT, *watch, PROMPT)[1]
        last = out[out.rindex("\x1b[1mdef f(x):") :]  # after the live view, if there was one
        assert ("\x1b[38;5;" in out) == bool(watch)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
        assert shown.rstrip("\n") == visible(plain).rstrip("\n")


# ---- tokenizers ----


@pytest.mark.parametrize(
    ("convention", "adds", "first"),
    [
        (None, False, [1]),
        (None, True, [1]),
        ({}, False, []),
        ({}, True, [1]),
        ({"add_bos_token": True}, False, [1]),
        ({"add_bos_token": True}, True, [1]),
        ({"add_bos_token": False}, False, []),
        ({"add_bos_token": False}, True, []),
    ],
)
def test_how_a_text_begins(tmp_path: Path, convention: dict | None, adds: bool, first: list[int]) -> None:
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    if adds:
        template = processors.TemplateProcessing(
            single="<bos> $A <eos>", pair=None, special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
        tokenizer.post_processor = template
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if convention is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(convention), encoding="utf-8-sig")
    body = Tokenizer.from_file(str(ASSETS / "tokenizer.json")).encode("import os").ids
    vocabulary = Vocabulary(tmp_path, CONFIG)
    assert vocabulary.encode("import os") == [*first, *body]
    if convention is None and not adds:
        assert Vocabulary(tmp_path, dataclasses.replace(CONFIG, bos_token_id=None)).encode("import os") == body


def test_pieces_put_characters_together() -> None:
    vocabulary = Vocabulary(ASSETS, CONFIG)
    text = "x = 'ü€😀'"
    ids = vocabulary.encode(text)[1:]
    pieces = list(vocabulary.pieces(ids))
    assert "".join(t for t, _ in pieces) == text and sum(n for _, n in pieces) == len(ids)
    assert "\ufffd" not in "".join(t for t, _ in pieces)
    assert vocabulary.decode(ids[3:], ids[:3]) == text[len(vocabulary.decode(ids[:3])) :]


def test_a_small_vocabulary_warns() -> None:
    with pytest.warns(UserWarning, match="has 2048 tokens, the model 5000"):
        Vocabulary(ASSETS, dataclasses.replace(CONFIG, vocab_size=5000))


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([""], ["prompt: empty"]),
        (["--tokens", ""], ["prompt: empty"]),
        (["--tokens", "5 x"], ["--tokens is '5 x'"]),
        (["--tokens", "5 2048"], ["token id 2048 is out of range", "0 to 2047"]),
        (["--tokens", "-1"], ["token id -1 is out of range"]),
        (["x" * 900], ["exceed the model's context of 200"]),
        (["x", "--max-new-tokens", "199"], ["2 tokens and 199 new ones", "context of 200"]),
        (["x", "--max-new-tokens", "-1"], ["max_new_tokens is -1"]),
        (["x", "--block-size", "0"], ["block_size is 0"]),
        (["x", "--steps-per-block", "0"], ["steps_per_block is 0"]),
        (["x", "--confidence-threshold", "1.1"], ["confidence_threshold is 1.1"]),
        (["x", "--confidence-threshold", "-0.1"], ["confidence_threshold is -0.1"]),
        (["x", "--confidence-threshold", "nan"], ["confidence_threshold is nan"]),
        (["x", "--temperature", "-1"], ["temperature is -1"]),
        (["x", "--top-k", "0"], ["top_k is 0"]),
        (["x", "--top-p", "0"], ["top_p is 0"]),
        (["x", "--device", "abacus"], ["--device is 'abacus'"]),
        (["x", "--device", "cuda:99"], ["--device is 'cuda:99'"]),
        (["x", "--device", "cpu,cpu", "--mode", "ar"], ["--device is 'cpu,cpu', expected one for the context tower"]),
        (["x", "--prompt-file", "y"], ["a prompt and --prompt-file"]),
        (["--prompt-file", "/nowhere/prompt.txt"], ["/nowhere/prompt.txt: No such file"]),
        (["x", "--tokenizer", "/nowhere"], ["/nowhere: no tokenizer.json"]),
        (["x", "--output", "/nowhere/out.txt"], ["--output /nowhere/out.txt: No such file"]),
        (["x", "--output", "/"], ["--output /: is a folder"]),
    ],
)
def test_bad_input(twotower, unloaded: None, arguments: list[str], words: list[str]) -> None:
    refused(twotower(*arguments), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "--banana", "x"], ["unrecognized arguments: --banana", "twotower generate --help"]),
        (["generate", "x", "--max-new-tokens", "many"], ["--max-new-tokens", "'many'"]),
        (["generate", "x", "--seed", "-1"], ["--seed", "-1 is not from 0"]),
        (["generate", "--prom", "x"], ["unrecognized arguments: --prom"]),
        (["generate", "x", "--mode", "diffusion"], ["--mode", "'diffusion'", "mask_diffusion", "'ar'", "'mock_ar'"]),
        (["generate", "x", "--dtype", "int3"], ["--dtype", "'int3'", "bfloat16"]),
        (["generate", "x", "--threads", "none"], ["--threads", "'none'"]),
        (["paint"], ["'paint'"]),
        ([], ["COMMAND"]),
    ],
)
def test_bad_command_line(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused((main(arguments), *capsys.readouterr()), *words, code=2)


def test_bad_prompts(twotower, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    refused(twotower("--prompt-file", tmp_path / "latin.txt"), "latin.txt: not UTF-8 text", "byte 2")
    refused(twotower("--prompt-file", tmp_path / "empty.txt"), "empty.txt: empty")
    refused(twotower("--prompt-file", tmp_path), "Is a directory")
    refused(twotower("x\udcff"), "not UTF-8")
    for data, words in (
        (b"\xff", "standard input: not UTF-8"),
        (b"", "standard input: empty"),
        (b"\xef\xbb\xbf", "empty"),
    ):
        monkeypatch.setattr(sys, "stdin", stdin_of(data))
        refused(twotower(), words)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    refused(twotower(), "no prompt")


def test_bad_models(twotower, unloaded: None, tmp_path: Path) -> None:
    refused(twotower("x", model=tmp_path / "none"), "none", "no such file")
    values = CONFIG.to_dict()
    for change, words in (
        ({"hybrid_override_pattern": None}, ["no layer pattern"]),
        ({"hybrid_override_pattern": "MQ*"}, ["'Q' is not a layer kind"]),
        ({"vocab_size": 160}, ["wrong vocabulary", "2047", "160"]),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values | change))
        refused(twotower("x", "--tokenizer", ASSETS, model=tmp_path), *words)
    refused(twotower("x", model=tmp_path), "no tokenizer.json", "--tokens")


def test_nan_weights_are_named(twotower, tmp_path: Path) -> None:
    save(model_of(CONFIG), tmp_path / "model", tokenizer=ASSETS)
    key = "denoiser_tower.layers.1.mixer.experts.2.up_proj.weight"
    rewritten(tmp_path / "model", lambda tensors: tensors[key].fill_(float("nan")))
    refused(twotower("x", model=tmp_path / "model"), "NaN", key)


# Root may write anything, whatever the mode says.
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_output(twotower, unloaded: None, tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "kept.txt").chmod(0o400)
    refused(twotower("x", "--output", tmp_path / "kept.txt"), "kept.txt: is not writable")
    tmp_path.chmod(0o500)
    refused(twotower("x", "--output", tmp_path / "new.txt"), "new.txt: Permission denied")


def test_output_is_whole_or_as_it_was(twotower, tmp_path: Path) -> None:
    file, link = tmp_path / "out.txt", tmp_path / "link.txt"
    file.write_text("before")
    link.symlink_to(file)
    refused(twotower(*SHORT, "--output", link, "--block-size", "0", PROMPT), "block_size")
    assert file.read_text() == "before"
    text = twotower(*SHORT, PROMPT)[1]
    code, out, _ = twotower(*SHORT, "--output", link, PROMPT)
    assert (code, out, file.read_text(), link.is_symlink()) == (0, "", text, True)
    assert twotower(*SHORT, "--output", os.devnull, PROMPT)[0] == 0
    assert {p.name for p in tmp_path.iterdir()} == {"out.txt", "link.txt"}


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (TypeError("one\ntwo"), 1, ["TypeError: one two", "TWOTOWER_DEBUG=1"]),
        (MemoryError(), 1, ["out of memory"]),
        (torch.OutOfMemoryError("CUDA: 3 GB"), 1, ["out of memory: CUDA: 3 GB"]),
        (PermissionError(13, "Permission denied", "a.safetensors"), 1, ["a.safetensors: Permission denied"]),
    ],
)
def test_failures_midway(
    twotower, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: BaseException, code: int, words: list[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(Engine, "step", fail)
    refused(twotower("--output", tmp_path / "out.txt", PROMPT), *words, code=code)
    assert not list(tmp_path.iterdir())
    if isinstance(error, Exception):
        monkeypatch.setenv("TWOTOWER_DEBUG", "1")
        with pytest.raises(type(error)):
            twotower(PROMPT)


def test_closed_pipe(twotower, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    refused(twotower("--quiet", *SHORT, PROMPT), "standard output was closed", code=141)


def test_a_large_block_warns_in_one_line(twotower) -> None:
    code, _, err = twotower(*SHORT, "--quiet", "--block-size", "32", PROMPT)
    assert code == 0
    assert re.fullmatch(r"twotower: warning: block_size 32 is above the 16 that .*\n", err), err
