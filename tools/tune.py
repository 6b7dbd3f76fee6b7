"""`python -m tools.tune OP`: measure the launches that an op's card proposes, and keep those that beat the heuristic.

For every kernel with candidates, at every published shape and pass: each candidate must give right results, then all of
them and the heuristic's launch are timed in turns, the whole op each time, as bench/ops.py times a row. A candidate is
kept if it takes 3 % off the op's time and its p80 is below the heuristic's p20. Kept rows go to
tt_kernels/tuned/sm_<architecture>.json, which the launchers read; a key that was measured and has no winner is removed.
Ops share kernels and keys: a key's launch is chosen over all that bench/tuning/ has on it from this GPU at this commit,
to which every shape's samples are added, so it does not matter which op comes last, or in which process.
Both files are written after every shape: an interrupted run keeps what it has, and goes on with --missing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.clock import DeviceClock, in_a_line, interleave, no_commit, percentile, reason, where
from bench.measure import append, table
from bench.ops import Case, bind, low_dtype, operands
from bench.oracle import Clock, oracle
from cards import OPS, Op
from tt_kernels.runtime import launch
from tt_kernels.runtime.launch import Launch, overriding

SAMPLES = Path(__file__).parents[1] / "bench/tuning"
GAIN = 0.03
HEURISTIC = "heuristic"


class Untunable(Exception):
    """The op is wrong or waits for the host: nothing to tune yet."""


@dataclass
class Trial:
    """One kernel at one shape and pass: seconds a call of the whole op, with each launch that gives right results."""

    kernel: str
    what: str  # op, shape and pass
    keys: tuple[str, ...]  # what `tuned` was asked for
    heuristic: list[float]
    launches: dict[Launch, list[float]]
    dropped: dict[Launch, str] = field(default_factory=dict)


def beats(candidate: Sequence[float], heuristic: Sequence[float]) -> bool:
    """By 3 % in the median, and beyond the noise: p80 below the other's p20."""
    faster = percentile(candidate, 0.5) <= (1 - GAIN) * percentile(heuristic, 0.5)
    return faster and percentile(candidate, 0.8) < percentile(heuristic, 0.2)


def choose(trials: Sequence[Trial]) -> Launch | None:
    """The launch for a key, from all trials that asked for it: the fastest over their sum, if it beats the heuristic
    there; None: the heuristic stays. A launch that is missing in one of them is out."""
    common = set.intersection(*(set(t.launches) for t in trials))
    rounds = min(len(t.heuristic) for t in trials)

    def total(samples: Iterable[Sequence[float]]) -> list[float]:
        return [sum(values) for values in zip(*(s[:rounds] for s in samples), strict=True)]

    sums = {candidate: total(t.launches[candidate] for t in trials) for candidate in common}
    heuristic = total(t.heuristic for t in trials)
    winners = [candidate for candidate in sums if beats(sums[candidate], heuristic)]
    return min(winners, key=lambda c: (percentile(sums[c], 0.5), repr(c)), default=None)


class Samples:
    """tuning/sm_<architecture>.jsonl: every trial, a line each, never changed. Those of the same GPU and commit count,
    and of a kernel at a shape and pass the last one."""

    def __init__(self, path: Path, machine: Mapping[str, Any]):
        self.path, self.machine = path, machine
        self.trials: dict[tuple[str, str], Trial] = {}
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            line = json.loads(text)
            if self._same(line["machine"]):
                self._keep(
                    Trial(
                        line["kernel"],
                        line["what"],
                        tuple(line["keys"]),
                        line["heuristic"],
                        {Launch(**options): samples for options, samples in line["launches"]},
                    )
                )

    def _same(self, other: Mapping[str, Any]) -> bool:
        facts = lambda machine: (machine.get("gpu"), str(machine.get("commit")).rstrip("+"))  # a kept row is a change
        return facts(other) == facts(self.machine)

    def _keep(self, trial: Trial) -> None:
        self.trials[trial.kernel, trial.what] = trial

    def add(self, trial: Trial) -> None:
        self._keep(trial)
        short = lambda samples: [float(f"{s:.5g}") for s in samples]
        line = {
            "machine": self.machine,
            "kernel": trial.kernel,
            "what": trial.what,
            "keys": trial.keys,
            "heuristic": short(trial.heuristic),
            "launches": [(launch.options, short(samples)) for launch, samples in trial.launches.items()],
        }
        append(self.path, line)

    def of(self, kernel: str, key: str) -> list[Trial]:
        """All that asked for this launch."""
        return [trial for trial in self.trials.values() if trial.kernel == kernel and key in trial.keys]


