"""What is recorded in bench/results/*.jsonl, read back: the newest line of each thing that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tt_kernels import OPS

from . import measure

KINDS = ("row", "pass", "decode", "cpu")
# What makes two lines of a kind the same measurement, of which the later one counts.
KEYS = {
    "row": ("op", "dims", "dtype", "which"),
    "pass": ("model", "pass", "batch", "context", "dtype"),
    "decode": ("model", "mode", "batch", "context", "dtype", "threshold"),
    "cpu": ("machine.threads",),
}


class Unreadable(ValueError):
    """A line of a results file that is not a record."""


@dataclass
class Machine:
    """One results file: the newest lines of every kind, in the order of their first appearance."""

    name: str
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def gpu(self) -> bool:
        return any("gpu" in line["machine"] for lines in self.lines.values() for line in lines)

    @property
    def where(self) -> list[Mapping[str, Any]]:
        """The machine's descriptions, the newest first."""
        found = [line["machine"] for lines in self.lines.values() for line in lines]
        return sorted(found, key=lambda machine: machine["date"], reverse=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Rows of ops and shapes that the cards still list."""
        return [row for row in self.lines["row"] if listed(row)]

    @property
    def commits(self) -> list[str]:
        return list(dict.fromkeys(machine["commit"] for machine in self.where if "commit" in machine))


def listed(row: Mapping[str, Any]) -> bool:
    op = OPS.get(row["op"])
    return op is not None and row["dims"] in (*op.shapes, *op.cases)


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


def read(path: Path) -> Machine:
    found: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            found[kind_of(line)][_key(line)] = {**line, "machine": line["machine"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Unreadable(f"{path.name}:{number} is no record: {type(error).__name__}: {error}") from error
    return Machine(path.stem, {kind: list(lines.values()) for kind, lines in found.items()})


def machines(folder: Path | None = None) -> Iterator[Machine]:
    """Every results file that holds something, GPUs first, by name."""
    found = [read(path) for path in sorted((folder or measure.RESULTS).glob("*.jsonl"))]
    yield from sorted((m for m in found if any(m.lines.values())), key=lambda m: (not m.gpu, m.name))
