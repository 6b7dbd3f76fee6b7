"""`python -m bench.report`: SPEED.md and its figures from bench/results/*.jsonl, nothing by hand.

Of each measurement the newest recorded line counts. --check says whether SPEED.md and its figures are what the results
give, and writes nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from cards import OPS
from eval import quality
from eval.cpu import COMPILED

from . import measure, ops, whole
from .figures import Figure, draw, of_rows, part_of
from .measure import in_a_line, label, parser, spread, table, table_of
from .oracle import DTYPES
from .peers import names
from .targets import says, shortfall, target_of

Line = Mapping[str, Any]
Columns = dict[str, Callable[[Line], object]]
# What makes two lines of a kind the same measurement, of which the later one counts.
KEYS: dict[str, tuple[str, ...]] = {
    "row": ("op", "dims", "dtype", "which"),
    "pass": ("model", "pass", "batch", "context", "dtype"),
    "decode": ("model", "mode", "batch", "context", "dtype", "threshold", "new"),
    "cpu": ("threads",),
    "quality": ("model", "dtype", "split", "specifications", "rows", "new_tokens", "block_size", "threads"),
}
COLUMNS = 8  # peers in one table, so that no table is wider than a page
HEAD = """# Speed

Made by `python -m bench.report` from the lines of `bench/results/`; `bench/README.md` says how each was measured. Edit
neither: record, and render again. A run is what one commit gave with one set of versions; load counts the processes
that wanted a core when a measurement began: beside other work believe ratios, not times."""
NO_GPU = """**No GPU results are recorded yet.** What follows is a CPU's: the references at small shapes. It says what a
call costs and that the harness works, and nothing about kernels. `make gpu` records a GPU's."""
PREDICTED_TEXT = """By a static model of the machine code (Triton {triton}, bf16, sm_90), made by
`python -m profiling.predict --all --record`; [docs/measurements.md](docs/measurements.md) says what it assumes and is
blind to. Passes of the published model, 2048 tokens before them, inside a CUDA graph. The floor is what weights, states
and K/V take; the limit adds the activations of every launch; launches are Triton's and PyTorch's."""
OPS_TEXT = """Before a row is timed its results are held to an fp64 oracle; RED: they failed, and there is no time. The
error is relative, in the root mean square, with plain PyTorch's in the same dtype behind it. Peers: their time over
ours, above 1 where ours is faster; `-`: none, for the reason below the table; `*`: the host's share is in it."""


# ---- what is recorded ----


@dataclass
class Machine:
    """One results file: the newest lines of every kind, and the runs that they are of, the oldest first."""

    name: str
    lines: dict[str, list[Line]] = field(default_factory=lambda: {kind: [] for kind in KEYS})
    runs: dict[str, list[Line]] = field(default_factory=dict)  # setting -> the lines of it that count

    @property
    def gpu(self) -> str:
        return next((x["machine"]["gpu"] for lines in self.lines.values() for x in lines if "gpu" in x["machine"]), "")

    @property
    def title(self) -> str:
        """Of its figures."""
        return self.gpu or "CPU: no claim about kernels"

    def run(self, line: Line) -> int:
        return 1 + list(self.runs).index(_setting(line))

    def said(self) -> Iterator[str]:
        """A line for each run."""
        for number, lines in enumerate(self.runs.values(), 1):
            machines = [line["machine"] for line in lines]
            loads, dates = ([machine[name] for machine in machines] for name in ("load", "date"))
            yield f"- Run {number}: {in_a_line(machines[-1] | {'load': ends(loads), 'date': ends(dates)})}"


def ends(values: Sequence[Any], text: Callable[[Any], str] = str) -> str:
    """The least and the greatest; one of them, where both read alike."""
    return " to ".join(dict.fromkeys(map(text, (min(values), max(values)))))


def _setting(line: Line) -> str:
    return json.dumps({k: v for k, v in line["machine"].items() if k not in ("date", "load")}, sort_keys=True)


