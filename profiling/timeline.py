"""`python -m profiling.timeline`: one denoiser pass on a time axis, and who took how much of it.

Writes a trace for ui.perfetto.dev (or chrome://tracing) and prints two tables: time by op, and by kernel (on a CPU by
PyTorch operator), each beside its floor: the cost on the op's card at the roofs measured here. The pass is the one that
generation runs: the tower, then the unmasking step. Times in a trace are a little long, for the profiler takes its own:
for how long a pass takes use python -m bench.generate, for where it goes this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import clock, whole
from bench.generate import denoiser_pass, format_of, load
from bench.measure import in_a_line, percentile, positive, table, where
from cards import OPS
from tt_model import TwoTowerConfig
from tt_model.cli import sizes

from .common import RANGE, labelled, parser


def dims_of_pass(c: TwoTowerConfig, batch: int, context: int) -> dict[str, dict[str, int]]:
    """The sizes at which a denoiser pass over half-masked blocks calls each op, by the names that its card uses."""
    L = c.block_size
    width = c.mamba_num_heads * c.mamba_head_dim
    moe = dict(T=batch * L, D=c.hidden_size, E=c.n_routed_experts, K=c.num_experts_per_tok)
    scan = dict(H=c.mamba_num_heads, P=c.mamba_head_dim, G=c.n_groups, N=c.ssm_state_size)
    heads = dict(Hq=c.num_attention_heads, Hkv=c.num_key_value_heads, P=c.head_dim)
    return {
        "rms_norm": dict(T=batch * L, D=c.hidden_size),
        "modulated_rms_norm": dict(B=batch, L=L, D=c.hidden_size),
        "gated_group_norm": dict(T=batch * L, D=width, groups=c.n_groups),
        "mamba_block": dict(b=batch, L=L, K=c.conv_kernel, **scan),
        "route": moe,
        "experts": dict(N=c.moe_intermediate_size, M=c.moe_shared_expert_intermediate_size, **moe),
        "context_attention": dict(B=batch, L=L, S=context, **heads),
        "unmask": dict(B=batch, L=L // 2, D=c.hidden_size, V=c.vocab_size),  # of the rest nobody needs the logits
    }


def floors_of_pass(
    found: Mapping[str, tuple[float, float]],
    c: TwoTowerConfig,
    *,
    batch: int,
    context: int,
    format: sizes.Format,
    roofs: Mapping[str, float],
) -> dict[str, float]:
    """Seconds a pass below which the calls of each op cannot be: its card's cost at the roofs. Of linear layers, which
    have no card, what the whole pass's are on paper."""
    least = lambda flops, moved: max(moved / roofs["bandwidth"], flops / roofs["compute"])
    floors = {
        name: found[name][0] * least(*OPS[name].cost(format.other // 8, **dims))
        for name, dims in dims_of_pass(c, batch, context).items()
        if name in found
    }
    if "linear" in found:
        parts = whole.parts(c, whole.DENOISER, batch=batch, context=context, format=format)
        moved, flops = parts["projections"]
        floors["linear"] = least(flops, moved)
    return floors


def cpu_roofs() -> dict[str, float]:
    """What this CPU reads from memory and computes in fp32, on the threads that torch has: medians of five."""
    x, a = torch.ones(1 << 26), torch.randn(768, 768)

    def rate(call: Callable[[], Any], amount: float) -> float:
        call()
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begin)
        return amount / percentile(seconds, 0.5)

    return {"bandwidth": rate(x.sum, x.nbytes), "compute": rate(lambda: a @ a, 2.0 * 768**3)}


def by_op(events: Sequence[Any], passes: int, device: bool) -> dict[str, tuple[float, float]]:
    """Calls and seconds of each named range, a pass."""
    found: dict[str, tuple[float, float]] = {}
    # A range stands twice in a GPU's profile: on the host's track with the kernels it launched, and as an annotation
    # on the device's, from the first of them to the last. The second serves where the first holds no kernels.
    for event in sorted(events, key=lambda e: "CPU" not in str(e.device_type)):
        if event.key.startswith(RANGE):
            name = event.key.removeprefix(RANGE)
            total = event.device_time_total if device else event.cpu_time_total
            if name not in found or not found[name][1]:
                found[name] = (event.count / passes, total / 1e6 / passes)
    return found


def op_table(found: Mapping[str, tuple[float, float]], seconds: float, floors: Mapping[str, float]) -> str:
    """Time by op, the largest first, beside its floor."""
    rows = []
    for name, (calls, took) in sorted(found.items(), key=lambda item: -item[1][1]):
        shown = beside(floors.get(name), took)
        rows.append((name, f"{calls:g}", f"{1e6 * took:.1f}", f"{100 * took / seconds:.1f} %", *shown))
    rest = seconds - sum(took for _, took in found.values())
    rows.append(("between them", "", f"{1e6 * rest:.1f}", f"{100 * rest / seconds:.1f} %", "-", "-"))
    return table(("op", "calls", "us", "of the pass", "floor us", "floor / time"), rows)


def beside(floor: float | None, seconds: float) -> tuple[str, str]:
    """A floor in microseconds, and its share of the time."""
    return (f"{1e6 * floor:.1f}", f"{100 * floor / seconds:.0f} %") if floor and seconds else ("-", "-")


def kernel_table(
    events: Sequence[Any], passes: int, device: bool, most: int, ops: Collection[str], floors: Mapping[str, float]
) -> str:
    """The longest kernels, each with the ops of this pass whose cards name it, the floor of these, and its share of the
    time of all their kernels: a card counts for an op, not for its kernels. On a CPU the longest operators."""
    kind = "CUDA" if device else "CPU"
    mine = [e for e in events if kind in str(e.device_type) and not e.key.startswith(RANGE)]
    took = lambda e: (e.self_device_time_total if device else e.self_cpu_time_total) / 1e6 / passes
    total = sum(map(took, mine)) or 1.0
    owners = lambda kernel: [name for name in ops if name in OPS and kernel in OPS[name].kernels]
    rows = []
    for event in sorted(mine, key=took, reverse=True)[:most]:
        names, seconds = owners(event.key), took(event)
        together = sum(took(e) for e in mine if set(owners(e.key)) & set(names))
        rows.append(
            (
                event.key[:60],
                ", ".join(names) or "-",
                f"{event.count / passes:g}",
                f"{1e6 * seconds:.1f}",
                f"{100 * seconds / total:.1f} %",
                *beside(sum(floors.get(name, 0.0) for name in names), together),
            )
        )
    if not device:
        return table(("PyTorch operator", "calls", "us", "of all"), [(key, *cells[1:4]) for key, *cells in rows])
    return table(("kernel", "op", "calls", "us", "of all", "op's floor us", "floor / op's kernels"), rows)


def run(o: Any) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    subject = load(o.model, device)
    o.out.parent.mkdir(parents=True, exist_ok=True)
    watch = clock.DeviceClock() if device == "cuda" else None
    roofs = clock.roofs(watch) if watch else cpu_roofs()
    cache = subject.model.prefill(subject.prompts(o.batch, o.context))
    call = denoiser_pass(subject, cache, o.batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with labelled():
        for _ in range(3):
            call()
        with profile(activities=activities) as prof:
            begin = time.perf_counter()
            for _ in range(o.passes):
                call()
            if device == "cuda":
                torch.cuda.synchronize()
            wall = (time.perf_counter() - begin) / o.passes
    prof.export_chrome_trace(str(o.out))
    events = prof.key_averages()
    on_device = device == "cuda"
    found = by_op(events, o.passes, on_device)
    kernels = [e for e in events if "CUDA" in str(e.device_type) and not e.key.startswith(RANGE)]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 / o.passes if on_device else wall
    c, format = subject.model.config, format_of(subject.model)
    size = dict(batch=o.batch, context=o.context, format=format, roofs=roofs)
    floors = floors_of_pass(found, c, **size)
    name = torch.cuda.get_device_name() if on_device else f"CPU, {torch.get_num_threads()} threads, references"
    print(in_a_line(where()) + "\n")
    print(f"{subject.name} on {name}; batch {o.batch}, {o.context} tokens before, {o.passes} passes")
    print(f"roofs here: {roofs['bandwidth'] / 1e9:.1f} GB/s, {roofs['compute'] / 1e9:.0f} GFLOP/s")
    print(
        f"a pass under the profiler: {1e3 * wall:.2f} ms by the wall"
        + (f", device busy {1e3 * busy:.2f} ms" if on_device else "")
    )
    print(f"floor of the whole pass: {1e3 * whole.floor(c, whole.DENOISER, **size):.3g} ms\n")
    print(op_table(found, busy, floors))
    print(f"\n{kernel_table(events, o.passes, on_device, o.rows, found, floors)}")
    print(f"\n{o.out}: open it in ui.perfetto.dev")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("timeline", __doc__)
    p.add_argument(
        "--model",
        default="published" if gpu else "bundled",
        help="published, bundled or a folder (default: %(default)s)",
    )
    p.add_argument("--batch", type=positive, default=1)
    p.add_argument(
        "--context", type=positive, default=2048 if gpu else 128, help="tokens before (default: %(default)s)"
    )
    p.add_argument("--passes", type=positive, default=5, help="recorded passes (default: %(default)s)")
    p.add_argument("--rows", type=positive, default=15, help="kernels listed (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("denoiser_pass.json"), help="the trace (default: %(default)s)")
    return run(p.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
