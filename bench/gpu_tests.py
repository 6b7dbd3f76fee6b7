"""`make test-gpu`: all that only a GPU can show, in nine minutes, and from there on with the command that it prints.

  smoke         each op's first case in bf16, and one published shape of each op that reads little
  parity-GROUP  every op's tests on the GPU: fp32, fp16, bf16
  device-TEST   what no card shows: neighbours, ties, NaN, streams and graphs, masks, all lengths of a cache and a block
  gpu-marked    tests with the mark gpu: a cold L2 and a warm one, streams and graphs, Mamba's own packages
  real-OP       bf16 at the published shapes, values and gradients
  golden-fp32   the golden models: logits to 1e-5, tokens exactly
  golden-bf16   the golden models, kernels beside references
  memcheck-OP, racecheck-OP   small cases under compute-sanitizer
  bench-OP      the rows of bench/, recorded; all peers: python -m bench.gpu_day

GROUP is a part of tt_kernels that has kernels (moe, norm, ...), OP an op, or such a part where it has few rows. Every
slice is a process of its own, and ends at the first error after which its GPU is lost to it: what one kernel breaks is
not told of others. Runs with the Python that starts it and installs nothing. Name slices, or patterns of them, to run
only these; `--from SLICE` resumes. The last lines say what passed and, where time ran out, how to go on.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# Only the standard library here: what is missing is to be said in a line.
ROOT = Path(__file__).parents[1]
NEEDED = ("torch", "triton", "numpy", "safetensors", "tokenizers", "rich", "pytest", "pytest-timeout", "hypothesis")
LIMIT = 530  # seconds of a slice, and of a run
FEW_ROWS = 16  # that a group has whose ops share a slice
SMALL = 64e6  # bytes: what a published shape moves in the smoke test
DEVICE_TESTS = ("route_stress", "attention_context", "attention_masks", "scan", "scan_nan", "sampling")
# What is tested, timed, tuned and compared first, by group and by op; then the others.
WORTH = (
    *("moe", "experts", "head_sample", "unmask", "context_attention", "mamba_block", "route", "append_attention"),
    *("ssd_chunk", "attention", "mamba", "ssd", "norm", "conv1d"),
)
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Slice:
    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    skip: str = ""  # why it cannot run here


def groups() -> dict[str, list[str]]:
    """Ops with kernels by the part of tt_kernels that they are in."""
    from cards import OPS

    found: dict[str, list[str]] = {}
    for name, op in OPS.items():
        if op.kernels:
            found.setdefault(op.fn.__module__.split(".")[1], []).append(name)
    return found


def golden_folder() -> Path | None:
    places = (os.environ.get("TWOTOWER_GOLDEN"), ROOT / "shared/golden", ROOT.parent / "shared/golden")
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


def by_worth(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: WORTH.index(name) if name in WORTH else len(WORTH))


def parts() -> dict[str, list[str]]:
    """Ops with kernels by the slice that they are in: each its own, but a group together that has few rows: a process
    takes some ten seconds to start and to measure the roofs."""
    from cards import OPS

    rows = lambda name: len(OPS[name].shapes) * (2 if OPS[name].grads else 1)
    found = {}
    for group, names in groups().items():
        together = sum(map(rows, names)) <= FEW_ROWS
        found |= {group: names} if together else {name: [name] for name in names}
    return {name: found[name] for name in by_worth(found)}


def named(names: Sequence[str]) -> str:
    """For pytest's -k. In brackets it is a whole parameter: "rms_norm-" is also the end of "modulated_rms_norm-"."""
    return " or ".join(f"[{name}{end}" for name in names for end in "-]")


def rows_of(words: Sequence[str], peers: str, *, missing: bool, which: str = "") -> tuple[str, ...]:
    """Rows whose id holds one of these words, recorded; `missing`: those that are not there yet."""
    return (
        *(*PYTEST, "bench/bench_ops.py", "--timeout", "0", "--record", *(["--missing"] if missing else [])),
        *("--peers", peers, "-k", f"test_row and {f'{which} and ' if which else ''}({' or '.join(words)})"),
    )


