"""`python -m tools.tune OP`: measure the launches that an op's card proposes, and keep those that beat the heuristic.

For every kernel with candidates, at every published shape and pass: each candidate must give right results, then all of
them and the heuristic's launch are timed in turns, the whole op each time, as bench/ops.py times a row. A candidate is
kept for a key if it takes 3 % off the op's time, over all shapes and ops that ask for the key, and its p80 is below the
heuristic's p20. Samples are appended to bench/tuning/sm_<architecture>.jsonl; those of this GPU and commit decide,
whichever process measured them. What wins goes to tt_kernels/tuned/, which the launchers read. Both are written after
every shape: an interrupted run goes on with --missing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench import measure
from bench.clock import DeviceClock, interleave, reason
from bench.measure import around, faster, percentile, percentiles
from bench.ops import Case, bind, cases, operands, ours
from bench.oracle import Clock, oracle
from cards import OPS, Op
from tt_kernels.runtime import launch
from tt_kernels.runtime.launch import Launch, overriding
from tt_model.files import write_atomically

SAMPLES = measure.ROOT / "bench/tuning"
HEURISTIC = "heuristic"
Line = dict[str, Any]  # of the samples: machine, kernel, what, keys, heuristic's seconds, [options, seconds] of others


def within(kernel: str, candidate: Launch | None, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with overriding(kernel, candidate):
            return call()

    return run


def trial(case: Case, kernel: str, candidates: Sequence[Launch], clock: Clock, seconds: float) -> Line | None:
    """Measure every candidate for one kernel; None where the pass does not ask for it at this shape."""
    with clock.scope():
        call = bind(case, ours(case.op), operands(case, clock)[:1])[0]
        with overriding(kernel, None) as asked:
            call()
        del call
    if not asked:
        return None
    truth, judgement = oracle(case.op, case.dims, case.dtype, clock, case.backward)
    if judgement.faults:
        raise ValueError(f"{case.id} is wrong before anything is tuned: {'; '.join(judgement.faults.values())}")
    right: dict[str, Launch | None] = {HEURISTIC: None}
    dropped: dict[str, str] = {}
    for candidate in dict.fromkeys(candidates):
        name = json.dumps(candidate.options)
        try:
            with clock.scope():
                wrong = truth.judge(lambda candidate=candidate: overriding(kernel, candidate)).faults
            dropped |= {name: f"wrong: {'; '.join(wrong.values())}"} if wrong else {}
            right |= {} if wrong else {name: candidate}
        except Exception as error:  # more shared memory than there is, registers, ...
            dropped[name] = f"does not run: {reason(error)}"
    del truth
    clock.release()
    with clock.scope():
        sets = operands(case, clock)
        calls = {n: [within(kernel, c, call) for call in bind(case, ours(case.op), sets)] for n, c in right.items()}
        samplers, how, errors = clock.samplers(calls)
        if HEURISTIC in errors or how[HEURISTIC] == "events":
            raise ValueError(f"{case.id}: {errors.get(HEURISTIC, 'waits for the host')}")
        times = {name: [float(f"{s:.5g}") for s in found] for name, found in interleave(samplers, seconds).items()}
    base, rows = times[HEURISTIC], []
    for name, samples in times.items():
        gain = 100 * (1 - percentile(samples, 0.5) / percentile(base, 0.5))
        spread = around(*(1e6 * s for s in percentiles(samples).values()))
        rows.append((name, spread, f"{gain:+.1f} %", "wins" * faster(samples, base)))
    keys = list(dict.fromkeys(asked))
    print(f"\n{kernel}: {case.id}, key {', '.join(keys)}\n")
    print(measure.table(("launch", "us (p20-p80)", "gain", ""), rows))
    print("".join(f"{name}: {why}\n" for name, why in (dropped | errors).items()), flush=True)
    launches = [(json.loads(name), samples) for name, samples in times.items() if name != HEURISTIC]
    return dict(kernel=kernel, what=case.id, keys=keys, heuristic=base, launches=launches)


def choose(trials: Sequence[Line]) -> dict[str, int] | None:
    """The launch for a key, from all trials that asked for it: the fastest over their sum, if it beats the heuristic
    there; None: the heuristic stays. A launch that is missing in one of them is out."""
    rounds = min(len(t["heuristic"]) for t in trials)
    total = lambda every: [sum(values) for values in zip(*(samples[:rounds] for samples in every), strict=True)]
    heuristic = total([t["heuristic"] for t in trials])
    found = [{json.dumps(options): samples for options, samples in t["launches"]} for t in trials]
    sums = {name: total([f[name] for f in found]) for name in set.intersection(*map(set, found))}
    winners = [name for name in sums if faster(sums[name], heuristic)]
    best = min(winners, key=lambda name: (percentile(sums[name], 0.5), name), default=None)
    return None if best is None else json.loads(best)


def known(machine: Mapping[str, Any]) -> dict[tuple[str, str], Line]:
    """The last trial of each kernel, shape and pass that counts: of the same GPU and commit. A kept row is a change."""
    facts = lambda where: (where.get("gpu"), str(where.get("commit")).rstrip("+"))
    lines = measure.recorded(SAMPLES / f"sm_{machine['architecture']}.jsonl")
    return {(t["kernel"], t["what"]): t for t in lines if facts(t["machine"]) == facts(machine)}


def keep(kernel: str, key: str, chosen: Mapping[str, int] | None, machine: Mapping[str, Any]) -> None:
    """Put a key's launch into the table of tuned ones, or take it out."""
    file = launch.TUNED / f"sm_{machine['architecture']}.json"
    found = json.loads(file.read_text()) if file.exists() else {"provenance": [], "launches": {}}
    rows = found["launches"].setdefault(kernel, {})
    rows.pop(key, None)
    rows.update({key: dict(chosen)} if chosen else {})
    found["launches"] = {name: dict(sorted(rows.items())) for name, rows in sorted(found["launches"].items()) if rows}
    found["provenance"] += [machine] * (machine not in found["provenance"])
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, lambda new: new.write_text(json.dumps(found, indent=1) + "\n"))
    launch._table.cache_clear()  # what is tuned next runs beside what has been


