"""The command line as a process: how its threads wait, signals, standard output on a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import plain

from tt_model.cli import main, waiting
from tt_model.modeling import compiled

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def started(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
    )


# ---- how threads wait ----

# Ends when torch is first imported, with what the environment is by then.
SPY = (
    f"NAMES = {NAMES}"
    + """
import json, os, runpy, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(json.dumps({k: v for k, v in os.environ.items() if k in NAMES}), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Spy())
if sys.argv[1] == "command":
    from tt_model.cli import main
    main(sys.argv[2:])
else:
    del sys.argv[1]
    runpy.run_module("tt_model.cli", run_name="__main__")
"""
)


@pytest.mark.parametrize("entry", ["command", "module"])
@pytest.mark.parametrize("command", [["generate", "x"], ["train", "ar", "--config", "c", "--data", "d", "--out", "o"]])
def test_threads_are_told_how_to_wait_before_torch(entry: str, command: list[str], tmp_path: Path) -> None:
    command = [part if part != "o" else str(tmp_path / "o") for part in command]
    with started(SPY, entry, *command) as run:
        out, err = run.communicate(timeout=120)
    assert json.loads(out) in ({"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "10000"}), err


@pytest.mark.parametrize(("name", "value"), [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), (NAMES[2], "0")])
def test_what_the_user_says_stays(name: str, value: str) -> None:
    with started(SPY, "command", "generate", "x", **{name: value}) as run:
        assert json.loads(run.communicate(timeout=120)[0]) == {name: value}


@pytest.mark.parametrize(
    ("running", "chosen"),
    [(1, {"GOMP_SPINCOUNT": "10000"}), (2, {"OMP_WAIT_POLICY": "passive"}), (9, {"OMP_WAIT_POLICY": "passive"})],
)
def test_threads_sleep_where_others_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int, chosen: dict[str, str]
) -> None:
    (tmp_path / "loadavg").write_text(f"0.10 0.20 0.30 {running}/345 6789\n")
    monkeypatch.setattr(waiting, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(os, "environ", {})
    waiting.set_waiting()
    assert os.environ == {}  # torch has been loaded: too late, and a library's user is left alone
    monkeypatch.delitem(sys.modules, "torch")
    waiting.set_waiting()
    assert os.environ == chosen


@pytest.mark.parametrize("text", [None, "", "0.1 0.2 0.3 many"])
def test_an_unknown_load_is_a_quiet_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    if text is not None:
        (tmp_path / "loadavg").write_text(text)
    monkeypatch.setattr(waiting, "_LOAD", tmp_path / "loadavg")
    assert not waiting.others_compute()


def test_threads_are_counted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    assert main(["generate", "--threads", "3", "--max-new-tokens", "1", "x"]) == 0
    assert main(["generate", "--max-new-tokens", "1", "x"]) == 0
    assert asked == [3]


def test_passes_are_compiled_where_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(compiled, "_check_compiler", lambda: None)
    monkeypatch.setattr(compiled, "run", lambda tower, ids, *more: calls.append(ids) or tower.layered(ids, *more))
    short = ["generate", "--mode", "ar", "--max-new-tokens", "3", "--device", "cpu", "x"]
    assert main(short) == 0 and not calls
    text = capsys.readouterr().out
    assert main([*short, "--compile"]) == 0 and {ids.numel() for ids in calls} == {1}
    assert capsys.readouterr().out == text


# ---- signals ----

OUTPUT = """
import sys, time
from tt_model import Engine
def wait(*_):
    print("ready", flush=True)
    time.sleep(100)
Engine.step = wait
from tt_model.cli import main
sys.exit(main(["generate", "--output", sys.argv[1], "--quiet", "x"]))
"""
CONVERT = """
import sys, time
import tt_model.checkpoint.write as module
def slow(*_):
    print("ready", flush=True)
    time.sleep(100)
module._write_json = slow
from tt_model.cli import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("what", "number", "status"),
    [
        ("output", signal.SIGINT, 130),
        ("output", signal.SIGTERM, 143),
        ("output", signal.SIGHUP, 129),
        ("convert", signal.SIGTERM, 143),
    ],
)
def test_signals_leave_nothing(tmp_path: Path, what: str, number: int, status: int) -> None:
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "target"
    plain(tmp_path / "source")
    code, arguments = (OUTPUT, [target]) if what == "output" else (CONVERT, [tmp_path / "source", target])
    with started(code, *arguments) as run:
        assert run.stdout.readline() == "ready\n"
        (left,) = (tmp_path / "out").iterdir()
        assert left.name.endswith(".partial")
        time.sleep(0.05)
        run.send_signal(number)
        out, err = run.communicate(timeout=120)
    assert (run.returncode, out, err) == (status, "", "twotower: error: interrupted\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_output_is_swept_up(tmp_path: Path) -> None:
    with started(OUTPUT, tmp_path / "out.txt") as run:
        assert run.stdout.readline() == "ready\n"
        run.kill()
    assert len(list(tmp_path.iterdir())) == 1
    assert main(["generate", "--output", str(tmp_path / "out.txt"), "--quiet", "--max-new-tokens", "1", "x"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_standard_output_on_a_full_disk() -> None:
    code = "import sys; from tt_model.cli import main; sys.exit(main(sys.argv[1:]))"
    for command in (["info", "--json"], ["generate", "--quiet", "--max-new-tokens", "1", "x"]):
        with open("/dev/full", "w") as full:
            run = subprocess.run(
                [sys.executable, "-c", code, *command],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                timeout=120,
            )
        assert (run.returncode, run.stderr) == (1, "twotower: error: standard output: No space left on device\n")


def test_output_on_a_full_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from disks import files_of_at_most

    with files_of_at_most(3):
        code = main(["generate", "--output", str(tmp_path / "out.txt"), "--quiet", "--max-new-tokens", "1", "def f"])
    assert (code, capsys.readouterr().err) == (1, f"twotower: error: --output {tmp_path / 'out.txt'}: File too large\n")
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import signal, sys
from tt_model import Engine
step = Engine.step
def cut(engine):
    step(engine)
    if any(len(request.tokens) == 32 for request in engine._scheduler.running):  # after two blocks
        signal.raise_signal(signal.SIGINT)
Engine.step = cut
from tt_model.cli import main
sys.exit(main(["generate", "--max-new-tokens", "64", "--temperature", "0", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("where", ["terminal", "file", "watched"])
def test_ctrl_c_keeps_what_is_there(tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--max-new-tokens", "32", "--temperature", "0", "--quiet", "def f(x):"]) == 0
    whole = capsys.readouterr().out
    out = tmp_path / "out.txt"
    more = {"terminal": [], "file": ["--output", out], "watched": ["--watch", "--output", out]}[where]
    with started(INTERRUPTED, "def f(x):", *more) as run:
        text, err = run.communicate(timeout=120)
    assert run.returncode == 130 and err.endswith("\ntwotower: error: interrupted\n") and err.startswith("32 tokens in")
    kept = text if where == "terminal" else out.read_text()
    assert kept.rstrip("\n") == whole.rstrip("\n") and (where == "terminal" or text == "")


def test_ctrl_c_keeps_ids_and_says_how_it_ended() -> None:
    with started(INTERRUPTED, "--tokens", "5 6 7", "--no-eos", "--json", "--quiet") as run:
        text, err = run.communicate(timeout=120)
    record = json.loads(text)
    assert run.returncode == 130 and err == "twotower: error: interrupted\n"
    assert (len(record["tokens"]), record["finish_reason"], record["text"]) == (32, "cancelled", None)