def kind_of(line: Line) -> str:
    """Lines of before kinds were written say it by their fields."""
    return line.get("kind") or ("row" if "op" in line else "cpu")


def key_of(line: Line) -> str:
    return json.dumps([{**line["machine"], **line}.get(name) for name in KEYS[kind_of(line)]], sort_keys=True)


def read(path: Path) -> Machine:
    """The later line counts, unless it is a quick look at what was measured over more rounds."""
    found: dict[str, Line] = {}
    for line in measure.recorded(path):
        old = found.get(name := kind_of(line) + key_of(line))
        if old is None or kind_of(line) not in ("pass", "decode") or line.get("rounds", 1) >= old.get("rounds", 1):
            found[name] = line
    machine = Machine(path.stem)
    for line in found.values():
        if kind_of(line) != "row" or listed(line):
            machine.lines[kind_of(line)].append(line)
    for line in sorted((x for lines in machine.lines.values() for x in lines), key=lambda x: x["machine"]["date"]):
        machine.runs.setdefault(_setting(line), []).append(line)
    return machine


def listed(row: Line) -> bool:
    """Whether a run on such a machine would have this row today, as far as its op still has that name."""
    if row["op"] not in OPS:
        return True
    known = ops.cases("cuda" if "gpu" in row["machine"] else "cpu", {row["op"]: OPS[row["op"]]})
    return any((dict(c.dims), DTYPES[c.dtype], c.which) == (row["dims"], row["dtype"], row["which"]) for c in known)


def machines(folder: Path) -> list[Machine]:
    """Every results file that holds something, GPUs first, by name."""
    found = [read(path) for path in sorted(folder.glob("*.jsonl"))]
    return sorted((m for m in found if m.runs), key=lambda m: (not m.gpu, m.name))


# ---- rows ----


def notes(row: Line) -> str:
    """What makes a row other than the rule: kernel, bf16, graph, four sets, an fp64 oracle of the whole shape."""
    found = [row["dtype"]] if row["dtype"] != "bf16" else []
    found += [] if row["kernel"] else ["reference"]
    found += ["host's share in it"] if row["clock"] == "events" else []
    found += [f"{row['sets']} sets"] if row["sets"] < 4 and row["clock"] != "wall" else []
    found += [f"oracle {row['oracle']}"] if row["oracle"] != "fp64" else []
    found += ["ABOVE THE ROOF: its inputs hold less work than its cost counts"] * (row["share"] > 1)
    return ", ".join(found)


def times(row: Line, name: str) -> str:
    """A peer's ratio; "-": it has none, for a reason below the table."""
    found = row["peers"].get(name, {})
    return f"{found['ratio']:.2f}" + "*" * (found["clock"] == "events") if "ratio" in found else "-" if found else ""


