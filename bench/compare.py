"""`python -m bench.compare REF -- MODULE ARGS`: a command's times here and at a commit, in turns.

    python -m bench.compare main -- profiling.host --rounds 20
    python -m bench.compare HEAD~3 -- pytest bench/bench_ops.py --timeout 0 -k "[rms_norm-"

The commit is checked out as a worktree for as long as it takes; each turn is a process of either checkout, with its own
harness and this environment's packages. What is compared are the lines "NAME  12.3 ms" and the rows of tables with a
column of microseconds. A change counts beyond 3 % of the median and beyond the noise: p80 of the one below p20 of the
other. Exits with 1 if something is slower.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .measure import ROOT, around, faster, in_a_line, parser, percentiles, positive, table, where

LINE = re.compile(r"^(\S.*?) {2,}(\d+(?:\.\d+)?) ms\b", re.MULTILINE)


def times(text: str) -> dict[str, float]:
    """Seconds by name, of what a command printed."""
    found = {name: float(ms) / 1e3 for name, ms in LINE.findall(text)}
    column = None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            column = None
        elif column is None:
            column = next((i for i, cell in enumerate(cells) if re.match(r"(p50 )?us\b", cell)), -1)
        elif column > 0 and (number := re.match(r"[\d.]+", cells[column])):
            found[" ".join(cells[:column])] = float(number[0]) / 1e6
    return found


def run(command: Sequence[str], tree: Path) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-m", *command], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ends with {done.returncode} in {tree}:\n{done.stdout}{done.stderr}")
    return times(done.stdout)


@contextmanager
def worktree(reference: str) -> Iterator[Path]:
    """The files of a commit in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        added = subprocess.run([*git, "add", "--detach", str(tree), reference], capture_output=True, text=True)
        if added.returncode:
            raise RuntimeError(added.stderr.strip().splitlines()[-1])
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], capture_output=True)


def compare(trees: Sequence[Path], command: Sequence[str], rounds: int) -> tuple[str, list[str]]:
    """A table of what both trees print, and what is slower in the second."""
    samples: list[dict[str, list[float]]] = [{}, {}]
    for _ in range(rounds):
        for tree, known in zip(trees, samples, strict=True):
            for name, seconds in run(command, tree).items():
                known.setdefault(name, []).append(seconds)
    base, ours = samples
    cells, slower = [], []
    for name in (name for name in ours if name in base):
        verdict = "slower" if faster(base[name], ours[name]) else "faster" if faster(ours[name], base[name]) else ""
        slower += [name] * (verdict == "slower")
        b, o = ({k: 1e6 * v for k, v in percentiles(known[name]).items()} for known in samples)
        cells.append((name, around(**b), around(**o), f"{o['p50'] / b['p50']:.3f}", verdict))
    if not cells:
        raise RuntimeError("both print no time in common")
    return table(("", "base us (p20-p80)", "us (p20-p80)", "over base", "verdict"), cells), slower


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("bench.compare", __doc__)
    p.add_argument("reference", metavar="REF", help="a commit, branch or tag")
    p.add_argument("command", nargs="+", metavar="MODULE ARGS", help="what python -m runs, after --")
    p.add_argument("--rounds", type=positive, default=5, help="turns of each (default: %(default)s)")
    options = p.parse_args(arguments)
    try:
        with worktree(options.reference) as base:
            print(in_a_line(where()) + f"; base: {options.reference}\n", flush=True)
            text, slower = compare((base, ROOT), options.command, options.rounds)
    except RuntimeError as error:
        print(f"bench.compare: error: {error}", file=sys.stderr)
        return 2
    print(f"{text}\n\nslower beyond 3 % and the noise: {', '.join(slower) or 'none'}")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
