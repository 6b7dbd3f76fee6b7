"""Figures of the recorded results: where ops stand under the roofline, against peers, and the model's tokens a second.

SVG without dates or random ids: the same results give the same file under the same matplotlib. Each carries a digest of
what it shows, so that a figure of other results is known without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cards import OPS

from .results import Machine

INK, GREY = "#1f2328", "#8c959f"
# Told apart by eyes of every kind, and by a marker each besides.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#8250df", "#e69f00", "#56b4e9", "#cc79a7", "#1f2328")
MARKERS = "osD^vP*X<>"
WIDTH = 9.5  # inches: as wide as a page shows without scaling letters down


@dataclass(frozen=True)
class Figure:
    """A figure that a machine's results have something for."""

    file: str
    title: str
    lines: Sequence[Mapping[str, Any]]
    maker: Callable[[Sequence[Any], Any], None]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.title, self.lines], sort_keys=True).encode()).hexdigest()[:16]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has it as these results give it."""
        path = folder / self.file
        return path.is_file() and f"results {self.digest}" in path.read_text(encoding="utf-8")


# ---- words ----


def label(dims: Mapping[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items())


def constant(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The sizes that are the same in all rows of an op."""
    first = rows[0]["dims"]
    same = {name: size for name, size in first.items() if all(row["dims"].get(name) == size for row in rows)}
    return same if len(same) < len(first) else {}


def part_of(row: Mapping[str, Any]) -> str:
    """The part of tt_kernels that an op is in."""
    return OPS[row["op"]].fn.__module__.split(".")[1]


# ---- what is drawn ----


