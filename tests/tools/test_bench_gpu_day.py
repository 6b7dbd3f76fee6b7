"""The GPU day: what it works through, that it resumes, that it ends in time. Nothing here needs a GPU."""

import fnmatch
import json
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_ops, gpu_day, gpu_tests, ops
from bench.gpu_tests import Slice
from cards import OPS
from profiling.common import shape_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Slices that were run, and for how long they might; all pass at once."""
    seen: list[tuple[str, float]] = []

    def run(part: Slice, limit: float, log: Path | None = None) -> str:
        seen.append((part.name, limit))
        return {"bad": "failed (1)", "slow": "timed out"}.get(part.name, "passed")

    monkeypatch.setattr(gpu_day, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_day, "missing", lambda needed=(): "")
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
    assert not reached("make gpu-day ARGS=no-such", None, plan)
    assert not reached("make tune OP=experts ARGS='--shape T=7'", "experts", plan)


def test_slices_are_cut_by_the_driver_and_go_on() -> None:
    assert gpu_day.LIMIT < 9 * 60
    for step, part in gpu_day.plan():
        if "bench/bench_ops.py" in part.command:
            assert "--timeout" in part.command, "ends as a slice, not as a test"
        if step == "rows" or part.name.startswith(("first-", "peers-", "tune-", "again-")):
            assert "--missing" in part.command or "bench.generate" in part.command, part.name
    assert not any("--missing" in part.command for _, part in gpu_day.plan(missing=False))


def test_a_slice_has_few_rows() -> None:
    """A cut costs little, and a lost GPU few rows: an op is the most that a process measures."""
    for _, part in gpu_day.plan():
        if "--record" in part.command and "bench/bench_ops.py" in part.command:
            words = re.findall(r"\[(\w+)", part.command[-1])
            assert len(set(words)) <= 3, part.name


def test_what_comes_first_is_there() -> None:
    ids = [f"test_row[{case.id}]" for case in ops.cases("cuda")]
    assert all(any(word in name for name in ids) for words in gpu_day.FIRST.values() for word in words)
    for b, L in gpu_day.CROSSING:
        (case,) = bench_ops.also([f"mamba_block:b={b},L={L}"])
        assert f"[mamba_block-b{b}-L{L}-" in f"test_row[{case.id}]"
    for name, shape in gpu_day.PROFILED.items():
        assert shape_of(OPS[name], shape)
    assert [part.name for _, part in gpu_day.plan()][:2] == ["smoke", "first-experts"]


def test_the_plan_is_in_order_of_worth() -> None:
    steps = [step for step, _ in gpu_day.plan()]
    assert list(dict.fromkeys(steps)) == list(gpu_day.STEPS)
    tunes = [part.name for step, part in gpu_day.plan() if step == "tune"]
    assert tunes[0] == "tune-experts-1" and tunes.index("tune-route-1") < tunes.index("tune-ssd_step-1")


def test_it_resumes(ran: list[tuple[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Slice(name, ("true",)) for name in ("a", "bad", "b")] + [Slice("c", ("true",), skip="no golden files")]
    monkeypatch.setattr(gpu_day, "plan", lambda missing: [("right", part) for part in parts])
    monkeypatch.setattr(gpu_day, "LOGS", tmp_path / "logs")
    arguments = ["--state", str(tmp_path / "state.json"), "--collect", str(tmp_path / "kept")]
    assert gpu_day.main(arguments) == 1
    assert [name for name, _ in ran] == ["a", "bad", "b", "report"]
    state = json.loads((tmp_path / "state.json").read_text())["slices"]
    assert state["a"]["outcome"] == "passed" and state["c"]["outcome"] == "skipped: no golden files"
    with tarfile.open(tmp_path / "kept/gpu_day.tar.gz") as archive:
        kept = archive.getnames()
        found = json.loads(archive.extractfile(".gpu_day.json").read())
    assert found["slices"] == state, "a state to go on with"
    assert "SPEED.md" in kept and any(name.startswith("bench/results/") for name in kept)
    assert not any(name.endswith(".py") or "two_towers" in name for name in kept)
    ran.clear()
    assert gpu_day.main(arguments) == 1 and [name for name, _ in ran] == ["report"]
    assert gpu_day.main([*arguments, "--again"]) == 1 and [name for name, _ in ran] == ["report", "bad", "report"]
    ran.clear()
    assert gpu_day.main([*arguments, "--anew", "a", "b"]) == 1 and [name for name, _ in ran] == ["a", "b", "report"]
    ran.clear()
    monkeypatch.setattr("bench.clock.commit", lambda: "another")
    assert gpu_day.main([*arguments, "a"]) == 0 and [name for name, _ in ran] == ["a", "report"]


class Visits:
    """A clock, slices that take so many seconds each or more, and what they record before they are cut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **needs: float):
        self.now, self.size, self.done, self.ran = 0.0, 0, {}, []
        self.needs, self.saved = needs, 0
        monkeypatch.setattr(gpu_day.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu_day, "recorded", lambda: self.size)
        monkeypatch.setattr(gpu_day, "run", self.run)

    def run(self, part: Slice, limit: float, log: Path) -> str:
        assert log.name == f"{part.name}.log"
        took = min(self.needs[part.name], limit)
        self.now += took
        self.ran.append((part.name, limit))
        if "--missing" in part.command:
            self.size += int(took) * (part.name != "barren")
            self.needs[part.name] -= took
            return "timed out" if self.needs[part.name] > 0 else "passed"
        return "timed out" if took < self.needs[part.name] else "passed"

    def visit(self, budget: float, *parts: Slice, again: bool = False) -> list[str]:
        self.ran.clear()
        self.saved = 0
        end = self.now + budget

        def save() -> None:
            self.saved += 1

        return gpu_day.work(parts, self.done, again=again, limit=530, end=end, save=save)


