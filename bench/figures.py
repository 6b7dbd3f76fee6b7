"""Figures of the recorded results: where ops stand under the roofline, against peers, and the model over batch sizes.

SVG without dates or random ids: the same results give the same file under the same matplotlib.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Machine

INK, GREY, SERIES = "#1f2328", "#8c959f", ("#0969da", "#bf3989", "#1a7f37", "#9a6700", "#8250df", "#cf222e", "#57606a")


def _axes(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.hashsalt": "twotower", "font.size": 9, "axes.edgecolor": GREY, "text.color": INK})
    figure, axes = pyplot.subplots(figsize=(width, height))
    axes.grid(True, which="major", color="#d0d7de", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def roofline(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Every timed row by what it must compute and move: rate over intensity, under the roofs measured with it."""
    rows = [row for row in rows if row["p50"] and row["roofs"] and row["flops"]]
    figure, axes = _axes(8, 4.8)
    roofs = rows[-1]["roofs"]
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min([*intensity, 0.1]) / 2, max([*intensity, 1000]) * 2
    ridge = roofs["compute"] / roofs["bandwidth"]
    axes.plot(
        [low, ridge, high],
        [low * roofs["bandwidth"] / 1e12, roofs["compute"] / 1e12, roofs["compute"] / 1e12],
        color=INK,
        linewidth=1.2,
    )
    ops = list(dict.fromkeys(row["op"] for row in rows))
    markers = "osD^v<>ph"
    for i, op in enumerate(ops):
        mine = [row for row in rows if row["op"] == op]
        axes.scatter(
            [row["flops"] / row["bytes"] for row in mine],
            [row["flops"] / row["p50"] / 1e12 for row in mine],
            s=22,
            label=op,
            color=SERIES[i % len(SERIES)],
            marker=markers[i // len(SERIES) % len(markers)],
            alpha=0.85,
        )
    axes.set(xscale="log", yscale="log", xlabel="flops a byte that the op cannot do without", ylabel="TFLOP/s")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def peers(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A peer's time over ours, a line for each row, right of 1 where ours is faster."""
    rows = [row for row in rows if any("ratio" in peer for peer in row["peers"].values())]
    figure, axes = _axes(8, 1 + 0.22 * len(rows))
    names = list(dict.fromkeys(name for row in rows for name, peer in row["peers"].items() if "ratio" in peer))
    for i, name in enumerate(names):
        points = [
            (row["peers"][name]["ratio"], y) for y, row in enumerate(rows) if "ratio" in row["peers"].get(name, {})
        ]
        axes.scatter(
            *zip(*points, strict=True), s=18, label=name, color=SERIES[i % len(SERIES)], marker="osD^"[i // 7 % 4]
        )
    axes.axvline(1, color=INK, linewidth=1)
    labels = [f"{row['op']} {label(row['dims'])} {row['which'][:3]}" for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="time over ours")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def decoding(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Tokens a second over the batch, a curve for each mode and context."""
    figure, axes = _axes(7, 4)
    series = list(dict.fromkeys((line["model"], line["mode"], line["context"]) for line in lines))
    for i, key in enumerate(series):
        mine = sorted((x["batch"], x["tokens_per_s"]) for x in lines if (x["model"], x["mode"], x["context"]) == key)
        style = dict(color=SERIES[i % len(SERIES)], marker="o", markersize=3)
        axes.plot(*zip(*mine, strict=True), label=f"{key[1]}, {key[2]} tokens before", **style)
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s")
    ticks = sorted({line["batch"] for line in lines})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(fontsize=7, frameon=False)
    _save(figure, path)


def label(dims: dict[str, int]) -> str:
    return " ".join(f"{name}={size}" for name, size in dims.items())


def expected(machine: Machine) -> dict[str, str]:
    """Names of the figures that a machine's results have something for."""
    rows = machine.rows
    there = {
        "roofline": machine.gpu and any(row["p50"] and row["roofs"] and row["flops"] for row in rows),
        "peers": machine.gpu and any("ratio" in peer for row in rows for peer in row["peers"].values()),
        "decoding": bool(machine.lines["decode"]),
    }
    return {kind: f"speed_{machine.name}_{kind}.svg" for kind, yes in there.items() if yes}


def draw(machine: Machine, folder: Path) -> None:
    name = machine.where[0].get("gpu") or "CPU: no claim about kernels"
    data = {"roofline": machine.rows, "peers": machine.rows, "decoding": machine.lines["decode"]}
    makers = {"roofline": roofline, "peers": peers, "decoding": decoding}
    for kind, file in expected(machine).items():
        makers[kind](data[kind], folder / file, name)
