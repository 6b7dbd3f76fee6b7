"""`python -m bench.report`: SPEED.md and its figures from bench/results/*.jsonl, nothing by hand.

Of each measurement the newest recorded line counts. --check says whether SPEED.md is what the results give, and writes
nothing. --base REF measures instead: the ops of this checkout and of a commit in turns, and calls a change only what is
beyond 3 % and beyond the noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tt_kernels import OPS

from . import figures, measure, results, whole
from .figures import label
from .measure import describe, spread, table
from .results import Machine
from .targets import says, shortfall, target_of

ROOT = Path(__file__).parents[1]
HEAD = """# Speed

Made by `python -m bench.report` from the lines of `bench/results/`; `bench/README.md` says how each was measured. Edit
neither: record, and render again."""


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
    where = machine.where[0]
    if machine.gpu:
        yield f"## {where['gpu']}"
        yield f"Driver {where['driver']}, CUDA {where['cuda']}, Triton {where['triton']}; {describe(where)}."
    else:
        yield f"## {where['cpu']}: CPU, references, small shapes (no claim about kernels)"
        yield f"{describe(where)}."
    if machine.commits:
        yield f"Commits: {', '.join(machine.commits)} (+: with changes)."
    if rows := machine.rows:
        yield "### Ops"
        if roofs := rows[-1]["roofs"]:
            yield (
                f"Roofs measured beside the last row: read {roofs['read'] / 1e12:.2f} TB/s, copy "
                f"{roofs['copy'] / 1e12:.2f} TB/s, cuBLAS bf16 {roofs['compute'] / 1e12:.0f} TFLOP/s. A ratio with a "
                "star has the host's share in it: that peer is not fit for a CUDA graph. MB: what a call needs at "
                "its peak besides its arguments."
            )
        yield from (f"![{kind}]({drawn[kind]})" for kind in ("roofline", "peers") if kind in drawn)
        for part, mine in by_part(rows).items():
            yield f"#### {part}"
            yield ops_table(mine, machine.gpu)
        if machine.gpu:
            yield from short(rows)
    yield from whole.section(machine, drawn.get("decoding"))
    if machine.lines["cpu"]:
        yield from cpu_section(machine.lines["cpu"])


def by_part(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the part of tt_kernels that their op is in, in the order of the cards: peers of one part are few enough
    for a column each."""
    order = list(OPS)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: order.index(row["op"])):
        found.setdefault(OPS[row["op"]].fn.__module__.split(".")[1], []).append(row)
    return found


def ops_table(rows: Sequence[dict[str, Any]], gpu: bool) -> str:
    timed = {name for row in rows for name, peer in row["peers"].items() if "ratio" in peer}
    first = [name for name in ("eager", "compiled") if name in timed]
    columns = [*first, *sorted(timed - set(first))]
    header = ["op", "shape", "pass", "us (p20-p80)", *(("TB/s", "TFLOP/s", "of roof", "target", "MB") if gpu else ())]
    header += [*(f"{name}/ours" for name in columns), "error (eager's)", "what ran"]
    lines = []
    for row in rows:
        cells = [row["op"], label(row["dims"]), row["which"]]
        if row["fault"]:
            lines.append([*cells, "RED", *[""] * (len(header) - 5), row["fault"][:60]])
            continue
        cells.append(spread(row, 1e6))
        if gpu:
            target = target_of(row["op"], row["dims"], row["which"])
            rates = (row["bytes"] / row["p50"] / 1e12, row["flops"] / row["p50"] / 1e12)
            cells += [
                f"{rates[0]:.2f}",
                f"{rates[1]:.1f}",
                f"{100 * row['share']:.0f} %",
                says(target) if target else "",
                f"{row['memory'] / 1e6:.1f}",
            ]
        peers = [row["peers"].get(name, {}) for name in columns]
        cells += [f"{p['ratio']:.2f}" + "*" * (p.get("clock") == "events") if "ratio" in p else "-" for p in peers]
        ran = f"{'kernel' if row['kernel'] else 'reference'}, {row['dtype']}"
        ran += ", ABOVE THE ROOF" * (row["share"] > 1)
        lines.append([*cells, f"{row['error']:.1e} ({row['eager_error']:.1e})", ran])
    return table(header, lines)


def short(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What falls short of its target, the furthest first."""
    found = []
    for row in rows:
        target = target_of(row["op"], row["dims"], row["which"])
        if target is not None and (missed := shortfall(target, row)):
            goal = target.share / max(row["share"], 1e-9) if target.share else 0.0
            goal = max(goal, row["p50"] / target.seconds if target.seconds else 0.0)
            found.append((goal, f"- `{row['op']}` {label(row['dims'])} {row['which']}: {'; '.join(missed)}"))
    if found:
        yield "Short of its target, the furthest first:"
        yield "\n".join(text for _, text in sorted(found, key=lambda item: -item[0]))


def cpu_section(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """`python -m bench.cpu`: the model in plain PyTorch, the last run on each number of threads."""
    yield "### The model in plain PyTorch (`python -m bench.cpu`)"
    rows = []
    for line in lines:
        passes = ", ".join(f"{p['ratio']:.2f}" for p in line["denoiser"])
        ours = next(iter(line["tokens_per_s"].values()))
        threads, date = line["machine"]["threads"], line["machine"]["date"]
        rows.append((date, threads, f"{ours:.1f}", f"{line['speedup']:.2f}", passes))
    header = ("run", "threads", "AR tokens/s", "times the fastest transformers", "denoiser pass over its products")
    yield table(header, rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=measure.RESULTS, help="folder of .jsonl files (default: bench/results)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT, help="where SPEED.md and docs/ are written (default: the repository)"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 if SPEED.md is not what the results give")
    parser.add_argument("--base", metavar="REF", help="compare this checkout with a commit, in turns")
    parser.add_argument(
        "-k", dest="pattern", default="*", metavar="PATTERN", help='with --base: ops to compare ("*norm*")'
    )
    parser.add_argument(
        "--rounds", type=measure.positive, default=10, help="with --base: turns of each (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.base:
        from . import compare

        return compare.main(options.base, options.pattern, options.rounds)
    try:
        machines = list(results.machines(options.results))
    except (OSError, results.Unreadable) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    if not machines:
        print(f"bench.report: error: {options.results} holds no results: make bench ARGS=--record", file=sys.stderr)
        return 2
    target, docs = options.out / "SPEED.md", options.out / "docs"
    drawn: dict[str, dict[str, str]] = {}
    for machine in machines:
        names = figures.expected(machine)
        if not options.check:
            figures.draw(machine, docs)
        drawn[machine.name] = {kind: f"docs/{name}" for kind, name in names.items()}
    text = render(machines, drawn)
    if options.check:
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            print(
                "bench.report: error: SPEED.md is not what bench/results give: python -m bench.report", file=sys.stderr
            )
            return 1
        return 0
    target.write_text(text, encoding="utf-8")
    print(f"{target}, {sum(map(len, drawn.values()))} figures in {docs}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