class Table:
    """tuned/sm_<architecture>.json: who measured what, and the launches that won."""

    def __init__(self, path: Path, provenance: Mapping[str, Any]):
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.provenance = [*found.get("provenance", []), provenance]
        self.launches: dict[str, dict[str, dict[str, int]]] = found.get("launches", {})

    def put(self, kernel: str, key: str, chosen: Launch | None) -> None:
        rows = self.launches.setdefault(kernel, {})
        rows.pop(key, None)
        if chosen is not None:
            rows[key] = dict(chosen.options)
        if not rows:
            del self.launches[kernel]

    def save(self) -> None:
        """All of it or nothing: a reader never sees half a file."""
        launches = {kernel: dict(sorted(rows.items())) for kernel, rows in sorted(self.launches.items())}
        entries = ",\n".join(f"  {json.dumps(entry)}" for entry in self.provenance)
        kernels = ",\n".join(
            f"  {json.dumps(kernel)}: {{\n"
            + ",\n".join(f"   {json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items())
            + "\n  }"
            for kernel, rows in launches.items()
        )
        text = f'{{\n "provenance": [\n{entries}\n ],\n "launches": {{\n{kernels}\n }}\n}}\n'
        self.path.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self.path.parent, prefix=self.path.name, suffix=".new", delete=False
        ) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, self.path)
            except BaseException:
                os.unlink(file.name)
                raise
        launch._table.cache_clear()  # what is tuned next runs beside what has been


def asked(kernel: str, call: Callable[[], Any]) -> tuple[str, ...]:
    """The keys for which a call asks for a launch of this kernel, each once."""
    with overriding(kernel, None) as keys:
        call()
    return tuple(dict.fromkeys(keys))


def title(case: Case) -> str:
    return f"{case.name} {case.shape} {case.which}"


