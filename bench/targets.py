"""What kernels are built to reach on an H200: shares of a measured roof, or a time where latency is all there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cards import OPS

# Of an H200, where nothing was measured: a device copy (read and written) and a bf16 product.
H200 = {"bandwidth": 4.3e12, "compute": 790e12}


class Target(NamedTuple):
    op: str
    dims: Mapping[str, tuple[int, int]]  # least and most of a size
    share: float = 0.0  # of the roof
    seconds: float = 0.0
    ahead: Mapping[str, float] = {}  # peers whose time over ours must be at least this


ANY = 1 << 40
ONE_BLOCK = {"b": (1, 1), "L": (16, 16)}
TARGETS = (
    Target("experts", {"T": (16, 16)}, share=0.80, ahead={"vllm": 1}),
    Target("experts", {"T": (64, 512)}, share=0.85, ahead={"vllm": 1}),
    Target("experts", {"T": (4096, ANY)}, share=0.71, ahead={"grouped_mm": 1}),
    Target("route", {"T": (1, 64)}, seconds=5e-6, ahead={"sglang": 1}),
    Target("head_sample", {"R": (16, 16)}, share=0.85, ahead={"logits": 1}),
    Target("unmask", {"B": (1, 1), "L": (16, 16)}, share=0.85),
    Target("rms_norm", {"T": (4096, ANY)}, share=0.85, ahead={"compiled": 1}),
    Target("modulated_rms_norm", {"B": (256, ANY)}, share=0.85, ahead={"compiled": 1, "liger": 1}),
    Target("gated_group_norm", {"T": (4096, ANY)}, share=0.85, ahead={"compiled": 1}),
    Target("context_attention", {"L": (16, 16), "S": (32768, ANY)}, share=0.55, ahead={"fa3": 1}),
    Target("block_diffusion_attention", {"N": (8192, ANY)}, ahead={"flex": 1.2}),
    Target("ssd_block", ONE_BLOCK, seconds=6e-6, ahead={"mamba_ssm": 1}),
    Target("mamba_block", ONE_BLOCK, seconds=6e-6, ahead={"apart": 1, "causal_conv1d+mamba_ssm": 1}),
    Target("ssd_chunk", {"L": (8192, 8192), "Q": (0, 0)}, seconds=120e-6, ahead={"mamba_ssm": 1, "fla": 1}),
    Target("causal_conv1d", {"L": (4096, ANY)}, share=0.80, ahead={"causal_conv1d": 1}),
)


def target_of(op: str, dims: Mapping[str, int], which: str) -> Target | None:
    inside = lambda t: all(name in dims and low <= dims[name] <= high for name, (low, high) in t.dims.items())
    return next((t for t in TARGETS if t.op == op and which == "forward" and inside(t)), None)


def says(target: Target | None) -> str:
    """A target in a few words. Whom it is to be ahead of is left to the table of peers."""
    if target is None:
        return ""
    parts = [f"{100 * target.share:.0f} %"] * bool(target.share)
    parts += [f"{1e6 * target.seconds:.0f} us"] * bool(target.seconds)
    return ", ".join(parts + [f"{least} x {name}" for name, least in target.ahead.items() if least != 1])


def expected(op: str) -> str:
    """What an H200 should show of an op at its targets, by the costs on its card. Nobody has measured it."""
    found = []
    for target in (target for target in TARGETS if target.op == op):
        dims = next(dims for dims in OPS[op].shapes if target_of(op, dims, "forward") is target)
        flops, moved = OPS[op].cost(2, **dims)
        seconds = max(moved / H200["bandwidth"], flops / H200["compute"]) / (target.share or 1.0)
        size = " ".join(f"{name}={dims[name]}" for name in target.dims)
        share = f" at {100 * target.share:.0f} %" * bool(target.share)
        ahead = "".join(f", {name} at least {least:g} times that" for name, least in target.ahead.items())
        found.append(f"{size} {1e6 * (target.seconds or seconds):.0f} us{share}{ahead}")
    return "; ".join(found)


def shortfall(row: Mapping[str, Any]) -> list[str]:
    """What a recorded row misses of its target, compared as it is shown; a peer that was not there is not missed."""
    target = target_of(row["op"], row["dims"], row["which"])
    if target is None:
        return []
    if row.get("fault"):
        return ["no right result"]
    missed = []
    if round(100 * row["share"]) < round(100 * target.share):
        missed.append(f"{100 * row['share']:.0f} % of the roof, target {100 * target.share:.0f} %")
    if target.seconds and round(1e6 * row["p50"], 1) > round(1e6 * target.seconds, 1):
        missed.append(f"{1e6 * row['p50']:.1f} us, target {1e6 * target.seconds:.0f} us")
    for name, least in target.ahead.items():
        ratio = row["peers"].get(name, {}).get("ratio")
        if ratio is not None and round(ratio, 2) < least:
            missed.append(f"{name} takes {ratio:.2f} of our time, target {least}")
    return missed