def row_table(rows: Sequence[Line], number: Callable[[Line], object] = lambda row: None) -> Iterator[str]:
    """What rows took, of what, and beside whom; below it what is wrong or missing."""
    timed = {name for row in rows for name, peer in row["peers"].items() if "ratio" in peer}
    known = [name for name in dict.fromkeys([*names(), *sorted(timed)]) if name in timed]
    roofs = any(row["roof"] for row in rows)
    first: Columns = {"op": lambda x: x["op"], "shape": lambda x: label(x["dims"]), "pass": lambda x: x["which"]}
    unless_red = lambda of, red="": lambda x: red if x["fault"] else of(x)
    of_roof = lambda of: lambda x: of(x) if x["roof"] and not x["fault"] else None
    peers = lambda some: {f"{name}/ours": lambda x, name=name: times(x, name) for name in some}
    columns: Columns = {
        **first,
        "us (p20-p80)": unless_red(lambda x: spread(x, 1e6), "RED"),
        "TB/s": of_roof(lambda x: f"{x['bytes'] / x['p50'] / 1e12:.2f}"),
        "TFLOP/s": of_roof(lambda x: f"{x['flops'] / x['p50'] / 1e12:.1f}"),
        "of roof": of_roof(lambda x: f"{100 * x['share']:.0f} %"),
        "target": of_roof(lambda x: says(target_of(x["op"], x["dims"], x["which"]))),
        "MB": of_roof(lambda x: f"{x['memory'] / 1e6:.1f}"),
        **peers(known[:COLUMNS]),
        "error (eager's)": unless_red(lambda x: f"{x['error']:.1e} ({x['eager_error']:.1e})"),
        "notes": unless_red(notes, "see below"),
        "run": number,
    }
    yield table_of(rows, columns)
    for begin in range(COLUMNS, len(known), COLUMNS):
        some = known[begin : begin + COLUMNS]
        beside = [row for row in rows if any("ratio" in row["peers"].get(name, {}) for name in some)]
        yield table_of(beside, first | peers(some))
    below = [f"- RED {row['op']} {label(row['dims'])} {row['which']}: {row['fault']}" for row in rows if row["fault"]]
    why: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        for name, peer in row["peers"].items():
            if "why" in peer and (roofs or name in timed):  # on a CPU most peers cannot run
                why.setdefault((name, peer["why"]), {})[f"{row['op']} {row['which']}"] = None
    below += [f"- no time of `{name}` ({', '.join(concerned)}): {what}" for (name, what), concerned in why.items()]
    if below:
        yield "\n".join(below)


def roofs_of(rows: Iterable[Line]) -> str:
    """The roofs that rows were measured beside."""
    found = [row["roofs"] for row in rows if row.get("roofs")]
    if not found:
        return ""
    read, copy, compute = (
        ends([roofs[name] for roofs in found], lambda rate: f"{rate / 1e12:.3g}")
        for name in ("read", "copy", "compute")
    )
    return (
        f"Roofs, measured beside each row: read {read} TB/s, copy {copy} TB/s, cuBLAS bf16 {compute} TFLOP/s. "
        "A row's roof is the larger of its bytes and its flops by them."
    )


def ops_section(machine: Machine) -> Iterator[str | Figure]:
    rows = machine.lines["row"]
    yield "### Ops"
    yield OPS_TEXT
    yield roofs_of(rows)
    missed = {id(row): shortfall(row) for row in rows if machine.gpu}
    if short := [row for row in rows if missed.get(id(row))]:
        yield "Short of its target (`bench/targets.py`):"
        cells = [(r["op"], label(r["dims"]), r["which"], "; ".join(missed[id(r)]), machine.run(r)) for r in short]
        yield table(("op", "shape", "pass", "missed", "run"), cells)
    yield from of_rows(machine.name, machine.title, rows)
    known = list(OPS)
    in_order = sorted(rows, key=lambda row: known.index(row["op"]) if row["op"] in OPS else len(known))
    for part, mine in groupby(in_order, part_of):
        yield f"#### {part}"
        for _, group in groupby(mine, lambda row: row["op"] if machine.gpu else ""):
            yield from row_table(list(group), machine.run)


def cpu_section(machine: Machine) -> Iterator[str]:
    """`python -m eval.cpu`: the model in plain PyTorch, the last run on each number of threads."""
    yield "### The model in plain PyTorch (`python -m eval.cpu`)"
    columns: Columns = {
        "date": lambda x: x["machine"]["date"],
        "threads": lambda x: x["machine"]["threads"],
        "AR tokens/s": lambda x: f"{next(iter(x['tokens_per_s'].values())):.1f}",
        "times the fastest transformers": lambda x: f"{x['speedup']:.2f}",
        "AR tokens/s, compiled": lambda x: f"{found:.1f}" if (found := x["tokens_per_s"].get(COMPILED)) else "",
        "times the fastest, compiled": lambda x: f"{found:.2f}" if (found := x.get("compiled_speedup")) else "",
        "denoiser pass over its products": lambda x: ", ".join(f"{p['ratio']:.2f}" for p in x["denoiser"]),
        "run": machine.run,
    }
    yield table_of(machine.lines["cpu"], columns)


