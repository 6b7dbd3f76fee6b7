"""`make gpu`: all that is owed from a GPU (tools/owed.py), in order of worth, in slices, resumed where it ended.

Each task is a process that is cut after nine minutes. What is done stands in .gpu.json, for the commit that it was done
with: give the same command again and it goes on. Rows and tuned shapes that are recorded are skipped, so a task that
was cut goes on where it stopped, three times at most. After every task all that was found is packed into one archive:
results, samples, tuned launches, traces, what each task printed (.gpu/TASK.log) and the state; unpacked in the checkout
on a borrowed machine, it goes on there. SPEED.md is rendered at the end. Runs with the Python that starts it and
installs nothing; --list needs no GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .owed import Task

# Only the standard library here: what is missing is to be said in a line.
ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "rich", "pytest", "pytest_timeout", "hypothesis")
STATE, LOGS, ARCHIVE = ROOT / ".gpu.json", ROOT / ".gpu", ROOT / ".gpu/gpu.tar.gz"
KEPT = ("bench/results/*", "bench/tuning/*", "tt_kernels/tuned/*", "SPEED.md", "docs/speed_*", "profiles/*")
LIMIT, LEAST, REPORT, TURNS = 530, 60, 60, 3  # seconds of a task; to begin one with; for SPEED.md; turns of a cut one
BEGIN = time.monotonic()  # of the process: what loads until the first task runs is part of a visit


def run(task: Task, limit: float) -> str:
    """ "passed", "failed (status)" or "cut"; what it prints goes to its log, and the end of that to the terminal."""
    log = LOGS / f"{task.name}.log"
    print(f"==== {task.name}: expected {task.expected}", flush=True)
    env = os.environ | dict(task.env) | {"PYTHONUNBUFFERED": "1"}  # all of what it prints, also when cut
    options = dict(cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
    with log.open("ab") as out:
        process = subprocess.Popen(task.command, stdout=out, **options)
        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            outcome = "cut"
        finally:
            if process.poll() is None:  # the task's own processes, all in the session that began with it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), f"\n==== {task.name}: {outcome}", flush=True)
    return outcome


def pack(archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    new = archive.with_name(archive.name + ".new")
    with tarfile.open(new, "w:gz") as file:
        for path in (path for pattern in (*KEPT, ".gpu/*.log", STATE.name) for path in sorted(ROOT.glob(pattern))):
            file.add(path, path.relative_to(ROOT).as_posix())
    new.replace(archive)


def read_state(commit: str) -> dict[str, dict[str, object]]:
    """Outcomes by task, of this commit; another's do not count."""
    found = json.loads(STATE.read_text()) if STATE.exists() else {}
    return found["tasks"] if found.get("commit") == commit else {}


def settled(known: dict, again: bool) -> bool:
    """Whether a task has had its turns. A skipped one may find what it needs the next time."""
    outcome = known.get("outcome", "")
    if outcome == "cut":
        return not again and known["turns"] >= TURNS
    return outcome == "passed" or (outcome.startswith("failed") and not again)


def work(tasks: Sequence[Task], commit: str, archive: Path, *, again: bool, limit: float, end: float) -> list[str]:
    """Run what is not settled yet, in order, keeping all after each; the names of what has no result yet."""
    done = read_state(commit)
    for task in tasks:
        known, room = done.get(task.name, {}), end - time.monotonic()
        if settled(known, again) or (room < min(LEAST, limit) and not task.lacks):
            continue
        begin = time.monotonic()
        outcome = f"skipped: {task.lacks}" if task.lacks else run(task, min(limit, room))
        turns = int(known.get("turns", 0)) + (room >= limit)  # a short turn at the end of a visit says nothing
        done[task.name] = {"outcome": outcome, "seconds": round(time.monotonic() - begin), "turns": turns}
        new = STATE.with_name(STATE.name + ".new")
        new.write_text(json.dumps({"commit": commit, "tasks": done}, indent=1) + "\n")
        new.replace(STATE)
        pack(archive)
    return [task.name for task in tasks if not task.lacks and not settled(done.get(task.name, {}), False)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help='names or patterns, "rows-*" (default: all)')
    parser.add_argument("--list", action="store_true", help="print what is owed, expected and done; run nothing")
    parser.add_argument("--again", action="store_true", help="run failed tasks again, and those that were left")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a task (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all: 540 for ten minutes")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="default: %(default)s")
    o = parser.parse_args(arguments)
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"{sys.executable} lacks {', '.join(lacking)}; bench/README.md says how to bring packages along")
    import torch

    from bench.measure import commit, no_commit, table

    from .owed import Task, tasks

    known = list(tasks())
    for pattern in o.tasks:
        if not fnmatch.filter([task.name for task in known], pattern):
            parser.error(f"no task is called {pattern!r}; --list prints them")
    chosen = [task for task in known if any(fnmatch.fnmatchcase(task.name, p) for p in o.tasks or ["*"])]
    if why := no_commit():
        parser.error(why)
    head = commit().rstrip("+")  # tuning changes the checkout

    def show() -> str:
        outcomes = {t.name: f"would skip: {t.lacks}" if t.lacks else "" for t in chosen}
        outcomes |= {name: str(known["outcome"]) for name, known in read_state(head).items()}
        return table(("task", "outcome", "expected"), [(t.name, outcomes[t.name], t.expected) for t in chosen])

    if o.list:
        print(show())
        return 0
    if not torch.cuda.is_available():
        parser.error("this needs an NVIDIA GPU, and there is none (--list prints what is owed)")
    for folder in (LOGS, ROOT / "profiles"):
        folder.mkdir(exist_ok=True)
    left = work(chosen, head, o.archive, again=o.again, limit=o.limit, end=BEGIN + o.budget - REPORT)
    run(Task("report", (sys.executable, "-m", "bench.report"), "SPEED.md"), REPORT)
    pack(o.archive)
    print(show())
    if left:
        print(f"\n{len(left)} tasks left, {left[0]} the next: give the same command again")
    outcomes = read_state(head)
    return int(bool(left) or any(str(outcomes[t.name]["outcome"]).startswith("failed") for t in chosen))


if __name__ == "__main__":
    sys.exit(main())
