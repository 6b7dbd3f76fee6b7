"""`make bench`: a row per op, shape and pass. A row is red where results are wrong; how fast it is nobody asserts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import clock, measure, ops
from tt_kernels.runtime.launch import ON_CPU

from .conftest import GPU_ONLY, HEADING, ROWS, chosen
from .oracle import DTYPES
from .peers import peers_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = ops.cases(DEVICE)
pytestmark = pytest.mark.skipif(ON_CPU, reason="the interpreter's times mean nothing")


def also(wanted: Sequence[str]) -> list[ops.Case]:
    """Forward cases that no card lists: "OP:b=4,L=32" is the op's first one with other sizes."""
    found = []
    for text in wanted:
        name, _, sizes = text.partition(":")
        first = next((case for case in CASES if case.name == name), None)
        try:
            given = {k: int(v) for k, _, v in (part.partition("=") for part in sizes.split(","))}
        except ValueError:
            given = {"": 0}
        if first is None or not given.keys() <= first.dims.keys():
            raise pytest.UsageError(f"--also is {text}, expected an op and sizes of its card: mamba_block:b=4,L=32")
        found.append(replace(first, dims={**first.dims, **given}, backward=False))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = {case.id: case for case in [*CASES, *also(metafunc.config.getoption("--also"))]}
        metafunc.parametrize("case", list(cases.values()), ids=list(cases))


class Playback:
    """pytest-benchmark's timer: its statistics, comparisons and JSON are of samples that a clock of ours took."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def play(self, samples: Iterator[float]) -> None:
        self.now += next(samples)


PLAYBACK = Playback()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What rows share: the clock, judgements, the roofs of this run, where it runs."""
    found = clock.DeviceClock() if DEVICE == "cuda" else clock.HostClock()
    shared: dict[str, Any] = {"clock": found, "checked": ops.Checked(found), "where": clock.where(found)}
    shared["roofs"] = clock.roofs(found) if DEVICE == "cuda" else None
    request.config.stash[HEADING].update(where=clock.in_a_line(shared["where"]), roofs=shared["roofs"])
    if DEVICE == "cpu":
        request.config.stash[HEADING]["skipped"] = (
            f"parity at the published shapes, device times, {', '.join(GPU_ONLY)}"
        )
    return shared


def recorded(where: Mapping[str, Any]) -> dict[str, set[str]]:
    """The peers of each row that this machine has recorded for this commit and these tuned launches, by the row's id. A
    red row does not count."""
    path = measure.RESULTS / f"{measure.machine_name(where)}.jsonl"
    same = lambda machine: [str(machine.get(name, "")).rstrip("+") for name in ("commit", "tuned")]
    found: dict[str, set[str]] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        if line.get("kind") == "row" and same(line["machine"]) == same(where) and not line["fault"]:
            found[_id(line)] = set(line["peers"])
    return found


def _id(line: Mapping[str, Any]) -> str:
    return json.dumps([line["op"], line["dims"], line["dtype"], line["which"]], sort_keys=True)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU tests/ check the ops")
def test_parity(case: ops.Case, bench: dict[str, Any]) -> None:
    """At the published shapes."""
    _, judgement = bench["checked"](case)
    assert not judgement.faults, judgement.faults


@pytest.mark.benchmark(timer=PLAYBACK)
def test_row(case: ops.Case, bench: dict[str, Any], request: pytest.FixtureRequest) -> None:
    wanted = chosen(request.config.getoption("--peers"), DEVICE)
    if request.config.getoption("--missing"):
        line = dict(op=case.name, dims=dict(case.dims), dtype=DTYPES[case.dtype], which=case.which)
        known = recorded(bench["where"]).get(_id(line))
        if known is not None and {peer.name for peer in peers_of(case.op, wanted)} <= known:
            pytest.skip("recorded already")
    seconds = 1.0 if DEVICE == "cuda" else 0.3
    try:
        row = ops.measure(case, bench["clock"], bench["checked"], bench["roofs"], wanted, seconds)
    finally:
        bench["clock"].release()
    request.config.stash[ROWS].append(row)
    if request.config.getoption("--record"):
        measure.record({"kind": "row", "machine": bench["where"], "roofs": bench["roofs"], **row.record()})
    assert not row.fault, row.fault
    if request.config.pluginmanager.has_plugin("benchmark"):
        benchmark, samples = request.getfixturevalue("benchmark"), iter(row.samples)
        benchmark.extra_info.update(row.record())
        benchmark.pedantic(PLAYBACK.play, args=(samples,), rounds=len(row.samples))
