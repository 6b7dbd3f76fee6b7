"""`make gpu-day`: all that is owed from a GPU by one command: in order of worth, in slices, resumed where it ended.

  right       slices of make test-gpu: parity, published shapes, golden models
  rows        every op timed beside eager and compiled PyTorch (bench-GROUP)
  sanitizers  memory and race checks of small cases
  model       the whole model: passes, tokens/s over batch and context; the published checkpoint, where
              TWOTOWER_CHECKPOINT names its folder
  tune        launches, kept for a 3 % win; then those ops' rows again
  peers       every op that has peers beside all that are installed
  profile     a timeline of a denoiser pass, host overhead

No slice takes more than nine minutes, and each ends with what it has recorded. What is done stands in .gpu_day.json,
for the commit that it was done with: give the same command again and it goes on. SPEED.md is rendered at the end of
every run. --budget 560 stops in time; --collect DIR copies results, tuned launches and the state there after every
slice, for a machine that is given back. Runs with the Python that starts it and installs nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Only the standard library here: what is missing is to be said in a line.
from .gpu_tests import LIMIT, PYTEST, ROOT, Slice, golden_folder, missing, run, slices

STATE = ROOT / ".gpu_day.json"
STEPS = ("right", "rows", "sanitizers", "model", "tune", "peers", "profile")
# What is tuned and compared first; then the others.
WORTH = (
    "experts",
    "route",
    "head_sample",
    "unmask",
    "context_attention",
    "mamba_block",
    "ssd_chunk",
    "append_attention",
)
KEPT = ("bench/results", "tt_kernels/tuned", "SPEED.md", "docs", "profiles")
SHAPES = 2  # that a tuning slice measures, each with some thirty launches that compile first


def rows_of(names: Sequence[str], peers: str) -> tuple[str, ...]:
    chosen = " or ".join(f"[{name}-" for name in names)
    return (
        *(*PYTEST, "bench/bench_ops.py", "--timeout", "0", "--record"),
        *("--peers", peers, "-k", f"test_row and ({chosen})"),
    )


def by_worth(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: WORTH.index(name) if name in WORTH else len(WORTH))


def tuning() -> Iterator[Slice]:
    from tt_kernels import OPS

    for name in by_worth(name for name, op in OPS.items() if op.candidates):
        shapes = [",".join(f"{k}={v}" for k, v in dims.items()) for dims in OPS[name].shapes]
        for i in range(0, len(shapes), SHAPES):
            wanted = [part for shape in shapes[i : i + SHAPES] for part in ("--shape", shape)]
            yield Slice(f"tune-{name}-{i // SHAPES + 1}", (sys.executable, "-m", "bench.tune", name, *wanted))
        yield Slice(f"again-{name}", rows_of([name], "eager"))


def plan() -> list[tuple[str, Slice]]:
    """(step, slice) in order of worth."""
    from tt_kernels import OPS

    from .peers import REGISTRY

    found = []
    for part in slices(golden=golden_folder(), sanitizer=shutil.which("compute-sanitizer")):
        tool = part.name.partition("-")[0]
        found.append(({"bench": "rows", "memcheck": "sanitizers", "racecheck": "sanitizers"}.get(tool, "right"), part))
    if without := [name for name, op in OPS.items() if not op.kernels]:
        found.append(("rows", Slice("bench-references", rows_of(without, "eager"))))
    python = (sys.executable, "-m")
    generate = (*python, "bench.generate", "--record")
    found += [
        ("model", Slice("model-small", (*generate, "--batch", "1", "4", "16"))),
        ("model", Slice("model-large", (*generate, "--batch", "32", "64", "128"))),
        ("model", Slice("model-long", (*generate, "--batch", "1", "8", "--context", "32768", "--no-decoding"))),
    ]
    folder = os.environ.get("TWOTOWER_CHECKPOINT", "")
    skip = "" if Path(folder or "/none").is_dir() else "no checkpoint: set TWOTOWER_CHECKPOINT to its folder"
    write = (*python, "tt_model.cli", "generate", "The capital of France is", "--model", folder, "--device", "cuda")
    found += [
        ("model", Slice("checkpoint-diffusion", write, skip=skip)),
        ("model", Slice("checkpoint-ar", (*write, "--mode", "ar"), skip=skip)),
    ]
    found += [("tune", part) for part in tuning()]
    found += [("peers", Slice(f"peers-{name}", rows_of([name], "all"))) for name in by_worth(REGISTRY)]
    found += [
        ("profile", Slice("timeline", (*python, "profiling.timeline", "--out", "profiles/denoiser_pass.json"))),
        ("profile", Slice("host", (*python, "profiling.host"))),
    ]
    return sorted(found, key=lambda item: STEPS.index(item[0]))


# ---- what was done ----


def read_state(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    """Outcomes by slice, of this commit; another's do not count."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{path} is not readable as a state: remove it to begin anew") from None
    return found["slices"] if found.get("commit") == commit else {}


