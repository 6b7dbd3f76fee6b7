"""Taking times in turns, what they ran on, tables of them, and the lines that are recorded."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from tt_kernels.runtime import launch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
RECORDED = ("bench/results", "bench/tuning", "eval/results", "SPEED.md", "docs/speed_*", "docs/experiments*")


# ---- times ----


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which that share of the samples lies, between two samples in proportion."""
    return float(np.quantile(samples, share))


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    return {name: percentile(samples, share) for name, share in (("p20", 0.2), ("p50", 0.5), ("p80", 0.8))}


def faster(one: Sequence[float], other: Sequence[float], gain: float = 0.03) -> bool:
    """By 3 % in the median, and beyond the noise: p80 below the other's p20."""
    gained = percentile(one, 0.5) <= (1 - gain) * percentile(other, 0.5)
    return gained and percentile(one, 0.8) < percentile(other, 0.2)


def wall(calls: Sequence[Callable[[], Any]], repeats: int = 1) -> float:
    """Seconds a call, of all of them so many times one after the other."""
    begin = time.perf_counter()
    for _ in range(repeats):
        for call in calls:
            call()
    return (time.perf_counter() - begin) / (repeats * len(calls))


def in_turns(samplers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Samples of each, A B C A B C ...: what slows the machine for a while slows all of them, so medians over rounds
    compare well."""
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            times[name].append(sample())
    return times


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` turns, after an untimed one. `repeats` calls are timed together, for
    functions that take microseconds."""
    samplers = {name: partial(wall, [function], repeats) for name, function in functions.items()}
    in_turns(samplers, 1)
    return in_turns(samplers, rounds)


def ratio(times: Mapping[str, Sequence[float]], one: str, other: str) -> float:
    """Median over rounds of one function's time over another's in the same round."""
    return median(a / b for a, b in zip(times[one], times[other], strict=True))


# ---- words and tables ----


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m MODULE`, its documentation printed as it stands."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"python -m {module}", description=doc, formatter_class=form)


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected a whole number of at least 1")
    return int(text)


def label(dims: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items())


def sizes(text: str) -> dict[str, int]:
    """ "T=16,D=64" as numbers by name."""
    return {name: int(size) for name, _, size in (part.partition("=") for part in text.split(","))}


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


def table_of(lines: Sequence[Any], columns: Mapping[str, Callable[[Any], object]]) -> str:
    """A table of those columns that some line has something for, others being None."""
    cells = {name: [of(line) for line in lines] for name, of in columns.items()}
    cells = {name: column for name, column in cells.items() if any(cell is not None for cell in column)}
    rows = [["-" if cell is None else cell for cell in row] for row in zip(*cells.values(), strict=True)]
    return table(list(cells), rows)


# ---- what it ran on ----


def output(*command: str) -> str:
    """What a command of the system prints; empty if it is not there or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def commit() -> str:
    """The commit of the checkout, with + for changes to what is measured: not for recorded results and what is rendered
    from them, but for tuned launches, new files too. TT_COMMIT says it for a copy without git; empty: nobody knows."""
    if os.environ.get("TT_COMMIT"):
        return os.environ["TT_COMMIT"]
    others = [f":(top,exclude){path}" for path in RECORDED]
    changed = output("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *others)
    changed += output("git", "status", "--porcelain", "--untracked-files=all", "--", ":(top)tt_kernels/tuned")
    head = output("git", "rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(head and changed)


def no_commit() -> str:
    """Why nothing may be recorded here, or nothing: a figure of an unknown commit says nothing."""
    return "" if commit() else "the commit is not known here: without git, name it in TT_COMMIT"


def tuned_hash(architecture: int) -> str:
    """Of the measured launches that kernels run with; empty without any. Who measured them does not count."""
    rows = launch._table(architecture)
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12] if rows else ""


def where(**known: Any) -> dict[str, Any]:
    """What a figure depends on: machine, versions, commit, and the GPU; `known` says better what it was, such as
    threads."""
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file() and (model := re.search(r"^model name\s*:\s*(.+)", info.read_text(), re.MULTILINE)):
        name = model[1]
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # processes that wanted a core before the measurement began
        "python": platform.python_version(),
        **{package: installed(package) for package in ("torch", "transformers", "triton")},
        "commit": commit() or "unknown",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found |= {
            "gpu": properties.name,
            "architecture": 10 * properties.major + properties.minor,
            "multiprocessors": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
            "cuda": torch.version.cuda,
        }
        found["tuned"] = tuned_hash(found["architecture"])
    return found | known


def in_a_line(found: Mapping[str, Any]) -> str:
    words = [f"commit {found['commit']}" if "commit" in found else "its commit is not recorded"]
    words += [found["gpu"]] if "gpu" in found else []
    named = ("driver", "CUDA", "Triton", "Python", "torch", "transformers")
    words += [f"{name} {found[name.lower()]}" for name in named if name.lower() in found]
    words += [found["cpu"], f"{found['threads']} threads of {found['cores']} cores"]
    return ", ".join([*words, f"load {found['load']} before", found["date"]])


# ---- results ----


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


def recorded(file: Path) -> list[dict[str, Any]]:
    """The lines of a results file, in order; ValueError names one that is no JSON."""
    found = []
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines() if file.exists() else (), 1):
        try:
            found.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{file.name}:{number} is no record: {error}") from error
    return found
