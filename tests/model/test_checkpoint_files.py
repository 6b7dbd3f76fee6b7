"""Checkpoints as files: all or nothing, what is kept and copied, peak memory, the progress bar."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, SHARD, contents, loaded, meta_model, model_of, same

from tt_model.checkpoint import atomic_folder, load, save
from tt_model.two_tower import TwoTower


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(model_of(), tmp_path / "model", max_shard_bytes=SHARD)
    return tmp_path / "model"


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("fails", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_save_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, fails: BaseException
) -> None:
    target = tmp_path / "model"
    if exists:
        save(model_of(), target, max_shard_bytes=SHARD)
        before = contents(target)
    written = sys.modules["tt_model.checkpoint.write"]
    shard, count = written._write_shard, [0]

    def failing(*args) -> None:
        count[0] += 1
        if count[0] == 3:
            raise fails
        shard(*args)

    monkeypatch.setattr(written, "_write_shard", failing)
    with pytest.raises(type(fails)):
        save(model_of(seed=1), target, max_shard_bytes=SHARD)
    assert count[0] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == (["model"] if exists else [])
    if exists:
        assert contents(target) == before
        same(loaded(target), model_of())


@pytest.mark.parametrize("one_step", [True, False])
def test_saving_over_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_step: bool) -> None:
    """Weights are all replaced, fewer shards too; other files stay. With and without the system's exchange."""
    if not one_step:
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    target = tmp_path / "model"
    save(model_of(), target, max_shard_bytes=SHARD)
    (target / "README.md").write_text("a card")
    (target / "runs").mkdir()
    (target / "runs" / "log").write_text("1")
    target.chmod(0o750)
    link = tmp_path / "link"
    link.symlink_to(target)
    save(model_of(seed=1), link)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o750
    assert sorted(p.name for p in target.iterdir()) == ["README.md", "config.json", "model.safetensors", "runs"]
    assert (target / "runs" / "log").read_text() == "1"
    same(loaded(target), model_of(seed=1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model"]


def test_tokenizer_is_copied(tmp_path: Path) -> None:
    source = tmp_path / "tokenizer"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("[]")
    (source / "other.json").write_text("")
    save(model_of(), tmp_path / "a" / "b", tokenizer=source)
    assert {p.name for p in (tmp_path / "a" / "b").glob("*.json")} == {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    (source / "tokenizer.json").rename(source / "mine.json")
    save(model_of(), tmp_path / "a" / "c", tokenizer=source / "mine.json")
    assert (tmp_path / "a" / "c" / "tokenizer.json").read_text() == "{}"
    for absent in (source, source / "tokenizer.json"):
        with pytest.raises(FileNotFoundError, match="no such tokenizer"):
            save(model_of(), tmp_path / "d", tokenizer=absent)


def test_atomic_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "run") as folder:
        save(model_of(), folder)  # one atomic write may hold others
        (folder / "state.json").write_text("1")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "state.json").read_text() == "1"
    same(loaded(tmp_path / "run"), model_of())
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file: exists and is not a folder"), atomic_folder(tmp_path / "file"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="model"):
        save(model_of(), tmp_path / "model")


# Growth of resident memory at its highest during a call (Linux's high-water mark, reset just before), in a process of
# its own. One process for all: importing torch takes longer than what is measured.
PEAK = """
import sys, torch
from tt_model import checkpoint
from tt_model.config import TwoTowerConfig
from tt_model.two_tower import TwoTower
def memory(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
def measured(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    result = call()
    print(memory("VmHWM") - before, sum(p.nbytes for p in result.parameters()) if result is not None else 0)
def load(dtype):
    with torch.device("meta"):
        model = TwoTower(TwoTowerConfig.from_file(folder), towers="context")
    checkpoint.load(model, folder, device="cpu", dtype=dtype, towers="context", progress=False)
    return model
def convert():
    checkpoint.convert(folder, target, max_shard_bytes=16e6, progress=False)
torch.set_num_threads(1)
small, folder, target = sys.argv[1:]
checkpoint.convert(small, small + "-two")  # what is set up on first use
for call in (convert, lambda: load(torch.bfloat16), lambda: load(torch.float32)):
    measured(call)
"""
LARGE = replace(
    CONFIG, vocab_size=4096, hidden_size=512, pattern="MEEE", n_routed_experts=32, moe_intermediate_size=512
)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_peak_memory(tmp_path: Path) -> None:
    """A context tower of 56 million parameters (220 MB in fp32), stored in bf16 in shards of at most 16 MB."""
    with torch.device("meta"):
        model = TwoTower(LARGE, towers="context")
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.fill_(0.5)
    save(model, tmp_path / "large", dtype=torch.bfloat16, max_shard_bytes=16e6)
    del model
    save(model_of(towers="context"), tmp_path / "small")
    shard = max(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert shard < 17e6

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    folders = [str(tmp_path / name) for name in ("small", "large", "two")]
    run = subprocess.run([sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, env=env, timeout=250)
    assert run.returncode == 0, run.stderr
    converting, *loading = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    for (grown, model_bytes), expected in zip(loading, (110e6, 220e6), strict=True):
        assert model_bytes == pytest.approx(expected, rel=0.05)
        assert 0.95 * model_bytes <= grown <= 1.1 * model_bytes + shard, (grown, model_bytes, shard)
    # Converting holds a shard's pages and a tensor: the largest has 4 MB; 8 MB more for what the allocator keeps.
    assert converting[0] <= shard + 4.2e6 + 8e6, converting


def test_progress_bar(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """On a terminal, once a second has passed; otherwise silence."""
    folder = sys.modules["tt_model.checkpoint.folder"]
    clock = iter(range(10**6))
    monkeypatch.setattr(folder.time, "monotonic", lambda: next(clock))
    loaded(saved)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    load(meta_model(), saved, device="cpu", dtype=torch.float32, progress=False)
    assert capsys.readouterr() == ("", "")
    loaded(saved)
    out, err = capsys.readouterr()
    assert out == "" and "loading" in err
