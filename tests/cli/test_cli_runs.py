"""`twotower train`: what a run knows by hash, --accept, export at any time, two runs in one folder, a full disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import rewritten, tensors_of
from conftest import ROOT
from disks import files_of_at_most
from test_cli_train import FAST, call, config, data, no_plot, refused  # noqa: F401 (fixtures)

from tt_model import TwoTower
from tt_model.checkpoint import save
from tt_model.cli import facts, main
from tt_model.files import hold

# Fixtures come by their names.
# ruff: noqa: F811


@pytest.fixture
def base(call, config: Path, tmp_path: Path) -> Path:
    """A trained context tower."""
    assert call("ar", tmp_path / "ar", "--config", config, "--steps", 1, "--final-learning-rate", 0)[0] == 0
    return tmp_path / "ar" / "model"


def test_a_changed_base_model_does_not_resume(call, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ("denoiser", out, "--model", base)
    assert call(*arguments, "--stop-after", 1)[0] == 0
    state = (out / "training.pt").read_bytes()
    rewritten(base, lambda tensors: tensors["context_lm_head.weight"].add_(1e-3))
    refused(call(*arguments), "this run began otherwise", "weights was", "use a new folder, or", "--accept model)")
    refused(call(*arguments, "--accept", "data", "code"), "--accept model)")
    assert (out / "training.pt").read_bytes() == state
    code, _, err = call(*arguments, "--accept", "model")
    assert code == 0 and err.startswith(f"twotower: warning: {out}: weights was ") and err.count("\n") == 1
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert list(log[1]["changed"]) == ["weights"] and log[1]["changed"]["weights"][1] == facts.weights_digest(base)
    assert [c["after_step"] for c in json.loads((out / "run.json").read_text())["changes"]] == [1]
    code, _, err = call(*arguments)  # what was accepted is what the run now knows
    assert (code, err) == (0, "")


def test_weights_are_hashed_whole(base: Path, tmp_path: Path) -> None:
    before = facts.weights_digest(base)
    shutil.copytree(base, tmp_path / "moved")
    assert facts.weights_digest(tmp_path / "moved") == before
    rewritten(tmp_path / "moved", lambda tensors: tensors["context_lm_head.weight"].view(-1)[-1].add_(1))
    assert facts.weights_digest(tmp_path / "moved") != before
    save(TwoTower.from_pretrained(base, towers="context"), tmp_path / "shards", max_shard_bytes=20_000)
    whole = facts.weights_digest(tmp_path / "shards")
    last = max((tmp_path / "shards").glob("*.safetensors"))
    last.write_bytes(last.read_bytes()[:-1] + b"\0")
    assert facts.weights_digest(tmp_path / "shards") != whole


def test_changed_code_does_not_resume(call, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    assert call("ar", out, "--config", config, "--stop-after", 1)[0] == 0
    copy = tmp_path / "copy" / "tt_model"
    shutil.copytree(ROOT / "tt_model", copy, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    spec = lambda name: type("Spec", (), {"submodule_search_locations": [str(copy)]})
    monkeypatch.setattr(facts, "find_spec", spec)
    before = facts.code_digest()
    assert before == facts.code_digest() and torch.__version__ in before
    with (copy / "objective.py").open("a") as file:
        file.write("\n")
    assert facts.code_digest() != before
    refused(call("ar", out, "--config", config), "code was twotower", "or go on from its state", "--accept code)")
    monkeypatch.undo()
    monkeypatch.setattr("tt_model.training.loop.plot_losses", lambda history, path: path.touch())
    assert call("ar", out, "--config", config)[0] == 0


def test_changed_data_goes_on_if_accepted(call, config: Path, data: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    shutil.copytree(data, other)
    arguments = ("ar", out, "--config", config, "--data", other)
    assert call(*arguments, "--stop-after", 1)[0] == 0
    held = next(f for f in sorted(other.iterdir()) if facts_of_split(other, f))
    text = held.read_text()
    held.write_text(text + "more = 1\n" * 50)
    refused(call(*arguments), "held_out_tokens was", "--accept data)")
    assert call(*arguments, "--accept", "data")[0] == 0
    refused(
        call(*arguments, "--row-length", 64, "--accept", "data", "settings"), "row_length was 32, now 64); use a new"
    )


def facts_of_split(root: Path, file: Path) -> bool:
    from tt_model.training.data import split_files

    return file in split_files([file], root, 0.05)[1]


def test_a_run_is_extended(call, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("ar", out, "--config", config)[0] == 0
    more = ("ar", out, "--config", config, "--steps", 6, "--learning-rate", 5e-4)
    refused(call(*more), "steps was 4, now 6", "learning_rate was 0.001, now 0.0005", "--accept settings")
    code, said, _ = call(*more, "--accept", "settings")
    assert code == 0 and "after step 6 of 6" in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry.get("changed") for entry in log[:4]] == [None] * 4 and len(log) == 6
    assert log[4]["changed"] == {"steps": [4, 6], "learning_rate": [1e-3, 5e-4]}
    assert log[-1]["learning_rate"] == 1e-6
    assert call(*more)[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_model_at_any_time(
    call, base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    """What is exported in the middle of a run is what the run would have written."""
    for stage, start in (("ar", ("--config", config)), ("denoiser", ("--model", base, "--block-size", 4))):
        out, to = tmp_path / f"{stage}-run", tmp_path / f"{stage}-snapshot"
        assert call(stage, out, *start, "--dtype", dtype, "--stop-after", 2)[0] == 0
        expected = tensors_of(out / "model")
        shutil.rmtree(out / "model")
        with hold(out):  # as while it goes on
            assert main(["train", "export", "--out", str(out), "--to", str(to), "--quiet"]) == 0
        assert f"{to}: after step 2 of 4, loss " in capsys.readouterr().out
        got = tensors_of(to)
        assert got.keys() == expected.keys()
        assert all(torch.equal(v, got[k]) and v.dtype == got[k].dtype for k, v in expected.items())
        assert json.loads((to / "config.json").read_text())["torch_dtype"] == dtype
        assert (to / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()
        assert main(["train", "export", "--out", str(out), "--save-dtype", "bfloat16"]) == 0
        assert tensors_of(out / "model")["context_lm_head.weight"].dtype == torch.bfloat16
        capsys.readouterr()
    rewritten(base, lambda tensors: tensors["context_lm_head.weight"].add_(1e-3))
    refused((main(["train", "export", "--out", str(out)]), *capsys.readouterr()), "its weights are others")
    refused((main(["train", "export", "--out", str(tmp_path)]), *capsys.readouterr()), "no run.json")


def test_a_second_run_in_a_folder_is_refused(call, config: Path, data: Path, tmp_path: Path) -> None:
    """Two processes; then SIGTERM and SIGHUP: saved and left, as with Ctrl-C."""
    out = tmp_path / "run"
    command = ["train", "ar", "--data", str(data), "--out", str(out), *FAST, "--config", str(config)]
    command += ["--steps", "100000", "--save-every", "5", "--held-out", "0"]
    code = "import sys, tt_model.training.loop as t; t.plot_losses = lambda h, p: None\n"
    code += "from tt_model.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lines = lambda: len((out / "log.jsonl").read_text().splitlines()) if (out / "log.jsonl").is_file() else 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        before = lines()
        with subprocess.Popen(
            [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, text=True, env=environment
        ) as run:
            try:
                while lines() <= before:
                    assert run.poll() is None
                    time.sleep(0.02)
                refused(call("ar", out, "--config", config), f"{out}: in use by process {run.pid} on ")
                run.send_signal(number)
                err = run.communicate(timeout=120)[1]
            finally:
                run.kill()
        assert run.returncode == status, err
        assert err == (
            f"twotower: error: interrupted: {lines()} of 100000 steps are saved in {out}; "
            "the same command goes on from there\n"
        )
        assert {p.name for p in out.iterdir()} == {"training.pt", "log.jsonl", "run.json", "tokenizer.json"}


def test_a_full_disk_names_the_state(call, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert call("ar", out, "--config", config, "--stop-after", 1)[0] == 0
    before = (out / "training.pt").read_bytes()
    with files_of_at_most(len(before) // 2):
        refused(call("ar", out, "--config", config), f"{out / 'training.pt'}: File too large")
    assert (out / "training.pt").read_bytes() == before
    with files_of_at_most(2000):
        refused(call("ar", tmp_path / "new", "--config", config), f"{tmp_path / 'new' / 'tokenizer.json'}: File too")
    assert list((tmp_path / "new").iterdir()) == []
