"""The GPU day: what it works through, that it resumes, that it ends in time. Nothing here needs a GPU."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_day
from bench.gpu_tests import Slice
from tt_kernels import OPS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Slices that were run, and for how long they might; all pass at once."""
    seen: list[tuple[str, float]] = []

    def run(part: Slice, limit: float) -> str:
        seen.append((part.name, limit))
        return {"bad": "failed (1)", "slow": "timed out"}.get(part.name, "passed")

    monkeypatch.setattr(gpu_day, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_day, "missing", lambda: "")
    return seen


def test_the_plan_covers_what_is_owed() -> None:
    """Every slice, tuning and model command that PENDING.md names has its place."""
    names = [part.name for _, part in gpu_day.plan()]
    assert len(set(names)) == len(names)
    text = (ROOT / "bench/PENDING.md").read_text()
    owed = [word for words in re.findall(r'make test-gpu ARGS="?([\w* -]+)', text) for word in words.split()]
    assert len(owed) > 8
    for pattern in owed:
        assert any(re.fullmatch(pattern.replace("*", ".*"), name) for name in names), pattern
    for op in set(re.findall(r"make tune OP=(\w+)", text)) & OPS.keys():
        assert not OPS[op].candidates or (f"tune-{op}-1" in names and f"again-{op}" in names)


def test_the_plan_is_in_order_of_worth() -> None:
    steps = [step for step, _ in gpu_day.plan()]
    assert list(dict.fromkeys(steps)) == list(gpu_day.STEPS)
    tunes = [part.name for step, part in gpu_day.plan() if step == "tune"]
    assert tunes[0] == "tune-experts-1" and tunes.index("tune-route-1") < tunes.index("tune-ssd_step-1")


def test_it_resumes(ran: list[tuple[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Slice(name, ("true",)) for name in ("a", "bad", "b")] + [Slice("c", ("true",), skip="no golden files")]
    monkeypatch.setattr(gpu_day, "plan", lambda: [("right", part) for part in parts])
    arguments = ["--state", str(tmp_path / "state.json"), "--collect", str(tmp_path / "kept")]
    assert gpu_day.main(arguments) == 1
    assert [name for name, _ in ran] == ["a", "bad", "b", "report"]
    state = json.loads((tmp_path / "state.json").read_text())["slices"]
    assert state["a"]["outcome"] == "passed" and state["c"]["outcome"] == "skipped: no golden files"
    assert list((tmp_path / "kept/bench/results").glob("*.jsonl")) and (tmp_path / "kept/state.json").is_file()
    ran.clear()
    assert gpu_day.main(arguments) == 1 and [name for name, _ in ran] == ["report"]
    assert gpu_day.main([*arguments, "--again"]) == 1 and [name for name, _ in ran] == ["report", "bad", "report"]
    ran.clear()
    monkeypatch.setattr("bench.clock.commit", lambda: "another")
    assert gpu_day.main([*arguments, "a"]) == 0 and [name for name, _ in ran] == ["a", "report"]


def test_it_ends_in_time(ran: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(gpu_day.time, "monotonic", lambda: now[0])
    real = gpu_day.run

    def run(part: Slice, limit: float) -> str:
        now[0] += 200
        return real(part, limit)

    monkeypatch.setattr(gpu_day, "run", run)
    parts, done = [Slice(name, ("true",)) for name in ("a", "b", "slow", "d")], {}
    left = gpu_day.work(parts, done, again=False, limit=530, budget=560, save=lambda: None)
    assert [limit for _, limit in ran] == [530, 360, 160]
    # Cut by the budget, not by its own length: it has another turn, and the next is not begun.
    assert left == ["slow", "d"] and list(done) == ["a", "b"]


def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in ((["nothing"], "no slice is called 'nothing'"), ([], "needs an NVIDIA GPU")):
        assert gpu_day.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    (tmp_path / "state").write_text("{")
    assert gpu_day.main(["--state", str(tmp_path / "state")]) == 2 and "remove it" in capsys.readouterr().err
    assert gpu_day.main(["--list", "tune"]) == 0
    out: Any = capsys.readouterr().out
    assert "| tune-experts-1 " in out and "parity" not in out
