"""Two checkouts against each other: the same harness, the same operands, in turns. `python -m bench.report --base REF`.

A process for each checkout imports its tt_kernels and this checkout's bench, and measures when it is told to. Samples
alternate, so what slows the machine slows both. A change is called only beyond 3 % of the median and beyond the noise:
p80 of the one below p20 of the other.
"""

from __future__ import annotations

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GAIN = 0.03


def verdict(new: Sequence[float], base: Sequence[float]) -> tuple[float, str]:
    """Time over the base's, and "slower", "faster" or nothing."""
    from .clock import percentile

    ratio = percentile(new, 0.5) / percentile(base, 0.5)
    if ratio > 1 + GAIN and percentile(new, 0.2) > percentile(base, 0.8):
        return ratio, "slower"
    if ratio < 1 - GAIN and percentile(new, 0.8) < percentile(base, 0.2):
        return ratio, "faster"
    return ratio, ""


# ---- a side: one checkout's kernels, told what to measure ----


def serve(tree: Path) -> None:
    """Answer requests from stdin, a line of JSON each, on the stdout that this process began with."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints must not get between the answers
    sys.path.insert(0, str(tree))
    import tt_kernels
    import tt_model  # noqa: F401  both packages of this side, before anything else could import others

    assert Path(tt_kernels.__file__).is_relative_to(tree), tt_kernels.__file__
    sys.path.remove(str(tree))

    import torch

    from bench import clock, ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    watch = clock.DeviceClock() if device == "cuda" else clock.HostClock()
    checked = ops.Checked(watch)
    cases = {case.id: case for case in ops.cases(device)}
    known, sampler, kept = "", None, []

    def ready(name: str, most: int | None) -> str:
        """Make the case's sampler on so many sets of operands (None: as memory holds); why it has none."""
        nonlocal known, sampler, kept
        known, sampler, kept = name, None, []
        watch.release()
        case = cases[name]
        if faults := checked(case)[1].faults:
            return "; ".join(faults.values())
        with watch.scope():
            kept = ops.bind(case, case.op.fn, ops.operands(case, watch)[:most])
            samplers, _, errors = watch.samplers({"ours": kept})
        sampler = samplers.get("ours")
        return errors.get("ours", "")

    for line in sys.stdin:
        ask = json.loads(line)
        found: dict[str, Any] = {"cases": list(cases)}
        if "case" in ask:
            try:
                most = ask.get("sets")
                again = ask["case"] != known or (most is not None and len(kept) > most)
                found = {"fault": ready(ask["case"], most) if again else "", "sets": len(kept)}
                if not found["fault"] and sampler is not None:
                    with watch.scope():
                        found["samples"] = [sampler() for _ in range(ask["samples"])]
            except Exception as error:
                found = {"fault": clock.reason(error)}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


class Side:
    """The process that serves a checkout."""

    def __init__(self, name: str, tree: Path):
        self.name = name
        code = "import sys; from pathlib import Path; from bench.compare import serve; serve(Path(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(tree.resolve())]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise RuntimeError(f"{self.name}: its process ended; this harness does not fit that commit") from error

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(60)


@contextmanager
def sides(new: Path, base: Path) -> Iterator[tuple[Side, Side]]:
    opened = [Side("this checkout", new), Side("the base", base)]
    try:
        yield opened[0], opened[1]
    finally:
        for side in opened:
            if side.process.poll() is None:
                side.close()


def compare(new: Path, base: Path, pattern: str = "*", rounds: int = 10) -> list[dict[str, Any]]:
    """A dict for each case that both checkouts have and whose op matches the pattern."""
    found = []
    with sides(new, base) as pair:
        shared = [set(side.ask()["cases"]) for side in pair]
        names = [name for name in pair[0].ask()["cases"] if name in shared[1]]
        for name in (name for name in names if fnmatch.fnmatchcase(name.partition("-")[0], pattern)):
            samples: tuple[list[float], list[float]] = ([], [])
            # One device holds the operands of both: who came second may have room for fewer sets.
            found_sets = [side.ask(case=name, samples=0) for side in pair]
            faults = [answer["fault"] for answer in found_sets]
            sets = min((answer["sets"] for answer in found_sets if not answer["fault"]), default=None)
            for turn in range(rounds + 1 if not any(faults) else 0):  # the first is not counted
                for i, side in enumerate(pair):
                    answer = side.ask(case=name, samples=3, sets=sets)
                    faults[i] = faults[i] or answer["fault"]
                    samples[i].extend(answer.get("samples", ()) if turn else ())
                if any(faults):
                    break
            row: dict[str, Any] = {"case": name, "fault": faults[0], "base_fault": faults[1]}
            if not any(faults):
                row["new"], row["base"] = samples
                row["ratio"], row["verdict"] = verdict(*samples)
            found.append(row)
    return found


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    from .clock import percentile
    from .measure import table

    cells = []
    for row in rows:
        if "ratio" in row:
            p20, p50, p80 = ([1e6 * percentile(row[k], share) for k in ("base", "new")] for share in (0.2, 0.5, 0.8))
            spread = [f"{p50[i]:.2f} ({p20[i]:.2f}-{p80[i]:.2f})" for i in range(2)]
            cells.append((row["case"], *spread, f"{row['ratio']:.3f}", row["verdict"]))
        else:
            who = "here" if row["fault"] else "in the base"
            cells.append((row["case"], "-", "-", "-", f"RED {who}: {row['fault'] or row['base_fault']}"))
    yield table(("case", "base us (p20-p80)", "us (p20-p80)", "over base", "verdict"), cells)
    slower = [row["case"] for row in rows if row.get("verdict") == "slower"]
    yield f"slower beyond {100 * GAIN:.0f} % and the noise: {', '.join(slower) or 'none'}"


def git(*arguments: str) -> bytes:
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True)
    if run.returncode:
        raise ValueError((run.stderr.decode().strip().splitlines() or ["git failed"])[-1])
    return run.stdout


@contextmanager
def checkout(reference: str) -> Iterator[tuple[Path, str]]:
    """The files of a commit in a folder of its own, and its name; the repository is only read."""
    commit = git("rev-parse", "--verify", "--end-of-options", f"{reference}^{{commit}}").decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x", "-C", folder], input=git("archive", commit), check=True)
        yield Path(folder), commit[:12]


def main(reference: str, pattern: str, rounds: int) -> int:
    """0: nothing is slower and nothing wrong here; 1 otherwise."""
    from bench import clock

    try:
        with checkout(reference) as (base, commit):
            print(f"{clock.here()}; base: commit {commit}\n", flush=True)
            rows = compare(ROOT, base, pattern, rounds)
    except (OSError, ValueError, RuntimeError, subprocess.SubprocessError) as error:
        print(f"bench.report: error: --base {reference}: {error}", file=sys.stderr)
        return 2
    if not rows:
        print(f"bench.report: error: -k {pattern}: no op of both commits is called that", file=sys.stderr)
        return 2
    print("\n".join(lines(rows)))
    return int(any(row.get("verdict") == "slower" or row["fault"] for row in rows))