def test_it_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, a=200, b=200, slow=200, d=200)
    parts = [Slice(name, ("true",)) for name in ("a", "b", "slow", "d")]
    assert visits.visit(500, *parts) == ["slow", "d"] and visits.ran == [("a", 500), ("b", 300), ("slow", 100)]
    # Cut by the budget, not by its own length: kept as such at once, and it has another turn.
    assert visits.saved == 3 and visits.done["slow"] == {"outcome": "cut", "seconds": 100, "stuck": 0, "turns": 1}
    assert visits.visit(500, *parts) == [] and visits.ran == [("slow", 500), ("d", 300)]
    assert {known["outcome"] for known in visits.done.values()} == {"passed"}


def test_what_is_cut_twice_without_progress_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, whole=500, rows=1200, after=10)
    parts = [Slice("whole", ("true",)), Slice("rows", ("--missing",)), Slice("after", ("true",))]
    assert visits.visit(420, *parts) == ["whole", "rows", "after"]
    assert visits.visit(420, *parts) == ["whole", "rows", "after"] and visits.done["whole"]["stuck"] == 2
    for _ in range(2):  # rows that were recorded are not measured again
        assert visits.visit(420, *parts) == ["rows", "after"] and visits.done["rows"]["stuck"] == 0
    assert visits.visit(420, *parts) == ["after"] or visits.done["after"]["outcome"] == "passed"
    assert visits.done["rows"]["outcome"] == "passed" and visits.done["whole"]["outcome"] == "cut"
    visits.visit(600, *parts, again=True)
    assert visits.done["whole"]["outcome"] == "passed" and visits.ran[0] == ("whole", 530)


def test_one_that_records_nothing_is_left_too(monkeypatch: pytest.MonkeyPatch) -> None:
    visits, part = Visits(monkeypatch, barren=5000), Slice("barren", ("--missing",))
    assert visits.visit(420, part) == visits.visit(420, part) == ["barren"] and visits.visit(420, part) == []


def test_one_that_never_ends_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it records something every time."""
    visits, part = Visits(monkeypatch, rows=1e6), Slice("rows", ("--missing",))
    for _ in range(gpu_day.TURNS):
        assert visits.visit(420, part) == ["rows"]
    assert visits.visit(420, part) == [] and visits.done["rows"]["stuck"] == 0


def test_a_slice_longer_than_its_limit_does_not_end_a_visit(monkeypatch: pytest.MonkeyPatch) -> None:
    visits = Visits(monkeypatch, long=900, b=100)
    parts = [Slice("long", ("true",)), Slice("b", ("true",))]
    assert visits.visit(float("inf"), *parts) == [] and visits.ran == [("long", 530), ("b", 530)]
    assert visits.done["long"]["outcome"] == "timed out" and not gpu_day.settled(visits.done["long"], False)


def test_what_a_slice_prints_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "a.log"
    code = "import sys, time; print('one'); print('two', file=sys.stderr); time.sleep(60)"
    assert gpu_tests.run(Slice("a", (sys.executable, "-c", code)), 3, log) == "timed out"
    assert sorted(log.read_text().split()) == ["one", "two"] and "one" in capsys.readouterr().out
    assert gpu_tests.run(Slice("a", (sys.executable, "-c", "print('three')")), 60, log) == "passed"
    assert log.read_text().endswith("three\n") and "one" in log.read_text()


def test_an_unknown_commit_is_refused(
    ran: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.clock.commit", lambda: "unknown")
    assert gpu_day.main(["smoke"]) == 2 and not ran
    assert "the commit is not known here: without git, name it in TT_COMMIT" in capsys.readouterr().err


def test_a_report_without_its_packages_says_so(
    ran: list[tuple[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_day, "missing", lambda needed=(): "it lacks matplotlib" if "matplotlib" in needed else "")
    monkeypatch.setattr(gpu_day, "LOGS", tmp_path / "logs")
    assert gpu_day.main(["--state", str(tmp_path / "state"), "smoke"]) == 0
    assert [name for name, _ in ran] == ["smoke"]
    assert "SPEED.md is not rendered: it lacks matplotlib" in capsys.readouterr().out


def test_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, said in (
        (["nothing"], "no slice is called 'nothing'"),
        ([], "needs an NVIDIA GPU"),
        (["--budget", "100"], "--budget is 100, expected at least 120"),
    ):
        assert gpu_day.main(arguments) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    for option in ("--budget=-1", "--limit=soon", "--limit=nan"):
        for main in (gpu_day.main, gpu_tests.main):
            with pytest.raises(SystemExit):
                main([option])
            assert "expected seconds, more than 0" in capsys.readouterr().err
    (tmp_path / "state").write_text("{")
    assert gpu_day.main(["--state", str(tmp_path / "state")]) == 2 and "remove it" in capsys.readouterr().err
    assert gpu_day.main(["--list", "tune"]) == 0
    out: Any = capsys.readouterr().out
    assert "| tune-experts-1 " in out and "parity" not in out
