"""Taking times: interleaved runs, what they ran on, and tables of them."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds: A B C A B C ..., after one untimed round.

    What slows the machine for a while slows all of them, so medians over rounds compare well. `repeats` calls are timed
    together, for functions that take microseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(repeats):
                function()
            if i > 0:
                times[name].append((time.perf_counter() - begin) / repeats)
    return times


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over rounds of one function's time over another's in the same round."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a whole number of at least 1")
    return int(text)


def share(text: str) -> float:
    """For argparse: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a number from 0 to 1")
    return value


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    packages = {}
    for name in ("torch", "transformers"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # processes that wanted a core before the measurement began
        "python": platform.python_version(),
        **packages,
    }


def cpu_model() -> str:
    """The processor's name, with the widest vector unit that torch uses."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE)
        name = found[1] if found else name
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def describe(where: Mapping[str, Any]) -> str:
    """`machine()` in one line."""
    return (
        f"{where['cpu']}, {where['threads']} threads of {where['cores']} cores, load {where['load']} before, "
        f"Python {where['python']}, torch {where['torch']}, transformers {where['transformers']}, {where['date']}"
    )


def spread(line: Mapping[str, Any], factor: float) -> str:
    """The median of a recorded line with its 20th and 80th percentile, in units of which a second has `factor`."""
    return around(*(factor * line[name] for name in ("p20", "p50", "p80")))


def around(p20: float, p50: float, p80: float) -> str:
    """Three figures of a median, and of the percentiles around it as many places."""
    digits = max(0, 2 - math.floor(math.log10(p50))) if p50 > 0 else 1  # three figures, and all before the point
    return f"{p50:.{digits}f} ({p20:.{digits}f}-{p80:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table, columns aligned; every column but the first is right-aligned."""
    lines = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(rest, widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(lines[0]), line(rule), *map(line, lines[1:])])


def machine_name(where: Mapping[str, Any]) -> str:
    """What results of a machine are filed under: its GPU, or its processor: "Xeon(R) Silver @ 2 GHz", "xeon-silver"."""
    name = re.sub(r"\((r|tm|c)\)|@.*?ghz|\bcpu\b|\bprocessor\b", " ", where.get("gpu", where["cpu"]).lower())
    return "-".join(re.findall(r"[a-z0-9]+", name)) or "unknown"


def append(file: Path, line: Mapping[str, Any]) -> Path:
    """One JSON line, written in one piece: who is cut leaves no half line, which no reader could pass."""
    file.parent.mkdir(exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write(f"{json.dumps(line)}\n".encode())
    return file


def record(row: Mapping[str, Any]) -> Path:
    """Append one JSON line to the results of the machine that the row names."""
    return append(RESULTS / f"{machine_name(row['machine'])}.jsonl", row)
