"""Figures of the recorded results: where ops stand under the roofline, and the model's tokens a second.

SVG without dates or random ids: the same results give the same file under the same matplotlib. Each carries a digest of
what it shows, so that a figure of other results is known without drawing it again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cards import OPS

Line = Mapping[str, Any]
# Told apart by eyes of every kind, and by a marker each besides.
SERIES = ("#0072b2", "#d55e00", "#009e73", "#8250df", "#e69f00", "#56b4e9", "#cc79a7", "#1f2328")
MARKERS = "osD^vP*X<>"


class Figure(NamedTuple):
    """A figure between the texts of SPEED.md."""

    file: str
    about: str
    title: str
    lines: Sequence[Line]
    maker: Callable[[Sequence[Any], Any], None]

    def __str__(self) -> str:
        return f"![{self.about}](docs/{self.file})"

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.title, self.lines], sort_keys=True).encode()).hexdigest()[:16]

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has it as these results give it."""
        path = folder / self.file
        return path.is_file() and f"results {self.digest}" in path.read_text(encoding="utf-8")


def part_of(row: Line) -> str:
    """The part of tt_kernels that an op is in."""
    return OPS[row["op"]].fn.__module__.split(".")[1] if row["op"] in OPS else "ops that have another name today"


def roofline(rows: Sequence[Line], axes: Any) -> None:
    """Every timed row by what it must compute and move: rate over intensity, under the roofs of the last run. A colour
    for each part of tt_kernels, a marker for each op in it."""
    roofs, reach = rows[-1]["roofs"], [row["flops"] / row["bytes"] for row in rows]
    steps = [min(*reach, 0.1), roofs["compute"] / roofs["bandwidth"], max(*reach, 1000)]
    axes.plot(steps, [min(x * roofs["bandwidth"], roofs["compute"]) / 1e12 for x in steps], color=SERIES[-1])
    parts = list(dict.fromkeys(map(part_of, rows)))
    for part, colour in zip(parts, SERIES * len(parts), strict=False):
        ops = dict.fromkeys(row["op"] for row in rows if part_of(row) == part)
        for op, marker in zip(ops, MARKERS * len(ops), strict=False):
            mine = [row for row in rows if row["op"] == op]
            points = [(row["flops"] / row["bytes"], row["flops"] / row["p50"] / 1e12) for row in mine]
            axes.scatter(*zip(*points, strict=True), label=op, color=colour, marker=marker, s=26, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="flops a byte that the op cannot do without", ylabel="TFLOP/s")


def decoding(lines: Sequence[Line], axes: Any, over: str) -> None:
    """Tokens a second over the batch or the context: a colour for each mode, a marker for each of what else differs."""
    rest = [name for name in ("threshold", "context", "batch", "new") if name != over]
    rest = [name for name in rest if len({line.get(name) for line in lines if line.get(name) is not None}) > 1]
    key = lambda line: (line["mode"], *(line.get(name) for name in rest))
    curves = list(dict.fromkeys(map(key, lines)))
    modes, others = (list(dict.fromkeys(part)) for part in ((c[0] for c in curves), (c[1:] for c in curves)))
    for curve in curves:
        mine = sorted((line for line in lines if key(line) == curve), key=lambda line: line[over])
        rates = [line["tokens_per_s"] for line in mine]
        below = [line["tokens_per_s"] - line.get("tokens_p20", line["tokens_per_s"]) for line in mine]
        above = [line.get("tokens_p80", line["tokens_per_s"]) - line["tokens_per_s"] for line in mine]
        details = [f"{name} {value}" for name, value in zip(rest, curve[1:], strict=True) if value is not None]
        style = dict(color=SERIES[modes.index(curve[0])], marker=MARKERS[others.index(curve[1:]) % len(MARKERS)])
        label = ", ".join([curve[0], *details])
        axes.errorbar([x[over] for x in mine], rates, yerr=[below, above], label=label, capsize=2, **style)
    axes.set(xscale="log", yscale="log", xlabel=over, ylabel="tokens/s (p20 to p80)")
    ticks = sorted({line[over] for line in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.minorticks_off()


def of_rows(machine: str, title: str, rows: Sequence[Line]) -> Iterator[Figure]:
    """The roofline, if roofs were measured."""
    if timed := [row for row in rows if row["p50"] and row.get("roofs") and row["flops"]]:
        yield Figure(f"speed_{machine}_roofline.svg", "roofline", title, timed, roofline)


def of_decoding(machine: str, title: str, lines: Sequence[Line]) -> Iterator[Figure]:
    """Tokens a second of one model in one dtype, over what there is several of."""
    model, dtype = lines[0]["model"], lines[0]["dtype"]
    words = "-".join(re.findall(r"[a-z0-9]+", model.lower()))
    for over in (over for over in ("batch", "context") if len({line[over] for line in lines}) > 1):
        about, maker = f"{model}, {dtype}: tokens/s over {over}", partial(decoding, over=over)
        yield Figure(f"speed_{machine}_{over}_{words}_{dtype}.svg", about, f"{title}: {model}, {dtype}", lines, maker)


def draw(figures: Iterable[Figure], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        with matplotlib.rc_context({"svg.hashsalt": "twotower", "font.size": 10}):
            canvas, axes = pyplot.subplots(figsize=(9.5, 6.4), layout="constrained")
            axes.grid(True, which="major", color="#d0d7de", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            figure.maker(figure.lines, axes)
            axes.set_title(figure.title, fontsize=10, loc="left")
            canvas.legend(loc="outside lower left", ncols=4, fontsize=9, frameon=False)
            about = {"Date": None, "Creator": None, "Description": f"results {figure.digest}"}
            canvas.savefig(folder / figure.file, format="svg", metadata=about)
            pyplot.close(canvas)
