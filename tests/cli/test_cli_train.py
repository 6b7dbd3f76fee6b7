"""`twotower train` and `convert`: from text to a model that generates, stopped and resumed, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import tensors_of
from test_cli import ASSETS
from test_cli import CONFIG as BASE

from tt_model import TwoTower
from tt_model.checkpoint import layout
from tt_model.cli import main
from tt_model.training import loop as train

CONFIG = replace(BASE, vocab_size=300, block_size=8)
FAST = (
    "--steps",
    "4",
    "--batch-size",
    "2",
    "--row-length",
    "32",
    "--warmup",
    "1",
    "--learning-rate",
    "1e-3",
    "--quiet",
)


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plot takes longer than all else here; tests/training/test_train.py draws one."""
    monkeypatch.setattr(train, "plot_losses", lambda history, path: path.touch())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for i in range(30):
        lines = "".join(f"def function_{i}_{j}(value):\n    return value + {j}\n\n" for j in range(20))
        (folder / f"file{i:02d}.py").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def config(data: Path) -> Path:
    file = data.parent / "config.json"
    file.write_text(json.dumps(CONFIG.to_dict()))
    return file


@pytest.fixture
def call(data: Path, capsys: pytest.CaptureFixture[str]):
    """Run `twotower train`: exit code, standard output, standard error."""

    def run(stage: str, out: Path, *arguments: object) -> tuple[int, str, str]:
        code = main(["train", stage, "--data", str(data), "--out", str(out), *FAST, *map(str, arguments)])
        return (code, *capsys.readouterr())

    return run