def smoke() -> list[str]:
    """Tests of a minute or two: whether each kernel runs at all, and right."""
    from bench import ops
    from cards import OPS

    from parity import case_id  # isort:skip

    kernels = {name: op for name, op in OPS.items() if op.kernels}
    found = [
        f"tests/kernels/test_kernels.py::test_matches_reference[{case_id(name, op.cases[0])}-torch.bfloat16]"
        for name, op in kernels.items()
    ]
    for name in kernels:
        mine = [case for case in ops.cases("cuda", {name: kernels[name]}) if not case.backward]
        least = min(mine, key=lambda case: ops.cost(case)[1])
        if ops.cost(least)[1] <= SMALL:
            found.append(f"bench/bench_ops.py::test_parity[{least.id}]")
    return found


def slices(*, golden: Path | None = None, sanitizer: str | None = None, missing: bool = False) -> list[Slice]:
    """In the order in which they are worth running: right results before times. `missing`: only rows that are not
    recorded yet."""
    grouped = groups()
    chosen = {part: named(names) for part, names in parts().items()}
    everything = named([name for names in grouped.values() for name in names])
    no_golden = "" if golden else "no golden files: set TWOTOWER_GOLDEN to their folder"
    no_sanitizer = "" if sanitizer else "compute-sanitizer is not on the PATH"
    at_golden = {"TWOTOWER_GOLDEN": str(golden)}
    # Each tensor in memory of its own, so that a read past its end is one past an allocation.
    checked = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    small = ("tests/kernels/test_kernels.py", "--timeout", "0")
    all_ops = (*PYTEST, "tests/kernels/test_kernels.py", "tests/kernels/test_ops.py", "-k")

    found = [Slice("smoke", (*PYTEST, *smoke()))]
    found += [Slice(f"parity-{group}", (*all_ops, named(grouped[group]))) for group in by_worth(grouped)]
    found += [Slice("parity-rest", (*all_ops, f"not ({everything})"))]
    # What no card shows: bits that neighbours do not move, ties, NaN, tickets over streams and graphs, masks.
    launches = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_launches_*.py"))
    found += [Slice(f"device-{name}", (*PYTEST, f"tests/kernels/test_{name}.py")) for name in DEVICE_TESTS]
    found += [
        Slice("device-launches", (*PYTEST, *launches)),
        # The golden models have a slice of their own.
        Slice("gpu-marked", (*PYTEST, "tests", "-m", "gpu", "--ignore", "tests/model/test_golden.py")),
    ]
    found += [
        Slice(f"real-{part}", (*PYTEST, "bench/bench_ops.py", "--timeout", "0", "-k", f"test_parity and ({names})"))
        for part, names in chosen.items()
    ]
    found += [
        Slice("golden-fp32", (*PYTEST, "tests/model/test_golden.py", "-m", "gpu"), at_golden, no_golden),
        Slice("golden-bf16", (sys.executable, "-m", "bench.golden", str(golden)), skip=no_golden),
    ]
    found += [
        Slice(
            f"{tool}-{part}",
            (
                *(str(sanitizer), "--tool", tool, "--error-exitcode", "9"),
                *(*PYTEST, *small, "-k", f"test_matches_reference and bfloat16 and ({names})"),
            ),
            checked,
            no_sanitizer,
        )
        for tool in ("memcheck", "racecheck")
        for part, names in chosen.items()
    ]
    found += [
        Slice(f"bench-{part}", rows_of([names], "eager,compiled", missing=missing)) for part, names in chosen.items()
    ]
    return found


def run(part: Slice, limit: float, log: Path | None = None) -> str:
    """ "passed", "failed (status)" or "timed out"; what it prints goes through, and to the end of `log`."""
    print(f"\n==== {part.name}: {shlex.join(part.command)}", flush=True)
    process = subprocess.Popen(
        part.command,
        cwd=ROOT,
        env=os.environ | dict(part.env) | ({"PYTHONUNBUFFERED": "1"} if log else {}),  # all of it, also when cut
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if log else None,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,
    )
    copy = None
    if log and process.stdout:
        copy = threading.Thread(target=tee, args=(process.stdout, log), daemon=True)
        copy.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if process.poll() is None:  # the slice's own processes, all in the session that began with it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if copy:
            copy.join(10)
    return "passed" if status == 0 else f"failed ({status})"