def roofline(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """Every timed row by what it must compute and move: rate over intensity, under the roofs of its run. A colour for
    each part of tt_kernels, a marker for each op in it."""
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min([*intensity, 0.1]) / 2, max([*intensity, 1000]) * 2
    steps = [low * (high / low) ** (i / 200) for i in range(201)]
    roofs = [row["roofs"] for row in rows]
    heights = [sorted(min(x * r["bandwidth"], r["compute"]) / 1e12 for r in roofs) for x in steps]
    axes.fill_between(steps, [h[0] for h in heights], [h[-1] for h in heights], color=GREY, alpha=0.5, linewidth=0)
    axes.plot(steps, [h[len(h) // 2] for h in heights], color=INK, linewidth=1.2, label="roofs of its run (grey: all)")
    parts = list(dict.fromkeys(map(part_of, rows)))
    for i, part in enumerate(parts):
        ops = list(dict.fromkeys(row["op"] for row in rows if part_of(row) == part))
        for op, marker in zip(ops, MARKERS, strict=False):
            mine = [row for row in rows if row["op"] == op]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in mine],
                [row["flops"] / row["p50"] / 1e12 for row in mine],
                s=26,
                label=op,
                color=SERIES[i % len(SERIES)],
                marker=marker,
                alpha=0.8,
                linewidths=0,
            )
    axes.set(xscale="log", yscale="log", xlabel="flops a byte that the op cannot do without", ylabel="TFLOP/s")


def peers(rows: Sequence[Mapping[str, Any]], axes: Any) -> None:
    """A peer's time over ours, a line for each row, right of 1 where ours is faster."""
    names = list(dict.fromkeys(name for row in rows for name, peer in row["peers"].items() if "ratio" in peer))
    for i, name in enumerate(names):
        found = [(row["peers"].get(name, {}).get("ratio"), y) for y, row in enumerate(rows)]
        points = [(x, y) for x, y in found if x is not None]
        style = dict(color=SERIES[i % len(SERIES)], marker=MARKERS[i % len(MARKERS)], s=30, alpha=0.9, linewidths=0)
        axes.scatter(*zip(*points, strict=True), label=name, **style)
    axes.axvline(1, color=INK, linewidth=1)
    fixed = {op: constant([row for row in rows if row["op"] == op]) for op in {row["op"] for row in rows}}
    labels = []
    for row in rows:
        dims = label({name: size for name, size in row["dims"].items() if name not in fixed[row["op"]]})
        labels.append(f"{row['op']} {dims} {row['which']}".replace("  ", " "))
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xscale="log", xlabel="time over ours (right of 1: ours is faster)")
    _ticks(axes.xaxis, [peer["ratio"] for row in rows for peer in row["peers"].values() if "ratio" in peer] + [1.0])


def decoding(lines: Sequence[Mapping[str, Any]], axes: Any, over: str) -> None:
    """Tokens a second over the batch or the context: a colour for each mode, a marker for each of what else differs."""
    rest = tuple(name for name in ("threshold", "context", "batch", "new") if name != over)
    said = dict(threshold="threshold {}", batch="batch {}", context="{} tokens before", new="{} new tokens")
    key = lambda line: (line["mode"], *(line.get(name) for name in rest))
    curves = list(dict.fromkeys(map(key, lines)))
    colours = _each({mode for mode, *_ in curves}, SERIES)
    # A threshold belongs to its mode, and marks none unless a mode has several.
    loose = [i for i in range(1, len(rest) + 1) if any(a[0] == b[0] and a[i] != b[i] for a in curves for b in curves)]
    markers = _each({tuple(str(curve[i]) for i in loose) for curve in curves}, MARKERS)
    for curve in curves:
        mine = sorted((line for line in lines if key(line) == curve), key=lambda line: line[over])
        rates = [line["tokens_per_s"] for line in mine]
        below = [rate - line.get("tokens_p20", rate) for rate, line in zip(rates, mine, strict=True)]
        above = [line.get("tokens_p80", rate) - rate for rate, line in zip(rates, mine, strict=True)]
        details = [said[rest[i - 1]].format(curve[i]) for i in loose if curve[i] is not None]
        axes.errorbar(
            [line[over] for line in mine],
            rates,
            yerr=[below, above],
            label=", ".join([curve[0], *details]),
            color=colours[curve[0]],
            marker=markers[tuple(str(curve[i]) for i in loose)],
            markersize=6,
            linewidth=1.2,
            capsize=2,
        )
    what = {"batch": "batch", "context": "tokens before"}[over]
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel="tokens/s (p20 to p80)")
    ticks = sorted({line[over] for line in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()
    _ticks(axes.yaxis, [line["tokens_per_s"] for line in lines])


def _each(keys: Iterable[Any], values: Sequence[str]) -> dict[Any, str]:
    return {key: values[i % len(values)] for i, key in enumerate(sorted(keys))}


def over_batch(lines: Sequence[Mapping[str, Any]], axes: Any) -> None:
    decoding(lines, axes, "batch")


def over_context(lines: Sequence[Mapping[str, Any]], axes: Any) -> None:
    decoding(lines, axes, "context")


def _ticks(axis: Any, values: Iterable[float]) -> None:
    """1, 2, 5, 10 ... around the values, as plain numbers."""
    every = sorted(value for value in values if value > 0)
    steps = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    inside = [step for step in steps if every[0] / 2.5 <= step <= every[-1] * 2.5]
    axis.set_ticks(inside, [f"{step:g}" for step in inside])
    axis.minorticks_off()


# ---- files ----


def expected(machine: Machine) -> dict[str, Figure]:
    """The figures that a machine's results have something for, by name."""
    title = machine.gpu or "CPU: no claim about kernels"
    found: dict[str, tuple[str, Sequence[Any], Callable[[Sequence[Any], Any], None]]] = {}
    if machine.gpu:
        order = list(OPS)
        rows = sorted(machine.rows, key=lambda row: order.index(row["op"]))
        shown = [row for row in rows if row["p50"] and row.get("roofs") and row["flops"]]
        found["roofline"] = title, shown, roofline
        compared = [row for row in rows if any("ratio" in peer for peer in row["peers"].values())]
        for part in dict.fromkeys(map(part_of, compared)):
            found[f"peers_{part}"] = f"{title}: {part}", [row for row in compared if part_of(row) == part], peers
    lines = machine.lines["decode"]
    for model, dtype in dict.fromkeys((line["model"], line["dtype"]) for line in lines):
        mine = [line for line in lines if (line["model"], line["dtype"]) == (model, dtype)]
        for over, maker in (("batch", over_batch), ("context", over_context)):
            if len({line[over] for line in mine}) > 1:
                found[of_model(over, model, dtype)] = f"{title}: {model}, {dtype}", mine, maker
    return {
        kind: Figure(f"speed_{machine.name}_{kind}.svg", title, lines, maker)
        for kind, (title, lines, maker) in found.items()
        if lines
    }


def of_model(over: str, model: str, dtype: str) -> str:
    """The name of a model's figure of tokens a second."""
    return "_".join([over, "-".join(re.findall(r"[a-z0-9]+", model.lower())), dtype])


def draw(machine: Machine, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "twotower", "font.size": 10, "axes.edgecolor": GREY, "text.color": INK}
    for figure in expected(machine).values():
        with matplotlib.rc_context(style):
            height = 1.7 + 0.24 * len(figure.lines) if figure.maker is peers else 6.4
            canvas, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained")
            axes.grid(True, which="major", color="#d0d7de", linewidth=0.5)
            axes.set_axisbelow(True)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
            figure.maker(figure.lines, axes)
            axes.set_title(figure.title, fontsize=10, loc="left")
            columns = max(1, 120 // (8 + max(map(len, axes.get_legend_handles_labels()[1]))))  # of the page's letters
            canvas.legend(loc="outside lower left", ncols=columns, fontsize=9, frameon=False)
            folder.mkdir(parents=True, exist_ok=True)
            about = {"Date": None, "Creator": None, "Description": f"results {figure.digest}"}
            canvas.savefig(folder / figure.file, format="svg", metadata=about)
            pyplot.close(canvas)
