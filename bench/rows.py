"""How rows read: the table of a run, and what is wrong or missing below it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .measure import table
from .ops import Row
from .peers import names


def report(rows: Sequence[Row], roofs: Mapping[str, float] | None) -> Iterator[str]:
    """The table of a run, and what is wrong below it."""
    if roofs:
        yield (
            f"Measured roofs: read {roofs['read'] / 1e12:.2f} TB/s, copy {roofs['copy'] / 1e12:.2f} TB/s, "
            f"cuBLAS bf16 {roofs['compute'] / 1e12:.0f} TFLOP/s; a row's: the larger of its times by them\n"
        )
    present = peers_present(rows)
    header = ["op", "shape", "pass", "p50 us", "p20-p80", *(("TB/s", "TFLOP/s", "of roof", "MB") if roofs else ())]
    header += ["error", "eager's", *(f"{name}/ours" for name in present), "notes"]
    lines = []
    for row in rows:
        cells = [row.op, " ".join(f"{k}={v}" for k, v in row.dims.items()), row.which]
        if row.fault:
            cells += ["RED"] + [""] * (len(header) - 5) + ["see below"]
        else:
            cells += [f"{1e6 * row.p50:.1f}", f"{1e6 * row.p20:.1f}-{1e6 * row.p80:.1f}"]
            if roofs:
                rates = (row.bytes / row.p50 / 1e12, row.flops / row.p50 / 1e12)
                cells += [f"{rates[0]:.2f}", f"{rates[1]:.1f}", f"{100 * row.share:.0f} %", f"{row.memory / 1e6:.1f}"]
            cells += [
                f"{row.error:.1e}",
                f"{row.eager_error:.1e}",
                *(_times(row, name) for name in present),
                notes(row),
            ]
        lines.append(cells)
    yield table(header, lines)
    yield from (f"RED {row.op} {row.dims} {row.dtype} {row.which}: {row.fault}" for row in rows if row.fault)
    yield from absent(rows)


def peers_present(rows: Sequence[Row]) -> list[str]:
    """Peers that some row has a time of, in the order of the registry."""
    timed = {name for row in rows for name, found in row.peers.items() if "ratio" in found}
    return [name for name in dict.fromkeys([*names(), *sorted(timed)]) if name in timed]


def absent(rows: Sequence[Row]) -> Iterator[str]:
    """Peers without a time and why, a line for each reason, with the ops that it concerns."""
    found = reasons((f"{row.op} {row.which}", row.peers) for row in rows)
    yield from (f"no time of {name} ({', '.join(ops)}): {why}" for name, why, ops in found)


def reasons(rows: Iterable[tuple[str, Mapping[str, Mapping[str, Any]]]]) -> Iterator[tuple[str, str, list[str]]]:
    """Of rows, named, with their peers: a peer without a time, why, and the rows that it concerns."""
    why: dict[tuple[str, str], dict[str, None]] = {}
    for row, peers in rows:
        for name, found in peers.items():
            if "why" in found:
                why.setdefault((name, found["why"]), {})[row] = None
    yield from ((name, what, list(named)) for (name, what), named in why.items())


def _times(row: Row, peer: str) -> str:
    found = row.peers.get(peer, {})
    return f"{found['ratio']:.2f}" + ("*" if found["clock"] == "events" else "") if "ratio" in found else "-"


def notes(row: Row) -> str:
    """What makes a row other than the rule: kernel, bf16, graph, four sets, an fp64 oracle of the whole shape."""
    found = [] if row.kernel else ["CPU, reference" if row.clock == "wall" else "reference"]
    found += [row.dtype] if row.dtype != "bf16" and row.clock != "wall" else []
    found += ["host's share in it"] if row.clock == "events" else []
    found += [f"{row.sets} sets"] if row.sets < 4 and row.clock != "wall" else []
    found += [f"oracle {row.oracle}"] if row.oracle != "fp64" else []
    found += ["ABOVE THE ROOF: its inputs hold less work than its cost counts, or its clock is wrong"] * (row.share > 1)
    return ", ".join(found)
