"""`python -m profiling.timeline`: one denoiser pass on a time axis, and who took how much of it.

Writes a trace for ui.perfetto.dev (or chrome://tracing) and prints two tables: time by op beside the floor of what the
op must move and compute, and by kernel (on a CPU by PyTorch operator). The pass is as `generate` runs it: the tower,
then the unmasking step. Times in a trace are a little long, for the profiler takes its own: for how long a pass takes
use python -m bench.generate, for where it goes this.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import clock, whole
from bench.generate import denoiser_pass, format_of, load
from bench.measure import table
from tt_kernels import OPS

from .common import RANGE, command, labelled, parser, refuse

# The part of a pass (bench/whole.py) that an op's time belongs to; norms and convolutions move activations only.
PARTS = {
    "experts": "experts",
    "route": "router",
    "unmask": "head",
    "linear": "projections",
    **dict.fromkeys(("context_attention", "append_attention"), "attention"),
    **dict.fromkeys(("mamba_block", "mamba_step", "mamba_advance", "ssd_block", "ssd_step", "ssd_chunk"), "scan"),
}


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
        return amount / clock.percentile(seconds, 0.5)

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
    """Time by op, the largest first, each part's floor beside the ops that do its work."""
    spent: dict[str, float] = {}
    for name, (_, took) in found.items():
        if part := PARTS.get(name):
            spent[part] = spent.get(part, 0.0) + took
    rows = []
    for name, (calls, took) in sorted(found.items(), key=lambda item: -item[1][1]):
        part = PARTS.get(name)
        bound = floors.get(part, 0.0) if part else 0.0
        share = f"{100 * bound / spent[part]:.0f} %" if bound and part else "-"
        shown = (f"{1e6 * bound:.1f}" if bound else "-", share)
        rows.append((name, f"{calls:g}", f"{1e6 * took:.1f}", f"{100 * took / seconds:.1f} %", *shown))
    rest = seconds - sum(took for _, took in found.values())
    rows.append(("between them", "", f"{1e6 * rest:.1f}", f"{100 * rest / seconds:.1f} %", "-", "-"))
    return table(("op", "calls", "us", "of the pass", "floor us", "floor / time"), rows)


def kernel_rows(events: Sequence[Any], passes: int, device: bool, most: int) -> Iterator[tuple[str, ...]]:
    """The longest kernels, each with the op whose card names it; on a CPU the longest operators."""
    owner = {kernel: name for name, op in OPS.items() for kernel in op.kernels}
    kind = "CUDA" if device else "CPU"
    mine = [e for e in events if kind in str(e.device_type) and not e.key.startswith(RANGE)]
    took = lambda e: e.self_device_time_total if device else e.self_cpu_time_total
    total = sum(map(took, mine)) or 1.0
    for event in sorted(mine, key=took, reverse=True)[:most]:
        us = took(event) / passes
        yield (
            event.key[:60],
            owner.get(event.key, "-"),
            f"{event.count / passes:g}",
            f"{us:.1f}",
            f"{100 * us * passes / total:.1f} %",
        )


def run(o: Any) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        subject = load(o.model, device)
    except (OSError, ValueError, KeyError) as error:
        refuse(f"--model {o.model}: {error}")
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
    o.out.parent.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(o.out))
    events = prof.key_averages()
    on_device = device == "cuda"
    found = by_op(events, o.passes, on_device)
    kernels = [e for e in events if "CUDA" in str(e.device_type) and not e.key.startswith(RANGE)]
    busy = sum(e.self_device_time_total for e in kernels) / 1e6 / o.passes if on_device else wall
    each = whole.parts(
        subject.model.config, whole.DENOISER, batch=o.batch, context=o.context, format=format_of(subject.model)
    )
    floors = {name: max(b / roofs["bandwidth"], f / roofs["compute"]) for name, (b, f) in each.items()}
    name = torch.cuda.get_device_name() if on_device else f"CPU, {torch.get_num_threads()} threads, references"
    print(f"{subject.name} on {name}; batch {o.batch}, {o.context} tokens before, {o.passes} passes")
    print(f"roofs here: {roofs['bandwidth'] / 1e9:.1f} GB/s, {roofs['compute'] / 1e9:.0f} GFLOP/s")
    print(
        f"a pass under the profiler: {1e3 * wall:.2f} ms by the wall"
        + (f", device busy {1e3 * busy:.2f} ms" if on_device else "")
    )
    print(f"floor of the whole pass: {1e3 * sum(floors.values()):.3g} ms\n")
    print(op_table(found, busy, floors))
    what = "kernel" if on_device else "PyTorch operator"
    print("\n" + table((what, "op", "calls", "us", "of all"), list(kernel_rows(events, o.passes, on_device, o.rows))))
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
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--context", type=int, default=2048 if gpu else 128, help="tokens before (default: %(default)s)")
    p.add_argument("--passes", type=int, default=5, help="recorded passes (default: %(default)s)")
    p.add_argument("--rows", type=int, default=15, help="kernels listed (default: %(default)s)")
    p.add_argument("--out", type=Path, default=Path("denoiser_pass.json"), help="the trace (default: %(default)s)")
    o = p.parse_args(arguments)
    return command("timeline", lambda: run(o))


if __name__ == "__main__":
    sys.exit(main())
