"""The whole model on paper and as recorded: what passes cannot do without, and when diffusion beats token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tt_model import TwoTowerConfig
from tt_model.cli import sizes

from .measure import spread, table
from .results import Machine

AR, DENOISER, COMMIT = sizes.PASSES
BF16 = next(f for f in sizes.FORMATS if f.name == "bf16")
FORMATS = {f.name: f for f in sizes.FORMATS}
# Of an H200, where nothing was measured: a device copy (read and written) and a bf16 product.
H200 = {"bandwidth": 4.3e12, "compute": 790e12}


def parts(
    c: TwoTowerConfig, kind: str, *, batch: int, context: int, format: sizes.Format = BF16
) -> dict[str, tuple[float, float]]:
    """(bytes, operations) that a pass cannot do without, by what they are of: experts (routed and shared), the router,
    the head, projections, attention, the scan."""
    moved = sizes.pass_bytes(c, format, kind, batch=batch, context=context)
    L = 1 if kind == AR else c.block_size
    tokens = batch * L
    active = sizes.active_parameters(c)
    head = 0 if kind == COMMIT else active["head"]
    named = ("embeddings", "norms", "head", "routed experts", "shared experts", "router")
    others = sum(active.values()) - sum(active[name] for name in named)
    time = batch * sizes.time_modules(c) if kind == DENOISER else 0
    wide = len(c.layers_of("*")) * c.num_attention_heads * c.head_dim
    states = len(c.layers_of("M")) * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
    width = format.other / 8
    shared, router, scores = active["shared experts"], active["router"], 4 * active["router"]  # the router is fp32
    rest = moved["other weights"] - scores - (shared + head) * width
    return {
        "experts": (moved["experts"] + shared * width, 2 * tokens * (active["routed experts"] + shared)),
        "router": (scores, 2 * tokens * router),
        "head": (head * width, 2 * tokens * head),
        "projections": (rest, 2 * (tokens * others + time)),
        "attention": (moved["K/V"], 4 * tokens * (context + L) * wide),
        "scan": (moved["states"], 4 * tokens * states),
    }


def pass_flops(c: TwoTowerConfig, kind: str, *, batch: int, context: int) -> int:
    return round(sum(flops for _, flops in parts(c, kind, batch=batch, context=context).values()))


def floor(
    c: TwoTowerConfig, kind: str, *, batch: int, context: int, roofs: Mapping[str, float], format: sizes.Format = BF16
) -> float:
    """Seconds below which no pass can be: each part takes the longer of its bytes and its operations at the roofs."""
    each = parts(c, kind, batch=batch, context=context, format=format).values()
    return sum(max(moved / roofs["bandwidth"], flops / roofs["compute"]) for moved, flops in each)


def even(c: TwoTowerConfig, ar: float, denoiser: float, commit: float) -> float | None:
    """Tokens a denoiser pass at which a block takes as long as its tokens one by one; None: never."""
    left = c.block_size * ar - commit
    return c.block_size * denoiser / left if left > 0 else None


def times_ar(c: TwoTowerConfig, ar: float, denoiser: float, commit: float, tokens: float) -> float:
    """Diffusion's tokens/s over AR's, at so many tokens a denoiser pass."""
    return c.block_size * ar / (c.block_size / tokens * denoiser + commit)


def card(
    c: TwoTowerConfig, batches: Sequence[int], contexts: Sequence[int], roofs: Mapping[str, float] = H200
) -> Iterator[str]:
    """The static card: bytes, operations and floors of every pass, from the config alone."""
    count = sum(sizes.parameters(c).values())
    active = sum(sizes.active_parameters(c).values())
    size = f"{count / 1e6:,.1f} M parameters a tower, {active / 1e6:,.1f} M active"
    yield f"{c.pattern}, blocks of {c.block_size}: {size}"
    where = f"{roofs['bandwidth'] / 1e12:.2f} TB/s and {roofs['compute'] / 1e12:.0f} TFLOP/s"
    yield f"Floors at {where}; routing uniform and independent, the worst case:"
    header = ["pass", "batch", "context", "experts hit", "GB", "GFLOP", *(f"floor ms, {name}" for name in FORMATS)]
    lines = []
    for context in contexts:
        for batch in batches:
            for kind in sizes.PASSES:
                moved = sum(sizes.pass_bytes(c, BF16, kind, batch=batch, context=context).values())
                hit = sizes.distinct_experts(c, batch * (1 if kind == AR else c.block_size))
                flops = pass_flops(c, kind, batch=batch, context=context)
                floors = (floor(c, kind, batch=batch, context=context, roofs=roofs, format=f) for f in FORMATS.values())
                cells = [kind, batch, context, f"{hit:.1f}", f"{moved / 1e9:.3g}", f"{flops / 1e9:.3g}"]
                lines.append([*cells, *(f"{1e3 * seconds:.3g}" for seconds in floors)])
    yield table(header, lines)


def regime(
    c: TwoTowerConfig, lines: Sequence[Mapping[str, Any]], roofs: Mapping[str, float] | None, tokens: float = 3.3
) -> str | None:
    """When diffusion beats AR, by measured passes, beside the floor's answer. 3.3 tokens a pass: the published rate."""
    places = dict.fromkeys((line["batch"], line["context"]) for line in lines)
    rows = []
    for batch, context in places:
        found = {x["pass"]: x["p50"] for x in lines if (x["batch"], x["context"]) == (batch, context)}
        if not {AR, DENOISER, COMMIT} <= found.keys():
            continue
        measured = tuple(found[kind] for kind in (AR, DENOISER, COMMIT))
        ideal = tuple(
            floor(c, kind, batch=batch, context=context, roofs=roofs or H200) for kind in (AR, DENOISER, COMMIT)
        )
        cells = [batch, context]
        for times in (measured, ideal):
            limit = even(c, *times)
            cells += ["never" if limit is None or limit > c.block_size else f"{limit:.1f}"]
            cells += [f"{times_ar(c, *times, tokens):.2f}"]
        rows.append(cells)
    if not rows:
        return None
    x = f"times AR at {tokens}"
    return table(("batch", "context", "even at tokens/pass", x, "floor: even at", f"floor: {x}"), rows)


