"""The whole model on paper and as recorded: what passes cannot do without, and when diffusion beats token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

from tt_model import TwoTowerConfig
from tt_model.cli import sizes

from .figures import Figure, of_decoding
from .measure import around, spread, table, table_of
from .targets import H200

Line = Mapping[str, Any]
AR, DENOISER, COMMIT = sizes.PASSES
FORMATS = {f.name: f for f in sizes.FORMATS}


class Pass(NamedTuple):
    """What a pass cannot do without: over a block of each of `batch` rows of `context` tokens, an AR step over one
    token of each."""

    config: TwoTowerConfig
    kind: str
    batch: int
    context: int
    format: sizes.Format = FORMATS["bf16"]

    @property
    def length(self) -> int:
        return 1 if self.kind == AR else self.config.block_size

    @property
    def experts(self) -> float:
        """Different experts that a layer's tokens choose, by uniform routing."""
        return sizes.distinct_experts(self.config, self.batch * self.length)

    @property
    def moved(self) -> dict[str, float]:
        return sizes.pass_bytes(self.config, self.format, self.kind, batch=self.batch, context=self.context)

    @property
    def bytes(self) -> float:
        return sum(self.moved.values())

    @property
    def flops(self) -> int:
        return round(sum(flops for _, flops in self.parts().values()))

    def parts(self) -> dict[str, tuple[float, float]]:
        """(bytes, operations) by what they are of: experts (routed and shared), the router, the head, projections,
        attention, the scan."""
        c, moved, L, tokens = self.config, self.moved, self.length, self.batch * self.length
        active = sizes.active_parameters(c)
        head = 0 if self.kind == COMMIT else active["head"]
        named = ("embeddings", "norms", "head", "routed experts", "shared experts", "router")
        others = sum(active.values()) - sum(active[name] for name in named)
        time = self.batch * sizes.time_modules(c) if self.kind == DENOISER else 0
        wide = len(c.layers_of("*")) * c.num_attention_heads * c.head_dim
        states = len(c.layers_of("M")) * c.mamba_num_heads * c.mamba_head_dim * c.ssm_state_size
        width = self.format.other / 8
        shared, router, scores = active["shared experts"], active["router"], 4 * active["router"]  # the router is fp32
        rest = moved["other weights"] - scores - (shared + head) * width
        return {
            "experts": (moved["experts"] + shared * width, 2 * tokens * (active["routed experts"] + shared)),
            "router": (scores, 2 * tokens * router),
            "head": (head * width, 2 * tokens * head),
            "projections": (rest, 2 * (tokens * others + time)),
            "attention": (moved["K/V"], 4 * tokens * (self.context + L) * wide),
            "scan": (moved["states"], 4 * tokens * states),
        }

    def floor(self, roofs: Mapping[str, float]) -> float:
        """Seconds below which it cannot be: each part takes the longer of its bytes and its operations at the roofs."""
        return sum(max(moved / roofs["bandwidth"], flops / roofs["compute"]) for moved, flops in self.parts().values())


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
    for context, batch, kind in product(contexts, batches, sizes.PASSES):
        p = Pass(c, kind, batch, context)
        floors = [f"{1e3 * p._replace(format=f).floor(roofs):.3g}" for f in FORMATS.values()]
        cells = [kind, batch, context, f"{p.experts:.1f}", f"{p.bytes / 1e9:.3g}", f"{p.flops / 1e9:.3g}"]
        lines.append([*cells, *floors])
    yield table(header, lines)


def regime(c: TwoTowerConfig, lines: Sequence[Line], tokens: float = 3.3) -> str | None:
    """When diffusion beats AR, by measured passes, beside the answer of their floors where roofs were measured with
    them. 3.3 tokens a pass: the published rate."""
    places = dict.fromkeys((line["batch"], line["context"]) for line in lines)
    floors = all(line.get("floor") for line in lines)
    rows = []
    for batch, context in places:
        found = {x["pass"]: x for x in lines if (x["batch"], x["context"]) == (batch, context)}
        if not {AR, DENOISER, COMMIT} <= found.keys():
            continue
        cells: list[Any] = [batch, context]
        for what in ("p50", "floor") if floors else ("p50",):
            times = tuple(found[kind][what] for kind in (AR, DENOISER, COMMIT))
            limit = even(c, *times)
            cells += ["never" if limit is None or limit > c.block_size else f"{limit:.1f}"]
            cells += [f"{times_ar(c, *times, tokens):.2f}"]
        rows.append(cells)
    if not rows:
        return None
    header = ("even at tokens/pass", f"times AR at {tokens}")
    return table(("batch", "context", *header, *(f"floor: {name}" for name in header if floors)), rows)


def section(machine: Any) -> Iterator[str | Figure]:
    """The whole model in SPEED.md: passes, the regime, decoding, of each model and dtype."""
    of = lambda kind: [(line["model"], line["dtype"]) for line in machine.lines[kind]]
    for model in dict.fromkeys(of("pass") + of("decode")):
        mine, found = (
            [line for line in machine.lines[kind] if (line["model"], line["dtype"]) == model]
            for kind in ("pass", "decode")
        )
        yield f"### Whole model: `{model[0]}`, {model[1]}"
        if mine:
            yield pass_table(mine, machine.run)
            if text := regime(TwoTowerConfig.from_dict(mine[-1]["config"]), mine):
                yield "When diffusion beats AR, by these passes:"
                yield text
        if found:
            yield "Decoding, prefill excluded (*: included, it is half of the time or more):"
            yield decode_table(found, machine.run)
            yield from of_decoding(machine.name, machine.title, found)


def pass_table(lines: Sequence[Line], run: Callable[[Line], object] = lambda line: None) -> str:
    columns: dict[str, Callable[[Any], object]] = {
        "pass": lambda x: x["pass"],
        "batch": lambda x: x["batch"],
        "context": lambda x: x["context"],
        "ms (p20-p80)": lambda x: spread(x, 1e3),
        "ms by the wall": lambda x: f"{1e3 * x['wall']:.3g}" if x.get("wall") else None,
        "floor ms": lambda x: f"{1e3 * x['floor']:.3g}" if x.get("floor") else None,
        "of floor": lambda x: f"{100 * x['floor'] / x['p50']:.0f} %" if x.get("floor") else None,
        "experts hit of uniform": lambda x: (
            f"{x['experts']:.1f} of {x['experts_worst']:.1f}" if x.get("experts") is not None else None
        ),
        "clock": lambda x: x["clock"],
        "run": run,
    }
    return table_of(lines, columns)


def rate(x: Line) -> str:
    """Tokens a second with their percentiles, where several rounds were recorded."""
    text = f"{x['tokens_per_s']:.1f} (one round)"
    if x.get("tokens_p20"):
        text = around(x["tokens_p20"], x["tokens_per_s"], x["tokens_p80"])
    return text + "*" * bool(x.get("prefill_included"))


def decode_table(lines: Sequence[Line], run: Callable[[Line], object] = lambda line: None) -> str:
    columns: dict[str, Callable[[Any], object]] = {
        "mode": lambda x: x["mode"],
        "batch": lambda x: x["batch"],
        "context": lambda x: x["context"],
        "tokens": lambda x: x.get("new"),
        "threshold": lambda x: x.get("threshold"),
        "tokens/s (p20-p80)": rate,
        "tokens a denoiser pass": lambda x: f"{x['tokens_per_pass']:.2f}" if x.get("tokens_per_pass") else None,
        "run": run,
    }
    return table_of(lines, columns)