def tune(op: Op, clock: Clock, machine: Mapping[str, Any], o: argparse.Namespace) -> None:
    """Every kernel of an op that has candidates, every shape and pass."""
    shapes = [dims for dims in op.shapes if not o.shape or any(wanted.items() <= dims.items() for wanted in o.shape)]
    for kernel, case in product(op.candidates, cases("cuda", {"": replace(op, shapes=tuple(shapes))})):
        if o.missing and (kernel, case.id) in known(machine):
            continue
        found = trial(case, kernel, op.candidates[kernel], clock, o.seconds)
        clock.release()
        if found is not None:
            measure.append(SAMPLES / f"sm_{machine['architecture']}.jsonl", {"machine": machine, **found})
            for key in found["keys"]:
                trials = [t for t in known(machine).values() if t["kernel"] == kernel and key in t["keys"]]
                keep(kernel, key, choose(trials), machine)


def main(arguments: Sequence[str] | None = None) -> int:
    p = measure.parser("tools.tune", __doc__)
    p.add_argument("op", choices=[name for name, op in OPS.items() if op.candidates], metavar="OP")
    p.add_argument("--shape", action="append", type=measure.sizes, metavar="T=16,..", help="only these of the card's")
    p.add_argument("--seconds", type=float, default=1.0, help="of samples a shape (default: %(default)s)")
    p.add_argument("--missing", action="store_true", help="skip what bench/tuning/ has of this GPU and commit")
    options = p.parse_args(arguments)
    if not torch.cuda.is_available():
        p.error("launches are measured on an NVIDIA GPU, and there is none")
    if why := measure.no_commit():
        p.error(why)
    machine = measure.where()
    print(measure.in_a_line(machine))
    try:
        tune(OPS[options.op], DeviceClock(), machine, options)
    except ValueError as error:
        p.exit(1, f"tools.tune: error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