def trial(case: Case, kernel: str, candidates: Sequence[Launch], clock: Clock, seconds: float) -> Trial | None:
    """Measure every candidate for one kernel; None where the pass does not ask for it at this shape."""

    def using(candidate: Launch | None) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: overriding(kernel, candidate)

    def calls(candidate: Launch | None) -> list[Callable[[], Any]]:
        def within(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with overriding(kernel, candidate):
                    return call()

            return run

        return [within(call) for call in bind(case, case.op.fn, sets)]

    with clock.scope():
        sets = operands(case, clock)
        keys = asked(kernel, bind(case, case.op.fn, sets[:1])[0])
    if not keys:
        return None
    found = Trial(kernel, title(case), keys, [], {})
    del sets
    truth, judgement = oracle(case.op, case.dims, case.dtype, clock, case.backward)
    if judgement.faults:
        raise Untunable(f"{found.what} is wrong before anything is tuned: {'; '.join(judgement.faults.values())}")
    for candidate in dict.fromkeys(candidates):
        try:
            with clock.scope():
                judgement = truth.judge(using(candidate))
            if judgement.faults:
                found.dropped[candidate] = "wrong: " + "; ".join(judgement.faults.values())
        except Exception as error:  # more shared memory than there is, registers, ...
            found.dropped[candidate] = f"does not run: {reason(error)}"
    del truth
    clock.release()
    with clock.scope():
        sets = operands(case, clock)
        right = {str(c): c for c in dict.fromkeys(candidates) if c not in found.dropped}
        samplers, how, errors = clock.samplers(
            {HEURISTIC: calls(None), **{name: calls(candidate) for name, candidate in right.items()}}
        )
        if HEURISTIC in errors or how[HEURISTIC] == "events":
            raise Untunable(f"{found.what}: {errors.get(HEURISTIC, 'waits for the host')}")
        found.dropped |= {right[name]: why for name, why in errors.items()}
        times = interleave(samplers, seconds)
    found.heuristic = times.pop(HEURISTIC)
    found.launches = {right[name]: samples for name, samples in times.items()}
    return found


def lines(found: Trial) -> Iterator[str]:
    """What a trial saw, as a table."""
    base = percentile(found.heuristic, 0.5)
    rows = []
    for name, samples in ((HEURISTIC, found.heuristic), *found.launches.items()):
        p20, p50, p80 = (f"{1e6 * percentile(samples, share):.2f}" for share in (0.2, 0.5, 0.8))
        gain = 100 * (1 - percentile(samples, 0.5) / base)
        kept = "wins" if name != HEURISTIC and beats(samples, found.heuristic) else ""
        rows.append((name, p50, f"{p20}-{p80}", f"{gain:+.1f} %", kept))
    yield f"\n{found.kernel}: {found.what}, key {', '.join(found.keys)}\n"
    yield table(("launch", "us", "p20-p80", "gain", ""), rows)
    yield from (f"{candidate}: {why}" for candidate, why in found.dropped.items())


def tune(
    op: Op,
    clock: Clock,
    results: Table,
    samples: Samples,
    *,
    shapes: Sequence[Mapping[str, int]],
    passes: Sequence[str],
    seconds: float,
    missing: bool = False,
) -> None:
    """Every kernel of an op that has candidates, every shape and pass; `missing`: but what `samples` has."""
    for kernel, candidates in op.candidates.items():
        asked_for = False
        for dims in shapes:
            for which in passes:
                case = Case(op, dims, low_dtype(op), which == "backward")
                if missing and (kernel, title(case)) in samples.trials:
                    asked_for = True
                    continue
                found = trial(case, kernel, candidates, clock, seconds)
                clock.release()
                if found is None:
                    continue
                asked_for = True
                print("\n".join(lines(found)), flush=True)
                samples.add(found)
                for key in found.keys:
                    results.put(kernel, key, choose(samples.of(kernel, key)))
                results.save()
        if not asked_for:
            print(f"{kernel}: no key was asked for at these shapes", flush=True)


def _shapes(op: Op, wanted: Sequence[str]) -> list[dict[str, int]]:
    """The card's shapes that have all of some "T=16,D=2688"; all shapes for none."""
    filters = [{k: int(v) for k, _, v in (part.partition("=") for part in w.split(","))} for w in wanted]
    return [dims for dims in op.shapes if not filters or any(f.items() <= dims.items() for f in filters)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", help="whose kernels to tune")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="T=16,..", help="of the card's shapes only these"
    )
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples a shape (default: %(default)s)")
    parser.add_argument("--missing", action="store_true", help="skip what bench/tuning/ has of this GPU and commit")
    options = parser.parse_args(arguments)

    def refuse(what: str) -> int:
        print(f"tools.tune: error: {what}", file=sys.stderr)
        return 2

    op = OPS.get(options.op)
    if op is None or not op.candidates:
        what = f"no op is called {options.op!r}" if op is None else f"the card of {options.op} proposes no launches"
        return refuse(f"{what}; to tune: {', '.join(n for n, card in OPS.items() if card.candidates) or 'nothing yet'}")
    try:
        shapes = _shapes(op, options.shape)
    except ValueError:
        return refuse(f"--shape is {' '.join(options.shape)}, expected sizes by name: T=16,D=2688")
    if not shapes:
        return refuse(f"--shape is {' '.join(options.shape)}, expected sizes of {options.op}: {op.shapes}")
    if not torch.cuda.is_available():
        return refuse("launches are measured on an NVIDIA GPU, and there is none")
    if why := no_commit():
        return refuse(why)
    clock = DeviceClock()
    machine = where(clock)
    print(in_a_line(machine))
    passes = [which for which in options.passes if which == "forward" or op.grads]
    samples = Samples(SAMPLES / f"sm_{machine['architecture']}.jsonl", machine)
    results = Table(
        launch.TUNED / f"sm_{machine['architecture']}.json",
        {"op": options.op, "shapes": shapes, "passes": passes, "machine": machine},
    )
    try:
        how = dict(shapes=shapes, passes=passes, seconds=options.seconds, missing=options.missing)
        tune(op, clock, results, samples, **how)
    except Untunable as error:
        print(f"tools.tune: error: {error}", file=sys.stderr)
        return 1
    print(f"\n{results.path}: {sum(map(len, results.launches.values()))} launches in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