def tee(source: IO[bytes], log: Path) -> None:
    """Hand on what comes, and keep it."""
    with source, log.open("ab", buffering=0) as file:
        while piece := os.read(source.fileno(), 1 << 16):
            file.write(piece)
            sys.stdout.write(piece.decode(errors="replace"))
            sys.stdout.flush()


def run_all(chosen: Sequence[Slice], limit: float, budget: float) -> dict[str, tuple[str, float]]:
    """Outcome and seconds by slice, up to where the budget ends."""
    begin, outcomes = time.monotonic(), {}
    for part in chosen:
        if part.skip:
            outcomes[part.name] = (f"skipped: {part.skip}", 0.0)
            continue
        left = budget - (time.monotonic() - begin)
        if outcomes and left < min(60, limit):  # a process takes seconds to start, a kernel to compile
            break
        started = time.monotonic()
        outcome = run(part, min(limit, left))
        outcomes[part.name] = (outcome, time.monotonic() - started)
    return outcomes


def seconds(text: str) -> float:
    """For argparse: more than none; "inf" is no end."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"is {text}, expected seconds, more than 0")
    return value


def missing(needed: Sequence[str] | None = None) -> str:
    """What the tests need (None) and this Python lacks, and what to do about it; empty if nothing."""
    lacking = [name for name in needed or NEEDED if importlib.util.find_spec(name.replace("-", "_")) is None]
    if not lacking:
        return ""
    return (
        f"{sys.executable} lacks {', '.join(lacking)}. Where there is a network: "
        f"pip download --only-binary=:all: -d wheels {' '.join(lacking)}; "
        f"here: {sys.executable} -m pip install --no-index --target site wheels/*.whl, then with PYTHONPATH=site"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_tests", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slices", nargs="*", metavar="SLICE", help='names or patterns ("real-*"); default: all')
    parser.add_argument("--from", dest="first", metavar="SLICE", help="begin with this one")
    parser.add_argument("--list", action="store_true", help="print the slices and their commands, run nothing")
    parser.add_argument("--limit", type=seconds, default=LIMIT, help="seconds a slice (default: %(default)s)")
    parser.add_argument(
        "--budget", type=seconds, default=LIMIT, help="seconds in all (default: %(default)s; inf: no end)"
    )
    options = parser.parse_args(arguments)

    def refuse(what: str) -> int:
        print(f"bench.gpu_tests: error: {what}", file=sys.stderr)
        return 2

    if lacking := missing():
        return refuse(lacking)
    import torch

    from .measure import table

    golden = golden_folder()
    known = slices(golden=golden, sanitizer=shutil.which("compute-sanitizer"))
    names = [part.name for part in known]
    for pattern in [*options.slices, *([options.first] if options.first else [])]:
        if not fnmatch.filter(names, pattern):
            return refuse(f"no slice is called {pattern!r}; there are: {', '.join(names)}")
    patterns = options.slices or ["*"]
    chosen = [part for part in known if any(fnmatch.fnmatchcase(part.name, pattern) for pattern in patterns)]
    if options.first:
        begin = names.index(fnmatch.filter(names, options.first)[0])
        chosen = [part for part in chosen if names.index(part.name) >= begin]
    if options.list:
        for part in chosen:
            print(f"{part.name:20s} {f'skipped: {part.skip}' if part.skip else shlex.join(part.command)}")
        return 0
    if not torch.cuda.is_available():
        return refuse("these tests need an NVIDIA GPU, and there is none")
    outcomes = run_all(chosen, options.limit, options.budget)
    print(f"\n{table(('slice', 'outcome', 's'), [(n, what, f'{took:.0f}') for n, (what, took) in outcomes.items()])}")
    if left := [part.name for part in chosen if part.name not in outcomes]:
        print(f"\nOut of time. To go on: make test-gpu ARGS='{' '.join(['--from', left[0], *options.slices])}'")
    done = all(what == "passed" or what.startswith("skipped") for what, _ in outcomes.values())
    return 0 if done and not left else 1


if __name__ == "__main__":
    sys.exit(main())
