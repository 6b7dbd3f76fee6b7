"""The GPU day: what it works through, that it resumes, that it ends in time. Nothing here needs a GPU."""

import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
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


def owed() -> Iterator[tuple[str, list[str]]]:
    """Every row of PENDING.md: what, and the commands in its second cell; "as above" stands for those of the last."""
    commands: list[str] = []
    for line in (ROOT / "bench/PENDING.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 3 and cells[0] not in ("what", "---"):
            commands = re.findall("`([^`]+)`", cells[1]) or (commands if cells[1].startswith("as above") else [])
            yield cells[0], commands


def reached(command: str, op: str | None, plan: Sequence[Slice]) -> bool:
    """Whether some slice does what a command says; `op` is what the command before it tunes."""
    tunes = [part for part in plan if part.name.startswith(f"tune-{op}-")]
    if patterns := re.match(r'make (?:test-gpu|gpu-day) ARGS="?([\w* -]+)"?$', command):
        return all(fnmatch.filter([part.name for part in plan], pattern) for pattern in patterns[1].split())
    if command.startswith("make tune") or re.fullmatch(r"\w=\d+", command):
        assert op is not None
        listed = op in ("none", "...") or (not OPS[op].candidates if op in OPS else False)
        sizes = re.findall(r"\b[A-Za-z]+=\d+", command)
        return listed or (bool(tunes) and all(any(size in " ".join(part.command) for part in tunes) for size in sizes))
    if command.startswith("make bench"):
        (words,) = re.findall("-k '([^']+)'", command)
        mine = [name for name in OPS if any(word in name for word in set(words.split()) - {"and", "or", "test_row"})]
        rows = " ".join(" ".join(part.command) for part in plan if "--record" in part.command)
        return bool(mine) and all(f"[{name}-" in rows for name in mine)
    if command.startswith("twotower generate"):
        mode = ["--mode", "ar"] if "--mode ar" in command else ["--device", "cuda"]
        return any("tt_model.cli" in part.command and list(part.command[-2:]) == mode for part in plan)
    return False


def test_every_row_that_is_owed_is_reached() -> None:
    plan = [part for _, part in gpu_day.plan()]
    assert len({part.name for part in plan}) == len(plan)
    rows = list(owed())
    assert len(rows) > 30
    for what, commands in rows:
        assert commands, f"{what}: no command"
        op = None
        for command in commands:
            if found := re.match(r"make tune OP=([\w.]+)", command):
                op = found[1]
            assert reached(command, op, plan), f"{what}: no slice of the GPU day does {command}"
    assert not reached("make test-gpu ARGS=no-such", None, plan) and not reached("make all", None, plan)
    assert not reached("make tune OP=experts ARGS='--shape T=7'", "experts", plan)


def test_no_slice_takes_nine_minutes() -> None:
    assert gpu_day.LIMIT < 9 * 60
    for part in (part for _, part in gpu_day.plan() if part.command[1:4] == gpu_day.PYTEST[1:4]):
        assert "bench/bench_ops.py" not in part.command or "--timeout" in part.command, "ends as a slice, not as a test"


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
