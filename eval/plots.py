"""Quality against speed: the exact ones of every way to generate, over tokens a denoiser pass and over AR's speed."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from tt_model.files import write_atomically

from .intervals import Estimate

COLOURS = ("tab:blue", "tab:orange", "tab:purple", "tab:red", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
ALONE = {"AR": "tab:gray", "speculative": "tab:green"}
COLUMNS = {"tokens_per_forward": "tokens a denoiser pass", "times_ar": "tokens/s, times AR's"}


def series_of(name: str) -> str:
    """What a way to generate is one setting of: "diffusion" of "diffusion 0.8"."""
    return name.rpartition(" ")[0] or name


def plot(file: Path, arms: Mapping[str, Mapping[str, Estimate]], title: str) -> None:
    """Draw it: PNG or SVG, by the file's ending. Neighbours of a series are joined; whiskers are intervals of 95 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = [(name, list(some)) for name, some in groupby(arms, series_of)]
    others = (name for name, _ in series if name not in ALONE)
    colours = ALONE | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(others))}
    canvas, both = pyplot.subplots(1, 2, figsize=(10, 4.4), sharey=True, layout="constrained")
    for axes, (column, label) in zip(both, COLUMNS.items(), strict=True):
        for name, mine in series:
            for arm in mine:
                _point(axes, arms[arm][column], arms[arm]["exact"], colours[name], arm.removeprefix(f"{name} "))
            xs, ys = ([arms[arm][key][0] for arm in mine] for key in (column, "exact"))
            axes.plot(xs, [100 * y for y in ys], color=colours[name], alpha=0.4, label=name)
        axes.grid(True, color="#d0d7de", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(label)
    both[0].set_ylabel("exactly right, %")
    if len(colours) > len(ALONE) + 1:
        both[1].legend(frameon=False, fontsize=8)
    canvas.suptitle(title, fontsize=10)
    kind = file.suffix.removeprefix(".") or "png"
    write_atomically(file, lambda temporary: canvas.savefig(temporary, format=kind))
    pyplot.close(canvas)


def _point(axes: Any, x: Estimate, y: Estimate, colour: str, text: str) -> None:
    (x, *x_ends), (y, *y_ends) = x, y
    spread = dict(xerr=[[abs(x - end)] for end in x_ends], yerr=[[100 * abs(y - end)] for end in y_ends])
    axes.errorbar([x], [100 * y], **spread, fmt="o", color=colour, capsize=2)
    axes.annotate(text, (x, 100 * y), xytext=(4, 5), textcoords="offset points")
