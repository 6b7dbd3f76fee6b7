"""`make bench`: a row per op, shape and pass. A row is red where results are wrong; how fast it is nobody asserts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tt_kernels.runtime.launch import ON_CPU

from . import clock, measure, ops, report
from .conftest import LINES, chosen
from .oracle import DTYPES
from .peers import peers_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = ops.cases(DEVICE)
pytestmark = pytest.mark.skipif(ON_CPU, reason="the interpreter's times mean nothing")


def also(wanted: Sequence[str]) -> list[ops.Case]:
    """Forward cases that no card lists: "OP:b=4,L=32" is the op's first one with other sizes."""
    found = []
    for text in wanted:
        name, _, dims = text.partition(":")
        first = next((case for case in CASES if case.name == name), None)
        try:
            given = measure.sizes(dims)
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


@pytest.fixture(scope="session")
def bench() -> dict[str, Any]:
    """What rows share: the clock, judgements, the roofs of this run, where it runs."""
    found = clock.DeviceClock() if DEVICE == "cuda" else clock.HostClock()
    roofs = clock.roofs(found) if isinstance(found, clock.DeviceClock) else None
    return {"clock": found, "checked": ops.Checked(found), "where": measure.where(), "roofs": roofs}


def recorded(where: Mapping[str, Any]) -> dict[str, set[str]]:
    """The peers of each row that this machine has recorded for this commit and these tuned launches, by the row's key.
    A red row does not count."""
    same = lambda machine: [str(machine.get(name, "")).rstrip("+") for name in ("commit", "tuned")]
    lines = measure.recorded(measure.RESULTS / f"{measure.machine_name(where)}.jsonl")
    mine = [x for x in lines if report.kind_of(x) == "row" and same(x["machine"]) == same(where) and not x["fault"]]
    return {report.key_of(line): set(line["peers"]) for line in mine}


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU tests/ check the ops")
def test_parity(case: ops.Case, bench: dict[str, Any]) -> None:
    """At the published shapes."""
    _, judgement = bench["checked"](case)
    assert not judgement.faults, judgement.faults


def test_row(case: ops.Case, bench: dict[str, Any], request: pytest.FixtureRequest) -> None:
    wanted = chosen(request.config.getoption("--peers"), DEVICE)
    if request.config.getoption("--missing"):
        line = dict(machine={}, kind="row", op=case.name, dims=case.dims, dtype=DTYPES[case.dtype], which=case.which)
        known = recorded(bench["where"]).get(report.key_of(line))
        if known is not None and {peer.name for peer in peers_of(case.op, wanted)} <= known:
            pytest.skip("recorded already")
    seconds = 1.0 if DEVICE == "cuda" else 0.3
    try:
        row = ops.measure(case, bench["clock"], bench["checked"], bench["roofs"], wanted, seconds)
    finally:
        bench["clock"].release()
    line = {"kind": "row", "machine": bench["where"], "roofs": bench["roofs"], **row.record()}
    request.config.stash[LINES].append(line)
    if request.config.getoption("--record"):
        measure.record(line)
    assert not row.fault, row.fault