def section(machine: Machine, figure: str | None) -> Iterator[str]:
    """The whole model in SPEED.md: passes, the regime, decoding."""
    passes, decode = machine.lines["pass"], machine.lines["decode"]
    if not passes and not decode:
        return
    yield "### Whole model"
    for model in dict.fromkeys(line["model"] for line in (*passes, *decode)):
        mine = [line for line in passes if line["model"] == model]
        if mine:
            yield f"`{model}`, {mine[-1]['dtype']}: one pass, and what its bytes and operations take at the roofs."
            yield pass_table(mine)
            config = TwoTowerConfig.from_dict(mine[-1]["config"])
            if text := regime(config, mine, mine[-1].get("roofs")):
                yield "When diffusion beats AR, by these passes and by the floors:"
                yield text
        if found := [line for line in decode if line["model"] == model]:
            yield "Decoding, prefill excluded (*: included, it is half of the time or more):"
            yield decode_table(found)
    if figure:
        yield f"![decoding]({figure})"


def pass_table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for x in lines:
        floor_ms = f"{1e3 * x['floor']:.3g}" if x.get("floor") else "-"
        share = f"{100 * x['floor'] / x['p50']:.0f} %" if x.get("floor") else "-"
        hit = "-" if x.get("experts") is None else f"{x['experts']:.1f} of {x['experts_worst']:.1f}"
        host = "-" if not x.get("wall") else f"{1e3 * x['wall']:.3g}"
        rows.append((x["pass"], x["batch"], x["context"], spread(x, 1e3), host, floor_ms, share, hit, x["clock"]))
    header = (
        "pass",
        "batch",
        "context",
        "ms (p20-p80)",
        "ms by the wall",
        "floor ms",
        "of floor",
        "experts hit of uniform",
        "clock",
    )
    return table(header, rows)


def decode_table(lines: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            x["mode"],
            x["batch"],
            x["context"],
            "-" if x["threshold"] is None else x["threshold"],
            f"{x['tokens_per_s']:.1f}" + "*" * x.get("prefill_included", False),
            "-" if not x["tokens_per_pass"] else f"{x['tokens_per_pass']:.2f}",
        )
        for x in lines
    ]
    return table(("mode", "batch", "context", "threshold", "tokens/s", "tokens a denoiser pass"), rows)
