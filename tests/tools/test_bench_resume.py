"""What a cut run leaves to the next one: rows that are recorded already, and a session that ends with its GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sticky
import torch

from bench import bench_ops, ops
from cards import OPS
from tt_kernels.runtime.launch import ON_CPU

ROOT = Path(__file__).resolve().parents[2]
DIMS = dict(T=6, D=4)


def test_recorded_rows_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops.measure, "RESULTS", tmp_path)
    where = {"cpu": "Fast", "commit": "a+", "tuned": "1"}
    row = ops.Row("f", DIMS, "bf16", "forward", True, 1, 1, peers={"eager": {"ratio": 1.0}, "fa3": {"why": "absent"}})
    mine = bench_ops._id(row.record())
    assert bench_ops.recorded(where) == {}
    for machine in (where | {"commit": "b"}, where | {"tuned": "2"}, {"cpu": "Fast", "commit": "a"}):
        bench_ops.measure.record({"kind": "row", "machine": machine, **row.record()})
    bench_ops.measure.record({"kind": "row", "machine": where, **row.record(), "fault": "wrong"})
    bench_ops.measure.record({"kind": "decode", "machine": where})
    assert bench_ops.recorded(where) == {}, "another commit, other launches, a red row, no row"
    bench_ops.measure.record({"kind": "row", "machine": where | {"commit": "a"}, **row.record()})
    assert bench_ops.recorded(where) == {mine: {"eager", "fa3"}}


@pytest.mark.skipif(ON_CPU or torch.cuda.is_available(), reason="CPU rows")
def test_missing_rows_only(tmp_path: Path) -> None:
    """In a copy of what it takes, so that nothing is recorded here."""
    for name in ("bench", "tt_kernels", "tt_model", "tests"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "bench" else shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("results", "__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "bench/bench_ops.py", "-q", "-p", "no:cacheprovider", "--record"]
    command += ["--missing", "-k", "[rms_norm- or [commit-"]

    def run(*more: str, **env: str) -> subprocess.CompletedProcess[str]:
        given = os.environ | {"PYTHONPATH": str(tmp_path), "GIT_DIR": "/dev/null", "TT_COMMIT": ""} | env
        return subprocess.run([*command, *more], cwd=tmp_path, env=given, capture_output=True, text=True)

    refused = run("--peers", "eager")
    assert refused.returncode and "--record: the commit is not known here" in refused.stderr
    for peers, passed, skipped in (("", 3, 0), ("eager", 3, 0), ("", 0, 3)):
        done = run("--peers", peers, TT_COMMIT="abc")
        assert done.returncode == 0, done.stdout + done.stderr
        last = done.stdout.splitlines()[-1]
        assert (f"{passed} passed" in last) == bool(passed) and (f"{skipped + 3} skipped" in last), last
    (lines,) = (tmp_path / "bench/results").glob("*.jsonl")
    assert len(lines.read_text().splitlines()) == 6


def test_rows_of_other_sizes() -> None:
    (case,) = bench_ops.also(["rms_norm:T=3"])
    assert case.dims["T"] == 3 and case.name == "rms_norm" and not case.backward
    assert case.dims.keys() == OPS["rms_norm"].cases[0].keys()
    for text in ("rms_norm", "rms_norm:T=x", "rms_norm:Z=3", "none:T=3"):
        with pytest.raises(pytest.UsageError, match=f"--also is {text}, expected an op"):
            bench_ops.also([text])


# ---- a GPU that is lost ----

LOST = """
import pytest, sticky
from sticky import pytest_runtest_makereport

def test_first():
    pass

def test_breaks(monkeypatch):
    sticky.lost = lambda: "CUDA error: an illegal memory access was encountered" if {lost} else ""
    assert False

def test_behind():
    pass
"""


@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_gpu_ends_the_session(tmp_path: Path, lost: bool) -> None:
    (tmp_path / "conftest.py").write_text("from sticky import pytest_runtest_makereport  # noqa: F401\n")
    (tmp_path / "test_it.py").write_text(LOST.format(lost=lost))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and ("2 passed" not in done.stdout) == lost
    assert ("the GPU is lost to this process, the tests behind this one did not run: CUDA error" in done.stdout) == lost


def test_a_gpu_is_lost_when_it_says_so_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert sticky.lost() == ""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert sticky.lost() == "", "a failed assertion, or a launch that asked for too much"

    def fails() -> None:
        raise RuntimeError("CUDA error: misaligned address\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    assert sticky.lost() == "CUDA error: misaligned address"