def quality_section(machine: Machine) -> Iterator[str]:
    """`python -m eval.quality`: the last run of each model and setting."""
    yield "### Programs from specifications (`python -m eval.quality`)"
    for line in machine.lines["quality"]:
        yield f"{quality.about(line)}, run {machine.run(line)}"
        yield quality.markdown(line["arms"])


def predicted_section(file: Path) -> Iterator[str]:
    """What `python -m profiling.predict --all --record` has written."""
    if not file.is_file():
        return
    found = json.loads(file.read_text())
    yield "## Predictions for an H200 (nothing here is measured)"
    yield PREDICTED_TEXT.format(triton=found["triton"])
    ms, us = (lambda seconds: f"{1e3 * seconds:.2f}"), (lambda seconds: f"{1e6 * seconds:.3g}")
    passes: Columns = {
        "pass": lambda x: f"{x['kind']} {x['length'] or ''}".strip(),
        "batch": lambda x: x["batch"],
        "floor ms": lambda x: ms(x["floor"]) if x["floor"] else "",
        "limit ms": lambda x: ms(x["limit"]),
        "predicted ms": lambda x: ms(x["graph"]),
        "over the floor, else the limit": lambda x: f"{x['graph'] / (x['floor'] or x['limit']):.2f}",
        "launches": lambda x: f"{x['triton']} + {x['aten']}",
    }
    yield table_of(found["passes"], passes)
    ops: Columns = {
        "op": lambda x: x["op"],
        "shape": lambda x: label(x["dims"]),
        "limit us": lambda x: us(x["limit"]),
        "predicted us": lambda x: us(x["seconds"]),
        "over the limit": lambda x: f"{x['seconds'] / x['limit']:.2f}",
    }
    yield table_of(found["ops"], ops)


def speed(found: Sequence[Machine], predicted: Path | None = None) -> Iterator[str | Figure]:
    """What SPEED.md has, one below the other."""
    yield HEAD
    if not any(machine.gpu for machine in found):
        yield NO_GPU
    for machine in found:
        cpu = next(iter(machine.runs.values()))[0]["machine"]["cpu"]
        yield f"## {machine.gpu or f'{cpu}: CPU, references, small shapes (no claim about kernels)'}"
        yield "\n".join(machine.said())
        if machine.lines["row"]:
            yield from ops_section(machine)
        yield from whole.section(machine)
        if machine.lines["cpu"]:
            yield from cpu_section(machine)
        if machine.lines["quality"]:
            yield from quality_section(machine)
    if predicted is not None:
        yield from predicted_section(predicted)


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("bench.report", __doc__)
    p.add_argument("--results", type=Path, default=measure.RESULTS, help="folder of .jsonl (default: %(default)s)")
    p.add_argument("--out", type=Path, default=measure.ROOT, help="where SPEED.md and docs/ go")
    p.add_argument("--check", action="store_true", help="exit with 1 if they are not what the results give")
    options = p.parse_args(arguments)
    target, docs = options.out / "SPEED.md", options.out / "docs"
    try:
        found = machines(options.results)
        if not found:
            raise ValueError(f"{options.results} holds no results: make bench ARGS=--record")
        parts = list(filter(None, speed(found, options.results / "predicted.json")))
        drawn, text = [part for part in parts if isinstance(part, Figure)], "\n\n".join(map(str, parts)) + "\n"
        if options.check:
            stale = [] if target.is_file() and target.read_text(encoding="utf-8") == text else ["SPEED.md"]
            stale += [f"docs/{figure.file}" for figure in drawn if not figure.is_in(docs)]
            if stale:
                print(f"not what bench/results give: {', '.join(stale)}: python -m bench.report", file=sys.stderr)
            return int(bool(stale))
        draw(drawn, docs)
        target.write_text(text, encoding="utf-8")
    except (OSError, ValueError, KeyError, ImportError) as error:
        print(f"bench.report: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(f"{target}, {len(drawn)} figures in {docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
