"""`python -m bench.report`: SPEED.md and its figures from bench/results/*.jsonl, nothing by hand.

Of each measurement the newest recorded line counts. --check says whether SPEED.md and its figures are what the results
give, and writes nothing. --base REF measures instead: the ops of this checkout and of a commit in turns, and calls a
change only what is beyond 3 % and beyond the noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import figures, measure, results, whole
from cards import OPS

from .figures import constant, label, part_of
from .measure import spread, table
from .peers import GENERAL, REGISTRY, names
from .results import Machine
from .rows import reasons
from .targets import REASONS, says, shortfall, target_of

ROOT = Path(__file__).parents[1]
COLUMNS = 8  # peers in one table, so that no table is wider than a page
HEAD = """# Speed

Made by `python -m bench.report` from the lines of `bench/results/`; `bench/README.md` says how each was measured. Edit
neither: record, and render again.

Every table stands below the runs that its lines are of: what one commit gave with one set of versions. Load counts the
processes that wanted a core when a measurement began: beside other work believe ratios, not times. Of each measurement
the newest line counts."""


def render(machines: Sequence[Machine], drawn: Mapping[str, Mapping[str, str]]) -> str:
    """SPEED.md; `drawn` are the figures of each machine, as paths from there."""
    parts = [HEAD]
    if not any(machine.gpu for machine in machines):
        parts.append(
            "**No GPU results are recorded yet.** What follows is a CPU's: the references at small shapes. It says\n"
            "what a call costs and that the harness works, and nothing about kernels. `make gpu-day` records a GPU's."
        )
    for machine in machines:
        parts += section(machine, drawn.get(machine.name, {}))
    return "\n\n".join(parts) + "\n"


def section(machine: Machine, drawn: Mapping[str, str]) -> Iterator[str]:
    if machine.gpu:
        yield f"## {machine.gpu}"
    else:
        yield f"## {machine.runs()[-1].where['cpu']}: CPU, references, small shapes (no claim about kernels)"
    yield "\n".join(f"- Run {run.number}: {run}" for run in machine.runs())
    if rows := machine.rows:
        yield from ops_section(machine, rows, drawn)
    yield from whole.section(machine, drawn)
    if machine.lines["cpu"]:
        yield from cpu_section(machine)


# ---- ops ----


def ops_section(machine: Machine, rows: Sequence[dict[str, Any]], drawn: Mapping[str, str]) -> Iterator[str]:
    yield "### Ops"
    yield (
        "Before a row is timed its results are held to an fp64 oracle; RED: they failed, and there is no time. The\n"
        "error is relative, in the root mean square, with plain PyTorch's in the same dtype behind it. Peers: their\n"
        "time over ours, above 1 where ours is faster; `-`: none, for the reason below the table."
    )
    if missing := machine.missing():
        count = sum(missing.values())
        yield f"Not recorded, or of shapes that the cards no longer have: {count} rows, of {', '.join(missing)}."
    if machine.gpu:
        if measured := [row["roofs"] for row in rows if row.get("roofs")]:
            read, copy, compute = (_between(measured, name) for name in ("read", "copy", "compute"))
            yield (
                f"Roofs, measured in the process of each row: read {read} TB/s, copy {copy} TB/s, cuBLAS bf16 "
                f"{compute} TFLOP/s.\nA ratio with a star has the host's share in it: that peer is not fit for a CUDA "
                "graph. MB: what a call needs at its peak\nbesides its arguments."
            )
        yield from short(machine, rows)
        if "roofline" in drawn:
            yield f"![roofline]({drawn['roofline']})"
    for part, mine in grouped(rows, part_of).items():
        yield f"#### {part}"
        if f"peers_{part}" in drawn:
            yield f"![{part}: ratio to peers]({drawn[f'peers_{part}']})"
        # On a GPU an op has many shapes, and its sizes that are the same in all stand above the table.
        for op, group in grouped(mine, lambda row: row["op"] if machine.gpu else "").items():
            fixed = constant(group) if op else {}
            yield (f"**{op}** {label(fixed)}".strip() + "\n\n" if op else "") + machine.caption(group)
            yield from ops_tables(machine, group, fixed, named=not op)
            yield from without(machine, group)


def _between(measured: Sequence[Mapping[str, float]], name: str) -> str:
    values = [roofs[name] / 1e12 for roofs in measured]
    digits = 0 if max(values) >= 100 else 2
    return " to ".join(dict.fromkeys(f"{value:.{digits}f}" for value in (min(values), max(values))))


def grouped(rows: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    """Rows by a key, in the order of the cards."""
    order = list(OPS)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["op"])):
        found.setdefault(key(row), []).append(row)
    return found


def ops_tables(
    machine: Machine, rows: Sequence[dict[str, Any]], fixed: Mapping[str, int], named: bool
) -> Iterator[str]:
    """What rows took and of what; then their peers, in tables of their own where one would be too wide."""
    several = len(machine.runs(rows)) > 1
    timed = {name for row in rows for name, peer in row["peers"].items() if "ratio" in peer}
    peers = [*(name for name in names() if name in timed), *sorted(timed - set(names()))]
    apart = bool(machine.gpu) or len(peers) > 3

    def place(row: Mapping[str, Any]) -> list[str]:
        dims = {name: size for name, size in row["dims"].items() if name not in fixed}
        return [*([row["op"]] if named else []), label(dims) or "-", row["which"]]

    first = [*(["op"] if named else []), "shape", "pass"]
    header = [*first, "us (p20-p80)", *(("TB/s", "TFLOP/s", "of roof", "target", "MB") if machine.gpu else ())]
    header += [
        *(() if apart else (f"{name}/ours" for name in peers)),
        "error (eager's)",
        "what ran",
        *(["run"] if several else []),
    ]
    lines = []
    for row in rows:
        cells = place(row)
        if row["fault"]:
            cells += ["RED", *[""] * (len(header) - len(cells) - 2 - several), "see below"]
        else:
            cells += [spread(row, 1e6), *(hardware(row) if machine.gpu else ())]
            cells += [] if apart else [times(row, name) for name in peers]
            ran = row["dtype"] + ("" if row["kernel"] else ", reference")
            cells += [f"{row['error']:.1e} ({row['eager_error']:.1e})", ran]
        lines.append([*cells, *([machine.numbers(row)] if several else [])])
    yield table(header, lines)
    for begin in range(0, len(peers), COLUMNS) if apart else ():
        columns = peers[begin : begin + COLUMNS]
        found = [row for row in rows if any("ratio" in row["peers"].get(name, {}) for name in columns)]
        cells = [[*place(row), f"{1e6 * row['p50']:.4g}", *(times(row, name) for name in columns)] for row in found]
        yield table([*first, "us", *(f"{name}/ours" for name in columns)], cells)


def hardware(row: Mapping[str, Any]) -> list[str]:
    target = target_of(row["op"], row["dims"], row["which"])
    return [
        f"{row['bytes'] / row['p50'] / 1e12:.2f}",
        f"{row['flops'] / row['p50'] / 1e12:.1f}",
        f"{100 * row['share']:.0f} %" + " ABOVE IT" * (row["share"] > 1),
        says(target) if target else "",
        f"{row['memory'] / 1e6:.1f}",
    ]


def times(row: Mapping[str, Any], name: str) -> str:
    """A peer's ratio; "-": it has none, for a reason below the table; nothing: it has no such op."""
    found = row["peers"].get(name, {})
    if "ratio" in found:
        return f"{found['ratio']:.2f}" + "*" * (found.get("clock") == "events")
    return "-" if found or name in peers_for(row["op"]) else ""


