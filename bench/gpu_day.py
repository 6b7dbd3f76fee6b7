"""`make gpu-day`: all that is owed from a GPU by one command: in order of worth, in slices, resumed where it ended.

  smoke       whether each kernel runs at all, and right
  first       the rows that say most, held to fp64, beside eager PyTorch, and the passes of a model at batch 1
  parity      every op's tests
  right       slices of make test-gpu: what no card shows, golden models
  rows        every op at the published shapes: right, then timed beside eager and compiled PyTorch (bench-OP)
  model       the whole model: passes, tokens/s over batch and context; the published checkpoint, where
              TWOTOWER_CHECKPOINT names its folder
  tune        launches, kept for a 3 % win; then those ops' rows again
  peers       every op that has peers beside all that are installed
  profile     a timeline of a denoiser pass, host overhead, Nsight Compute and Proton on the two longest ops
  sanitizers  memory and race checks of small cases

A slice is cut after nine minutes. What is done stands in .gpu_day.json, for the commit that it was done with: give the
same command again and it goes on. Rows and tuned shapes that are recorded already are skipped, so a slice that was cut
goes on where it stopped; one that was cut twice and recorded nothing, or six times, is left. SPEED.md is rendered at
the end of every run. --budget 480 stops in time, start and report included; --collect DIR writes DIR/gpu_day.tar.gz
after every slice: results, samples, tuned launches, traces, what each slice printed (.gpu_day/SLICE.log) and the state,
for a machine that is given back; unpacked in the checkout that it began from, it goes on there. Runs with the Python
that starts it and installs nothing.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Only the standard library here: what is missing is to be said in a line.
from .gpu_tests import (
    LIMIT,
    ROOT,
    Slice,
    by_worth,
    golden_folder,
    missing,
    named,
    rows_of,
    run,
    seconds,
    slices,
)

BEGIN = time.monotonic()  # of the process: what loads until the first slice runs is part of a visit
REPORT = 60  # seconds kept for SPEED.md
STATE = ROOT / ".gpu_day.json"
LOGS = ROOT / ".gpu_day"
STEPS = ("smoke", "first", "parity", "right", "rows", "model", "tune", "peers", "profile", "sanitizers")
STEP_OF = {"bench": "rows", "memcheck": "sanitizers", "racecheck": "sanitizers", "smoke": "smoke", "parity": "parity"}
ARCHIVE = "gpu_day.tar.gz"
# What is kept of a visit.
KEPT = (
    "bench/results/*",
    "bench/tuning/*",
    "tt_kernels/tuned/*",
    "SPEED.md",
    "docs/speed_*",
    "profiles/*",
    ".gpu_day/*",
)
RECORDS = ("bench/results/*.jsonl", "bench/tuning/*.jsonl")
TURNS = 6  # of a slice that is cut again and again
SHAPES = 2  # that a tuning slice measures, each with some thirty launches that compile first
FIRST = {
    "experts": [f"[experts-T{T}-" for T in (16, 64, 128, 512)],
    "head_sample": ["[head_sample-"],
    "unmask": ["[unmask-"],
    "context_attention": ["[context_attention-"],
    "mamba_block": ["[mamba_block-"],
}
# Where two launches of mamba_block may overtake one: around 4 rows of 16 tokens, 2 of 32; above 32 it takes two.
CROSSING = ((4, 16), (5, 16), (8, 16), (2, 32), (3, 32), (1, 33), (4, 64))
PROFILED = {"experts": "T=16", "context_attention": "L=16,S=131072"}


def tuning(missing: bool) -> Iterator[Slice]:
    from cards import OPS

    more = ["--missing"] if missing else []
    for name in by_worth(name for name, op in OPS.items() if op.candidates):
        shapes = [",".join(f"{k}={v}" for k, v in dims.items()) for dims in OPS[name].shapes]
        for i in range(0, len(shapes), SHAPES):
            wanted = [part for shape in shapes[i : i + SHAPES] for part in ("--shape", shape)]
            yield Slice(f"tune-{name}-{i // SHAPES + 1}", (sys.executable, "-m", "tools.tune", name, *more, *wanted))
        yield Slice(f"again-{name}", rows_of([named([name])], "eager,compiled", missing=missing))


def model(python: Sequence[str]) -> Iterator[Slice]:
    generate = (*python, "bench.generate", "--record")
    for batch in (1, 16, 64, 4, 32, 128):
        yield Slice(f"model-{batch}", (*generate, "--batch", str(batch)))
    # So many tokens that the prefill before them is not most of the time.
    yield Slice("model-context", (*generate, "--batch", "1", "--context", "8192", "32768", "--new", "256"))
    yield Slice("model-long", (*generate, "--batch", "8", "--context", "32768", "--no-decoding"))
    folder = os.environ.get("TWOTOWER_CHECKPOINT", "")
    skip = "" if Path(folder or "/none").is_dir() else "no checkpoint: set TWOTOWER_CHECKPOINT to its folder"
    write = (*python, "tt_model.cli", "generate", "The capital of France is", "--model", folder, "--device", "cuda")
    yield Slice("checkpoint-diffusion", write, skip=skip)
    yield Slice("checkpoint-ar", (*write, "--mode", "ar"), skip=skip)


def profiles(python: Sequence[str]) -> Iterator[Slice]:
    trace = ("--passes", "3", "--out", "profiles/denoiser_pass.json.gz")
    yield Slice("timeline", (*python, "profiling.timeline", *trace))
    yield Slice("host", (*python, "profiling.host"))
    no_ncu = "" if shutil.which("ncu") else "ncu is not on the PATH: it comes with the CUDA toolkit (nsight-compute)"
    no_proton = "" if importlib.util.find_spec("triton.profiler") else "this Triton has no proton"
    for name, shape in PROFILED.items():
        for tool, skip in (("ncu", no_ncu), ("proton", no_proton)):
            out = ("--shape", shape, "--out", f"profiles/{name}")
            yield Slice(f"{tool}-{name}", (*python, f"profiling.{tool}", name, *out), skip=skip)


def plan(missing: bool = True) -> list[tuple[str, Slice]]:
    """(step, slice) in order of worth; `missing`: rows and shapes that are recorded already are skipped."""
    from cards import OPS

    from .peers import REGISTRY

    tools = dict(golden=golden_folder(), sanitizer=shutil.which("compute-sanitizer"))
    found = [
        (STEP_OF.get(part.name.partition("-")[0], "right"), part)
        for part in slices(**tools, missing=missing)
        if not part.name.startswith("real-")  # rows are held to the same at the same shapes before they are timed
    ]
    for name, words in FIRST.items():
        found.append(("first", Slice(f"first-{name}", rows_of(words, "eager", missing=missing, which="forward"))))
    more = [part for b, L in CROSSING for part in ("--also", f"mamba_block:b={b},L={L}")]
    words = [f"[mamba_block-b{b}-L{L}-" for b, L in CROSSING]
    command = rows_of(words, "apart", missing=missing, which="forward")
    found.append(("rows", Slice("crossing-mamba_block", (*command[:-2], *more, *command[-2:]))))
    python = (sys.executable, "-m")
    passes = (*python, "bench.generate", "--record", "--batch", "1", "--no-decoding")
    found.append(("first", Slice("first-passes", passes)))
    if without := [name for name, op in OPS.items() if not op.kernels]:
        found.append(("rows", Slice("bench-references", rows_of([named(without)], "eager", missing=missing))))
    found += [("model", part) for part in model(python)]
    found += [("tune", part) for part in tuning(missing)]
    found += [
        ("peers", Slice(f"peers-{name}", rows_of([named([name])], "all", missing=missing)))
        for name in by_worth(REGISTRY)
    ]
    found += [("profile", part) for part in profiles(python)]
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
    """What is worth keeping, in one file: what a borrowed machine gives back may be few files, and small."""
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / f"{ARCHIVE}.new"
    with tarfile.open(new, "w:gz") as archive:
        for path in (path for pattern in KEPT for path in sorted(ROOT.glob(pattern))):
            archive.add(path, path.relative_to(ROOT).as_posix())
        if state.is_file():
            archive.add(state, STATE.name)
    new.replace(folder / ARCHIVE)


def recorded() -> int:
    """Good lines of all results: whether a slice that was cut has left some."""
    lines = (line for pattern in RECORDS for path in ROOT.glob(pattern) for line in path.read_text().splitlines())
    return sum(not json.loads(line).get("fault") for line in lines)


def settled(known: dict[str, Any], again: bool) -> bool:
    """Whether a slice has had its turns: it passed; it failed; it was cut twice and recorded nothing, or too often. A
    skipped one may find what it needs the next time."""
    outcome = known.get("outcome", "")
    if again or not outcome or outcome.startswith("skipped"):
        return outcome == "passed"
    return outcome not in ("timed out", "cut") or known.get("stuck", 0) >= 2 or known.get("turns", 0) >= TURNS


def work(
    chosen: Sequence[Slice],
    done: dict[str, dict[str, Any]],
    *,
    again: bool,
    limit: float,
    end: float,
    save: Callable[[], None],
) -> list[str]:
    """Run what is not settled yet, in order, saving after each; the names that were left when the time was out."""
    left, started = [], False
    for part in chosen:
        before = done.get(part.name, {})
        if settled(before, again):
            continue
        if part.skip:
            done[part.name] = {"outcome": f"skipped: {part.skip}", "seconds": 0}
            save()
            continue
        room = end - time.monotonic()
        if left or (started and room < min(60, limit)):  # a process takes seconds to start, a kernel to compile
            left.append(part.name)
            continue
        started, moment, lines = True, time.monotonic(), recorded()
        outcome = run(part, max(min(limit, room), 1), LOGS / f"{part.name}.log")
        known: dict[str, Any] = {"outcome": outcome, "seconds": round(time.monotonic() - moment)}
        if outcome == "timed out":
            further = "--missing" in part.command and recorded() > lines  # so the next turn begins where this one ended
            barren = room > 0.75 * limit  # a short turn at the end of a visit says nothing
            known["stuck"] = 0 if further else before.get("stuck", 0) + barren
            known["turns"] = before.get("turns", 0) + 1
            if room < limit:  # by the budget, not by its own length
                known["outcome"] = "cut"
                left.append(part.name)
        done[part.name] = known
        save()
    return left


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slices", nargs="*", metavar="SLICE", help="steps, slices or patterns of them (default: all)")
    parser.add_argument("--list", action="store_true", help="print the plan and what is done, run nothing")
    parser.add_argument("--again", action="store_true", help="run failed slices again, and those that were left")
    parser.add_argument(
        "--anew", action="store_true", help="run what is chosen whatever is done or recorded: a peer was installed"
    )
    parser.add_argument("--limit", type=seconds, default=LIMIT, help="seconds a slice (default: %(default)s)")
    parser.add_argument("--budget", type=seconds, default=float("inf"), help="seconds in all: 480 for ten minutes")
    parser.add_argument("--collect", type=Path, metavar="DIR", help=f"write {ARCHIVE} there after every slice")
    parser.add_argument("--state", type=Path, default=STATE, help="default: %(default)s")
    o = parser.parse_args(arguments)

    def refuse(what: str) -> int:
        print(f"bench.gpu_day: error: {what}", file=sys.stderr)
        return 2

    if lacking := missing():
        return refuse(lacking)
    if o.budget < 2 * REPORT:
        return refuse(f"--budget is {o.budget:g}, expected at least {2 * REPORT}: {REPORT} are kept for the report")
    import torch

    from .clock import commit, no_commit
    from .measure import table

    found = plan(missing=not o.anew)
    names = [part.name for _, part in found]
    for pattern in o.slices:
        if pattern not in STEPS and not fnmatch.filter(names, pattern):
            return refuse(f"no slice is called {pattern!r}; steps: {', '.join(STEPS)}; --list prints the slices")
    matches = lambda step, name: not o.slices or any(p == step or fnmatch.fnmatchcase(name, p) for p in o.slices)
    chosen = [(step, part) for step, part in found if matches(step, part.name)]
    if why := no_commit():
        return refuse(why)
    head = commit().rstrip("+")  # tuning changes the checkout
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

    if o.anew:
        done = {name: known for name, known in done.items() if name not in {part.name for _, part in chosen}}
    for folder in (LOGS, *([ROOT / "profiles"] if any(step == "profile" for step, _ in chosen) else [])):
        folder.mkdir(exist_ok=True)

    def save() -> None:
        write_state(o.state, head, done)
        if o.collect:
            collect(o.collect, o.state)

    end = BEGIN + o.budget - REPORT
    left = work([part for _, part in chosen], done, again=o.again, limit=o.limit, end=end, save=save)
    if lacking := missing(["matplotlib"]):
        print(f"\nSPEED.md is not rendered: {lacking}. The results are complete: make report does it anywhere")
    else:
        report = run(Slice("report", (sys.executable, "-m", "bench.report")), REPORT)
        if report != "passed":
            print(f"\nSPEED.md is not rendered: {report}")
    save()
    print(f"\n{show()}")
    turns = [p.name for _, p in chosen if "stuck" in done.get(p.name, {}) and not settled(done[p.name], False)]
    if left or turns:
        ahead = list(dict.fromkeys([*turns, *left]))
        print(f"\nOut of time, {len(ahead)} slices left, {ahead[0]} the next: give the same command again")
    bad = [name for name, known in done.items() if settled(known, False) and known["outcome"] != "passed"]
    if bad:
        print(f"\nnot passed: {', '.join(bad)} (--again runs them again)")
    return 0 if not left and not turns and not bad else 1


if __name__ == "__main__":
    sys.exit(main())
