"""What kernels are built to reach on an H200: shares of a measured roof, or a time where latency is all there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Target:
    op: str
    dims: Mapping[str, tuple[int, int]]  # least and most of a size
    share: float | None = None  # of the roof
    seconds: float | None = None
    which: str = "forward"
    ahead_of: tuple[str, ...] = ()  # peers whose ratio must be above 1
    times: Mapping[str, float] = field(default_factory=dict)  # peers whose ratio must be at least this

    def holds_for(self, op: str, dims: Mapping[str, int], which: str) -> bool:
        inside = all(name in dims and low <= dims[name] <= high for name, (low, high) in self.dims.items())
        return op == self.op and which == self.which and inside


ANY = 1 << 40
TARGETS = (
    Target("experts", {"T": (16, 16)}, share=0.80, ahead_of=("vllm",)),
    Target("experts", {"T": (64, 512)}, share=0.85, ahead_of=("vllm",)),
    Target("experts", {"T": (4096, ANY)}, share=0.71, ahead_of=("grouped_mm",)),
    Target("route", {"T": (1, 64)}, seconds=5e-6, ahead_of=("sglang",)),
    Target("head_sample", {"R": (16, 16)}, share=0.85, ahead_of=("logits",)),
    Target("unmask", {"B": (1, 1), "L": (16, 16)}, share=0.85),
    Target("rms_norm", {"T": (4096, ANY)}, share=0.85, ahead_of=("compiled",)),
    Target("modulated_rms_norm", {"B": (256, ANY)}, share=0.85, ahead_of=("compiled", "liger")),
    Target("gated_group_norm", {"T": (4096, ANY)}, share=0.85, ahead_of=("compiled",)),
    Target("context_attention", {"L": (16, 16), "S": (32768, ANY)}, share=0.55, ahead_of=("fa3",)),
    Target("block_diffusion_attention", {"N": (8192, ANY)}, times={"flex": 1.2}),
    Target("ssd_block", {"b": (1, 1), "L": (16, 16)}, seconds=6e-6, ahead_of=("mamba_ssm",)),
    Target("mamba_block", {"b": (1, 1), "L": (16, 16)}, seconds=6e-6, ahead_of=("apart", "causal_conv1d+mamba_ssm")),
    Target("ssd_chunk", {"L": (8192, 8192), "Q": (0, 0)}, seconds=120e-6, ahead_of=("mamba_ssm", "fla")),
    Target("causal_conv1d", {"L": (4096, ANY)}, share=0.80, ahead_of=("causal_conv1d",)),
)

# Why an op falls short of its target, as a profile showed it: SPEED.md puts it beside each of the op's rows that do.
REASONS: dict[str, str] = {}


def target_of(op: str, dims: Mapping[str, int], which: str) -> Target | None:
    return next((target for target in TARGETS if target.holds_for(op, dims, which)), None)


def says(target: Target) -> str:
    """A target in a few words. Whom it is to be ahead of is left to the table of peers."""
    parts = [f"{100 * target.share:.0f} %"] if target.share else []
    parts += [f"{1e6 * target.seconds:.0f} us"] if target.seconds else []
    return ", ".join(parts + [f"{least} x {name}" for name, least in target.times.items()])


def shortfall(target: Target, row: Mapping) -> list[str]:
    """What a recorded row misses of its target, compared as it is shown, so that nothing shown as reached is short; a
    peer that was not there is not missed."""
    if row.get("fault"):
        return ["no right result"]
    missed = []
    if target.share and round(100 * row["share"]) < round(100 * target.share):
        missed.append(f"{100 * row['share']:.0f} % of the roof, target {100 * target.share:.0f} %")
    if target.seconds and round(1e6 * row["p50"], 1) > round(1e6 * target.seconds, 1):
        missed.append(f"{1e6 * row['p50']:.1f} us, target {1e6 * target.seconds:.0f} us")
    for name, least in (dict.fromkeys(target.ahead_of, 1.0) | dict(target.times)).items():
        ratio = row["peers"].get(name, {}).get("ratio")
        if ratio is not None and round(ratio, 2) < least:
            missed.append(f"{name} takes {ratio:.2f} of our time" + (f", target {least}" if least != 1 else ""))
    return missed