def peers_for(op: str) -> list[str]:
    return [*GENERAL, *REGISTRY.get(op, {})]


def without(machine: Machine, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Why rows have no time, and peers, a line for each of them and its reason. On a CPU, where most peers cannot run,
    of those that have a column."""
    timed = {name for row in rows for name, peer in row["peers"].items() if "ratio" in peer}
    asked = []
    for row in (row for row in rows if not row["fault"]):
        shown = [name for name in peers_for(row["op"]) if machine.gpu or name in timed]
        peers = {name: row["peers"].get(name, {"why": "not asked in that run"}) for name in shown}
        asked.append((f"{row['op']} {row['which']}", peers))
    every = dict(asked)
    lines = [f"- RED {row['op']} {label(row['dims'])} {row['which']}: {row['fault']}" for row in rows if row["fault"]]
    for name, why, concerned in reasons(asked):
        where = "" if len(concerned) == len(every) else f" ({', '.join(concerned)})"
        lines.append(f"- no time of `{name}`{where}: {why}")
    if lines:
        yield "\n".join(lines)


def short(machine: Machine, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What falls short of its target, the furthest first, and why."""
    found = []
    for row in rows:
        target = target_of(row["op"], row["dims"], row["which"])
        if target is not None and (missed := shortfall(target, row)):
            goal = target.share / max(row["share"], 1e-9) if target.share else 0.0
            goal = max(goal, row["p50"] / target.seconds if target.seconds else 0.0)
            found.append((goal, row, "; ".join(missed)))
    if found:
        found.sort(key=lambda item: -item[0])
        why = {row["op"]: REASONS[row["op"]] for _, row, _ in found if row["op"] in REASONS}
        runs = machine.caption([row for _, row, _ in found])
        yield f"Short of its target (`bench/targets.py`), the furthest first. {runs}"
        cells = [
            (
                r["op"],
                label(r["dims"]),
                r["which"],
                missed,
                machine.numbers(r),
                *([why.get(r["op"], "-")] if why else ()),
            )
            for _, r, missed in found
        ]
        yield table(("op", "shape", "pass", "missed", "run", *(("reason, from a profile",) if why else ())), cells)


# ---- the model on a CPU ----


def cpu_section(machine: Machine) -> Iterator[str]:
    """`python -m bench.cpu`: the model in plain PyTorch, the last run on each number of threads."""
    yield "### The model in plain PyTorch (`python -m bench.cpu`)"
    lines = machine.lines["cpu"]
    yield machine.caption(lines)
    rows = []
    for line in lines:
        passes = ", ".join(f"{p['ratio']:.2f}" for p in line["denoiser"])
        ours = next(iter(line["tokens_per_s"].values()))
        threads, date = line["machine"]["threads"], line["machine"]["date"]
        rows.append((date, threads, f"{ours:.1f}", f"{line['speedup']:.2f}", passes, machine.numbers(line)))
    header = (
        "date",
        "threads",
        "AR tokens/s",
        "times the fastest transformers",
        "denoiser pass over its products",
        "run",
    )
    yield table(header, rows)


# ---- the command ----


def arguments_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=measure.RESULTS, help="folder of .jsonl files (default: bench/results)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="where SPEED.md and docs/ are written (default: the repository)"
    )
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if SPEED.md or a figure is not what the results give"
    )
    parser.add_argument("--base", metavar="REF", help="compare this checkout with a commit, in turns")
    parser.add_argument(
        "-k", dest="pattern", default="*", metavar="PATTERN", help='with --base: ops to compare ("*norm*")'
    )
    parser.add_argument(
        "--rounds", type=measure.positive, default=10, help="with --base: turns of each (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = arguments_of(arguments)
    if options.base is not None:
        from bench import compare

        return compare.main(options.base, options.pattern, options.rounds)

    def refuse(what: object, status: int = 2) -> int:
        print(f"bench.report: error: {what}", file=sys.stderr)
        return status

    try:
        machines = list(results.machines(options.results))
    except (OSError, ValueError) as error:
        return refuse(error)
    if not machines:
        return refuse(f"{options.results} holds no results: make bench ARGS=--record")
    target, docs = options.out / "SPEED.md", options.out / "docs"
    drawn = {m.name: {kind: f"docs/{f.file}" for kind, f in figures.expected(m).items()} for m in machines}
    text = render(machines, drawn)
    if options.check:
        stale = [] if target.is_file() and target.read_text(encoding="utf-8") == text else ["SPEED.md"]
        stale += [f"docs/{f.file}" for m in machines for f in figures.expected(m).values() if not f.is_in(docs)]
        if stale:
            return refuse(f"not what bench/results give: {', '.join(stale)}: python -m bench.report", 1)
        return 0
    try:
        for machine in machines:
            figures.draw(machine, docs)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        return refuse(f"--out {options.out}: {error}")
    except ImportError as error:
        return refuse(f"figures need matplotlib: {error}")
    print(f"{target}, {sum(map(len, drawn.values()))} figures in {docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