def write_state(path: Path, commit: str, done: dict[str, dict[str, Any]]) -> None:
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps({"commit": commit, "slices": done}, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def collect(folder: Path, state: Path) -> None:
    """Copy what is worth keeping."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        elif source.is_file():
            shutil.copy2(source, folder / name)
    if state.is_file():
        shutil.copy2(state, folder / state.name)


def work(
    chosen: Sequence[Slice], done: dict[str, dict[str, Any]], *, again: bool, limit: float, budget: float, save: Any
) -> list[str]:
    """Run what is not done yet, in order, saving after each; the names that the budget left over."""
    begin, left, started = time.monotonic(), [], False
    for part in chosen:
        before = done.get(part.name, {}).get("outcome", "")
        if before == "passed" or (before and not again and not before.startswith("skipped")):
            continue
        if part.skip:
            done[part.name] = {"outcome": f"skipped: {part.skip}", "seconds": 0}
            save()
            continue
        room = budget - (time.monotonic() - begin)
        if left or (started and room < min(60, limit)):  # a process takes seconds to start, a kernel to compile
            left.append(part.name)
            continue
        started, moment = True, time.monotonic()
        outcome = run(part, min(limit, room))
        seconds = round(time.monotonic() - moment)
        if outcome == "timed out" and room < limit:  # cut by the budget, not by its own length: it gets another turn
            left.append(part.name)
            continue
        done[part.name] = {"outcome": outcome, "seconds": seconds}
        save()
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slices", nargs="*", metavar="SLICE", help="steps, slices or patterns of them (default: all)")
    parser.add_argument("--list", action="store_true", help="print the plan and what is done, run nothing")
    parser.add_argument("--again", action="store_true", help="run failed and timed-out slices again")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds a slice (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds in all: begin no slice beyond")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy results there after every slice")
    parser.add_argument("--state", type=Path, default=STATE, help="default: %(default)s")
    o = parser.parse_args(arguments)

    def refuse(what: str) -> int:
        print(f"bench.gpu_day: error: {what}", file=sys.stderr)
        return 2

    if lacking := missing():
        return refuse(lacking)
    import torch

    from .clock import commit
    from .measure import table

    found = plan()
    names = [part.name for _, part in found]
    for pattern in o.slices:
        if pattern not in STEPS and not fnmatch.filter(names, pattern):
            return refuse(f"no slice is called {pattern!r}; steps: {', '.join(STEPS)}; --list prints the slices")
    matches = lambda step, name: not o.slices or any(p == step or fnmatch.fnmatchcase(name, p) for p in o.slices)
    chosen = [(step, part) for step, part in found if matches(step, part.name)]
    head = commit().rstrip("+")  # recording results changes the checkout
    try:
        done = read_state(o.state, head)
    except ValueError as error:
        return refuse(str(error))

    def show() -> str:
        rows = []
        for step, part in chosen:
            known = done.get(part.name, {})
            outcome = known.get("outcome") or (f"would skip: {part.skip}" if part.skip else "")
            rows.append((part.name, step, outcome, known.get("seconds", "")))
        return table(("slice", "step", "outcome", "s"), rows)

    if o.list:
        print(show())
        return 0
    if not torch.cuda.is_available():
        return refuse("this day needs an NVIDIA GPU, and there is none (--list prints the plan)")

    def save() -> None:
        write_state(o.state, head, done)
        if o.collect:
            collect(o.collect, o.state)

    left = work([part for _, part in chosen], done, again=o.again, limit=o.limit, budget=o.budget, save=save)
    run(Slice("report", (sys.executable, "-m", "bench.report")), 120)
    save()
    print(f"\n{show()}")
    if left:
        print(f"\nOut of time, {len(left)} slices left, {left[0]} the next: give the same command again")
    bad = [name for name, known in done.items() if not known["outcome"].startswith(("passed", "skipped"))]
    if bad:
        print(f"\nnot passed: {', '.join(bad)} (--again runs them again)")
    return 0 if not left and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