def refused(result: tuple[int, str, str], *words: str, code: int = 1) -> None:
    got, out, err = result
    assert (got, out) == (code, ""), err
    assert err.startswith("twotower: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def same(one: Path, other: Path) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def test_from_text_to_text(call, config: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ar, denoiser = tmp_path / "ar", tmp_path / "denoiser"
    code, out, err = call("ar", ar, "--config", config)
    assert (code, err) == (0, "")
    assert f"{ar / 'model'}: after step 4 of 4, loss " in out and "held out" in out and str(ar / "loss.png") in out
    assert f"next: twotower train denoiser --model {ar / 'model'}" in out
    assert {p.name for p in ar.iterdir()} == {
        "training.pt",
        "log.jsonl",
        "loss.png",
        "run.json",
        "tokenizer.json",
        "model",
    }
    assert layout(ar / "model") == "context"

    # Stopped and started again: the same weights. Then once more: there is nothing left to do.
    again = tmp_path / "again"
    code, out, _ = call("ar", again, "--config", config, "--stop-after", 3)
    assert code == 0 and "after step 3 of 4" in out and "goes on with step 4" in out
    for _ in range(2):
        assert call("ar", again, "--config", config)[0] == 0
        assert same(ar / "model", again / "model")

    code, out, _ = call("denoiser", denoiser, "--model", ar / "model", "--save-dtype", "bfloat16", "--block-size", 4)
    assert code == 0 and "next: twotower generate" in out
    made = tensors_of(denoiser / "model")
    assert layout(denoiser / "model") == "two_tower" and made["lm_head.weight"].dtype == torch.bfloat16
    assert torch.equal(made["context_lm_head.weight"], tensors_of(ar / "model")["context_lm_head.weight"].bfloat16())
    assert TwoTower.from_pretrained(denoiser / "model").config == replace(CONFIG, block_size=4)

    code, out, _ = call("denoiser", tmp_path / "more", "--model", denoiser / "model", "--held-out", 0)
    assert code == 0 and "held out" not in out
    assert main(["generate", "--model", str(tmp_path / "more" / "model"), "--max-new-tokens", "5", "def"]) == 0
    assert capsys.readouterr().out.startswith("def")


def test_tied_towers_are_stored_as_two(call, config: Path, tmp_path: Path) -> None:
    assert call("ar", tmp_path / "ar", "--config", config)[0] == 0
    options = ("--context-tower", "tied", "--no-time", "--average", 0.5)
    out = tmp_path / "tied"
    assert call("denoiser", out, "--model", tmp_path / "ar" / "model", *options)[0] == 0
    made, begun = tensors_of(out / "model"), tensors_of(tmp_path / "ar" / "model")
    pairs = {
        key: key.replace("context_tower.", "denoiser_tower.").replace("context_lm_head", "lm_head") for key in begun
    }
    assert all(torch.equal(made[key], made[twin]) for key, twin in pairs.items())
    assert not torch.equal(made["context_lm_head.weight"], begun["context_lm_head.weight"])
    assert main(["train", "export", "--out", str(out), "--to", str(tmp_path / "copy"), "--quiet"]) == 0
    assert same(out / "model", tmp_path / "copy")
    assert call("denoiser", tmp_path / "on", "--model", out / "model", *options)[0] == 0  # its towers are equal
    refused(call("denoiser", out, "--model", tmp_path / "ar" / "model"), "context_tower was tied, now frozen")


def test_ar_goes_on_with_a_model(call, config: Path, tmp_path: Path) -> None:
    assert call("ar", tmp_path / "first", "--config", config)[0] == 0
    first = tmp_path / "first" / "model"
    rates = ("--learning-rate", 1e-9, "--final-learning-rate", 0)
    assert call("ar", tmp_path / "second", "--model", first, "--steps", 2, *rates)[0] == 0
    before, after = tensors_of(first), tensors_of(tmp_path / "second" / "model")
    for key, value in before.items():  # a step at a rate of 1e-9, and two of 1e-3 for the router's bias
        assert torch.allclose(value, after[key], atol=3e-3 if "e_score" in key else 1e-6), key
    assert (first / "tokenizer.json").read_bytes() == (tmp_path / "second" / "model" / "tokenizer.json").read_bytes()


def test_a_denoiser_of_another_model(call, config: Path, tmp_path: Path) -> None:
    """It goes on beside a context tower that was trained further, and the run knows where it came from."""
    ar, more = tmp_path / "ar" / "model", tmp_path / "more" / "model"
    assert call("ar", tmp_path / "ar", "--config", config)[0] == 0
    assert call("denoiser", tmp_path / "first", "--model", ar)[0] == 0
    assert call("ar", tmp_path / "more", "--model", ar)[0] == 0
    first, out = tmp_path / "first" / "model", tmp_path / "on"
    rates = ("--learning-rate", 1e-9, "--final-learning-rate", 0)
    assert call("denoiser", out, "--model", more, "--denoiser", first, *rates)[0] == 0
    denoiser, context, made = tensors_of(first), tensors_of(more), tensors_of(out / "model")
    for key, value in made.items():
        if key.startswith("context"):
            assert torch.equal(value, context[key]), key
        else:
            assert torch.allclose(value, denoiser[key], atol=5e-3 if "e_score" in key else 1e-6), key
    refused(call("denoiser", out, "--model", more, *rates), "denoiser was", "now None", "--accept model")
    refused(
        call("denoiser", tmp_path / "no", "--model", more, "--denoiser", ar), "context tower alone: expected two towers"
    )


def test_vocabulary_is_chosen(call, config: Path, tmp_path: Path) -> None:
    assert call("ar", tmp_path / "a", "--config", config, "--vocab-size", 280)[0] == 0
    assert TwoTower.from_pretrained(tmp_path / "a" / "model", towers="context").config.vocab_size == 280
    # What a run that never saved left behind is made anew.
    assert call("ar", tmp_path / "b", "--config", config, "--row-length", 40000)[0] == 1
    assert call("ar", tmp_path / "b", "--config", config, "--vocab-size", 280)[0] == 0
    refused(call("ar", tmp_path / "c", "--config", config, "--tokenizer", ASSETS), "wrong vocabulary", "300")
    refused(call("ar", tmp_path / "c", "--config", config, "--vocab-size", 100), "vocab_size is 100")
    refused(call("ar", tmp_path / "c", "--config", config, "--vocab-size", 280, "--tokenizer", ASSETS), "one of them")
    refused(call("ar", tmp_path / "c", "--model", tmp_path / "a" / "model", "--vocab-size", 280), "--vocab-size")


def test_a_run_resumes_only_as_it_began(call, config: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("ar", out, "--config", config, "--stop-after", 1)[0] == 0
    state = (out / "training.pt").read_bytes()
    refused(call("ar", out, "--config", config, "--row-length", 64), "row_length was 32, now 64", "use a new folder")
    refused(call("ar", out, "--config", config, "--learning-rate", 1e-2), "learning_rate was 0.001, now 0.01")
    refused(call("ar", out, "--config", config, "--vocab-size", 280), "config.vocab_size was 300, now 280")
    refused(call("ar", out, "--config", config, "--tokenizer", ASSETS), "began with another tokenizer")
    assert (out / "training.pt").read_bytes() == state
    assert call("ar", out, "--config", config)[0] == 0


def test_ctrl_c_says_how_to_go_on(call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = train._loss, []

    def interrupt(*arguments: object) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(train, "_loss", interrupt)
    result = call("ar", tmp_path / "run", "--config", config, "--save-every", 2, "--held-out", 0)
    refused(result, "interrupted: 2 of 4 steps are saved", "the same command", code=130)
    assert not (tmp_path / "run" / "model").exists()
    assert call("ar", tmp_path / "run", "--config", config, "--save-every", 2, "--held-out", 0)[0] == 0
    assert len(calls) == 4 + 2


def test_train_refuses(call, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model = ("--config", config)
    refused(call("ar", tmp_path / "file", *model), "file")
    refused(call("ar", tmp_path / "a", *model, "--data", "/nowhere"), "/nowhere", "does not exist")
    refused(call("ar", tmp_path / "a", *model, "--steps", 0), "steps is 0")
    refused(call("ar", tmp_path / "a", *model, "--save-every", 0), "--save-every", "0 is not at least 1", code=2)
    refused(call("ar", tmp_path / "a", *model, "--row-length", 30), "--row-length is 30", "block size 8")
    refused(call("ar", tmp_path / "a", *model, "--dtype", "int8"), "--dtype", "'int8'", "bfloat16", code=2)
    refused(call("ar", tmp_path / "a", *model, "--save-dtype", "int8"), "--save-dtype", "'int8'", code=2)
    refused(
        call("ar", tmp_path / "a", *model, "--device", "cpu,cpu"), "--device is 'cpu,cpu', expected one for training"
    )
    refused(call("ar", tmp_path / "a", *model, "--dtype", "float16"), "--dtype is float16", "bfloat16 or float32")
    refused(call("ar", tmp_path / "a", *model, "--final-learning-rate", "nan"), "final_learning_rate is nan")
    refused(call("ar", tmp_path / "a", *model, "--final-learning-rate", "1"), "above learning_rate, which is 0.001")
    refused(call("ar", tmp_path / "a", *model, "--warmup", "-1"), "warmup is -1")
    refused(call("ar", tmp_path / "a", *model, "--weight-decay", "inf"), "weight_decay is inf")
    refused(call("ar", tmp_path / "a", *model, "--betas", "0.9", "1"), "betas is (0.9, 1.0)")
    refused(call("ar", tmp_path / "a", *model, "--threads", "0"), "--threads", "0 is not from 1 to 4096", code=2)
    refused(call("ar", tmp_path / "a", *model, "--held-out", "nan"), "held_out is nan")
    refused(call("ar", tmp_path / "a", *model, "--stop-after", 0), "nothing to save")
    refused(call("ar", tmp_path / "a", "--config", tmp_path / "none.json"), "none.json: no such file")
    refused(call("denoiser", tmp_path / "a", "--model", tmp_path / "none"), "none: no such file")
    refused(call("ar", tmp_path / "a"), "--config --model", code=2)
    code, _, err = call("ar", tmp_path / "b", *model, "--held-out", 0.001)
    assert code == 0 and err.startswith("twotower: warning: no held-out loss: ") and err.count("\n") == 1


def test_convert(call, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("ar", tmp_path / "ar", "--config", config, "--steps", 1)[0] == 0
    source, target = str(tmp_path / "ar" / "model"), str(tmp_path / "two")
    assert main(["convert", source, target, "--block-size", "4", "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert (
        f"{target}: two towers of 3 layers, blocks of 4" in out and "next: twotower train denoiser" in out and not err
    )
    model = TwoTower.from_pretrained(target)
    assert torch.equal(model.lm_head.weight, model.context_lm_head.weight) and model.config.block_size == 4
    assert call("denoiser", tmp_path / "run", "--model", target, "--steps", 1)[0] == 0
    for arguments, words in (
        ([target, str(tmp_path / "x")], "has a denoiser already"),
        ([source, source], "onto itself"),
        ([str(tmp_path / "none"), target], "none: no such folder"),
        ([source, str(tmp_path / "x"), "--block-size", "0"], "block_size is 0"),
        ([source, str(tmp_path / "x"), "--shard-size", "0"], "--shard-size is 0"),
        ([source, str(config / "x")], "config.json"),
    ):
        refused((main(["convert", *arguments]), *capsys.readouterr()), words)
    refused((main(["convert", source, str(tmp_path / "x"), "--dtype", "int8"]), *capsys.readouterr()), "int8", code=2)
    assert not (tmp_path / "x").exists()


def test_changed_data_does_not_resume(call, config: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("ar", out, "--config", config, "--stop-after", 2)[0] == 0
    file = data / "file07.py"
    before = file.read_text()
    try:
        file.write_text(before + "\nchanged = True\n" * 40)
        refused(call("ar", out, "--config", config), "this run began otherwise", "tokens was")
    finally:
        file.write_text(before)
    assert call("ar", out, "--config", config)[0] == 0
    (out / "run.json").write_text("{")
    refused(call("ar", out, "--config", config), "run.json: not valid JSON")
