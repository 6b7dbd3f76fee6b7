"""`twotower info`: what a model consists of, what it needs, and how fast it can be at best."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import Parser, add_command, number, option, put

if TYPE_CHECKING:
    from rich.table import Table

    from ..config import TwoTowerConfig

_WIDTH = 120  # of a file or pipe
_TOKENS = (1, 4, 16, 32, 64, 128, 512)

_DESCRIPTION = """\
Parameters by part, memory, cache, and the fewest bytes that each kind of pass must move, with the time that takes at a
memory bandwidth. Everything follows from config.json: the weights need not be there."""

_EPILOG = """\
examples:
  twotower info
  twotower info --model two-towers
  twotower info --model config.json --bandwidth 8 --batch 32 --context 8192
  twotower info --model config.json --json | python -m json.tool

The times are lower bounds: weights, K/V and states once through the memory at full speed, nothing else. Routing is
taken as uniform and independent; the tokens of a real block agree more and need fewer experts."""


def add(commands: argparse._SubParsersAction[Parser]) -> None:
    """The command's part of the command line."""
    p = add_command(commands, "info", run, "parameters, memory and speed limits", _DESCRIPTION, _EPILOG)
    option(p, "--model", str, "DIR", "a model's folder, or a config.json (default: the bundled model)")
    bandwidth = "memory bandwidth in 10^12 bytes a second (default: %(default)s, an H200 copying on the device)"
    option(p, "--bandwidth", number(float, 1e-6), "TB/S", bandwidth, default=4.3)
    option(p, "--batch", number(int, 1), "N", "sequences", default=1)
    option(p, "--context", number(int, 0), "N", "tokens in the cache", default=2048)
    p.add_argument("--json", action="store_true", help="all of it as one JSON object")


def run(o: argparse.Namespace) -> None:
    """Read the config, compute, print."""
    from ..config import TwoTowerConfig
    from ..two_tower import ASSETS

    path = ASSETS if o.model is None else Path(o.model)
    config = TwoTowerConfig.from_file(path)
    facts = gather(config, bandwidth=o.bandwidth, batch=o.batch, context=o.context)
    if o.json:
        put(json.dumps({"model": str(path), **facts}) + "\n")
        return
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(highlight=False, width=None if narrow else _WIDTH)
    with console.capture() as captured:
        for part in tables(config, facts, str(path)):
            console.print(part)
    put(captured.get())


def gather(c: TwoTowerConfig, *, bandwidth: float, batch: int, context: int) -> dict[str, Any]:
    """All figures, ready for JSON."""
    from . import sizes

    count, active, time = sizes.parameters(c), sizes.active_parameters(c), sizes.time_modules(c)
    memory = {}
    passes: dict[str, Any] = {p: {} for p in sizes.PASSES}
    for f in sizes.FORMATS:
        context_tower, denoiser = sizes.tower_bytes(c, f), sizes.tower_bytes(c, f, denoiser=True)
        cache = batch * (sizes.kv_bytes(c, f) * context + sizes.state_bytes(c, f, planes=2))
        memory[f.name] = {
            "context tower": context_tower,
            "denoiser": denoiser,
            "K/V per token": sizes.kv_bytes(c, f),
            "states per sequence": sizes.state_bytes(c, f, planes=2),
            "all": context_tower + denoiser + cache,
            "each of two devices": max(context_tower, denoiser) + cache,
        }
        for p in sizes.PASSES:
            moved = sizes.pass_bytes(c, f, p, batch=batch, context=context)
            seconds = sum(moved.values()) / (bandwidth * 1e12)
            passes[p][f.name] = {"bytes": moved, "seconds": seconds}
    return {
        "parameters": {"tower": count, "time modules": time, "both towers": 2 * sum(count.values()) + time},
        "active parameters per token": active,
        "memory": memory,
        "floors": {"bandwidth": bandwidth * 1e12, "batch": batch, "context": context, "passes": passes},
        "break-even tokens per pass": {
            f.name: sizes.break_even(c, f, batch=batch, context=context) for f in sizes.FORMATS
        },
        "distinct experts": {str(t): sizes.distinct_experts(c, t) for t in _TOKENS},
    }


