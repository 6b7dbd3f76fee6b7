"""What is recorded in bench/results/*.jsonl, read back: the newest line of each measurement, and the run it is of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from bench import measure, ops
from cards import OPS

from .oracle import DTYPES

KINDS = ("row", "pass", "decode", "cpu")
# What makes two lines of a kind the same measurement, of which the later one counts.
KEYS = {
    "row": ("op", "dims", "dtype", "which"),
    "pass": ("model", "pass", "batch", "context", "dtype"),
    "decode": ("model", "mode", "batch", "context", "dtype", "threshold", "new"),
    "cpu": ("machine.threads",),
}
# What SPEED.md reads of a line, and cannot do without.
NUMBER = (int, float)
FIELDS: dict[str, dict[str, Any]] = {
    "row": dict(op=str, dims=dict, dtype=str, which=str, kernel=bool, flops=NUMBER, bytes=NUMBER, fault=str)
    | dict(
        p20=NUMBER, p50=NUMBER, p80=NUMBER, share=NUMBER, memory=NUMBER, error=NUMBER, eager_error=NUMBER, peers=dict
    ),
    "pass": {"model": str, "pass": str, "config": dict, "dtype": str, "batch": int, "context": int, "clock": str}
    | dict(p20=NUMBER, p50=NUMBER, p80=NUMBER),
    "decode": dict(model=str, mode=str, dtype=str, batch=int, context=int, tokens_per_s=NUMBER),
    "cpu": dict(tokens_per_s=dict, speedup=NUMBER, denoiser=list),
}
WHERE = dict(date=str, cpu=str, cores=int, threads=int, load=NUMBER, python=str, torch=str, transformers=str)


class Unreadable(ValueError):
    """A line of a results file that is not a record."""


@dataclass(frozen=True)
class Run:
    """Lines that one commit gave with one set of versions: what they ran on, and when and beside how much else."""

    number: int
    where: Mapping[str, Any]
    dates: tuple[str, str]
    loads: tuple[float, float]

    @property
    def load(self) -> str:
        return "load " + " to ".join(dict.fromkeys(f"{load:g}" for load in self.loads)) + " before"

    @property
    def commit(self) -> str:
        return f"commit {self.where['commit']}" if "commit" in self.where else "its commit is not recorded"

    def __str__(self) -> str:
        w = self.where
        parts = [self.commit]
        parts += [
            f"{name} {w[key]}"
            for name, key in (("driver", "driver"), ("CUDA", "cuda"), ("Triton", "triton"))
            if key in w
        ]
        parts += [f"{w['cpu']}, {w['threads']} threads of {w['cores']} cores, {self.load}"]
        parts += [f"Python {w['python']}, torch {w['torch']}, transformers {w['transformers']}"]
        return ", ".join([*parts, " to ".join(dict.fromkeys(self.dates))])


@dataclass
class Machine:
    """One results file: the newest lines of every kind, in the order of their first appearance."""

    name: str
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def gpu(self) -> str:
        """Its name, or nothing."""
        return next((x["machine"]["gpu"] for lines in self.lines.values() for x in lines if "gpu" in x["machine"]), "")

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ops and shapes that the cards still list."""
        return [row for row in self.lines["row"] if listed(row)]

    def missing(self) -> dict[str, int]:
        """By op, how many rows a run on such a machine would have that these results lack."""
        there = {_named(row["op"], row["dims"], row["dtype"], row["which"]) for row in self.rows}
        lacking = _cases("cuda" if self.gpu else "cpu") - there
        counts = Counter(json.loads(name)[0] for name in lacking)
        return {op: counts[op] for op in OPS if counts[op]}

    @cached_property
    def shown(self) -> list[dict[str, Any]]:
        return [*self.rows, *(line for kind in KINDS[1:] for line in self.lines[kind])]

    @cached_property
    def _settings(self) -> list[str]:
        """What tells runs apart, the oldest first."""
        return list(dict.fromkeys(map(_setting, sorted(self.shown, key=lambda line: line["machine"]["date"]))))

    def runs(self, lines: Sequence[Mapping[str, Any]] | None = None) -> list[Run]:
        """The runs that lines (None: all that are shown) are of, numbered over the machine, the oldest first."""
        found: dict[str, list[Mapping[str, Any]]] = {setting: [] for setting in self._settings}
        for line in self.shown if lines is None else lines:
            found[_setting(line)].append(line["machine"])
        return [
            Run(i, group[0], _range(m["date"] for m in group), _range(m["load"] for m in group))
            for i, group in enumerate(found.values(), 1)
            if group
        ]

    def numbers(self, *lines: Mapping[str, Any]) -> str:
        """The numbers of the runs of lines: "2", or "1, 2"."""
        return ", ".join(str(run.number) for run in self.runs(lines))

    def caption(self, lines: Sequence[Mapping[str, Any]]) -> str:
        """What a table's lines are of."""
        return "; ".join(f"Run {run.number}, {run.commit}, {run.load}" for run in self.runs(lines)) + ":"


def _range(values: Iterator[Any]) -> tuple[Any, Any]:
    every = sorted(values)
    return every[0], every[-1]


def _setting(line: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in line["machine"].items() if k not in ("date", "load")}, sort_keys=True)


@cache
def _cases(device: str) -> frozenset[str]:
    return frozenset(_named(c.name, c.dims, DTYPES[c.dtype], c.which) for c in ops.cases(device))


def _named(op: str, dims: Mapping[str, int], dtype: str, which: str) -> str:
    return json.dumps([op, dims, dtype, which], sort_keys=True)


def listed(row: Mapping[str, Any]) -> bool:
    """Whether a run on such a machine would have this row today."""
    device = "cuda" if "gpu" in row["machine"] else "cpu"
    return _named(row["op"], row["dims"], row["dtype"], row["which"]) in _cases(device)


def kind_of(line: Mapping[str, Any]) -> str:
    """Lines of before kinds were written say it by their fields."""
    return line.get("kind") or ("row" if "op" in line else "cpu")


def _key(line: Mapping[str, Any]) -> str:
    def value(path: str) -> Any:
        found: Any = line
        for part in path.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    return json.dumps([value(path) for path in KEYS[kind_of(line)]], sort_keys=True)


def _check(line: Mapping[str, Any]) -> None:
    where = line["machine"]
    for owner, fields in ((line, FIELDS[kind_of(line)]), (where, WHERE)):
        for name, kind in fields.items():
            if not isinstance(owner[name], kind):
                raise ValueError(f"{name} is {owner[name]!r}")


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any] | None) -> bool:
    """The later line counts, unless it is a quick look at what was measured over more rounds."""
    quick = old is not None and kind_of(new) in ("pass", "decode") and new.get("rounds", 1) < old.get("rounds", 1)
    return not quick


def read(path: Path) -> Machine:
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            _check(line)
            same = found[kind_of(line)]
            if _replaces(line, same.get(_key(line))):
                same[_key(line)] = line
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unreadable(f"{path.name}:{number} is no record: {type(error).__name__}: {error}") from error
    return Machine(path.stem, {kind: list(lines.values()) for kind, lines in found.items()})


def machines(folder: Path | None = None) -> Iterator[Machine]:
    """Every results file that holds something, GPUs first, by name."""
    found = [read(path) for path in sorted((folder or measure.RESULTS).glob("*.jsonl"))]
    yield from sorted((m for m in found if m.shown), key=lambda m: (not m.gpu, m.name))