def scaled(value: float, units: tuple[str, ...]) -> str:
    """Three or four digits with the largest unit that leaves at least 1 before the point."""
    i = 0
    while abs(value) >= 999.95 and i + 1 < len(units):
        value, i = value / 1000, i + 1
    digits = 0 if i == 0 and value == int(value) else max(0, 2 - len(str(int(abs(value)))) + (abs(value) < 100))
    return f"{value:.{digits}f} {units[i]}".rstrip()


def count_text(n: float) -> str:
    return scaled(n, ("", "k", "M", "B", "T"))


def size_text(n: float) -> str:
    return scaled(n, ("B", "kB", "MB", "GB", "TB"))


def time_text(seconds: float) -> str:
    return scaled(seconds * 1e9, ("ns", "us", "ms", "s"))


def tables(c: TwoTowerConfig, facts: dict[str, Any], path: str) -> list[Any]:
    """The figures as rich shows them."""
    from rich.text import Text

    from ..config import LAYER_KINDS

    layers = ", ".join(f"{len(c.layers_of(k))} {name}" for k, name in LAYER_KINDS.items() if k in c.pattern)
    head = Text.assemble(
        (path, "bold"),
        f"\n{c.num_hidden_layers} layers a tower: {layers}\n",
        f"hidden {c.hidden_size}, vocabulary {c.vocab_size}, context up to {c.max_position_embeddings} tokens, ",
        f"blocks of {c.block_size}\n",
    )
    return [head, _parameters(c, facts), _memory(facts), *_floors(c, facts)]


def _table(title: str, first: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _parameters(c: TwoTowerConfig, facts: dict[str, Any]) -> Table:
    count, active = facts["parameters"]["tower"], facts["active parameters per token"]
    time, both = facts["parameters"]["time modules"], facts["parameters"]["both towers"]
    table = _table("Parameters", "", "context tower", "denoiser", "active per token", "share of a tower")
    whole = sum(count.values())
    for part, n in count.items():
        if n:
            table.add_row(part, count_text(n), count_text(n), count_text(active[part]), f"{n / whole:.1%}")
    table.add_row("time modules", "", count_text(time), "", "")
    table.add_section()
    totals = (whole, whole + time, sum(active.values()))
    table.add_row("a tower", *map(count_text, totals), "", style="bold")
    table.add_row("both towers", "", count_text(both), "", "")
    return table


def _memory(facts: dict[str, Any]) -> Table:
    floors = facts["floors"]
    columns = ("context tower", "denoiser", "both", "K/V per token", "states per sequence", "all", "each of two")
    title = f"Memory; all, and each of two devices: with the cache of {_situation(floors)}"
    table = _table(title, "weights", *columns)
    for name, m in facts["memory"].items():
        row = [m["context tower"], m["denoiser"], m["context tower"] + m["denoiser"]]
        row += [m[part] for part in ("K/V per token", "states per sequence", "all", "each of two devices")]
        table.add_row(name, *map(size_text, row))
    return table


def _situation(floors: dict[str, Any]) -> str:
    sequences = f"{floors['batch']} sequence{'s' * (floors['batch'] > 1)}"
    return f"{sequences} of {floors['context']} tokens"


def _floors(c: TwoTowerConfig, facts: dict[str, Any]) -> list[Any]:
    from rich.text import Text

    floors = facts["floors"]
    title = f"Lower bounds at {floors['bandwidth'] / 1e12:g} TB/s, {_situation(floors)}: bytes moved, and time"
    table = _table(title, "", "tokens", *facts["memory"])
    for kind, by_format in floors["passes"].items():
        tokens = floors["batch"] * (1 if kind == "AR step" else c.block_size)
        texts = (f"{size_text(sum(x['bytes'].values()))}  {time_text(x['seconds'])}" for x in by_format.values())
        table.add_row(kind, str(tokens), *texts)
    even = facts["break-even tokens per pass"].values()
    table.add_section()
    table.add_row("break-even*", "", *("never" if e is None else f"{e:.1f}" for e in even))
    note = "* tokens per denoiser pass at which a block moves as many bytes as its tokens do one by one.\n"
    note += "A real pass takes longer: arithmetic, activations and launches are not counted.\n"
    parts = [table, Text(note, style="dim")]
    if "E" in c.pattern:
        title = f"Distinct experts of {c.n_routed_experts} that a layer needs if routing is uniform, E(1 - (1 - k/E)^T)"
        experts = _table(title, "tokens T", *facts["distinct experts"])
        experts.add_row("experts", *(f"{n:.1f}" for n in facts["distinct experts"].values()))
        parts.append(experts)
    return parts
